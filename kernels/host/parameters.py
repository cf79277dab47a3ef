"""How tensors reach a kernel, and how the gradients of parameters leave it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl

from ..modes import MOST_SAMPLES, Interpolation, Source

DENSE = (int(Source.GRID), int(Source.FLOW))  # integers, which compare sooner than enum members


def axes(values: Sequence) -> tuple:
    """([z,] y, x) as (x, y, z), with 0 for what is missing."""
    return (*reversed(values), 0)[:3]


def channel_dim(tensor: torch.Tensor, dims: int) -> int:
    """The dimension of the channels of (N, C, ...) or (N, T, C, ...)."""
    return tensor.dim() - dims - 1


def source_strides(source: int, params: torch.Tensor) -> tuple[int, ...]:
    """The five strides of a source's parameters (``spec.Params``). A batch of 1 is broadcast."""
    strides = params.stride()
    stride_n = 0 if params.shape[0] == 1 else strides[0]
    if source == Source.GRID:
        return stride_n, strides[-1], *axes(strides[1:-1])
    if source == Source.FLOW:
        return stride_n, strides[1], *axes(strides[2:])
    return stride_n, strides[1] if params.dim() == 4 else 0, strides[-2], strides[-1], 0


def has_fixed_point(
    source: int,
    compute: tl.dtype,
    in_size: Sequence[int],
    size: Sequence[int],
    interpolation: int = Interpolation.BILINEAR,
) -> bool:
    """Whether coordinates can be fixed-point numbers: in float32, which counts pixels up to 2^24."""
    samples = MOST_SAMPLES if interpolation == Interpolation.AVERAGED else 1
    return (
        source in (Source.AFFINE, Source.FLOW)
        and compute == tl.float32
        and max(*in_size, *(samples * n for n in size)) <= 2**24
    )


def image_span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last of one image (of every dimension but the first), both included."""
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    )


def num_controls(control_points: torch.Tensor | None) -> int:
    return 0 if control_points is None else control_points.shape[0]


def pointers(params: torch.Tensor, control_points: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensors that a kernel reads: without control points there is another to point to."""
    return params, params if control_points is None else control_points.contiguous()


# -------------------------------------------------------------------------------------------- gradients
class Sums(NamedTuple):
    """What, besides the parameters, says what ``device.sources.add_gradient`` writes.

    ``controls``: control points for which a gradient is wanted.
    """

    batch: int
    splits: int
    programs: int
    compute: torch.dtype
    controls: int


def gradient_buffer(source: int, params: torch.Tensor, sums: Sums) -> torch.Tensor:
    """What a kernel writes: the gradient itself where one program sees all of it, else partial sums."""
    if source in DENSE:
        if sums.splits == 1 and params.shape[0] == sums.batch:
            return params.new_empty(*params.shape)
        return params.new_empty(sums.splits, sums.batch, *params.shape[1:], dtype=sums.compute)
    rows, columns = params.shape[-2:]
    # control points have two columns, like a spline's coefficients
    shape = sums.batch, rows + sums.controls, columns
    programs = () if sums.programs == 1 else (sums.programs,)
    return params.new_empty(*shape, *programs, dtype=sums.compute)


def reduce_gradient(
    source: int, params: torch.Tensor, buffer: torch.Tensor, control_points: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """d params, and d control points if these are given, from the filled buffer, in a fixed order of sums."""
    shape = params.shape
    if source in DENSE:
        if buffer.dim() == len(shape):
            return buffer, None
        return buffer.sum((0, 1) if shape[0] == 1 else 0).to(params.dtype).view(shape), None
    gradient = buffer if buffer.dim() == 3 else buffer.sum(-1)
    by_controls = None
    if control_points is not None:
        rows = shape[-2]
        by_controls = gradient[:, rows:].sum(0).to(control_points.dtype)
        gradient = gradient[:, :rows]
    if shape[0] == 1 < gradient.shape[0]:
        gradient = gradient.unflatten(0, (-1, shape[1] if len(shape) == 4 else 1)).sum(0)
    if gradient.dtype != params.dtype:
        gradient = gradient.to(params.dtype)
    return gradient if gradient.shape == shape else gradient.reshape(shape), by_controls
