"""The public functions.

Convention, here and everywhere in the package: coordinates are normalised and x comes first, as in
:func:`torch.nn.functional.affine_grid`; every parameter maps output coordinates to input coordinates;
images are (N, C, H, W) or (N, C, D, H, W). With ``align_corners=True`` -1 and 1 are the centres of an
image's outermost pixels, with ``align_corners=False`` their outer edges.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import ops
from .kernels.modes import Interpolation, Padding, Source

__all__ = ["affine_grid", "affine_grid_sample", "grid_sample"]

_INTERPOLATION = {
    "bilinear": Interpolation.BILINEAR,
    "nearest": Interpolation.NEAREST,
    "bicubic": Interpolation.BICUBIC,
}
_PADDING = {"zeros": Padding.ZEROS, "border": Padding.BORDER, "reflection": Padding.REFLECTION}


# --------------------------------------------------------------------------- as torch.nn.functional's
def grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.grid_sample` on Triton kernels, with tricubic sampling as well.

    Convention: ``grid[n, (z,) y, x]`` is the place in ``input``, normalised and x first, that output
    pixel (z, y, x) is read from.

    Args:
        input: (N, C, H, W) or (N, C, D, H, W), float16, bfloat16, float32 or float64, any strides.
        grid: (N, H_out, W_out, 2) or (N, D_out, H_out, W_out, 3), of the input's dtype.
        mode: "bilinear" (trilinear in 5-D), "nearest" (halves to even) or "bicubic" (A = -0.75;
            tricubic in 5-D, which PyTorch lacks).
        padding_mode: "zeros", "border" or "reflection".
        align_corners: whether -1 and 1 are the centres (True) or the outer edges (False) of the
            outermost pixels. None means False, with PyTorch's warning.

    Returns:
        (N, C, H_out, W_out) or (N, C, D_out, H_out, W_out), contiguous, of the input's dtype.

    Coordinates, weights and sums are float32 (float64 for float64 images), whatever the dtype of the
    image. A NaN coordinate, and with zeros padding an infinite one, reads nothing: 0. With border
    and reflection padding NaN reads the first pixel; infinity reads the border, or the first pixel.
    Under autocast the arguments are promoted as PyTorch does.

    Differentiable any number of times in ``input`` and ``grid`` (from the second on in plain PyTorch, with
    its memory).

    Raises:
        What PyTorch raises, with PyTorch's message.
    """
    if align_corners is None:
        align_corners = _default_align_corners()
    if isinstance(input, Tensor) and isinstance(grid, Tensor):
        input, grid = _autocast(input, grid)
    if mode not in _INTERPOLATION or padding_mode not in _PADDING or not _grid_fits(input, grid):
        return torch.nn.functional.grid_sample(input, grid, mode, padding_mode, align_corners)
    modes = _INTERPOLATION[mode], _PADDING[padding_mode], bool(align_corners)
    return ops.sample(input, grid, Source.GRID, grid.shape[1:-1], *modes)


def affine_grid(theta: Tensor, size: Sequence[int], align_corners: bool | None = None) -> Tensor:
    """:func:`torch.nn.functional.affine_grid` on Triton kernels.

    Convention: ``theta`` maps output coordinates to input coordinates, both normalised and x first.

    Args:
        theta: (N, 2, 3) or (N, 3, 4), floating point.
        size: the output's size, (N, C, H, W) or (N, C, D, H, W).
        align_corners: as in :func:`grid_sample`. None means False, with PyTorch's warning.

    Returns:
        (N, H, W, 2) or (N, D, H, W, 3) of theta's dtype; computed in float32 or wider.

    :func:`affine_grid_sample` samples without holding this tensor. Differentiable any number of times.

    Raises:
        What PyTorch raises, with PyTorch's message.
    """
    if align_corners is None:
        align_corners = _default_align_corners()
    if not _theta_fits(theta, size):
        return torch.nn.functional.affine_grid(theta, list(size), align_corners)
    return ops.grid(theta, Source.AFFINE, tuple(size[2:]), bool(align_corners))


def _default_align_corners() -> bool:
    """PyTorch's warning, in PyTorch's words, to the caller's caller."""
    warnings.warn(
        "Default grid_sample and affine_grid behavior has changed to align_corners=False since 1.3.0. "
        "Please specify align_corners=True if the old behavior is desired. "
        "See the documentation of grid_sample for details.",
        stacklevel=3,
    )
    return False


