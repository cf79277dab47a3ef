"""The public functions.

Convention, here and everywhere in the package: coordinates are normalised and x comes first, as in
:func:`torch.nn.functional.affine_grid`; every parameter maps output coordinates to input coordinates;
images are (N, C, H, W) or (N, C, D, H, W). With ``align_corners=True`` -1 and 1 are the centres of an
image's outermost pixels, with ``align_corners=False`` their outer edges.

Derivatives: every function is differentiable any number of times in all its tensors, in reverse and in
forward mode (``torch.func``'s ``grad``, ``jvp``, ``jacrev``, ``jacfwd`` and ``hessian``; dual numbers), and
works under ``torch.func.vmap`` and ``torch.utils.checkpoint``. What computes them:

* First derivatives in reverse mode are kernels. They hold no coordinates and no gradients of coordinates,
  but those of a grid or a flow that are asked for.
* Second derivatives and forward mode are kernels too. They hold tangents and gradients of the coordinates,
  which are of the output's size; how a homography or control points move these, PyTorch's operators compute.
* PyTorch's operators alone, with their memory, compute third and higher derivatives, and with
  ``antialias=True`` second ones and forward mode. The latter make the host wait, and ``torch.compile``
  refuses them. It takes all else whole, with gradients, function transforms and forward mode.

Only those gradients are computed that are asked for. An image is kept for the backward pass only if the
gradient by the coordinates needs it. At kinks derivatives are one-sided, on the side that is PyTorch's.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, backend, distributed
from .calls import elsewhere, has_torch_function, is_taken, tracing_state
from .checks import (
    DTYPES,
    INTERPOLATIONS,
    PaddingMode,
    affine_grid_fits,
    averaged,
    check_dtype,
    check_fill,
    check_flow,
    check_grid_points,
    check_grid_size,
    check_image,
    check_modes,
    check_out_size,
    check_padding,
    check_parameter,
    check_points,
    check_tensor,
    grid_sample_fits,
    refuse,
    to_padding,
    to_size,
)
from .hints import note_on_grid_sample
from .kernels.host.dtypes import sample_dtype
from .kernels.modes import Source
from .transforms import splines
from .transforms.arguments import full_of

__all__ = [
    "affine_grid",
    "affine_grid_sample",
    "flow_grid_sample",
    "grid_sample",
    "projective_grid",
    "projective_grid_sample",
    "tps_grid",
    "tps_grid_sample",
]

_GRID, _AFFINE, _PROJECTIVE, _TPS, _FLOW = map(int, Source)


# --------------------------------------------------------------------------- as torch.nn.functional's
def grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: PaddingMode = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.grid_sample` on Triton kernels, with circular padding as well.

    Convention: ``grid[n, (z,) y, x]`` is the place in ``input``, normalised and x first, that output
    pixel (z, y, x) is read from. In pixels, x lies in column i, by ``align_corners``, and y and z alike ::

        False:  i = ((x + 1) W - 1) / 2
        True:   i = (x + 1) (W - 1) / 2

    Args:
        input: (N, C, H, W) or (N, C, D, H, W), float16, bfloat16, float32 or float64, any strides.
        grid: (N, H_out, W_out, 2) or (N, D_out, H_out, W_out, 3), of the input's dtype.
        mode: "bilinear" (trilinear in 5-D), "nearest" (halves to even) or "bicubic" (A = -0.75;
            tricubic in 5-D, which PyTorch lacks before 2.15).
        padding_mode: "zeros", "border", "reflection" or "circular", where a pixel's number along an axis is
            taken modulo the axis' size, whatever ``align_corners`` (SciPy's "grid-wrap"; PyTorch lacks it).
            Or a tuple of one for each axis, x first: ("circular", "border") is a panorama's.
        align_corners: whether -1 and 1 are the centres (True) or the outer edges (False) of the
            outermost pixels. None means False, with PyTorch's warning.

    Returns:
        (N, C, H_out, W_out) or (N, C, D_out, H_out, W_out), contiguous, of the input's dtype.

    Coordinates, weights and sums are float32 (float64 for float64 images), whatever the dtype of the
    image. A NaN coordinate, and with zeros padding an infinite one, reads nothing: 0. With border padding
    NaN reads the first pixel and infinity the border; with reflection and circular padding both read the
    lower edge.
    Under autocast the arguments are promoted as PyTorch does.

    Differentiable in ``input`` and ``grid`` any number of times, in both modes (see the module).

    Raises:
        Exception: the one that PyTorch raises, with PyTorch's message.

    Example:
        >>> image, grid = torch.rand(1, 3, 48, 64), torch.rand(1, 10, 20, 2) * 2 - 1
        >>> stn.grid_sample(image, grid, padding_mode="border", align_corners=False).shape
        torch.Size([1, 3, 10, 20])
    """
    if (has_torch_function(input, grid) or tracing_state()) and is_taken():
        return elsewhere(grid_sample, input, grid, mode, padding_mode, align_corners)
    arguments = input, grid, mode, padding_mode, align_corners
    if isinstance(input, Tensor) and isinstance(grid, Tensor):
        input, grid = _autocast(input, grid)
    padding = to_padding(padding_mode, input.dim() - 2) if isinstance(input, Tensor) else None
    if padding is None or not grid_sample_fits(input, grid, mode, align_corners):
        if mode == "bicubic" and isinstance(input, Tensor) and input.dim() == 5:
            arguments = (*arguments[:2], "bilinear", *arguments[3:])  # tricubic is not what is wrong
        if isinstance(padding_mode, tuple) and isinstance(input, Tensor) and input.dim() in (4, 5):
            check_padding(padding_mode, input.dim() - 2)
        if padding is not None or padding_mode == "circular":  # nor is a padding that PyTorch lacks
            arguments = (*arguments[:3], "zeros", align_corners)
        return _ask_pytorch(torch.nn.functional.grid_sample, *arguments, note=note_on_grid_sample)
    if align_corners is None:
        _warn(_DEFAULT_ALIGN_CORNERS)
    modes = INTERPOLATIONS[mode], padding, bool(align_corners)
    return autograd.sample(input, grid, None, _GRID, grid.shape[1:-1], *modes)


