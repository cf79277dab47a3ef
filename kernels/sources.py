"""Coordinate sources: where in the input each output pixel is read.

A source is four device functions and a few lines of host code, all in this file:

* ``*_prepare``: what a program needs before its first pixel, from the source's arguments;
* ``*_coordinates``: pixel coordinates in the input of a block of output pixels;
* ``*_backward``: what a program adds to the parameters' gradient, given the gradient by those
  coordinates; every value has one writer, so that nothing is summed in an unpredictable order;
* ``pack``, ``gradient_buffer``, ``gradient_layout`` and ``reduce_gradient`` on the host.

To add a source, add its code to ``modes.Source``, its functions here, and a branch to each of the
dispatchers ``prepare``, ``coordinates``, ``backward`` and to the host functions. No kernel changes.

Tuples over axes are x first: (x, y) or (x, y, z). ``scale`` and ``center`` say into which units a
source maps: ``unit = scale * normalised + center``, pixels of the input for the samplers, or
scale 1 and center 0 for normalised coordinates.
"""

import torch
import triton
import triton.language as tl

from .modes import Source
from .tiles import rounded

GRID = tl.constexpr(Source.GRID.value)
AFFINE = tl.constexpr(Source.AFFINE.value)


# ---------------------------------------------------------------------------------- dense grid
@triton.jit
def grid_prepare(source, n, INDEX: tl.constexpr):
    """Strides by image, component, x, y and z."""
    pointer, stride_n, stride_component, stride_x, stride_y, stride_z = source
    return pointer + n * stride_n, stride_component, (stride_x, stride_y, stride_z)


@triton.jit
def grid_coordinates(
    state, scale, center, out, mask, DIMS: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr
):
    base, stride_component, strides = state
    offset = out[0].to(INDEX) * strides[0] + out[1].to(INDEX) * strides[1]
    if DIMS == 3:
        offset += out[2].to(INDEX) * strides[2]
    x = tl.load(base + offset, mask, other=0.0).to(COMPUTE) * scale[0] + center[0]
    y = tl.load(base + (offset + stride_component), mask, other=0.0).to(COMPUTE) * scale[1] + center[1]
    if DIMS == 3:
        z = (
            tl.load(base + (offset + 2 * stride_component), mask, other=0.0).to(COMPUTE) * scale[2]
            + center[2]
        )
        return x, y, z
    else:
        return x, y


