"""Where the outputs of a matrix read, and which outputs read a pixel: bounds that hold against rounding.

``image_bounds`` is forward, from a box of outputs to the input; ``preimage`` is back, from a box of the input
to outputs. Both err on the large side only: an output that reads a box is never left out, whatever float32
did to its coordinates, and what cannot be told apart from a singular map or a horizon has infinite bounds.
NaN and infinities in the matrix do too. ``is_interior`` tells whether a block of outputs reads nothing
outside the image. ``MATH.md`` has the proofs.

Outputs are counted in the units that the source's map takes: whole numbers u of an affine one
(``affine.doubled``), normalised coordinates of a homography.
"""

import triton
import triton.language as tl

from ..modes import INVERTIBLE, Interpolation
from ..spec import constant, plain
from .affine import doubled, steps_per_unit
from .arithmetic import INFINITY, PROJECTIVE, larger, smaller
from .interpolation import tap_count
from .sources import normalised, pixels_per_unit
from .tiles import box_of, row_count

# Sixteen roundings of float32: more than any coordinate or bound below goes through. float64 has fewer.
ROUNDING = constant(2.0**-19)
# A determinant below this part of its terms counts as 0, and so does a homography's denominator.
SINGULAR = constant(2.0**-12)
# Rows between these sizes have minors that neither overflow nor, but for what does not matter, underflow.
LEAST = constant(2.0**-40)
MOST = constant(2.0**40)


@triton.jit
def rows_of(map, SPEC: tl.constexpr):
    """The rows of a source's map, in the units it takes."""
    if SPEC.source == PROJECTIVE:
        return map
    else:
        return map.rows


@triton.jit
def map_units(o, sizes, axis: tl.constexpr, SPEC: tl.constexpr):
    """Output pixel ``o`` in the units that the map takes."""
    if SPEC.source == PROJECTIVE:
        return normalised(o, sizes, axis, SPEC)
    else:
        return doubled(o, sizes.output[axis]).to(SPEC.compute)


@triton.jit
def largest_unit(size, SPEC: tl.constexpr):
    """The largest size of ``map_units``."""
    if SPEC.source == PROJECTIVE:
        return 2.0 if SPEC.antialias else 1.0  # half a pixel beyond the centres of two
    else:
        return (size - 1).to(SPEC.compute)


@triton.jit
def box_in_units(first, last, sizes, SPEC: tl.constexpr):
    """The corners of a box of output pixels in the units that the map takes."""
    low = [map_units(first[axis], sizes, axis, SPEC) for axis in SPEC.axes]
    return low, [map_units(last[axis], sizes, axis, SPEC) for axis in SPEC.axes]


@triton.jit
def row_interval(row, low, high, sizes, SPEC: tl.constexpr):
    """Middle and radius of a row over a box, and the sum of its terms' largest sizes.

    A NaN or an infinity anywhere makes at least one of the three such (a minimum would hide it).
    """
    middle = row[SPEC.dims]
    radius = 0.0
    size = tl.abs(row[SPEC.dims])
    for j in tl.static_range(SPEC.dims):
        middle += row[j] * (0.5 * (low[j] + high[j]))
        radius += tl.abs(row[j]) * (0.5 * (high[j] - low[j]))
        size += tl.abs(row[j]) * largest_unit(sizes.output[j], SPEC)
    return middle, radius, size


@triton.jit
def image_bounds(map, low, high, sizes, SPEC: tl.constexpr):
    """For each axis (lower bound, upper bound, error) of the pixel coordinates of the outputs in a box.

    ``low``, ``high``: the box's corners, in the map's units. The error is that of a coordinate, in pixels;
    the bounds include it.
    """
    rows = rows_of(map, SPEC)
    if SPEC.source == PROJECTIVE:
        w, w_radius, w_size = row_interval(rows[2], low, high, sizes, SPEC)
        sign = tl.where(w < 0, -1.0, 1.0)
        nearest = w * sign - w_radius - w_size * ROUNDING
        farthest = w * sign + w_radius + w_size * ROUNDING
        seen = (nearest > w_size * 2.0**-10) & (nearest > 1e-30)
        nearest = tl.where(seen, nearest, 1.0)
    bounds = ()
    for axis in tl.static_range(SPEC.dims):
        middle, radius, size = row_interval(rows[axis], low, high, sizes, SPEC)
        if SPEC.source == PROJECTIVE:
            first = middle * sign - radius
            last = middle * sign + radius
            first = first / tl.where(first > 0, farthest, nearest)
            last = last / tl.where(last > 0, nearest, farthest)
            scale = pixels_per_unit(sizes.input[axis], SPEC)
            center = (sizes.input[axis] - 1).to(SPEC.compute) * 0.5
            error = (size / nearest) * (1.0 + w_size / nearest) * scale * ROUNDING
            first = first * scale + center
            last = last * scale + center
        else:
            first = middle - radius
            last = middle + radius
            error = size * ROUNDING
        error += sizes.input[axis].to(SPEC.compute) * ROUNDING
        first -= error
        last += error
        sure = error < INFINITY
        told = tl.abs(first) + tl.abs(last) + error < INFINITY
        if SPEC.source == PROJECTIVE:
            sure = sure & seen
            told = told & seen
        low_end = tl.where(told, first, -INFINITY)
        high_end = tl.where(told, last, INFINITY)
        bounds += ((low_end, high_end, tl.where(sure, error, INFINITY)),)
    return bounds


