"""Coordinates as a function of parameters and control points: derivatives, and grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend, export, ops, reference
from ..kernels.modes import Source
from .function import Function, Tensors, added, primals, tracks_tangents, unwanted, vector_jacobian
from .vmap import fold_samples


def _by_transform(params: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices or coefficients as (N, T, ., .)."""
    return (params if params.dim() == 4 else params.unsqueeze(1)).to(dtype)


def coord_tangent_of(
    source: int,
    params: Tensor,
    control_points: Tensor | None,
    tangents: Tensors,
    batch: Any,
    size: Any,
    align_corners: bool,
    dtype: torch.dtype,
) -> Tensor | None:
    """How the coordinates move with params and control points, (N, T, *size, dims) in the source's units."""
    of_params, of_controls = tangents
    coord_tangent = None
    with backend.without_autocast(params.device.type):
        controls = None if control_points is None else control_points.to(dtype)
        if of_params is not None:
            if source == Source.GRID:
                coord_tangent = of_params.to(dtype).unsqueeze(1)
            elif source == Source.FLOW:
                coord_tangent = of_params.to(dtype).movedim(1, -1).unsqueeze(1)
            elif source == Source.PROJECTIVE:
                homography, tangent = _by_transform(params, dtype), _by_transform(of_params, dtype)
                coord_tangent = reference.projective_jvp(homography, tangent, tuple(size), align_corners)
            else:
                _check_linear(source)
                tangent = _by_transform(of_params, dtype)
                outputs, *matrix = tangent.shape[:2].numel(), *tangent.shape[2:]
                matrices = tangent.reshape(outputs, *matrix)
                coord_tangent = grid(matrices, controls, source, size, align_corners)
                coord_tangent = coord_tangent.reshape(*tangent.shape[:2], *coord_tangent.shape[1:])
        if of_controls is not None:
            assert controls is not None
            coefficients, tangent = _by_transform(params, dtype), of_controls.to(dtype)
            place = tuple(size), align_corners
            coord_tangent = added(
                coord_tangent, reference.spline_control_jvp(coefficients, controls, tangent, *place)
            )
    return None if coord_tangent is None else coord_tangent.expand(batch, *coord_tangent.shape[1:])


