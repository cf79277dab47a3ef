"""PyTorch's own grid samplers, run on this package's kernels.

ATen's operators are replaced below autograd: where PyTorch would enter its CUDA kernels, it enters these
functions. Whatever it does above (derivative formulas, autocast, vmap, tracing) stays its own.

``cudnn_grid_sampler``, which ``grid_sample`` prefers where cuDNN can serve, becomes ``grid_sampler_2d`` with
cuDNN's options, in autograd already: the derivative of ``grid_sampler_2d`` makes only what is needed.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import backend, kernels
from .calls import plain
from .checks import DTYPES
from .kernels.modes import MOST_PIXELS, Interpolation, Padding, Source
from .switch import Patch, Switch
from .versions import TRICUBIC

__all__ = ["patch_torch"]


class _Registered(Switch):
    """This package's kernels, registered with PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self._library: torch.library.Library | None = None
        self._registered_before = False
        # other threads may still be inside a kernel that was just removed: the last ones are kept alive
        self._recent: deque[list[Callable[..., Any]]] = deque(maxlen=64)

    def turn_on(self) -> None:
        library = self._library = torch.library.Library("aten", "IMPL")
        # PyTorch says, once in a process, that a kernel is overridden
        quiet = nullcontext() if self._registered_before else warnings.catch_warnings()
        try:
            with quiet:
                if not self._registered_before:
                    warnings.filterwarnings("ignore", "Warning only once for all operators")
                replacements = list(_replacements())
                for name, key, function in replacements:
                    library.impl(name, function, key, with_keyset=True, allow_override=True)
            self._recent.append([_kernel(name, key) for name, key, _ in replacements])
        except BaseException:
            self.turn_off()
            raise
        self._registered_before = True

    def turn_off(self) -> None:
        if self._library is not None:
            self._library._destroy()  # a second time it does nothing
            self._library = None


_patch = _Registered()


class patch_torch(Patch):
    """Makes PyTorch's own ``grid_sample`` run on this package's kernels, for code that nobody edits.

    For a block::

        with stn.patch_torch():
            warped = kornia.geometry.transform.warp_affine(image, matrix, (224, 224))
            warped.mean().backward()

    or, as ``@stn.patch_torch()``, for a function, coroutine and generator functions among them (below
    ``@contextlib.contextmanager``); or from here on, until ``disable``::

        stn.patch_torch().enable()

    Replaced are ATen's 2-D and 3-D grid samplers and their backward operators, cuDNN's among them, on devices
    where Triton runs (see ``python -m stn_triton``); on the CPU with ``TRITON_INTERPRET=1`` only. Calls that
    the kernels do not take (other dtypes, arguments that do not fit) go where they went before, and fail as
    they did. Autograd (second derivatives as far as PyTorch has them), autocast, ``vmap`` and
    ``torch.compile`` are PyTorch's own. Results are those of :func:`stn_triton.grid_sample`.

    The patch holds for the whole process, for all threads, and an operator runs on what is in force when it
    runs: a backward pass outside the block runs on PyTorch's kernels. Blocks may be nested and may overlap
    in several threads: the last one to end restores PyTorch's kernels, unless ``enable`` was called.

    A ``with`` block is entered and left whole or not at all, whoever keeps this object or the exception: an
    interrupt (Ctrl-C, any signal whose handler raises) leaves in force what was before the block, at the
    latest when its exception has been dealt with. An interrupted ``enable`` or ``disable`` leaves the old
    state or the new one. Blocks entered by hand (``__enter__``, ``contextlib.ExitStack``) end with
    ``disable`` too, as an interrupt may have left one open: ``disable``, then ``enable``, always heals.

    A forked process has what ``enable`` said, and the blocks of the thread that forked; those of other
    threads end there.

    PyTorch does not guard the registration of operators against calls in other threads: best turn it on
    before they start. Inside a compiled function it cannot be turned on; what the compiler writes code for
    (Inductor: the 2-D forward pass) calls no operator and stays the compiler's.

    Example:
        >>> image, grid = torch.rand(1, 3, 48, 64), torch.rand(1, 10, 20, 2) * 2 - 1
        >>> with stn.patch_torch():
        ...     warped = torch.nn.functional.grid_sample(image, grid, align_corners=False)
    """

    _switch = _patch


