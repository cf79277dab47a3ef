"""What every launcher needs: the compute type, the index width, vector widths, and the launch.

What a launcher decides is kept (``planned``), and so is the kernel that Triton compiled for it (``Plan``):
a call like an earlier one looks both up and fills in the pointers.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

from . import configs
from .blocks import lock
from .dtypes import compute_dtype
from .parameters import channel_dim, image_span

INT32_MAX = 2**31 - 1
MOST_PROGRAMS = 2**31 - 1  # of a launch, along the first axis of its grid
MOST_LANES = 2**32 - 1  # of a launch on AMD's GPUs


def compute_dtypes(*tensors: torch.Tensor) -> tuple[tl.dtype, torch.dtype]:
    """``compute_dtype`` as Triton's and as PyTorch's."""
    dtype = compute_dtype(*tensors)
    return (tl.float64 if dtype == torch.float64 else tl.float32), dtype


def index_dtype(*tensors: torch.Tensor | None, rows: int = 0) -> tl.dtype:
    """The width of an offset within one image, for which the largest of all images decides.

    ``rows``: those of an output, depth * height, which tiles count; an expanded output may have more of them
    than it spans.
    """
    span = max(image_span(tensor) for tensor in tensors if tensor is not None)
    return tl.int32 if max(rows, span) <= INT32_MAX else tl.int64


def vector_width(tensor: torch.Tensor, dims: int) -> int:
    """Channels that are read or written by one lane: 16 bytes of them where memory allows, else 1.

    They must be neighbours, and every pixel's offset a multiple of the vector. (The pointer's own
    alignment is Triton's to check.)
    """
    channel = channel_dim(tensor, dims)
    if tensor.stride(channel) != 1:
        return 1
    vector = max(16 // tensor.element_size(), 1)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        while dim != channel and size > 1 and stride % vector:
            vector //= 2
    return vector


# A product and the sum it goes into are rounded once: more accurate, and faster.
OPTIONS = {"enable_fp_fusion": True}


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensors'."""
    if device.type == "cpu":  # the interpreter
        return contextlib.nullcontext()
    module = torch.get_device_module(device)
    return (
        contextlib.nullcontext() if device.index == module.current_device() else module.device(device.index)
    )


def run(kernel, programs: int, device: torch.device, *args, **kwargs):
    """Launches; returns the compiled kernel, the interpreter nothing."""
    with on_device(device):
        return kernel[(programs,)](*args, **kwargs)


# What a launch does. ``specialisations`` compiles here instead, for GPUs that are not there.
runner = run


# --------------------------------------------------------------------------------------------- plans
class Plan:
    """A launch of ``programs`` programs without its tensors: what their layouts, dtypes and modes decide.

    Every launch of the package is one. Of the tensors among ``args`` only the places are kept, and a call
    names the tensors in that order. Triton finds the compiled kernel by looking at every argument; here they
    are known but for the pointers' alignment, so that it is asked once for each.
    """

    __slots__ = ("args", "compiled", "count", "device", "kernel", "kwargs", "module", "places", "programs")

    def __init__(self, kernel, programs: int, device: torch.device, *args, **kwargs) -> None:
        most = MOST_PROGRAMS
        if torch.version.hip is not None:  # counts lanes, up to 64 a warp, and beyond 32 bits starts too few
            most = MOST_LANES // (64 * kwargs.get("num_warps", 4))
        if programs > most:
            raise ValueError(f"{programs} tiles of pixels are more than the {most} that can be done at once")
        self.kernel, self.programs, self.device = kernel, programs, device
        self.places = [i for i, argument in enumerate(args) if isinstance(argument, torch.Tensor)]
        # in the kernel's order: those given by place, of which tensors come with a call, and the others
        self.count = len(args)
        self.args = [None if isinstance(argument, torch.Tensor) else argument for argument in args]
        self.args += [kwargs[name] for name in kernel.arg_names[self.count :]]
        self.kwargs = {**OPTIONS, **kwargs}
        self.module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
        # by which pointers are no multiples of 16 bytes, as Triton tells kernels apart
        self.compiled: dict[int, _Compiled] = {}

    def __call__(self, *tensors: torch.Tensor) -> None:
        args = self.args.copy()
        pointers = 0
        for place, tensor in zip(self.places, tensors, strict=True):
            args[place] = tensor
            pointers |= tensor.data_ptr()
        compiled = self.compiled.get(_unaligned(tensors) if pointers & 15 else 0)
        if compiled is None or runner is not run or _watched():
            self._ask(tensors, args)
        elif self.module is not None and self.module.current_device() != self.device.index:
            with self.module.device(self.device.index):
                self(*tensors)
        else:  # as Triton's ``CompiledKernel`` does it
            stream = triton.runtime.driver.active.get_current_stream(self.device.index)
            _, launch, function, metadata = compiled
            launch(self.programs, 1, 1, stream, function, metadata, None, None, None, *args)

    def _ask(self, tensors: tuple[torch.Tensor, ...], args: list[Any]) -> None:
        """Launches by Triton, or by who takes its place, and keeps the kernel that it takes."""
        compiled = runner(self.kernel, self.programs, self.device, *args[: self.count], **self.kwargs)
        if runner is run and not _instrumented() and _tells_kernels_apart(compiled):
            kept = _Compiled(compiled, compiled.run, compiled.function, compiled.packed_metadata)
            self.compiled[_unaligned(tensors)] = kept


