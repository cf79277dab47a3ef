"""Derivatives of ``sampling``'s functions along a displacement m of the coordinates, in pixels.

``tangents`` are what m does to the weights of each axis (``weight_tangents``); planes, taps and slopes as in
``sampling``. ``MATH.md`` derives the sums.
"""

import triton
import triton.language as tl

from .interpolation import has_curvature, tap_count, taps_z
from .sampling import load_tap, tap_pointer


@triton.jit
def axis_tangents(slopes, m, SPEC: tl.constexpr):
    """What moving a coordinate by ``m`` does to the weights of its axis."""
    tangents = ()
    for k in tl.static_range(tap_count(SPEC)):
        tangents += (m * slopes[k],)
    return tangents


@triton.jit
def weight_tangents(slopes, m, SPEC: tl.constexpr):
    """``axis_tangents`` of x, y and z; in 2-D nothing moves along z."""
    x = axis_tangents(slopes[0], m[0], SPEC)
    y = axis_tangents(slopes[1], m[1], SPEC)
    if SPEC.dims == 3:
        return x, y, axis_tangents(slopes[2], m[2], SPEC)
    else:
        return x, y, (0.0,)


@triton.jit
def interpolate_tangent(plane, taps, tangents, strides, exists, SPEC: tl.constexpr):
    """The derivative of ``interpolate`` along m, [pixels, channels]."""
    x, y, z = taps
    zero = tl.zeros([x.index[0].shape[0], plane.shape[1]], SPEC.compute)
    tangent = zero
    for kz in tl.static_range(taps_z(SPEC)):
        plane_tangent = zero
        plane_value = zero
        for ky in tl.static_range(tap_count(SPEC)):
            row_tangent = zero
            row_value = zero
            for kx in tl.static_range(tap_count(SPEC)):
                pixel = load_tap(plane, taps, (kx, ky, kz), strides, exists, SPEC.vector_input, SPEC, False)
                row_tangent += pixel * tangents[0][kx]
                row_value += pixel * x.weight[kx]
            plane_tangent += row_tangent * y.weight[ky]
            plane_tangent += row_value * tangents[1][ky]
            plane_value += row_value * y.weight[ky]
        tangent += plane_tangent * z.weight[kz]
        if SPEC.dims == 3:
            tangent += plane_value * tangents[2][kz]
    return tangent


@triton.jit
def interpolate_grad_tangent(plane, taps, slopes, curvatures, m, strides, exists, SPEC: tl.constexpr):
    """The derivatives of ``interpolate_grad``'s results along m: the Hessian by x, y, z times m."""
    x, y, z = taps
    CURVED: tl.constexpr = has_curvature(SPEC)
    zero = tl.zeros([x.index[0].shape[0], plane.shape[1]], SPEC.compute)
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
                pixel = load_tap(plane, taps, (kx, ky, kz), strides, exists, SPEC.vector_input, SPEC, False)
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
def scatter_tangent(plane, g, taps, tangents, strides, exists, SPEC: tl.constexpr):
    """The transpose of ``interpolate_tangent``, as ``scatter`` is ``interpolate``'s."""
    x, y, z = taps
    for kz in tl.static_range(taps_z(SPEC)):
        for ky in tl.static_range(tap_count(SPEC)):
            weight_yz = y.weight[ky] * z.weight[kz]
            tangent_yz = tangents[1][ky] * z.weight[kz]
            if SPEC.dims == 3:
                tangent_yz += y.weight[ky] * tangents[2][kz]
            for kx in tl.static_range(tap_count(SPEC)):
                pointer = tap_pointer(plane, taps, (kx, ky, kz), strides, SPEC.vector_grad, SPEC, False)
                inside = exists & x.inside[kx] & y.inside[ky] & z.inside[kz]
                weight = tangents[0][kx] * weight_yz + x.weight[kx] * tangent_yz
                tl.atomic_add(pointer, g * weight, inside, sem="relaxed")
