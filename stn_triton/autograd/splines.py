"""The product that makes a spline's coefficients of its points.

In plain eager code a kernel makes it, in one launch, and its transpose in the backward pass. Who else calls
(function transforms, dispatch modes, profilers, forward mode) gets it in PyTorch's operators, by a Function
that keeps the same for its backward pass, which is nothing: the two may take turns in one checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import ops
from ..calls import PLAIN, is_undispatched, tracing_state
from ..transforms import splines
from .function import eager


class _SplineProduct(torch.autograd.Function):
    """``splines.product`` by a matrix that is a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, points: Tensor, dtype: torch.dtype) -> Tensor:
        return splines.product(matrix, points, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.matrix, points, ctx.dtype = inputs
        ctx.points_dtype = points.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        return None, spline_product(ctx.matrix.mT, gradient, ctx.points_dtype), None

    @staticmethod
    def jvp(ctx: Any, of_matrix: None, of_points: Tensor, of_dtype: None) -> Tensor:
        with forward_ad._set_fwd_grad_enabled(True):  # see ``function.tracks_tangents``
            return spline_product(ctx.matrix, of_points, ctx.dtype)


_record = eager("_SplineProduct", ops.spline_product, _SplineProduct.setup_context, _SplineProduct.backward)
_is_traced_by_dynamo = torch.compiler.is_dynamo_compiling  # looked up here, as it is asked in each call
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def spline_product(matrix: Tensor, points: Tensor, dtype: torch.dtype) -> Tensor:
    """``splines.product``, differentiable; by a kernel where nobody would see the operators."""
    if _is_traced_by_dynamo() or tracing_state():
        return splines.product(matrix, points, dtype)
    if is_undispatched((matrix, points)) and forward_ad._current_level < 0:
        if not torch.is_grad_enabled():
            return ops.spline_product(matrix, points, dtype)
        if not matrix.requires_grad:
            call = _record if points.requires_grad else ops.spline_product
            return call(matrix, points, dtype)
    elif _is_constant(matrix) and type(points) in PLAIN:
        return _SplineProduct.apply(matrix, points, dtype)
    return splines.product(matrix, points, dtype)


def _is_constant(matrix: Tensor) -> bool:
    """Whether nobody may ask for a derivative by it."""
    if type(matrix) not in PLAIN or matrix.requires_grad or _is_wrapped(matrix):
        return False
    return forward_ad._current_level < 0 or forward_ad.unpack_dual(matrix).tangent is None
