"""The taps of a block of pixels put together: values, their derivatives, and the transpose.

Values of a ``Plane`` are [pixels, channels]. ``taps`` are those of x, y and z, ``slopes`` their weights'
derivatives (``interpolation``).
"""

import triton
import triton.language as tl

from ..modes import Interpolation
from ..spec import plain
from .arithmetic import NEAREST, widened
from .interpolation import tap_count, taps_in_a_row, taps_z
from .tiles import offset_of


@triton.constexpr_function
def has_differences(spec):
    """Whether derivatives are made of differences of pixels: of bilinear samples in the plane."""
    return plain(spec.interpolation) == Interpolation.BILINEAR and plain(spec.dims) == 2


@triton.jit
def tap_pointer(plane, taps, k, VECTOR: tl.constexpr, SPEC: tl.constexpr, INTERIOR: tl.constexpr = False):
    """Where tap k = (kx, ky, kz) of a plane's channels is."""
    x, y, z = taps
    # where x is innermost, the distance of taps in a row is a constant, and part of the load instruction
    if taps_in_a_row(SPEC, INTERIOR) and VECTOR == 1:
        pixel = (x.index[0], y.index[k[1]], z.index[k[2]])
        row = plane.pointer + offset_of(pixel, plane.strides, VECTOR, SPEC)
        return row + tl.cast(plane.strides[0], SPEC.index) * k[0]
    else:
        pixel = (x.index[k[0]], y.index[k[1]], z.index[k[2]])
        return plane.pointer + offset_of(pixel, plane.strides, VECTOR, SPEC)


@triton.jit
def load_tap(plane, taps, k, VECTOR: tl.constexpr, SPEC: tl.constexpr, INTERIOR: tl.constexpr = False):
    """Tap k of a plane's channels, 0 where it is not to be read."""
    pointer = tap_pointer(plane, taps, k, VECTOR, SPEC, INTERIOR)
    inside = plane.exists & taps[2].inside[k[2]] & taps[1].inside[k[1]] & taps[0].inside[k[0]]
    return widened(tl.load(pointer, inside, other=0.0), SPEC)


@triton.jit
def zero_samples(plane, taps, SPEC: tl.constexpr):
    """Zeros for the samples of a plane's channels, [pixels, channels]."""
    return tl.zeros([taps[0].index[0].shape[0], plane.pointer.shape[1]], SPEC.compute)


@triton.jit
def interpolate(plane, taps, VECTOR: tl.constexpr, SPEC: tl.constexpr, INTERIOR: tl.constexpr = False):
    """The samples of a plane's channels."""
    x, y, z = taps
    value = zero_samples(plane, taps, SPEC)
    for kz in tl.static_range(taps_z(SPEC)):
        for ky in tl.static_range(tap_count(SPEC)):
            for kx in tl.static_range(tap_count(SPEC)):
                pixel = load_tap(plane, taps, (kx, ky, kz), VECTOR, SPEC, INTERIOR)
                if SPEC.interpolation == NEAREST:
                    value = pixel
                else:
                    value += (x.weight[kx] * y.weight[ky] * z.weight[kz]) * pixel
    return value


@triton.jit
def interpolate_grad(
    plane, taps, slopes, VECTOR: tl.constexpr, SPEC: tl.constexpr, INTERIOR: tl.constexpr = False
):  # fmt: skip
    """The derivatives of ``interpolate`` by x, y and z, built up axis by axis."""
    x, y, z = taps
    zero = zero_samples(plane, taps, SPEC)
    by_x = zero
    by_y = zero
    by_z = zero
    for kz in tl.static_range(taps_z(SPEC)):
        plane_by_x = zero
        plane_by_y = zero
        plane_value = zero
        for ky in tl.static_range(tap_count(SPEC)):
            row_by_x = zero
            row_value = zero
            for kx in tl.static_range(tap_count(SPEC)):
                pixel = load_tap(plane, taps, (kx, ky, kz), VECTOR, SPEC, INTERIOR)
                row_by_x += pixel * slopes[0][kx]
                row_value += pixel * x.weight[kx]
            plane_by_x += row_by_x * y.weight[ky]
            plane_by_y += row_value * slopes[1][ky]
            plane_value += row_value * y.weight[ky]
        by_x += plane_by_x * z.weight[kz]
        by_y += plane_by_y * z.weight[kz]
        by_z += plane_value * slopes[2][kz]
    return by_x, by_y, by_z