# ---------------------------------------------------------------------------------- inside the image
@triton.constexpr_function
def has_interior_path(spec):
    """Whether a kernel has a second path for blocks that read nothing outside the image.

    Of matrices that is known in advance. Of 64 taps two paths would be a large program, as they would be of
    sub-samples, and float64 is bound by its arithmetic.
    """
    matrix = plain(spec.source) in INVERTIBLE and not plain(spec.antialias)
    return matrix and plain(tap_count(spec)) ** plain(spec.dims) <= 16 and plain(spec.compute) == tl.float32


@triton.constexpr_function
def tap_margins(spec):
    """All taps of x lie in the image if the first < x < size - the second, whole numbers."""
    return (1, 2) if plain(spec.interpolation) == Interpolation.BICUBIC else (0, 1)


@triton.jit
def is_interior(map, column, row, rows, sizes, SPEC: tl.constexpr):
    """Whether all pixels of a tile of ``rows`` rows exist, and all their taps lie in the image.

    The bounds hold for the coordinates as they are computed. False if in doubt, as with NaN.
    """
    first, last = box_of(column, row, SPEC.columns, rows, sizes.output, SPEC)
    interior = sizes.output[0] - column >= SPEC.columns
    interior = interior & (row_count(sizes.output, row, SPEC) - row >= rows)
    MARGINS: tl.constexpr = tap_margins(SPEC)
    low, high = box_in_units(first, last, sizes, SPEC)
    bounds = image_bounds(map, low, high, sizes, SPEC)
    for axis in tl.static_range(SPEC.dims):
        size = sizes.input[axis]
        above = (size - MARGINS[1]).to(SPEC.compute)
        interior = interior & (bounds[axis][0] > MARGINS[0]) & (bounds[axis][1] < above)
        if not SPEC.fixed_point:
            interior = interior & (size <= 2**24)  # a float is then any pixel's number
    if SPEC.fixed_point:
        interior = interior & map.fits
    return interior


# ------------------------------------------------------------------------------------------ back
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
    regular = (tl.abs(determinant) > size * SINGULAR) & (size > 2.0**-90)
    for r in tl.static_range(ROWS):
        largest = tl.abs(rows[r][0])
        for j in tl.static_range(1, COLUMNS):
            largest = larger(largest, tl.abs(rows[r][j]))
        regular = regular & (largest > LEAST) & (largest < MOST)
    return regular


@triton.jit
def affine_inverse(rows, radius, sizes, SPEC: tl.constexpr):
    """The inverse of an affine map: its entries, u by pixels, and how far in u a box of the input reaches.

    ``radius``: the box's, in pixels. Outputs that can be read in it lie so far from its centre's; infinite
    for a map that has no inverse.
    """
    if SPEC.dims == 3:
        entries, determinant, size = adjugate(rows)
    else:
        a = rows[0][0]
        b = rows[0][1]
        c = rows[1][0]
        d = rows[1][1]
        determinant, size = minor(a, b, c, d)
        entries = (((d, tl.abs(d)), (-b, tl.abs(b))), ((-c, tl.abs(c)), (a, tl.abs(a))))
    regular = is_regular(rows, determinant, size, SPEC.dims, SPEC.dims)
    scale = 1.0 / tl.where(regular, determinant, 1.0)
    slack = ()  # for the minors' roundings; the determinant's scales all bounds alike
    for j in tl.static_range(SPEC.dims):
        # no output reads farther from the last entry than the others and the radius reach
        distance = 2.0 * (radius[j] + tl.abs(rows[j][SPEC.dims]))
        for k in tl.static_range(SPEC.dims):
            distance += tl.abs(rows[j][k]) * largest_unit(sizes.output[k], SPEC)
        slack += (distance * ROUNDING,)
    inverse = ()
    reaches = ()
    for i in tl.static_range(SPEC.dims):
        row = ()
        reach = 0.0
        for j in tl.static_range(SPEC.dims):
            entry = entries[i][j][0] * scale
            row += (entry,)
            reach += tl.abs(entry) * radius[j] + entries[i][j][1] * tl.abs(scale) * slack[j]
        inverse += (row,)
        reaches += (tl.where(regular, reach, INFINITY),)
    return inverse, reaches


