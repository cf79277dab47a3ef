"""Checks of arguments, whose errors name the argument, what was expected and what came."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from .kernels.modes import Interpolation, Padding

DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
INTERPOLATIONS = {
    "bilinear": Interpolation.BILINEAR,
    "nearest": Interpolation.NEAREST,
    "bicubic": Interpolation.BICUBIC,
}
PADDINGS = {"zeros": Padding.ZEROS, "border": Padding.BORDER, "reflection": Padding.REFLECTION}


def refuse(kind: type[Exception], name: str, expected: str, got: object) -> NoReturn:
    raise kind(f"{name} must be {expected.rstrip(',')}, got {got}")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        refuse(TypeError, name, "a tensor", type(value).__name__)
    if value.dtype not in DTYPES:
        refuse(
            TypeError, name, "a floating-point tensor (float16, bfloat16, float32 or float64)", value.dtype
        )
    if value.layout != torch.strided:
        refuse(ValueError, name, "a dense (strided) tensor", value.layout)


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        refuse(ValueError, name, f"on the device of {other_name}, {other.device}", value.device)


def is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_int(name: str, value: int, least: int) -> None:
    if not is_int(value):
        refuse(TypeError, name, "an int", repr(value))
    if value < least:
        refuse(ValueError, name, f"{least} or more", value)


def check_size(size: object, expected: str, length: int) -> tuple[int, ...]:
    """``size`` as a tuple of ``length`` ints, none of them negative."""
    if not isinstance(size, (tuple, list)) or not all(is_int(n) for n in size):
        refuse(TypeError, "size", f"{expected}, a tuple of ints", repr(size))
    if len(size) != length or any(n < 0 for n in size):
        refuse(ValueError, "size", f"{expected}, none of them negative", tuple(size))
    return tuple(size)


def check_spatial_size(size: object, dims: int) -> tuple[int, ...]:
    """(H, W) or (D, H, W)."""
    return check_size(size, "(H, W)" if dims == 2 else "(D, H, W)", dims)


def check_modes(mode: str, padding_mode: str, align_corners: bool) -> tuple[Interpolation, Padding, bool]:
    """The codes of the public names."""
    for name, value, known in (("mode", mode, INTERPOLATIONS), ("padding_mode", padding_mode, PADDINGS)):
        if not isinstance(value, str):
            refuse(TypeError, name, "a string", type(value).__name__)
        if value not in known:
            refuse(ValueError, name, "one of " + ", ".join(map(repr, known)), repr(value))
    if not isinstance(align_corners, bool):
        refuse(TypeError, "align_corners", "a bool", repr(align_corners))
    return INTERPOLATIONS[mode], PADDINGS[padding_mode], align_corners


def check_regularization(regularization: object) -> None:
    if not isinstance(regularization, (int, float)) or isinstance(regularization, bool):
        refuse(TypeError, "regularization", "a number", repr(regularization))
    if not 0 <= regularization < math.inf:
        refuse(ValueError, "regularization", "finite and not negative", regularization)
