"""Coordinates of every source, and their derivatives."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..calls import at_least
from ..kernels.modes import Source


def _base_coordinates(size: tuple[int, ...], align_corners: bool, like: Tensor) -> list[Tensor]:
    """Normalised coordinates of the output pixels, x first, each shaped to broadcast over ``size``.

    With aligned corners -1 and 1 are the centres of the outermost pixels, else their outer edges. An
    axis of one pixel lies at 0.
    """
    axes = []
    for dim in reversed(range(len(size))):
        n = size[dim]
        centered = 2 * torch.arange(n, dtype=like.dtype, device=like.device) - (n - 1)
        shape = [-1 if other == dim else 1 for other in range(len(size))]
        axes.append((centered / at_least(n - int(align_corners), 1)).view(shape))
    return axes


def base_axes(
    size: tuple[int, ...], align_corners: bool, like: Tensor, offset: Tensor | None = None
) -> list[Tensor]:
    """What :func:`mapped` takes: x, y[, z] of the output pixels, shaped to broadcast over ``size``.

    offset: by how much they are moved, (N, T, *size, dims), or with 1s for sizes: (N, T, 1, *size) each then.
    """
    axes = _base_coordinates(size, align_corners, like)
    if offset is None:
        return axes
    return [axis + moved.unsqueeze(2) for axis, moved in zip(axes, offset.unbind(-1), strict=True)]


def points_of(axes: Sequence[Tensor]) -> Tensor:
    """(x, y[, z], 1) of all output pixels, (P, dims + 1); of axes with an offset (N, T, P, dims + 1)."""
    points = torch.stack(torch.broadcast_tensors(*axes, torch.ones_like(axes[0])), -1)
    points = points.flatten(-1 - len(axes), -2)
    return points if points.dim() == 2 else points.squeeze(2)


def mapped(matrix: Tensor, axes: Sequence[Tensor]) -> Tensor:
    """``matrix @ (x, y[, z], 1)`` of all output pixels, (N, T, rows, *size), of (N, T, rows, dims + 1).

    A product with each pixel's column would be thousands of small ones. The constant is added last: with a
    crop's large one a row's outputs would share the rounding of a sum that is made once for all of them.
    """
    *linear, constant = matrix[(..., *(None,) * len(axes))].unbind(3)
    terms = [coefficient * axis for coefficient, axis in zip(linear, axes, strict=True)]
    return functools.reduce(torch.add, reversed(terms)) + constant


def horizon(matrix: Tensor, axes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """1 / w of every point, (N, T, 1, *size), and if w can be told from 0: the kernels' rule, and why."""
    row = matrix[..., 2:, :]
    w = mapped(row, axes)
    terms = mapped(row.abs(), [axis.abs() for axis in axes])
    rounding, tiny = (2.0**-50, 1e-300) if w.dtype == torch.float64 else (2.0**-21, 1e-37)
    seen = (w.abs() > rounding * terms) & (w.abs() > tiny)
    return torch.where(seen, 1 / torch.where(seen, w, 1.0), 0.0), seen


