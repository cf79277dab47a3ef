"""Affine maps and homographies: making, composing and inverting them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import distributed
from ..calls import public
from ..checks import check_device, check_int, refuse, refuse_choice
from .arguments import check_dtype, check_factor, check_leading, check_theta, dtypes, to_tensor, to_vector
from .splines import control_lattice

__all__ = ["identity", "attention", "similarity", "compose", "invert"]


# ------------------------------------------------------------------------------------- making them
def identity(
    n: int,
    kind: str = "affine",
    *,
    dims: int = 2,
    k: int = 4,
    transforms: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Parameters of n transforms that leave images as they are.

    Args:
        n: the batch size; 0 is legal.
        kind: "affine", "attention", "similarity", "projective" or "tps".
        dims: 2 or 3; 3 for "affine" and "attention" only.
        k: for "tps", the side of the lattice of control points.
        transforms: T, for parameters (n, T, ...) of T transforms of each image.
        device, dtype: the result's; a floating dtype, by default PyTorch's default.

    Returns:
        A new tensor. "affine", "attention" and "similarity": (n, dims, dims + 1), for all three
        are applied as affine maps. "projective": (n, 3, 3). "tps": (n, k * k, 2), the points of
        :func:`control_lattice`. (The identity of a flow, which has the size of an image, is
        ``torch.zeros``.)

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> stn.transforms.identity(8).shape, stn.transforms.identity(8, "tps", k=5).shape
        (torch.Size([8, 2, 3]), torch.Size([8, 25, 2]))
    """
    known = ("affine", "attention", "similarity", "projective", "tps")
    if kind not in known:
        refuse_choice("kind", kind, known)
    n, dims = check_int("n", n, 0), check_int("dims", dims, 2)
    if dims > (3 if kind in ("affine", "attention") else 2):
        refuse(ValueError, "dims", '2, or 3 for "affine" and "attention"', f"{dims} for {kind!r}")
    if kind != "tps" and k != 4:
        refuse(ValueError, "k", "left out unless kind='tps'", f"{k!r} for {kind!r}")
    dtype = check_dtype(dtype)
    if kind == "tps":
        parameters = control_lattice(k, device=device, dtype=dtype)
    elif kind == "projective":
        parameters = torch.eye(3, device=device, dtype=dtype)
    else:
        parameters = torch.eye(dims, dims + 1, device=device, dtype=dtype)
    if transforms is None:
        return parameters.repeat(n, 1, 1)
    return parameters.repeat(n, check_int("transforms", transforms, 0), 1, 1)


@public
def attention(scale: float | Tensor, translation: Tensor | Sequence[float]) -> Tensor:
    """The affine map that reads a scaled and moved window: ``[[s, 0, tx], [0, s, ty]]``.

    Equation 2 of Jaderberg et al., Spatial Transformer Networks, 2015.

    Convention: the output shows the part of the input that is centred at ``translation`` and ``scale``
    times as large as the input, so 0.5 magnifies twofold.

    Args:
        scale: (...,), or a number.
        translation: (..., 2), or (..., 3) in 3-D; or two or three numbers. Its leading dimensions broadcast
            with the scale's, which has no more of them; only a single translation serves any scale.

    Returns:
        (..., 2, 3) or (..., 3, 4).

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> stn.transforms.attention(0.5, (-0.5, 0.25))  # half as wide, left of the middle
        tensor([[ 0.5000,  0.0000, -0.5000],
                [ 0.0000,  0.5000,  0.2500]])
    """
    offset = to_vector("translation", translation, (2, 3), scale)
    dims = offset.shape[-1]
    scale = check_factor("scale", scale, "translation", offset)
    compute, result = dtypes(scale, offset)
    factors, offset = torch.broadcast_tensors(
        to_tensor(scale, offset, compute).unsqueeze(-1), offset.to(compute)
    )
    return augment(diagonal([factors[..., 0]] * dims), offset).to(result)


@public
def similarity(
    scale: float | Tensor, angle: float | Tensor, translation: Tensor | Sequence[float] = (0.0, 0.0)
) -> Tensor:
    """Scale, rotate and move: ``[[s cos a, -s sin a, tx], [s sin a, s cos a, ty]]``.

    Convention: radians. As x points right and y down, a positive angle turns the window that is read
    clockwise, and so the picture that comes out counter-clockwise. A scale of 1 / z magnifies z times. The
    rotation is one of normalised coordinates: where an image is not square, it is a rotation of the square it
    is stretched to.

    Args:
        scale: (...,), or a number; as in :func:`attention`.
        angle: (...,), or a number.
        translation: (..., 2), or two numbers. Its leading dimensions broadcast with those of scale and
            angle, which have no more of them; only a single translation serves any scale and angle.

    Returns:
        (..., 2, 3), of the dtype that the tensors promote to, or of PyTorch's default if there are none.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> stn.transforms.similarity(torch.rand(8), torch.rand(8), torch.zeros(8, 2)).shape
        torch.Size([8, 2, 3])
        >>> stn.transforms.similarity(0.5, 0.3).shape  # about the middle
        torch.Size([2, 3])
    """
    offset = to_vector("translation", translation, (2,), scale, angle)
    scale = check_factor("scale", scale, "translation", offset)
    angle = check_factor("angle", angle, "translation", offset)
    if isinstance(scale, Tensor) and isinstance(angle, Tensor):
        check_leading("angle", angle.shape, "scale", scale.shape)
    compute, result = dtypes(scale, angle, offset)
    scale, angle = to_tensor(scale, offset, compute), to_tensor(angle, offset, compute)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    return augment(turning(cos, sin), offset.to(compute)).to(result)


