"""d image by gather, for maps that have an inverse: affine ones and homographies.

    d input[n, c, q] = sum over transforms t and outputs o of  weight_q(p(o)) g[n, t, c, o]

A program owns a tile of input pixels q. For each transform it bounds the outputs that can read them, visits
these in a fixed order, weighs each with the forward's own coordinates, and writes every pixel once, in its
final type: no atomics, no scratch, the same bits each time.
There are two ways to visit:

* *by pixel*: every lane has a pixel, and goes through the few outputs in its preimage (``preimage``);
* *by output*: where that would be too many (much zoomed or folded maps, borders that many outputs are clamped
  to, near-singular maps, horizons, NaN), blocks of outputs are bounded, those that may touch the tile are
  evaluated with a lane for each output, and summed for each pixel of the tile that they do touch.

Which of them is decided for each tile and transform on the device. The result does not depend on it but for
rounding. ``kernels/README.md`` has the proof of the bounds and the most work there can be.
"""

import torch
import triton
import triton.language as tl

from . import configs, sources
from .coordinates import (
    BICUBIC,
    BILINEAR,
    BORDER,
    REFLECTION,
    ZEROS,
    clamp,
    constant,
    larger,
    pad_coordinate,
    reflection_bounds,
    smaller,
    unnormalise,
    unnormalise_grad,
)
from .interpolation import at_pixel, axis_tap_count, axis_taps, cubic_far, cubic_near
from .launch import Plan, channel_dim, compute_dtypes, index_dtype, planned, vector_width
from .preimage import INFINITY, image_bounds, preimage
from .sample import CHANNEL_STRIDES, UNSPECIALIZED, channel_block
from .tiles import axes, output_pixels, pixel_offset, rounded, row_range, strides

# Reflections of the image that are looked at one by one, at most.
MOST_FOLDS = constant(64)
# Blocks of outputs whose bounds are computed at a time.
BLOCKS = constant(128)
NOWHERE = constant(2**30)


# ------------------------------------------------------------------------------------- one output
@triton.jit
def cubic_weight(distance):
    """The cubic convolution kernel at a distance of at least 0; 0 for a NaN."""
    far = tl.where(distance < 2.0, cubic_far(distance), 0.0)
    return tl.where(distance <= 1.0, cubic_near(distance), far)


