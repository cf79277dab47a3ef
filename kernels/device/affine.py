"""Affine maps between pixels, in fixed point.

With u_k = 2 o_k - (W'_k - 1), whole numbers, output pixel o reads the coordinate

    x_r = sum over k of  A_rk u_k + C_r,    A_rk = theta_rk n_r / (2 e_k),    C_r = theta_r n_r / 2 + (W_r -
    1) / 2

on axis r, where n_r = W_r and e_k = W'_k, less 1 where corners are aligned. Coordinates are int64 with 32
fractional bits: the high word is the pixel, the low word the fraction. Entries have 27 bits more, in words of
their own, so that a coordinate is rounded once however large u is. ``MATH.md`` bounds the errors.

A flow displaces the map with theta = 1. Maps that leave the range of fixed point, and float64, go through
floats.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..modes import MOST_STEPS, Interpolation
from ..spec import Place, constant, plain
from .arithmetic import AFFINE, exact_fma
from .padding import is_periodic, place_of
from .tiles import pixels_from

# Coordinates that fixed point holds with room to spare are below this.
REACH = constant(2.0**30)
MIDDLE = constant(MOST_STEPS // 2)


class Map(NamedTuple):
    """An affine map from u to input pixels, one row for each axis of the input, (A_x, A_y[, A_z], C).

    A flow's rows are (A, C), along its own axis. rows: in the compute type. high, low: the same in fixed
    point, in units of 2^-32 (int64) and 2^-59 (int32, not negative); nothing without ``SPEC.fixed_point``.
    fits: whether fixed point holds all coordinates. samples: of a map from a grid of sub-samples, how many
    of them an output pixel has along each axis.
    """

    rows: Any
    high: Any
    low: Any
    fits: Any
    samples: Any


class Fixed(NamedTuple):
    """Fixed-point numbers, not yet rounded: int64 in units of 2^-32, and the rest in units of 2^-59."""

    high: Any
    low: Any


@triton.constexpr_function
def has_starts(spec):
    """Whether coordinates go from block to block by steps: in a volume, whose rows wrap, they do not."""
    return plain(spec.fixed_point) and plain(spec.dims) == 2


@triton.constexpr_function
def keeps_rests(spec):
    """Whether steps give the same bits as single pixels.

    Nearest samples jump, and the gather has to find them where the forward kernel took them.
    """
    return plain(spec.interpolation) == Interpolation.NEAREST


@triton.jit
def doubled(o, size):
    """2 o - (size - 1): twice the distance of pixel ``o`` from the middle of its axis."""
    return 2 * o - (size - 1)


@triton.jit
def steps_per_unit(sizes, axis: tl.constexpr, SPEC: tl.constexpr):
    """Twice the output's pixels in a normalised unit; at least 1, as a denominator."""
    samples = sizes.samples[axis]
    return tl.maximum(sizes.output[axis] - samples * SPEC.align_corners, samples)


@triton.jit
def reciprocal(e):
    """2^31 / e as the sum of two floats, good to 2^-45."""
    high = 1.0 / e
    rest = exact_fma(-high, e, 1.0)
    return high * 2.0**31, exact_fma(rest, rest, rest) * high * 2.0**31


@triton.jit
def product(a, b):
    """a b as the sum of two floats, exactly."""
    high = a * b
    return high, exact_fma(a, b, -high)


@triton.jit
def scaled(theta, n, e, inverse, OWN: tl.constexpr):
    """theta n / (2 e) in units of 2^-32 as the sum of two floats, from ``reciprocal``'s two for e.

    OWN: the entry is of the output's own axis; exact if sizes are equal, so that identities and shifts are.
    """
    high, low = product(theta, n)
    whole, rest = product(high, inverse[0])
    rest = exact_fma(low, inverse[0], exact_fma(high, inverse[1], rest))
    if OWN:
        whole = tl.where(n == e, theta * 2.0**31, whole)
        rest = tl.where(n == e, 0.0, rest)
    return whole, rest


@triton.jit
def fixed(a, b):
    """a + b, in units of 2^-32, as a whole number (int64) and what is left in units of 2^-59 (int32)."""
    down_a = tl.floor(a)
    down_b = tl.floor(b)
    rest = (a - down_a) + (b - down_b)
    return down_a.to(tl.int64) + down_b.to(tl.int64), (rest * 2.0**27).to(tl.int32)


