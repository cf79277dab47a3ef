"""Samples tap by tap: any mode, and anything autograd makes of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..calls import at_least
from ..kernels.modes import EXTENDING, Interpolation, Padding, paddings_of
from .sources import unnormalise

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


def _fold(x: Tensor, low: float, span: int) -> tuple[Tensor, Tensor]:
    """x reflected between low and low + span, and the slope; beyond low + span where that is low."""
    distance, period = (x - low).abs(), at_least(2 * span, 1)
    along = distance - (distance / period).floor() * period
    slope = torch.where((along < span) == (x >= low), 1.0, -1.0).to(x.dtype)
    return span - (along - span).abs() + low, slope


def _near(x: Tensor, low: float, period: float) -> Tensor:
    """x moved by whole periods to ``low`` or a little above; NaN and infinities to ``low`` itself."""
    near, _ = _limit(x - ((x - low) / period).floor().detach() * period, low, low + period + 1)
    return torch.where(x.isfinite(), near, low)


def _pad_index(i: Tensor, size: int, padding: Padding, align_corners: bool) -> Tensor:
    """The pixel read in place of pixel i, which is near the image but under circular padding."""
    if padding == Padding.CIRCULAR:
        return i % size
    if padding == Padding.REFLECTION:
        mirror = 0 if align_corners else 1
        i = torch.where(i < 0, -i - mirror, i)
        i = torch.where(i >= size, 2 * size - 2 + mirror - i, i)
        i = torch.where(i < 0, -i - mirror, i)
    elif padding not in (Padding.BORDER, Padding.FRAMED, Padding.ZEROS):
        raise NotImplementedError(f"which pixels does {padding!r} read? (reference/taps.py)")
    return i if padding == Padding.ZEROS else i.clamp(0, size - 1)


# A tap of one axis: the pixel's index, whether it may be read, its weight and the weight's derivatives.
_Tap = tuple[Tensor, Tensor, list[Tensor]]
_Modes = tuple[Interpolation, int, bool]  # of the paddings the code


def _axis_taps(x: Tensor, size: int, padding: Padding, modes: _Modes, order: int) -> list[_Tap]:
    """Every pixel that coordinate ``x`` reads, with ``order`` derivatives of its weight by ``x``."""
    interpolation, _, align_corners = modes
    low = 0.0 if align_corners else -0.5
    span = size - int(align_corners)
    kept = (x >= low) & (x <= low + span) if padding == Padding.FRAMED else None
    if padding == Padding.CIRCULAR:  # far ones, whose whole numbers would be too large, by whole periods
        x = torch.where(x.abs() < 2**30, x, _near(x, low, size))
    if interpolation == Interpolation.BICUBIC:
        if padding == Padding.REFLECTION:
            near = _near(x, low, at_least(2 * span, 1))
        elif padding == Padding.CIRCULAR:
            near = x
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
            i = _pad_index(down.long() + k - 1, size, padding, align_corners)
            taps.append((i, (i >= 0) & (i < size), jets[k]))
    else:
        if padding == Padding.ZEROS:
            x, slope = _limit(x, -2, size + 1)
        elif padding == Padding.CIRCULAR:
            slope = torch.ones_like(x)
        elif padding in EXTENDING:
            x, slope = _limit(x, 0, size - 1)
        elif padding == Padding.REFLECTION:
            x, fold = _fold(x, low, span)
            x, slope = _limit(x, 0, size - 1)
            slope = slope * fold
        else:
            raise NotImplementedError(f"what slopes has {padding!r}? (reference/taps.py)")
        flat = torch.zeros_like(x)
        if interpolation == Interpolation.NEAREST:
            pixels = [x.detach().round().long()]
            jets = [[torch.ones_like(x), flat, flat]]
        else:
            down = x.detach().floor()
            t = x - down
            pixels = [down.long(), down.long() + 1]
            jets = [[1 - t, -slope, flat], [t, slope, flat]]
        if padding == Padding.CIRCULAR:
            pixels = [i % size for i in pixels]
        elif padding in (Padding.BORDER, Padding.REFLECTION, Padding.FRAMED):
            # float32 may have rounded the last pixel's number up, from 2^24 on
            pixels[0] = pixels[0].clamp(max=size - 1)
            pixels[1:] = [pixels[0] + 1 for _ in pixels[1:]]
        taps = [(i, (i >= 0) & (i < size), jet) for i, jet in zip(pixels, jets, strict=True)]
    if kept is not None:
        taps = [(i, inside & kept, jet) for i, inside, jet in taps]
    return taps


class Taps:
    """Every pixel that is read for the (N, *size, dims) pixel coordinates, whose number is P.

    Iterates over (flat index, in bounds, the jets of the axes' weights), each of shape (N, P).
    """

    def __init__(self, pixels: Tensor, in_size: Sequence[int], modes: _Modes, order: int = 0) -> None:
        self.in_size = in_size
        paddings = paddings_of(modes[1], len(in_size))
        self.axes = [
            _axis_taps(pixels[..., k].flatten(1), size, padding, modes, order)
            for k, (size, padding) in enumerate(zip(reversed(in_size), paddings, strict=True))
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


def tap_weight(jets: list[list[Tensor]], *by: int) -> Tensor:
    """The weight of a tap, differentiated by the axes ``by``, (N, P)."""
    weight = jets[0][by.count(0)]
    for axis in range(1, len(jets)):
        weight = weight * jets[axis][by.count(axis)]
    return weight


def weight_along(jets: list[list[Tensor]], direction: Tensor, *by: int) -> Tensor:
    """``tap_weight`` differentiated once more, in a direction (N, P, dims)."""
    weights = torch.stack([tap_weight(jets, *by, axis) for axis in range(len(jets))], -1)
    return (weights * direction).sum(-1)


def read_tap(flat: Tensor, index: Tensor, inside: Tensor) -> Tensor:
    """(N, C, P) of the images (N, C, pixels)."""
    values = flat.gather(2, index.unsqueeze(1).expand(-1, flat.shape[1], -1))
    return torch.where(inside.unsqueeze(1), values, 0.0)


def _add(flat: Tensor, index: Tensor, inside: Tensor, values: Tensor) -> Tensor:
    """The transpose of ``read_tap``: (N, C, P) added to the images (N, C, pixels)."""
    index = index.unsqueeze(1).expand(-1, flat.shape[1], -1)
    return flat.scatter_add(2, index, torch.where(inside.unsqueeze(1), values, 0.0))


def sample_taps(
    input: Tensor, grid: Tensor, interpolation: Interpolation, padding: int, align_corners: bool
) -> Tensor:
    """(N, C, *in_size) and a normalised (N, *size, dims) -> (N, C, *size), differentiable by autograd."""
    pixels = unnormalise(grid, input.shape[2:], align_corners)
    return sample_pixels(input, pixels, (interpolation, padding, align_corners))


def sample_pixels(input: Tensor, pixels: Tensor, modes: _Modes) -> Tensor:
    flat = input.flatten(2)
    output = torch.zeros((), dtype=input.dtype, device=input.device)
    for index, inside, jets in Taps(pixels, input.shape[2:], modes):
        output = output + read_tap(flat, index, inside) * tap_weight(jets).unsqueeze(1)
    return output.unflatten(2, pixels.shape[1:-1])


def image_gradient(
    g: Tensor, in_size: Sequence[int], pixels: Tensor, shift: Tensor | None, modes: _Modes
) -> Tensor:
    """The transpose of ``sample_pixels``; differentiated by the pixels' ``shift``, if that is given."""
    gradient = g.new_zeros((*g.shape[:2], math.prod(in_size)))
    direction = None if shift is None else shift.flatten(1, -2)
    for index, inside, jets in Taps(pixels, in_size, modes, int(shift is not None)):
        weight = tap_weight(jets) if direction is None else weight_along(jets, direction)
        gradient = _add(gradient, index, inside, weight.unsqueeze(1) * g.flatten(2))
    return gradient.unflatten(2, tuple(in_size))


def pixel_gradient(
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
    for index, inside, jets in Taps(pixels, image.shape[2:], modes, 1 + int(shift is not None)):
        if tangent is not None:
            product = (read_tap(tangent.flatten(2), index, inside) * g).sum(1)
            by_axis = [total + tap_weight(jets, k) * product for k, total in enumerate(by_axis)]
        if input is not None and direction is not None:
            product = (read_tap(input.flatten(2), index, inside) * g).sum(1)
            by_axis = [total + weight_along(jets, direction, k) * product for k, total in enumerate(by_axis)]
    return torch.stack(by_axis, -1).view(pixels.shape)
