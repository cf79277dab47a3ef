"""What samples become after they are taken: filled where they lie outside the image, and rounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.modes import Padding, paddings_of

# Weights whose sum is 1, summed in float32, are off by less.
_ROUNDING = 1e-5


def fills_centres(padding: int, dims: int) -> bool:
    """Whether the fill goes by the centres of samples (border padding); else by their taps."""
    return all(each == Padding.BORDER for each in paddings_of(padding, dims))


def is_inside(pixels: Tensor, in_size: Sequence[int], align_corners: bool) -> Tensor:
    """Of (..., dims) in pixels: whether they lie in the image, its edges included; NaN does not."""
    edge = 0.0 if align_corners else 0.5
    axes = zip(pixels.unbind(-1), reversed(in_size), strict=True)
    return torch.stack([(x >= -edge) & (x <= size - 1 + edge) for x, size in axes], -1).all(-1)


def fill_taps(samples: Tensor, inside: Tensor, fill: Tensor, dims: int) -> Tensor:
    """Samples with the fill, (N, C), in place of the taps outside, where ``inside`` is the others' weight.

    inside: as the samples, with 1 channel. No part of a fill that is not finite is none.
    """
    outside, fill = 1 - inside, _like_samples(fill, samples, dims)
    return samples + torch.where(fill.isfinite() | (outside.abs() > _ROUNDING), outside * fill, 0.0)


def fill_centres(samples: Tensor, inside: Tensor, fill: Tensor, dims: int) -> Tensor:
    """Samples where ``inside``, which has 1 channel; elsewhere the fill, (N, C)."""
    return torch.where(inside, samples, _like_samples(fill, samples, dims))


def _like_samples(fill: Tensor, samples: Tensor, dims: int) -> Tensor:
    """(N, C) as (N, [1,] C, 1, ...)."""
    batch, channels = fill.shape
    return fill.reshape(batch, *(1,) * (samples.dim() - dims - 2), channels, *(1,) * dims)


def rounded(samples: Tensor, dtype: torch.dtype) -> Tensor:
    """Samples in ``dtype``: of integers half to even, and saturated; NaN is 0."""
    if dtype.is_floating_point:
        return samples.to(dtype)
    info = torch.iinfo(dtype)
    return samples.nan_to_num(0.0).clamp(info.min, info.max).round().to(dtype)
