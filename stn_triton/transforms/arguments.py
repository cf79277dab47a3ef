"""Checks and dtypes of arguments, for all transforms."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..checks import check_device, check_tensor, refuse, refuse_numbers, refuse_type, to_number


def check_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The default dtype for None."""
    if dtype is None:
        return torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        refuse(TypeError, "dtype", "a floating-point dtype", repr(dtype))
    return dtype


def check_leading(name: str, leading: Sequence[int], other_name: str, other: Sequence[int]) -> None:
    if any(a != b and a != 1 and b != 1 for a, b in zip(reversed(leading), reversed(other))):
        expected = f"of leading dimensions that broadcast with {other_name}'s, {tuple(other)},"
        refuse(ValueError, name, expected, tuple(leading))


def check_theta(name: str, theta: Tensor) -> None:
    check_tensor(name, theta)
    if theta.dim() < 2 or tuple(theta.shape[-2:]) not in ((2, 3), (3, 4), (3, 3)):
        expected = "(..., 2, 3), (..., 3, 4) or (..., 3, 3)"
        refuse(ValueError, name, expected, f"shape {tuple(theta.shape)}")


def check_vector(name: str, vector: Tensor, dims: tuple[int, ...], hint: str = "") -> int:
    """The number of its components. ``hint``: what may be meant by another."""
    check_tensor(name, vector)
    if vector.dim() < 1 or vector.shape[-1] not in dims:
        expected = " or ".join(f"(..., {d})" for d in dims)
        refuse(ValueError, name, expected, f"shape {tuple(vector.shape)}", hint)
    return vector.shape[-1]


def to_vector(
    name: str, value: Tensor | Sequence[float], dims: tuple[int, ...], *others: float | Tensor
) -> Tensor:
    """(..., d), or d numbers: these become a tensor (d,) beside the ``others``. d is one of ``dims``."""
    value = stacked(value)
    if not isinstance(value, Tensor):
        numbers = to_numbers(value)
        if numbers is None or len(numbers) not in dims:
            refuse_numbers(name, value, f"a tensor or {' or '.join(map(str, dims))} numbers")
        like = [other for other in others if isinstance(other, Tensor)]
        dtype = dtypes(*like)[1] if like else torch.get_default_dtype()
        value = full_of(numbers, dtype, like[0].device if like else None)
    check_vector(name, value, dims)
    return value


def stacked(value: Any) -> Any:
    """A tuple or list of which some are tensors () and the rest numbers, as a tensor; all else as it is.

    Such are the sizes that ``torch.jit.trace`` shows, and what is computed from them.
    """
    if not isinstance(value, (tuple, list)):
        return value
    tensors = [each for each in value if isinstance(each, Tensor) and each.dim() == 0]
    others = [each for each in value if not isinstance(each, Tensor)]
    if not tensors or len(tensors) + len(others) < len(value) or to_numbers(others) is None:
        return value
    dtypes_of = [each.dtype for each in tensors if each.is_floating_point()] or [torch.get_default_dtype()]
    dtype = functools.reduce(torch.promote_types, dtypes_of)
    return distributed.stack([to_tensor(each, tensors[0], dtype) for each in value], -1)


def to_numbers(value: object) -> list[float] | None:
    """Those of a tuple or a list; None for all else."""
    numbers: list[Any] = [to_number(each) for each in value] if isinstance(value, (tuple, list)) else [None]
    return None if None in numbers else numbers


def full_of(
    values: float | Sequence[float], dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    """A number as a tensor (), or several as (n,). For ``torch.tensor`` the host would wait."""
    if isinstance(values, (tuple, list)):
        return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
    return torch.full((), values, dtype=dtype, device=device)  # type: ignore[arg-type]


def check_factor(name: str, value: float | Tensor, vector_name: str, vector: Tensor) -> float | Tensor:
    """A number, or a tensor whose dimensions broadcast with the vector's leading ones."""
    number = to_number(value)
    if number is not None:
        return number
    leading = vector.shape[:-1]
    if not isinstance(value, Tensor):
        given = (len(to_numbers(value) or ()),)
        if given != leading and (hint := _per_axis(name, given, vector)):
            refuse(TypeError, name, "a tensor or a number", type(value).__name__, hint)
        refuse_type(name, value, "a tensor or a number")
    check_tensor(name, value)
    check_device(name, value, vector_name, vector)
    shape = value.shape
    if leading and len(shape) > len(leading):  # (N, 1) with (N, 2) would make (N, N, 2, 3)
        expected = f"a number, or {tuple(leading)}, one for each {vector_name},"
        hint = f"{name}.squeeze(-1)" if shape[:-1] == leading and shape[-1] == 1 else ""
        refuse(ValueError, name, expected, f"shape {tuple(shape)}", hint or _per_axis(name, shape, vector))
    check_leading(name, shape, vector_name, leading)
    return value


def _per_axis(name: str, shape: Sequence[int], vector: Tensor) -> str:
    """For a scale for each axis of the vector's space."""
    given = name == "scale" and shape[-1] == vector.shape[-1]
    return "one scale serves all axes; for others write theta, or crop boxes" if given else ""


def dtypes(*values: float | Tensor) -> tuple[torch.dtype, torch.dtype]:
    """What to compute in, at least float32, and what the tensors promote to."""
    given = [value.dtype for value in values if isinstance(value, Tensor)]
    result = functools.reduce(torch.promote_types, given)
    return torch.promote_types(result, torch.float32), result


def to_tensor(value: float | Tensor, like: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A number becomes a tensor on the device of ``like``, by default PyTorch's default."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    return full_of(value, dtype, None if like is None else like.device)
