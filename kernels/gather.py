"""d image by gather, for maps that have an inverse: affine ones and homographies.

    d input[n, c, q] = sum over transforms t and outputs o of  weight_q(p(o)) g[n, t, c, o]

A program owns a tile of input pixels q. For each transform it bounds the outputs that can read them, visits
these in a fixed order, weighs each with the forward's own places, and writes every pixel once, in its final
type: no atomics, no scratch, the same bits each time. There are two ways to visit:

* *by pixel*: every lane has a pixel, and goes through the few outputs in its preimage (``bounds.preimage``);
* *by output*, where that would be too many (much zoomed or folded maps, borders that many outputs are
  clamped to, near-singular maps, horizons, NaN): blocks of outputs are bounded, those that may touch the tile
  are evaluated with a lane for each output, and summed for each pixel of the tile that they do touch.

Which of them is decided for each tile and transform on the device. The result does not depend on it but for
rounding. ``MATH.md`` has the proof of the bounds and the most work there can be.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .device import sources
from .device.affine import affine_places, doubled_pixels, fixed_coordinate, fixed_place, rounded_entry
from .device.arithmetic import AFFINE, BILINEAR, BORDER, INFINITY, clamp, larger, rounded, smaller
from .device.bounds import box_in_units, image_bounds, preimage
from .device.copies import (
    MOST_COPIES,
    appearance,
    copies_within,
    copy_at,
    copy_number,
    has_copies,
    is_apart,
)
from .device.interpolation import axis_taps, cubic_weight, radius_of, tap_count, weight_of_pixel
from .device.padding import is_periodic, padding_of
from .device.tiles import (
    blocks_of,
    channel_block,
    first_row,
    offset_of,
    pixels_from,
    place_of_program,
    row_range,
    steps_from,
)
from .host import configs
from .host.launch import Plan, compute_dtypes, index_dtype, planned, vector_width
from .host.parameters import (
    axes,
    channel_dim,
    has_fixed_point,
    image_strides,
    output_strides,
    source_strides,
)
from .modes import Interpolation, Padding, paddings_of
from .spec import SPECIALIZATION, Image, Params, Sizes, Spec, Strides, Tiling, Work, constant, plain

# Blocks of outputs whose bounds are computed at a time.
BLOCKS = constant(128)
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


class Gradients(NamedTuple):
    """d output of one transform and block of channels: pointer, strides and the block's number."""

    pointer: Any
    strides: Any
    block: Any


@triton.jit
def map_places(map, out, sizes, SPEC: tl.constexpr):
    """Where outputs ``out`` are read by a map: the same numbers as the forward kernel's."""
    if SPEC.source == AFFINE:
        return affine_places(map, out, sizes, SPEC)
    else:
        work = Work(0, (), map, 0, 0, 1, (), (0, 1), False, 0, 0, 1)
        return sources.places_at((), work, out, True, sizes, SPEC)[0]


# --------------------------------------------------------------------------------------------- by pixel
@triton.jit
def visits_of(map, bounds, pixels, sizes, SPEC: tl.constexpr):
    """The ``Visits`` of the outputs that can read each pixel, or what padding shows at ``pixels``."""
    RADIUS: tl.constexpr = radius_of(SPEC)
    center = ()
    radius = ()
    for axis in tl.static_range(SPEC.dims):
        q = pixels.q[axis].to(SPEC.compute)
        reach = bounds[axis][2] + RADIUS
        if padding_of(SPEC, axis) == BORDER:  # all that lies beyond the border reads the border
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
    for axis in tl.static_range(SPEC.dims):
        count = tl.where(pixels.exists, ranges[axis][1] - ranges[axis][0] + 1, 0)
        count = tl.maximum(tl.max(tl.max(count, 1), 0), 0)
        most += (count,)
        # all of them outputs: one too many has weight 0
        first += (tl.maximum(tl.minimum(ranges[axis][0], sizes.output[axis] - count), 0),)
    cost = product(most, SPEC)
    if goes_by_steps(SPEC):
        cost = tl.where(map.fits, cost, INFINITY)
    distances = ()
    if weighs_by_distance(SPEC):
        distances = distances_of(map, first, pixels, sizes, SPEC)
    return Visits(first, most, cost, distances)


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
def product(numbers, SPEC: tl.constexpr):
    result = numbers[0].to(SPEC.compute) * numbers[1].to(SPEC.compute)
    if SPEC.dims == 3:
        result *= numbers[2].to(SPEC.compute)
    return result


