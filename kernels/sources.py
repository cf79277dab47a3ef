"""Coordinate sources: where in the input each output pixel is read.

A source is three device functions and a few lines of host code, all in this file:

* ``*_prepare``: what a program needs before its first pixel, from the source's arguments;
* ``*_coordinates``: the normalised coordinates in the input of a block of output pixels;
* ``*_backward``: what a program adds to the parameters' gradient, given the gradient by those
  coordinates; every value has one writer, so that nothing is summed in an unpredictable order;
* ``pack``, ``gradient_buffer`` and ``reduce_gradient`` on the host.

To add a source, add its code to ``modes.Source``, its functions here, and a branch to each of the
dispatchers ``prepare``, ``coordinates``, ``backward`` and to the host functions. No kernel changes.

Tuples over axes are x first: (x, y) or (x, y, z).
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
def grid_coordinates(state, out, mask, DIMS: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr):
    base, stride_component, strides = state
    offset = out[0].to(INDEX) * strides[0] + out[1].to(INDEX) * strides[1]
    if DIMS == 3:
        offset += out[2].to(INDEX) * strides[2]
    x = tl.load(base + offset, mask, other=0.0).to(COMPUTE)
    y = tl.load(base + (offset + stride_component), mask, other=0.0).to(COMPUTE)
    if DIMS == 3:
        z = tl.load(base + (offset + 2 * stride_component), mask, other=0.0).to(COMPUTE)
        return x, y, z
    else:
        return x, y


@triton.jit
def grid_backward(
    gradient_ptr,
    gradients,
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
        tl.store(base + (pixel * DIMS + k), rounded(gradients[k], gradient_ptr), mask)


# -------------------------------------------------------------------------------------- affine
@triton.jit
def true_divide(a, b, COMPUTE: tl.constexpr):
    """a / b rounded to nearest: float32 division is approximate by default."""
    if COMPUTE == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def normalised(o, size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """The normalised coordinate of output pixel ``o``; 0 on an axis of one pixel.

    A quotient of two whole numbers, rounded once: the error differs from pixel to pixel. Folding the
    denominator into theta would give all pixels the same error, which the sum of d theta does not even out.
    """
    doubled = (2 * o - (size - 1)).to(COMPUTE)
    return true_divide(doubled, tl.maximum(size - ALIGN_CORNERS, 1).to(COMPUTE), COMPUTE)


@triton.jit
def normalised_pixels(out, out_size, ALIGN_CORNERS: tl.constexpr, DIMS: tl.constexpr, COMPUTE: tl.constexpr):
    """(x, y, 1) or (x, y, z, 1) of the output pixels: what a matrix is multiplied by."""
    x = normalised(out[0], out_size[0], ALIGN_CORNERS, COMPUTE)
    y = normalised(out[1], out_size[1], ALIGN_CORNERS, COMPUTE)
    one = tl.full(x.shape, 1.0, COMPUTE)
    if DIMS == 3:
        return x, y, normalised(out[2], out_size[2], ALIGN_CORNERS, COMPUTE), one
    else:
        return x, y, one


@triton.jit
def matrix_row(pointer, stride_col, DIMS: tl.constexpr, COMPUTE: tl.constexpr):
    x = tl.load(pointer).to(COMPUTE)
    y = tl.load(pointer + stride_col).to(COMPUTE)
    last = tl.load(pointer + DIMS * stride_col).to(COMPUTE)
    if DIMS == 3:
        return x, y, tl.load(pointer + 2 * stride_col).to(COMPUTE), last
    else:
        return x, y, last


@triton.jit
def affine_prepare(source, n, t, DIMS: tl.constexpr, COMPUTE: tl.constexpr):
    """The rows of theta. Strides by image, transform, row and column; the fifth is unused."""
    pointer, stride_n, stride_t, stride_row, stride_col, _ = source
    pointer += n * stride_n + t * stride_t
    x = matrix_row(pointer, stride_col, DIMS, COMPUTE)
    y = matrix_row(pointer + stride_row, stride_col, DIMS, COMPUTE)
    if DIMS == 3:
        return x, y, matrix_row(pointer + 2 * stride_row, stride_col, DIMS, COMPUTE)
    else:
        return x, y


@triton.jit
def matrix_apply(row, pixels, DIMS: tl.constexpr):
    if DIMS == 3:
        return row[0] * pixels[0] + (row[1] * pixels[1] + (row[2] * pixels[2] + row[3]))
    else:
        return row[0] * pixels[0] + (row[1] * pixels[1] + row[2])


@triton.jit
def affine_coordinates(
    state, out, out_size, ALIGN_CORNERS: tl.constexpr, DIMS: tl.constexpr, COMPUTE: tl.constexpr
):
    """theta (x, y[, z], 1)."""
    pixels = normalised_pixels(out, out_size, ALIGN_CORNERS, DIMS, COMPUTE)
    x = matrix_apply(state[0], pixels, DIMS)
    y = matrix_apply(state[1], pixels, DIMS)
    if DIMS == 3:
        return x, y, matrix_apply(state[2], pixels, DIMS)
    else:
        return x, y


@triton.jit
def affine_backward(
    gradient_ptr,
    gradients,
    out,
    out_size,
    b,
    program,
    programs,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """This program's share of d theta[r, k] = sum over pixels of g_r pixels_k, pixels = (x, y[, z], 1).

    The buffer is (batch, DIMS * (DIMS + 1), programs).
    """
    pixels = normalised_pixels(out, out_size, ALIGN_CORNERS, DIMS, COMPUTE)
    base = gradient_ptr + (b.to(tl.int64) * (DIMS * (DIMS + 1))) * programs + program
    for r in tl.static_range(DIMS):
        for k in tl.static_range(DIMS + 1):
            share = tl.sum(tl.sum(gradients[r] * pixels[k], 1), 0)
            tl.store(base + (r * (DIMS + 1) + k) * programs, share)


# ---------------------------------------------------------------------------------- dispatchers
@triton.jit
def prepare(
    source,
    n,
    t,
    SOURCE: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The state that ``coordinates`` reads, for transform ``t`` (int64) of image ``n`` (int64)."""
    if SOURCE == AFFINE:
        return affine_prepare(source, n, t, DIMS, COMPUTE)
    else:
        tl.static_assert(SOURCE == GRID)
        return grid_prepare(source, n, INDEX)


@triton.jit
def coordinates(
    state,
    out,
    out_size,
    mask,
    SOURCE: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Normalised (x, y[, z]) of the output pixels ``out``, any shape; NaN and infinities are possible."""
    if SOURCE == AFFINE:
        return affine_coordinates(state, out, out_size, ALIGN_CORNERS, DIMS, COMPUTE)
    else:
        return grid_coordinates(state, out, mask, DIMS, INDEX, COMPUTE)


@triton.jit
def backward(
    gradient_ptr,
    gradients,
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
            gradient_ptr, gradients, out, out_size, b, program, programs, ALIGN_CORNERS, DIMS, COMPUTE
        )
    else:
        grid_backward(gradient_ptr, gradients, out, mask, out_size, b, split, batch, DIMS, INDEX)


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