@triton.jit
def affine_preimage(rows, center, radius, sizes, SPEC: tl.constexpr):
    """For each axis the lower and upper u of the outputs that can be read in a box."""
    inverse, reaches = affine_inverse(rows, radius, sizes, SPEC)
    bounds = ()
    for i in tl.static_range(SPEC.dims):
        middle = 0.0
        for j in tl.static_range(SPEC.dims):
            middle += inverse[i][j] * (center[j] - rows[j][SPEC.dims])
        bounds += ((middle - reaches[i], middle + reaches[i]),)
    return bounds


@triton.jit
def projective_corner(entries, x, y):
    """What a homography sends to (x, y), with errors; the denominator, and whether its sign is known."""
    w = entries[2][0][0] * x + (entries[2][1][0] * y + entries[2][2][0])
    w_error = (entries[2][0][1] * tl.abs(x) + (entries[2][1][1] * tl.abs(y) + entries[2][2][1])) * ROUNDING
    known = tl.abs(w) > 4.0 * w_error
    inverse = 1.0 / tl.where(known, w, 1.0)
    places = ()
    for i in tl.static_range(2):
        place = (entries[i][0][0] * x + (entries[i][1][0] * y + entries[i][2][0])) * inverse
        error = entries[i][0][1] * tl.abs(x) + (entries[i][1][1] * tl.abs(y) + entries[i][2][1])
        error = 4.0 * tl.abs(inverse) * (error * ROUNDING + (1.0 + tl.abs(place)) * w_error)
        places += ((place, error),)
    return places, w, known


@triton.jit
def projective_preimage(rows, center, radius):
    """As ``affine_preimage``, normalised: a box that the horizon does not cut comes from a quadrangle."""
    entries, determinant, size = adjugate(rows)
    regular = is_regular(rows, determinant, size, 3, 3)
    places, w, known = projective_corner(entries, center[0] - radius[0], center[1] - radius[1])
    bounds = [(place[0] - place[1], place[0] + place[1]) for place in places]
    for corner in tl.static_range(1, 4):
        x = center[0] + radius[0] * (2.0 * (corner % 2) - 1.0)
        y = center[1] + radius[1] * (2.0 * (corner // 2) - 1.0)
        places, other, sure = projective_corner(entries, x, y)
        known = known & sure & ((w > 0) == (other > 0))
        low = [smaller(bounds[i][0], places[i][0] - places[i][1]) for i in (0, 1)]
        high = [larger(bounds[i][1], places[i][0] + places[i][1]) for i in (0, 1)]
        bounds = [(low[i], high[i]) for i in (0, 1)]
    low = [tl.where(known, bound[0], -INFINITY) for bound in bounds]
    high = [tl.where(known, bound[1], INFINITY) for bound in bounds]
    return [(tl.where(regular, low[i], -INFINITY), tl.where(regular, high[i], INFINITY)) for i in (0, 1)]


@triton.jit
def normalised_box(center, radius, sizes, SPEC: tl.constexpr):
    """A box of the input in normalised units.

    With aligned corners an axis of one pixel is read from everywhere.
    """
    centers = ()
    radii = ()
    for axis in tl.static_range(SPEC.dims):
        scale = pixels_per_unit(sizes.input[axis], SPEC)
        middle = (sizes.input[axis] - 1).to(SPEC.compute) * 0.5
        inverse = 1.0 / tl.where(scale > 0, scale, 1.0)
        centers += (tl.where(scale > 0, (center[axis] - middle) * inverse, 0.0),)
        radii += (tl.where(scale > 0, radius[axis] * inverse, INFINITY),)
    return centers, radii


@triton.jit
def preimage(map, center, radius, sizes, SPEC: tl.constexpr):
    """For each axis the first and the last output pixel, int32, that can be read in a box of the input.

    ``center``, ``radius``: the box's, in pixels. The first is past the last where there is none.
    """
    if SPEC.source == PROJECTIVE:
        centers, radii = normalised_box(center, radius, sizes, SPEC)
        bounds = projective_preimage(map, centers, radii)
    else:
        bounds = affine_preimage(map.rows, center, radius, sizes, SPEC)
    pixels = ()
    for axis in tl.static_range(SPEC.dims):
        extent = (sizes.output[axis] - 1).to(SPEC.compute)
        half = 0.5
        if SPEC.source == PROJECTIVE:
            half = steps_per_unit(sizes, axis, SPEC).to(SPEC.compute) * 0.5
        error = (extent + 1.0) * ROUNDING
        first = bounds[axis][0] * half + (0.5 * extent - error)
        last = bounds[axis][1] * half + (0.5 * extent + error)
        # NaN widens the range
        first = tl.ceil(smaller(larger(first, 0.0), extent + 1.0))
        last = tl.floor(larger(smaller(last, extent), -1.0))
        pixels += ((first.to(tl.int32), last.to(tl.int32)),)
    return pixels
