"""Where padding shows pixels again: for the gather, which looks for all outputs that read a pixel.

Copies are numbered along each axis; number 0 is the image itself. Copy k shows ``copy_length`` whole numbers
from k times that on, each a pixel of the image, and each whole number belongs to one copy. Along an axis
without period there is copy 0 alone.
"""

import triton
import triton.language as tl

from ..spec import constant, plain
from .arithmetic import INFINITY, in_bounds
from .interpolation import radius_of
from .padding import copy_length, is_periodic, lower_edge, mirrors

# Copies of the image that are looked at one by one, at most.
MOST_COPIES = constant(64)


@triton.constexpr_function
def has_copies(spec):
    """Whether padding shows pixels again, along any axis."""
    return any(is_periodic(spec, axis) for axis in range(plain(spec.dims)))


@triton.jit
def copy_at(x, size, AXIS: tl.constexpr, SPEC: tl.constexpr):
    """The number of the copy in which a float coordinate lies, a float."""
    low = -0.5
    if mirrors(SPEC, AXIS):
        low = lower_edge(SPEC)
    return tl.floor((x - low) / copy_length(size, AXIS, SPEC).to(SPEC.compute))


@triton.jit
def appearance(q, number, size, AXIS: tl.constexpr, SPEC: tl.constexpr):
    """The whole number at which copy ``number`` shows pixel ``q``, and whether that belongs to this copy.

    (A mirror that is a pixel's centre is shown by two copies, and belongs to the later one.)
    """
    start = number * copy_length(size, AXIS, SPEC)
    at = start + q
    if mirrors(SPEC, AXIS):
        end = start + copy_length(size, AXIS, SPEC) - (1 - SPEC.align_corners)
        at = tl.where((number & 1) != 0, end - q, at)
    return at, in_bounds(at - start, copy_length(size, AXIS, SPEC))


@triton.jit
def is_apart(tile, number, bounds, size, AXIS: tl.constexpr, SPEC: tl.constexpr):
    """Whether copy ``number`` shows the tile's pixels, first to last, out of ``bounds``."""
    one, _ = appearance(tile[0], number, size, AXIS, SPEC)
    two, _ = appearance(tile[1], number, size, AXIS, SPEC)
    below = bounds[1] < tl.minimum(one, two).to(SPEC.compute)
    return below | (bounds[0] > tl.maximum(one, two).to(SPEC.compute))


@triton.jit
def copies_within(bounds, sizes, SPEC: tl.constexpr):
    """For each axis the first copy that is read and how many are, and the number over all axes, floats.

    The number is infinite if there is no bound, or if coordinates are so far that they lose their copy.
    """
    RADIUS: tl.constexpr = radius_of(SPEC)
    ranges = ()
    number = tl.full([], 1.0, SPEC.compute)
    for axis in tl.static_range(SPEC.dims):
        if is_periodic(SPEC, axis):
            first = copy_at(bounds[axis][0] - RADIUS, sizes.input[axis], axis, SPEC)
            count = copy_at(bounds[axis][1] + RADIUS, sizes.input[axis], axis, SPEC) - first + 1.0
            number *= count
            near = (bounds[axis][0] > -(2.0**29)) & (bounds[axis][1] < 2.0**29)
            number = tl.where(near, number, INFINITY)
            ranges += ((first, count),)
        else:
            ranges += ((tl.full([], 0.0, SPEC.compute), tl.full([], 1.0, SPEC.compute)),)
    return ranges, number


@triton.jit
def copy_number(i, ranges, SPEC: tl.constexpr):
    """The copies (x, y[, z]) of combination ``i``."""
    number = ()
    for axis in tl.static_range(SPEC.dims):
        count = ranges[axis][1].to(tl.int32)
        number += (ranges[axis][0].to(tl.int32) + i % count,)
        i = i // count
    return number
