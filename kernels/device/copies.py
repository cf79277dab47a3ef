"""Where padding shows pixels again: for the gather, which looks for all outputs that read a pixel.

Copies are numbered along each axis; number 0 is the image itself. Zeros and border padding have that one
alone.
"""

import triton
import triton.language as tl

from ..spec import constant, plain
from .padding import is_periodic

# Copies of the image that are looked at one by one, at most.
MOST_COPIES = constant(64)


@triton.constexpr_function
def has_copies(spec):
    """Whether padding shows pixels again, along any axis."""
    return any(is_periodic(spec, axis) for axis in range(plain(spec.dims)))


@triton.jit
def extent_of(size, SPEC: tl.constexpr):
    """Where copy 0 begins, its lower mirror, and how long copies are: between pixel centres or edges."""
    return -0.5 * (1 - SPEC.align_corners), tl.maximum(size - SPEC.align_corners, 1).to(SPEC.compute)


@triton.jit
def copy_at(x, size, SPEC: tl.constexpr):
    """The number of the copy in which a float coordinate lies, a float."""
    low, length = extent_of(size, SPEC)
    return tl.floor((x - low) / length)


@triton.jit
def copy_of(place, size, SPEC: tl.constexpr):
    """The number of the copy in which a place lies: an output belongs to one copy, and counts in no other."""
    i = place[0]
    if not SPEC.align_corners:
        i += (place[1] >= 0.5).to(tl.int32)
    length = tl.maximum(size - SPEC.align_corners, 1)
    negative = i < 0
    number = (tl.where(negative, ~i, i).to(tl.uint32) // tl.cast(length, tl.uint32)).to(tl.int32)
    return tl.where(negative, ~number, number)


@triton.jit
def appearance(q, number, size, SPEC: tl.constexpr):
    """Where pixel ``q`` appears in a copy, both floats: mirrored in every other one."""
    low, length = extent_of(size, SPEC)
    odd = number - 2.0 * tl.floor(number * 0.5) == 1.0
    return tl.where(odd, 2.0 * low + (number + 1.0) * length - q, q + number * length)


@triton.jit
def copies_within(bounds, sizes, SPEC: tl.constexpr):
    """For each axis the first copy that is read and how many are, and the number over all axes, floats.

    The number is infinite if there is no bound, or if coordinates are so far that they lose their copy.
    """
    ranges = ()
    number = tl.full([], 1.0, SPEC.compute)
    for axis in tl.static_range(SPEC.dims):
        first = copy_at(bounds[axis][0], sizes.input[axis], SPEC)
        last = copy_at(bounds[axis][1], sizes.input[axis], SPEC)
        ranges += ((first, last - first + 1.0),)
        number *= last - first + 1.0
        near = (bounds[axis][0] > -(2.0**29)) & (bounds[axis][1] < 2.0**29)
        number = tl.where(near, number, float("inf"))
    return ranges, number


@triton.jit
def copy_number(i, ranges, SPEC: tl.constexpr):
    """The copies (x, y[, z]) of combination ``i``, floats."""
    across = ranges[0][1].to(tl.int32)
    x = ranges[0][0] + (i % across).to(SPEC.compute)
    rest = i // across
    if SPEC.dims == 3:
        down = ranges[1][1].to(tl.int32)
        y = ranges[1][0] + (rest % down).to(SPEC.compute)
        return x, y, ranges[2][0] + (rest // down).to(SPEC.compute)
    else:
        return x, ranges[1][0] + rest.to(SPEC.compute)
