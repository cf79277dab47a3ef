"""The sampler: one kernel forward, one backward, for every source, interpolation and padding.

Forward, per output pixel o of transform t of image n, with p = unnormalise(source(o)) in input pixels:

    output[n, t, c, o] = sum over taps k of  weight_k(p) input[n, c, index_k(p)]

Backward, from g = d loss / d output:

    d input[n, c, index_k(p)] += weight_k(p) g[n, t, c, o]
    d p                        = sum over c and k of  weight_k'(p) input[n, c, index_k(p)] g[n, t, c, o]

and d p, times the derivative of the un-normalisation, goes on to the source (``sources.backward``).
Pixels are a column and channels a row of every block: shapes are [pixels, 1], [1, channels] and
[pixels, channels].
"""

import torch
import triton
import triton.language as tl

from . import configs, sources
from .coordinates import COMPILED, NEAREST, constant
from .interpolation import axis_tap_count, axis_taps, axis_taps_grad, tap_margins, taps_in_a_row
from .launch import (
    INT32_MAX,
    Plan,
    channel_dim,
    compute_dtypes,
    index_dtype,
    planned,
    vector_width,
)
from .modes import Source
from .preimage import image_bounds
from .tiles import (
    axes,
    existing,
    first_row,
    pixel_offset,
    pixels_from,
    place_of_program,
    rounded,
    row_count,
    row_range,
    steps_from,
    strides,
)

# Sizes, strides and counts never make a new kernel: only the constexprs do, and whether the channels' stride
# or that along x is 1. (Tuples would be shorter, but Triton specialises what is in them.)
UNSPECIALIZED = (
    "source_ptr",
    "control_ptr",
    "controls",
    "grad_source_ptr",
    *(f"source_stride_{i}" for i in range(5)),
    *(f"stride_{tensor}_{axis}" for tensor in ("in", "out", "grad") for axis in "ntxyz"),
    *(f"{tensor}_{size}" for tensor in ("in", "out") for size in ("width", "height", "depth")),
    "batch",
    "transforms",
    "channels",
    "column_tiles",
    "row_tiles",
    "splits",
    "split_blocks",
    "steps",
)
CHANNEL_STRIDES = ("stride_in_c", "stride_out_c", "stride_grad_c")
# Where the taps in a row are neighbours in memory, one address serves them all.
ROW_STRIDES = ("stride_in_x", "stride_grad_x")
SPECIALIZATION = {
    "do_not_specialize": [name for name in UNSPECIALIZED if name not in ROW_STRIDES],
    "do_not_specialize_on_alignment": CHANNEL_STRIDES + ROW_STRIDES,
}


# ``reads_inside`` costs about as much as it saves in two blocks of pixels and channels. (In the interpreter,
# which has no costs that matter, both ways are taken.)
WORTH_TELLING = constant(3 if COMPILED else 1)


@triton.jit
def tap_offset(ix, iy, iz, strides, VECTOR: tl.constexpr, DIMS: tl.constexpr, INDEX: tl.constexpr):
    """The offset of one input pixel; a multiple of VECTOR, which lets channels be read in vectors."""
    offset = ix.to(INDEX) * strides[0] + iy.to(INDEX) * strides[1]
    if DIMS == 3:
        offset += iz.to(INDEX) * strides[2]
    return tl.multiple_of(offset, (VECTOR, VECTOR))