def affine_grid(theta: Tensor, size: Sequence[int], align_corners: bool | None = None) -> Tensor:
    """:func:`torch.nn.functional.affine_grid` on Triton kernels.

    Convention: ``theta`` maps output coordinates to input coordinates, both normalised and x first. The entry
    at (x, y) is ``theta @ (x, y, 1)``, and column j of W is at, by ``align_corners`` ::

        False:  x = (2 j + 1) / W - 1
        True:   x = 2 j / (W - 1) - 1

    Args:
        theta: (N, 2, 3) or (N, 3, 4), floating point.
        size: the output's size, (N, C, H, W) or (N, C, D, H, W).
        align_corners: as in :func:`grid_sample`. None means False, with PyTorch's warning.

    Returns:
        (N, H, W, 2) or (N, D, H, W, 3) of theta's dtype; computed in float32 or wider.

    :func:`affine_grid_sample` samples without holding this tensor. Differentiable any number of times, in
    both modes.

    Raises:
        Exception: the one that PyTorch raises, with PyTorch's message.

    Example:
        >>> stn.affine_grid(torch.eye(2, 3)[None], (1, 3, 1, 4), align_corners=False)[0, 0, :, 0]
        tensor([-0.7500, -0.2500,  0.2500,  0.7500])
    """
    if (has_torch_function(theta) or tracing_state()) and is_taken():
        return elsewhere(affine_grid, theta, size, align_corners)
    ints = to_size(size)
    if ints is None or not affine_grid_fits(theta, ints, align_corners):
        return _ask_pytorch(torch.nn.functional.affine_grid, theta, size, align_corners)
    if align_corners is None:
        _warn(_DEFAULT_ALIGN_CORNERS)
    if align_corners and 1 in ints[2:]:
        _warn(_UNIT_SIZE)
    return autograd.grid(theta, None, _AFFINE, ints[2:], bool(align_corners))


