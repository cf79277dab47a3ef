"""Mild maps: three outputs along each axis hold all that read a pixel, wherever it is. For ``gather.py``.

A rotation is one, and what is not much enlarged; of volumes rotations about an axis, and small ones. Where a
pixel's outputs begin is then known from the inverse alone, and their distances from whole numbers of 32 bits:
nothing is counted and no lane waits for another. ``MATH.md`` has the proof.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..modes import Interpolation
from ..spec import constant, plain
from .affine import doubled_pixels, rounded_entry
from .arithmetic import clamp
from .bounds import ROUNDING, affine_inverse
from .candidates import goes_by_steps
from .copies import has_copies
from .interpolation import radius_of
from .padding import extends_edges
from .tiles import box_of

# Fractional bits of where outputs begin, and of distances in pixels; these are told modulo 2^32, 64 pixels.
BEGIN_BITS = constant(22)
DISTANCE_BITS = constant(26)
DROPPED_BITS = constant(32 - 26)


class Mild(NamedTuple):
    """A map's inverse, in outputs. Where ``holds`` is false the rest means nothing.

    begins: along each axis where the three outputs of pixel (0, 0[, 0]) begin. widths: how far they can lie
    from there. slopes: how far that moves for one pixel along each axis. spans: how far at least and at most
    it moves within a tile of one slice.
    """

    map: Any
    holds: Any
    begins: Any
    widths: Any
    slopes: Any
    spans: Any


class Nearby(NamedTuple):
    """The outputs that lanes visit: three; along y and z of a volume two, if no lane has more.

    first: each lane's first. counts: how many there are, along each axis. distances: how far from its pixel
    the second along x, first along y and z, is read.
    """

    first: Any
    counts: Any
    distances: Any


@triton.constexpr_function
def has_mild_way(spec):
    """Whether a kernel has a way of its own for mild maps."""
    return (
        plain(spec.interpolation) == Interpolation.BILINEAR
        and not plain(spec.antialias)
        and plain(goes_by_steps(spec))
        and not plain(has_copies(spec))
        and plain(spec.one_transform)
    )


@triton.jit
def mild_map(map, bounds, sizes, SPEC: tl.constexpr):
    """The ``Mild`` of a map; ``bounds`` are those of all outputs (``bounds.image_bounds``)."""
    RADIUS: tl.constexpr = radius_of(SPEC)
    rows = map.rows
    inverse, reaches = affine_inverse(rows, [bound[2] + RADIUS for bound in bounds], sizes, SPEC)
    holds = map.fits
    begins = ()
    widths = ()
    slopes = ()
    spans = ()
    moves = ()
    for k in tl.static_range(SPEC.dims):
        extent = (sizes.output[k] - 1).to(SPEC.compute)
        slope = [0.5 * entry for entry in inverse[k]]
        reach = 0.5 * reaches[k] + ((extent + 1.0) * ROUNDING + (SPEC.rows + SPEC.columns) * 2.0**-22)
        holds = holds & (reach < 1.5) & (sizes.output[k] >= 3)
        moved = slope[0] * rows[0][SPEC.dims]
        for j in tl.static_range(1, SPEC.dims):
            moved += slope[j] * rows[j][SPEC.dims]
        begins += (0.5 * extent - reach - moved,)
        widths += (2.0 * reach,)
        slopes += (slope,)
        along_x = slope[0] * (SPEC.columns - 1)
        along_y = slope[1] * (SPEC.rows - 1)
        least = tl.where(along_x < 0, along_x, 0.0) + tl.where(along_y < 0, along_y, 0.0)
        most = tl.where(along_x > 0, along_x, 0.0) + tl.where(along_y > 0, along_y, 0.0)
        spans += ((least, most),)
        moves += (most - least + 7.0,)
        holds = holds & (moves[k] < 2.0**8)
    for r in tl.static_range(SPEC.dims):
        farthest = 0.0
        for k in tl.static_range(SPEC.dims):
            farthest += 2.0 * tl.abs(rows[r][k]) * moves[k]
        holds = holds & (farthest < 60.0)
    return Mild(map, holds, begins, widths, slopes, spans)


@triton.jit
def is_mild(mild, column, row, sizes, SPEC: tl.constexpr):
    """Whether the mild way takes the block of pixels at ``column`` and ``row``.

    It must lie in one slice of a volume, and no pixel where padding extends the border: it has more outputs.
    """
    takes = mild.holds
    first, last = box_of(column, row, SPEC.columns, SPEC.rows, sizes.input, SPEC)
    if SPEC.dims == 3:
        takes = takes & (first[2] == last[2])
    for axis in tl.static_range(SPEC.dims):
        if extends_edges(SPEC, axis):
            takes = takes & (first[axis] > 0) & (last[axis] < sizes.input[axis] - 1)
    return takes


@triton.jit
def tile_begins(mild, pixels, sizes, SPEC: tl.constexpr):
    """Where the outputs of a tile's first pixel begin, along each axis; whether any output reads the tile."""
    at = ()
    touches = mild.holds
    for k in tl.static_range(SPEC.dims):
        begin = mild.begins[k]
        for j in tl.static_range(SPEC.dims - 1, -1, -1):
            begin += mild.slopes[k][j] * pixels.low[j].to(SPEC.compute)
        touches = touches & (begin + mild.spans[k][1] > -4.0)
        touches = touches & (begin + mild.spans[k][0] < sizes.output[k].to(SPEC.compute))
        at += (begin,)
    return at, touches


