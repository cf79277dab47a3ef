"""The sub-samples of an output pixel's footprint, in plain PyTorch: how many, where, and with what weight.

The numbers are those of ``kernels/device/footprints.py``, which has the formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.modes import MOST_SAMPLES, Source
from .sources import base_axes, pixel_scales, places_seen

_CELL = 16  # outputs along each axis that share their numbers, of homographies


class SubSample(NamedTuple):
    """One sub-sample of each output pixel, (N or 1, T, *size); of affine maps (N or 1, T, 1, 1[, 1]).

    offset: its distance from the pixel's middle in normalised units, (..., dims). share: its weight. exists:
    whether the pixel has it.
    """

    offset: Tensor
    share: Tensor
    exists: Tensor

    def weighted(self, output: Tensor) -> Tensor:
        """Outputs (N, T, C, *size) times the weight; 0 where there is no sub-sample, whatever was read."""
        return torch.where(self.exists.unsqueeze(2), output * self.share.unsqueeze(2), 0.0)


def sub_samples(
    source: Source,
    params: Tensor,
    size: tuple[int, ...],
    in_size: Sequence[int],
    align_corners: bool,
    dtype: torch.dtype,
) -> Iterator[SubSample]:
    """The sub-samples of a matrix's outputs, one after the other, as many as the largest footprint has."""
    matrix = (params.unsqueeze(1) if params.dim() == 3 else params).to(dtype)
    steps = matrix.new_tensor([max(n - int(align_corners), 1) for n in reversed(size)])
    pixels = 2 * matrix.new_tensor(pixel_scales(in_size, align_corners))
    per_step = pixels.unsqueeze(-1) / steps
    if source == Source.AFFINE:
        squared = (matrix[..., :-1] * per_step).square().sum(-2)
        samples = _samples_along(squared).view(*squared.shape[:2], *(1,) * len(size), len(size))
    else:
        samples = _projective_samples(matrix, size, align_corners, per_step)
    count = samples.prod(-1)
    for number in range(_largest(count)):
        along, rest = [], torch.full_like(count, number)
        for n in samples.unbind(-1):
            along.append(rest % n)
            rest = rest // n
        distance = (2 * torch.stack(along, -1) + 1 - samples).to(dtype) / samples
        yield SubSample(distance / steps, 1 / count.to(dtype), number < count)


def _samples_along(squared: Tensor) -> Tensor:
    return (squared.sqrt() - 1e-3).ceil().nan_to_num(1.0).clamp(1, MOST_SAMPLES).long()


def _projective_samples(
    matrix: Tensor, size: tuple[int, ...], align_corners: bool, per_step: Tensor
) -> Tensor:
    """(N, T, *size, 2): by the map's derivative at the corners of each output's cell."""
    starts = [torch.arange(0, n, _CELL, device=matrix.device) for n in size]
    corners = [torch.cat([first, (first + _CELL - 1).clamp(max=n - 1)]) for first, n in zip(starts, size)]
    x, y = base_axes(size, align_corners, matrix)
    axes = x[:, corners[1]], y[corners[0]]  # of (top and bottom) x (left and right)
    inverse, place, placed = places_seen(matrix, axes)
    rows, last = matrix[:, :, :2, :2, None, None], matrix[:, :, 2:, :2, None, None]
    linear = (rows - place.unsqueeze(3) * last) * inverse.unsqueeze(2)
    squared = (linear * per_step[..., None, None]).square().sum(2).movedim(2, -1)

    def by_cell(tensor: Tensor) -> Tensor:
        """(N, T, 2 cells_y, 2 cells_x, ...) -> (N, T, 4, cells_y, cells_x, ...)."""
        along = (2, len(starts[0]), 2, len(starts[1]))
        return tensor.flatten(2, 3).unflatten(2, along).movedim(4, 3).flatten(2, 3)

    number, number_ahead = (by_cell(each.squeeze(2)).sum(2) for each in (placed, placed & (inverse > 0)))
    samples = _samples_along(by_cell(squared.nan_to_num(0.0, torch.inf)).amax(2))
    whole = (number == 4) & ((number_ahead == 0) | (number_ahead == 4))
    near = torch.where(number == 0, 1, MOST_SAMPLES)
    samples = torch.where(whole.unsqueeze(-1), samples, near.unsqueeze(-1))
    rows, columns = (torch.arange(n, device=matrix.device) // _CELL for n in size)
    return samples[:, :, rows][:, :, :, columns]


def _largest(count: Tensor) -> int:
    """As a number, 1 at least: of tensors that function transforms have wrapped as well."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "forward mode and second derivatives cannot be compiled with antialias=True: "
            "how many samples are averaged depends on the values of the map"
        )
    while torch._C._functorch.is_functorch_wrapped_tensor(count):
        count = torch._C._functorch.get_unwrapped(count)
    return int(count.max()) if count.numel() else 1
