"""d image by gather, for maps that have an inverse: affine ones and homographies.

    d input[n, c, q] = sum over transforms t and outputs o of  weight_q(p(o)) g[n, t, c, o]

A program owns a tile of input pixels q. For each transform it bounds the outputs that can read them, visits
these in a fixed order, weighs each with the forward's own places, and writes every pixel once, in its final
type: no atomics, no scratch, the same bits each time. There are two ways to visit:

* *by pixel*: every lane has a pixel, and goes through the few outputs in its preimage (``bounds.preimage``);
* *by output*, where that would be too many (much zoomed or folded maps, borders that many outputs are
  clamped to, near-singular maps, horizons, NaN): blocks of outputs are bounded, those that may touch the tile
  are evaluated with a lane for each output, and summed for each pixel of the tile that they do touch.

Which of them is decided for each tile and transform on the device. Of *mild* maps, as rotations are, three
outputs along each axis are known to hold all that read a pixel, and are visited without a search
(``device/mild.py``). The result does not depend on the way but for rounding. ``MATH.md`` has the proof of the
bounds and the most work there can be.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .device import footprints
from .device.arithmetic import INFINITY, PROJECTIVE, widened
from .device.candidates import (
    NOWHERE,
    Pixels,
    candidate_weight,
    coordinates_of_first,
    find_candidates,
    map_and_bounds,
    map_places,
    shown_pixels,
    shows_tile,
    visits_of,
    whole,
)
from .device.copies import copy_at, copy_number, has_copies, is_apart
from .device.interpolation import axis_taps, radius_of, tap_count, weight_of_pixel
from .device.mild import (
    Nearby,
    has_mild_way,
    is_mild,
    mild_map,
    nearby_outputs,
    next_distances,
    row_weights,
    tile_begins,
)
from .device.padding import extends_edges, is_periodic
from .device.programs import numbers_of_lanes
from .device.tiles import (
    blocks_of,
    box_of,
    channel_block,
    first_row,
    load_blocks,
    offset_of,
    pixels_from,
    place_of_program,
    row_by_row,
    steps_from,
    store_blocks,
    zero_blocks,
)
from .host import configs
from .host.cut import cut, source_numbers
from .host.launch import Plan, compute_dtypes, index_dtype, planned
from .host.parameters import channel_dim
from .modes import EXTENDING, paddings_of
from .spec import Image, Params, Sizes, Strides, Tiling, constant, kernel, plain

# Blocks of outputs whose bounds are computed at a time.
AT_A_TIME = constant(128)


class Blocks(NamedTuple):
    """Blocks of outputs: the first one's column and row, and how many, all in blocks."""

    column: Any
    row: Any
    columns: Any
    rows: Any


class Gradients(NamedTuple):
    """d output of one transform and block of channels: pointer, strides and the block's number."""

    pointer: Any
    strides: Any
    block: Any


class Reads(NamedTuple):
    """A block of outputs, [outputs, 1]: which, whether they exist, where they are read, what weights are
    multiplied by."""

    out: Any
    exists: Any
    places: Any
    share: Any


# --------------------------------------------------------------------------------------------- by pixel
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
    if SPEC.antialias:  # what is visited are sub-samples
        scale = footprints.share_of(sizes.samples, SPEC)
    for z in range(depth):
        for y in range(visits.most[1]):
            line = tl.cast(strides[2], SPEC.index) * z + tl.cast(strides[1], SPEC.index) * y
            for x in range(visits.most[0]):
                weight = candidate_weight(map, visits, start, (x, y, z), pixels, sizes, SPEC)
                at = offset + (line + tl.cast(strides[0], SPEC.index) * x)
                if SPEC.antialias:
                    weight *= scale
                    out = footprints.outputs_of(visits.first, (x, y, z), sizes, SPEC)
                    at = offset_of(out, strides, VECTOR, SPEC)
                at = tl.multiple_of(at, (VECTOR, VECTOR))
                new = ()
                for k in tl.static_range(SPEC.unroll):
                    c, exists = channel_block(gradients.block * SPEC.unroll + k, sizes.channels, SPEC)
                    pointer = gradients.pointer + c * gradients.strides.c + at
                    # a gradient of weight 0 adds nothing, not even a NaN
                    g = widened(tl.load(pointer, (weight != 0.0) & exists, other=0.0), SPEC)
                    new += (sums[k] + weight * g,)
                sums = new
    return sums


