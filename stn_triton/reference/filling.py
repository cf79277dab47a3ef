"""What samples become after they are taken: filled where they lie outside the image, and rounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.modes import Padding, paddings_of

# Weights whose sum is 1 are off by less, in units of the dtype's rounding.
_ROUNDINGS = 64


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

    inside: as the samples, with 1 channel. Of a fill that no tap reads nothing comes in, however large it is.
    """
    outside, fill = 1 - inside, _like_samples(fill, samples, dims)
    some = outside.abs() > _ROUNDINGS * torch.finfo(outside.dtype).eps
    # both are masked: the derivative of what is not taken would be 0 times what it is
    return samples + torch.where(some, outside, 0.0) * torch.where(some, fill, 0.0)


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
