"""Candidates: which outputs can read a pixel, and with what weight each of them does. For ``gather.py``.

A map is bounded by ``bounds.preimage`` once for each copy of the image that padding shows (``copies``). What
is left out reads nothing; what is there for nothing has weight 0. ``MATH.md`` has the proofs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..modes import Interpolation
from ..spec import constant, plain
from . import footprints, sources
from .affine import affine_places, doubled_pixels, fixed_coordinate, fixed_place, rounded_entry
from .arithmetic import AFFINE, BILINEAR, INFINITY, PROJECTIVE, clamp, larger, smaller
from .bounds import preimage
from .copies import MOST_COPIES, appearance, copies_within, copy_number, has_copies, is_apart
from .interpolation import cubic_weight, radius_of, weight_of_pixel
from .padding import extends_edges, is_periodic

# The place of what is not there: no pixel of an image.
NOWHERE = constant(2**30)


class Pixels(NamedTuple):
    """A block of input pixels: each lane's, whether it exists, the first and last along each axis."""

    q: Any
    exists: Any
    low: Any
    high: Any


class Visits(NamedTuple):
    """The outputs that lanes visit, each on its own: its first along each axis, and how many of them.

    cost: how many in all, a float; infinite where lanes may not. distances: of ``weighs_by_distance``, how
    far from its pixel each lane's first output is read.
    """

    first: Any
    most: Any
    cost: Any
    distances: Any


class Candidates(NamedTuple):
    """The outputs that can read a tile.

    map: the transform's. bounds: of all outputs (``bounds.image_bounds``). ranges, copies: the copies of the
    image that are read (``copies.copies_within``). visits: where padding shows nothing again, the ``Visits``.
    cost: how many outputs a lane visits, a float; infinite without a bound.
    """

    map: Any
    bounds: Any
    ranges: Any
    copies: Any
    visits: Any
    cost: Any


@triton.jit
def map_places(map, out, sizes, SPEC: tl.constexpr):
    """Where outputs ``out`` are read by a map: the same numbers as the forward kernel's."""
    if SPEC.source == AFFINE:
        return affine_places(map, out, sizes, SPEC)
    else:
        coordinates = sources.matrix_coordinates(map, sources.normalised_pixels(out, sizes, SPEC), SPEC)
        return sources.places_by(coordinates, (), sizes, SPEC)


# --------------------------------------------------------------------------------------------- by pixel
@triton.jit
def visits_of(map, bounds, pixels, part, sizes, SPEC: tl.constexpr):
    """The ``Visits`` of the outputs that can read each pixel, or what padding shows at ``pixels``.

    part: the outputs that count, from the first of them along each axis to the one after the last.
    """
    RADIUS: tl.constexpr = radius_of(SPEC)
    center = ()
    radius = ()
    for axis in tl.static_range(SPEC.dims):
        q = pixels.q[axis].to(SPEC.compute)
        reach = bounds[axis][2] + RADIUS
        if extends_edges(SPEC, axis):  # all that lies beyond the border reads the border
            first = pixels.q[axis] == 0
            last = pixels.q[axis] == sizes.input[axis] - 1
            low = tl.where(first, smaller(q - reach, bounds[axis][0]), q - reach)
            high = tl.where(last, larger(q + reach, bounds[axis][1]), q + reach)
            q = 0.5 * (low + high)
            reach = 0.5 * (high - low)
        center += (q,)
        radius += (reach,)
    ranges = preimage(map, center, radius, sizes, SPEC)
    first = ()
    most = ()
    cost = 1.0
    for axis in tl.static_range(SPEC.dims):
        begin, last = ranges[axis]
        if SPEC.antialias:
            begin = tl.maximum(begin, part[0][axis])
            last = tl.minimum(last, part[1][axis] - 1)
        count = tl.where(pixels.exists, last - begin + 1, 0)
        count = tl.maximum(tl.max(tl.max(count, 1), 0), 0)
        most += (count,)
        cost *= count.to(SPEC.compute)
        # all of them outputs: one too many has weight 0
        first += (tl.maximum(tl.minimum(begin, part[1][axis] - count), part[0][axis]),)
    if SPEC.antialias and SPEC.source == PROJECTIVE:  # the grid is finer than any output's sub-samples
        cost = footprints.outputs_within(most)
    if goes_by_steps(SPEC):
        cost = tl.where(map.fits, cost, INFINITY)
    distances = ()
    if weighs_by_distance(SPEC):
        distances = distances_of(map, first, pixels, sizes, SPEC)
    return Visits(first, most, cost, distances)


@triton.jit
def whole(grid):
    """All outputs of a grid."""
    return (0, 0, 0), grid.output


@triton.jit
def shown_pixels(pixels, number, sizes, SPEC: tl.constexpr):
    """``pixels`` where copy ``number`` shows them, whole numbers; what belongs to another copy is nowhere."""
    shown = ()
    exists = pixels.exists
    for axis in tl.static_range(SPEC.dims):
        at = pixels.q[axis]
        if is_periodic(SPEC, axis):
            at, own = appearance(at, number[axis], sizes.input[axis], axis, SPEC)
            at = tl.where(own, at, NOWHERE)
            exists = exists & own
        shown += (at,)
    return Pixels(shown, exists, pixels.low, pixels.high)


@triton.jit
def shows_tile(pixels, number, bounds, sizes, SPEC: tl.constexpr):
    """Whether outputs may read the tile where copy ``number`` shows it."""
    RADIUS: tl.constexpr = radius_of(SPEC)
    shows = tl.full([], 1, tl.int1)
    for axis in tl.static_range(SPEC.dims):
        if is_periodic(SPEC, axis):
            near = (bounds[axis][0] - RADIUS, bounds[axis][1] + RADIUS)
            tile = (pixels.low[axis], pixels.high[axis])
            shows = shows & (is_apart(tile, number[axis], near, sizes.input[axis], axis, SPEC) == 0)
    return shows