@triton.jit
def add_visits(sums, found, visits, pixels, gradients, sizes, SPEC: tl.constexpr):
    """``add_by_pixel``; of sub-samples of a homography cell by cell, as each has its own."""
    map = found.map
    if SPEC.antialias and SPEC.source == PROJECTIVE:
        begin, end = footprints.cells_of(visits, SPEC)
        for cell_y in range(begin[1], end[1]):
            for cell_x in range(begin[0], end[0]):
                grid, part = footprints.grid_of_cell(
                    map, (cell_x + begin[0] * 0, cell_y + begin[1] * 0), sizes, SPEC
                )
                own = visits_of(map, found.bounds, pixels, part, grid, SPEC)
                sums = add_by_pixel(sums, map, own, pixels, gradients, grid, SPEC)
        return sums
    else:
        grid = footprints.grid_of(map, sizes, SPEC)
        return add_by_pixel(sums, map, visits, pixels, gradients, grid, SPEC)


# -------------------------------------------------------------------------------------------- by output
@triton.jit
def range_of_all(first, last, hit):
    """The range of all lanes that ``hit``, scalars; empty if none does."""
    least = tl.min(tl.min(tl.where(hit, first, NOWHERE), 1), 0)
    return least, tl.max(tl.max(tl.where(hit, last, -1), 1), 0)


@triton.jit
def outputs_of_tile(found, pixels, sizes, SPEC: tl.constexpr):
    """Along each axis the first and the last output that can read the tile, scalars.

    All there are, where lanes' outputs are not bounded.
    """
    ranges = ()
    for axis in tl.static_range(SPEC.dims):
        first = sizes.output[axis] * 0
        last = sizes.output[axis] - 1
        if not (has_copies(SPEC) or SPEC.antialias):
            begin = found.visits.first[axis]
            end = begin + (found.visits.most[axis] - 1)
            least, most = range_of_all(begin, end, pixels.exists)
            bounded = found.cost < INFINITY
            first = tl.where(bounded, least, first)
            last = tl.where(bounded, most, last)
        ranges += ((first, last),)
    return ranges


