"""Bounds on an affine map or a homography, in both directions and against rounding.

``image_bounds``: where in the input a box of outputs is read. ``preimage``: which outputs can read a box of
the input. Both err on the large side only: an output that reads a box is never left out, whatever float32
did to its coordinates, and what cannot be told apart from a singular map or a horizon has infinite bounds.
NaN and infinities in the matrix do too. ``kernels/README.md`` has the proof.
"""

import triton
import triton.language as tl

from .coordinates import constant, larger, smaller, unnormalise_grad
from .sources import PROJECTIVE

# Sixteen roundings of float32: more than any coordinate or bound below goes through. float64 has fewer.
ROUNDING = constant(2.0**-19)
# A determinant below this part of its terms counts as 0, and so does a homography's denominator.
SINGULAR = constant(2.0**-12)
# Rows between these sizes have minors that neither overflow nor, but for what does not matter, underflow.
LEAST = constant(2.0**-40)
MOST = constant(2.0**40)
INFINITY = constant(float("inf"))


@triton.jit
def row_interval(row, low, high, DIMS: tl.constexpr):
    """Middle and radius of row (x, y[, z], 1) over a box, and the sum of its terms' largest sizes.

    A NaN or an infinity anywhere makes at least one of the three such (a minimum would hide it).
    """
    middle = row[DIMS]
    radius = 0.0
    size = tl.abs(row[DIMS])
    for j in tl.static_range(DIMS):
        middle += row[j] * (0.5 * (low[j] + high[j]))
        radius += tl.abs(row[j]) * (0.5 * (high[j] - low[j]))
        size += tl.abs(row[j])
    return middle, radius, size


