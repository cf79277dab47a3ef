"""The package's own launches, executed from the PTX that Triton compiles for a GPU, on CPU tensors.

    with executing() as runs:
        stn_triton.affine_grid_sample(image, theta)
    runs[0].counts.instructions

Launchers, plans and tiles are those of an H100. What Triton would hand to the driver goes to
``bench.executor``: an access to anything but an element of the launch's tensors raises ``executor.Fault``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from bench import executor, specialisations
from stn_triton import backend
from stn_triton.kernels.host import configs, launch

META = torch.device("meta")
NUMBERS = {
    **{f"i{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"fp{bits}": np.dtype(f"f{bits // 8}") for bits in (32, 64)},
    "i1": np.dtype(np.uint8),
}
Sample = Callable[[specialisations.Launch], Sequence[int]]


class Run(NamedTuple):
    """A launch that was executed, and what was counted."""

    launch: specialisations.Launch
    counts: executor.Counts


def _dense(tensor: torch.Tensor) -> bool:
    formats = {4: (torch.channels_last,), 5: (torch.channels_last_3d,)}.get(tensor.dim(), ())
    return any(tensor.is_contiguous(memory_format=each) for each in (torch.contiguous_format, *formats))


def _elements(tensor: torch.Tensor) -> torch.Tensor:
    """Where each element is in its storage."""
    offsets = torch.tensor(tensor.storage_offset())
    for size, stride in zip(tensor.shape, tensor.stride()):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    return offsets.flatten()


def _add(memory: executor.Memory, name: str, tensors: list[torch.Tensor]) -> int:
    """The storage that tensors share, of which their elements may be touched; returns where it begins."""
    storage = tensors[0].untyped_storage()
    data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    allowed = None
    if not any(_dense(tensor) and tensor.nbytes == len(data) for tensor in tensors):
        allowed = np.zeros(len(data), bool)
        for tensor in tensors:
            size = tensor.element_size()
            elements = allowed[: len(data) // size * size].reshape(-1, size)
            elements[_elements(tensor).numpy()] = True
    return memory.add(name, data, allowed, storage.data_ptr() % 16)


_kernels: dict[str, executor.Kernel] = {}


def execute(each: specialisations.Launch, sample: Sample | None = None) -> executor.Counts:
    """Runs a launch that ``specialisations.compiling`` recorded; ``sample`` chooses some of its programs."""
    compiled = each.compiled
    text = compiled.asm["ptx"]
    if text not in _kernels:
        _kernels[text] = executor.Kernel(text, compiled.metadata.shared)
    signature = compiled.src.signature
    arguments = {
        name: each.arguments[name] for name in compiled.src.fn.arg_names if signature[name] != "constexpr"
    }
    memory, bases = executor.Memory(), dict[int, int]()
    tensors: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes():
            tensors.setdefault(value.untyped_storage().data_ptr(), []).append((name, value))
    for pointer, named in tensors.items():
        bases[pointer] = _add(memory, "+".join(name for name, _ in named), [tensor for _, tensor in named])
    values: list[Any] = []
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            begin = value.untyped_storage().data_ptr()
            values.append(np.uint64(bases[begin] + value.data_ptr() - begin if begin in bases else 0))
        else:
            values.append(NUMBERS[signature[name]].type(value))
    kernel = _kernels[text]
    values += [np.uint64(0)] * (len(kernel.params) - len(values))  # of Triton's own memory, which none has
    programs = each.programs if sample is None else sample(each)
    return executor.execute(kernel, programs, values, memory)


@contextmanager
def executing(
    target: str = "sm_90", sample: Sample | None = None, *, machine_code: bool = False
) -> Iterator[list[Run]]:
    """Inside, launches of the package on CPU tensors are executed; yields the list of them.

    With ``machine_code`` kernels are compiled to the end, and those that have been are not compiled again.
    """
    runs: list[Run] = []

    def run(kernel: Any, programs: int, device: torch.device, *args: Any, **kwargs: Any) -> None:
        compiled = kernel.warmup(*args, grid=(programs,), **kwargs)
        each = specialisations.Launch(compiled, programs, {**dict(zip(kernel.arg_names, args)), **kwargs})
        runs.append(Run(each, execute(each, sample)))

    def of_gpu(choose: Callable[..., Any]) -> Any:
        return lambda device, *args: choose(META if device.type == "cpu" else device, *args)

    with ExitStack() as stack:
        stack.enter_context(specialisations.compiling(target))
        stack.enter_context(backend.use("triton"))
        if not machine_code:
            stack.enter_context(specialisations.without_machine_code())
        stack.enter_context(mock.patch.object(launch, "runner", run))
        for name in ("choose", "choose_gather", "prefers_sorted"):
            stack.enter_context(mock.patch.object(configs, name, of_gpu(getattr(configs, name))))
        yield runs