@triton.jit
def fixed_if(fits, entry):
    """``fixed`` of a sum of two floats, 0 unless it fits: what does not fit an integer is not made one."""
    return fixed(tl.where(fits, entry[0], 0.0), tl.where(fits, entry[1], 0.0))


@triton.jit
def float_rows(theta, sizes, SPEC: tl.constexpr):
    """The rows of a map in the compute type, from a matrix given by rows in normalised units."""
    steps = [steps_per_unit(sizes, k, SPEC).to(SPEC.compute) for k in SPEC.axes]
    rows = ()
    for r in tl.static_range(SPEC.dims):
        n = (sizes.input[r] - SPEC.align_corners).to(SPEC.compute)
        row = [theta[r][k] * (n / steps[k]) * 0.5 for k in SPEC.axes]
        center = (sizes.input[r] - 1).to(SPEC.compute) * 0.5
        rows += (row + [tl.fma(theta[r][SPEC.dims], 0.5 * n, center)],)
    return rows


@triton.jit
def affine_map(theta, sizes, SPEC: tl.constexpr):
    """The ``Map`` of a matrix given by rows, in normalised units."""
    if not SPEC.fixed_point:
        return Map(float_rows(theta, sizes, SPEC), (), (), False, sizes.samples)
    else:
        steps = [steps_per_unit(sizes, k, SPEC).to(tl.float32) for k in SPEC.axes]
        inverses = [reciprocal(e) for e in steps]
        rows = ()
        entries = ()
        fits = True
        for r in tl.static_range(SPEC.dims):
            n = (sizes.input[r] - SPEC.align_corners).to(tl.float32)
            along = [scaled(theta[r][k], n, steps[k], inverses[k], r == k) for k in SPEC.axes]
            entries += (along + [product(theta[r][SPEC.dims], n * 2.0**31)],)
            row = [entry[0] * 2.0**-31 * 0.5 for entry in along]
            reach = 0.0
            for k in tl.static_range(SPEC.dims):
                reach += tl.abs(row[k]) * tl.maximum(sizes.output[k] - 1, 1).to(tl.float32)
            last = tl.fma(theta[r][SPEC.dims], 0.5 * n, (sizes.input[r] - 1).to(tl.float32) * 0.5)
            rows += (row + [last],)
            fits = (reach + tl.abs(last) < REACH) & fits
        if not fits:  # in units of 2^-32 an entry may have overflown that is finite
            rows = float_rows(theta, sizes, SPEC)
        high_rows = ()
        low_rows = ()
        for r in tl.static_range(SPEC.dims):
            row = [fixed_if(fits, entries[r][k]) for k in SPEC.axes]
            last = fixed_if(fits, entries[r][SPEC.dims])
            center = (sizes.input[r] - 1).to(tl.int64) << 31
            high_rows += ([entry[0] for entry in row] + [last[0] + center],)
            low_rows += ([entry[1] for entry in row] + [last[1]],)
        return Map(rows, high_rows, low_rows, fits, sizes.samples)


@triton.jit
def identity_map(sizes, SPEC: tl.constexpr):
    """The ``Map`` of theta = 1, along each axis alone."""
    rows = ()
    high_rows = ()
    low_rows = ()
    for r in tl.static_range(SPEC.dims):
        n = (sizes.input[r] - SPEC.align_corners).to(SPEC.compute)
        e = steps_per_unit(sizes, r, SPEC).to(SPEC.compute)
        if SPEC.fixed_point:
            whole, rest = scaled(e * 0.0 + 1.0, n, e, reciprocal(e), True)
            high, low = fixed(whole, rest)
            high_rows += ((high, (sizes.input[r] - 1).to(tl.int64) << 31),)
            low_rows += ((low, low * 0),)
        else:
            rows += ((n / e * 0.5, (sizes.input[r] - 1).to(SPEC.compute) * 0.5),)
    return Map(rows, high_rows, low_rows, True, sizes.samples)