class _Compiled(NamedTuple):
    """A kernel that Triton has compiled and loaded, and with what it is launched."""

    kernel: Any  # which unloads it when it goes
    run: Any
    function: Any
    metadata: Any


def _unaligned(tensors: tuple[torch.Tensor, ...]) -> int:
    """A bit for each tensor: whether it begins at no multiple of 16 bytes."""
    bits = 0
    for tensor in tensors:
        bits = bits << 1 | (tensor.data_ptr() & 15 != 0)
    return bits


def _tells_kernels_apart(compiled: Any) -> bool:
    """Whether Triton would take this kernel again for the same numbers, dtypes and alignments.

    On other GPUs than NVIDIA's it looks at more, such as the size of a tensor's storage.
    """
    return isinstance(compiled, triton.compiler.CompiledKernel) and compiled.metadata.target.backend == "cuda"


def _instrumented() -> bool:
    """Whether Triton is set to compile kernels another way than it usually does, in this process."""
    knobs = triton.knobs
    return bool(
        knobs.runtime.debug
        or knobs.compilation.instrumentation_mode
        or knobs.runtime.add_stages_inspection_hook is not None
    )


def _watched() -> bool:
    """Whether that is so, or whether launches call hooks, for which Triton puts together what it says."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook  # chains of functions, or None
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave)) or _instrumented()


Made = TypeVar("Made")
_planned: list[Any] = []


def forget() -> None:
    """Drops all plans, and with them the kernels compiled for a driver that is no longer active."""
    for function in _planned:
        function.forget()


class planned(Generic[Made]):
    """Decorates a function of tensors and numbers that decides by the tensors' layouts and dtypes alone.

    What it returns is kept for the next call: as much as is usual in a program whose shapes repeat. No tensor
    is. Called with the tensors, of which the first is not None and all are on its device, and the numbers.
    """

    MOST = 512  # of each function, a few kilobytes each; then the oldest goes

    def __init__(self, make: Callable[..., Made]) -> None:
        functools.update_wrapper(self, make)
        self._make = make
        self._kept: dict[tuple, Made] = {}
        self._lock = lock()
        _planned.append(self)

    def __call__(self, tensors: tuple[Any, ...], *numbers: Any) -> Made:
        state = configs.state()
        if runner is not run or state is None:  # whoever watches launches or choices sees them all
            return self._make(*tensors, *numbers)
        key = tensors[0].device, state, *numbers
        for tensor in tensors:
            key += (None,) if tensor is None else (tensor.dtype, tensor.shape, tensor.stride())
        made = self._kept.get(key)
        return self._keep(key, self._make(*tensors, *numbers)) if made is None else made

    def _keep(self, key: tuple, made: Made) -> Made:
        with self._lock:
            while len(self._kept) >= self.MOST:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = made
        return made

    def forget(self) -> None:
        with self._lock:
            self._kept.clear()
