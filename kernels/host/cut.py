"""How a launcher cuts its work into programs, and what it tells a kernel: numbers by name, and a ``Spec``."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..modes import MOST_PIXELS, modes_of, paddings_of
from ..spec import Spec
from .configs import Problem, Tile
from .launch import Plan, vector_width
from .parameters import Sums, axes, channel_dim, has_fixed_point, num_controls, source_strides


# ------------------------------------------------------------------- numbers, as kernels name them
def image_numbers(name: str, image: torch.Tensor | None, dims: int) -> dict[str, int]:
    """Strides of (N, C, ...) or (N, T, C, ...); 0 where there is no image."""
    if image is None:
        return {f"stride_{name}_{axis}": 0 for axis in "ntcxyz"}
    stride, channel = image.stride(), channel_dim(image, dims)
    values = stride[0], stride[1] if channel == 2 else 0, stride[channel], *axes(stride[channel + 1 :])
    return {f"stride_{name}_{axis}": value for axis, value in zip("ntcxyz", values)}


def coordinate_numbers(tensor: torch.Tensor | None, dims: int) -> dict[str, int]:
    """Strides of a tangent of coordinates, (N, T, ..., dims): images with a channel for each axis."""
    return image_numbers("coord", None if tensor is None else tensor.movedim(-1, 2), dims)


def source_numbers(source: int, params: torch.Tensor, control_points: torch.Tensor | None) -> dict[str, int]:
    """Strides of a source's parameters, and the number of its control points."""
    strides = {f"stride_source_{i}": stride for i, stride in enumerate(source_strides(source, params))}
    return {**strides, "num_controls": num_controls(control_points)}


# ----------------------------------------------------------------------------------------------- work
class Cut(NamedTuple):
    """Work cut into tiles. ``tiles``: programs that do one group of outputs, ``splits`` of them each tile."""

    problem: Problem
    tile: Tile
    tiles: int
    splits: int
    numbers: dict[str, int]
    """Sizes and counts that any kernel may ask for."""
    fields: dict[str, Any]
    """Fields of the ``Spec``."""

    @property
    def dims(self) -> int:
        return self.fields["dims"]

    def plan(
        self,
        kernel: Any,
        tensors: tuple[torch.Tensor | None, ...],
        images: Mapping[str, torch.Tensor | None],
        numbers: Mapping[str, int | None],
        **fields: Any,
    ) -> Plan:
        """The launch of a kernel, whose first arguments are ``tensors``; the others it gets by their names.

        ``images``: of which it is told strides and vectors, by its names for them. ``numbers``: further ones.
        ``fields``: further ones of its ``Spec``.
        """
        given: dict[str, int | None] = {**self.numbers, **numbers}
        vectors = {}
        for name, image in images.items():
            given |= image_numbers(name, image, self.dims)
            vectors[f"vector_{name}"] = 1 if image is None else vector_width(image, self.dims)
        device = next(tensor.device for tensor in tensors if tensor is not None)
        return Plan(
            kernel,
            triton.cdiv(self.problem.images, self.tile.group) * self.tiles,
            device,
            *tensors,
            **{name: given[name] for name in kernel.arg_names[len(tensors) : -1]},
            SPEC=Spec(**{**self.fields, **vectors, **fields}),
            num_warps=self.tile.warps,
        )

    def sums(self, compute: torch.dtype, control_points: torch.Tensor | None) -> Sums:
        """What programs leave of a gradient by the parameters, and by control points if these are given."""
        return Sums(self.problem.images, self.splits, self.tiles, compute, num_controls(control_points))


def cut(
    problem: Problem,
    tile: Tile,
    modes: tuple[int, int, int, bool],
    sizes: tuple[torch.Size, torch.Size],
    compute: tl.dtype,
    index: tl.dtype,
    steps: int = 1,
) -> Cut:
    """Cuts a problem into programs of ``steps`` blocks of pixels.

    ``modes``: source, interpolation and padding, and align_corners. ``sizes``: the input's and the output's.

    Raises:
        ValueError: an axis has more than ``MOST_PIXELS``.
    """
    source, interpolation, padding, align_corners = modes
    in_size, out_size = sizes
    for name, size in ("input", in_size), ("output", out_size):
        if max(size) > MOST_PIXELS:
            raise ValueError(f"{name} must have 2^30 - 1 pixels at most along each axis, got {tuple(size)}")
    dims = len(out_size)
    block = tile.channels * tile.unroll
    blocks = triton.cdiv(problem.channels, block)
    split_blocks = triton.cdiv(blocks, tile.splits)
    splits = triton.cdiv(blocks, split_blocks)
    column_tiles = triton.cdiv(problem.columns, tile.columns)
    row_tiles = triton.cdiv(problem.rows, tile.rows * steps)
    numbers = {
        **dict(zip(("in_width", "in_height", "in_depth"), axes(in_size))),
        **dict(zip(("out_width", "out_height", "out_depth"), axes(out_size))),
        "batch": problem.images,
        "channels": problem.channels,
        "column_tiles": column_tiles,
        "row_tiles": row_tiles,
        "splits": splits,
        "split_blocks": split_blocks,
        "steps": steps,
    }
    fields = {
        "source": int(source),
        **modes_of(interpolation),
        "padding": paddings_of(padding, dims),
        "align_corners": int(align_corners),
        "dims": dims,
        "compute": compute,
        "index": index,
        "fixed_point": has_fixed_point(source, compute, in_size, out_size, interpolation),
        "rows": tile.rows,
        "columns": tile.columns,
        "channels": tile.channels,
        "unroll": tile.unroll,
        "group": tile.group,
        "even_channels": problem.channels % block == 0,
        # a group's outputs keep their loops, without which all their loads are held in registers at once
        "one_block": blocks == 1 and tile.group == 1,
    }
    return Cut(problem, tile, column_tiles * row_tiles * splits, splits, numbers, fields)