# -------------------------------------------------------------------------------------- registration
# what cuDNN's operators compute
_CUDNN_MODES = int(Interpolation.BILINEAR), int(Padding.ZEROS), True


def _replacements() -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """(operator, dispatch key, function), wherever PyTorch has a kernel that Triton might stand in for."""
    for key in ("CUDA", "XPU", "PrivateUse1", *(["CPU"] if backend.interpreting() else [])):
        for dims in (2, 3):
            name = f"grid_sampler_{dims}d"
            if _has_kernel(name, key):
                yield name, key, _forward(dims, _kernel(name, key))
            if _has_kernel(f"{name}_backward", key):
                yield f"{name}_backward", key, _backward(dims, _kernel(f"{name}_backward", key))
        name = "cudnn_grid_sampler"
        if _has_kernel(name, key):
            yield name, key, _cudnn_forward(_kernel(name, key))
            yield f"{name}_backward", key, _cudnn_backward(_kernel(f"{name}_backward", key))
            yield name, f"Autograd{key}", _cudnn_as_2d(_kernel(name, f"Autograd{key}"))


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"aten::{name}", key)


def _kernel(name: str, key: str) -> Callable[..., Any]:
    """What is registered now, as a function of a key set and the operator's arguments."""
    return torch.library.get_kernel(f"aten::{name}", key).call_boxed


def _forward(dims: int, original: Callable[..., Any]) -> Callable[..., Tensor]:
    def forward(
        keyset: Any, input: Tensor, grid: Tensor, interpolation: int, padding: int, align_corners: bool
    ) -> Tensor:
        if type(input) is not Tensor or type(grid) is not Tensor:
            input, grid = plain(input), plain(grid)
        if not _fits(dims, input, grid, interpolation, padding):
            return original(keyset, input, grid, interpolation, padding, align_corners)
        return _sample(input, grid, interpolation, padding, align_corners)

    return forward


def _backward(dims: int, original: Callable[..., Any]) -> Callable[..., tuple[Tensor | None, Tensor]]:
    def backward(
        keyset: Any,
        grad_output: Tensor,
        input: Tensor,
        grid: Tensor,
        interpolation: int,
        padding: int,
        align_corners: bool,
        output_mask: list[bool],
    ) -> tuple[Tensor | None, Tensor]:
        modes = interpolation, padding, align_corners
        grad_output, input, grid = map(plain, (grad_output, input, grid))
        if not (_fits(dims, input, grid, interpolation, padding) and _is_gradient(grad_output, input, grid)):
            return original(keyset, grad_output, input, grid, *modes, output_mask)
        return _sample_backward(grad_output, input, grid, *modes, *output_mask)

    return backward


def _cudnn_forward(original: Callable[..., Any]) -> Callable[..., Tensor]:
    def otherwise(keyset: Any, input: Tensor, grid: Tensor, *modes: Any) -> Tensor:
        return original(keyset, input, grid)

    forward = _forward(2, otherwise)
    return lambda keyset, input, grid: forward(keyset, input, grid, *_CUDNN_MODES)


def _cudnn_backward(original: Callable[..., Any]) -> Callable[..., tuple[Tensor | None, Tensor]]:
    def otherwise(keyset: Any, grad_output: Tensor, input: Tensor, grid: Tensor, *modes: Any) -> Any:
        return original(keyset, input, grid, grad_output)

    backward = _backward(2, otherwise)
    return lambda keyset, input, grid, grad_output: backward(
        keyset, grad_output, input, grid, *_CUDNN_MODES, [True, True]
    )


