"""Derivatives of ``sampling``'s functions along a displacement m of the coordinates, in pixels.

Planes, taps and slopes are as in ``sampling``. ``MATH.md`` derives the sums.
"""

import triton
import triton.language as tl

from .interpolation import has_curvature, tap_count, taps_z
from .sampling import load_tap, tap_pointer, zero_samples


@triton.jit
def tap_tangent(taps, slopes, m, k, SPEC: tl.constexpr):
    """What m does to the weight of tap k = (kx, ky, kz)."""
    x, y, z = taps
    plane = m[0] * slopes[0][k[0]] * y.weight[k[1]] + x.weight[k[0]] * (m[1] * slopes[1][k[1]])
    if SPEC.dims == 3:
        return plane * z.weight[k[2]] + x.weight[k[0]] * y.weight[k[1]] * (m[2] * slopes[2][k[2]])
    else:
        return plane


@triton.jit
def interpolate_tangent(plane, taps, slopes, m, SPEC: tl.constexpr):
    """The derivative of ``interpolate`` along m, [pixels, channels]."""
    tangent = zero_samples(plane, taps, SPEC)
    for kz in tl.static_range(taps_z(SPEC)):
        for ky in tl.static_range(tap_count(SPEC)):
            for kx in tl.static_range(tap_count(SPEC)):
                pixel = load_tap(plane, taps, (kx, ky, kz), SPEC.vector_input, SPEC)
                tangent += tap_tangent(taps, slopes, m, (kx, ky, kz), SPEC) * pixel
    return tangent


@triton.jit
def interpolate_grad_tangent(plane, taps, slopes, curvatures, m, SPEC: tl.constexpr):
    """The derivatives of ``interpolate_grad``'s results along m: the Hessian by x, y, z times m."""
    x, y, z = taps
    CURVED: tl.constexpr = has_curvature(SPEC)
    zero = zero_samples(plane, taps, SPEC)
    by_x = zero
    by_y = zero
    by_z = zero
    for kz in tl.static_range(taps_z(SPEC)):
        plane_value = zero
        plane_by_x = zero
        plane_by_y = zero
        plane_by_xx = zero
        plane_by_xy = zero
        plane_by_yy = zero
        for ky in tl.static_range(tap_count(SPEC)):
            row_value = zero
            row_by_x = zero
            row_by_xx = zero
            for kx in tl.static_range(tap_count(SPEC)):
                pixel = load_tap(plane, taps, (kx, ky, kz), SPEC.vector_input, SPEC)
                row_value += pixel * x.weight[kx]
                row_by_x += pixel * slopes[0][kx]
                if CURVED:
                    row_by_xx += pixel * curvatures[0][kx]
            plane_by_xy += row_by_x * slopes[1][ky]
            if CURVED:
                plane_by_xx += row_by_xx * y.weight[ky]
                plane_by_yy += row_value * curvatures[1][ky]
            if SPEC.dims == 3:
                plane_value += row_value * y.weight[ky]
                plane_by_x += row_by_x * y.weight[ky]
                plane_by_y += row_value * slopes[1][ky]
        along_x = m[1] * plane_by_xy
        along_y = m[0] * plane_by_xy
        if CURVED:
            along_x += m[0] * plane_by_xx
            along_y += m[1] * plane_by_yy
        by_x += along_x * z.weight[kz]
        by_y += along_y * z.weight[kz]
        if SPEC.dims == 3:
            turn = m[2] * slopes[2][kz]
            by_x += turn * plane_by_x
            by_y += turn * plane_by_y
            by_z += (m[0] * plane_by_x + m[1] * plane_by_y) * slopes[2][kz]
            if CURVED:
                by_z += (m[2] * curvatures[2][kz]) * plane_value
    return by_x, by_y, by_z


@triton.jit
def scatter_tangent(plane, g, taps, slopes, m, kept, SPEC: tl.constexpr):
    """The transpose of ``interpolate_tangent``, as ``scatter`` is ``interpolate``'s."""
    x, y, z = taps
    for kz in tl.static_range(taps_z(SPEC)):
        for ky in tl.static_range(tap_count(SPEC)):
            for kx in tl.static_range(tap_count(SPEC)):
                pointer = tap_pointer(plane, taps, (kx, ky, kz), SPEC.vector_grad, SPEC)
                inside = (kept & plane.exists) & x.inside[kx] & y.inside[ky] & z.inside[kz]
                tangent = tap_tangent(taps, slopes, m, (kx, ky, kz), SPEC)
                tl.atomic_add(pointer, g * tangent, inside, sem="relaxed")
