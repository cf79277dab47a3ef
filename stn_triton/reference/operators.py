"""What each operator computes: by ATen where it has the mode, else tap by tap."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import calls
from ..kernels.host.dtypes import compute_dtype, sample_dtype
from ..kernels.modes import Interpolation, Padding, Source
from ..versions import TRICUBIC
from .filling import fill_centres, fill_taps, fills_centres, is_inside, rounded
from .footprints import sub_samples
from .sources import coordinates, coordinates_backward, flow_grid, pixel_scales, unnormalise
from .taps import Taps, image_gradient, pixel_gradient, read_tap, sample_pixels, tap_weight, weight_along

# Beyond this many image widths nothing is inside the image. Beyond these a reflection cannot be placed: by
# float32, and by ATen, which counts the turns in 32 bits.
_FAR = 1e4
_UNPLACEABLE = {torch.float32: 2.0**24, torch.float64: 2.0**32}


# ------------------------------------------------------------------------------------------- by ATen
def _aten_fits(
    in_size: Sequence[int],
    like: Tensor,
    interpolation: Interpolation,
    padding: int,
    align_corners: bool,
) -> bool:
    """Whether ATen (or ONNX) has the mode for tensors like ``like``, and can be kept from bad coordinates by
    moving them.

    On an axis of one pixel with aligned corners every coordinate means that pixel, but for NaN and
    infinities: there no other coordinate stands for them.
    """
    has_mode = len(in_size) == 2 or not _in_onnx_taps(in_size)
    if len(in_size) == 3 and interpolation == Interpolation.BICUBIC:
        has_mode = TRICUBIC and like.device.type in ("cpu", "cuda") and not calls.leaves_pytorch()
    # past 2^24 float32 rounds the number of the last pixel up, and ATen reads there
    exact = like.dtype == torch.float64 or max(in_size) <= 2**24
    has_mode = has_mode and padding in (Padding.ZEROS, Padding.BORDER, Padding.REFLECTION)
    return has_mode and exact and not (align_corners and 1 in in_size)


def _in_onnx_taps(in_size: Sequence[int]) -> bool:
    """Whether a volume is recorded for ``torch.onnx.export(dynamo=True)``, which knows no sampler for it.

    Taps are for one size; where it varies ATen's sampler stays, for ``export.onnx_translations``.
    """
    if calls.tracing_state() is not None or not calls.exports_onnx():
        return False
    return not any(isinstance(size, torch.SymInt) for size in in_size)


def _tame(grid: Tensor, padding: int) -> Tensor:
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


def places(
    source: Source,
    params: Tensor,
    control_points: Tensor | None,
    size: tuple[int, ...],
    in_size: Sequence[int],
    align_corners: bool,
    dtype: torch.dtype,
    offset: Tensor | None = None,
    *,
    in_pixels: bool,
) -> Tensor:
    """Where the input is read, (N or 1, T, *size, dims): normalised, or in pixels. A flow adds pixels.

    offset: as of ``coordinates``.
    """
    displacement = None
    if source == Source.FLOW:
        grid, displacement = flow_grid(params, align_corners, dtype)
    else:
        grid = coordinates(source, params, control_points, size, align_corners, dtype, offset)
    if in_pixels:
        grid = unnormalise(grid, in_size, align_corners)
    elif displacement is not None:
        scales = pixel_scales(in_size, align_corners)  # which may be symbols
        axes = zip(displacement.unbind(-1), scales, strict=True)
        displacement = torch.stack([pixels / scale for pixels, scale in axes], -1)
    return grid if displacement is None else grid + displacement


def _in_pixels(source: Source, by_source: Tensor, in_size: Sequence[int], align_corners: bool) -> Tensor:
    """(..., dims) in the source's own units times pixels per unit; for a flow these are pixels already."""
    if source == Source.FLOW:
        return by_source
    return by_source * by_source.new_tensor(pixel_scales(in_size, align_corners))


