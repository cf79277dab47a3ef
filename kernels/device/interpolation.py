"""Interpolation along one axis: which pixels a place reads, and with what weight.

``axis_taps``, ``axis_slopes`` and ``axis_curvatures`` are the whole interface: the taps, and the first and
second derivatives of their weights by the coordinate that was not yet padded. Kernels take the tensor product
over the axes, so an interpolation that is added here works in 2-D and 3-D, forward and backward.
"""

import triton
import triton.language as tl

from ..modes import Interpolation
from ..spec import Taps, constant, plain
from .arithmetic import BICUBIC, BILINEAR, NEAREST, clamp, in_bounds
from .padding import (
    beyond,
    ends_at_edges,
    is_periodic,
    pad_index,
    pad_place,
    pad_row,
    pads_place,
    reads_outside,
)

CUBIC_A = constant(-0.75)  # PyTorch's cubic convolution coefficient


@triton.constexpr_function
def tap_count(spec):
    """Pixels read along one axis."""
    return {Interpolation.BILINEAR: 2, Interpolation.NEAREST: 1, Interpolation.BICUBIC: 4}[
        plain(spec.interpolation)
    ]


@triton.constexpr_function
def taps_z(spec):
    """Pixels read along z: in 2-D the one there is."""
    return plain(tap_count(spec)) if plain(spec.dims) == 3 else 1


@triton.constexpr_function
def has_curvature(spec):
    """Whether the weights have second derivatives along their axis."""
    return plain(spec.interpolation) == Interpolation.BICUBIC


@triton.constexpr_function
def radius_of(spec):
    """How far from a place the pixels lie that it reads, before padding."""
    return {Interpolation.BILINEAR: 1.0, Interpolation.NEAREST: 0.5, Interpolation.BICUBIC: 2.0}[
        plain(spec.interpolation)
    ]


@triton.constexpr_function
def pads_taps(spec, axis):
    """Whether taps are padded one by one; else they are in a row, at a padded place."""
    in_a_row = not plain(reads_outside(spec, axis)) or plain(pads_place(spec, axis))
    return plain(spec.interpolation) == Interpolation.BICUBIC or not plain(in_a_row)


@triton.constexpr_function
def taps_in_a_row(spec, interior):
    """Whether along x each tap's pixel is the one after the tap before it."""
    return plain(interior) or not plain(pads_taps(spec, 0))


# ------------------------------------------------------------------------------------- cubic convolution
@triton.jit
def cubic_near(d):
    """The cubic convolution kernel at a distance 0 <= d <= 1."""
    return (d * (CUBIC_A + 2.0) - (CUBIC_A + 3.0)) * d * d + 1.0


@triton.jit
def cubic_near_grad(d):
    return (d * (3.0 * (CUBIC_A + 2.0)) - 2.0 * (CUBIC_A + 3.0)) * d


@triton.jit
def cubic_near_curvature(d):
    return d * (6.0 * (CUBIC_A + 2.0)) - 2.0 * (CUBIC_A + 3.0)


@triton.jit
def cubic_far(d):
    """The cubic convolution kernel at a distance 1 <= d <= 2."""
    return ((d * CUBIC_A - 5.0 * CUBIC_A) * d + 8.0 * CUBIC_A) * d - 4.0 * CUBIC_A


@triton.jit
def cubic_far_grad(d):
    return (d * (3.0 * CUBIC_A) - 10.0 * CUBIC_A) * d + 8.0 * CUBIC_A


@triton.jit
def cubic_far_curvature(d):
    return d * (6.0 * CUBIC_A) - 10.0 * CUBIC_A


@triton.jit
def cubic_weight(d):
    """The cubic convolution kernel at any distance of at least 0."""
    far = tl.where(d < 2.0, cubic_far(d), 0.0)
    return tl.where(d <= 1.0, cubic_near(d), far)