@triton.jit
def map_and_bounds(params, n, t, sizes, SPEC: tl.constexpr):
    """The map of transform t of image n, and where all its outputs are read."""
    map = footprints.map_of(params, n, t, sizes, SPEC)
    first = [sizes.output[axis] * 0 for axis in SPEC.axes]
    last = [sizes.output[axis] - 1 for axis in SPEC.axes]
    return map, footprints.bounds_of(map, first, last, sizes, SPEC)


@triton.jit
def find_candidates(map, bounds, pixels, sizes, SPEC: tl.constexpr):
    """The ``Candidates`` of a block of pixels."""
    grid = footprints.grid_of(map, sizes, SPEC)
    visits = ()
    ranges = ()
    copies = 1
    if has_copies(SPEC):
        ranges, copies = copies_within(bounds, sizes, SPEC)
        cost = tl.full([], INFINITY, SPEC.compute)
        if copies <= MOST_COPIES:
            cost = tl.full([], 0.0, SPEC.compute)
            for i in range(copies.to(tl.int32)):
                number = copy_number(i, ranges, SPEC)
                if shows_tile(pixels, number, bounds, sizes, SPEC):
                    shown = shown_pixels(pixels, number, sizes, SPEC)
                    cost += visits_of(map, bounds, shown, whole(grid), grid, SPEC).cost
    else:
        visits = visits_of(map, bounds, pixels, whole(grid), grid, SPEC)
        cost = visits.cost
    return Candidates(map, bounds, ranges, copies, visits, cost)


# ---------------------------------------------------------------------------------- weights by distance
@triton.constexpr_function
def weighs_by_distance(spec):
    """Whether a weight is a function of how far from the pixel an output is read, and that goes by steps.

    So it is of affine maps, but for nearest samples, which jump, and under border padding.
    """
    clamped = any(plain(extends_edges(spec, axis)) for axis in range(plain(spec.dims)))
    return plain(goes_by_steps(spec)) and not clamped


@triton.constexpr_function
def goes_by_steps(spec):
    """Whether candidates' coordinates follow from the first one's by adding columns of a fixed-point map.

    Nearest samples jump: theirs are computed one by one, to the bit.
    """
    return plain(spec.fixed_point) and plain(spec.interpolation) != Interpolation.NEAREST


@triton.jit
def distances_of(map, first, pixels, sizes, SPEC: tl.constexpr):
    """How far from its pixel each lane's output ``first`` is read, along each axis.

    Exact for one output of the tile; from there to the others, entries rounded to 2^-32 are enough.
    """
    anchor = [tl.min(tl.min(first[k], 1), 0) for k in SPEC.axes]
    u = doubled_pixels(anchor, sizes, SPEC)
    distances = ()
    for r in tl.static_range(SPEC.dims):
        x = fixed_coordinate(map.high[r], map.low[r], u, SPEC.dims) - (pixels.low[r].to(tl.int64) << 32)
        x -= (pixels.q[r] - pixels.low[r]).to(tl.int64) << 32
        for k in tl.static_range(SPEC.dims):
            # not negative: half of the product is unsigned
            further = (2 * (first[k] - anchor[k])).to(tl.uint32)
            x += further.to(tl.int64) * rounded_entry(map, r, k)
        distances += (x.to(SPEC.compute) * 2.0**-32,)
    return distances


@triton.jit
def distance_weight(map, distances, further, SPEC: tl.constexpr):
    """The weight of the output that is ``further`` outputs from the one at ``distances``, along each axis."""
    weight = 1.0
    for r in tl.static_range(SPEC.dims):
        distance = 0.0
        for k in tl.static_range(SPEC.dims):
            distance += map.rows[r][k] * (2.0 * further[k])
        distance = tl.abs(distances[r] + distance)
        if SPEC.interpolation == BILINEAR:
            weight *= clamp(1.0 - distance, 0.0, 1.0)
        else:
            weight *= cubic_weight(distance)
    return weight


# ------------------------------------------------------------------------------------ pixel by pixel
@triton.jit
def coordinates_of_first(map, first, sizes, SPEC: tl.constexpr):
    """The fixed-point coordinates of each lane's output ``first``; nothing if it does not go by steps."""
    if goes_by_steps(SPEC) and not weighs_by_distance(SPEC):
        u = doubled_pixels(first, sizes, SPEC)
        return [fixed_coordinate(map.high[r], map.low[r], u, SPEC.dims) for r in SPEC.axes]
    else:
        return ()


@triton.jit
def candidate_places(map, start, further, SPEC: tl.constexpr):
    """The places of the output ``further`` outputs from each lane's first, whose coordinates start gives."""
    places = ()
    for r in tl.static_range(SPEC.dims):
        x = start[r]
        for k in tl.static_range(SPEC.dims):
            x += rounded_entry(map, r, k) * (2 * further[k])
        places += (fixed_place(x, SPEC),)
    return places


@triton.jit
def candidate_weight(map, visits, start, further, pixels, sizes, SPEC: tl.constexpr):
    """The weight with which the output ``further`` from the first reads what is shown at each pixel."""
    if weighs_by_distance(SPEC):
        return distance_weight(map, visits.distances, further, SPEC)
    else:
        if goes_by_steps(SPEC):
            places = candidate_places(map, start, further, SPEC)
        else:
            out = [visits.first[axis] + further[axis] for axis in SPEC.axes]
            places = map_places(map, out, sizes, SPEC)
        return weight_of_pixel(places, pixels.q, sizes, SPEC, True)
