"""Splines by their points: in plain eager code the product that makes coefficients is part of the Function.

A kernel makes the product then, in one launch each way. Who else calls (compilers, function transforms,
dispatch modes, forward mode, control points with a gradient) gets the product in PyTorch's operators, and the
Function of the coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import ops
from ..calls import is_undispatched
from ..transforms import splines
from .coordinates import _Grid
from .function import Function, added
from .samples import _Sample


def _by_points(function: type[Function], at: int) -> Callable[..., Any]:
    """``function.run`` with points for coefficients, its argument ``at``, and the system's matrix last."""
    implementation, tensors = ops.implementation_of(function.op)
    setup: Callable[..., None] = function.setup_context
    derivatives: Callable[..., tuple[Tensor | None, ...]] = function.backward

    class ByPoints(torch.autograd.Function):
        """Coefficients are a result too: what is made of them in a backward pass leads back to the points."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *given, matrix = inputs
            points = given[at]
            given[at] = coefficients = ops.spline_product(matrix, points, given[at + 1].dtype)
            output = implementation(*given)
            setup(ctx, given, output)
            ctx.matrix, ctx.dtype_of_points = matrix, points.dtype
            return output, coefficients

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor | None, grad_coefficients: Tensor | None) -> Any:
            found = list(derivatives(ctx, grad_output))
            along = added(found[at], grad_coefficients)
            if along is not None and ctx.needs_input_grad[at]:
                is_recorded = torch.is_grad_enabled()  # and is to be differentiated in turn
                matrix, dtype = ctx.matrix, ctx.dtype_of_points
                found[at] = (
                    splines.product(matrix.mT, along, dtype)
                    if is_recorded
                    else ops.spline_product(matrix, along, dtype, transposed=True)
                )
            return *found, None

    record = super(torch.autograd.Function, ByPoints).apply  # type: ignore[misc]
    is_traced_by_dynamo, is_grad_enabled = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled

    def run(*inputs: Any) -> Any:
        *given, matrix = inputs
        points, dtype = given[at], given[at + 1].dtype
        if (
            is_traced_by_dynamo()
            or matrix.requires_grad
            or forward_ad._current_level >= 0
            or not is_undispatched((matrix, *given[:tensors]))
        ):
            given[at] = splines.product(matrix, points, dtype)
            return function.run(*given)
        if is_grad_enabled() and points.requires_grad:
            return record(*inputs)[0]
        given[at] = ops.spline_product(matrix, points, dtype)
        return function.run(*given) if is_grad_enabled() else implementation(*given)

    return run


spline_sample = _by_points(_Sample, 1)
"""``sample`` of (input, points, control_points, source, ..., matrix). Control points are in the type of the
coefficients."""

spline_grid = _by_points(_Grid, 0)
"""``grid`` of (points, control_points, source, size, align_corners, matrix)."""