# --------------------------------------------------------------------------------------- coordinates
@triton.jit
def fixed_sum(high, low, u, TERMS: tl.constexpr):
    """What u, TERMS whole numbers, add to a row's coordinate."""
    total = u[0].to(tl.int64) * high[0]
    rest = u[0].to(tl.int64) * low[0].to(tl.int64)
    for k in tl.static_range(1, TERMS):
        total += u[k].to(tl.int64) * high[k]
        rest += u[k].to(tl.int64) * low[k].to(tl.int64)
    return Fixed(total + (rest >> 27), (rest & (2**27 - 1)).to(tl.int32))


@triton.jit
def fixed_coordinate(high, low, u, TERMS: tl.constexpr):
    """A row's coordinate at ``u`` in units of 2^-32, rounded once."""
    at = fixed_sum(high, low, u, TERMS)
    return at.high + high[TERMS] + ((at.low + low[TERMS] + 2**26) >> 27)


@triton.jit
def float_coordinate(row, u, TERMS: tl.constexpr, SPEC: tl.constexpr):
    """A row's coordinate at ``u`` in the compute type; C, the largest term in a crop, is added last."""
    total = u[0].to(SPEC.compute) * row[0]
    for k in tl.static_range(1, TERMS):
        total = tl.fma(u[k].to(SPEC.compute), row[k], total)
    return total + row[TERMS]


@triton.jit
def rounded_entry(map, r: tl.constexpr, k: tl.constexpr):
    """An entry rounded to 2^-32."""
    return map.high[r][k] + ((map.low[r][k] + 2**26) >> 27).to(tl.int64)


@triton.jit
def fixed_place(x, SPEC: tl.constexpr):
    return Place((x >> 32).to(tl.int32), x.to(tl.uint32).to(SPEC.compute) * 2.0**-32)


@triton.jit
def doubled_pixels(out, sizes, SPEC: tl.constexpr):
    """u of the output pixels ``out``."""
    return [doubled(out[k], sizes.output[k]) for k in SPEC.axes]


@triton.jit
def fixed_places(map, out, sizes, SPEC: tl.constexpr):
    """Where the output pixels ``out`` are read, on each axis."""
    u = doubled_pixels(out, sizes, SPEC)
    return [fixed_place(fixed_coordinate(map.high[r], map.low[r], u, SPEC.dims), SPEC) for r in SPEC.axes]


@triton.jit
def float_places(map, out, sizes, SPEC: tl.constexpr):
    """``fixed_places`` for any map."""
    u = doubled_pixels(out, sizes, SPEC)
    found = [float_coordinate(row, u, SPEC.dims, SPEC) for row in map.rows]
    return [place_of(found[r], sizes.input[r], r, SPEC) for r in SPEC.axes]


@triton.jit
def affine_places(map, out, sizes, SPEC: tl.constexpr):
    """Where the output pixels ``out`` are read, on each axis."""
    if not SPEC.fixed_point:
        return float_places(map, out, sizes, SPEC)
    else:
        if map.fits:
            places = fixed_places(map, out, sizes, SPEC)
        else:
            places = float_places(map, out, sizes, SPEC)
        return places


# -------------------------------------------------------------------------------- block after block
@triton.jit
def start_and_growth(high, low, u, own, TERMS: tl.constexpr, SPEC: tl.constexpr):
    """A row's coordinate at ``u``, the first block's, and what it grows by to the next block, as ``Fixed``.

    own: high and low of the entry by y. What growth is rounded by adds up; the start is moved so that it is 0
    in the middle, and nowhere more than 6 x 2^-33.
    """
    rest = own[1].to(tl.int64) * (2 * SPEC.rows)
    grown = own[0] * (2 * SPEC.rows)
    if not keeps_rests(SPEC):
        rest += 2**26
    growth_rest = (rest & (2**27 - 1)).to(tl.int32)
    start = fixed_sum(high, low, u, TERMS)
    start_rest = start.low + low[TERMS] + 2**26
    if not keeps_rests(SPEC):
        start_rest += (growth_rest - 2**26) * MIDDLE
    start = Fixed(start.high + high[TERMS] + (start_rest >> 27), start_rest & (2**27 - 1))
    return start, Fixed(grown + (rest >> 27), growth_rest)


