"""Mild maps: three outputs along each axis hold all that read a pixel, wherever it is. For ``gather.py``.

A rotation is one, and what is not much enlarged. Where a pixel's outputs begin is then known from the inverse
alone, and their distances from whole numbers of 32 bits: nothing is counted and no lane waits for another.
``MATH.md`` has the proof.
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

# Fractional bits of where outputs begin, and of distances in pixels; these are told modulo 2^32, 64 pixels.
BEGIN_BITS = constant(22)
DISTANCE_BITS = constant(26)
DROPPED_BITS = constant(32 - 26)


class Mild(NamedTuple):
    """A map's inverse, in outputs. Where ``holds`` is false the rest means nothing.

    begins: along each axis where the three outputs of pixel (0, 0) begin. slopes: how far that moves for one
    pixel along x and y. spans: how far at least and at most it moves within a tile.
    """

    map: Any
    holds: Any
    begins: Any
    slopes: Any
    spans: Any


@triton.constexpr_function
def has_mild_way(spec):
    """Whether a kernel has a way of its own for mild maps."""
    linear = plain(spec.interpolation) == Interpolation.BILINEAR and plain(spec.dims) == 2
    return (
        linear
        and not plain(spec.antialias)
        and plain(goes_by_steps(spec))
        and not plain(has_copies(spec))
        and plain(spec.one_transform)
    )


@triton.jit
def is_within_edges(column, row, rows, sizes, SPEC: tl.constexpr):
    """Whether a tile of ``rows`` rows has no pixel that padding extends beyond the border."""
    within = tl.full([], 1, tl.int1)
    if extends_edges(SPEC, 0):
        within = within & (column > 0) & (sizes.input[0] - column > SPEC.columns)
    if extends_edges(SPEC, 1):
        within = within & (row > 0) & (sizes.input[1] - row > rows)
    return within


@triton.jit
def mild_map(map, bounds, sizes, SPEC: tl.constexpr):
    """The ``Mild`` of a map; ``bounds`` are those of all outputs (``bounds.image_bounds``)."""
    RADIUS: tl.constexpr = radius_of(SPEC)
    rows = map.rows
    inverse, reaches = affine_inverse(rows, [bound[2] + RADIUS for bound in bounds], sizes, SPEC)
    holds = map.fits
    begins = ()
    slopes = ()
    spans = ()
    widths = ()
    for k in tl.static_range(2):
        extent = (sizes.output[k] - 1).to(SPEC.compute)
        x = 0.5 * inverse[k][0]
        y = 0.5 * inverse[k][1]
        reach = 0.5 * reaches[k] + ((extent + 1.0) * ROUNDING + (SPEC.rows + SPEC.columns) * 2.0**-22)
        holds = holds & (reach < 1.5) & (sizes.output[k] >= 3)
        begins += (0.5 * extent - reach - (x * rows[0][2] + y * rows[1][2]),)
        slopes += ((x, y),)
        along_x = x * (SPEC.columns - 1)
        along_y = y * (SPEC.rows - 1)
        least = tl.where(x < 0, along_x, 0.0) + tl.where(y < 0, along_y, 0.0)
        most = tl.where(x > 0, along_x, 0.0) + tl.where(y > 0, along_y, 0.0)
        spans += ((least, most),)
        widths += (most - least + 7.0,)
        holds = holds & (widths[k] < 2.0**8)
    for r in tl.static_range(2):
        farthest = 0.0
        for k in tl.static_range(2):
            farthest += 2.0 * tl.abs(rows[r][k]) * widths[k]
        holds = holds & (farthest < 60.0)
    return Mild(map, holds, begins, slopes, spans)


@triton.jit
def tile_begins(mild, pixels, sizes, SPEC: tl.constexpr):
    """Where the outputs of a tile's first pixel begin, along each axis; whether any output reads the tile."""
    at = ()
    touches = mild.holds
    for k in tl.static_range(2):
        x = pixels.low[0].to(SPEC.compute)
        y = pixels.low[1].to(SPEC.compute)
        begin = mild.slopes[k][0] * x + (mild.slopes[k][1] * y + mild.begins[k])
        touches = touches & (begin + mild.spans[k][1] > -4.0)
        touches = touches & (begin + mild.spans[k][0] < sizes.output[k].to(SPEC.compute))
        at += (begin,)
    return at, touches


@triton.jit
def first_outputs(mild, at, pixels, sizes, SPEC: tl.constexpr):
    """Each lane's first output, and how far from its pixel the middle one of its nine is read."""
    dx = pixels.q[0] - pixels.low[0]
    dy = pixels.q[1] - pixels.low[1]
    anchor = ()
    further = ()
    first = ()
    for k in tl.static_range(2):
        whole = tl.floor(at[k])
        rest = ((at[k] - whole) * 2.0**BEGIN_BITS).to(tl.int32) + 2**BEGIN_BITS
        by_x = tl.floor(mild.slopes[k][0] * 2.0**BEGIN_BITS + 0.5).to(tl.int32)
        by_y = tl.floor(mild.slopes[k][1] * 2.0**BEGIN_BITS + 0.5).to(tl.int32)
        index = whole.to(tl.int32)
        steps = (rest + (by_x * dx + by_y * dy)) >> BEGIN_BITS
        anchor += (index + 1,)
        further += (tl.minimum(tl.maximum(steps, -index), sizes.output[k] - 3 - index),)
        first += (index + further[k],)
    u = doubled_pixels(anchor, sizes, SPEC)
    distances = ()
    for r in tl.static_range(2):
        x = mild.map.high[r][2] + (2 ** (DROPPED_BITS - 1) - (pixels.low[r].to(tl.int64) << 32))
        for k in tl.static_range(2):
            x += rounded_entry(mild.map, r, k) * u[k]
        distance = (x >> DROPPED_BITS).to(tl.int32) - ((pixels.q[r] - pixels.low[r]) << DISTANCE_BITS)
        for k in tl.static_range(2):
            entry = rounded_entry(mild.map, r, k) + 2 ** (DROPPED_BITS - 2)
            step = (entry >> (DROPPED_BITS - 1)).to(tl.int32)
            # modulo 2^32, which is no mistake where Triton looks for overflows
            distance = tl.add(distance, tl.mul(further[k], step, False), False)
        distances += (distance.to(SPEC.compute) * 2.0**-DISTANCE_BITS - 2.0 * mild.map.rows[r][1],)
    return first, distances


@triton.jit
def row_weights(mild, distances, SPEC: tl.constexpr):
    """The weights of a row of three outputs, the middle one read at ``distances``; and the next row's."""
    rows = mild.map.rows
    weights = ()
    for i in tl.static_range(3):
        weight = 1.0
        for r in tl.static_range(2):
            distance = distances[r]
            if i != 1:  # the compiler would add 0 times a number, as it may be infinite
                distance += rows[r][0] * (2.0 * (i - 1))
            weight *= clamp(1.0 - tl.abs(distance), 0.0, 1.0)
        weights += (weight,)
    return weights, (distances[0] + 2.0 * rows[0][1], distances[1] + 2.0 * rows[1][1])
