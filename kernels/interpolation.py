"""Interpolation along one axis: which pixels a coordinate reads, and with what weight.

``axis_taps``, ``axis_taps_grad`` and ``axis_taps_curvature`` are the whole interface. They return tuples
with one entry for each of the ``axis_tap_count`` taps: the first the pixel's index, whether it may be read,
and its weight; the others the weight's first and second derivative by the (unpadded) pixel coordinate.
Kernels take the tensor product over the axes, so an interpolation that is added here works in 2-D and 3-D,
forward and backward.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .coordinates import (
    BICUBIC,
    BILINEAR,
    COMPILED,
    NEAREST,
    REFLECTION,
    ZEROS,
    constant,
    cubic_coordinate,
    in_bounds,
    pad_coordinate,
    pad_coordinate_grad,
    pad_index,
)
from .modes import Interpolation

CUBIC_A = constant(-0.75)  # PyTorch's cubic convolution coefficient


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
    if COMPILED:
        return libdevice.nearbyint(x)  # rint, which not every libdevice has
    else:
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
def cubic_weights(t):
    return cubic_far(t + 1.0), cubic_near(t), cubic_near(1.0 - t), cubic_far(2.0 - t)


@triton.jit
def linear_taps(padded, size, PADDING: tl.constexpr):
    """Indices, in-bounds flags and the fraction of a padded coordinate."""
    i = tl.floor(padded).to(tl.int32)  # one instruction, as is the way back
    down = i.to(padded.dtype)
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


@triton.constexpr_function
def taps_in_a_row(interpolation, inside):
    """Whether each tap's pixel is the one after the tap before it: padding moves a cubic's one by one."""
    return inside or interpolation != Interpolation.BICUBIC


@triton.jit
def tap_margins(INTERPOLATION: tl.constexpr):
    """All taps of x lie in the image if the first < x < size - the second.

    The second leaves room for what folding back by reflection rounds.
    """
    return (1.0 if INTERPOLATION == BICUBIC else 0.0), 2.0


@triton.jit
def inner_taps(
    x,
    size,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """``axis_taps`` with the same bits where ``tap_margins`` hold: no limits, all flags True."""
    if PADDING == REFLECTION and INTERPOLATION != BICUBIC:
        x = pad_coordinate(x, size, PADDING, ALIGN_CORNERS, COMPUTE)  # which rounds
    if INTERPOLATION == NEAREST:
        return (round_half_even(x).to(tl.int32),), (True,), (1.0,)
    else:
        i = tl.floor(x).to(tl.int32)
        t = x - i.to(COMPUTE)
        if INTERPOLATION == BICUBIC:
            return (i - 1, i, i + 1, i + 2), (True, True, True, True), cubic_weights(t)
        else:
            return (i, i + 1), (True, True), (1.0 - t, t)


@triton.jit
def axis_taps(
    x,
    size,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    COMPUTE: tl.constexpr,
    INSIDE: tl.constexpr = False,
):
    """The taps of pixel coordinate ``x`` on an axis of ``size`` pixels: indices, in-bounds flags, weights.

    INSIDE: the caller knows that ``tap_margins`` hold.
    """
    if INSIDE:
        return inner_taps(x, size, INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE)
    elif INTERPOLATION == BICUBIC:
        indices, inside, t = cubic_taps(x, size, PADDING, ALIGN_CORNERS, COMPUTE)
        return indices, inside, cubic_weights(t)
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
    INSIDE: tl.constexpr = False,
):
    """The derivatives of ``axis_taps``'s weights by ``x``."""
    if INTERPOLATION == BICUBIC:
        near = x if INSIDE else cubic_coordinate(x, size, PADDING, ALIGN_CORNERS, COMPUTE)
        t = near - tl.floor(near)
        return (
            cubic_far_grad(t + 1.0),
            cubic_near_grad(t),
            -cubic_near_grad(1.0 - t),
            -cubic_far_grad(2.0 - t),
        )
    elif INTERPOLATION == BILINEAR and INSIDE:
        return (-1.0, 1.0)
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
