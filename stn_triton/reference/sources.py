"""Coordinates of every source, and their derivatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

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
        axes.append((centered / max(n - int(align_corners), 1)).view(shape))
    return axes


def base_points(
    size: tuple[int, ...], align_corners: bool, like: Tensor, offset: Tensor | None = None
) -> Tensor:
    """(P, dims + 1): (x, y[, z], 1) of all output pixels.

    offset: by how much they are moved, (N, T, *size, dims), or with 1s for sizes: (N, T, P, dims + 1) then.
    """
    axes = [axis.expand(size) for axis in _base_coordinates(size, align_corners, like)]
    points = torch.stack([*axes, torch.ones_like(axes[0])], -1).flatten(0, -2)
    return points if offset is None else points + pad(offset, (0, 1)).flatten(2, -2)


def horizon(matrix: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """1 / w of every point, (N, T, P), and whether w can be told from 0; the kernels' rule and reason."""
    row = matrix[..., 2, :].unsqueeze(-2)
    w = (row * base).sum(-1)
    rounding, tiny = (2.0**-50, 1e-300) if w.dtype == torch.float64 else (2.0**-21, 1e-37)
    seen = (w.abs() > rounding * (row * base).abs().sum(-1)) & (w.abs() > tiny)
    return torch.where(seen, 1 / torch.where(seen, w, 1.0), 0.0), seen


def _spline_parts(
    control_points: Tensor, base: Tensor, chunk: int = 32
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """For a few control points at a time: which, p - c (P, k, 2), log |p - c|^2 and the basis (P, k)."""
    for start in range(0, control_points.shape[0], chunk):
        part = slice(start, start + chunk)
        offset = base[:, None, :2] - control_points[part]
        squared = offset.square().sum(-1)
        log = torch.where(squared > 1e-30, squared, 1e-30).log()
        yield part, offset, log, squared * log


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
    base = base_points(size, align_corners, params, offset)
    if source == Source.TPS:
        assert control_points is not None
        controls = control_points.shape[0]
        grid = base @ matrix[..., controls:, :]
        for part, _, _, basis in _spline_parts(control_points.to(dtype), base):
            grid = grid + basis @ matrix[..., :controls, :][..., part, :]
    else:
        grid = base @ matrix[..., : len(size), :].transpose(-1, -2)
        if source == Source.PROJECTIVE:
            inverse, seen = horizon(matrix, base)
            grid = torch.where(seen.unsqueeze(-1), grid * inverse.unsqueeze(-1), float("nan"))
    return grid.unflatten(2, size)


def _sum_over_pixels(a: Tensor, b: Tensor) -> Tensor:
    """a^T b. On the CPU in float64: what is summed here a spline's system may magnify."""
    return a.double().mT @ b.double() if a.device.type == "cpu" else a.mT @ b


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
    size = tuple(grad_grid.shape[2:-1])
    g = grad_grid.flatten(2, -2)
    base = base_points(size, align_corners, g, offset)
    matrix = (params.unsqueeze(1) if params.dim() == 3 else params).to(g.dtype)
    by_controls = None
    if source == Source.TPS:
        assert control_points is not None
        controls, rows, moves = control_points.to(g.dtype), [], []
        for part, offset, log, basis in _spline_parts(controls, base):
            rows.append(_sum_over_pixels(basis, g))
            if control_grad:
                weights = matrix[..., : len(controls), :][..., part, :]
                pull = (g @ weights.mT) * torch.where(offset.square().sum(-1) > 0, -2 * (log + 1), 0.0)
                moves.append((pull.unsqueeze(-1) * offset).sum((0, 1, 2)))
        grad = torch.cat([*rows, _sum_over_pixels(base, g)], -2)
        if control_grad:
            by_controls = torch.cat(moves).to(control_points.dtype)
    else:
        if source == Source.PROJECTIVE:
            inverse, seen = horizon(matrix, base)
            grid = (base @ matrix[..., :2, :].mT) * inverse.unsqueeze(-1)
            placed = (seen & grid.isfinite().all(-1)).unsqueeze(-1)
            g = torch.where(placed, g * inverse.unsqueeze(-1), 0.0)
            g = torch.cat([g, -(g * torch.where(placed, grid, 0.0)).sum(-1, keepdim=True)], -1)
        grad = _sum_over_pixels(g, base)
    if params.shape[0] == 1:
        grad = grad.sum(0, keepdim=True)
    return grad.reshape(params.shape).to(params.dtype), by_controls


def projective_jvp(homography: Tensor, tangent: Tensor, size: tuple[int, ...], align_corners: bool) -> Tensor:
    """How the coordinates of (N, T, 3, 3) move, (N, T, *size, 2): by 0 where nothing finite is seen."""
    base = base_points(size, align_corners, homography)
    inverse, seen = horizon(homography, base)
    grid = (base @ homography[..., :2, :].transpose(-1, -2)) * inverse.unsqueeze(-1)
    placed = (seen & grid.isfinite().all(-1)).unsqueeze(-1)
    terms = base @ tangent.transpose(-1, -2)
    coord_tangent = (terms[..., :2] - torch.where(placed, grid, 0.0) * terms[..., 2:]) * inverse.unsqueeze(-1)
    return torch.where(placed, coord_tangent, 0.0).reshape(*coord_tangent.shape[:2], *size, 2)


def spline_control_jvp(
    coefficients: Tensor, control_points: Tensor, tangent: Tensor, size: tuple[int, ...], align_corners: bool
) -> Tensor:
    """How the coordinates of (N, T, K + 3, 2) move with the control points, (N, T, *size, 2)."""
    base = base_points(size, align_corners, coefficients)
    coord_tangent = torch.zeros_like(base[:, :2])
    for part, offset, log, _ in _spline_parts(control_points, base):
        slope = torch.where(offset.square().sum(-1) > 0, -2 * (log + 1), 0.0)
        along = slope * (offset * tangent[part]).sum(-1)
        coord_tangent = coord_tangent + along @ coefficients[..., : len(control_points), :][..., part, :]
    return coord_tangent.reshape(*coord_tangent.shape[:2], *size, 2)


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
    base = base_points(size, align_corners, displacement)[:, :-1]
    return base.view(1, 1, *size, len(size)), displacement
