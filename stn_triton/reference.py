"""The operators in plain PyTorch: what runs where there is no Triton device, and the tests' oracle.

The values, the gradients and the treatment of bad coordinates are those of the kernels. ATen's own grid
samplers do the work wherever they give those values; what they lack (tricubic) or do otherwise is done
tap by tap by ``sample_taps``, which is differentiable any number of times in float64 or float32.

Shapes: input (N, C, *in_size); grid (N, T, *size, dims), normalised, x first; size is ([D,] H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .kernels.modes import Interpolation, Padding, Source

__all__ = [
    "compute_dtype",
    "coordinates",
    "coordinates_backward",
    "sample",
    "sample_backward",
    "sample_taps",
    "sample_taps_backward",
]

# Beyond this many image widths nothing is inside the image. Beyond these a reflection cannot be placed: by
# float32, and by ATen, which counts the turns in 32 bits.
_FAR = 1e4
_UNPLACEABLE = {torch.float32: 2.0**24, torch.float64: 2.0**32}


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any argument is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


# --------------------------------------------------------------------------------- coordinate sources
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


def _base_points(size: tuple[int, ...], align_corners: bool, like: Tensor) -> Tensor:
    """(P, dims + 1): (x, y[, z], 1) of all output pixels."""
    axes = [axis.expand(size) for axis in _base_coordinates(size, align_corners, like)]
    return torch.stack([*axes, torch.ones_like(axes[0])], -1).flatten(0, -2)


def _horizon(matrix: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
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
) -> Tensor:
    """The normalised grid (N or 1, T, *size, dims) of a source, in ``dtype``.

    GRID: params (N, *size, dims). AFFINE: (N, [T,] dims, dims + 1). PROJECTIVE: (N, [T,] 3, 3). TPS:
    coefficients (N, [T,] K + 3, 2), control points (K, 2). (A flow is in pixels: see ``_places``.)
    """
    params = params.to(dtype)
    if source == Source.GRID:
        return params.unsqueeze(1)
    matrix = params.unsqueeze(1) if params.dim() == 3 else params
    base = _base_points(size, align_corners, params)
    if source == Source.TPS:
        assert control_points is not None
        controls = control_points.shape[0]
        grid = base @ matrix[..., controls:, :]
        for part, _, _, basis in _spline_parts(control_points.to(dtype), base):
            grid = grid + basis @ matrix[..., :controls, :][..., part, :]
    else:
        grid = base @ matrix[..., : len(size), :].mT
        if source == Source.PROJECTIVE:
            inverse, seen = _horizon(matrix, base)
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
) -> tuple[Tensor, Tensor | None]:
    """The transpose of ``coordinates``: d params and d control points from d grid, (N, T, *size, dims)."""
    if source == Source.GRID:
        return grad_grid.squeeze(1).sum_to_size(params.shape).to(params.dtype), None
    size = tuple(grad_grid.shape[2:-1])
    g = grad_grid.flatten(2, -2)
    base = _base_points(size, align_corners, g)
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
            inverse, seen = _horizon(matrix, base)
            grid = (base @ matrix[..., :2, :].mT) * inverse.unsqueeze(-1)
            placed = (seen & grid.isfinite().all(-1)).unsqueeze(-1)
            g = torch.where(placed, g * inverse.unsqueeze(-1), 0.0)
            g = torch.cat([g, -(g * torch.where(placed, grid, 0.0)).sum(-1, keepdim=True)], -1)
        grad = _sum_over_pixels(g, base)
    if params.shape[0] == 1:
        grad = grad.sum(0, keepdim=True)
    return grad.reshape(params.shape).to(params.dtype), by_controls


def _pixel_scales(in_size: torch.Size, align_corners: bool) -> list[float]:
    """Pixels per normalised unit, x first."""
    return [(size - int(align_corners)) / 2 for size in reversed(in_size)]


def _unnormalise(grid: Tensor, in_size: torch.Size, align_corners: bool) -> Tensor:
    scales = _pixel_scales(in_size, align_corners)
    axes = zip(grid.unbind(-1), scales, reversed(in_size), strict=True)
    return torch.stack([x * scale + (size - 1) / 2 for x, scale, size in axes], -1)


def _flow_grid(flow: Tensor, align_corners: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The output's identity grid and the displacement, (1 and N, 1, *size, dims)."""
    size = tuple(flow.shape[2:])
    displacement = flow.to(dtype).movedim(1, -1).unsqueeze(1)
    base = _base_points(size, align_corners, displacement)[:, :-1]
    return base.view(1, 1, *size, len(size)), displacement