@triton.jit
def map_and_bounds(params, n, t, sizes, SPEC: tl.constexpr):
    """The map of transform t of image n, and where all its outputs are read."""
    map = sources.map_of(params, n, t, sizes, SPEC)
    first = ()
    last = ()
    for axis in tl.static_range(SPEC.dims):
        first += (sizes.output[axis] * 0,)
        last += (sizes.output[axis] - 1,)
    low, high = box_in_units(first, last, sizes, SPEC)
    return map, image_bounds(map, low, high, sizes, SPEC)


@triton.jit
def find_candidates(map, bounds, pixels, sizes, SPEC: tl.constexpr):
    """The ``Candidates`` of a block of pixels."""
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
                    cost += visits_of(map, bounds, shown, sizes, SPEC).cost
    else:
        visits = visits_of(map, bounds, pixels, sizes, SPEC)
        cost = visits.cost
    return Candidates(map, bounds, ranges, copies, visits, cost)


@triton.jit
def add_weighted(sums, weight, offset, gradients, sizes, SPEC: tl.constexpr):
    """``sums`` plus ``weight`` times d output at ``offset``.

    A gradient of weight 0 adds nothing, not even a NaN.
    """
    new = ()
    for k in tl.static_range(SPEC.unroll):
        c, exists = channel_block(gradients.block * SPEC.unroll + k, sizes.channels, SPEC)
        pointer = gradients.pointer + c * gradients.strides.c + offset
        g = tl.load(pointer, (weight != 0.0) & exists, other=0.0).to(SPEC.compute)
        new += (sums[k] + weight * g,)
    return new


# ---------------------------------------------------------------------------------- weights by distance
@triton.constexpr_function
def weighs_by_distance(spec):
    """Whether a weight is a function of how far from the pixel an output is read, and that goes by steps.

    So it is of affine maps, but for nearest samples, which jump, and under border padding.
    """
    return plain(goes_by_steps(spec)) and Padding.BORDER not in plain(spec.padding)


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
    anchor = ()
    for k in tl.static_range(SPEC.dims):
        anchor += (tl.min(tl.min(first[k], 1), 0),)
    u = doubled_pixels(anchor, sizes, SPEC)
    distances = ()
    for r in tl.static_range(SPEC.dims):
        x = fixed_coordinate(map.high[r], map.low[r], u, SPEC.dims) - (pixels.low[r].to(tl.int64) << 32)
        x -= (pixels.q[r] - pixels.low[r]).to(tl.int64) << 32
        for k in tl.static_range(SPEC.dims):
            further = (2 * (first[k] - anchor[k])).to(
                tl.uint32
            )  # not negative: half of the product is unsigned
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
    found = ()
    if goes_by_steps(SPEC) and not weighs_by_distance(SPEC):
        u = doubled_pixels(first, sizes, SPEC)
        for r in tl.static_range(SPEC.dims):
            found += (fixed_coordinate(map.high[r], map.low[r], u, SPEC.dims),)
    return found


@triton.jit
def candidate_places(map, start, further, sizes, SPEC: tl.constexpr):
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
            places = candidate_places(map, start, further, sizes, SPEC)
        else:
            out = ()
            for axis in tl.static_range(SPEC.dims):
                out += (visits.first[axis] + further[axis],)
            places = map_places(map, out, sizes, SPEC)
        return weight_of_pixel(places, pixels.q, sizes, SPEC, True)


