"""How a program finds its pixels and channels. Pixels are a column of a block, channels a row."""

import triton
import triton.language as tl

from .arithmetic import divided, rounded, widened


@triton.jit
def place_of_program(tiling):
    """(column tile, row tile, split, rest of the program's number): tiles of one output follow each other."""
    rest, column_tile = divided(tl.program_id(0), tiling.columns)
    rest, row_tile = divided(rest, tiling.rows)
    split = rest * 0
    if tiling.splits > 1:
        rest, split = divided(rest, tiling.splits)
    return column_tile, row_tile, split, rest


@triton.jit
def first_row(row_tile, rows, SPEC: tl.constexpr):
    """The first row of a tile of ``rows``; in a volume, of depth * height rows, it may pass 2^31."""
    if SPEC.dims == 3:
        return row_tile.to(SPEC.index) * rows
    else:
        return row_tile * rows


@triton.jit
def row_count(size, like, SPEC: tl.constexpr):
    """Rows of an image, in the type of ``like``."""
    if SPEC.dims == 3:
        return size[1].to(like.dtype) * size[2]
    else:
        return size[1]


@triton.jit
def pixel_count(size, SPEC: tl.constexpr):
    """Pixels of an image, int64."""
    count = size[0].to(tl.int64) * size[1]
    if SPEC.dims == 3:
        count *= size[2]
    return count


@triton.jit
def steps_from(row, steps, size, SPEC: tl.constexpr):
    """How many of ``steps`` blocks of rows from ``row`` on begin within the image."""
    left = row_count(size, row, SPEC) - row
    return tl.minimum(steps, tl.cdiv(left, SPEC.rows).to(tl.int32))


@triton.jit
def row_by_row(PIXELS: tl.constexpr):
    """Which pixel of its block each lane has, [pixels, 1]: rows one after the other."""
    return tl.arange(0, PIXELS)[:, None]


@triton.jit
def patch_by_patch(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``row_by_row``, but patches of 8 x 4 pixels one after the other, row by row in each."""
    lane = row_by_row(ROWS * COLUMNS)
    patch = lane // 32
    x = patch % (COLUMNS // 8) * 8 + lane % 8
    y = patch // (COLUMNS // 8) * 4 + lane // 8 % 4
    return y * COLUMNS + x


@triton.jit
def pixels_from(column, row, size, numbers, COLUMNS: tl.constexpr, SPEC: tl.constexpr):
    """The pixels (x, y[, z]) of the block at ``column`` and ``row``, [pixels, 1], and which of them exist.

    numbers: which of the block each lane has, as of ``row_by_row``. Rows of a volume, depth * height of them,
    are counted in the index type.
    """
    x = column + numbers % COLUMNS
    if SPEC.dims == 3:
        slices = 0
        if SPEC.index == tl.int64:  # one wide division for the tile: its rows then count from a slice's first
            slices = (row // size[1]).to(tl.int32)
            row = (row % size[1]).to(tl.int32)
        row = row + numbers // COLUMNS
        z = row // size[1]
        y = row - z * size[1]
        z += slices
        return (x, y, z), (x < size[0]) & (z < size[2])
    else:
        y = row + numbers // COLUMNS
        return (x, y), (x < size[0]) & (y < size[1])


@triton.jit
def box_of(column, row, columns, rows, size, SPEC: tl.constexpr):
    """The first and last pixel of ``rows`` rows; along y all where they go on in the next slice."""
    # differences, as sums may pass 2^31
    last_x = column + tl.minimum(size[0] - column, columns) - 1
    if SPEC.dims == 3:
        last_row = row + tl.minimum(size[1].to(row.dtype) * size[2] - row, rows) - 1
        z = (row // size[1]).to(tl.int32)
        last_z = (last_row // size[1]).to(tl.int32)
        whole = last_z > z
        y = tl.where(whole, 0, (row % size[1]).to(tl.int32))
        last_y = tl.where(whole, size[1] - 1, (last_row % size[1]).to(tl.int32))
        return (column, y, z), (last_x, last_y, last_z)
    else:
        first = row.to(tl.int32)
        return (column, first), (last_x, first + tl.minimum(size[1] - first, rows) - 1)


@triton.jit
def offset_of(pixel, strides, VECTOR: tl.constexpr, SPEC: tl.constexpr):
    """The offset of (x, y[, z]): a multiple of VECTOR, which lets channels be read in vectors."""
    offset = pixel[0].to(SPEC.index) * strides[0] + pixel[1].to(SPEC.index) * strides[1]
    if SPEC.dims == 3:
        offset += pixel[2].to(SPEC.index) * strides[2]
    return tl.multiple_of(offset, (VECTOR, VECTOR))


@triton.jit
def channel_block(block, channels, SPEC: tl.constexpr):
    """The channels of a block, [1, channels], and which of them exist."""
    c = block * SPEC.channels + tl.arange(0, SPEC.channels)[None, :]
    if SPEC.even_channels:
        exists = tl.full([1, SPEC.channels], True, tl.int1)
    else:
        exists = c < channels
    return c.to(SPEC.index), exists


@triton.jit
def zero_blocks(COUNT: tl.constexpr, SPEC: tl.constexpr):
    """Zeros for COUNT blocks of channels."""
    values = ()
    for _ in tl.static_range(COUNT):
        values += (tl.zeros([SPEC.rows * SPEC.columns, SPEC.channels], SPEC.compute),)
    return values


@triton.jit
def load_blocks(pointer, stride_c, block, mask, channels, SPEC: tl.constexpr):
    """``unroll`` blocks of channels of the pixels at ``pointer``, in the compute type; 0 outside ``mask``."""
    values = ()
    for k in tl.static_range(SPEC.unroll):
        c, exists = channel_block(block * SPEC.unroll + k, channels, SPEC)
        values += (widened(tl.load(pointer + c * stride_c, mask & exists, other=0.0), SPEC),)
    return values


@triton.jit
def store_blocks(values, pointer, stride_c, block, mask, channels, COUNT: tl.constexpr, SPEC: tl.constexpr):
    """Stores COUNT blocks of channels of the pixels at ``pointer``, rounded to its type."""
    for k in tl.static_range(COUNT):
        c, exists = channel_block(block * COUNT + k, channels, SPEC)
        tl.store(pointer + c * stride_c, rounded(values[k], pointer), mask & exists)


@triton.jit
def blocks_of(split, tiling, channels, SPEC: tl.constexpr):
    """The first block of channels of a program, and the one after its last.

    Loops go over blocks, not channels: that a block begins at a multiple of its size is then plain to see.
    """
    if SPEC.one_block:
        return 0, 1
    else:
        first = split * tiling.split_blocks
        blocks = tl.cdiv(channels, SPEC.channels * SPEC.unroll)
        return first, tl.minimum(first + tiling.split_blocks, blocks)


@triton.jit
def existing(mask, b, batch):
    """``mask``, where output ``b`` exists. (The interpreter broadcasts numbers, but not a flag.)"""
    return mask & (tl.zeros(mask.shape, tl.int32) + b < batch)