# --------------------------------------------------------------------------------------- tap by tap
def _cubic_near(t: Tensor, a: float = -0.75) -> Tensor:
    return ((a + 2) * t - (a + 3)) * t * t + 1


def _cubic_near_grad(t: Tensor, a: float = -0.75) -> Tensor:
    return (3 * (a + 2) * t - 2 * (a + 3)) * t


def _cubic_far(t: Tensor, a: float = -0.75) -> Tensor:
    return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a


def _cubic_far_grad(t: Tensor, a: float = -0.75) -> Tensor:
    return (3 * a * t - 10 * a) * t + 8 * a


def _limit(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """x limited to [low, high], NaN to low, and the slope: 0 on the limits themselves."""
    inside = (x > low) & (x < high)
    limited = torch.where(inside, x, torch.where(x > low, high, low).to(x.dtype))
    return limited, inside.to(x.dtype)


def _fold(x: Tensor, low: float, span: float) -> tuple[Tensor, Tensor]:
    """x reflected between low and low + span, and the slope."""
    distance = (x - low).abs()
    along = distance - (distance / (2 * span)).floor() * (2 * span) if span else distance * 0
    slope = torch.where((along < span) == (x >= low), 1.0, -1.0).to(x.dtype)
    return span - (along - span).abs() + low, slope


def _within(i: Tensor, size: int, padding: Padding) -> Tensor:
    """float32 may have rounded the last pixel's number up, from 2^24 on."""
    return i if padding == Padding.ZEROS else i.clamp(max=size - 1)


_Tap = tuple[Tensor, Tensor, Tensor, Tensor]


def _axis_taps(
    x: Tensor, size: int, interpolation: Interpolation, padding: Padding, align_corners: bool
) -> list[_Tap]:
    """(index, in bounds, weight, d weight / d x) of every pixel that coordinate ``x`` reads."""
    low = 0.0 if align_corners else -0.5
    span = float(size - int(align_corners))
    if interpolation == Interpolation.BICUBIC:
        if padding == Padding.REFLECTION:
            period = max(2 * span, 1.0)
            near, _ = _limit(x - ((x - low) / period).floor().detach() * period, low, 2 * size + 1)
            near = torch.where(x.isfinite(), near, low)
        else:
            near, _ = _limit(x, -3, size + 2)
        down = near.detach().floor()
        t = near - down
        weights = [_cubic_far(t + 1), _cubic_near(t), _cubic_near(1 - t), _cubic_far(2 - t)]
        slopes = [
            _cubic_far_grad(t + 1),
            _cubic_near_grad(t),
            -_cubic_near_grad(1 - t),
            -_cubic_far_grad(2 - t),
        ]
        taps = []
        for k in range(4):
            i = down.long() + k - 1
            if padding == Padding.REFLECTION:
                mirror = 0 if align_corners else 1
                i = torch.where(i < 0, -i - mirror, i)
                i = torch.where(i >= size, 2 * size - 2 + mirror - i, i)
                i = torch.where(i < 0, -i - mirror, i)
            if padding != Padding.ZEROS:
                i = i.clamp(0, size - 1)
            taps.append((i, (i >= 0) & (i < size), weights[k], slopes[k]))
    else:
        if padding == Padding.ZEROS:
            x, slope = _limit(x, -2, size + 1)
        else:
            fold = torch.ones_like(x)
            if padding == Padding.REFLECTION:
                x, fold = _fold(x, low, span)
            x, slope = _limit(x, 0, size - 1)
            slope = slope * fold
        if interpolation == Interpolation.NEAREST:
            i = _within(x.detach().round().long(), size, padding)
            taps = [(i, (i >= 0) & (i < size), torch.ones_like(x), torch.zeros_like(x))]
        else:
            down = x.detach().floor()
            i, t = _within(down.long(), size, padding), x - down
            taps = [
                (i, (i >= 0) & (i < size), 1 - t, -slope),
                (i + 1, (i + 1 >= 0) & (i + 1 < size), t, slope),
            ]
    return taps


def _pixel_taps(
    input: Tensor, pixels: Tensor, interpolation: Interpolation, padding: Padding, align_corners: bool
) -> list[list[_Tap]]:
    """``_axis_taps`` of x, y[, z], each of shape (N, P) for the P pixel coordinates of an image."""
    return [
        _axis_taps(pixels[..., k].flatten(1), size, interpolation, padding, align_corners)
        for k, size in enumerate(reversed(input.shape[2:]))
    ]


def _combinations(
    axes: list[list[_Tap]], in_size: torch.Size
) -> Iterator[tuple[Tensor, Tensor, Tensor, list[Tensor]]]:
    """(flat pixel index, in bounds, weight, d weight by each coordinate) of every tap, each (N, 1, P)."""
    strides = [1]
    for size in reversed(in_size[1:]):
        strides.append(strides[-1] * size)
    combined: list[tuple[int, ...]] = [()]
    for axis in axes:
        combined = [(*chosen, k) for chosen in combined for k in range(len(axis))]
    for chosen in combined:
        taps = [axis[k] for axis, k in zip(axes, chosen, strict=True)]
        index, inside, weight = torch.zeros_like(taps[0][0]), taps[0][1], torch.ones_like(taps[0][2])
        for tap, stride, size in zip(taps, strides, reversed(in_size), strict=True):
            index = index + tap[0].clamp(0, size - 1) * stride
            inside, weight = inside & tap[1], weight * tap[2]
        slopes = []
        for k in range(len(taps)):
            slope = taps[k][3]
            for other in range(len(taps)):
                if other != k:
                    slope = slope * taps[other][2]
            slopes.append(slope)
        yield index.unsqueeze(1), inside.unsqueeze(1), weight.unsqueeze(1), slopes


def sample_taps(
    input: Tensor, grid: Tensor, interpolation: Interpolation, padding: Padding, align_corners: bool
) -> Tensor:
    """(N, C, *in_size) and a normalised (N, *size, dims) -> (N, C, *size), differentiable by autograd."""
    pixels = _unnormalise(grid, input.shape[2:], align_corners)
    return _sample_pixels(input, pixels, interpolation, padding, align_corners)


def _sample_pixels(
    input: Tensor, pixels: Tensor, interpolation: Interpolation, padding: Padding, align_corners: bool
) -> Tensor:
    flat = input.flatten(2)
    output = torch.zeros((), dtype=input.dtype, device=input.device)
    axes = _pixel_taps(input, pixels, interpolation, padding, align_corners)
    for index, inside, weight, _ in _combinations(axes, input.shape[2:]):
        values = flat.gather(2, index.expand(-1, flat.shape[1], -1))
        output = output + torch.where(inside, values, 0.0) * weight
    return output.unflatten(2, pixels.shape[1:-1])


def sample_taps_backward(
    grad_output: Tensor,
    input: Tensor,
    grid: Tensor,
    interpolation: Interpolation,
    padding: Padding,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """d input and d grid, written out."""
    pixels = _unnormalise(grid, input.shape[2:], align_corners)
    modes = interpolation, padding, align_corners
    grad_input, grad_pixels = _sample_pixels_backward(grad_output, input, pixels, *modes)
    return grad_input, grad_pixels * grad_pixels.new_tensor(_pixel_scales(input.shape[2:], align_corners))


def _sample_pixels_backward(
    grad_output: Tensor,
    input: Tensor,
    pixels: Tensor,
    interpolation: Interpolation,
    padding: Padding,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    g, flat = grad_output.flatten(2), input.flatten(2)
    grad_input = torch.zeros_like(flat)
    grad_axes = [torch.zeros_like(pixels[..., 0].flatten(1)) for _ in range(pixels.shape[-1])]
    axes = _pixel_taps(input, pixels, interpolation, padding, align_corners)
    for index, inside, weight, slopes in _combinations(axes, input.shape[2:]):
        index = index.expand(-1, flat.shape[1], -1)
        grad_input = grad_input.scatter_add(2, index, torch.where(inside, weight * g, 0.0))
        product = (torch.where(inside, flat.gather(2, index), 0.0) * g).sum(1)
        grad_axes = [total + slope * product for total, slope in zip(grad_axes, slopes, strict=True)]
    return grad_input.view(input.shape), torch.stack(grad_axes, -1).view(pixels.shape)


# ------------------------------------------------------------------------------------------- by ATen
def _aten_fits(input: Tensor, interpolation: Interpolation, align_corners: bool) -> bool:
    """Whether ATen has the mode, and can be kept from bad coordinates by moving them.

    On an axis of one pixel with aligned corners every coordinate means that pixel, but for NaN and
    infinities: there no other coordinate stands for them.
    """
    has_mode = input.dim() == 4 or interpolation != Interpolation.BICUBIC
    # past 2^24 float32 rounds the number of the last pixel up, and ATen reads there
    exact = input.dtype == torch.float64 or max(input.shape[2:]) <= 2**24
    return has_mode and exact and not (align_corners and 1 in input.shape[2:])


def _tame(grid: Tensor, padding: Padding) -> Tensor:
    """A grid with the same samples whose coordinates ATen's CPU kernels can be given.

    With an infinity or NaN those read and write outside the image (border and reflection padding).
    NaN reads nothing under zeros, else pixel 0; what cannot be placed is reflected to the lower edge.
    """
    if padding == Padding.REFLECTION:
        return torch.where(grid.abs() < _UNPLACEABLE[grid.dtype], grid, -1.0)
    return grid.nan_to_num(nan=-_FAR).clamp(-_FAR, _FAR)


def _sampler(dims: int) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    aten = torch.ops.aten
    if dims == 2:
        return aten.grid_sampler_2d.default, aten.grid_sampler_2d_backward.default
    return aten.grid_sampler_3d.default, aten.grid_sampler_3d_backward.default


# ----------------------------------------------------------------------------------- the operators
def _fold_transforms(grid: Tensor, batch: int) -> Tensor:
    """(N or 1, T, *size, dims) -> (N, T * size[0], *size[1:], dims): one tall output, one image."""
    return grid.expand(batch, *grid.shape[1:]).flatten(1, 2)


def _places(
    source: Source,
    params: Tensor,
    control_points: Tensor | None,
    size: tuple[int, ...],
    in_size: torch.Size,
    align_corners: bool,
    dtype: torch.dtype,
    *,
    in_pixels: bool,
) -> Tensor:
    """Where the input is read, (N or 1, T, *size, dims): normalised, or in pixels. A flow adds pixels."""
    displacement = None
    if source == Source.FLOW:
        grid, displacement = _flow_grid(params, align_corners, dtype)
    else:
        grid = coordinates(source, params, control_points, size, align_corners, dtype)
    if in_pixels:
        grid = _unnormalise(grid, in_size, align_corners)
    elif displacement is not None:
        displacement = displacement / displacement.new_tensor(_pixel_scales(in_size, align_corners))
    return grid if displacement is None else grid + displacement


def sample(
    input: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    source: Source,
    size: tuple[int, ...],
    interpolation: Interpolation,
    padding: Padding,
    align_corners: bool,
) -> Tensor:
    """(N, T, C, *size), in the input's dtype. Sizes must not be 0."""
    dtype = compute_dtype(input, params)
    image, modes = input.to(dtype), (interpolation, padding, align_corners)
    place = source, params, control_points, size, input.shape[2:], align_corners, dtype
    if _aten_fits(input, interpolation, align_corners):
        grid = _places(*place, in_pixels=False)
        forward, _ = _sampler(len(size))
        folded = _tame(_fold_transforms(grid, input.shape[0]), padding)
        output = forward(image, folded, int(interpolation), int(padding), align_corners)
    else:
        grid = _places(*place, in_pixels=True)
        output = _sample_pixels(image, _fold_transforms(grid, input.shape[0]), *modes)
    return output.unflatten(2, (grid.shape[1], size[0])).movedim(2, 1).to(input.dtype)


def sample_backward(
    grad_output: Tensor,
    input: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    source: Source,
    interpolation: Interpolation,
    padding: Padding,
    align_corners: bool,
    input_grad: bool = True,
    params_grad: bool = True,
    control_grad: bool = False,
    *,
    by_taps: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d input, d params and d control points, as far as asked for, from d output, (N, T, C, *size).

    With ``by_taps`` never by ATen, whose backward cannot be differentiated again.
    """
    dtype = compute_dtype(input, params)
    size, in_size = tuple(grad_output.shape[3:]), input.shape[2:]
    image, modes = input.to(dtype), (interpolation, padding, align_corners)
    place = source, params, control_points, size, in_size, align_corners, dtype
    g = grad_output.to(dtype).movedim(1, 2).flatten(2, 3)
    scales = g.new_tensor(_pixel_scales(in_size, align_corners))
    if not by_taps and _aten_fits(input, interpolation, align_corners):
        folded = _tame(_fold_transforms(_places(*place, in_pixels=False), input.shape[0]), padding)
        _, backward = _sampler(len(size))
        codes = int(interpolation), int(padding), align_corners
        grad_input, grad_grid = backward(g, image, folded, *codes, [input_grad, True])
        grad_pixels = grad_grid / scales if source == Source.FLOW else None
    else:
        folded = _fold_transforms(_places(*place, in_pixels=True), input.shape[0])
        grad_input, grad_pixels = _sample_pixels_backward(g, image, folded, *modes)
        grad_grid = grad_pixels * scales
    by_params, by_controls = None, None
    if source == Source.FLOW and params_grad:
        assert grad_pixels is not None
        by_params = grad_pixels.movedim(-1, 1).sum_to_size(params.shape).to(params.dtype)
    elif params_grad or control_grad:
        grad_grid = grad_grid.view(input.shape[0], -1, *size, len(size))
        by_params, by_controls = coordinates_backward(
            source, grad_grid, params, control_points, align_corners, control_grad
        )
    return grad_input.to(input.dtype) if input_grad else None, by_params, by_controls