@triton.jit
def tap_pointer(
    plane,
    x,
    y,
    z,
    kx: tl.constexpr,
    ky: tl.constexpr,
    kz: tl.constexpr,
    strides,
    INTERPOLATION: tl.constexpr,
    INSIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Where tap (kx, ky, kz) of the channels that ``plane`` points to is."""
    # where x is innermost, the distance of taps in a row is a constant, and part of the load instruction
    if taps_in_a_row(INTERPOLATION, INSIDE) and VECTOR == 1:
        row = plane + tap_offset(x[0][0], y[0][ky], z[0][kz], strides, VECTOR, DIMS, INDEX)
        return row + kx * tl.cast(strides[0], INDEX)
    else:
        return plane + tap_offset(x[0][kx], y[0][ky], z[0][kz], strides, VECTOR, DIMS, INDEX)


@triton.jit
def taps_of_axes(
    p,
    in_size,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    INSIDE: tl.constexpr = False,
):
    """``axis_taps`` of x, y and z; in 2-D z is one tap of weight 1."""
    x = axis_taps(p[0], in_size[0], INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE, INSIDE)
    y = axis_taps(p[1], in_size[1], INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE, INSIDE)
    if DIMS == 3:
        return x, y, axis_taps(p[2], in_size[2], INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE, INSIDE)
    else:
        return x, y, ((0,), (True,), (1.0,))


@triton.jit
def slopes_of_axes(
    p,
    in_size,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    INSIDE: tl.constexpr = False,
):
    """``axis_taps_grad`` of x, y and z; in 2-D nothing depends on z."""
    x = axis_taps_grad(p[0], in_size[0], INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE, INSIDE)
    y = axis_taps_grad(p[1], in_size[1], INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE, INSIDE)
    if DIMS == 3:
        return x, y, axis_taps_grad(p[2], in_size[2], INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE, INSIDE)
    else:
        return x, y, (0.0,)


@triton.jit
def channel_block(
    block, channels, BLOCK_CHANNELS: tl.constexpr, EVEN_CHANNELS: tl.constexpr, INDEX: tl.constexpr
):
    """The channels of a block, [1, channels], and which of them exist."""
    c = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    if EVEN_CHANNELS:
        exists = tl.full([1, BLOCK_CHANNELS], True, tl.int1)
    else:
        exists = c < channels
    return c.to(INDEX), exists


@triton.constexpr_function
def tells_inside(source, interpolation, dims, compute):
    """Whether a kernel has a second way for blocks that read nothing outside the image.

    Of matrices that is known in advance. Of 64 taps two ways would be a large program, and float64 is bound
    by its arithmetic.
    """
    taps = axis_tap_count(interpolation) ** dims
    return source in (Source.AFFINE, Source.PROJECTIVE) and taps <= 16 and compute == tl.float32


@triton.jit
def reads_inside(
    matrix,
    column,
    row,
    rows,
    in_size,
    out_size,
    SOURCE: tl.constexpr,
    INTERPOLATION: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Whether all pixels of a block of ``rows`` x BLOCK_COLUMNS exist, and all their taps lie in the image.

    ``image_bounds`` hold for the coordinates as they are computed. False if in doubt, as with NaN.
    """
    first_yz, last_yz = row_range(row, rows, out_size, DIMS)
    first = (column,) + first_yz
    columns = out_size[0] - column  # differences, as sums may pass 2^31
    last = (column + tl.minimum(columns, BLOCK_COLUMNS) - 1,) + last_yz
    low = ()
    high = ()
    for axis in tl.static_range(DIMS):
        low += (sources.normalised(first[axis], out_size[axis], ALIGN_CORNERS, COMPUTE),)
        high += (sources.normalised(last[axis], out_size[axis], ALIGN_CORNERS, COMPUTE),)
    bounds = image_bounds(matrix, low, high, in_size, SOURCE, ALIGN_CORNERS, DIMS, COMPUTE)
    inside = (columns >= BLOCK_COLUMNS) & (row_count(out_size, row, DIMS) - row >= rows)
    below, above = tap_margins(INTERPOLATION)
    for axis in tl.static_range(DIMS):
        inside = inside & (bounds[axis][0] > below) & (bounds[axis][1] < in_size[axis].to(COMPUTE) - above)
        inside = inside & (in_size[axis] <= 2**24)  # a float is then any pixel's number
    return inside


@triton.jit
def blocks_of(split, split_blocks, channels, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr):
    """The first block of channels of a program, and the one after its last.

    Loops go over blocks, not channels: that a block begins at a multiple of its size is then plain to see.
    """
    if ONE_BLOCK:
        return 0, 1
    else:
        first = split * split_blocks
        return first, tl.minimum(first + split_blocks, tl.cdiv(channels, BLOCK))


@triton.jit
def interpolate(
    plane,
    x,
    y,
    z,
    strides,
    exists,
    INTERPOLATION: tl.constexpr,
    VECTOR: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
    INSIDE: tl.constexpr = False,
):
    """The samples of the channels that ``plane`` points to, [pixels, channels]."""
    TAPS: tl.constexpr = axis_tap_count(INTERPOLATION)
    TAPS_Z: tl.constexpr = TAPS if DIMS == 3 else 1
    value = tl.zeros([x[0][0].shape[0], plane.shape[1]], COMPUTE)
    for kz in tl.static_range(TAPS_Z):
        for ky in tl.static_range(TAPS):
            for kx in tl.static_range(TAPS):
                pointer = tap_pointer(
                    plane, x, y, z, kx, ky, kz, strides, INTERPOLATION, INSIDE, VECTOR, DIMS, INDEX
                )
                inside = exists & z[1][kz] & y[1][ky] & x[1][kx]
                pixel = tl.load(pointer, inside, other=0.0).to(COMPUTE)
                if INTERPOLATION == NEAREST:
                    value = pixel
                else:
                    value += (x[2][kx] * y[2][ky] * z[2][kz]) * pixel
    return value


@triton.jit
def interpolate_grad(
    plane,
    x,
    y,
    z,
    slopes_x,
    slopes_y,
    slopes_z,
    strides,
    exists,
    INTERPOLATION: tl.constexpr,
    VECTOR: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
    INSIDE: tl.constexpr = False,
):
    """The derivatives of ``interpolate`` by x, y and z, built up axis by axis."""
    TAPS: tl.constexpr = axis_tap_count(INTERPOLATION)
    TAPS_Z: tl.constexpr = TAPS if DIMS == 3 else 1
    zero = tl.zeros([x[0][0].shape[0], plane.shape[1]], COMPUTE)
    by_x = zero
    by_y = zero
    by_z = zero
    for kz in tl.static_range(TAPS_Z):
        plane_by_x = zero
        plane_by_y = zero
        plane_value = zero
        for ky in tl.static_range(TAPS):
            row_by_x = zero
            row_value = zero
            for kx in tl.static_range(TAPS):
                pointer = tap_pointer(
                    plane, x, y, z, kx, ky, kz, strides, INTERPOLATION, INSIDE, VECTOR, DIMS, INDEX
                )
                inside = exists & z[1][kz] & y[1][ky] & x[1][kx]
                pixel = tl.load(pointer, inside, other=0.0).to(COMPUTE)
                row_by_x += slopes_x[kx] * pixel
                row_value += x[2][kx] * pixel
            plane_by_x += y[2][ky] * row_by_x
            plane_by_y += slopes_y[ky] * row_value
            plane_value += y[2][ky] * row_value
        by_x += z[2][kz] * plane_by_x
        by_y += z[2][kz] * plane_by_y
        by_z += slopes_z[kz] * plane_value
    return by_x, by_y, by_z


@triton.jit
def scatter(
    plane,
    g,
    x,
    y,
    z,
    strides,
    exists,
    INTERPOLATION: tl.constexpr,
    VECTOR: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    INSIDE: tl.constexpr = False,
):
    """The transpose of ``interpolate``: adds ``g``, [pixels, channels], to the pixels it was read from."""
    TAPS: tl.constexpr = axis_tap_count(INTERPOLATION)
    TAPS_Z: tl.constexpr = TAPS if DIMS == 3 else 1
    for kz in tl.static_range(TAPS_Z):
        for ky in tl.static_range(TAPS):
            for kx in tl.static_range(TAPS):
                pointer = tap_pointer(
                    plane, x, y, z, kx, ky, kz, strides, INTERPOLATION, INSIDE, VECTOR, DIMS, INDEX
                )
                inside = exists & z[1][kz] & y[1][ky] & x[1][kx]
                weight = x[2][kx] * y[2][ky] * z[2][kz]
                # relaxed: the sums need no order between memory operations, and a fence each is slow
                tl.atomic_add(pointer, weight * g, inside, sem="relaxed")


@triton.jit
def forward_block(
    input,
    output,
    source,
    matrix,
    control_ptr,
    controls,
    outputs,
    b,
    batch,
    column,
    row,
    first,
    last,
    in_size,
    out_size,
    channels,
    SOURCE: tl.constexpr,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    GROUP: tl.constexpr,
    VECTOR_IN: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """The samples of the block of pixels at ``column`` and ``row``; INSIDE as ``reads_inside`` tells.

    input, output: pointers and their strides, by image, [transform,] channel and (x, y, z).
    """
    input_ptr, stride_in_n, stride_in_c, stride_in = input
    output_ptr, stride_out_n, stride_out_t, stride_out_c, stride_out = output
    out, mask = pixels_from(column, row, out_size, DIMS, BLOCK_ROWS, BLOCK_COLUMNS, INDEX)
    p = sources.input_pixels(
        source,
        matrix,
        control_ptr,
        controls,
        outputs,
        out,
        out_size,
        in_size,
        mask,
        SOURCE,
        GROUP,
        ALIGN_CORNERS,
        DIMS,
        INDEX,
        COMPUTE,
    )
    target_offset = tl.multiple_of(pixel_offset(out, stride_out, DIMS, INDEX), (VECTOR_OUT, VECTOR_OUT))
    for g in tl.static_range(GROUP):
        n, t = outputs[g]
        x, y, z = taps_of_axes(p[g], in_size, INTERPOLATION, PADDING, ALIGN_CORNERS, DIMS, COMPUTE, INSIDE)
        image = input_ptr + tl.multiple_of(n * stride_in_n, VECTOR_IN)
        target = output_ptr + tl.multiple_of(n * stride_out_n + t * stride_out_t, VECTOR_OUT) + target_offset
        if INSIDE:
            kept = tl.full(mask.shape, True, tl.int1)
        else:
            kept = existing(mask, b + g, batch)
        for block in range(first, last):
            # all loads before the first store, behind which the compiler may not move them
            values = ()
            for step in tl.static_range(UNROLL):
                c, exists = channel_block(
                    block * UNROLL + step, channels, BLOCK_CHANNELS, EVEN_CHANNELS, INDEX
                )
                plane = image + c * stride_in_c
                values += (
                    interpolate(
                        plane,
                        x,
                        y,
                        z,
                        stride_in,
                        exists,
                        INTERPOLATION,
                        VECTOR_IN,
                        DIMS,
                        INDEX,
                        COMPUTE,
                        INSIDE,
                    ),
                )
            for step in tl.static_range(UNROLL):
                c, exists = channel_block(
                    block * UNROLL + step, channels, BLOCK_CHANNELS, EVEN_CHANNELS, INDEX
                )
                tl.store(target + c * stride_out_c, rounded(values[step], output_ptr), kept & exists)


@triton.jit(**SPECIALIZATION)
def sample_forward_kernel(
    input_ptr,
    output_ptr,
    source_ptr,
    source_stride_0,
    source_stride_1,
    source_stride_2,
    source_stride_3,
    source_stride_4,
    control_ptr,
    controls,
    stride_in_n,
    stride_in_c,
    stride_in_x,
    stride_in_y,
    stride_in_z,
    stride_out_n,
    stride_out_t,
    stride_out_c,
    stride_out_x,
    stride_out_y,
    stride_out_z,
    in_width,
    in_height,
    in_depth,
    out_width,
    out_height,
    out_depth,
    batch,
    transforms,
    channels,
    column_tiles,
    row_tiles,
    splits,
    split_blocks,
    steps,
    SOURCE: tl.constexpr,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    GROUP: tl.constexpr,
    VECTOR_IN: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """output = sample(input, source).

    input_ptr, output_ptr: one image is addressed in INDEX, the images in int64.
    source_*, control_ptr, controls: what ``sources.pack`` gave.
    stride_in_*: strides of the input by image, channel, x, y and z.
    stride_out_*: those of the output, by image, transform, channel, x, y and z.
    in_*, out_*: sizes. In 2-D whatever belongs to z is 0 and unused.
    batch, transforms: outputs in all, and for each image. A program does GROUP of them.
    column_tiles, row_tiles: pixel tiles of one output, each of ``steps`` blocks of pixels, one below the
        other.
    splits, split_blocks: programs per pixel tile, and how many blocks of channels each of them does.
    VECTOR_IN, VECTOR_OUT: every offset of a pixel is a multiple of this many elements.
    EVEN_CHANNELS: channels is a multiple of BLOCK_CHANNELS * UNROLL, a block. ONE_BLOCK: it is at most one.
    """
    column_tile, row_tile, split, group = place_of_program(column_tiles, row_tiles, splits)
    b = group * GROUP
    source = (source_ptr, source_stride_0, source_stride_1, source_stride_2, source_stride_3, source_stride_4)
    in_size = (in_width, in_height, in_depth)
    out_size = (out_width, out_height, out_depth)
    stride_in = (stride_in_x, stride_in_y, stride_in_z)
    stride_out = (stride_out_x, stride_out_y, stride_out_z)
    outputs = sources.outputs_of(b, batch, transforms, GROUP)
    matrix = sources.matrix_for(source, outputs, SOURCE, DIMS, COMPUTE)
    column = column_tile * BLOCK_COLUMNS
    if SOURCE == sources.TPS:
        steps = 1  # known here, so that there is no loop out of which the group's addresses would be moved
    row = first_row(row_tile, steps * BLOCK_ROWS, DIMS, INDEX)
    if SOURCE != sources.TPS:
        steps = steps_from(row, steps, out_size, BLOCK_ROWS, DIMS)
    first, last = blocks_of(split, split_blocks, channels, BLOCK_CHANNELS * UNROLL, ONE_BLOCK)
    inside = False
    if tells_inside(SOURCE, INTERPOLATION, DIMS, COMPUTE):
        inside = steps * (last - first) >= WORTH_TELLING
        if inside:
            inside = reads_inside(
                matrix,
                column,
                row,
                steps * BLOCK_ROWS,
                in_size,
                out_size,
                SOURCE,
                INTERPOLATION,
                ALIGN_CORNERS,
                DIMS,
                COMPUTE,
                BLOCK_COLUMNS,
            )
    if inside:
        for step in range(steps):
            forward_block(
                (input_ptr, stride_in_n, stride_in_c, stride_in),
                (output_ptr, stride_out_n, stride_out_t, stride_out_c, stride_out),
                source,
                matrix,
                control_ptr,
                controls,
                outputs,
                b,
                batch,
                column,
                row + step * BLOCK_ROWS,
                first,
                last,
                in_size,
                out_size,
                channels,
                SOURCE,
                INTERPOLATION,
                PADDING,
                ALIGN_CORNERS,
                DIMS,
                COMPUTE,
                INDEX,
                GROUP,
                VECTOR_IN,
                VECTOR_OUT,
                EVEN_CHANNELS,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_CHANNELS,
                UNROLL,
                True,
            )
    else:
        for step in range(steps):
            forward_block(
                (input_ptr, stride_in_n, stride_in_c, stride_in),
                (output_ptr, stride_out_n, stride_out_t, stride_out_c, stride_out),
                source,
                matrix,
                control_ptr,
                controls,
                outputs,
                b,
                batch,
                column,
                row + step * BLOCK_ROWS,
                first,
                last,
                in_size,
                out_size,
                channels,
                SOURCE,
                INTERPOLATION,
                PADDING,
                ALIGN_CORNERS,
                DIMS,
                COMPUTE,
                INDEX,
                GROUP,
                VECTOR_IN,
                VECTOR_OUT,
                EVEN_CHANNELS,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_CHANNELS,
                UNROLL,
                False,
            )


@triton.jit
def backward_block(
    grad_output,
    input,
    grad_input,
    grad_source_ptr,
    sums,
    source,
    matrix,
    control_ptr,
    controls,
    outputs,
    b,
    batch,
    column,
    row,
    first,
    last,
    split,
    program,
    programs,
    in_size,
    out_size,
    channels,
    SOURCE: tl.constexpr,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    GROUP: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
    SOURCE_GRAD: tl.constexpr,
    CONTROL_GRAD: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    VECTOR_IN: tl.constexpr,
    VECTOR_GRAD: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """What the block of pixels at ``column`` and ``row`` adds to d input and d source.

    grad_output, input, grad_input: pointers and their strides, as in ``forward_block``. Returns ``sums`` with
    a matrix's share added; INSIDE as ``reads_inside`` tells.
    """
    grad_output_ptr, stride_out_n, stride_out_t, stride_out_c, stride_out = grad_output
    input_ptr, stride_in_n, stride_in_c, stride_in = input
    grad_input_ptr, stride_grad_n, stride_grad_c, stride_grad = grad_input
    out, mask = pixels_from(column, row, out_size, DIMS, BLOCK_ROWS, BLOCK_COLUMNS, INDEX)
    p = sources.input_pixels(
        source,
        matrix,
        control_ptr,
        controls,
        outputs,
        out,
        out_size,
        in_size,
        mask,
        SOURCE,
        GROUP,
        ALIGN_CORNERS,
        DIMS,
        INDEX,
        COMPUTE,
    )
    target_offset = tl.multiple_of(pixel_offset(out, stride_out, DIMS, INDEX), (VECTOR_OUT, VECTOR_OUT))
    by_pixels = ()
    for g in tl.static_range(GROUP):
        n, t = outputs[g]
        x, y, z = taps_of_axes(p[g], in_size, INTERPOLATION, PADDING, ALIGN_CORNERS, DIMS, COMPUTE, INSIDE)
        if SOURCE_GRAD:
            slopes_x, slopes_y, slopes_z = slopes_of_axes(
                p[g], in_size, INTERPOLATION, PADDING, ALIGN_CORNERS, DIMS, COMPUTE, INSIDE
            )
        image = input_ptr + tl.multiple_of(n * stride_in_n, VECTOR_IN)
        grad_image = grad_input_ptr + tl.multiple_of(n * stride_grad_n, VECTOR_GRAD)
        target = (
            grad_output_ptr + tl.multiple_of(n * stride_out_n + t * stride_out_t, VECTOR_OUT) + target_offset
        )
        if INSIDE:
            kept = tl.full(mask.shape, True, tl.int1)
        else:
            kept = existing(mask, b + g, batch)
        # held by channel until the end: one reduction in all, not one for each block of channels
        grad_x = tl.zeros([BLOCK_ROWS * BLOCK_COLUMNS, BLOCK_CHANNELS], COMPUTE)
        grad_y = tl.zeros([BLOCK_ROWS * BLOCK_COLUMNS, BLOCK_CHANNELS], COMPUTE)
        grad_z = tl.zeros([BLOCK_ROWS * BLOCK_COLUMNS, BLOCK_CHANNELS], COMPUTE)
        for block in range(first, last):
            # all loads before the first atomic, behind which the compiler may not move them
            gradients = ()
            for step in tl.static_range(UNROLL):
                c, exists = channel_block(
                    block * UNROLL + step, channels, BLOCK_CHANNELS, EVEN_CHANNELS, INDEX
                )
                gradients += (tl.load(target + c * stride_out_c, kept & exists, other=0.0).to(COMPUTE),)
            if SOURCE_GRAD:
                for step in tl.static_range(UNROLL):
                    c, exists = channel_block(
                        block * UNROLL + step, channels, BLOCK_CHANNELS, EVEN_CHANNELS, INDEX
                    )
                    by_x, by_y, by_z = interpolate_grad(
                        image + c * stride_in_c,
                        x,
                        y,
                        z,
                        slopes_x,
                        slopes_y,
                        slopes_z,
                        stride_in,
                        exists,
                        INTERPOLATION,
                        VECTOR_IN,
                        DIMS,
                        INDEX,
                        COMPUTE,
                        INSIDE,
                    )
                    grad_x += gradients[step] * by_x
                    grad_y += gradients[step] * by_y
                    grad_z += gradients[step] * by_z
            if INPUT_GRAD:
                for step in tl.static_range(UNROLL):
                    c, exists = channel_block(
                        block * UNROLL + step, channels, BLOCK_CHANNELS, EVEN_CHANNELS, INDEX
                    )
                    plane = grad_image + c * stride_grad_c
                    scatter(
                        plane,
                        gradients[step],
                        x,
                        y,
                        z,
                        stride_grad,
                        kept & exists,
                        INTERPOLATION,
                        VECTOR_GRAD,
                        DIMS,
                        INDEX,
                        INSIDE,
                    )
        # pixels that do not exist read real memory, which may hold a NaN: they count as 0
        grad_x = tl.where(kept, tl.sum(grad_x, 1, keep_dims=True), 0.0)
        grad_y = tl.where(kept, tl.sum(grad_y, 1, keep_dims=True), 0.0)
        grad_z = tl.where(kept, tl.sum(grad_z, 1, keep_dims=True), 0.0)
        by_pixels += ((grad_x, grad_y, grad_z),)
    if SOURCE_GRAD:
        sums = sources.input_pixels_backward(
            grad_source_ptr,
            sums,
            source,
            matrix,
            control_ptr,
            controls,
            outputs,
            by_pixels,
            out,
            out_size,
            in_size,
            mask,
            b,
            batch,
            split,
            program,
            programs,
            SOURCE,
            GROUP,
            CONTROL_GRAD,
            ALIGN_CORNERS,
            DIMS,
            INDEX,
            COMPUTE,
        )
    return sums


@triton.jit(**SPECIALIZATION)
def sample_backward_kernel(
    grad_output_ptr,
    input_ptr,
    grad_input_ptr,
    grad_source_ptr,
    source_ptr,
    source_stride_0,
    source_stride_1,
    source_stride_2,
    source_stride_3,
    source_stride_4,
    control_ptr,
    controls,
    stride_out_n,
    stride_out_t,
    stride_out_c,
    stride_out_x,
    stride_out_y,
    stride_out_z,
    stride_in_n,
    stride_in_c,
    stride_in_x,
    stride_in_y,
    stride_in_z,
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
    batch,
    transforms,
    channels,
    column_tiles,
    row_tiles,
    splits,
    split_blocks,
    steps,
    SOURCE: tl.constexpr,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    GROUP: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
    SOURCE_GRAD: tl.constexpr,
    CONTROL_GRAD: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    VECTOR_IN: tl.constexpr,
    VECTOR_GRAD: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """d input by scatter and d source, either or both.

    grad_output_ptr: read with stride_out_*.
    input_ptr: read with stride_in_*, only for SOURCE_GRAD.
    grad_input_ptr: zero-filled, in COMPUTE; added to with stride_grad_*, only for INPUT_GRAD.
    grad_source_ptr: the buffer of ``sources.gradient_buffer``, only for SOURCE_GRAD; with room for the
        control points' gradient for CONTROL_GRAD. The rest as in ``sample_forward_kernel``.
    """
    column_tile, row_tile, split, group = place_of_program(column_tiles, row_tiles, splits)
    b = group * GROUP
    source = (source_ptr, source_stride_0, source_stride_1, source_stride_2, source_stride_3, source_stride_4)
    in_size = (in_width, in_height, in_depth)
    out_size = (out_width, out_height, out_depth)
    stride_in = (stride_in_x, stride_in_y, stride_in_z)
    stride_out = (stride_out_x, stride_out_y, stride_out_z)
    stride_grad = (stride_grad_x, stride_grad_y, stride_grad_z)
    outputs = sources.outputs_of(b, batch, transforms, GROUP)
    matrix = sources.matrix_for(source, outputs, SOURCE, DIMS, COMPUTE)
    column = column_tile * BLOCK_COLUMNS
    if SOURCE == sources.TPS:
        steps = 1  # known here, so that there is no loop out of which the group's addresses would be moved
    row = first_row(row_tile, steps * BLOCK_ROWS, DIMS, INDEX)
    if SOURCE != sources.TPS:
        steps = steps_from(row, steps, out_size, BLOCK_ROWS, DIMS)
    first, last = blocks_of(split, split_blocks, channels, BLOCK_CHANNELS * UNROLL, ONE_BLOCK)
    tiles = column_tiles * row_tiles
    program = split * tiles + row_tile * column_tiles + column_tile
    programs = splits * tiles
    sums = ()
    if SOURCE_GRAD:
        sums = sources.zero_sums(SOURCE, DIMS, BLOCK_ROWS * BLOCK_COLUMNS, COMPUTE)
    inside = False
    if tells_inside(SOURCE, INTERPOLATION, DIMS, COMPUTE):
        inside = steps * (last - first) >= WORTH_TELLING
        if inside:
            inside = reads_inside(
                matrix,
                column,
                row,
                steps * BLOCK_ROWS,
                in_size,
                out_size,
                SOURCE,
                INTERPOLATION,
                ALIGN_CORNERS,
                DIMS,
                COMPUTE,
                BLOCK_COLUMNS,
            )
    if inside:
        for step in range(steps):
            sums = backward_block(
                (grad_output_ptr, stride_out_n, stride_out_t, stride_out_c, stride_out),
                (input_ptr, stride_in_n, stride_in_c, stride_in),
                (grad_input_ptr, stride_grad_n, stride_grad_c, stride_grad),
                grad_source_ptr,
                sums,
                source,
                matrix,
                control_ptr,
                controls,
                outputs,
                b,
                batch,
                column,
                row + step * BLOCK_ROWS,
                first,
                last,
                split,
                program,
                programs,
                in_size,
                out_size,
                channels,
                SOURCE,
                INTERPOLATION,
                PADDING,
                ALIGN_CORNERS,
                DIMS,
                COMPUTE,
                INDEX,
                GROUP,
                INPUT_GRAD,
                SOURCE_GRAD,
                CONTROL_GRAD,
                VECTOR_OUT,
                VECTOR_IN,
                VECTOR_GRAD,
                EVEN_CHANNELS,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_CHANNELS,
                UNROLL,
                True,
            )
    else:
        for step in range(steps):
            sums = backward_block(
                (grad_output_ptr, stride_out_n, stride_out_t, stride_out_c, stride_out),
                (input_ptr, stride_in_n, stride_in_c, stride_in),
                (grad_input_ptr, stride_grad_n, stride_grad_c, stride_grad),
                grad_source_ptr,
                sums,
                source,
                matrix,
                control_ptr,
                controls,
                outputs,
                b,
                batch,
                column,
                row + step * BLOCK_ROWS,
                first,
                last,
                split,
                program,
                programs,
                in_size,
                out_size,
                channels,
                SOURCE,
                INTERPOLATION,
                PADDING,
                ALIGN_CORNERS,
                DIMS,
                COMPUTE,
                INDEX,
                GROUP,
                INPUT_GRAD,
                SOURCE_GRAD,
                CONTROL_GRAD,
                VECTOR_OUT,
                VECTOR_IN,
                VECTOR_GRAD,
                EVEN_CHANNELS,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_CHANNELS,
                UNROLL,
                False,
            )
    if SOURCE_GRAD:
        sources.store_sums(grad_source_ptr, sums, b, program, programs, SOURCE, DIMS)


# ------------------------------------------------------------------------------------ launchers
def _plan(
    kernel,
    gathered,
    output,
    params,
    tensors,
    source,
    interpolation,
    backward,
    dense=False,
    stepped=False,
) -> tuple[int, int, int, dict]:
    """Outputs, programs for each group of them, programs that share its channels, and shared arguments.

    ``gathered`` is the image that is read or added to at the sampled coordinates: its layout decides.
    ``dense``: a gradient by the coordinates is written out as it is, whatever the source. ``stepped``: the
    kernel goes through several blocks of pixels.
    """
    dims = gathered.dim() - 2
    batch = output.shape[: channel_dim(output, dims)].numel()
    channels = gathered.shape[1]
    columns = output.shape[-1]
    rows = output.shape[-dims:-1].numel()
    problem = configs.Problem(
        kernel=kernel,
        source=source,
        images=batch,
        channels=channels,
        rows=rows,
        columns=columns,
        element_size=gathered.element_size(),
        # a spline's partial sums are many: its tiles are of pixels, not of channels
        channels_last=gathered.stride(1) == 1 and not (source == Source.TPS and backward and not dense),
        interpolation=interpolation,
        dims=dims,
        backward=backward,
    )
    tile = configs.choose(gathered.device, problem)
    block = tile.channels * tile.unroll
    blocks = triton.cdiv(channels, block)
    split_blocks = triton.cdiv(blocks, tile.splits)
    splits = triton.cdiv(blocks, split_blocks)
    # a spline's partial sums are those of one block of pixels, and its basis outweighs what steps share
    steps = 1 if not stepped or source == Source.TPS else tile.steps
    column_tiles, row_tiles = triton.cdiv(columns, tile.columns), triton.cdiv(rows, tile.rows * steps)
    compute = compute_dtypes(gathered, params)[0]
    index = index_dtype(*tensors, params, rows=rows)
    if (dense or source in sources.DENSE) and output.shape[-dims:].numel() * dims > INT32_MAX:
        index = tl.int64  # the gradient's buffer holds what an expanded grid does not
    shared = {
        **dict(zip(("in_width", "in_height", "in_depth"), axes(gathered.shape[2:]))),
        **dict(zip(("out_width", "out_height", "out_depth"), axes(output.shape[-dims:]))),
        "batch": batch,
        "transforms": batch // gathered.shape[0],
        "channels": channels,
        "column_tiles": column_tiles,
        "row_tiles": row_tiles,
        "splits": splits,
        "split_blocks": split_blocks,
        "SOURCE": int(source),
        "INTERPOLATION": int(interpolation),
        "DIMS": dims,
        "COMPUTE": compute,
        "INDEX": index,
        "GROUP": tile.group,
        "EVEN_CHANNELS": channels % block == 0,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "BLOCK_CHANNELS": tile.channels,
        "UNROLL": tile.unroll,
        "num_warps": tile.warps,
    }
    if stepped:
        # a group's outputs keep their loops, without which all their loads are held in registers at once
        shared |= {"steps": steps, "ONE_BLOCK": blocks == 1 and tile.group == 1}
    return batch, column_tiles * row_tiles * splits, splits, shared


@planned
def _forward_plan(
    input: torch.Tensor,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    output: torch.Tensor,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
) -> Plan:
    dims = input.dim() - 2
    stride_in_n, _, *stride_in = strides(input, dims)
    tensors = (input, output)
    plan = _plan(
        "forward", input, output, params, tensors, source, interpolation, backward=False, stepped=True
    )
    batch, programs, _, shared = plan
    return Plan(
        sample_forward_kernel,
        triton.cdiv(batch, shared["GROUP"]) * programs,
        input.device,
        input,
        output,
        *sources.pack(source, params, control_points),
        stride_in_n,
        *stride_in,
        *strides(output, dims),
        PADDING=int(padding),
        ALIGN_CORNERS=int(align_corners),
        VECTOR_IN=vector_width(input, dims),
        VECTOR_OUT=vector_width(output, dims),
        **shared,
    )


def sample_forward(
    input: torch.Tensor,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    output: torch.Tensor,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
) -> None:
    """Fills ``output``, (N, C, ...) or (N, T, C, ...) of any strides, with samples of ``input``."""
    tensors = input, params, control_points, output
    plan = _forward_plan(tensors, source, interpolation, padding, align_corners)
    plan(input, output, *sources.pointers(params, control_points))


@planned
def _backward_plan(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    grad_input: torch.Tensor | None,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
    params_grad: bool,
    control_grad: bool,
) -> tuple[Plan, sources.Sums | None]:
    dims = input.dim() - 2
    gathered = input if grad_input is None else grad_input
    tensors = (input, gathered, grad_output)
    wanted = (
        ("image", grad_input is not None),
        ("parameters", params_grad),
        ("control points", control_grad),
    )
    work = _plan(
        " ".join(("backward", *(name for name, asked in wanted if asked))),
        gathered,
        grad_output,
        params,
        tensors,
        source,
        interpolation,
        backward=True,
        stepped=True,
    )
    batch, programs, splits, shared = work
    sums = None
    if params_grad:
        compute = compute_dtypes(input, params)[1]
        controls = control_points.shape[0] if control_grad and control_points is not None else 0
        sums = sources.Sums(batch, splits, programs, compute, controls)
    stride_in_n, _, *stride_in = strides(input, dims)
    stride_grad_n, _, *stride_grad = strides(gathered, dims)
    plan = Plan(
        sample_backward_kernel,
        triton.cdiv(batch, shared["GROUP"]) * programs,
        input.device,
        grad_output,
        input,
        gathered,
        gathered,  # or the buffer of the sums
        *sources.pack(source, params, control_points),
        *strides(grad_output, dims),
        stride_in_n,
        *stride_in,
        stride_grad_n,
        *stride_grad,
        PADDING=int(padding),
        ALIGN_CORNERS=int(align_corners),
        INPUT_GRAD=grad_input is not None,
        SOURCE_GRAD=params_grad,
        CONTROL_GRAD=params_grad and control_grad,
        VECTOR_OUT=vector_width(grad_output, dims),
        VECTOR_IN=vector_width(input, dims),
        VECTOR_GRAD=vector_width(gathered, dims),
        **shared,
    )
    return plan, sums


def sample_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    grad_input: torch.Tensor | None,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
    params_grad: bool,
    control_grad: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Adds to ``grad_input`` (zeros, in the compute type) if given; returns d params and d control points.

    Either is None unless asked for; the control points' comes with the parameters' only.
    """
    tensors = grad_output, input, params, control_points, grad_input
    modes = source, interpolation, padding, align_corners
    plan, sums = _backward_plan(tensors, *modes, params_grad, control_grad)
    gathered = input if grad_input is None else grad_input
    buffer = None if sums is None else sources.gradient_buffer(source, params, *sums)
    target = gathered if buffer is None else buffer
    plan(grad_output, input, gathered, target, *sources.pointers(params, control_points))
    if buffer is None:
        return None, None
    return sources.reduce_gradient(source, params, buffer, control_points if control_grad else None)