def places_seen(homography: Tensor, axes: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """1 / w, (N, T, 1, *size); where points go, (N, T, 2, *size), 0 if nowhere finite; and if they do."""
    inverse, seen = horizon(homography, axes)
    terms = mapped(homography[..., :2, :], axes)
    placed = seen & (terms * inverse).isfinite().all(2, keepdim=True)
    # factors, not their product, whose derivative would multiply 0 by what is no number
    return inverse, torch.where(placed, terms, 0.0) * torch.where(placed, inverse, 0.0), placed


def _spline_parts(
    control_points: Tensor, points: Tensor, chunk: int = 32
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """For a few control points at a time: which, p - c (P, k, 2), log |p - c|^2 and the basis (P, k)."""
    for start in range(0, control_points.shape[0], chunk):
        part = slice(start, min(start + chunk, control_points.shape[0]))
        offset = points[:, None, :2] - control_points[part]
        squared = offset.square().sum(-1)
        log = torch.where(squared > 1e-30, squared, 1e-30).log()
        yield part, offset, log, squared * log


def _slope(offset: Tensor, log: Tensor) -> Tensor:
    """How the basis changes with a control point, over p - c: (P, k); 0 at the point itself."""
    return torch.where(offset.square().sum(-1) > 0, -2 * (log + 1), 0.0)


def coordinates(
    source: Source,
    params: Tensor,
    control_points: Tensor | None,
    size: tuple[int, ...],
    align_corners: bool,
    dtype: torch.dtype,
    offset: Tensor | None = None,
) -> Tensor:
    """The normalised grid (N or 1, T, *size, dims) of a source, in ``dtype``.

    offset: of matrices, how far from the pixels' middles, normalised: (N or 1, T, *size, dims), or with 1s.

    GRID: params (N, *size, dims). AFFINE: (N, [T,] dims, dims + 1). PROJECTIVE: (N, [T,] 3, 3). TPS:
    coefficients (N, [T,] K + 3, 2), control points (K, 2). (A flow is in pixels: see ``operators.places``.)
    """
    params = params.to(dtype)
    if source == Source.GRID:
        return params.unsqueeze(1)
    matrix = params.unsqueeze(1) if params.dim() == 3 else params
    axes = base_axes(size, align_corners, params, offset)
    if source == Source.TPS:
        assert control_points is not None
        rows = matrix.transpose(-1, -2)  # mT is unknown to TorchScript's ONNX
        grid = mapped(rows[..., control_points.shape[0] :], axes)
        for part, _, _, basis in _spline_parts(control_points.to(dtype), points_of(axes)):
            grid = grid + _product(rows[..., part], basis.transpose(0, 1)).unflatten(-1, size)
    else:
        grid = mapped(matrix[..., : len(size), :], axes)
        if source == Source.PROJECTIVE:
            inverse, seen = horizon(matrix, axes)
            grid = torch.where(seen, grid * inverse, float("nan"))
    return grid.movedim(2, -1)


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """``rows @ columns``: one product where all rows have the same columns, not one for each image.

    BLAS may round otherwise for other numbers of rows, so that a spline's last bit can depend on the batch.
    """
    if columns.dim() > 2:
        return rows @ columns
    return (rows.flatten(0, -2) @ columns).view(*rows.shape[:-1], columns.shape[-1])


def _for_sums(g: Tensor) -> Tensor:
    """(N, T, rows, *size) as (N, T, rows, P). On a CPU in float64: a spline's system may magnify the sums."""
    g = g.flatten(3)
    return g.to(torch.float64, memory_format=torch.contiguous_format) if g.device.type == "cpu" else g


def coordinates_backward(
    source: Source,
    grad_grid: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    align_corners: bool,
    control_grad: bool = False,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The transpose of ``coordinates``: d params and d control points from d grid, (N, T, *size, dims)."""
    if source == Source.GRID:
        return grad_grid.squeeze(1).sum_to_size(params.shape).to(params.dtype), None
    axes = base_axes(tuple(grad_grid.shape[2:-1]), align_corners, grad_grid, offset)
    g, points = grad_grid.movedim(-1, 2), points_of(axes)
    matrix = (params.unsqueeze(1) if params.dim() == 3 else params).to(g.dtype)
    by_controls = None
    if source == Source.TPS:
        assert control_points is not None
        summed, moves, columns = _for_sums(g), [], []
        for part, away, log, basis in _spline_parts(control_points.to(g.dtype), points):
            columns.append(_product(summed, basis.to(summed)))
            if control_grad:
                # summed over images, transforms and coordinates: one product for all
                pull = torch.tensordot(g.flatten(3), matrix[..., part, :], ([0, 1, 2], [0, 1, 3]))
                moves.append(((pull * _slope(away, log)).unsqueeze(-1) * away).sum(0))
        grad = torch.cat([*columns, _product(summed, points.to(summed))], -1).mT
        if control_grad:
            by_controls = torch.cat(moves).to(control_points.dtype)
    else:
        if source == Source.PROJECTIVE:
            inverse, place, placed = places_seen(matrix, axes)
            g = torch.where(placed, g * inverse, 0.0)
            g = torch.cat([g, -(g * place).sum(2, keepdim=True)], 2)
        summed = _for_sums(g)
        grad = _product(summed, points.to(summed))
    if params.shape[0] == 1:
        grad = grad.sum(0, keepdim=True)
    return grad.reshape(params.shape).to(params.dtype), by_controls


def projective_jvp(homography: Tensor, tangent: Tensor, size: tuple[int, ...], align_corners: bool) -> Tensor:
    """How the coordinates of (N, T, 3, 3) move, (N, T, *size, 2): by 0 where nothing finite is seen."""
    axes = base_axes(size, align_corners, homography)
    inverse, place, placed = places_seen(homography, axes)
    terms = mapped(tangent, axes)
    coord_tangent = (terms[:, :, :2] - place * terms[:, :, 2:]) * inverse
    return torch.where(placed, coord_tangent, 0.0).movedim(2, -1)


def spline_control_jvp(
    coefficients: Tensor, control_points: Tensor, tangent: Tensor, size: tuple[int, ...], align_corners: bool
) -> Tensor:
    """How the coordinates of (N, T, K + 3, 2) move with the control points, (N, T, *size, 2)."""
    points = points_of(base_axes(size, align_corners, coefficients))
    coord_tangent = torch.zeros_like(points[:, 0])
    for part, offset, log, _ in _spline_parts(control_points, points):
        along = _slope(offset, log) * (offset * tangent[part]).sum(-1)
        coord_tangent = coord_tangent + _product(coefficients[..., part, :].mT, along.mT)
    return coord_tangent.reshape(*coord_tangent.shape[:-1], *size).movedim(2, -1)


def pixel_scales(in_size: Sequence[int], align_corners: bool) -> list[float]:
    """Pixels per normalised unit, x first."""
    return [(size - int(align_corners)) / 2 for size in reversed(in_size)]


def unnormalise(grid: Tensor, in_size: Sequence[int], align_corners: bool) -> Tensor:
    scales = pixel_scales(in_size, align_corners)
    axes = zip(grid.unbind(-1), scales, reversed(in_size), strict=True)
    return torch.stack([x * scale + (size - 1) / 2 for x, scale, size in axes], -1)


def flow_grid(flow: Tensor, align_corners: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The output's identity grid and the displacement, (1 and N, 1, *size, dims)."""
    size = tuple(flow.shape[2:])
    displacement = flow.to(dtype).movedim(1, -1).unsqueeze(1)
    axes = torch.broadcast_tensors(*base_axes(size, align_corners, displacement))
    return torch.stack(axes, -1)[None, None], displacement