@triton.jit
def starts_of(map, column, row, numbers, sizes, SPEC: tl.constexpr):
    """``start_and_growth`` of each axis; nothing where coordinates do not go by steps."""
    starts = ()
    if has_starts(SPEC):
        out, _ = pixels_from(column, row, sizes.output, numbers, SPEC.columns, SPEC)
        # of pixels' first sub-samples
        u = [doubled(out[k] * map.samples[k], sizes.output[k] * map.samples[k]) for k in SPEC.axes]
        for r in tl.static_range(2):
            high = map.high[r]
            low = map.low[r]
            if SPEC.source == AFFINE:
                own = (high[1] * map.samples[1], low[1] * map.samples[1])
                starts += (start_and_growth(high, low, u, own, 2, SPEC),)
            else:  # a flow's x does not depend on y
                own = (high[0] * r, low[0] * r)
                starts += (start_and_growth(high, low, (u[r],), own, 1, SPEC),)
    return starts


@triton.jit
def moved_starts(starts, map, by, SPEC: tl.constexpr):
    """``starts`` moved by so many pixels of the map's grid, scalars: still rounded once."""
    moved = ()
    if has_starts(SPEC):
        for r in tl.static_range(2):
            start, growth = starts[r]
            further = fixed_sum(map.high[r], map.low[r], (2 * by[0], 2 * by[1]), 2)
            rest = start[1] + further.low
            moved += ((Fixed(start[0] + further.high + (rest >> 27), rest & (2**27 - 1)), growth),)
    return moved


@triton.jit
def stepped_coordinate(start, growth, step, SPEC: tl.constexpr):
    """The coordinate ``step`` blocks after ``start``, in units of 2^-32."""
    x = start[0] + growth[0] * step
    if keeps_rests(SPEC):
        x += ((start[1] + growth[1] * step).to(tl.uint32) >> 27).to(tl.int64)
    return x


@triton.jit
def stepped_places(starts, step, SPEC: tl.constexpr):
    """The places of the block that is ``step`` blocks below ``starts``, MOST_STEPS at most."""
    return [fixed_place(stepped_coordinate(along[0], along[1], step, SPEC), SPEC) for along in starts]


@triton.jit
def block_places(map, starts, step, out, sizes, SPEC: tl.constexpr, INTERIOR: tl.constexpr):
    """``affine_places`` of the block ``step`` blocks below ``starts``, whose pixels are ``out``.

    INTERIOR: fixed point holds them.
    """
    if not has_starts(SPEC):
        return affine_places(map, out, sizes, SPEC)
    elif INTERIOR:
        return stepped_places(starts, step, SPEC)
    else:
        if map.fits:
            places = stepped_places(starts, step, SPEC)
        else:
            places = float_places(map, out, sizes, SPEC)
        return places


# -------------------------------------------------------------------------------------------- flows
@triton.jit
def identity_places(map, out, sizes, SPEC: tl.constexpr):
    """Where the output's identity grid lies in the input, on each axis."""
    places = ()
    for r in tl.static_range(SPEC.dims):
        u = (doubled(out[r], sizes.output[r]),)
        if SPEC.fixed_point:
            places += (fixed_place(fixed_coordinate(map.high[r], map.low[r], u, 1), SPEC),)
        else:
            places += (place_of(float_coordinate(map.rows[r], u, 1, SPEC), sizes.input[r], r, SPEC),)
    return places


@triton.jit
def displaced(place, by, size, AXIS: tl.constexpr, SPEC: tl.constexpr):
    """``place`` moved by a float number of pixels: whole numbers and fractions are added apart."""
    move = place_of(by, size, AXIS, SPEC)
    fraction = place[1] + move.fraction
    # a fraction of 1 is a number just below 0, and stays so if nothing is added to it
    carry = (fraction >= 1.0) & (place[1] > 0.0)
    index = place[0] + move.index + carry.to(tl.int32)
    fraction = tl.where(carry, fraction - 1.0, fraction)
    if is_periodic(SPEC, AXIS):  # elsewhere NaN and infinities have gone far beyond the image
        finite = tl.abs(by) < float("inf")
        index = tl.where(finite, index, move.index)
        fraction = tl.where(finite, fraction, move.fraction)
    return Place(index, fraction)