# PyTorch's warnings, in PyTorch's words.
_DEFAULT_ALIGN_CORNERS = (
    "Default grid_sample and affine_grid behavior has changed to align_corners=False since 1.3.0. "
    "Please specify align_corners=True if the old behavior is desired. "
    "See the documentation of grid_sample for details."
)
_UNIT_SIZE = (
    "Since version 1.3.0, affine_grid behavior has changed for unit-size grids when align_corners=True. "
    "This is not an intended use case of affine_grid. See the documentation of affine_grid for details."
)


_INSIDE = tuple(os.path.join(path, "") for path in (*torch.__path__, os.path.dirname(__file__)))


def _warn(message: str | Warning, category: type[Warning] = UserWarning) -> None:
    """A warning at the line that called the public function, by way of ``__torch_function__`` or not."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


# The compiler calls it while it traces, and does not trace it: the warning comes then, as PyTorch's does.
_warn._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _ask_pytorch(
    function: Callable[..., Tensor], *arguments: Any, note: Callable[..., str] | None = None
) -> Tensor:
    """For arguments that are not taken here: PyTorch says what is wrong, or has what we lack.

    note: what to add to the error that arguments make, if it is anything.
    """
    if torch.compiler.is_dynamo_compiling():  # which takes the function whole, and no filter of warnings
        return function(*arguments)
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            return function(*arguments)
    except Exception as error:
        if note is not None and hasattr(error, "add_note") and (text := note(*arguments)):  # Python 3.11
            error.add_note(text)
        raise
    finally:
        for warning in caught:
            _warn(warning.message, warning.category)


def _autocast(input: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast, the types PyTorch gives ``grid_sample``: float32 on the CPU, else the widest."""
    device = input.device.type
    if not backend.has_autocast(device) or not torch.is_autocast_enabled(device):
        return input, grid
    if torch.float64 in (input.dtype, grid.dtype) or not {input.dtype, grid.dtype} <= DTYPES:
        return input, grid
    dtype = torch.float32 if device == "cpu" else torch.promote_types(input.dtype, grid.dtype)
    return input.to(dtype), grid.to(dtype)