def _autocast(input: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast, the types PyTorch gives ``grid_sample``: float32 on the CPU, else the widest."""
    device = input.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return input, grid
    if torch.float64 in (input.dtype, grid.dtype) or not (
        input.is_floating_point() and grid.is_floating_point()
    ):
        return input, grid
    dtype = torch.float32 if device == "cpu" else torch.promote_types(input.dtype, grid.dtype)
    return input.to(dtype), grid.to(dtype)


def _grid_fits(input: Any, grid: Any) -> bool:
    """Whether PyTorch would take the pair. If not, PyTorch is asked, and says why."""
    return (
        isinstance(input, Tensor)
        and isinstance(grid, Tensor)
        and input.dim() in (4, 5)
        and grid.dim() == input.dim()
        and grid.shape[-1] == input.dim() - 2
        and grid.shape[0] == input.shape[0]
        and input.is_floating_point()
        and grid.dtype == input.dtype
        and grid.device == input.device
        and input.layout == grid.layout == torch.strided
        and all(size > 0 for size in input.shape[2:])
    )


def _theta_fits(theta: Any, size: Any) -> bool:
    """Whether PyTorch would take the arguments of ``affine_grid``. If not, PyTorch is asked, and says why."""
    return (
        isinstance(theta, Tensor)
        and theta.is_floating_point()
        and theta.layout == torch.strided
        and len(size) in (4, 5)
        and theta.dim() == 3
        and theta.shape[1] == len(size) - 2
        and theta.shape[2] == len(size) - 1
        and theta.shape[0] == size[0]
        and all(n > 0 for n in size)
    )


# --------------------------------------------------------------------------------------------- fused
def affine_grid_sample(
    input: Tensor,
    theta: Tensor,
    size: Sequence[int] | None = None,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> Tensor:
    """Warp images by affine maps: ``affine_grid`` and ``grid_sample`` in one kernel.

    Convention: ``theta`` maps output coordinates to input coordinates, both normalised and x first;
    the pixel at p in the output is read at ``theta @ (*p, 1)`` in the input (Jaderberg et al., Spatial
    Transformer Networks, 2015, equation 1).

    Args:
        input: (N, C, H, W) or (N, C, D, H, W), float16, bfloat16, float32 or float64, any strides.
        theta: (N, 2, 3) or (N, 3, 4); or (N, T, 2, 3), (N, T, 3, 4) for T transforms of each image, which
            is not copied. A batch of 1 is broadcast over N. Any floating dtype: a half image can have
            float32 parameters.
        size: the output's spatial size, (H_out, W_out) or (D_out, H_out, W_out). Default: the input's.
        mode: "bilinear" (trilinear in 5-D), "nearest" or "bicubic" (tricubic in 5-D).
        padding_mode: "zeros", "border" or "reflection".
        align_corners: whether -1 and 1 are the centres (True) or the outer edges (False) of the
            outermost pixels, in the input and in the output.

    Returns:
        (N, C, *size), or (N, T, C, *size) for T transforms, in the input's dtype and memory format.

    No grid and no gradient of a grid is held in memory. Coordinates, weights and sums are float32
    (float64 where an argument is float64); bad coordinates are treated as in :func:`grid_sample`.
    Differentiable any number of times in ``input`` and ``theta`` (from the second on in plain PyTorch,
    with its memory); the gradient of a broadcast ``theta`` is summed. The
    gradient of ``theta`` is the same to the bit each time.

    Raises:
        TypeError: an argument is not of the type it must be.
        ValueError: a shape, a size, a device or an option does not fit; the message names the argument.
    """
    dims = _check_image(input)
    _check_parameter("theta", theta, (dims, dims + 1), input)
    size = _check_size(size, input)
    modes = _check_modes(mode, padding_mode, align_corners)
    return ops.sample(input, theta, Source.AFFINE, size, *modes)


# ----------------------------------------------------------------------------------------- validation
def _refuse(kind: type[Exception], name: str, expected: str, got: object) -> NoReturn:
    raise kind(f"{name} must be {expected}, got {got}")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        _refuse(TypeError, name, "a tensor", type(value).__name__)
    if not value.is_floating_point():
        _refuse(TypeError, name, "a floating-point tensor", value.dtype)
    if value.layout != torch.strided:
        _refuse(ValueError, name, "a dense (strided) tensor", value.layout)


def _check_image(input: Tensor) -> int:
    """The number of spatial dimensions."""
    _check_tensor("input", input)
    if input.dim() not in (4, 5):
        _refuse(ValueError, "input", "(N, C, H, W) or (N, C, D, H, W)", f"shape {tuple(input.shape)}")
    if any(size == 0 for size in input.shape[2:]):
        _refuse(ValueError, "input", "of non-empty spatial size", f"shape {tuple(input.shape)}")
    return input.dim() - 2


def _check_parameter(name: str, value: Tensor, matrix: tuple[int, int], input: Tensor) -> None:
    """(N, *matrix) or (N, T, *matrix), N that of the images or 1, on their device."""
    _check_tensor(name, value)
    batch = input.shape[0]
    if value.dim() not in (3, 4) or tuple(value.shape[-2:]) != matrix or value.shape[0] not in (batch, 1):
        rows, columns = matrix
        expected = (
            f"({batch}, {rows}, {columns}) or ({batch}, T, {rows}, {columns}), or the same with batch 1,"
        )
        _refuse(ValueError, name, f"{expected} for this {input.dim()}-D input", f"shape {tuple(value.shape)}")
    if value.device != input.device:
        _refuse(ValueError, name, f"on the input's device, {input.device}", value.device)


def _check_size(size: Sequence[int] | None, input: Tensor) -> tuple[int, ...]:
    if size is None:
        return tuple(input.shape[2:])
    expected = "(H, W)" if input.dim() == 4 else "(D, H, W)"
    if not isinstance(size, (tuple, list)) or not all(
        isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in size
    ):
        _refuse(TypeError, "size", f"{expected}, a tuple of ints", repr(size))
    if len(size) != input.dim() - 2 or any(n < 0 for n in size):
        _refuse(ValueError, "size", f"{expected}, none of them negative", tuple(size))
    return tuple(size)


def _check_modes(mode: str, padding_mode: str, align_corners: bool) -> tuple[Interpolation, Padding, bool]:
    for name, value, known in (("mode", mode, _INTERPOLATION), ("padding_mode", padding_mode, _PADDING)):
        if not isinstance(value, str):
            _refuse(TypeError, name, "a string", type(value).__name__)
        if value not in known:
            _refuse(ValueError, name, "one of " + ", ".join(map(repr, known)), repr(value))
    if not isinstance(align_corners, bool):
        _refuse(TypeError, "align_corners", "a bool", repr(align_corners))
    return _INTERPOLATION[mode], _PADDING[padding_mode], align_corners