def coord_backward(
    source: int,
    by_coordinates: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    align_corners: bool,
    control_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The transpose of ``coord_tangent_of``."""
    if params.shape[0] == 1:
        by_coordinates = by_coordinates.sum(0, keepdim=True)
    if source == Source.GRID:
        return by_coordinates.squeeze(1).to(params.dtype), None
    if source == Source.FLOW:
        return by_coordinates.squeeze(1).movedim(-1, 1).to(params.dtype), None
    dtype, outputs = by_coordinates.dtype, by_coordinates.shape[:2].numel()
    by_params, by_controls = _GridBackward.run(
        by_coordinates.reshape(outputs, *by_coordinates.shape[2:]),
        params.reshape(outputs, *params.shape[-2:]).to(dtype),
        None if control_points is None else control_points.to(dtype),
        source,
        align_corners,
        control_grad,
    )
    by_params = by_params.reshape(params.shape).to(params.dtype)
    return by_params, by_controls.to(params.dtype) if control_grad else None


def coord_curvature(
    source: int,
    by_coordinates: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    tangents: Tensors,
    align_corners: bool,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """d of <by_coordinates, ``coord_tangent_of``> by params and control points."""
    batch, _, *size, _ = by_coordinates.shape
    of_params, of_controls = tangents
    found: list[Tensor | None] = [None, None]
    if of_params is not None:

        def function(params: Tensor, control_points: Tensor | None) -> tuple[Tensor | None]:
            place = batch, size, align_corners, by_coordinates.dtype
            return (coord_tangent_of(source, params, control_points, (of_params, None), *place),)

        found = vector_jacobian(function, (params, control_points), tuple(wanted), (by_coordinates,))
    if of_controls is not None:
        assert control_points is not None
        more = _control_curvature(by_coordinates, params, control_points, of_controls, align_corners, wanted)
        found = [added(a, b) for a, b in zip(found, more, strict=True)]
    return found


def _control_curvature(
    by_coordinates: Tensor,
    coefficients: Tensor,
    control_points: Tensor,
    tangent: Tensor,
    align_corners: bool,
    wanted: Sequence[bool],
    chunk: int = 32,
) -> list[Tensor | None]:
    """A few control points at a time, so that what autograd holds is no more than the outputs."""
    batch, _, *size, _ = by_coordinates.shape
    dtype, controls = by_coordinates.dtype, control_points.shape[0]
    parts: list[list[Tensor | None]] = []
    for start in range(0, controls, chunk):
        some = slice(start, min(start + chunk, controls))
        along = tangent[some].to(dtype)

        def function(weights: Tensor, points: Tensor, along: Tensor = along) -> tuple[Tensor]:
            place = tuple(size), align_corners
            coord_tangent = reference.spline_control_jvp(
                _by_transform(weights, dtype), points.to(dtype), along, *place
            )
            return (coord_tangent.expand(batch, *coord_tangent.shape[1:]),)

        chosen = coefficients[..., some, :], control_points[some]
        parts.append(vector_jacobian(function, chosen, tuple(wanted), (by_coordinates,)))
    by_weights, by_points = zip(*parts, strict=True)
    return [
        # the last three coefficients are the affine part's, which no control point moves
        torch.nn.functional.pad(torch.cat(by_weights, -2), (0, 0, 0, 3)) if wanted[0] else None,
        torch.cat(by_points) if wanted[1] else None,
    ]


def _check_linear(source: int) -> None:
    """A source whose coordinates are no linear function of its parameters has derivatives of its own here."""
    if source not in (Source.GRID, Source.AFFINE, Source.TPS, Source.FLOW):
        raise NotImplementedError(f"derivatives of coordinates: {Source(source)!r}")


def is_curved(source: int, tangents: Tensors, wanted: Sequence[bool]) -> tuple[bool, bool]:
    """Whether ``coord_tangent_of`` depends on params and on control points, of those wanted."""
    of_params, of_controls = (tangent is not None for tangent in tangents)
    if source == Source.PROJECTIVE:
        return wanted[0] and of_params, False
    if source == Source.TPS:
        return wanted[0] and of_controls, wanted[1] and (of_params or of_controls)
    _check_linear(source)
    return False, False


# ------------------------------------------------------------------------------------ grid's Functions
class _GridBackward(Function):
    op = ops.grid_backward

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad_grid, params, control_points, ctx.source, ctx.align_corners, ctx.control_grad = inputs
        ctx.shape, ctx.dtype = grad_grid.shape, grad_grid.dtype
        ctx.save_for_backward(grad_grid if any(ctx.needs_input_grad[1:3]) else None, params, control_points)
        ctx.mark_non_differentiable(*unwanted(output[1:], (ctx.control_grad,)))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        grad_grid, *source = ctx.saved_tensors
        tangents = cotangents[0], cotangents[1] if ctx.control_grad else None
        by_grid = None
        if ctx.needs_input_grad[0]:
            by_grid = _grid_tangent(ctx, source, tangents, ctx.shape, ctx.dtype)
        found = _grid_curvature(ctx, grad_grid, source, tangents, ctx.needs_input_grad[1:3])
        return by_grid, *found, None, None, None

    @staticmethod
    @tracks_tangents
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        grad_grid, *source = primals(ctx)
        of_grid, *of_source = tangents[:3]
        by_params, by_controls = _grid_curvature(ctx, grad_grid, source, of_source, (True, ctx.control_grad))
        if of_grid is None and (by_params is None or by_controls is None):
            of_grid = torch.zeros_like(grad_grid)
        if of_grid is not None:
            rest = ctx.source, ctx.align_corners, ctx.control_grad
            linear = _GridBackward.run(of_grid, *source, *rest)
            by_params, by_controls = added(linear[0], by_params), added(linear[1], by_controls)
        return by_params, by_controls if ctx.control_grad else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        results = "params", "control" if inputs[5] else None
        return fold_samples(_GridBackward, ("grid", "params", "control"), results, info, in_dims, inputs)


def _grid_tangent(
    ctx: Any, source: Tensors, tangents: Tensors, shape: Any, dtype: torch.dtype
) -> Tensor | None:
    """How a grid of this shape and dtype moves with (params, control_points)."""
    params, control_points = source
    assert params is not None
    compute = reference.compute_dtype(params)
    where = shape[0], shape[1:-1], ctx.align_corners, compute
    coord_tangent = coord_tangent_of(ctx.source, params, control_points, tangents, *where)
    return None if coord_tangent is None else coord_tangent.squeeze(1).to(dtype)


def _grid_curvature(
    ctx: Any, grad_grid: Tensor | None, source: Tensors, tangents: Tensors, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The derivatives of ``_GridBackward``'s results by the source, in a direction; None for 0."""
    params, control_points = source
    curved = is_curved(ctx.source, tangents, wanted)
    if grad_grid is None or params is None or not any(curved):
        return [None, None]
    by_coordinates = grad_grid.to(reference.compute_dtype(params)).unsqueeze(1)
    found = ctx.source, by_coordinates, params, control_points, tangents, ctx.align_corners, curved
    return coord_curvature(*found)


class _Grid(Function):
    op = ops.grid
    in_pytorch = staticmethod(export.grid)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        params, control_points, ctx.source, _, ctx.align_corners = inputs
        ctx.shape, ctx.dtype = output.shape, output.dtype
        ctx.save_for_backward(params, control_points)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_grid: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_grid is None:
            return (None,) * 5
        params_grad, control_grad = ctx.needs_input_grad[:2]
        rest = ctx.source, ctx.align_corners, control_grad
        by_params, by_controls = _GridBackward.run(grad_grid, *ctx.saved_tensors, *rest)
        return by_params if params_grad else None, by_controls if control_grad else None, None, None, None

    @staticmethod
    @tracks_tangents
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        return _grid_tangent(ctx, primals(ctx), tangents[:2], ctx.shape, ctx.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return fold_samples(_Grid, ("params", "control"), ("grid",), info, in_dims, inputs)


grid = _Grid.run
"""The normalised coordinates of a source, (N, *size, dims) in the dtype of ``params``."""