# ------------------------------------------------------------------------------------------- one axis
@triton.jit
def nearest_index(place, number):
    """The nearest pixel; halves go to an even one, where ``number`` is that of the pixel below."""
    odd = (number & 1) != 0
    up = (place[1] > 0.5) | ((place[1] == 0.5) & odd)
    return place[0] + up.to(tl.int32)


@triton.jit
def axis_taps(place, size, AXIS: tl.constexpr, SPEC: tl.constexpr, INTERIOR: tl.constexpr = False):
    """The taps of ``place`` on an axis of ``size`` pixels. INTERIOR: they are known to lie in the image."""
    TAPS: tl.constexpr = tap_count(SPEC)
    ONE_BY_ONE: tl.constexpr = pads_taps(SPEC, AXIS) and not INTERIOR
    given = place
    if pads_place(SPEC, AXIS) and not pads_taps(SPEC, AXIS) and not INTERIOR:
        place, _ = pad_place(place, size, AXIS, SPEC)
    i, t = place
    if SPEC.interpolation == NEAREST:
        weights = (1.0,)
        i = nearest_index(place, i)
        # a padded place rounds to a pixel of the image; the limit keeps any other from memory
        if pads_place(SPEC, AXIS) and not INTERIOR:
            i = tl.minimum(i, size - 1)
    elif SPEC.interpolation == BILINEAR:
        weights = (1.0 - t, t)
    else:
        weights = (cubic_far(t + 1.0), cubic_near(t), cubic_near(1.0 - t), cubic_far(2.0 - t))
        i = i - 1
    if ONE_BY_ONE:
        indices = pad_row(i, TAPS, size, AXIS, SPEC)
    else:
        indices = ()
        for k in tl.static_range(TAPS):
            indices += (i + k,)
    inside = ()
    for k in tl.static_range(TAPS):
        # the tap after a padded place may not exist
        if not INTERIOR and (not reads_outside(SPEC, AXIS) or (k == 1 and not ONE_BY_ONE)):
            read = in_bounds(indices[k], size)
        else:
            read = True
        if ends_at_edges(SPEC, AXIS) and not INTERIOR:
            read = (beyond(given, size, SPEC) == 0) & read
        inside += (read,)
    return Taps(indices, inside, weights)


@triton.jit
def axis_slopes(place, size, AXIS: tl.constexpr, SPEC: tl.constexpr, INTERIOR: tl.constexpr = False):
    """The derivatives of ``axis_taps``'s weights by the coordinate."""
    if SPEC.interpolation == BICUBIC:
        t = place[1]
        return (
            cubic_far_grad(t + 1.0),
            cubic_near_grad(t),
            -cubic_near_grad(1.0 - t),
            -cubic_far_grad(2.0 - t),
        )
    elif SPEC.interpolation == BILINEAR and (INTERIOR or pads_taps(SPEC, AXIS)):
        return (-1.0, 1.0)
    elif SPEC.interpolation == BILINEAR:
        _, slope = pad_place(place, size, AXIS, SPEC)
        return -slope, slope
    else:
        return (0.0,)


@triton.jit
def axis_curvatures(place, SPEC: tl.constexpr):
    """The second derivatives of ``axis_taps``'s weights; 0 wherever weights are made of lines."""
    if SPEC.interpolation == BICUBIC:
        t = place[1]
        return (
            cubic_far_curvature(t + 1.0),
            cubic_near_curvature(t),
            cubic_near_curvature(1.0 - t),
            cubic_far_curvature(2.0 - t),
        )
    elif SPEC.interpolation == BILINEAR:
        return (0.0, 0.0)
    else:
        return (0.0,)


@triton.jit
def at_pixel(q, taps, values, SPEC: tl.constexpr):
    """The sum of the taps' values (weights, slopes) over the taps that read pixel ``q``."""
    total = tl.zeros(taps.index[0].shape, SPEC.compute)
    for k in tl.static_range(tap_count(SPEC)):
        total += tl.where((taps.index[k] == q) & taps.inside[k], values[k], 0.0)
    return total


