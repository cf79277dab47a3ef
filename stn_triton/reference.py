"""The operators in plain PyTorch: what runs where there is no Triton device, and the tests' oracle.

The values, the derivatives and the treatment of bad coordinates are those of the kernels. ATen's own grid
samplers do the work wherever they give those values; what they lack (tricubic, second derivatives) or do
otherwise is done tap by tap. Everything that is done tap by tap autograd can differentiate again, which is
how third derivatives are made.

Shapes: input (N, C, *in_size); grid (N, T, *size, dims), normalised, x first; size is ([D,] H, W).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import calls
from .kernels.modes import Interpolation, Padding, Source

__all__ = [
    "compute_dtype",
    "coordinates",
    "coordinates_backward",
    "projective_jvp",
    "sample",
    "sample_backward",
    "sample_hvp",
    "sample_jvp",
    "sample_taps",
    "spline_control_jvp",
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
        grid = base @ matrix[..., : len(size), :].transpose(-1, -2)
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


def projective_jvp(homography: Tensor, tangent: Tensor, size: tuple[int, ...], align_corners: bool) -> Tensor:
    """How the coordinates of (N, T, 3, 3) move, (N, T, *size, 2): by 0 where nothing finite is seen."""
    base = _base_points(size, align_corners, homography)
    inverse, seen = _horizon(homography, base)
    grid = (base @ homography[..., :2, :].transpose(-1, -2)) * inverse.unsqueeze(-1)
    placed = (seen & grid.isfinite().all(-1)).unsqueeze(-1)
    terms = base @ tangent.transpose(-1, -2)
    moved = (terms[..., :2] - torch.where(placed, grid, 0.0) * terms[..., 2:]) * inverse.unsqueeze(-1)
    return torch.where(placed, moved, 0.0).reshape(*moved.shape[:2], *size, 2)


def spline_control_jvp(
    coefficients: Tensor, control_points: Tensor, tangent: Tensor, size: tuple[int, ...], align_corners: bool
) -> Tensor:
    """How the coordinates of (N, T, K + 3, 2) move with the control points, (N, T, *size, 2)."""
    base = _base_points(size, align_corners, coefficients)
    moved = torch.zeros_like(base[:, :2])
    for part, offset, log, _ in _spline_parts(control_points, base):
        slope = torch.where(offset.square().sum(-1) > 0, -2 * (log + 1), 0.0)
        along = slope * (offset * tangent[part]).sum(-1)
        moved = moved + along @ coefficients[..., : len(control_points), :][..., part, :]
    return moved.reshape(*moved.shape[:2], *size, 2)


def _pixel_scales(in_size: Sequence[int], align_corners: bool) -> list[float]:
    """Pixels per normalised unit, x first."""
    return [(size - int(align_corners)) / 2 for size in reversed(in_size)]


def _unnormalise(grid: Tensor, in_size: Sequence[int], align_corners: bool) -> Tensor:
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
_CUBIC_A = -0.75


def _cubic_near(t: Tensor, order: int) -> Tensor:
    """The cubic convolution kernel for 0 <= t <= 1, or a derivative of it."""
    a, b = _CUBIC_A + 2, _CUBIC_A + 3
    if order == 0:
        return (a * t - b) * t * t + 1
    return (3 * a * t - 2 * b) * t if order == 1 else 6 * a * t - 2 * b


def _cubic_far(t: Tensor, order: int) -> Tensor:
    """The cubic convolution kernel for 1 <= t <= 2, or a derivative of it."""
    a = _CUBIC_A
    if order == 0:
        return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return (3 * a * t - 10 * a) * t + 8 * a if order == 1 else 6 * a * t - 10 * a


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


# A tap of one axis: the pixel's index, whether it may be read, its weight and the weight's derivatives.
_Tap = tuple[Tensor, Tensor, list[Tensor]]
_Modes = tuple[Interpolation, Padding, bool]


def _axis_taps(x: Tensor, size: int, modes: _Modes, order: int) -> list[_Tap]:
    """Every pixel that coordinate ``x`` reads, with ``order`` derivatives of its weight by ``x``."""
    interpolation, padding, align_corners = modes
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
        jets = [
            [_cubic_far(t + 1, n) for n in range(order + 1)],
            [_cubic_near(t, n) for n in range(order + 1)],
            [(-1) ** n * _cubic_near(1 - t, n) for n in range(order + 1)],
            [(-1) ** n * _cubic_far(2 - t, n) for n in range(order + 1)],
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
            taps.append((i, (i >= 0) & (i < size), jets[k]))
    else:
        if padding == Padding.ZEROS:
            x, slope = _limit(x, -2, size + 1)
        else:
            fold = torch.ones_like(x)
            if padding == Padding.REFLECTION:
                x, fold = _fold(x, low, span)
            x, slope = _limit(x, 0, size - 1)
            slope = slope * fold
        flat = torch.zeros_like(x)
        if interpolation == Interpolation.NEAREST:
            i = _within(x.detach().round().long(), size, padding)
            taps = [(i, (i >= 0) & (i < size), [torch.ones_like(x), flat, flat])]
        else:
            down = x.detach().floor()
            i, t = _within(down.long(), size, padding), x - down
            taps = [
                (i, (i >= 0) & (i < size), [1 - t, -slope, flat]),
                (i + 1, (i + 1 >= 0) & (i + 1 < size), [t, slope, flat]),
            ]
    return taps


class _Taps:
    """Every pixel that is read for the (N, *size, dims) pixel coordinates, whose number is P.

    Iterates over (flat index, in bounds, the jets of the axes' weights), each of shape (N, P).
    """

    def __init__(self, pixels: Tensor, in_size: Sequence[int], modes: _Modes, order: int = 0) -> None:
        self.in_size = in_size
        self.axes = [
            _axis_taps(pixels[..., k].flatten(1), size, modes, order)
            for k, size in enumerate(reversed(in_size))
        ]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[list[Tensor]]]]:
        sizes = list(reversed(self.in_size))
        for taps in itertools.product(*self.axes):
            index, inside, stride = torch.zeros_like(taps[0][0]), torch.ones_like(taps[0][1]), 1
            for tap, size in zip(taps, sizes, strict=True):
                index = index + tap[0].clamp(0, size - 1) * stride
                inside = inside & tap[1]
                stride = stride * size
            yield index, inside, [tap[2] for tap in taps]


def _weight(jets: list[list[Tensor]], *by: int) -> Tensor:
    """The weight of a tap, differentiated by the axes ``by``, (N, P)."""
    weight = jets[0][by.count(0)]
    for axis in range(1, len(jets)):
        weight = weight * jets[axis][by.count(axis)]
    return weight


def _along(jets: list[list[Tensor]], direction: Tensor, *by: int) -> Tensor:
    """``_weight`` differentiated once more, in a direction (N, P, dims)."""
    weights = torch.stack([_weight(jets, *by, axis) for axis in range(len(jets))], -1)
    return (weights * direction).sum(-1)


def _read(flat: Tensor, index: Tensor, inside: Tensor) -> Tensor:
    """(N, C, P) of the images (N, C, pixels)."""
    values = flat.gather(2, index.unsqueeze(1).expand(-1, flat.shape[1], -1))
    return torch.where(inside.unsqueeze(1), values, 0.0)


def _add(flat: Tensor, index: Tensor, inside: Tensor, values: Tensor) -> Tensor:
    """The transpose of ``_read``: (N, C, P) added to the images (N, C, pixels)."""
    index = index.unsqueeze(1).expand(-1, flat.shape[1], -1)
    return flat.scatter_add(2, index, torch.where(inside.unsqueeze(1), values, 0.0))


def sample_taps(
    input: Tensor, grid: Tensor, interpolation: Interpolation, padding: Padding, align_corners: bool
) -> Tensor:
    """(N, C, *in_size) and a normalised (N, *size, dims) -> (N, C, *size), differentiable by autograd."""
    pixels = _unnormalise(grid, input.shape[2:], align_corners)
    return _sample_pixels(input, pixels, (interpolation, padding, align_corners))


def _sample_pixels(input: Tensor, pixels: Tensor, modes: _Modes) -> Tensor:
    flat = input.flatten(2)
    output = torch.zeros((), dtype=input.dtype, device=input.device)
    for index, inside, jets in _Taps(pixels, input.shape[2:], modes):
        output = output + _read(flat, index, inside) * _weight(jets).unsqueeze(1)
    return output.unflatten(2, pixels.shape[1:-1])


def _image_gradient(
    g: Tensor, in_size: Sequence[int], pixels: Tensor, shift: Tensor | None, modes: _Modes
) -> Tensor:
    """The transpose of ``_sample_pixels``; differentiated by the pixels' ``shift``, if that is given."""
    gradient = g.new_zeros((*g.shape[:2], math.prod(in_size)))
    direction = None if shift is None else shift.flatten(1, -2)
    for index, inside, jets in _Taps(pixels, in_size, modes, int(shift is not None)):
        weight = _weight(jets) if direction is None else _along(jets, direction)
        gradient = _add(gradient, index, inside, weight.unsqueeze(1) * g.flatten(2))
    return gradient.unflatten(2, tuple(in_size))


def _pixel_gradient(
    g: Tensor,
    tangent: Tensor | None,
    input: Tensor | None,
    pixels: Tensor,
    shift: Tensor | None,
    modes: _Modes,
) -> Tensor:
    """d of <g, samples of ``tangent``> by the pixels, and that of <g, samples of ``input``>'s change."""
    g = g.flatten(2)
    by_axis = [torch.zeros_like(pixels[..., 0].flatten(1))] * pixels.shape[-1]
    direction = None if shift is None else shift.flatten(1, -2)
    image = tangent if tangent is not None else input
    if image is None:
        return torch.zeros_like(pixels)
    for index, inside, jets in _Taps(pixels, image.shape[2:], modes, 1 + int(shift is not None)):
        if tangent is not None:
            product = (_read(tangent.flatten(2), index, inside) * g).sum(1)
            by_axis = [total + _weight(jets, k) * product for k, total in enumerate(by_axis)]
        if input is not None and direction is not None:
            product = (_read(input.flatten(2), index, inside) * g).sum(1)
            by_axis = [total + _along(jets, direction, k) * product for k, total in enumerate(by_axis)]
    return torch.stack(by_axis, -1).view(pixels.shape)


# ------------------------------------------------------------------------------------------- by ATen
def _aten_fits(
    in_size: Sequence[int], dtype: torch.dtype, interpolation: Interpolation, align_corners: bool
) -> bool:
    """Whether ATen (or ONNX) has the mode, and can be kept from bad coordinates by moving them.

    On an axis of one pixel with aligned corners every coordinate means that pixel, but for NaN and
    infinities: there no other coordinate stands for them.
    """
    has_mode = len(in_size) == 2 or (interpolation != Interpolation.BICUBIC and not _in_onnx_taps(in_size))
    # past 2^24 float32 rounds the number of the last pixel up, and ATen reads there
    exact = dtype == torch.float64 or max(in_size) <= 2**24
    return has_mode and exact and not (align_corners and 1 in in_size)


def _in_onnx_taps(in_size: Sequence[int]) -> bool:
    """Whether a volume is recorded for ``torch.onnx.export(dynamo=True)``, which knows no sampler for it.

    Taps are for one size; where it varies ATen's sampler stays, for ``export.onnx_translations``.
    """
    if calls.tracing_state() is not None or not calls.exports_onnx():
        return False
    return not any(isinstance(size, torch.SymInt) for size in in_size)


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
    if calls.tracing_state() is not None:  # TorchScript's ONNX knows the one that stands for both
        return torch.grid_sampler, aten.grid_sampler_2d_backward.default
    if dims == 2:
        return aten.grid_sampler_2d.default, aten.grid_sampler_2d_backward.default
    return aten.grid_sampler_3d.default, aten.grid_sampler_3d_backward.default


# ----------------------------------------------------------------------------------- the operators
def _fold_transforms(grid: Tensor, batch: int) -> Tensor:
    """(N or 1, T, *size, dims) -> (N, T * size[0], *size[1:], dims): one tall output, one image."""
    return grid.expand(batch, *grid.shape[1:]).flatten(1, 2)


def _folded_images(output: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, T, C, *size) -> (N, C, T * size[0], *size[1:]), in ``dtype``."""
    return output.to(dtype).movedim(1, 2).flatten(2, 3)


def _places(
    source: Source,
    params: Tensor,
    control_points: Tensor | None,
    size: tuple[int, ...],
    in_size: Sequence[int],
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
        scales = _pixel_scales(in_size, align_corners)  # which may be symbols
        axes = zip(displacement.unbind(-1), scales, strict=True)
        displacement = torch.stack([pixels / scale for pixels, scale in axes], -1)
    return grid if displacement is None else grid + displacement


def _in_pixels(source: Source, by_source: Tensor, in_size: Sequence[int], align_corners: bool) -> Tensor:
    """(..., dims) in the source's own units times pixels per unit; for a flow these are pixels already."""
    if source == Source.FLOW:
        return by_source
    return by_source * by_source.new_tensor(_pixel_scales(in_size, align_corners))


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
    if _aten_fits(input.shape[2:], input.dtype, interpolation, align_corners):
        grid = _places(*place, in_pixels=False)
        forward, _ = _sampler(len(size))
        folded = _tame(_fold_transforms(grid, input.shape[0]), padding)
        output = forward(image, folded, int(interpolation), int(padding), align_corners)
    else:
        grid = _places(*place, in_pixels=True)
        output = _sample_pixels(image, _fold_transforms(grid, input.shape[0]), modes)
    return output.unflatten(2, (grid.shape[1], size[0])).movedim(2, 1).to(input.dtype)


def sample_backward(
    grad_output: Tensor,
    input: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    source: Source,
    in_size: Sequence[int],
    interpolation: Interpolation,
    padding: Padding,
    align_corners: bool,
    input_grad: bool,
    params_grad: bool,
    control_grad: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d input, d params and d control points, as far as asked for, from d output, (N, T, C, *size).

    The input may be None where d input alone is asked for.
    """
    dtype = compute_dtype(grad_output, params)
    (batch, _, channels), size = grad_output.shape[:3], tuple(grad_output.shape[3:])
    modes = interpolation, padding, align_corners
    place = source, params, control_points, size, in_size, align_corners, dtype
    g = _folded_images(grad_output, dtype)
    # a stand-in that takes no memory, of which ATen reads no values that matter
    image = g.new_zeros(()).expand(batch, channels, *in_size) if input is None else input.to(dtype)
    coordinates_grad = params_grad or control_grad
    if _aten_fits(in_size, grad_output.dtype, interpolation, align_corners):
        folded = _tame(_fold_transforms(_places(*place, in_pixels=False), batch), padding)
        _, backward = _sampler(len(size))
        codes = int(interpolation), int(padding), align_corners
        grad_input, by_coordinates = backward(g, image, folded, *codes, [input_grad, coordinates_grad])
        if source == Source.FLOW and coordinates_grad:
            by_coordinates = by_coordinates / g.new_tensor(_pixel_scales(in_size, align_corners))
    else:
        folded = _fold_transforms(_places(*place, in_pixels=True), batch)
        if input_grad:
            grad_input = _image_gradient(g, in_size, folded, None, modes)
        if coordinates_grad:
            by_pixels = _pixel_gradient(g, image, None, folded, None, modes)
            by_coordinates = _in_pixels(source, by_pixels, in_size, align_corners)
    by_input = grad_input.to(grad_output.dtype) if input_grad else None
    if not coordinates_grad:
        return by_input, None, None
    if source == Source.FLOW:
        by_params = by_coordinates.movedim(-1, 1).sum_to_size(params.shape).to(params.dtype)
        return by_input, by_params, None
    by_coordinates = by_coordinates.view(batch, -1, *size, len(size))
    return by_input, *coordinates_backward(
        source, by_coordinates, params, control_points, align_corners, control_grad
    )


def sample_jvp(
    input: Tensor | None,
    tangent: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    moved: Tensor | None,
    source: Source,
    size: tuple[int, ...],
    interpolation: Interpolation,
    padding: Padding,
    align_corners: bool,
) -> Tensor:
    """The derivative of the samples, (N, T, C, *size), in the direction of an image and of coordinates.

    tangent: as the input, or None for 0. moved: (N, T, *size, dims) in the source's own units, or None
    for 0; the input is needed with it alone.
    """
    image = input if input is not None else tangent
    assert image is not None
    dtype = compute_dtype(image, params)
    batch, in_size, modes = image.shape[0], image.shape[2:], (interpolation, padding, align_corners)
    place = source, params, control_points, size, in_size, align_corners, dtype
    grid = _places(*place, in_pixels=True)
    pixels = _fold_transforms(grid, batch)
    output = torch.zeros((), dtype=dtype, device=image.device)
    direction = None
    if moved is not None:
        direction = _fold_transforms(_in_pixels(source, moved, in_size, align_corners), batch).flatten(1, -2)
    tangent, input = (None if t is None else t.to(dtype).flatten(2) for t in (tangent, input))
    for index, inside, jets in _Taps(pixels, in_size, modes, int(moved is not None)):
        if tangent is not None:
            output = output + _read(tangent, index, inside) * _weight(jets).unsqueeze(1)
        if input is not None and direction is not None:
            output = output + _read(input, index, inside) * _along(jets, direction).unsqueeze(1)
    return output.unflatten(2, (grid.shape[1], *size)).movedim(2, 1).to(image.dtype)


def sample_hvp(
    grad_output: Tensor,
    input: Tensor | None,
    tangent: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    moved: Tensor | None,
    source: Source,
    in_size: Sequence[int],
    interpolation: Interpolation,
    padding: Padding,
    align_corners: bool,
    input_grad: bool,
    coordinates_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The Hessian of <grad_output, samples> by (input, coordinates) in the direction (tangent, moved).

    Returns d input, in grad_output's dtype, and the gradient by the coordinates, (N, T, *size, dims) in the
    source's own units, as far as asked for. grad_output: (N, T, C, *size); the rest as in ``sample_jvp``.
    """
    dtype = compute_dtype(grad_output, params)
    batch, size, modes = (
        grad_output.shape[0],
        tuple(grad_output.shape[3:]),
        (interpolation, padding, align_corners),
    )
    place = source, params, control_points, size, in_size, align_corners, dtype
    g = _folded_images(grad_output, dtype)
    pixels = _fold_transforms(_places(*place, in_pixels=True), batch)
    shift = None
    if moved is not None:
        shift = _fold_transforms(_in_pixels(source, moved, in_size, align_corners), batch)
    grad_input, by_coordinates = None, None
    if input_grad:
        grad_input = _image_gradient(g, in_size, pixels, shift, modes).to(grad_output.dtype)
    if coordinates_grad:
        tangent, input = (None if t is None else t.to(dtype) for t in (tangent, input))
        by_pixels = _pixel_gradient(g, tangent, input, pixels, shift, modes)
        by_coordinates = _in_pixels(source, by_pixels, in_size, align_corners)
        by_coordinates = by_coordinates.view(batch, -1, *size, len(size))
    return grad_input, by_coordinates
