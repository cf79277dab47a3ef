"""Interpolation along one axis: which pixels a coordinate reads, and with what weight.

``axis_taps``, ``axis_taps_grad`` and ``axis_taps_curvature`` are the whole interface. They return tuples
with one entry for each of the ``axis_tap_count`` taps: the first the pixel's index, whether it may be read,
and its weight; the others the weight's first and second derivative by the (unpadded) pixel coordinate.
Kernels take the tensor product over the axes, so an interpolation that is added here works in 2-D and 3-D,
forward and backward.
"""

import triton
import triton.language as tl

from .coordinates import (
    BICUBIC,
    BILINEAR,
    NEAREST,
    ZEROS,
    cubic_coordinate,
    in_bounds,
    pad_coordinate,
    pad_coordinate_grad,
    pad_index,
)
from .modes import Interpolation

CUBIC_A = tl.constexpr(-0.75)  # PyTorch's cubic convolution coefficient


@triton.constexpr_function
def axis_tap_count(interpolation):
    """Pixels read along one axis."""
    return {Interpolation.BILINEAR: 2, Interpolation.NEAREST: 1, Interpolation.BICUBIC: 4}[interpolation]


@triton.constexpr_function
def has_curvature(interpolation):
    """Whether the weights have second derivatives along their axis."""
    return interpolation == Interpolation.BICUBIC


@triton.jit
def round_half_even(x):
    """The nearest whole number; halves go to the even one."""
    down = tl.floor(x)
    rest = x - down
    odd = down - 2.0 * tl.floor(down * 0.5)
    return tl.where((rest > 0.5) | ((rest == 0.5) & (odd == 1.0)), down + 1.0, down)


@triton.jit
def cubic_near(t):
    """The cubic convolution kernel for 0 <= t <= 1."""
    return ((CUBIC_A + 2.0) * t - (CUBIC_A + 3.0)) * t * t + 1.0


@triton.jit
def cubic_near_grad(t):
    return (3.0 * (CUBIC_A + 2.0) * t - 2.0 * (CUBIC_A + 3.0)) * t


@triton.jit
def cubic_near_curvature(t):
    return 6.0 * (CUBIC_A + 2.0) * t - 2.0 * (CUBIC_A + 3.0)


@triton.jit
def cubic_far(t):
    """The cubic convolution kernel for 1 <= t <= 2."""
    return ((CUBIC_A * t - 5.0 * CUBIC_A) * t + 8.0 * CUBIC_A) * t - 4.0 * CUBIC_A


@triton.jit
def cubic_far_grad(t):
    return (3.0 * CUBIC_A * t - 10.0 * CUBIC_A) * t + 8.0 * CUBIC_A


@triton.jit
def cubic_far_curvature(t):
    return 6.0 * CUBIC_A * t - 10.0 * CUBIC_A


@triton.jit
def linear_taps(padded, size, PADDING: tl.constexpr):
    """Indices, in-bounds flags and the fraction of a padded coordinate."""
    down = tl.floor(padded)
    i = down.to(tl.int32)
    if PADDING == ZEROS:
        inside = in_bounds(i, size)
    else:
        i = tl.minimum(i, size - 1)  # float32 may have rounded the last pixel's number up, from 2^24 on
        inside = i >= 0  # always true: the coordinate was limited to the image
    return (i, i + 1), (inside, in_bounds(i + 1, size)), padded - down


@triton.jit
def nearest_tap(padded, size, PADDING: tl.constexpr):
    i = round_half_even(padded).to(tl.int32)
    if PADDING == ZEROS:
        inside = in_bounds(i, size)
    else:
        i = tl.minimum(i, size - 1)  # as in linear_taps
        inside = i >= 0
    return i, inside


@triton.jit
def cubic_taps(x, size, PADDING: tl.constexpr, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    near = cubic_coordinate(x, size, PADDING, ALIGN_CORNERS, COMPUTE)
    down = tl.floor(near)
    i = down.to(tl.int32)
    i0 = pad_index(i - 1, size, PADDING, ALIGN_CORNERS)
    i1 = pad_index(i, size, PADDING, ALIGN_CORNERS)
    i2 = pad_index(i + 1, size, PADDING, ALIGN_CORNERS)
    i3 = pad_index(i + 2, size, PADDING, ALIGN_CORNERS)
    inside = (in_bounds(i0, size), in_bounds(i1, size), in_bounds(i2, size), in_bounds(i3, size))
    return (i0, i1, i2, i3), inside, near - down


@triton.jit
def axis_taps(
    x,
    size,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The taps of pixel coordinate ``x`` on an axis of ``size`` pixels: indices, in-bounds flags, weights."""
    if INTERPOLATION == BICUBIC:
        indices, inside, t = cubic_taps(x, size, PADDING, ALIGN_CORNERS, COMPUTE)
        return indices, inside, (cubic_far(t + 1.0), cubic_near(t), cubic_near(1.0 - t), cubic_far(2.0 - t))
    else:
        padded = pad_coordinate(x, size, PADDING, ALIGN_CORNERS, COMPUTE)
        if INTERPOLATION == NEAREST:
            i, inside = nearest_tap(padded, size, PADDING)
            return (i,), (inside,), (tl.full(x.shape, 1.0, COMPUTE),)
        else:
            indices, inside, t = linear_taps(padded, size, PADDING)
            return indices, inside, (1.0 - t, t)


@triton.jit
def axis_taps_grad(
    x,
    size,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The derivatives of ``axis_taps``'s weights by ``x``."""
    if INTERPOLATION == BICUBIC:
        near = cubic_coordinate(x, size, PADDING, ALIGN_CORNERS, COMPUTE)
        t = near - tl.floor(near)
        return (
            cubic_far_grad(t + 1.0),
            cubic_near_grad(t),
            -cubic_near_grad(1.0 - t),
            -cubic_far_grad(2.0 - t),
        )
    elif INTERPOLATION == BILINEAR:
        slope = pad_coordinate_grad(x, size, PADDING, ALIGN_CORNERS, COMPUTE)
        return -slope, slope
    else:
        return (tl.zeros(x.shape, COMPUTE),)


@triton.jit
def axis_taps_curvature(
    x,
    size,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The second derivatives of ``axis_taps``'s weights by ``x``; 0 wherever weights are made of lines."""
    if INTERPOLATION == BICUBIC:
        near = cubic_coordinate(x, size, PADDING, ALIGN_CORNERS, COMPUTE)
        t = near - tl.floor(near)
        return (
            cubic_far_curvature(t + 1.0),
            cubic_near_curvature(t),
            cubic_near_curvature(1.0 - t),
            cubic_far_curvature(2.0 - t),
        )
    elif INTERPOLATION == BILINEAR:
        return (0.0, 0.0)
    else:
        return (0.0,)


@triton.jit
def at_pixel(q, indices, inside, values, INTERPOLATION: tl.constexpr, COMPUTE: tl.constexpr):
    """The sum of the taps' values (weights, slopes) over the taps that read pixel ``q``."""
    total = tl.zeros(indices[0].shape, COMPUTE)
    for k in tl.static_range(axis_tap_count(INTERPOLATION)):
        total += tl.where(inside[k] & (indices[k] == q), values[k], 0.0)
    return total