# --------------------------------------------------------------------------------------------- fused
def affine_grid_sample(
    input: Tensor,
    theta: Tensor,
    size: Sequence[int] | None = None,
    mode: str = "bilinear",
    padding_mode: PaddingMode = "zeros",
    align_corners: bool = False,
    fill: float | Sequence[float] | Tensor | None = None,
    dtype: torch.dtype | None = None,
    antialias: bool = False,
) -> Tensor:
    """Warp images by affine maps: ``affine_grid`` and ``grid_sample`` in one kernel.

    Convention: ``theta`` maps output coordinates to input coordinates, both normalised and x first;
    the pixel at p in the output is read at ``theta @ (*p, 1)`` in the input (Jaderberg et al., Spatial
    Transformer Networks, 2015, equation 1).

    In pixels, output column j is at x_out, and x is read at column i of the input; y and z alike. By
    ``align_corners`` ::

        False:  x_out = (2 j + 1) / W_out - 1
                i = ((x + 1) W - 1) / 2
        True:   x_out = 2 j / (W_out - 1) - 1
                i = (x + 1) (W - 1) / 2

    Args:
        input: (N, C, H, W) or (N, C, D, H, W), float16, bfloat16, float32 or float64, uint8 or int16, any
            strides.
        theta: (N, 2, 3) or (N, 3, 4); or (N, T, 2, 3), (N, T, 3, 4) for T transforms of each image, which
            is not copied. A batch of 1 is broadcast over N. Any floating dtype: a half image can have
            float32 parameters.
        size: the output's spatial size, (H_out, W_out) or (D_out, H_out, W_out). Default: the input's.
        mode: "bilinear" (trilinear in 5-D), "nearest" or "bicubic" (tricubic in 5-D).
        padding_mode: as in :func:`grid_sample`, for all axes or a tuple of one for each, x first.
        align_corners: whether -1 and 1 are the centres (True) or the outer edges (False) of the
            outermost pixels, in the input and in the output.
        fill: what is taken outside the image: a number, a tuple or list of one number for each channel, or a
            tensor (C,), (N, C), () or (1, C) of any floating dtype, or of integers beside images of integers.
            With "zeros" padding the taps outside read it (SciPy's "grid-constant", OpenCV's border value).
            With "border" a sample takes it if its coordinate is NaN or lies outside the image (ITK's default
            pixel value): beyond -1 or 1. (With aligned corners an axis of one pixel has no outside.) With a
            tuple of the two it goes by taps, along the axes with "zeros". Other paddings leave nothing.
        dtype: the dtype of samples. An image of integers has samples of its own dtype by default, rounded
            half to even and saturated; float32, float16 and bfloat16 are taken too. Other images have
            samples of their own dtype alone.
        antialias: whether an output pixel is the average of samples over all the input that it stands for.
            Then shrinking aliases much less. (An average over a box is a crude low-pass: it weakens what is
            too fine, and does not remove it. Blur the image first for more.) It needs ``mode="bilinear"``.
            Along each axis of the output there are ``n = ceil(l - 1e-3)`` samples, 1 to 16, where l is the
            length in input pixels of a step of one output pixel. Sample k lies at ``(k + 1/2) / n - 1/2`` of
            that step from the pixel's middle. So the identity to a size s times smaller is
            ``avg_pool2d(input, s)`` with ``align_corners=False``, and a map that does not shrink gives what
            it gives without. Samples outside the image follow the padding and ``fill``.

    Returns:
        (N, C, *size), or (N, T, C, *size) for T transforms, in ``dtype`` and the input's memory format.

    The kernels hold no grid and no gradient of a grid in memory. Coordinates, weights and sums are float32
    (float64 where an argument is float64); bad coordinates are treated as in :func:`grid_sample`.
    Differentiable in ``input``, ``theta`` and ``fill`` any number of times, in both modes (see the module).
    An image of integers has no gradient, though, and samples of integers give none. The gradient of a
    broadcast ``theta`` is summed. Both gradients are the same to the bit each time. Under
    ``vmap`` over ``theta`` alone the samples are transforms of the images, which are not copied.

    Raises:
        TypeError: an argument is not of the type it must be.
        ValueError: a shape, a size, a device or an option does not fit; the message names the argument.

    Example:
        >>> image = torch.rand(8, 3, 48, 64)
        >>> theta = torch.tensor([[[0.5, 0.0, -0.5], [0.0, 0.5, -0.5]]])  # the upper left quarter
        >>> crop = stn.affine_grid_sample(image, theta, size=(24, 32))
        >>> torch.allclose(crop, image[:, :, :24, :32], atol=1e-5)
        True
        >>> four = torch.rand(8, 4, 2, 3)  # four crops of each image
        >>> stn.affine_grid_sample(image, four, size=(24, 32)).shape
        torch.Size([8, 4, 3, 24, 32])
    """
    if (has_torch_function(input, theta, fill) or tracing_state()) and is_taken():
        options = mode, padding_mode, align_corners, fill, dtype, antialias
        return elsewhere(affine_grid_sample, input, theta, size, *options)
    dims = check_image(input, "theta", theta)
    check_parameter("theta", theta, (dims, dims + 1), input)
    size = check_out_size(size, input)
    modes = check_modes(mode, padding_mode, align_corners, dims)
    if antialias is not False:
        modes = averaged(antialias, mode, size, modes)
    return _sample(input, theta, None, _AFFINE, size, modes, fill, dtype)