def _cudnn_as_2d(original: Callable[..., Any]) -> Callable[..., Tensor]:
    """For autograd, above cuDNN's own derivative, which makes both gradients, needed or not."""

    def forward(keyset: Any, input: Tensor, grid: Tensor) -> Tensor:
        if not _fits(2, input, grid, *_CUDNN_MODES[:2]):
            return original(keyset, input, grid)
        return torch.ops.aten.grid_sampler_2d.default(input, grid, *_CUDNN_MODES)

    return forward


# ------------------------------------------------------------------------------------------ kernels
def _fits(dims: int, input: Tensor, grid: Tensor, interpolation: int, padding: int) -> bool:
    """Whether the kernels take this call; PyTorch's own has what they lack, and says what is wrong."""
    return (
        # asked each time: inside ``backend.use("torch")`` the package itself calls ATen's samplers
        backend.select(input.device.type).name != "torch"
        and input.dtype in DTYPES
        and grid.dtype == input.dtype
        and grid.device == input.device
        and input.dim() == grid.dim() == dims + 2
        and grid.shape[-1] == dims
        and grid.shape[0] == input.shape[0]
        and 0 not in input.shape[2:]
        and max(*input.shape[2:], *grid.shape[1:-1]) <= MOST_PIXELS
        and 0 <= interpolation <= (Interpolation.BICUBIC if dims == 2 or TRICUBIC else Interpolation.NEAREST)
        and 0 <= padding <= Padding.REFLECTION
    )


def _output_shape(input: Tensor, grid: Tensor) -> tuple[int, ...]:
    return (*input.shape[:2], *grid.shape[1:-1])


def _is_gradient(grad_output: Tensor, input: Tensor, grid: Tensor) -> bool:
    return (
        grad_output.dtype == input.dtype
        and grad_output.device == input.device
        and grad_output.shape == _output_shape(input, grid)
    )


def _sample(input: Tensor, grid: Tensor, interpolation: int, padding: int, align_corners: bool) -> Tensor:
    output = input.new_empty(_output_shape(input, grid))
    if output.numel() > 0:
        modes = Source.GRID, interpolation, padding, align_corners
        kernels.dispatch.sample_forward(input, grid, None, output, *modes)
    return output


def _sample_backward(
    grad_output: Tensor,
    input: Tensor,
    grid: Tensor,
    interpolation: int,
    padding: int,
    align_corners: bool,
    input_grad: bool,
    grid_grad: bool,
) -> tuple[Tensor | None, Tensor]:
    """d input and d grid, contiguous. Not asked for, d input is None and d grid is not filled.

    (The compiler counts on a d grid in every case, as ATen makes one.)
    """
    grad_input, grad_grid = None, None
    slopes = grid_grad and interpolation != Interpolation.NEAREST  # steps: the slope is 0
    if grad_output.numel() > 0 and (input_grad or slopes):
        modes = interpolation, padding, align_corners
        grad_input, grad_grid = _gradients(grad_output, input, grid, *modes, input_grad, slopes)
    if input_grad and grad_input is None:
        grad_input = input.new_zeros(input.shape)
    if grad_grid is None:
        grad_grid = grid.new_zeros(grid.shape) if grid_grad else grid.new_empty(grid.shape)
    return grad_input, grad_grid


def _gradients(
    grad_output: Tensor,
    input: Tensor,
    grid: Tensor,
    interpolation: int,
    padding: int,
    align_corners: bool,
    input_grad: bool,
    grid_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Either is None unless asked for."""
    grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device) if input_grad else None
    modes = interpolation, padding, align_corners
    repeatable = torch.are_deterministic_algorithms_enabled()
    grad_grid, _ = kernels.dispatch.sample_backward(
        grad_output, input, grid, None, grad_input, Source.GRID, *modes, grid_grad, False, repeatable
    )
    return grad_input, grad_grid