@triton.jit
def distance_weight(place, q, number, SPEC: tl.constexpr):
    """The weight of pixel ``q`` by how far ``place`` is from it; ``number`` as in ``nearest_index``."""
    if SPEC.interpolation == NEAREST:
        return tl.where(nearest_index(place, number) == q, 1.0, 0.0)
    else:
        distance = tl.abs((place[0] - q).to(SPEC.compute) + place[1])
        if SPEC.interpolation == BICUBIC:
            return cubic_weight(distance)
        else:
            return clamp(1.0 - distance, 0.0, 1.0)


@triton.jit
def pixel_weight(place, q, size, AXIS: tl.constexpr, SPEC: tl.constexpr, SHOWN: tl.constexpr = False):
    """The weight with which ``place`` reads pixel ``q``: the transpose of ``axis_taps``.

    SHOWN: where padding repeats, the weight with which it reads what is shown at ``q``, and there alone. So
    a pixel's weight is the sum over all that show it.
    """
    if is_periodic(SPEC, AXIS) and SHOWN:
        number = place[0]
        if pads_place(SPEC, AXIS):  # halves go to the pixel that is even in the image
            number = pad_index(number, size, AXIS, SPEC)
        return distance_weight(place, q, number, SPEC)
    elif pads_taps(SPEC, AXIS) and reads_outside(SPEC, AXIS):
        taps = axis_taps(place, size, AXIS, SPEC)
        return at_pixel(q, taps, taps.weight, SPEC)
    else:
        padded = place
        if pads_place(SPEC, AXIS):
            padded, _ = pad_place(place, size, AXIS, SPEC)
        weight = distance_weight(padded, q, padded[0], SPEC)
        if ends_at_edges(SPEC, AXIS):
            weight = tl.where(beyond(place, size, SPEC), 0.0, weight)
        return weight


# ------------------------------------------------------------------------------------------- all axes
@triton.jit
def taps_of_axes(places, sizes, SPEC: tl.constexpr, INTERIOR: tl.constexpr = False):
    """``axis_taps`` of x, y and z; in 2-D z is one tap of weight 1."""
    taps = [axis_taps(places[axis], sizes.input[axis], axis, SPEC, INTERIOR) for axis in SPEC.axes]
    if SPEC.dims == 3:
        return taps
    else:
        return taps[0], taps[1], Taps((0,), (True,), (1.0,))


@triton.jit
def slopes_of_axes(places, sizes, SPEC: tl.constexpr, INTERIOR: tl.constexpr = False):
    """``axis_slopes`` of x, y and z; in 2-D nothing depends on z."""
    slopes = [axis_slopes(places[axis], sizes.input[axis], axis, SPEC, INTERIOR) for axis in SPEC.axes]
    if SPEC.dims == 3:
        return slopes
    else:
        return slopes[0], slopes[1], (0.0,)


@triton.jit
def curvatures_of_axes(places, SPEC: tl.constexpr):
    """``axis_curvatures`` of x, y and z."""
    curvatures = [axis_curvatures(place, SPEC) for place in places]
    if SPEC.dims == 3:
        return curvatures
    else:
        return curvatures[0], curvatures[1], (0.0,)


@triton.jit
def weight_of_pixel(places, q, sizes, SPEC: tl.constexpr, SHOWN: tl.constexpr = False):
    """The weight with which an output at ``places`` reads pixel ``q``; SHOWN as in ``pixel_weight``."""
    weight = pixel_weight(places[1], q[1], sizes.input[1], 1, SPEC, SHOWN)
    weight *= pixel_weight(places[0], q[0], sizes.input[0], 0, SPEC, SHOWN)
    if SPEC.dims == 3:
        weight *= pixel_weight(places[2], q[2], sizes.input[2], 2, SPEC, SHOWN)
    return weight