def projective_grid_sample(
    input: Tensor,
    homography: Tensor,
    size: Sequence[int] | None = None,
    mode: str = "bilinear",
    padding_mode: PaddingMode = "zeros",
    align_corners: bool = False,
    fill: float | Sequence[float] | Tensor | None = None,
    dtype: torch.dtype | None = None,
    antialias: bool = False,
) -> Tensor:
    """Warp images by homographies.

    Convention: ``homography`` maps output coordinates to input coordinates, both normalised and x first; the
    pixel at (x, y) in the output is read at (X / W, Y / W) with (X, Y, W) = homography @ (x, y, 1). How
    pixels and normalised coordinates belong together is said in :func:`affine_grid_sample`.

    Args:
        input: (N, C, H, W), of a dtype as in :func:`affine_grid_sample`, any strides.
        homography: (N, 3, 3); or (N, T, 3, 3) for T transforms of each image, not copied. A batch of 1
            is broadcast over N. Any floating dtype. Its scale, and its sign, mean nothing (as long as W stays
            above 1e-37, or 1e-300 in float64).
        size, mode, padding_mode, align_corners, fill, dtype: as in :func:`affine_grid_sample`.
        antialias: as there, with numbers of samples for each 16 x 16 output pixels: l is the longest step at
            their corners. Where the horizon is near there are 16.

    Returns:
        (N, C, *size), or (N, T, C, *size), in ``dtype`` and the input's memory format.

    On the horizon, where W cannot be told from 0 (its terms cancel up to rounding), the coordinate is NaN:
    it reads nothing under zeros padding, and adds nothing to the gradient of ``homography``. So does a
    homography of zeros or NaN. What lies beyond the horizon (W of the other sign) is read where the
    formula puts it. The kernels hold no grid in memory. The gradients are the same to the bit
    each time. Differentiable any number of times, in both modes (see the module).

    Raises:
        TypeError, ValueError: as :func:`affine_grid_sample`.

    Example:
        >>> image = torch.rand(1, 3, 48, 64)
        >>> homography = torch.tensor([[[0.8, 0.1, 0.0], [0.0, 0.7, 0.0], [0.0, 0.4, 1.0]]])
        >>> stn.projective_grid_sample(image, homography, size=(32, 32)).shape
        torch.Size([1, 3, 32, 32])
    """
    if (has_torch_function(input, homography, fill) or tracing_state()) and is_taken():
        options = mode, padding_mode, align_corners, fill, dtype, antialias
        return elsewhere(projective_grid_sample, input, homography, size, *options)
    check_image(input, "homography", homography, 2)
    check_parameter("homography", homography, (3, 3), input)
    size = check_out_size(size, input)
    modes = check_modes(mode, padding_mode, align_corners, 2)
    if antialias is not False:
        modes = averaged(antialias, mode, size, modes)
    return _sample(input, homography, None, _PROJECTIVE, size, modes, fill, dtype)