@triton.jit
def axis_weight(
    x,
    q,
    size,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The weight with which coordinate ``x`` reads pixel ``q``: the transpose of ``axis_taps``.

    Under zeros it depends on x - q alone, and is 0 for a NaN.
    """
    if INTERPOLATION == BILINEAR:
        if PADDING != ZEROS:
            x = pad_coordinate(x, size, PADDING, ALIGN_CORNERS, COMPUTE)
        # 1 - t and t with t = x - floor(x), as axis_taps has them, to half a rounding of 1
        return clamp(1.0 - tl.abs(x - tl.cast(q, COMPUTE)), 0.0, 1.0)
    elif INTERPOLATION == BICUBIC and PADDING == ZEROS:
        # the taps' own distances 1 + t, t, 1 - t and 2 - t, to the bit
        return cubic_weight(tl.abs(x - tl.cast(q, COMPUTE)))
    else:
        indices, inside, weights = axis_taps(x, size, INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE)
        return at_pixel(q, indices, inside, weights, INTERPOLATION, COMPUTE)


@triton.jit
def weight_of(
    p,
    q,
    in_size,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The weight with which an output at pixel coordinates ``p`` reads pixel ``q``."""
    weight = axis_weight(p[1], q[1], in_size[1], INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE)
    weight *= axis_weight(p[0], q[0], in_size[0], INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE)
    if DIMS == 3:
        weight *= axis_weight(p[2], q[2], in_size[2], INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE)
    return weight


@triton.jit
def input_coordinates(
    rows,
    out,
    out_size,
    in_size,
    SOURCE: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """``sources.input_pixels`` from a matrix that has been loaded: the same operations, the same bits."""
    pixels = sources.normalised_pixels(out, out_size, ALIGN_CORNERS, DIMS, COMPUTE)
    place = sources.matrix_map(rows, pixels, SOURCE, DIMS, COMPUTE)
    p = ()
    for axis in tl.static_range(DIMS):
        p += (unnormalise(place[axis], in_size[axis], ALIGN_CORNERS, COMPUTE),)
    return p


# --------------------------------------------------------------------------------------- reflection
@triton.jit
def fold_of(x, size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """The number of mirrors between ``x`` and the image, a float; 0 where the two mirrors coincide."""
    low, span = reflection_bounds(size, ALIGN_CORNERS, COMPUTE)
    return tl.where(span > 0, tl.floor((x - low) / larger(span, 1.0)), 0.0)


@triton.jit
def unfolded(q, fold, size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """Where pixel ``q`` appears behind ``fold`` mirrors."""
    low, span = reflection_bounds(size, ALIGN_CORNERS, COMPUTE)
    odd = fold - 2.0 * tl.floor(fold * 0.5) == 1.0
    return tl.where(odd, 2.0 * low + (fold + 1.0) * span - q, q + fold * span)


@triton.jit
def folds(bounds, in_size, ALIGN_CORNERS: tl.constexpr, DIMS: tl.constexpr, COMPUTE: tl.constexpr):
    """For each axis the first fold that is read and their number, and the number over all axes, floats.

    The numbers are infinite or NaN if there is no bound.
    """
    ranges = ()
    number = tl.full([], 1.0, COMPUTE)
    for axis in tl.static_range(DIMS):
        first = fold_of(bounds[axis][0], in_size[axis], ALIGN_CORNERS, COMPUTE)
        last = fold_of(bounds[axis][1], in_size[axis], ALIGN_CORNERS, COMPUTE)
        ranges += ((first, last - first + 1.0),)
        number *= last - first + 1.0
    return ranges, number


@triton.jit
def fold_number(fold, ranges, DIMS: tl.constexpr):
    """The folds (x, y[, z]) of the combination ``fold``."""
    across = ranges[0][1].to(tl.int32)
    x = ranges[0][0] + tl.cast(fold % across, tl.float32)
    rest = fold // across
    if DIMS == 3:
        down = ranges[1][1].to(tl.int32)
        y = ranges[1][0] + tl.cast(rest % down, tl.float32)
        return x, y, ranges[2][0] + tl.cast(rest // down, tl.float32)
    else:
        return x, ranges[1][0] + tl.cast(rest, tl.float32)


# ----------------------------------------------------------------------------------------- by pixel
@triton.jit
def candidates(
    rows,
    bounds,
    q,
    exists,
    fold,
    in_size,
    out_size,
    SOURCE: tl.constexpr,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The first and last outputs that can read each pixel behind ``fold``, and the most along each axis."""
    RADIUS: tl.constexpr = 2.0 if INTERPOLATION == BICUBIC else (1.0 if INTERPOLATION == BILINEAR else 0.5)
    center = ()
    radius = ()
    for axis in tl.static_range(DIMS):
        place = q[axis].to(COMPUTE)
        if PADDING == REFLECTION:
            place = unfolded(place, fold[axis], in_size[axis], ALIGN_CORNERS, COMPUTE)
        reach = RADIUS + bounds[axis][2]
        if PADDING == BORDER:  # all that lies beyond the border reads the border
            low = tl.where(q[axis] == 0, smaller(place - reach, bounds[axis][0]), place - reach)
            last = in_size[axis] - 1
            high = tl.where(q[axis] == last, larger(place + reach, bounds[axis][1]), place + reach)
            place = 0.5 * (low + high)
            reach = 0.5 * (high - low)
        scale = unnormalise_grad(in_size[axis], ALIGN_CORNERS, COMPUTE)
        middle = (in_size[axis] - 1).to(COMPUTE) * 0.5
        # an axis of one pixel with aligned corners has scale 0: everything reads that pixel
        inverse = 1.0 / tl.where(scale > 0, scale, 1.0)
        center += (tl.where(scale > 0, (place - middle) * inverse, 0.0),)
        radius += (tl.where(scale > 0, reach * inverse, INFINITY),)
    ranges = preimage(rows, center, radius, out_size, SOURCE, ALIGN_CORNERS, DIMS, COMPUTE)
    first = ()
    most = ()
    for axis in tl.static_range(DIMS):
        count = tl.where(exists, ranges[axis][1] - ranges[axis][0] + 1, 0)
        number = tl.maximum(tl.max(tl.max(count, 1), 0), 0)
        most += (number,)
        # all of them outputs: one too many has weight 0
        first += (tl.maximum(tl.minimum(ranges[axis][0], out_size[axis] - number), 0),)
    return first, most


@triton.jit
def product(numbers, DIMS: tl.constexpr, COMPUTE: tl.constexpr):
    result = numbers[0].to(COMPUTE) * numbers[1].to(COMPUTE)
    if DIMS == 3:
        result *= numbers[2].to(COMPUTE)
    return result


@triton.jit
def search(
    source,
    n,
    t,
    q,
    exists,
    in_size,
    out_size,
    SOURCE: tl.constexpr,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The matrix of transform t, what is known of the outputs that can read the tile, and their number.

    Known is, under reflection, (bounds, folds); else ``candidates``. The number, a float, is that of the
    outputs that a lane would go through; infinite where there is no bound.
    """
    rows = sources.matrix_of(source, n, t, SOURCE, DIMS, COMPUTE)
    low = ()
    high = ()
    for axis in tl.static_range(DIMS):
        low += (sources.normalised(0, out_size[axis], ALIGN_CORNERS, COMPUTE),)
        high += (sources.normalised(out_size[axis] - 1, out_size[axis], ALIGN_CORNERS, COMPUTE),)
    bounds = image_bounds(rows, low, high, in_size, SOURCE, ALIGN_CORNERS, DIMS, COMPUTE)
    if PADDING == REFLECTION:
        ranges, number = folds(bounds, in_size, ALIGN_CORNERS, DIMS, COMPUTE)
        visits = tl.full([], INFINITY, COMPUTE)
        if number <= MOST_FOLDS:
            visits = tl.full([], 0.0, COMPUTE)
            for i in range(number.to(tl.int32)):
                _first, most = candidates(
                    rows,
                    bounds,
                    q,
                    exists,
                    fold_number(i, ranges, DIMS),
                    in_size,
                    out_size,
                    SOURCE,
                    INTERPOLATION,
                    PADDING,
                    ALIGN_CORNERS,
                    DIMS,
                    COMPUTE,
                )
                visits += product(most, DIMS, COMPUTE)
        return rows, (bounds, ranges, number), visits
    else:
        first, most = candidates(
            rows,
            bounds,
            q,
            exists,
            (0, 0, 0),
            in_size,
            out_size,
            SOURCE,
            INTERPOLATION,
            PADDING,
            ALIGN_CORNERS,
            DIMS,
            COMPUTE,
        )
        visits = product(most, DIMS, COMPUTE)
        return rows, (first, most), visits


@triton.jit
def add_candidate(
    acc,
    p,
    q,
    fold,
    offset,
    pointer,
    first_channel,
    channels,
    stride_c,
    in_size,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """``acc`` plus what each pixel ``q`` gets from an output at pixel coordinates ``p``."""
    weight = weight_of(p, q, in_size, INTERPOLATION, PADDING, ALIGN_CORNERS, DIMS, COMPUTE)
    kept = weight != 0.0
    for axis in tl.static_range(DIMS):
        if PADDING == REFLECTION:  # an output belongs to one fold, and is not counted in another
            kept = kept & (fold_of(p[axis], in_size[axis], ALIGN_CORNERS, COMPUTE) == fold[axis])
    new = ()
    for step in tl.static_range(UNROLL):
        c, exists = channel_block(first_channel + step, channels, BLOCK_CHANNELS, EVEN_CHANNELS, INDEX)
        g = tl.load(pointer + c * stride_c + offset, kept & exists, other=0.0).to(COMPUTE)
        new += (acc[step] + weight * g,)
    return new


@triton.jit
def add_by_pixel(
    acc,
    rows,
    q,
    fold,
    first,
    most,
    pointer,
    first_channel,
    channels,
    stride_c,
    stride_out,
    in_size,
    out_size,
    SOURCE: tl.constexpr,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """``acc`` plus what each pixel ``q`` gets from its ``most`` outputs from ``first`` on."""
    offset = tl.multiple_of(pixel_offset(first, stride_out, DIMS, INDEX), (VECTOR, VECTOR))
    stride_x = tl.cast(stride_out[0], INDEX)
    stride_y = tl.cast(stride_out[1], INDEX)
    stride_z = tl.cast(stride_out[2], INDEX)
    depth = 1
    if DIMS == 3:
        depth = most[2]
    for z in range(depth):
        for y in range(most[1]):
            line = z * stride_z + y * stride_y
            for x in range(most[0]):
                out = (first[0] + x, first[1] + y)
                if DIMS == 3:
                    out += (first[2] + z,)
                p = input_coordinates(rows, out, out_size, in_size, SOURCE, ALIGN_CORNERS, DIMS, COMPUTE)
                acc = add_candidate(
                    acc,
                    p,
                    q,
                    fold,
                    tl.multiple_of(offset + (line + x * stride_x), (VECTOR, VECTOR)),
                    pointer,
                    first_channel,
                    channels,
                    stride_c,
                    in_size,
                    INTERPOLATION,
                    PADDING,
                    ALIGN_CORNERS,
                    DIMS,
                    COMPUTE,
                    INDEX,
                    EVEN_CHANNELS,
                    BLOCK_CHANNELS,
                    UNROLL,
                )
    return acc


# ---------------------------------------------------------------------------------------- by output
@triton.jit
def may_touch(
    rows,
    block,
    column_blocks,
    tile_low,
    tile_high,
    in_size,
    out_size,
    SOURCE: tl.constexpr,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    OUT_COLUMNS: tl.constexpr,
):
    """Whether outputs of ``block``, [blocks], may read pixels from ``tile_low`` to ``tile_high``."""
    RADIUS: tl.constexpr = 2.0 if INTERPOLATION == BICUBIC else 1.0
    x = (block % column_blocks) * OUT_COLUMNS
    row = (block // column_blocks).to(INDEX) * OUT_ROWS
    first_yz, last_yz = row_range(row, OUT_ROWS, out_size, DIMS)
    first = (x,) + first_yz
    last = (tl.minimum(x + OUT_COLUMNS, out_size[0]) - 1,) + last_yz
    low = ()
    high = ()
    for axis in tl.static_range(DIMS):
        low += (sources.normalised(first[axis], out_size[axis], ALIGN_CORNERS, COMPUTE),)
        high += (sources.normalised(last[axis], out_size[axis], ALIGN_CORNERS, COMPUTE),)
    bounds = image_bounds(rows, low, high, in_size, SOURCE, ALIGN_CORNERS, DIMS, COMPUTE)
    touches = block >= 0
    for axis in tl.static_range(DIMS):
        least = bounds[axis][0] - RADIUS
        most = bounds[axis][1] + RADIUS
        if PADDING == REFLECTION:
            # told only of what lies between two neighbouring mirrors
            fold = fold_of(least, in_size[axis], ALIGN_CORNERS, COMPUTE)
            told = fold == fold_of(most, in_size[axis], ALIGN_CORNERS, COMPUTE)
            one = unfolded(tile_low[axis].to(COMPUTE), fold, in_size[axis], ALIGN_CORNERS, COMPUTE)
            two = unfolded(tile_high[axis].to(COMPUTE), fold, in_size[axis], ALIGN_CORNERS, COMPUTE)
            apart = told & ((most < smaller(one, two)) | (least > larger(one, two)))
        else:
            below = most < tile_low[axis].to(COMPUTE)
            above = least > tile_high[axis].to(COMPUTE)
            if PADDING == BORDER:  # the tile at the border has all that lies beyond
                below = below & (tile_low[axis] > 0)
                above = above & (tile_high[axis] < in_size[axis] - 1)
            apart = below | above
        touches = touches & (apart == 0)
    return touches


@triton.jit
def pixels_read(
    x,
    low,
    high,
    size,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The first and last pixel from ``low`` to ``high`` that each coordinate reads, and whether it does."""
    TAPS: tl.constexpr = axis_tap_count(INTERPOLATION)
    indices, inside, _ = axis_taps(x, size, INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE)
    first = tl.full(x.shape, NOWHERE, tl.int32)
    last = tl.full(x.shape, -1, tl.int32)
    for k in tl.static_range(TAPS):
        here = inside[k] & (indices[k] >= low) & (indices[k] <= high)
        first = tl.where(here, tl.minimum(first, indices[k]), first)
        last = tl.where(here, tl.maximum(last, indices[k]), last)
    return first, last, last >= 0


@triton.jit
def extent(first, last, hit):
    """The range of all lanes that ``hit``, scalars; empty if none does."""
    return (
        tl.min(tl.min(tl.where(hit, first, NOWHERE), 1), 0),
        tl.max(tl.max(tl.where(hit, last, -1), 1), 0),
    )


@triton.jit
def add_block(
    acc,
    block,
    column_blocks,
    tile_low,
    tile_high,
    rows,
    lanes,
    pointer,
    first_channel,
    channels,
    stride_c,
    stride_out,
    in_size,
    out_size,
    SOURCE: tl.constexpr,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    OUT_COLUMNS: tl.constexpr,
):
    """``acc`` plus what one block of outputs adds to the pixels of the tile that it reads."""
    out, mask = output_pixels(block, column_blocks, out_size, DIMS, OUT_ROWS, OUT_COLUMNS, INDEX)
    p = input_coordinates(rows, out, out_size, in_size, SOURCE, ALIGN_CORNERS, DIMS, COMPUTE)
    x0, x1, hit_x = pixels_read(
        p[0], tile_low[0], tile_high[0], in_size[0], INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE
    )
    y0, y1, hit_y = pixels_read(
        p[1], tile_low[1], tile_high[1], in_size[1], INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE
    )
    hit = mask & hit_x & hit_y
    if DIMS == 3:
        z0, z1, hit_z = pixels_read(
            p[2], tile_low[2], tile_high[2], in_size[2], INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE
        )
        hit = hit & hit_z
        first_z, last_z = extent(z0, z1, hit)
    else:
        first_z = 0
        last_z = 0
    first_x, last_x = extent(x0, x1, hit)
    first_y, last_y = extent(y0, y1, hit)
    offset = tl.multiple_of(pixel_offset(out, stride_out, DIMS, INDEX), (VECTOR, VECTOR))
    gradients = ()
    for step in tl.static_range(UNROLL):
        c, exists = channel_block(first_channel + step, channels, BLOCK_CHANNELS, EVEN_CHANNELS, INDEX)
        gradients += (tl.load(pointer + offset + c * stride_c, hit & exists, other=0.0).to(COMPUTE),)
    for z in range(first_z, last_z + 1):
        for y in range(first_y, last_y + 1):
            for x in range(first_x, last_x + 1):
                here = (lanes[0] == x) & (lanes[1] == y)
                q = (x, y)
                if DIMS == 3:
                    here = here & (lanes[2] == z)
                    q = (x, y, z)
                weight = weight_of(p, q, in_size, INTERPOLATION, PADDING, ALIGN_CORNERS, DIMS, COMPUTE)
                weight = tl.where(hit, weight, 0.0)
                new = ()
                for step in tl.static_range(UNROLL):
                    # a gradient that is not read adds nothing, not even a NaN
                    share = tl.where(weight != 0.0, weight * gradients[step], 0.0)
                    share = tl.sum(share, 0, keep_dims=True)
                    new += (acc[step] + tl.where(here, share, 0.0),)
                acc = new
    return acc


@triton.jit
def add_by_output(
    acc,
    rows,
    tile_low,
    tile_high,
    lanes,
    pointer,
    first_channel,
    channels,
    stride_c,
    stride_out,
    in_size,
    out_size,
    SOURCE: tl.constexpr,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    OUT_COLUMNS: tl.constexpr,
):
    column_blocks = tl.cdiv(out_size[0], OUT_COLUMNS)
    out_rows = out_size[1].to(INDEX)
    if DIMS == 3:
        out_rows *= out_size[2]
    blocks = column_blocks * tl.cdiv(out_rows, OUT_ROWS).to(tl.int32)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        touches = may_touch(
            rows,
            tl.minimum(block, blocks - 1),
            column_blocks,
            tile_low,
            tile_high,
            in_size,
            out_size,
            SOURCE,
            INTERPOLATION,
            PADDING,
            ALIGN_CORNERS,
            DIMS,
            COMPUTE,
            INDEX,
            OUT_ROWS,
            OUT_COLUMNS,
        )
        waiting = tl.where(touches & (block < blocks), block, NOWHERE)
        for _ in range(tl.sum((waiting < NOWHERE).to(tl.int32), 0)):
            next_block = tl.min(waiting, 0)
            waiting = tl.where(waiting == next_block, NOWHERE, waiting)
            acc = add_block(
                acc,
                next_block,
                column_blocks,
                tile_low,
                tile_high,
                rows,
                lanes,
                pointer,
                first_channel,
                channels,
                stride_c,
                stride_out,
                in_size,
                out_size,
                SOURCE,
                INTERPOLATION,
                PADDING,
                ALIGN_CORNERS,
                DIMS,
                COMPUTE,
                INDEX,
                VECTOR,
                EVEN_CHANNELS,
                BLOCK_CHANNELS,
                UNROLL,
                OUT_ROWS,
                OUT_COLUMNS,
            )
    return acc


# ------------------------------------------------------------------------------------------- kernel
@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=CHANNEL_STRIDES)
def gather_backward_kernel(
    grad_output_ptr,
    grad_input_ptr,
    source_ptr,
    source_stride_0,
    source_stride_1,
    source_stride_2,
    source_stride_3,
    stride_out_n,
    stride_out_t,
    stride_out_c,
    stride_out_x,
    stride_out_y,
    stride_out_z,
    stride_grad_n,
    stride_grad_c,
    stride_grad_x,
    stride_grad_y,
    stride_grad_z,
    in_width,
    in_height,
    in_depth,
    out_width,
    out_height,
    out_depth,
    transforms,
    channels,
    column_tiles,
    row_tiles,
    splits,
    split_blocks,
    SOURCE: tl.constexpr,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    VECTOR_GRAD: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    OUT_COLUMNS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """d input, every pixel written once, in its own type.

    Arguments as in ``sample_backward_kernel``, but that tiles are of the input: column_tiles, row_tiles. A
    block of outputs has OUT_ROWS x OUT_COLUMNS of them; lanes go through CANDIDATES outputs at most.
    """
    pid = tl.program_id(0)
    tiles = column_tiles * row_tiles
    tile = pid % tiles
    split = (pid // tiles) % splits
    n = (pid // tiles // splits).to(tl.int64)
    source = (source_ptr, source_stride_0, source_stride_1, source_stride_2, source_stride_3, 0)
    in_size = (in_width, in_height, in_depth)
    out_size = (out_width, out_height, out_depth)
    stride_out = (stride_out_x, stride_out_y, stride_out_z)
    stride_grad = (stride_grad_x, stride_grad_y, stride_grad_z)
    q, exists = output_pixels(tile, column_tiles, in_size, DIMS, BLOCK_ROWS, BLOCK_COLUMNS, INDEX)
    # the tile's first and last pixel along each axis
    first_x = (tile % column_tiles) * BLOCK_COLUMNS
    last_x = tl.minimum(first_x + BLOCK_COLUMNS, in_width) - 1
    first_row = (tile // column_tiles).to(INDEX) * BLOCK_ROWS
    first_yz, last_yz = row_range(first_row, BLOCK_ROWS, in_size, DIMS)
    tile_low = (first_x,) + first_yz
    tile_high = (last_x,) + last_yz
    target = grad_input_ptr + tl.multiple_of(n * stride_grad_n, VECTOR_GRAD)
    target += tl.multiple_of(pixel_offset(q, stride_grad, DIMS, INDEX), (VECTOR_GRAD, VECTOR_GRAD))
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(channels, BLOCK_CHANNELS * UNROLL))
    # Planar tiles take many blocks of channels to one transform: these share its search. (With channels last
    # the pixels found would be carried in another layout than vectors have, and exchanged in the inner loop.)
    SHARED: tl.constexpr = BLOCK_CHANNELS == 1
    if SHARED:
        rows, known, visits = search(
            source,
            n,
            0,
            q,
            exists,
            in_size,
            out_size,
            SOURCE,
            INTERPOLATION,
            PADDING,
            ALIGN_CORNERS,
            DIMS,
            COMPUTE,
        )
    for block in range(first, last):
        acc = ()
        for _ in tl.static_range(UNROLL):
            acc += (tl.zeros([BLOCK_ROWS * BLOCK_COLUMNS, BLOCK_CHANNELS], COMPUTE),)
        for t in range(transforms):
            if SHARED:
                if transforms > 1:
                    rows, known, visits = search(
                        source,
                        n,
                        t,
                        q,
                        exists,
                        in_size,
                        out_size,
                        SOURCE,
                        INTERPOLATION,
                        PADDING,
                        ALIGN_CORNERS,
                        DIMS,
                        COMPUTE,
                    )
            else:
                rows, known, visits = search(
                    source,
                    n,
                    t,
                    q,
                    exists,
                    in_size,
                    out_size,
                    SOURCE,
                    INTERPOLATION,
                    PADDING,
                    ALIGN_CORNERS,
                    DIMS,
                    COMPUTE,
                )
            pointer = grad_output_ptr + tl.multiple_of(
                n * stride_out_n + tl.cast(t, tl.int64) * stride_out_t, VECTOR_OUT
            )
            if visits <= CANDIDATES:
                if PADDING == REFLECTION:
                    bounds, ranges, number = known
                    for i in range(number.to(tl.int32)):
                        fold = fold_number(i, ranges, DIMS)
                        first_out, most = candidates(
                            rows,
                            bounds,
                            q,
                            exists,
                            fold,
                            in_size,
                            out_size,
                            SOURCE,
                            INTERPOLATION,
                            PADDING,
                            ALIGN_CORNERS,
                            DIMS,
                            COMPUTE,
                        )
                        acc = add_by_pixel(
                            acc,
                            rows,
                            q,
                            fold,
                            first_out,
                            most,
                            pointer,
                            block * UNROLL,
                            channels,
                            stride_out_c,
                            stride_out,
                            in_size,
                            out_size,
                            SOURCE,
                            INTERPOLATION,
                            PADDING,
                            ALIGN_CORNERS,
                            DIMS,
                            COMPUTE,
                            INDEX,
                            VECTOR_OUT,
                            EVEN_CHANNELS,
                            BLOCK_CHANNELS,
                            UNROLL,
                        )
                else:
                    first_out, most = known
                    acc = add_by_pixel(
                        acc,
                        rows,
                        q,
                        (0, 0, 0),
                        first_out,
                        most,
                        pointer,
                        block * UNROLL,
                        channels,
                        stride_out_c,
                        stride_out,
                        in_size,
                        out_size,
                        SOURCE,
                        INTERPOLATION,
                        PADDING,
                        ALIGN_CORNERS,
                        DIMS,
                        COMPUTE,
                        INDEX,
                        VECTOR_OUT,
                        EVEN_CHANNELS,
                        BLOCK_CHANNELS,
                        UNROLL,
                    )
            else:
                acc = add_by_output(
                    acc,
                    rows,
                    tile_low,
                    tile_high,
                    q,
                    pointer,
                    block * UNROLL,
                    channels,
                    stride_out_c,
                    stride_out,
                    in_size,
                    out_size,
                    SOURCE,
                    INTERPOLATION,
                    PADDING,
                    ALIGN_CORNERS,
                    DIMS,
                    COMPUTE,
                    INDEX,
                    VECTOR_OUT,
                    EVEN_CHANNELS,
                    BLOCK_CHANNELS,
                    UNROLL,
                    OUT_ROWS,
                    OUT_COLUMNS,
                )
        for step in tl.static_range(UNROLL):
            c, real = channel_block(block * UNROLL + step, channels, BLOCK_CHANNELS, EVEN_CHANNELS, INDEX)
            tl.store(target + c * stride_grad_c, rounded(acc[step], grad_input_ptr), exists & real)


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
    tile, ways = configs.choose_gather(grad_output.device, problem)
    block = tile.channels * tile.unroll
    blocks = triton.cdiv(channels, block)
    split_blocks = triton.cdiv(blocks, tile.splits)
    splits = triton.cdiv(blocks, split_blocks)
    column_tiles, row_tiles = triton.cdiv(columns, tile.columns), triton.cdiv(rows, tile.rows)
    stride_grad_n, _, *stride_grad = strides(grad_input, dims)
    return Plan(
        gather_backward_kernel,
        batch * splits * column_tiles * row_tiles,
        grad_input.device,
        grad_output,
        grad_input,
        *sources.pack(source, params, None)[:5],
        *strides(grad_output, dims),
        stride_grad_n,
        *stride_grad,
        **dict(zip(("in_width", "in_height", "in_depth"), axes(grad_input.shape[2:]))),
        **dict(zip(("out_width", "out_height", "out_depth"), axes(grad_output.shape[-dims:]))),
        transforms=grad_output.shape[1] if grad_output.dim() > grad_input.dim() else 1,
        channels=channels,
        column_tiles=column_tiles,
        row_tiles=row_tiles,
        splits=splits,
        split_blocks=split_blocks,
        SOURCE=int(source),
        INTERPOLATION=int(interpolation),
        PADDING=int(padding),
        ALIGN_CORNERS=int(align_corners),
        DIMS=dims,
        COMPUTE=compute_dtypes(grad_input, params)[0],
        INDEX=index_dtype(
            grad_output, grad_input, params, rows=max(rows, grad_output.shape[-dims:-1].numel())
        ),
        VECTOR_OUT=vector_width(grad_output, dims),
        VECTOR_GRAD=vector_width(grad_input, dims),
        EVEN_CHANNELS=channels % block == 0,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        BLOCK_CHANNELS=tile.channels,
        UNROLL=tile.unroll,
        OUT_ROWS=ways.out_rows,
        OUT_COLUMNS=ways.out_columns,
        CANDIDATES=ways.candidates,
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
