"""Padding: which pixel is read in place of one outside the image, by arithmetic on whole numbers.

Everything here is per axis. ``size`` is the input's extent along the axis; AXIS is 0 for x, 1 for y and 2 for
z. A padding is a branch of ``pad_index`` and its answers to the questions below, which gather and sort ask.
(The paddings of ``pads_place`` have PyTorch's slopes, and for these a branch of ``pad_place``.)
``tests/test_padding.py`` tells whether a padding is right in all kernels.
"""

import triton
import triton.language as tl

from ..modes import EXTENDING, Padding
from ..spec import Place, constant, plain
from .arithmetic import CIRCULAR, REFLECTION, clamp

# Whole numbers of pixels are at most this; sums with a few taps and an axis' size stay within an int32.
FAR = constant(2**30)


@triton.constexpr_function
def padding_of(spec, axis):
    return plain(spec.padding)[plain(axis)]


# --------------------------------------------------------------------------- what a padding is like
@triton.constexpr_function
def is_periodic(spec, axis):
    """Whether the padding shows copies of the image one after the other, as ``copies`` counts them."""
    return plain(padding_of(spec, axis)) in (Padding.REFLECTION, Padding.CIRCULAR)


@triton.constexpr_function
def mirrors(spec, axis):
    """Whether every other copy is mirrored."""
    return plain(padding_of(spec, axis)) == Padding.REFLECTION


@triton.constexpr_function
def wraps(spec, axis):
    """Whether the first pixel follows the last one. Elsewhere neighbours are read at most 1 pixel apart."""
    return plain(padding_of(spec, axis)) == Padding.CIRCULAR


@triton.constexpr_function
def reads_outside(spec, axis):
    """Whether taps outside the image read a pixel of it; else they read nothing."""
    return plain(padding_of(spec, axis)) != Padding.ZEROS


@triton.constexpr_function
def extends_edges(spec, axis):
    """Whether what lies beyond an edge reads the pixel at that edge, if any."""
    return plain(padding_of(spec, axis)) in EXTENDING


@triton.constexpr_function
def ends_at_edges(spec, axis):
    """Whether a sample whose centre lies outside the image reads nothing."""
    return plain(padding_of(spec, axis)) == Padding.FRAMED


@triton.constexpr_function
def pads_place(spec, axis):
    """Whether linear and nearest samples are taken at ``pad_place``.

    Else their taps are padded one by one, as cubic taps are, and slopes are 1.
    """
    return plain(padding_of(spec, axis)) in (Padding.BORDER, Padding.REFLECTION, Padding.FRAMED)


@triton.jit
def copy_length(size, AXIS: tl.constexpr, SPEC: tl.constexpr):
    """Pixels from copy to copy: from mirror to mirror, which are pixel centres or edges, or all pixels."""
    if mirrors(SPEC, AXIS):
        return tl.maximum(size - SPEC.align_corners, 1)
    else:
        return size


@triton.jit
def period_of(size, AXIS: tl.constexpr, SPEC: tl.constexpr):
    """Pixels after which the padding repeats: with mirrors, there and back."""
    if mirrors(SPEC, AXIS):
        return 2 * copy_length(size, AXIS, SPEC)
    else:
        return copy_length(size, AXIS, SPEC)


@triton.jit
def lower_edge(SPEC: tl.constexpr):
    """Normalised -1 in pixels: what NaN and infinities read where padding repeats."""
    return -0.5 * (1 - SPEC.align_corners)


@triton.jit
def beyond(place, size, SPEC: tl.constexpr):
    """Whether a place lies outside the image: beyond the outer edges of its outermost pixels, or beyond their
    centres with aligned corners.

    What lies on these is inside. NaN is a place far below (``place_of``), and outside.
    """
    i, t = place
    edge = 0.5 * (1 - SPEC.align_corners)
    below = (i < -1) | ((i == -1) & (t < 1.0 - edge))
    above = (i >= size) | ((i == size - 1) & (t > edge))
    return below | above


