"""The operators in PyTorch's own terms, for what leaves PyTorch: ONNX above all.

A program that :func:`torch.export.export` makes of a model runs on this package's operators. Where these
are not::

    program = torch.export.export(model, (images,))
    program = program.run_decompositions(stn.export.decompositions())
    torch.onnx.export(program, (), "model.onnx", dynamo=True, opset_version=20)

runs on ``aten.grid_sampler_2d`` and ``_3d`` instead, which ONNX has as ``GridSample``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops, reference, transforms
from .kernels.modes import Source

__all__ = ["decompositions", "onnx_translations"]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What this package's operators are in ATen's, for ``ExportedProgram.run_decompositions``.

    Each transform becomes a grid, which is held in memory then, and ATen's sampler. What that has not
    (tricubic, circular padding, paddings per axis) is sampled tap by tap, for images of a fixed size. The
    linear system of a spline, which ONNX cannot solve either, becomes elimination in plain operators. For
    inference: no derivatives.
    """
    operators = torch.ops.stn_triton
    return {
        operators.sample.default: sample,
        operators.grid.default: grid,
        torch.ops.aten.linalg_inv_ex.default: transforms.invert_by_elimination,
    }


def onnx_translations() -> dict[Any, Callable[..., Any]]:
    """What ``torch.onnx.export`` is to be given as ``custom_translation_table`` for volumes, which it
    cannot translate by itself. Needs onnxscript, and ``opset_version=20`` or later."""
    from onnxscript import opset20

    def grid_sampler_3d(
        input: Any, grid: Any, interpolation_mode: int, padding_mode: int, align_corners: bool
    ) -> Any:
        return opset20.GridSample(
            input,
            grid,
            align_corners=int(align_corners),
            mode=("linear", "nearest")[interpolation_mode],
            padding_mode=("zeros", "border", "reflection")[padding_mode],
        )

    return {torch.ops.aten.grid_sampler_3d.default: grid_sampler_3d}


def sample(
    input: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    source: int,
    size: Any,
    interpolation: int,
    padding: int,
    align_corners: bool,
) -> Tensor:
    modes = ops.named_modes(interpolation, padding, align_corners)
    output = reference.sample(input, params, control_points, Source(source), tuple(size), *modes)
    images = output.flatten(0, 1)
    memory_format = torch.contiguous_format
    if source != Source.GRID and ops.is_channels_last(input):
        memory_format = torch.channels_last if input.dim() == 4 else torch.channels_last_3d
    images = images.contiguous(memory_format=memory_format)
    if ops.has_transforms(params, source):
        return images.view(output.shape)
    return images


def grid(
    params: Tensor, control_points: Tensor | None, source: int, size: Any, align_corners: bool
) -> Tensor:
    dtype = reference.compute_dtype(params)
    grid = reference.coordinates(Source(source), params, control_points, tuple(size), align_corners, dtype)
    return grid.squeeze(1).to(params.dtype)
