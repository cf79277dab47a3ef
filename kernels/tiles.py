"""How a program finds its output pixels, and how sizes and strides reach it."""

import torch
import triton
import triton.language as tl

from .launch import channel_dim


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
    """The output pixels (x, y[, z]) of a tile, [pixels, 1], and which of them exist.

    Rows of a volume, depth * height of them, are counted in INDEX.
    """
    lane = tl.arange(0, BLOCK_ROWS * BLOCK_COLUMNS)[:, None]
    x = (tile % column_tiles) * BLOCK_COLUMNS + lane % BLOCK_COLUMNS
    if DIMS == 3:
        first = (tile // column_tiles).to(INDEX) * BLOCK_ROWS
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
        row = (tile // column_tiles) * BLOCK_ROWS + lane // BLOCK_COLUMNS
        return (x, row), (x < out_size[0]) & (row < out_size[1])


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