@triton.jit
def nearby_outputs(mild, at, pixels, sizes, SPEC: tl.constexpr):
    """The ``Nearby`` outputs of a block of pixels, of whose first one they begin ``at``."""
    within = (pixels.q[0] - pixels.low[0], pixels.q[1] - pixels.low[1], 0)
    anchor = ()
    further = ()
    first = ()
    counts = ()
    for k in tl.static_range(SPEC.dims):
        whole = tl.floor(at[k])
        begin = ((at[k] - whole) * 2.0**BEGIN_BITS).to(tl.int32) + 2**BEGIN_BITS
        move = within[0] * 0
        for j in tl.static_range(2):
            move += tl.floor(mild.slopes[k][j] * 2.0**BEGIN_BITS + 0.5).to(tl.int32) * within[j]
        begin += move
        count = tl.minimum(sizes.output[k], 3)  # 3, which the compiler would unroll
        if SPEC.dims == 3 and k > 0:
            end = (begin & (2**BEGIN_BITS - 1)) + (mild.widths[k] * 2.0**BEGIN_BITS).to(tl.int32) + 1
            count = tl.minimum(tl.max(tl.max(end >> BEGIN_BITS, 1), 0), count)
        counts += (count,)
        index = whole.to(tl.int32)
        anchor += (index + 1,)
        further += (tl.minimum(tl.maximum(begin >> BEGIN_BITS, -index), sizes.output[k] - count - index),)
        first += (index + further[k],)
    u = doubled_pixels(anchor, sizes, SPEC)
    distances = ()
    for r in tl.static_range(SPEC.dims):
        x = mild.map.high[r][SPEC.dims] + (2 ** (DROPPED_BITS - 1) - (pixels.low[r].to(tl.int64) << 32))
        for k in tl.static_range(SPEC.dims):
            x += rounded_entry(mild.map, r, k) * u[k]
        distance = (x >> DROPPED_BITS).to(tl.int32) - (within[r] << DISTANCE_BITS)
        for k in tl.static_range(SPEC.dims):
            entry = rounded_entry(mild.map, r, k) + 2 ** (DROPPED_BITS - 2)
            step = (entry >> (DROPPED_BITS - 1)).to(tl.int32)
            # modulo 2^32, which is no mistake where Triton looks for overflows
            distance = tl.add(distance, tl.mul(further[k], step, False), False)
        # so far of the middle one: from there to the first row and slice
        back = mild.map.rows[r][1]
        if SPEC.dims == 3:
            back += mild.map.rows[r][2]
        distances += (distance.to(SPEC.compute) * 2.0**-DISTANCE_BITS - 2.0 * back,)
    return Nearby(first, counts, distances)


@triton.jit
def next_distances(mild, distances, axis: tl.constexpr, SPEC: tl.constexpr):
    """``distances`` of the next outputs along an axis."""
    return [distances[r] + 2.0 * mild.map.rows[r][axis] for r in SPEC.axes]


@triton.jit
def row_weights(mild, distances, SPEC: tl.constexpr):
    """The weights of a row of three outputs, the middle one read at ``distances``."""
    weights = ()
    for i in tl.static_range(3):
        weight = 1.0
        for r in tl.static_range(SPEC.dims):
            distance = distances[r]
            if i != 1:  # the compiler would add 0 times a number, as it may be infinite
                distance += mild.map.rows[r][0] * (2.0 * (i - 1))
            weight *= clamp(1.0 - tl.abs(distance), 0.0, 1.0)
        weights += (weight,)
    return weights