def sample(
    input: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    source: Source,
    size: tuple[int, ...],
    interpolation: Interpolation,
    padding: int,
    align_corners: bool,
    sampled: torch.dtype | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """(N, T, C, *size) in the type ``sampled``, by default ``sample_dtype``. Sizes must not be 0.

    offset: as of ``coordinates``.
    """
    if interpolation == Interpolation.AVERAGED:
        averages = source, size, interpolation, padding, align_corners, sampled or sample_dtype(input)
        return sample_as(input, params, control_points, None, *averages)
    dtype = compute_dtype(input, params)
    image, modes = input.to(dtype), (interpolation, padding, align_corners)
    place = source, params, control_points, size, input.shape[2:], align_corners, dtype, offset
    if _aten_fits(input.shape[2:], input, interpolation, padding, align_corners):
        grid = places(*place, in_pixels=False)
        forward, _ = _sampler(len(size))
        folded = _tame(_fold_transforms(grid, input.shape[0]), padding)
        output = forward(image, folded, int(interpolation), int(padding), align_corners)
    else:
        grid = places(*place, in_pixels=True)
        output = sample_pixels(image, _fold_transforms(grid, input.shape[0]), modes)
    return output.unflatten(2, (grid.shape[1], size[0])).movedim(2, 1).to(sampled or sample_dtype(input))


def sample_as(
    input: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    fill: Tensor | None,
    source: Source,
    size: tuple[int, ...],
    interpolation: Interpolation,
    padding: int,
    align_corners: bool,
    dtype: torch.dtype,
    offset: Tensor | None = None,
) -> Tensor:
    """(N, T, C, *size) in ``dtype``, with the fill, (N, C), in place of what lies outside the image.

    offset: as of ``coordinates``.
    """
    compute, in_size, dims = compute_dtype(input, params), input.shape[2:], len(size)
    if interpolation == Interpolation.AVERAGED:
        linear = source, size, Interpolation.BILINEAR, padding, align_corners, compute
        image, samples = input.to(compute), torch.zeros((), dtype=compute, device=input.device)
        for s in sub_samples(source, params, size, in_size, align_corners, compute):
            one = sample_as(image, params, control_points, fill, *linear, s.offset)
            samples = samples + s.weighted(one)
        return rounded(samples, dtype)
    place = source, size, interpolation, padding, align_corners
    samples = sample(input, params, control_points, *place, compute, offset)
    if fill is not None and fills_centres(padding, dims):
        at = source, params, control_points, size, in_size, align_corners, compute, offset
        inside = is_inside(places(*at, in_pixels=True), in_size, align_corners)
        samples = fill_centres(samples, inside.unsqueeze(2), fill.to(compute), dims)
    elif fill is not None:
        ones = torch.ones((), dtype=compute, device=input.device).expand(input.shape[0], 1, *in_size)
        inside = sample(ones, params, control_points, *place, compute, offset)
        samples = fill_taps(samples, inside, fill.to(compute), dims)
    return rounded(samples, dtype)


def sample_backward(
    grad_output: Tensor,
    input: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    source: Source,
    in_size: Sequence[int],
    interpolation: Interpolation,
    padding: int,
    align_corners: bool,
    input_grad: bool,
    params_grad: bool,
    control_grad: bool = False,
    offset: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d input, d params and d control points, as far as asked for, from d output, (N, T, C, *size).

    The input may be None where d input alone is asked for. offset: as of ``coordinates``.
    """
    dtype = compute_dtype(grad_output, params)
    if interpolation == Interpolation.AVERAGED:
        wanted = input_grad, params_grad
        modes = Interpolation.BILINEAR, padding, align_corners
        return _averaged_backward(grad_output.to(dtype), input, params, source, in_size, modes, wanted)
    (batch, _, channels), size = grad_output.shape[:3], tuple(grad_output.shape[3:])
    modes = interpolation, padding, align_corners
    place = source, params, control_points, size, in_size, align_corners, dtype, offset
    g = _folded_images(grad_output, dtype)
    # a stand-in that takes no memory, of which ATen reads no values that matter
    image = g.new_zeros(()).expand(batch, channels, *in_size) if input is None else input.to(dtype)
    coordinates_grad = params_grad or control_grad
    # under deterministic algorithms ATen's backward samplers raise on GPUs; its scatter_add sums in one order
    repeats = grad_output.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled()
    if repeats and _aten_fits(in_size, grad_output, interpolation, padding, align_corners):
        folded = _tame(_fold_transforms(places(*place, in_pixels=False), batch), padding)
        _, backward = _sampler(len(size))
        codes = int(interpolation), int(padding), align_corners
        grad_input, by_coordinates = backward(g, image, folded, *codes, [input_grad, coordinates_grad])
        if source == Source.FLOW and coordinates_grad:
            by_coordinates = by_coordinates / g.new_tensor(pixel_scales(in_size, align_corners))
    else:
        folded = _fold_transforms(places(*place, in_pixels=True), batch)
        if input_grad:
            grad_input = image_gradient(g, in_size, folded, None, modes)
        if coordinates_grad:
            by_pixels = pixel_gradient(g, image, None, folded, None, modes)
            by_coordinates = _in_pixels(source, by_pixels, in_size, align_corners)
    by_input = grad_input.to(grad_output.dtype) if input_grad else None
    if not coordinates_grad:
        return by_input, None, None
    if source == Source.FLOW:
        by_params = by_coordinates.movedim(-1, 1).sum_to_size(params.shape).to(params.dtype)
        return by_input, by_params, None
    by_coordinates = by_coordinates.view(batch, -1, *size, len(size))
    return by_input, *coordinates_backward(
        source, by_coordinates, params, control_points, align_corners, control_grad, offset
    )


def _averaged_backward(
    grad_output: Tensor,
    input: Tensor | None,
    params: Tensor,
    source: Source,
    in_size: Sequence[int],
    modes: tuple[Interpolation, int, bool],
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, None]:
    """``sample_backward`` of averages: in the compute dtype, sub-sample by sub-sample."""
    dtype, size = grad_output.dtype, tuple(grad_output.shape[3:])
    image, matrix = None if input is None else input.to(dtype), params.to(dtype)
    by_input = grad_output.new_zeros((grad_output.shape[0], grad_output.shape[2], *in_size))
    by_params = torch.zeros_like(matrix)
    for s in sub_samples(source, params, size, in_size, modes[2], dtype):
        g = s.weighted(grad_output)
        found = sample_backward(g, image, matrix, None, source, in_size, *modes, *wanted, False, s.offset)
        for total, more in zip((by_input, by_params), found):
            if more is not None:
                total += more
    return by_input if wanted[0] else None, by_params.to(params.dtype) if wanted[1] else None, None


def sample_averages(
    input: Tensor,
    params: Tensor,
    source: Source,
    size: tuple[int, ...],
    padding: int,
    align_corners: bool,
) -> Tensor:
    """``sample`` of averages, tap by tap: what autograd can differentiate again."""
    dtype, in_size = compute_dtype(input, params), input.shape[2:]
    image, modes = input.to(dtype), (Interpolation.BILINEAR, padding, align_corners)
    total = torch.zeros((), dtype=dtype, device=input.device)
    for s in sub_samples(source, params, size, in_size, align_corners, dtype):
        grid = places(source, params, None, size, in_size, align_corners, dtype, s.offset, in_pixels=True)
        output = sample_pixels(image, _fold_transforms(grid, input.shape[0]), modes)
        total = total + s.weighted(output.unflatten(2, (grid.shape[1], size[0])).movedim(2, 1))
    return total.to(sample_dtype(input))


def sample_jvp(
    input: Tensor | None,
    tangent: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    coord_tangent: Tensor | None,
    source: Source,
    size: tuple[int, ...],
    interpolation: Interpolation,
    padding: int,
    align_corners: bool,
) -> Tensor:
    """The derivative of the samples, (N, T, C, *size), in the direction of an image and of coordinates.

    tangent: as the input, or None for 0. coord_tangent: (N, T, *size, dims) in the source's own units, or
    None for 0; the input is needed with it alone.
    """
    image = input if input is not None else tangent
    assert image is not None
    dtype = compute_dtype(image, params)
    batch, in_size, modes = image.shape[0], image.shape[2:], (interpolation, padding, align_corners)
    place = source, params, control_points, size, in_size, align_corners, dtype
    grid = places(*place, in_pixels=True)
    pixels = _fold_transforms(grid, batch)
    output = torch.zeros((), dtype=dtype, device=image.device)
    direction = None
    if coord_tangent is not None:
        direction = _fold_transforms(
            _in_pixels(source, coord_tangent, in_size, align_corners), batch
        ).flatten(1, -2)
    tangent, input = (None if t is None else t.to(dtype).flatten(2) for t in (tangent, input))
    for index, inside, jets in Taps(pixels, in_size, modes, int(coord_tangent is not None)):
        if tangent is not None:
            output = output + read_tap(tangent, index, inside) * tap_weight(jets).unsqueeze(1)
        if input is not None and direction is not None:
            output = output + read_tap(input, index, inside) * weight_along(jets, direction).unsqueeze(1)
    return output.unflatten(2, (grid.shape[1], *size)).movedim(2, 1).to(sample_dtype(image))


def sample_hvp(
    grad_output: Tensor,
    input: Tensor | None,
    tangent: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    coord_tangent: Tensor | None,
    source: Source,
    in_size: Sequence[int],
    interpolation: Interpolation,
    padding: int,
    align_corners: bool,
    input_grad: bool,
    coordinates_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The Hessian of <grad_output, samples> by input and coordinates, times (tangent, coord_tangent).

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
    pixels = _fold_transforms(places(*place, in_pixels=True), batch)
    shift = None
    if coord_tangent is not None:
        shift = _fold_transforms(_in_pixels(source, coord_tangent, in_size, align_corners), batch)
    grad_input, by_coordinates = None, None
    if input_grad:
        grad_input = image_gradient(g, in_size, pixels, shift, modes).to(grad_output.dtype)
    if coordinates_grad:
        tangent, input = (None if t is None else t.to(dtype) for t in (tangent, input))
        by_pixels = pixel_gradient(g, tangent, input, pixels, shift, modes)
        by_coordinates = _in_pixels(source, by_pixels, in_size, align_corners)
        by_coordinates = by_coordinates.view(batch, -1, *size, len(size))
    return grad_input, by_coordinates