@triton.jit
def image_bounds(
    rows,
    low,
    high,
    in_size,
    SOURCE: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """For each axis (lower bound, upper bound, error) of the pixel coordinates of the outputs in a box.

    ``low``, ``high``: the box's normalised corners, within [-1, 1]. The error is that of a coordinate, in
    pixels; the bounds include it.
    """
    if SOURCE == PROJECTIVE:
        w, w_radius, w_size = row_interval(rows[2], low, high, DIMS)
        sign = tl.where(w < 0, -1.0, 1.0)
        nearest = w * sign - w_radius - ROUNDING * w_size
        farthest = w * sign + w_radius + ROUNDING * w_size
        seen = (nearest > 2.0**-10 * w_size) & (nearest > 1e-30)
        nearest = tl.where(seen, nearest, 1.0)
    bounds = ()
    for axis in tl.static_range(DIMS):
        middle, radius, size = row_interval(rows[axis], low, high, DIMS)
        if SOURCE == PROJECTIVE:
            first = middle * sign - radius
            last = middle * sign + radius
            first = first / tl.where(first > 0, farthest, nearest)
            last = last / tl.where(last > 0, nearest, farthest)
            error = ROUNDING * (size / nearest) * (1.0 + w_size / nearest)
        else:
            first = middle - radius
            last = middle + radius
            error = ROUNDING * size
        scale = unnormalise_grad(in_size[axis], ALIGN_CORNERS, COMPUTE)
        center = (in_size[axis] - 1).to(COMPUTE) * 0.5
        error = error * scale + ROUNDING * in_size[axis].to(COMPUTE)
        first = first * scale + center - error
        last = last * scale + center + error
        sure = error < INFINITY
        told = tl.abs(first) + tl.abs(last) + error < INFINITY
        if SOURCE == PROJECTIVE:
            sure = sure & seen
            told = told & seen
        bounds += (
            (
                tl.where(told, first, -INFINITY),
                tl.where(told, last, INFINITY),
                tl.where(sure, error, INFINITY),
            ),
        )
    return bounds


@triton.jit
def minor(a, b, c, d):
    """a d - b c, and the size of its terms."""
    return a * d - b * c, tl.abs(a * d) + tl.abs(b * c)


@triton.jit
def adjugate_column(p, q):
    """A column of a 3 x 3 adjugate, the cross product of two rows, and the sizes of its terms."""
    return (
        minor(p[1], p[2], q[1], q[2]),
        minor(p[2], p[0], q[2], q[0]),
        minor(p[0], p[1], q[0], q[1]),
    )


@triton.jit
def adjugate(rows):
    """The adjugate's rows of (entry, size of its terms), the determinant and the size of its terms."""
    x = adjugate_column(rows[1], rows[2])
    y = adjugate_column(rows[2], rows[0])
    z = adjugate_column(rows[0], rows[1])
    determinant = rows[0][0] * x[0][0] + (rows[0][1] * x[1][0] + rows[0][2] * x[2][0])
    size = tl.abs(rows[0][0]) * x[0][1] + (tl.abs(rows[0][1]) * x[1][1] + tl.abs(rows[0][2]) * x[2][1])
    return ((x[0], y[0], z[0]), (x[1], y[1], z[1]), (x[2], y[2], z[2])), determinant, size


@triton.jit
def is_regular(rows, determinant, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether an inverse by minors has the digits that the bounds below count on; not with a NaN."""
    regular = (tl.abs(determinant) > SINGULAR * size) & (size > 2.0**-90)
    for r in tl.static_range(ROWS):
        largest = tl.abs(rows[r][0])
        for j in tl.static_range(1, COLUMNS):
            largest = larger(largest, tl.abs(rows[r][j]))
        regular = regular & (largest > LEAST) & (largest < MOST)
    return regular


@triton.jit
def affine_preimage(rows, center, radius, DIMS: tl.constexpr):
    """For each axis the lower and upper normalised coordinate of the outputs that can be read in a box."""
    if DIMS == 3:
        entries, determinant, size = adjugate(rows)
    else:
        a = rows[0][0]
        b = rows[0][1]
        c = rows[1][0]
        d = rows[1][1]
        determinant, size = minor(a, b, c, d)
        entries = (((d, tl.abs(d)), (-b, tl.abs(b))), ((-c, tl.abs(c)), (a, tl.abs(a))))
    regular = is_regular(rows, determinant, size, DIMS, DIMS)
    inverse = 1.0 / tl.where(regular, determinant, 1.0)
    slack = ()  # for the minors' roundings; the determinant's scales all bounds alike
    for j in tl.static_range(DIMS):
        # no output reads farther from the last entry than the others and the radius reach
        distance = 2.0 * (radius[j] + tl.abs(rows[j][DIMS]))
        for k in tl.static_range(DIMS):
            distance += tl.abs(rows[j][k])
        slack += (ROUNDING * distance,)
    bounds = ()
    for i in tl.static_range(DIMS):
        middle = 0.0
        reach = 0.0
        for j in tl.static_range(DIMS):
            entry = entries[i][j][0] * inverse
            middle += entry * (center[j] - rows[j][DIMS])
            reach += tl.abs(entry) * radius[j] + entries[i][j][1] * tl.abs(inverse) * slack[j]
        reach = tl.where(regular, reach, INFINITY)
        bounds += ((middle - reach, middle + reach),)
    return bounds


@triton.jit
def projective_corner(entries, x, y):
    """What a homography sends to (x, y), with errors; the denominator, and whether its sign is known."""
    w = entries[2][0][0] * x + (entries[2][1][0] * y + entries[2][2][0])
    w_error = ROUNDING * (entries[2][0][1] * tl.abs(x) + (entries[2][1][1] * tl.abs(y) + entries[2][2][1]))
    known = tl.abs(w) > 4.0 * w_error
    inverse = 1.0 / tl.where(known, w, 1.0)
    places = ()
    for i in tl.static_range(2):
        place = (entries[i][0][0] * x + (entries[i][1][0] * y + entries[i][2][0])) * inverse
        error = entries[i][0][1] * tl.abs(x) + (entries[i][1][1] * tl.abs(y) + entries[i][2][1])
        error = 4.0 * tl.abs(inverse) * (ROUNDING * error + (1.0 + tl.abs(place)) * w_error)
        places += ((place, error),)
    return places, w, known


@triton.jit
def projective_preimage(rows, center, radius):
    """As ``affine_preimage``: a box that the horizon does not cut comes from a quadrangle."""
    entries, determinant, size = adjugate(rows)
    regular = is_regular(rows, determinant, size, 3, 3)
    places, w, known = projective_corner(entries, center[0] - radius[0], center[1] - radius[1])
    bounds = ()
    for i in tl.static_range(2):
        bounds += ((places[i][0] - places[i][1], places[i][0] + places[i][1]),)
    for corner in tl.static_range(1, 4):
        x = center[0] + radius[0] * (2.0 * (corner % 2) - 1.0)
        y = center[1] + radius[1] * (2.0 * (corner // 2) - 1.0)
        places, other, sure = projective_corner(entries, x, y)
        known = known & sure & ((w > 0) == (other > 0))
        wider = ()
        for i in tl.static_range(2):
            wider += (
                (
                    smaller(bounds[i][0], places[i][0] - places[i][1]),
                    larger(bounds[i][1], places[i][0] + places[i][1]),
                ),
            )
        bounds = wider
    told = ()
    for i in tl.static_range(2):
        first = tl.where(known, bounds[i][0], -INFINITY)
        last = tl.where(known, bounds[i][1], INFINITY)
        told += ((tl.where(regular, first, -INFINITY), tl.where(regular, last, INFINITY)),)
    return told


@triton.jit
def preimage(
    rows,
    center,
    radius,
    out_size,
    SOURCE: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """For each axis the first and the last output pixel, int32, that can be read in a box of the input.

    ``center``, ``radius``: the box's, normalised. The first is past the last where there is none.
    """
    if SOURCE == PROJECTIVE:
        bounds = projective_preimage(rows, center, radius)
    else:
        bounds = affine_preimage(rows, center, radius, DIMS)
    pixels = ()
    for axis in tl.static_range(DIMS):
        extent = (out_size[axis] - 1).to(COMPUTE)
        half = tl.maximum(out_size[axis] - ALIGN_CORNERS, 1).to(COMPUTE) * 0.5
        error = ROUNDING * (extent + 1.0)
        first = bounds[axis][0] * half + (0.5 * extent - error)
        last = bounds[axis][1] * half + (0.5 * extent + error)
        # of NaN and a number both functions take the number: NaN widens the range
        first = tl.ceil(smaller(larger(first, 0.0), extent + 1.0))
        last = tl.floor(larger(smaller(last, extent), -1.0))
        pixels += ((first.to(tl.int32), last.to(tl.int32)),)
    return pixels