# ------------------------------------------------------------------------------------------ its arithmetic
@triton.jit
def residue(i, period):
    """``i`` modulo ``period``, at least 0, for i within 2^30: by floats that are near, then exactly.

    The first quotient is off by 2^-23 of itself and less than two; of what it leaves, the second by one.
    """
    inverse = 1.0 / tl.cast(period, tl.float32)
    for _ in tl.static_range(2):
        i -= tl.floor(i.to(tl.float32) * inverse).to(tl.int32) * period
    i = tl.where(i < 0, i + period, i)
    return tl.where(i >= period, i - period, i)


@triton.jit
def place_of(x, size, AXIS: tl.constexpr, SPEC: tl.constexpr):
    """The place of a pixel coordinate that is any float.

    NaN and what lies too far for an int32 go to where nothing else is: past the lower end, or by their sign.
    Where padding repeats, far coordinates are brought near by whole periods, and NaN and infinities become
    normalised -1.
    """
    if is_periodic(SPEC, AXIS):
        period = period_of(size, AXIS, SPEC).to(SPEC.compute)
        near = clamp(x - tl.floor(x / period) * period, 0.0, period)
        near = tl.where(tl.abs(x) < float("inf"), near, lower_edge(SPEC))
        x = tl.where(tl.abs(x) < FAR, x, near)
    x = clamp(x, -1.0 * FAR, 1.0 * FAR)
    whole = tl.floor(x)
    return Place(whole.to(tl.int32), x - whole)


@triton.jit
def pad_index(i, size, AXIS: tl.constexpr, SPEC: tl.constexpr):
    """The pixel read in place of pixel ``i``; outside the image only under zeros, where nothing is read."""
    if padding_of(SPEC, AXIS) == REFLECTION:
        period = period_of(size, AXIS, SPEC)
        i = residue(i, period)
        i = tl.minimum(i, period - (1 - SPEC.align_corners) - i)
    elif padding_of(SPEC, AXIS) == CIRCULAR:
        i = residue(i, size)
    if reads_outside(SPEC, AXIS):
        i = tl.minimum(tl.maximum(i, 0), size - 1)
    return i


@triton.jit
def pad_row(first, COUNT: tl.constexpr, size, AXIS: tl.constexpr, SPEC: tl.constexpr):
    """``pad_index`` of COUNT pixels in a row, from ``first`` on."""
    i = pad_index(first, size, AXIS, SPEC)
    indices = (i,)
    for k in tl.static_range(1, COUNT):
        if wraps(SPEC, AXIS):
            i = tl.where(i == size - 1, 0, i + 1)
        else:
            i = pad_index(first + k, size, AXIS, SPEC)
        indices += (i,)
    return indices


@triton.jit
def pad_place(place, size, AXIS: tl.constexpr, SPEC: tl.constexpr):
    """Of ``pads_place``: the place read in place of ``place``, and its derivative by the coordinate given.

    The derivative is PyTorch's: 0 on the border itself, and the pixel next to a mirrored coordinate is the
    one that lies above it in the image.
    """
    i, t = place
    slope = tl.full(t.shape, 1.0, SPEC.compute)
    if padding_of(SPEC, AXIS) == REFLECTION:
        period = period_of(size, AXIS, SPEC)
        i = residue(i, period)
        mirrored = i >= size - SPEC.align_corners
        between = t > 0
        i = tl.where(mirrored, period - (1 - SPEC.align_corners) - i - between.to(tl.int32), i)
        t = tl.where(mirrored & between, 1.0 - t, t)
        slope = tl.where(mirrored, -1.0, slope)
    if pads_place(SPEC, AXIS):
        beyond = (i < 0) | (i >= size - 1)
        slope = tl.where(beyond | ((i == 0) & (t == 0)), 0.0, slope)
        t = tl.where(beyond, 0.0, t)
        i = tl.minimum(tl.maximum(i, 0), size - 1)
    return Place(i, t), slope