@triton.jit
def searched_blocks(found, pixels, sizes, SPEC: tl.constexpr):
    """The ``Blocks`` of the outputs that can read the tile."""
    ranges = outputs_of_tile(found, pixels, sizes, SPEC)
    row = ranges[1][0].to(SPEC.index)
    last_row = ranges[1][1].to(SPEC.index)
    if SPEC.dims == 3:
        row += ranges[2][0].to(SPEC.index) * sizes.output[1]
        last_row += ranges[2][1].to(SPEC.index) * sizes.output[1]
    column = ranges[0][0] // SPEC.block_columns
    row = (row // SPEC.block_rows).to(tl.int32)
    columns = tl.cdiv(ranges[0][1] + 1, SPEC.block_columns) - column
    rows = tl.cdiv(last_row + 1, SPEC.block_rows).to(tl.int32) - row
    return Blocks(column, row, columns, rows)


@triton.jit
def begin_of(block, blocks, SPEC: tl.constexpr):
    """The first column and row of outputs of number ``block`` of ``blocks``."""
    column = (blocks.column + block % blocks.columns) * SPEC.block_columns
    return column, first_row(blocks.row + block // blocks.columns, SPEC.block_rows, SPEC)


@triton.jit
def may_touch(map, block, blocks, pixels, sizes, SPEC: tl.constexpr):
    """Whether outputs of ``block``, [blocks], may read pixels of the tile."""
    RADIUS: tl.constexpr = radius_of(SPEC)
    x, row = begin_of(block, blocks, SPEC)
    first, last = box_of(x, row, SPEC.block_columns, SPEC.block_rows, sizes.output, SPEC)
    bounds = footprints.bounds_of(map, first, last, sizes, SPEC)
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
            if extends_edges(SPEC, axis):  # the tile at the border has all that lies beyond
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
def add_block(sums, map, block, blocks, pixels, gradients, sizes, SPEC: tl.constexpr):
    """``sums`` plus what one block of outputs adds to the pixels of the tile that it reads."""
    column, row = begin_of(block, blocks, SPEC)
    numbers = row_by_row(SPEC.block_rows * SPEC.block_columns)
    out, mask = pixels_from(column, row, sizes.output, numbers, SPEC.block_columns, SPEC)
    if SPEC.antialias:
        footprint = footprints.footprint_of(map, out, mask, sizes, SPEC)
        for number in range(footprint.most):
            sample = footprints.sample_of(number, footprint, out, SPEC)
            places = map_places(map, sample.out, footprint.grid, SPEC)
            reads = Reads(out, mask & sample.exists, places, footprint.share)
            sums = add_reads(sums, reads, pixels, gradients, sizes, SPEC)
        return sums
    else:
        reads = Reads(out, mask, map_places(map, out, sizes, SPEC), 1.0)
        return add_reads(sums, reads, pixels, gradients, sizes, SPEC)


@triton.jit
def add_reads(sums, reads, pixels, gradients, sizes, SPEC: tl.constexpr):
    """``sums`` plus what outputs add to the pixels of the tile that they read."""
    places = reads.places
    x0, x1, hit_x = pixels_read(places[0], pixels, sizes, 0, SPEC)
    y0, y1, hit_y = pixels_read(places[1], pixels, sizes, 1, SPEC)
    hit = reads.exists & hit_x & hit_y
    first_z = 0
    last_z = 0
    if SPEC.dims == 3:
        z0, z1, hit_z = pixels_read(places[2], pixels, sizes, 2, SPEC)
        hit = hit & hit_z
        first_z, last_z = range_of_all(z0, z1, hit)
    first_x, last_x = range_of_all(x0, x1, hit)
    first_y, last_y = range_of_all(y0, y1, hit)
    begin = gradients.pointer + offset_of(reads.out, gradients.strides.pixel, SPEC.vector_output, SPEC)
    values = load_blocks(begin, gradients.strides.c, gradients.block, hit, sizes.channels, SPEC)
    for z in range(first_z, last_z + 1):
        for y in range(first_y, last_y + 1):
            for x in range(first_x, last_x + 1):
                here = (pixels.q[0] == x) & (pixels.q[1] == y)
                q = (x, y)
                if SPEC.dims == 3:
                    here = here & (pixels.q[2] == z)
                    q = (x, y, z)
                weight = tl.where(hit, weight_of_pixel(places, q, sizes, SPEC), 0.0)
                if SPEC.antialias:
                    weight *= reads.share
                new = ()
                for k in tl.static_range(SPEC.unroll):
                    # a gradient that is not read adds nothing, not even a NaN
                    share = tl.where(weight != 0.0, weight * values[k], 0.0)
                    new += (sums[k] + tl.where(here, tl.sum(share, 0, keep_dims=True), 0.0),)
                sums = new
    return sums


@triton.jit
def add_by_output(sums, found, pixels, gradients, sizes, SPEC: tl.constexpr):
    """``sums`` plus what each pixel gets, with a lane for each output of blocks that may touch the tile."""
    blocks = searched_blocks(found, pixels, sizes, SPEC)
    count = blocks.columns * blocks.rows
    for start in range(0, count, AT_A_TIME):
        block = start + tl.arange(0, AT_A_TIME)
        touches = may_touch(found.map, tl.minimum(block, count - 1), blocks, pixels, sizes, SPEC)
        waiting = tl.where(touches & (block < count), block, NOWHERE)
        for _ in range(tl.sum((waiting < NOWHERE).to(tl.int32), 0)):
            next_block = tl.min(waiting, 0)
            waiting = tl.where(waiting == next_block, NOWHERE, waiting)
            sums = add_block(sums, found.map, next_block, blocks, pixels, gradients, sizes, SPEC)
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
            sums = add_visits(sums, found, found.visits, pixels, gradients, sizes, SPEC)
        else:
            for i in range(found.copies.to(tl.int32)):
                number = copy_number(i, found.ranges, SPEC)
                if shows_tile(pixels, number, found.bounds, sizes, SPEC):
                    shown = shown_pixels(pixels, number, sizes, SPEC)
                    grid = footprints.grid_of(map, sizes, SPEC)
                    visits = visits_of(map, found.bounds, shown, whole(grid), grid, SPEC)
                    sums = add_visits(sums, found, visits, shown, gradients, sizes, SPEC)
    else:
        sums = add_by_output(sums, found, pixels, gradients, sizes, SPEC)
    return sums


@triton.jit
def pixels_of_tile(column, row, numbers, sizes, SPEC: tl.constexpr, FLAT: tl.constexpr = False):
    """The ``Pixels`` of the block at ``column`` and ``row``; lanes have its pixels ``numbers``.

    FLAT: of a volume it lies in one slice.
    """
    first, last = box_of(column, row, SPEC.columns, SPEC.rows, sizes.input, SPEC)
    if FLAT and SPEC.dims == 3:  # no lane has to divide
        q = (first[0] + numbers % SPEC.columns, first[1] + numbers // SPEC.columns, first[2])
        exists = (q[0] <= last[0]) & (q[1] <= last[1])
    else:
        q, exists = pixels_from(column, row, sizes.input, numbers, SPEC.columns, SPEC)
    return Pixels(q, exists, first, last)


@triton.jit
def store(sums, target, block, pixels, sizes, UNROLL: tl.constexpr, SPEC: tl.constexpr):
    """Writes UNROLL blocks of channels into the image ``target``."""
    begin = target.pointer + offset_of(pixels.q, target.strides.pixel, SPEC.vector_grad, SPEC)
    store_blocks(sums, begin, target.strides.c, block, pixels.exists, sizes.channels, UNROLL, SPEC)


# -------------------------------------------------------------------------------------------- mild maps
@triton.constexpr_function
def goes_by_rows(spec):
    """Whether a mild map's rows of three outputs are a loop: it needs half of the registers.

    Where an image's nine weights are kept for other blocks of channels, and with channels last, it costs
    more. A volume's 27 are not kept.
    """
    return plain(spec.dims) == 3 or (plain(spec.channels) == 1 and plain(spec.one_block))


@triton.constexpr_function
def mild_unroll(spec):
    """Blocks of channels at a time: what fits the registers beside nine weights that are kept."""
    most = 8 if plain(spec.channels) == 1 and plain(goes_by_rows(spec)) else 4
    unroll = plain(spec.unroll)
    return unroll if unroll % most else min(unroll, most)


@triton.jit
def add_row(sums, weights, nothing, offset, gradients, block, sizes, SPEC: tl.constexpr):
    """``sums`` plus what pixels get from three outputs side by side, of which the first is at ``offset``."""
    UNROLL: tl.constexpr = mild_unroll(SPEC)
    VECTOR: tl.constexpr = SPEC.vector_output
    for i in tl.static_range(3):
        along_x = tl.cast(gradients.strides.pixel[0], SPEC.index) * i
        new = ()
        for k in tl.static_range(UNROLL):
            c, exists = channel_block(block * UNROLL + k, sizes.channels, SPEC)
            plane = gradients.pointer + c * gradients.strides.c
            # where x is innermost the distance is a constant, and part of the load instruction
            if VECTOR == 1:
                pointer = (plane + offset) + along_x
            else:
                pointer = plane + tl.multiple_of(offset + along_x, (VECTOR, VECTOR))
            g = widened(tl.load(pointer, (weights[i] > nothing) & exists, other=0.0), SPEC)
            new += (sums[k] + weights[i] * g,)
        sums = new
    return sums


@triton.jit
def add_rows(sums, mild, nearby, begin, gradients, block, sizes, SPEC: tl.constexpr):
    """``sums`` plus what pixels get from rows of three outputs, the first one at ``begin``."""
    VECTOR: tl.constexpr = SPEC.vector_output
    along_y = tl.cast(gradients.strides.pixel[1], SPEC.index)
    distances = nearby.distances
    # 0, which the compiler cannot know: to compare anew for each block costs less than to keep flags
    nothing = tl.where(sizes.channels + block < 0, 1.0, 0.0)
    if goes_by_rows(SPEC):
        for row in range(nearby.counts[1]):
            weights = row_weights(mild, distances, SPEC)
            offset = tl.multiple_of(begin + along_y * row, (VECTOR, VECTOR))
            sums = add_row(sums, weights, nothing, offset, gradients, block, sizes, SPEC)
            distances = next_distances(mild, distances, 1, SPEC)
    else:
        for row in tl.static_range(3):
            weights = row_weights(mild, distances, SPEC)
            offset = tl.multiple_of(begin + along_y * row, (VECTOR, VECTOR))
            sums = add_row(sums, weights, nothing, offset, gradients, block, sizes, SPEC)
            distances = next_distances(mild, distances, 1, SPEC)
    return sums


@triton.jit
def add_mild(mild, at, pixels, gradients, block, sizes, SPEC: tl.constexpr):
    """The sums that pixels get of a block of channels from the outputs near them."""
    VECTOR: tl.constexpr = SPEC.vector_output
    nearby = nearby_outputs(mild, at, pixels, sizes, SPEC)
    begin = offset_of(nearby.first, gradients.strides.pixel, VECTOR, SPEC)
    sums = zero_blocks(mild_unroll(SPEC), SPEC)
    if SPEC.dims == 3:
        along_z = tl.cast(gradients.strides.pixel[2], SPEC.index)
        distances = nearby.distances
        for z in range(nearby.counts[2]):
            offset = tl.multiple_of(begin + along_z * z, (VECTOR, VECTOR))
            in_slice = Nearby(nearby.first, nearby.counts, distances)
            sums = add_rows(sums, mild, in_slice, offset, gradients, block, sizes, SPEC)
            distances = next_distances(mild, distances, 2, SPEC)
        return sums
    else:
        return add_rows(sums, mild, nearby, begin, gradients, block, sizes, SPEC)


@triton.jit
def write_mild(mild, pixels, blocks, gradients, target, sizes, SPEC: tl.constexpr):
    """What a program writes of a block of pixels, of a mild map."""
    UNROLL: tl.constexpr = mild_unroll(SPEC)
    at, touches = tile_begins(mild, pixels, sizes, SPEC)
    first = blocks[0] * (SPEC.unroll // UNROLL)
    end = blocks[1] * (SPEC.unroll // UNROLL)
    if touches:
        for block in range(first, end):
            sums = add_mild(mild, at, pixels, gradients, block, sizes, SPEC)
            store(sums, target, block, pixels, sizes, UNROLL, SPEC)
    else:
        for block in range(first, end):
            store(zero_blocks(UNROLL, SPEC), target, block, pixels, sizes, UNROLL, SPEC)


@kernel("output_x")
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
    sizes = Sizes(in_size, (out_width, out_height, out_depth), batch, transforms, channels, (1, 1, 1))
    stride_output = (stride_output_x, stride_output_y, stride_output_z)
    output = Strides(stride_output_n, stride_output_t, stride_output_c, stride_output)
    grad = Strides(stride_grad_n, 0, stride_grad_c, (stride_grad_x, stride_grad_y, stride_grad_z))
    stride_source = (stride_source_0, stride_source_1, stride_source_2, stride_source_3, stride_source_4)
    params = Params(source_ptr, stride_source, source_ptr, 0)

    tiling = Tiling(column_tiles, row_tiles, splits, split_blocks, steps)
    column_tile, row_tile, split, image = place_of_program(tiling)
    n = image.to(tl.int64)
    first = first_row(row_tile, steps * SPEC.rows, SPEC)
    steps = steps_from(first, steps, in_size, SPEC)
    column = column_tile * SPEC.columns
    blocks = blocks_of(split, tiling, channels, SPEC)
    begin = grad_output_ptr + tl.multiple_of(n * stride_output_n, SPEC.vector_output)
    target = Image(grad_input_ptr + tl.multiple_of(n * stride_grad_n, SPEC.vector_grad), grad)
    map, bounds = map_and_bounds(params, n, n * 0, sizes, SPEC)
    numbers = numbers_of_lanes(map, sizes, SPEC, True)
    left = steps
    if has_mild_way(SPEC):
        mild = mild_map(map, bounds, sizes, SPEC)
        if mild.holds:
            for step in range(steps):
                row = first + step * SPEC.rows
                if is_mild(mild, column, row, sizes, SPEC):
                    flat = pixels_of_tile(column, row, numbers, sizes, SPEC, True)
                    write_mild(mild, flat, blocks, Image(begin, output), target, sizes, SPEC)
                    left -= 1
    # a loop of its own, which the other way's registers do not reach
    if left > 0:
        for step in range(steps):
            row = first + step * SPEC.rows
            sought = tl.full([], 1, tl.int1)
            if has_mild_way(SPEC) and SPEC.dims == 3:
                sought = is_mild(mild, column, row, sizes, SPEC) == 0
            if sought:
                pixels = pixels_of_tile(column, row, numbers, sizes, SPEC)
                if finds_once(SPEC):
                    found = find_candidates(map, bounds, pixels, sizes, SPEC)
                for block in range(blocks[0], blocks[1]):
                    sums = zero_blocks(SPEC.unroll, SPEC)
                    for t in range(transforms):
                        if not SPEC.one_transform:
                            map, bounds = map_and_bounds(params, n, tl.cast(t, tl.int64), sizes, SPEC)
                        if not finds_once(SPEC):
                            found = find_candidates(map, bounds, pixels, sizes, SPEC)
                        by_transform = tl.multiple_of(
                            tl.cast(t, tl.int64) * stride_output_t, SPEC.vector_output
                        )
                        gradients = Gradients(begin + by_transform, output, block)
                        sums = add_transform(sums, found, pixels, gradients, sizes, SPEC)
                    store(sums, target, block, pixels, sizes, SPEC.unroll, SPEC)


@planned
def _plan(grad_output: torch.Tensor, params: torch.Tensor, grad_input: torch.Tensor, *modes: Any) -> Plan:
    dims, (images, channels) = grad_input.dim() - 2, grad_input.shape[:2]
    channel = channel_dim(grad_output, dims)
    sizes = grad_input.shape[2:], grad_output.shape[-dims:]
    last = grad_output.stride(channel) == 1
    problem = configs.Problem.of(
        "gather", modes, images, channels, sizes[0], grad_output, last, backward=True
    )
    tile, search = configs.choose_gather(grad_output.device, problem)
    rows = max(problem.rows, sizes[1][:-1].numel())
    index = index_dtype(grad_output, grad_input, params, rows=rows)
    # a tile at a border that outputs are clamped to is much work: no program gets several
    clamps = any(padding in EXTENDING for padding in paddings_of(modes[2], dims))
    steps = 1 if clamps else tile.steps
    work = cut(problem, tile, modes, sizes, compute_dtypes(grad_input, params)[0], index, steps)
    transforms = grad_output.shape[1] if channel == 2 else 1
    return work.plan(
        gather_backward_kernel,
        (grad_output, grad_input, params),
        {"output": grad_output, "grad": grad_input},
        {
            **source_numbers(modes[0], params, None),
            "transforms": transforms,
        },
        one_transform=transforms == 1,
        patches=dims == 3 and tile.may_have_patches,
        block_rows=search.out_rows,
        block_columns=search.out_columns,
        most_candidates=search.candidates,
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