# ------------------------------------------------------------------------------- their composition
@public
def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The transform that maps a point p to ``outer(inner(p))``.

    Convention: transforms map output to input, so an image sampled by ``compose(outer, inner)`` is the
    image sampled by ``outer`` and that result sampled by ``inner``, without the blur of the step between.

    Args:
        outer, inner: affine maps (..., 2, 3) or (..., 3, 4), or homographies (..., 3, 3). A homography
            goes with 2-D affine maps. Leading dimensions broadcast.

    Returns:
        Affine where both are, else a homography.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> image = torch.rand(1, 3, 48, 64)
        >>> crop = stn.transforms.attention(0.5, torch.zeros(1, 2))
        >>> turn = stn.transforms.similarity(1.0, 0.3, torch.zeros(1, 2))
        >>> both = stn.transforms.compose(crop, turn)
        >>> turned = stn.affine_grid_sample(image, both)  # interpolated once
    """
    check_theta("outer", outer)
    check_theta("inner", inner)
    if outer.shape[-1] != inner.shape[-1]:
        expected = f"of as many dimensions as outer, {tuple(outer.shape)},"
        refuse(ValueError, "inner", expected, f"shape {tuple(inner.shape)}")
    check_device("inner", inner, "outer", outer)
    check_leading("inner", inner.shape[:-2], "outer", outer.shape[:-2])
    compute, result = dtypes(outer, inner)
    rows = max(outer.shape[-2], inner.shape[-2])
    product = _matmul(homogeneous(outer.to(compute)), homogeneous(inner.to(compute)))
    return product[..., :rows, :].to(result)


@public
def invert(theta: Tensor) -> Tensor:
    """The inverse transform: ``compose(theta, invert(theta))`` is the identity.

    Args:
        theta: affine maps (..., 2, 3) or (..., 3, 4), or homographies (..., 3, 3).

    Returns:
        Of theta's shape and dtype. The inverse of a singular map has infinite and NaN entries, at which
        samplers read nothing under zeros padding. It raises no error: the host would have to wait for the
        device to see it.

    By cofactors (Cramer's rule), whose derivatives exist wherever the inverse does.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> theta = stn.transforms.similarity(0.5, 0.3, torch.zeros(1, 2))
        >>> there_and_back = stn.transforms.compose(theta, stn.transforms.invert(theta))
        >>> torch.allclose(there_and_back, torch.eye(2, 3), atol=1e-6)
        True
    """
    check_theta("theta", theta)
    compute, result = dtypes(theta)
    rows, columns = theta.shape[-2:]
    matrix = theta.to(compute)
    if columns == 3:
        return _inverse(homogeneous(matrix))[..., :rows, :].to(result)
    linear = _inverse(matrix[..., :3])
    return augment(linear, -_matmul(linear, matrix[..., 3:]).squeeze(-1)).to(result)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Of tiny matrices; unlike ``@`` never rounded to TF32, nor to half by autocast."""
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)


def _inverse(matrix: Tensor) -> Tensor:
    """Of (..., 3, 3). The inverse's columns are the cross products of the rows, over the determinant.

    Of rows brought near 1: products of three entries may leave the range of floats that the inverse lies in.
    """
    sizes = matrix.detach().abs().amax(-1, keepdim=True).clamp(2.0**-120, 2.0**120)
    scale = 2.0 ** sizes.log2().floor()  # which rounds nothing
    a, b, c = (matrix / scale).unbind(-2)
    adjugate = distributed.stack([torch.linalg.cross(*rows) for rows in ((b, c), (c, a), (a, b))], -1)
    determinant = (a * adjugate[..., 0]).sum(-1)
    return adjugate / determinant[..., None, None] / scale.transpose(-1, -2)


def homogeneous(theta: Tensor) -> Tensor:
    """(..., d, d + 1) with the row (0, ..., 0, 1) below; square matrices as they are."""
    if theta.shape[-2] == theta.shape[-1]:
        return theta
    row = theta[..., :1, :]  # its kind of tensor, a DTensor for instance
    row = torch.cat([torch.zeros_like(row[..., 1:]), torch.ones_like(row[..., :1])], -1)
    return torch.cat([theta, row], -2)


def turning(cos: Tensor, sin: Tensor) -> Tensor:
    """(..., 2, 2), ``[[cos, -sin], [sin, cos]]``."""
    return in_rows(distributed.stack([cos, -sin, sin, cos], -1), 2)


def diagonal(entries: Sequence[Tensor]) -> Tensor:
    """(..., d, d), zero beside the diagonal whatever is on it, from d tensors of one shape."""
    zero, dims = torch.zeros_like(entries[0]), len(entries)
    rows = [entries[row] if row == column else zero for row in range(dims) for column in range(dims)]
    return in_rows(distributed.stack(rows, -1), dims)


def in_rows(entries: Tensor, columns: int) -> Tensor:
    """(..., n) -> (..., n / columns, columns). (Under a default device Dynamo cannot trace ``unflatten``.)"""
    return entries.reshape(entries.shape[:-1] + (entries.shape[-1] // columns, columns))


def augment(linear: Tensor, translation: Tensor) -> Tensor:
    """(..., d, d) with the translation (..., d) as a column to its right, leading dimensions broadcast."""
    linear, column = torch.broadcast_tensors(linear, translation.unsqueeze(-1))
    return torch.cat([linear, column[..., :1]], -1)