def tps_grid_sample(
    input: Tensor,
    points: Tensor,
    size: Sequence[int] | None = None,
    mode: str = "bilinear",
    padding_mode: PaddingMode = "zeros",
    align_corners: bool = False,
    control_points: Tensor | None = None,
    regularization: float = 0.0,
    fill: float | Sequence[float] | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Warp images by thin-plate splines.

    Convention: the spline maps output coordinates to input coordinates, both normalised and x first. It takes
    control point k, a place in the output, to ``points[:, k]``, the place in the input that is read there
    (with ``regularization`` > 0, near it), and bends as little as possible between (Bookstein, Principal
    Warps, 1989). The formula is at :func:`stn_triton.transforms.tps_coefficients`; how pixels and normalised
    coordinates belong together is said in :func:`affine_grid_sample`.

    Args:
        input: (N, C, H, W), of a dtype as in :func:`affine_grid_sample`, any strides.
        points: (N, K, 2); or (N, T, K, 2) for T transforms of each image, not copied. A batch of 1 is
            broadcast over N. Any floating dtype; half points are computed with in float32. A lattice must be
            flattened, row by row, to (N, 16, 2): (N, 4, 4, 2) would mean 4 transforms of 4 points each.
        size, mode, padding_mode, align_corners, fill, dtype: as in :func:`affine_grid_sample`.
        control_points: (K, 2), not all on one line, no two equal. Default: the square lattice over [-1, 1]^2,
            :func:`stn_triton.transforms.control_lattice`; K is then a square number.
        regularization: at least 0; added to the diagonal of the spline's system.

    Returns:
        (N, C, *size), or (N, T, C, *size), in ``dtype`` and the input's memory format.

    Neither a grid nor a (pixels, K) basis is held in memory by the kernels. The gradients of ``points`` and
    ``control_points`` are the same to the bit each time, and that by ``input`` under deterministic
    algorithms. Differentiable in ``input``, ``points`` and ``control_points`` any number of times, in
    both modes (see the module). Under ``vmap`` over ``control_points``, or over their gradient, each
    sample is computed on its own.

    Raises:
        TypeError, ValueError: as :func:`affine_grid_sample`; a ValueError names control points that coincide,
            lie on a line or are not finite. (On a CPU: the host reads none from an accelerator, where such
            points give coordinates that are NaN or huge.)

    Example:
        >>> image = torch.rand(1, 3, 48, 64)
        >>> points = stn.transforms.control_lattice(4)[None]  # (1, 16, 2): the identity
        >>> bent = points + 0.1 * torch.randn(1, 16, 2)
        >>> stn.tps_grid_sample(image, bent).shape
        torch.Size([1, 3, 48, 64])
    """
    if (has_torch_function(input, points, control_points, fill) or tracing_state()) and is_taken():
        spline = control_points, regularization, fill, dtype
        return elsewhere(tps_grid_sample, input, points, size, mode, padding_mode, align_corners, *spline)
    check_image(input, "points", points, 2)
    check_points(points, input)
    size = check_out_size(size, input)
    modes = check_modes(mode, padding_mode, align_corners, 2)
    if input.dtype == torch.float64:
        points = points.double()
    matrix, control_points = _spline(points, control_points, regularization)
    coefficients = autograd.spline_product(matrix, points, control_points.dtype)
    return _sample(input, coefficients, control_points, _TPS, size, modes, fill, dtype)


def flow_grid_sample(
    input: Tensor,
    flow: Tensor,
    mode: str = "bilinear",
    padding_mode: PaddingMode = "zeros",
    align_corners: bool = False,
    fill: float | Sequence[float] | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Warp images by displacement fields.

    Convention: output pixel o is read at the place of o in the input plus ``flow[:, :, o]``, which is in
    **input pixels**, x first. Where output and input have the same size that is pixel o + flow; else the
    output's identity grid, whose corners are the input's, is displaced: column j reads at column i, by
    ``align_corners`` ::

        False:  i = ((2 j + 1) W / W_out - 1) / 2 + flow_x
        True:   i = j (W - 1) / (W_out - 1) + flow_x

    Args:
        input: (N, C, H, W) or (N, C, D, H, W), of a dtype as in :func:`affine_grid_sample`, any strides.
        flow: (N, 2, H_out, W_out) or (N, 3, D_out, H_out, W_out): along x, y (and z). A batch of 1
            is broadcast over N. Any floating dtype.
        mode, padding_mode, align_corners, fill, dtype: as in :func:`affine_grid_sample`.

    Returns:
        (N, C, *flow.shape[2:]), in ``dtype`` and the input's memory format.

    Differentiable in ``input`` and ``flow`` any number of times, in both modes (see the module).

    Raises:
        TypeError, ValueError: as :func:`affine_grid_sample`.

    Example:
        >>> image, flow = torch.rand(1, 3, 48, 64), torch.zeros(1, 2, 48, 64)
        >>> flow[:, 0] = 3  # read 3 pixels to the right
        >>> torch.allclose(stn.flow_grid_sample(image, flow)[..., :-3], image[..., 3:], atol=1e-5)
        True
    """
    if (has_torch_function(input, flow, fill) or tracing_state()) and is_taken():
        options = mode, padding_mode, align_corners, fill, dtype
        return elsewhere(flow_grid_sample, input, flow, *options)
    dims = check_image(input, "flow", flow)
    check_flow(flow, input)
    modes = check_modes(mode, padding_mode, align_corners, dims)
    return _sample(input, flow, None, _FLOW, flow.shape[2:], modes, fill, dtype)


def _sample(
    input: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    source: int,
    size: Sequence[int],
    modes: tuple[int, int, bool],
    fill: float | Sequence[float] | Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """The samples, of arguments that are checked but for the last two."""
    if fill is None and dtype is None and input.dtype in DTYPES:
        return autograd.sample(input, params, control_points, source, size, *modes)
    dtype = check_dtype(dtype, input)
    if fill is not None:
        fill = check_fill(fill, input, modes[1])
        if not isinstance(fill, Tensor):
            made = torch.promote_types(input.dtype, torch.float32)
            fill = distributed.replicated(full_of(fill, made, input.device), input)
        fill = fill.expand(input.shape[:2])
    elif dtype == sample_dtype(input):
        return autograd.sample(input, params, control_points, source, size, *modes)
    return autograd.sample_as(input, params, control_points, fill, source, size, *modes, dtype)


# --------------------------------------------------------------------------------------------- grids
def projective_grid(homography: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """The coordinates at which :func:`projective_grid_sample` reads.

    Args:
        homography: (N, 3, 3), floating point; see :func:`projective_grid_sample`.
        size: the output's size, (N, C, H, W), as for ``affine_grid``.
        align_corners: as in :func:`grid_sample`.

    Returns:
        (N, H, W, 2), normalised, x first, of the homography's dtype; NaN on the horizon. Differentiable.

    Raises:
        TypeError, ValueError: the message names the argument.

    Example:
        >>> stn.projective_grid(torch.eye(3)[None], (1, 3, 24, 32)).shape
        torch.Size([1, 24, 32, 2])
    """
    if (has_torch_function(homography) or tracing_state()) and is_taken():
        return elsewhere(projective_grid, homography, size, align_corners)
    check_tensor("homography", homography)
    if homography.dim() != 3 or tuple(homography.shape[1:]) != (3, 3):
        refuse(ValueError, "homography", "(N, 3, 3)", f"shape {tuple(homography.shape)}")
    out_size = check_grid_size(size, homography, align_corners)
    return autograd.grid(homography, None, _PROJECTIVE, out_size, align_corners)


def tps_grid(
    points: Tensor,
    size: Sequence[int],
    control_points: Tensor | None = None,
    regularization: float = 0.0,
    align_corners: bool = False,
) -> Tensor:
    """The coordinates at which :func:`tps_grid_sample` reads.

    Args:
        points: (N, K, 2), floating point; see :func:`tps_grid_sample`.
        size: the output's size, (N, C, H, W), as for ``affine_grid``.
        control_points, regularization: as in :func:`tps_grid_sample`.
        align_corners: as in :func:`grid_sample`.

    Returns:
        (N, H, W, 2), normalised, x first, of the points' dtype. Differentiable.

    Raises:
        TypeError, ValueError: the message names the argument.

    Example:
        >>> stn.tps_grid(stn.transforms.identity(1, "tps"), (1, 3, 24, 32)).shape
        torch.Size([1, 24, 32, 2])
    """
    if (has_torch_function(points, control_points) or tracing_state()) and is_taken():
        return elsewhere(tps_grid, points, size, control_points, regularization, align_corners)
    check_grid_points(points)
    out_size = check_grid_size(size, points, align_corners)
    matrix, control_points = _spline(points, control_points, regularization)
    coefficients = autograd.spline_product(matrix, points, control_points.dtype)
    return autograd.grid(coefficients, control_points, _TPS, out_size, align_corners).to(points.dtype)


def _spline(points: Tensor, control_points: Tensor | None, regularization: float) -> tuple[Tensor, Tensor]:
    """What the points are multiplied by (``splines.system_of``), and control points in the result's dtype."""
    matrix, dtype = splines.system_of(points, control_points, regularization)
    if control_points is None:
        side = splines.lattice_side("points", points.shape[-2])
        control_points = splines.kept_lattice(side, points.device, dtype)
    return matrix, distributed.replicated(control_points.to(dtype), points)