@triton.jit
def grid_backward(
    gradient_ptr,
    gradients,
    scale,
    out,
    mask,
    out_size,
    b,
    split,
    batch,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Stores the gradient of each grid entry; the buffer is (splits, batch, [D,] H, W, DIMS)."""
    pixel = out[1].to(INDEX) * out_size[0] + out[0]
    pixels = out_size[0].to(tl.int64) * out_size[1]
    if DIMS == 3:
        pixel += out[2].to(INDEX) * out_size[1] * out_size[0]
        pixels *= out_size[2]
    base = gradient_ptr + (split.to(tl.int64) * batch + b) * pixels * DIMS
    for k in tl.static_range(DIMS):
        tl.store(base + (pixel * DIMS + k), rounded(gradients[k] * scale[k], gradient_ptr), mask)


# -------------------------------------------------------------------------------------- affine
@triton.jit
def true_divide(a, b, COMPUTE: tl.constexpr):
    """a / b rounded to nearest: float32 division is approximate by default."""
    if COMPUTE == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def output_extent(size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """The output's normalised coordinate is ``centered(o) / output_extent``; 1 where that is 0 / 0."""
    return tl.maximum(size - ALIGN_CORNERS, 1).to(COMPUTE)


@triton.jit
def centered(o, size, COMPUTE: tl.constexpr):
    """Twice the distance of output pixel ``o`` from the middle: a whole number, exact."""
    return (2 * o - (size - 1)).to(COMPUTE)


@triton.jit
def affine_row(pointer, stride_col, scale, extents, DIMS: tl.constexpr, COMPUTE: tl.constexpr):
    """One row of theta folded into output pixels and input units: (a_x, a_y[, a_z], constant).

    The center is left for ``affine_apply``: added last, it leaves one rounding at full magnitude, not two.
    """
    a_x = true_divide(tl.load(pointer).to(COMPUTE) * scale, extents[0], COMPUTE)
    a_y = true_divide(tl.load(pointer + stride_col).to(COMPUTE) * scale, extents[1], COMPUTE)
    constant = tl.load(pointer + DIMS * stride_col).to(COMPUTE) * scale
    if DIMS == 3:
        a_z = true_divide(tl.load(pointer + 2 * stride_col).to(COMPUTE) * scale, extents[2], COMPUTE)
        return a_x, a_y, a_z, constant
    else:
        return a_x, a_y, constant


@triton.jit
def affine_extents(out_size, ALIGN_CORNERS: tl.constexpr, DIMS: tl.constexpr, COMPUTE: tl.constexpr):
    width = output_extent(out_size[0], ALIGN_CORNERS, COMPUTE)
    height = output_extent(out_size[1], ALIGN_CORNERS, COMPUTE)
    if DIMS == 3:
        return width, height, output_extent(out_size[2], ALIGN_CORNERS, COMPUTE)
    else:
        return width, height


@triton.jit
def affine_prepare(
    source,
    n,
    t,
    scale,
    out_size,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Strides by image, transform, row and column; the fifth is unused."""
    pointer, stride_n, stride_t, stride_row, stride_col, _ = source
    pointer += n * stride_n + t * stride_t
    extents = affine_extents(out_size, ALIGN_CORNERS, DIMS, COMPUTE)
    x = affine_row(pointer, stride_col, scale[0], extents, DIMS, COMPUTE)
    y = affine_row(pointer + stride_row, stride_col, scale[1], extents, DIMS, COMPUTE)
    if DIMS == 3:
        z = affine_row(pointer + 2 * stride_row, stride_col, scale[2], extents, DIMS, COMPUTE)
        return x, y, z
    else:
        return x, y


@triton.jit
def affine_apply(row, center, u, v, w, DIMS: tl.constexpr):
    if DIMS == 3:
        return (row[0] * u + (row[1] * v + (row[2] * w + row[3]))) + center
    else:
        return (row[0] * u + (row[1] * v + row[2])) + center


@triton.jit
def affine_coordinates(state, center, out, out_size, DIMS: tl.constexpr, COMPUTE: tl.constexpr):
    u = centered(out[0], out_size[0], COMPUTE)
    v = centered(out[1], out_size[1], COMPUTE)
    if DIMS == 3:
        w = centered(out[2], out_size[2], COMPUTE)
        x = affine_apply(state[0], center[0], u, v, w, DIMS)
        y = affine_apply(state[1], center[1], u, v, w, DIMS)
        z = affine_apply(state[2], center[2], u, v, w, DIMS)
        return x, y, z
    else:
        x = affine_apply(state[0], center[0], u, v, 0.0, DIMS)
        y = affine_apply(state[1], center[1], u, v, 0.0, DIMS)
        return x, y


@triton.jit
def affine_backward(
    gradient_ptr,
    gradients,
    scale,
    out,
    out_size,
    b,
    program,
    programs,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Sums over this program's pixels, d theta[r, k] = sum of scale_r g_r (normalised k), 1 for the last.

    The buffer is (batch, DIMS * (DIMS + 1), programs).
    """
    extents = affine_extents(out_size, ALIGN_CORNERS, DIMS, COMPUTE)
    base = gradient_ptr + (b.to(tl.int64) * (DIMS * (DIMS + 1))) * programs + program
    for r in tl.static_range(DIMS):
        g = gradients[r] * scale[r]
        for k in tl.static_range(DIMS):
            moment = tl.sum(tl.sum(g * centered(out[k], out_size[k], COMPUTE), 1), 0)
            tl.store(base + (r * (DIMS + 1) + k) * programs, true_divide(moment, extents[k], COMPUTE))
        tl.store(base + (r * (DIMS + 1) + DIMS) * programs, tl.sum(tl.sum(g, 1), 0))


# ---------------------------------------------------------------------------------- dispatchers
@triton.jit
def prepare(
    source,
    n,
    t,
    scale,
    out_size,
    SOURCE: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The state that ``coordinates`` reads, for transform ``t`` (int64) of image ``n`` (int64)."""
    if SOURCE == AFFINE:
        return affine_prepare(source, n, t, scale, out_size, ALIGN_CORNERS, DIMS, COMPUTE)
    else:
        tl.static_assert(SOURCE == GRID)
        return grid_prepare(source, n, INDEX)


@triton.jit
def coordinates(
    state,
    scale,
    center,
    out,
    out_size,
    mask,
    SOURCE: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """(x, y[, z]) of the output pixels ``out`` = (x, y[, z]), any shape; NaN and infinities are possible."""
    if SOURCE == AFFINE:
        return affine_coordinates(state, center, out, out_size, DIMS, COMPUTE)
    else:
        return grid_coordinates(state, scale, center, out, mask, DIMS, INDEX, COMPUTE)


@triton.jit
def backward(
    gradient_ptr,
    gradients,
    scale,
    out,
    out_size,
    mask,
    b,
    batch,
    split,
    program,
    programs,
    SOURCE: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """From ``gradients`` by the coordinates, 0 outside ``mask``, to this program's part of the buffer."""
    if SOURCE == AFFINE:
        affine_backward(
            gradient_ptr, gradients, scale, out, out_size, b, program, programs, ALIGN_CORNERS, DIMS, COMPUTE
        )
    else:
        grid_backward(gradient_ptr, gradients, scale, out, mask, out_size, b, split, batch, DIMS, INDEX)


# ----------------------------------------------------------------------------------------- host
def pack(source: Source, params: torch.Tensor) -> tuple:
    """A source's pointer and its five strides. A parameter batch of 1 is broadcast."""
    strides = params.stride()
    if source == Source.GRID:
        return (params, strides[0], strides[-1], *(*reversed(strides[1:-1]), 0)[:3])
    stride_n = 0 if params.shape[0] == 1 else strides[0]
    stride_t = strides[1] if params.dim() == 4 else 0
    return params, stride_n, stride_t, strides[-2], strides[-1], 0


def gradient_buffer(
    source: Source, params: torch.Tensor, batch: int, splits: int, programs: int, compute: torch.dtype
) -> torch.Tensor:
    """What ``backward`` writes: the gradient itself where one program sees all of it, else partial sums."""
    if source == Source.GRID:
        dtype = params.dtype if splits == 1 else compute
        return torch.empty((splits, *params.shape), dtype=dtype, device=params.device)
    return torch.empty(
        (batch, params.shape[-2] * params.shape[-1], programs), dtype=compute, device=params.device
    )


def reduce_gradient(source: Source, params: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """The gradient of ``params`` from the filled buffer, summed in a fixed order."""
    if source == Source.GRID:
        return buffer[0] if buffer.shape[0] == 1 else buffer.sum(0).to(params.dtype)
    gradient = buffer.sum(-1)
    if params.shape[0] == 1:
        gradient = gradient.view(-1, params.shape[1] if params.dim() == 4 else 1, gradient.shape[-1]).sum(0)
    return gradient.to(params.dtype).view(params.shape)