@triton.jit
def add_by_pixel(sums, map, visits, pixels, gradients, sizes, SPEC: tl.constexpr):
    """``sums`` plus what each pixel gets from the outputs that its lane visits."""
    VECTOR: tl.constexpr = SPEC.vector_output
    strides = gradients.strides.pixel
    offset = offset_of(visits.first, strides, VECTOR, SPEC)
    start = coordinates_of_first(map, visits.first, sizes, SPEC)
    depth = 1
    if SPEC.dims == 3:
        depth = visits.most[2]
    for z in range(depth):
        for y in range(visits.most[1]):
            line = tl.cast(strides[2], SPEC.index) * z + tl.cast(strides[1], SPEC.index) * y
            for x in range(visits.most[0]):
                weight = candidate_weight(map, visits, start, (x, y, z), pixels, sizes, SPEC)
                at = offset + (line + tl.cast(strides[0], SPEC.index) * x)
                sums = add_weighted(
                    sums, weight, tl.multiple_of(at, (VECTOR, VECTOR)), gradients, sizes, SPEC
                )
    return sums


# -------------------------------------------------------------------------------------------- by output
@triton.jit
def may_touch(map, block, column_blocks, pixels, sizes, SPEC: tl.constexpr):
    """Whether outputs of ``block``, [blocks], may read pixels of the tile."""
    RADIUS: tl.constexpr = radius_of(SPEC)
    x = (block % column_blocks) * SPEC.block_columns
    row = (block // column_blocks).to(SPEC.index) * SPEC.block_rows
    first_yz, last_yz = row_range(row, SPEC.block_rows, sizes.output, SPEC)
    first = (x,) + first_yz
    last = (tl.minimum(x + SPEC.block_columns, sizes.output[0]) - 1,) + last_yz
    low, high = box_in_units(first, last, sizes, SPEC)
    bounds = image_bounds(map, low, high, sizes, SPEC)
    touches = block >= 0
    for axis in tl.static_range(SPEC.dims):
        size = sizes.input[axis]
        least = bounds[axis][0] - RADIUS
        most = bounds[axis][1] + RADIUS
        if is_periodic(SPEC, axis):
            # told only of what lies within one copy, and not too far to have kept it
            number = copy_at(least, size, axis, SPEC)
            told = (number == copy_at(most, size, axis, SPEC)) & (least > -(2.0**29)) & (most < 2.0**29)
            number = tl.where(told, number, 0.0).to(tl.int32)
            tile = (pixels.low[axis], pixels.high[axis])
            apart = told & is_apart(tile, number, (least, most), size, axis, SPEC)
        else:
            below = most < pixels.low[axis].to(SPEC.compute)
            above = least > pixels.high[axis].to(SPEC.compute)
            if padding_of(SPEC, axis) == BORDER:  # the tile at the border has all that lies beyond
                below = below & (pixels.low[axis] > 0)
                above = above & (pixels.high[axis] < size - 1)
            apart = below | above
        touches = touches & (apart == 0)
    return touches


@triton.jit
def pixels_read(place, pixels, sizes, AXIS: tl.constexpr, SPEC: tl.constexpr):
    """The first and last pixel of the tile that each place reads, and whether it reads any."""
    taps = axis_taps(place, sizes.input[AXIS], AXIS, SPEC)
    first = tl.full(place[0].shape, NOWHERE, tl.int32)
    last = tl.full(place[0].shape, -1, tl.int32)
    for k in tl.static_range(tap_count(SPEC)):
        here = (taps.index[k] >= pixels.low[AXIS]) & (taps.index[k] <= pixels.high[AXIS]) & taps.inside[k]
        first = tl.where(here, tl.minimum(first, taps.index[k]), first)
        last = tl.where(here, tl.maximum(last, taps.index[k]), last)
    return first, last, last >= 0


@triton.jit
def range_of_all(first, last, hit):
    """The range of all lanes that ``hit``, scalars; empty if none does."""
    least = tl.min(tl.min(tl.where(hit, first, NOWHERE), 1), 0)
    return least, tl.max(tl.max(tl.where(hit, last, -1), 1), 0)


@triton.jit
def add_block(sums, map, block, column_blocks, pixels, gradients, sizes, SPEC: tl.constexpr):
    """``sums`` plus what one block of outputs adds to the pixels of the tile that it reads."""
    column = (block % column_blocks) * SPEC.block_columns
    row = first_row(block // column_blocks, SPEC.block_rows, SPEC)
    out, mask = pixels_from(column, row, sizes.output, SPEC.block_rows, SPEC.block_columns, SPEC)
    places = map_places(map, out, sizes, SPEC)
    x0, x1, hit_x = pixels_read(places[0], pixels, sizes, 0, SPEC)
    y0, y1, hit_y = pixels_read(places[1], pixels, sizes, 1, SPEC)
    hit = mask & hit_x & hit_y
    first_z = 0
    last_z = 0
    if SPEC.dims == 3:
        z0, z1, hit_z = pixels_read(places[2], pixels, sizes, 2, SPEC)
        hit = hit & hit_z
        first_z, last_z = range_of_all(z0, z1, hit)
    first_x, last_x = range_of_all(x0, x1, hit)
    first_y, last_y = range_of_all(y0, y1, hit)
    offset = offset_of(out, gradients.strides.pixel, SPEC.vector_output, SPEC)
    values = ()
    for k in tl.static_range(SPEC.unroll):
        c, exists = channel_block(gradients.block * SPEC.unroll + k, sizes.channels, SPEC)
        pointer = gradients.pointer + offset + c * gradients.strides.c
        values += (tl.load(pointer, hit & exists, other=0.0).to(SPEC.compute),)
    for z in range(first_z, last_z + 1):
        for y in range(first_y, last_y + 1):
            for x in range(first_x, last_x + 1):
                here = (pixels.q[0] == x) & (pixels.q[1] == y)
                q = (x, y)
                if SPEC.dims == 3:
                    here = here & (pixels.q[2] == z)
                    q = (x, y, z)
                weight = tl.where(hit, weight_of_pixel(places, q, sizes, SPEC), 0.0)
                new = ()
                for k in tl.static_range(SPEC.unroll):
                    # a gradient that is not read adds nothing, not even a NaN
                    share = tl.where(weight != 0.0, weight * values[k], 0.0)
                    new += (sums[k] + tl.where(here, tl.sum(share, 0, keep_dims=True), 0.0),)
                sums = new
    return sums


@triton.jit
def add_by_output(sums, map, pixels, gradients, sizes, SPEC: tl.constexpr):
    """``sums`` plus what each pixel gets, with a lane for each output of blocks that may touch the tile."""
    column_blocks = tl.cdiv(sizes.output[0], SPEC.block_columns)
    output_rows = sizes.output[1].to(SPEC.index)
    if SPEC.dims == 3:
        output_rows *= sizes.output[2]
    blocks = column_blocks * tl.cdiv(output_rows, SPEC.block_rows).to(tl.int32)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        touches = may_touch(map, tl.minimum(block, blocks - 1), column_blocks, pixels, sizes, SPEC)
        waiting = tl.where(touches & (block < blocks), block, NOWHERE)
        for _ in range(tl.sum((waiting < NOWHERE).to(tl.int32), 0)):
            next_block = tl.min(waiting, 0)
            waiting = tl.where(waiting == next_block, NOWHERE, waiting)
            sums = add_block(sums, map, next_block, column_blocks, pixels, gradients, sizes, SPEC)
    return sums


# ------------------------------------------------------------------------------------------------ kernel
@triton.constexpr_function
def finds_once(spec):
    """Whether all blocks of channels share one search.

    With channels last, the pixels found would be carried in another layout than vectors have, and exchanged
    in the inner loop.
    """
    return plain(spec.channels) == 1 and plain(spec.one_transform)


@triton.jit
def add_transform(sums, found, pixels, gradients, sizes, SPEC: tl.constexpr):
    """``sums`` plus what each pixel gets from the outputs of one transform."""
    map = found.map
    if found.cost <= SPEC.most_candidates:
        if not has_copies(SPEC):
            sums = add_by_pixel(sums, map, found.visits, pixels, gradients, sizes, SPEC)
        else:
            for i in range(found.copies.to(tl.int32)):
                number = copy_number(i, found.ranges, SPEC)
                if shows_tile(pixels, number, found.bounds, sizes, SPEC):
                    shown = shown_pixels(pixels, number, sizes, SPEC)
                    visits = visits_of(map, found.bounds, shown, sizes, SPEC)
                    sums = add_by_pixel(sums, map, visits, shown, gradients, sizes, SPEC)
    else:
        sums = add_by_output(sums, map, pixels, gradients, sizes, SPEC)
    return sums


@triton.jit
def pixels_of_tile(column, row, sizes, SPEC: tl.constexpr):
    """The ``Pixels`` of the block at ``column`` and ``row``."""
    q, exists = pixels_from(column, row, sizes.input, SPEC.rows, SPEC.columns, SPEC)
    first_yz, last_yz = row_range(row, SPEC.rows, sizes.input, SPEC)
    last_x = tl.minimum(column + SPEC.columns, sizes.input[0]) - 1
    return Pixels(q, exists, (column,) + first_yz, (last_x,) + last_yz)


@triton.jit(**SPECIALIZATION)
def gather_backward_kernel(
    grad_output_ptr, grad_input_ptr, source_ptr,
    stride_output_n, stride_output_t, stride_output_c, stride_output_x, stride_output_y, stride_output_z,
    stride_grad_n, stride_grad_c, stride_grad_x, stride_grad_y, stride_grad_z,
    stride_source_0, stride_source_1, stride_source_2, stride_source_3, stride_source_4,
    in_width, in_height, in_depth, out_width, out_height, out_depth, batch, transforms, channels,
    column_tiles, row_tiles, splits, split_blocks, steps,
    SPEC: tl.constexpr,
):  # fmt: skip
    """d input, every pixel written once, in its own type.

    Tiles are of the input; batch is that of its images.
    """
    in_size = (in_width, in_height, in_depth)
    sizes = Sizes(in_size, (out_width, out_height, out_depth), batch, transforms, channels)
    stride_output = (stride_output_x, stride_output_y, stride_output_z)
    output = Strides(stride_output_n, stride_output_t, stride_output_c, stride_output)
    stride_grad = (stride_grad_x, stride_grad_y, stride_grad_z)
    grad_input = Image(grad_input_ptr, Strides(stride_grad_n, 0, stride_grad_c, stride_grad))
    stride_source = (stride_source_0, stride_source_1, stride_source_2, stride_source_3, stride_source_4)
    params = Params(source_ptr, stride_source, source_ptr, 0)

    tiling = Tiling(column_tiles, row_tiles, splits, split_blocks, steps)
    column_tile, row_tile, split, image = place_of_program(tiling)
    n = image.to(tl.int64)
    column = column_tile * SPEC.columns
    first = first_row(row_tile, steps * SPEC.rows, SPEC)
    blocks = blocks_of(split, tiling, channels, SPEC)
    map, bounds = map_and_bounds(params, n, n * 0, sizes, SPEC)
    for step in range(steps_from(first, steps, in_size, SPEC)):
        pixels = pixels_of_tile(column, first + step * SPEC.rows, sizes, SPEC)
        target = grad_input.pointer + tl.multiple_of(n * stride_grad_n, SPEC.vector_grad)
        target += offset_of(pixels.q, stride_grad, SPEC.vector_grad, SPEC)
        if finds_once(SPEC):
            found = find_candidates(map, bounds, pixels, sizes, SPEC)
        for block in range(blocks[0], blocks[1]):
            sums = ()
            for _ in tl.static_range(SPEC.unroll):
                sums += (tl.zeros([SPEC.rows * SPEC.columns, SPEC.channels], SPEC.compute),)
            for t in range(transforms):
                if not SPEC.one_transform:
                    map, bounds = map_and_bounds(params, n, tl.cast(t, tl.int64), sizes, SPEC)
                if not finds_once(SPEC):
                    found = find_candidates(map, bounds, pixels, sizes, SPEC)
                begin = n * stride_output_n + tl.cast(t, tl.int64) * stride_output_t
                begin = tl.multiple_of(begin, SPEC.vector_output)
                gradients = Gradients(grad_output_ptr + begin, output, block)
                sums = add_transform(sums, found, pixels, gradients, sizes, SPEC)
            for k in tl.static_range(SPEC.unroll):
                c, real = channel_block(block * SPEC.unroll + k, channels, SPEC)
                tl.store(
                    target + c * stride_grad_c, rounded(sums[k], grad_input.pointer), pixels.exists & real
                )


@planned
def _plan(
    grad_output: torch.Tensor,
    params: torch.Tensor,
    grad_input: torch.Tensor,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
) -> Plan:
    dims = grad_input.dim() - 2
    batch, channels = grad_input.shape[:2]
    columns, rows = grad_input.shape[-1], grad_input.shape[-dims:-1].numel()
    problem = configs.Problem(
        kernel="gather",
        source=source,
        images=batch,
        channels=channels,
        rows=rows,
        columns=columns,
        element_size=grad_output.element_size(),
        channels_last=grad_output.stride(channel_dim(grad_output, dims)) == 1,
        interpolation=interpolation,
        dims=dims,
        backward=True,
    )
    tile, search = configs.choose_gather(grad_output.device, problem)
    block = tile.channels * tile.unroll
    blocks = triton.cdiv(channels, block)
    split_blocks = triton.cdiv(blocks, tile.splits)
    splits = triton.cdiv(blocks, split_blocks)
    column_tiles, row_tiles = triton.cdiv(columns, tile.columns), triton.cdiv(rows, tile.rows * tile.steps)
    transforms = grad_output.shape[1] if grad_output.dim() > grad_input.dim() else 1
    compute = compute_dtypes(grad_input, params)[0]
    sizes = grad_input.shape[2:], grad_output.shape[-dims:]
    index = index_dtype(grad_output, grad_input, params, rows=max(rows, sizes[1][:-1].numel()))
    return Plan(
        gather_backward_kernel,
        batch * splits * column_tiles * row_tiles,
        grad_input.device,
        grad_output,
        grad_input,
        params,
        *output_strides(grad_output, dims),
        *image_strides(grad_input, dims),
        *source_strides(source, params),
        *axes(sizes[0]),
        *axes(sizes[1]),
        batch=batch,
        transforms=transforms,
        channels=channels,
        column_tiles=column_tiles,
        row_tiles=row_tiles,
        splits=splits,
        split_blocks=split_blocks,
        steps=tile.steps,
        SPEC=Spec(
            source=int(source),
            interpolation=int(interpolation),
            padding=paddings_of(padding, dims),
            align_corners=int(align_corners),
            dims=dims,
            compute=compute,
            index=index,
            fixed_point=has_fixed_point(source, compute, *sizes),
            rows=tile.rows,
            columns=tile.columns,
            channels=tile.channels,
            unroll=tile.unroll,
            even_channels=channels % block == 0,
            one_transform=transforms == 1,
            vector_output=vector_width(grad_output, dims),
            vector_grad=vector_width(grad_input, dims),
            block_rows=search.out_rows,
            block_columns=search.out_columns,
            most_candidates=search.candidates,
        ),
        num_warps=tile.warps,
    )


def gather_backward(
    grad_output: torch.Tensor,
    params: torch.Tensor,
    grad_input: torch.Tensor,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
) -> None:
    """Fills ``grad_input``, (N, C, ...) of any strides, from d output, (N, C, ...) or (N, T, C, ...)."""
    plan = _plan((grad_output, params, grad_input), source, interpolation, padding, align_corners)
    plan(grad_output, grad_input, params)
