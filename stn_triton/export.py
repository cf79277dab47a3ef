"""The operators in PyTorch's own terms, for what leaves PyTorch: ONNX above all.

A program that :func:`torch.export.export` makes of a model runs on this package's operators. Where these
are not::

    program = torch.export.export(model, (images,))
    program = program.run_decompositions(stn.export.decompositions())
    torch.onnx.export(program, (), "model.onnx", dynamo=True, opset_version=20)

runs on ``aten.grid_sampler_2d`` and ``_3d`` instead, which ONNX has as ``GridSample``.

A model that is given to ``torch.onnx.export``, or to ``torch.jit.trace``, needs nothing of this: while they
record, the functions run on PyTorch's operators. Only ``dynamo=True`` cannot translate volumes: those of a
fixed size become single taps, others need ``custom_translation_table=stn.export.onnx_translations()``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .kernels.modes import Source
from .transforms import splines

__all__ = ["decompositions", "onnx_translations"]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What this package's operators are in ATen's, for ``ExportedProgram.run_decompositions``.

    Each transform becomes a grid, which then lies in memory, and a call of ATen's sampler. ATen's sampler
    lacks circular padding, a padding per axis, and tricubic samples (before PyTorch 2.15, and in ONNX).
    These become a sum over single taps, for images of a fixed size. ONNX cannot solve a spline's linear
    system: that becomes Gauss-Jordan elimination in plain operators. The result is for inference: it has no
    derivatives.

    Example:
        >>> net = stn.nn.SpatialTransformer(torch.nn.Flatten(), features=64).eval()
        >>> program = torch.export.export(net, (torch.rand(2, 1, 8, 8),))
        >>> program = program.run_decompositions(stn.export.decompositions())
        >>> any("grid_sampler_2d" in str(node.target) for node in program.graph.nodes)
        True
    """
    operators = torch.ops.stn_triton
    return {
        operators.sample.default: sample,
        operators.sample_as.default: sample_as,
        operators.grid.default: grid,
        torch.ops.aten.linalg_inv_ex.default: splines.invert_by_elimination,
    }


def onnx_translations() -> dict[Any, Callable[..., Any]]:
    """What ``torch.onnx.export`` is to be given as ``custom_translation_table`` for volumes, which it
    cannot translate by itself. Needs onnxscript, and ``opset_version=20`` or later.

    Raises:
        ImportError: onnxscript is not installed.

    Example:
        >>> table = stn.export.onnx_translations()
        >>> options = {"dynamo": True, "opset_version": 20, "custom_translation_table": table}
    """
    try:
        from onnxscript import opset20
    except ModuleNotFoundError as error:
        needed = "ONNX export needs onnx and onnxscript: pip install stn_triton[onnx]"
        raise ImportError(f"{needed} ({error})") from error

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
    ops.refuse_averages(interpolation)
    modes = ops.named_modes(interpolation, padding, align_corners)
    output = reference.sample(input, params, control_points, Source(source), tuple(size), *modes)
    return as_images(output, input, params, source)


def sample_as(
    input: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    fill: Tensor | None,
    source: int,
    size: Any,
    interpolation: int,
    padding: int,
    align_corners: bool,
    dtype: torch.dtype,
) -> Tensor:
    ops.refuse_averages(interpolation)
    place = Source(source), tuple(size), *ops.named_modes(interpolation, padding, align_corners)
    output = reference.sample_as(input, params, control_points, fill, *place, dtype)
    return as_images(output, input, params, source)


def as_images(output: Tensor, input: Tensor, params: Tensor, source: int) -> Tensor:
    """(N, T, C, *size) as the operators return it."""
    if source != Source.GRID and ops.is_channels_last(input):
        last = output.dim() - 1  # TorchScript's ONNX takes no negative one
        output = output.movedim(2, last).contiguous().movedim(last, 2)
    else:
        output = output.contiguous()
    return output if ops.has_transforms(params, source) else output.flatten(0, 1)


def grid(
    params: Tensor, control_points: Tensor | None, source: int, size: Any, align_corners: bool
) -> Tensor:
    dtype = reference.compute_dtype(params)
    grid = reference.coordinates(Source(source), params, control_points, tuple(size), align_corners, dtype)
    return grid.squeeze(1).to(params.dtype)
