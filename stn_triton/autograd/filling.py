"""Samples with a fill, or in another dtype than the image's: one launch, or what has derivatives.

``ops.sample_as`` does all of it at once, and has no derivatives. Where one may be asked for, its result is
made of ``sample`` and PyTorch's operators, which have them all. With w the weight of a sample's taps in the
image,

    zeros:   sample(I) + (1 - w) fill,   w = sample(1)
    border:  sample(I) where the centre is inside, else fill

and is converted at the end: half images are sampled in the compute type, so that it rounds once. Where border
padding is averaged over footprints, each sub-sample has a centre. With ``Padding.FRAMED`` one whose centre is
outside reads nothing, as taps do with zeros padding, and so the first line holds. Samples that are rounded to
integers have no derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import distributed, export, ops, reference
from ..kernels.modes import Interpolation, Padding
from .function import Function, Tensors, is_transformed
from .samples import sample
from .vmap import fold_samples


def _in_parts(
    input: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    fill: Tensor | None,
    source: int,
    size: Any,
    interpolation: int,
    padding: int,
    align_corners: bool,
    dtype: torch.dtype,
) -> Tensor:
    """``ops.sample_as``, of parts that have derivatives where any may be asked for."""
    tensors = input, params, control_points, fill
    rest = source, size, interpolation, padding, align_corners, dtype
    if not dtype.is_floating_point:
        constant = (None if tensor is None else tensor.detach() for tensor in tensors)
        return (_SampleAs.apply if is_transformed() else _SampleAs.forward)(*constant, *rest)
    if not _is_tracked(tensors):
        return _SampleAs.forward(*tensors, *rest)
    dims, compute = input.dim() - 2, reference.compute_dtype(input, params)
    by_centres = fill is not None and reference.fills_centres(padding, dims)
    if by_centres and interpolation == Interpolation.AVERAGED:
        by_centres, padding = False, Padding.FRAMED
    if input.is_floating_point():
        input = input.to(compute)
    place = params, control_points, source, size, interpolation, padding, align_corners
    samples = sample(input, *place)
    if fill is not None:
        one = distributed.replicated(torch.ones((), dtype=compute, device=input.device), input)
        ones = one.expand(input.shape[0], 1, *input.shape[2:])
        if by_centres:
            zeros = (one - 1).expand(input.shape[0], 1)
            nearest = source, size, int(Interpolation.NEAREST), padding, align_corners, torch.uint8
            inside = _SampleAs.run(ones, params, control_points, zeros, *nearest)
            samples = reference.fill_centres(samples, inside != 0, fill.to(compute), dims)
        else:
            inside = sample(ones, *place)
            samples = reference.fill_taps(samples, inside, fill.to(compute), dims)
    return samples.to(dtype)


def _is_tracked(tensors: Tensors) -> bool:
    """Whether a derivative by one of the tensors may be asked for."""
    if is_transformed():
        return True
    floats = [tensor for tensor in tensors if tensor is not None and tensor.is_floating_point()]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in floats):
        return True
    # compiled code enters forward mode unknown to ``forward_ad``; there is one level
    return any(forward_ad.unpack_dual(tensor, level=0).tangent is not None for tensor in floats)


class _SampleAs(Function):
    op = ops.sample_as
    in_pytorch = staticmethod(export.sample_as)
    in_parts = staticmethod(_in_parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        arguments = "image", "params", "control", "fill"
        return fold_samples(_SampleAs, arguments, ("output",), info, in_dims, inputs)


sample_as = _SampleAs.run
"""``sample`` in ``dtype``, with the fill, (N, C), in place of what lies outside the image."""
