"""How a program finds its output pixels, and how sizes and strides reach it."""

import torch
import triton
import triton.language as tl

from .launch import channel_dim


@triton.jit
def divided(a, b):
    """(a // b, a % b) of numbers that are not negative: an unsigned division is half of a signed one."""
    quotient = (a.to(tl.uint32) // tl.cast(b, tl.uint32)).to(tl.int32)
    return quotient, a - quotient * b


@triton.jit
def output_pixels(
    tile,
    column_tiles,
    out_size,
    DIMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    INDEX: tl.constexpr = tl.int32,
):
    """The output pixels (x, y[, z]) of a tile, [pixels, 1], and which of them exist."""
    row_tile, column_tile = divided(tile, column_tiles)
    row = first_row(row_tile, BLOCK_ROWS, DIMS, INDEX)
    return pixels_from(column_tile * BLOCK_COLUMNS, row, out_size, DIMS, BLOCK_ROWS, BLOCK_COLUMNS, INDEX)


@triton.jit
def place_of_program(column_tiles, row_tiles, splits):
    """(column tile, row tile, split, group of outputs): those of one output follow each other."""
    rest, column_tile = divided(tl.program_id(0), column_tiles)
    rest, row_tile = divided(rest, row_tiles)
    split = rest * 0
    if splits > 1:
        rest, split = divided(rest, splits)
    return column_tile, row_tile, split, rest


@triton.jit
def first_row(row_tile, rows, DIMS: tl.constexpr, INDEX: tl.constexpr):
    """The first row of a tile of ``rows``; in a volume, of depth * height, it may pass 2^31."""
    if DIMS == 3:
        return row_tile.to(INDEX) * rows
    else:
        return row_tile * rows


@triton.jit
def row_count(out_size, like, DIMS: tl.constexpr):
    """Rows of an output, in the type of ``like``."""
    if DIMS == 3:
        return out_size[1].to(like.dtype) * out_size[2]
    else:
        return out_size[1]


@triton.jit
def steps_from(row, steps, out_size, BLOCK_ROWS: tl.constexpr, DIMS: tl.constexpr):
    """How many of ``steps`` blocks of rows from ``row`` on begin within the output."""
    left = row_count(out_size, row, DIMS) - row
    return tl.minimum(steps, tl.cdiv(left, BLOCK_ROWS).to(tl.int32))


@triton.jit
def pixels_from(
    column,
    first,
    out_size,
    DIMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """``output_pixels`` of the tile that begins at ``column`` and row ``first``.

    Rows of a volume, depth * height of them, are counted in INDEX.
    """
    lane = tl.arange(0, BLOCK_ROWS * BLOCK_COLUMNS)[:, None]
    x = column + lane % BLOCK_COLUMNS
    if DIMS == 3:
        slices = 0
        if (
            INDEX == tl.int64
        ):  # one wide division for the tile: its rows are then counted from a slice's first
            slices = (first // out_size[1]).to(tl.int32)
            first = (first % out_size[1]).to(tl.int32)
        row = first + lane // BLOCK_COLUMNS
        z = row // out_size[1]
        y = row - z * out_size[1]
        z += slices
        return (x, y, z), (x < out_size[0]) & (z < out_size[2])
    else:
        row = first + lane // BLOCK_COLUMNS
        return (x, row), (x < out_size[0]) & (row < out_size[1])


@triton.jit
def row_range(row, rows, size, DIMS: tl.constexpr):
    """The first and last (y[, z]) of ``rows`` rows from ``row``; all y where they go on in the next slice."""
    if DIMS == 3:
        # no sum beyond the last row: it may pass 2^31
        last_row = row + tl.minimum(size[1].to(row.dtype) * size[2] - row, rows) - 1
        z = (row // size[1]).to(tl.int32)
        last_z = (last_row // size[1]).to(tl.int32)
        whole = last_z > z
        y = tl.where(whole, 0, (row % size[1]).to(tl.int32))
        last_y = tl.where(whole, size[1] - 1, (last_row % size[1]).to(tl.int32))
        return (y, z), (last_y, last_z)
    else:
        first = row.to(tl.int32)
        return (first,), (first + tl.minimum(size[1] - first, rows) - 1,)


@triton.jit
def pixel_offset(out, strides, DIMS: tl.constexpr, INDEX: tl.constexpr):
    offset = out[0].to(INDEX) * strides[0] + out[1].to(INDEX) * strides[1]
    if DIMS == 3:
        offset += out[2].to(INDEX) * strides[2]
    return offset


@triton.jit
def existing(mask, b, batch):
    """``mask``, where output ``b`` exists. (The interpreter broadcasts numbers, but not a flag.)"""
    return mask & (tl.zeros(mask.shape, tl.int32) + b < batch)


@triton.jit
def rounded(value, pointer):
    """``value`` in the type that ``pointer`` points to."""
    DTYPE: tl.constexpr = pointer.dtype.element_ty
    if DTYPE == tl.bfloat16:
        value = value.to(tl.float32)  # the interpreter has no float64 -> bfloat16
    return value.to(DTYPE)


def axes(values) -> tuple:
    """([z,] y, x) as (x, y, z), with 0 for what is missing."""
    return (*reversed(values), 0)[:3]


def strides(tensor: torch.Tensor, dims: int) -> tuple:
    """Strides of (N, C, ...) or (N, T, C, ...) by (image, transform, channel, x, y, z)."""
    stride = tensor.stride()
    channel = channel_dim(tensor, dims)
    return stride[0], stride[1] if channel == 2 else 0, stride[channel], *axes(stride[channel + 1 :])