@triton.jit
def add_differences(sums, g, plane, taps, SPEC: tl.constexpr, INTERIOR: tl.constexpr):
    """``sums`` plus g times the differences of a plane's neighbours: upper, lower and left side.

    The right side's follows: right = left + lower - upper. Weights come in once a pixel, in ``gradient_of``.
    """
    top_left = load_tap(plane, taps, (0, 0, 0), SPEC.vector_input, SPEC, INTERIOR)
    top_right = load_tap(plane, taps, (1, 0, 0), SPEC.vector_input, SPEC, INTERIOR)
    low_left = load_tap(plane, taps, (0, 1, 0), SPEC.vector_input, SPEC, INTERIOR)
    low_right = load_tap(plane, taps, (1, 1, 0), SPEC.vector_input, SPEC, INTERIOR)
    upper = sums[0] + g * (top_right - top_left)
    lower = sums[1] + g * (low_right - low_left)
    left = sums[2] + g * (low_left - top_left)
    return upper, lower, left


@triton.jit
def add_product(sums, g, values):
    """``sums`` plus g times ``values``, for x, y and z."""
    return sums[0] + g * values[0], sums[1] + g * values[1], sums[2] + g * values[2]


@triton.jit
def add_coordinate_gradient(
    sums, g, plane, taps, slopes, SPEC: tl.constexpr, INTERIOR: tl.constexpr = False
):  # fmt: skip
    """``sums`` plus what samples of a plane, with gradient ``g``, add to the coordinates' gradient."""
    if has_differences(SPEC):
        return add_differences(sums, g, plane, taps, SPEC, INTERIOR)
    else:
        slope = interpolate_grad(plane, taps, slopes, SPEC.vector_input, SPEC, INTERIOR)
        return add_product(sums, g, slope)


@triton.jit
def gradient_of(sums, taps, slopes, kept, SPEC: tl.constexpr):
    """The gradient by the pixel coordinates, (x, y[, z]), from ``add_coordinate_gradient``'s sums by channel.

    Pixels that are not ``kept`` may have read a NaN: they count as 0.
    """
    x = tl.sum(sums[0], 1, keep_dims=True)
    y = tl.sum(sums[1], 1, keep_dims=True)
    z = tl.sum(sums[2], 1, keep_dims=True)
    if has_differences(SPEC):  # upper, lower and left side
        turn = y - x
        x = (x + taps[1].weight[1] * turn) * slopes[0][1]
        y = (z + taps[0].weight[1] * turn) * slopes[1][1]
    x = tl.where(kept, x, 0.0)
    y = tl.where(kept, y, 0.0)
    if SPEC.dims == 3:
        return x, y, tl.where(kept, z, 0.0)
    else:
        return x, y


@triton.jit
def scatter(plane, g, taps, kept, SPEC: tl.constexpr, INTERIOR: tl.constexpr = False):
    """The transpose of ``interpolate``: adds ``g``, [pixels, channels], to the pixels it was read from.

    kept: the outputs that exist.
    """
    x, y, z = taps
    for kz in tl.static_range(taps_z(SPEC)):
        for ky in tl.static_range(tap_count(SPEC)):
            for kx in tl.static_range(tap_count(SPEC)):
                pointer = tap_pointer(plane, taps, (kx, ky, kz), SPEC.vector_grad, SPEC, INTERIOR)
                inside = (kept & plane.exists) & z.inside[kz] & y.inside[ky] & x.inside[kx]
                weight = x.weight[kx] * y.weight[ky] * z.weight[kz]
                # relaxed: the sums need no order between memory operations, and a fence each is slow
                tl.atomic_add(pointer, g * weight, inside, sem="relaxed")
