"""Checks of arguments, whose errors name the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import calls, hints
from .kernels.host.dtypes import INTEGERS, WHOLE_NUMBERS
from .kernels.modes import (
    MOST_PIXELS,
    MOST_SAMPLES,
    Interpolation,
    Padding,
    padding_code,
    paddings_of,
)

DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_IMAGES = DTYPES | INTEGERS
# Codes as plain integers, as operators take them; Python compares and hashes them sooner than enum members.
INTERPOLATIONS = {name: int(Interpolation[name.upper()]) for name in hints.OPTIONS["mode"]}
PADDINGS = {name: int(Padding[name.upper()]) for name in hints.OPTIONS["padding_mode"]}
# A mode, or one for each axis, x first.
PaddingMode = str | tuple[str, ...]


def refuse(kind: type[Exception], name: str, expected: str, got: object, hint: str = "") -> NoReturn:
    """``hint``: the nearest call that is right, where it can be told."""
    raise kind(f"{name} must be {expected.rstrip(',')}, got {got}{hint and f'; {hint}'}")


def refuse_choice(name: str, value: object, known: Collection[str], more: str = "") -> NoReturn:
    """For an option that is none of those ``known``. ``more``: what else it may be."""
    words = value if isinstance(value, tuple) else (value,)
    unknown = [word for word in words if isinstance(word, str) and word not in known]
    size = to_size(value)
    hint = hints.nearest_option(unknown[0], known) if unknown else f"size={size}" if size else ""
    refuse(ValueError, name, f"one of {', '.join(map(repr, known))}{more}", repr(value), hint)


def refuse_type(name: str, value: object, expected: str = "a tensor") -> NoReturn:
    """For what is no tensor; of arrays and lists the message says how to make one."""
    refuse(TypeError, name, expected, type(value).__name__, hints.to_tensor(name, value))


def refuse_numbers(name: str, value: object, expected: str) -> NoReturn:
    """For what is neither a tensor nor the tuple or list of numbers that may stand for it."""
    refuse(TypeError, name, expected, repr(value), hints.as_tensor(name, value))


def check_tensor(name: str, value: object, integers: Collection[torch.dtype] = ()) -> None:
    """A dense tensor, floating-point or of one of the ``integers``."""
    if not isinstance(value, Tensor):
        refuse_type(name, value)
    if value.dtype not in DTYPES and value.dtype not in integers:
        expected = "a floating-point tensor (float16, bfloat16, float32 or float64)"
        others = " or ".join(sorted(_name(dtype) for dtype in integers))
        expected += f", or one of {others}," if others else ""
        hint = f"{name}.float()" if value.dtype in WHOLE_NUMBERS or value.dtype == torch.bool else ""
        if hint and torch.uint8 in integers:  # as labels are
            hint += f", or {name}.to(torch.{'uint8' if value.dtype == torch.bool else 'int16'})"
        refuse(TypeError, name, expected, value.dtype, hint)
    if value.layout != torch.strided:
        refuse(ValueError, name, "a dense (strided) tensor", value.layout)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        refuse(ValueError, name, f"on the device of {other_name}, {other.device}", value.device)


def to_int(value: object) -> Any:
    """What Python calls an integer, as an int; None if it is none. Symbols of compilers stay as they are."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value
    if isinstance(value, Tensor) and calls.tracing_state() is not None:
        return value  # as sizes are while torch.jit.trace looks
    if _is_numpy_to_dynamo(value):
        return torch.empty((value,), device="meta").shape[0]  # type: ignore[arg-type]
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def to_number(value: object) -> Any:
    """What Python calls a real number, as an int or a float; None if it is none."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return None if isinstance(value, bool) else value
    if isinstance(value, numbers.Real) or _is_numpy_to_dynamo(value):
        return float(value)  # type: ignore[arg-type]
    return None


def _is_numpy_to_dynamo(value: object) -> bool:
    """To Dynamo a NumPy scalar is an array, which has no ``__index__`` and is no Real."""
    return torch.compiler.is_dynamo_compiling() and type(value).__module__ == "numpy"


def check_int(name: str, value: int, least: int) -> int:
    number = to_int(value)
    if number is None:
        refuse(TypeError, name, "an int", repr(value))
    if not isinstance(number, Tensor) and number < least:
        refuse(ValueError, name, f"{least} or more", number)
    return number


def to_size(size: object) -> tuple[int, ...] | None:
    """A tuple of ints for a tuple or list of integers; None for all else."""
    if not isinstance(size, (tuple, list)):
        return None
    for n in size:
        if type(n) is not int:
            break
    else:
        return tuple(size)
    found = tuple(map(to_int, size))
    return None if None in found else found


def check_size(size: object, expected: str, length: int, name: str = "size") -> tuple[int, ...]:
    """``size`` as a tuple of ``length`` ints, none of them negative."""
    found = to_size(size)
    if found is None:
        refuse(
            TypeError, name, f"{expected}, a tuple of ints", _brief(size), _nearest_size(size, length, name)
        )
    if len(found) != length:
        spatial = len(found) == length + 2 and f"without batch and channels {name}={found[2:]}"
        refuse(ValueError, name, f"{expected}, {length} ints", found, spatial or "")
    if any(n < 0 for n in found):
        refuse(ValueError, name, f"{expected}, none of them negative", found)
    return found


def _nearest_size(size: object, length: int, name: str) -> str:
    """What to write for a size that is no tuple of ints; "" if nobody knows."""
    if isinstance(size, str):
        return hints.option_of(size)
    if getattr(size, "ndim", 0) == 1 and "int" in str(getattr(size, "dtype", "")):  # a tensor or an array
        return f"{name}.tolist()"
    side = to_int(size)
    return f"for equal sides {name}=({', '.join([str(side)] * length)})" if side and length < 4 else ""


def _brief(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def check_spatial_size(size: object, dims: int, name: str = "size") -> tuple[int, ...]:
    """(H, W) or (D, H, W)."""
    return check_size(size, "(H, W)" if dims == 2 else "(D, H, W)", dims, name)


def batch_of(n: int) -> str:
    """The batch that parameters of n images may have, in words."""
    return "1" if n == 1 else f"{n} or 1"


def refuse_parameter(name: str, value: Tensor, inner: str, input: Tensor, hint: str) -> NoReturn:
    """For parameters that are not (N, ``inner``) or (N, T, ``inner``)."""
    batch = input.shape[0]
    expected = f"({batch}, {inner}) or ({batch}, T, {inner})"
    expected += "" if batch == 1 else ", or the same with batch 1,"
    refuse(
        ValueError, name, f"{expected} for this {input.dim()}-D input", f"shape {tuple(value.shape)}", hint
    )


def to_padding(padding_mode: object, dims: int) -> int | None:
    """The code of a padding mode, or of a tuple of ``dims`` of them, x first; None for all else."""
    if isinstance(padding_mode, str):
        return PADDINGS.get(padding_mode)
    if not isinstance(padding_mode, tuple) or len(padding_mode) != dims:
        return None
    paddings = [PADDINGS[mode] for mode in padding_mode if isinstance(mode, str) and mode in PADDINGS]
    return padding_code(paddings) if len(paddings) == dims else None


def check_padding(padding_mode: object, dims: int) -> int:
    padding = to_padding(padding_mode, dims)
    if padding is None:
        more = f", or a tuple of {dims} of them, x first"
        if not isinstance(padding_mode, (str, tuple)):
            expected = f"one of {', '.join(map(repr, PADDINGS))}{more}"
            got = type(padding_mode).__name__
            refuse(TypeError, "padding_mode", expected, got, hints.padding_tuple(padding_mode))
        refuse_choice("padding_mode", padding_mode, PADDINGS, more)
    return padding


def check_modes(
    mode: str, padding_mode: PaddingMode, align_corners: bool, dims: int
) -> tuple[int, int, bool]:
    """The codes of the public names."""
    if not isinstance(mode, str):
        hint = f"a size is size={to_size(mode)}, but a flow has its own" if to_size(mode) else ""
        refuse(TypeError, "mode", "a string", type(mode).__name__, hint)
    if mode not in INTERPOLATIONS:
        refuse_choice("mode", mode, INTERPOLATIONS)
    # usual values are known without another call: calls are what takes the host time
    padding = PADDINGS.get(padding_mode) if isinstance(padding_mode, str) else None
    code = check_padding(padding_mode, dims) if padding is None else padding
    if align_corners is not True and align_corners is not False:
        check_bool("align_corners", align_corners)
    return INTERPOLATIONS[mode], code, align_corners


def check_fill(fill: object, input: Tensor, padding: int) -> Any:
    """The number that it is, the numbers of a tuple, or the tensor: (), (C,), (1, C) or (N, C)."""
    if not isinstance(fill, Tensor):
        taken = "a number, a tuple of one for each channel, or a tensor"
        numbers = _to_fill(fill, padding, input.dim() - 2, taken)
        if isinstance(numbers, tuple) and len(numbers) != input.shape[1]:
            more = f", or {input.shape[1]} numbers" if input.shape[1] != 1 else ""
            expected = f"a number{more} for this input"
            refuse(
                ValueError,
                "fill",
                expected,
                f"{len(numbers)} of them",
                hints.channels_first(input, len(numbers)),
            )
        most = torch.finfo(torch.promote_types(input.dtype, torch.float32)).max
        for number in numbers if isinstance(numbers, tuple) else (numbers,):
            if isinstance(number, float) and most < abs(number) < math.inf:
                refuse(ValueError, "fill", f"within {most:.3g} for an input of {input.dtype}", number)
        return 0.0 if numbers == () else numbers  # of no channels
    _check_fill_padding(fill, padding, input.dim() - 2)
    check_tensor("fill", fill, WHOLE_NUMBERS if input.dtype in INTEGERS else ())
    batch, channels = input.shape[:2]
    fits = fill.dim() == 0 or (fill.dim() <= 2 and fill.shape[-1] == channels)
    if not fits or (fill.dim() == 2 and fill.shape[0] != batch and fill.shape[0] != 1):
        expected = f"a number, ({channels},) or ({batch_of(batch)}, {channels}) for this input"
        axes = input.dim() - 2
        if fill.numel() == 1:
            hint = "fill.squeeze()"
        elif fill.dim() > axes and fill.shape[-1 - axes :] == (channels, *[1] * axes):
            hint = f"fill.flatten({-1 - axes})"  # as a mean that normalises images is often kept: (C, 1, 1)
        else:
            hint = hints.channels_first(input, fill.shape[0]) if fill.dim() == 1 else ""
        refuse(ValueError, "fill", expected, f"shape {tuple(fill.shape)}", hint)
    check_device("fill", fill, "input", input)
    return fill


def check_fill_numbers(fill: object, padding_mode: PaddingMode, dims: int) -> Any:
    """A number, or a tuple of them, whose number the first image shows; or None."""
    taken = "a number, or a tuple of one for each channel,"
    return None if fill is None else _to_fill(fill, check_padding(padding_mode, dims), dims, taken)


def _check_fill_padding(fill: object, padding: int, dims: int) -> None:
    if not {*paddings_of(padding, dims)} <= {Padding.ZEROS, Padding.BORDER}:
        refuse(ValueError, "fill", "None unless padding_mode is 'zeros' or 'border'", _brief(fill))


def _to_fill(fill: object, padding: int, dims: int, taken: str) -> Any:
    """The number that it is, or the numbers of a tuple or list."""
    _check_fill_padding(fill, padding, dims)
    numbers = [_to_float(each) for each in (fill if isinstance(fill, (tuple, list)) else [fill])]
    if None in numbers:
        # numbers may be whole, which a tensor that fills an image of floats may not
        listed = getattr(fill, "ndim", 2) < 2
        hint = "fill.tolist()" if listed else hints.as_tensor("fill", fill)
        refuse(TypeError, "fill", taken, _brief(fill), hint)
    return tuple(numbers) if isinstance(fill, (tuple, list)) else numbers[0]


def _to_float(value: object) -> Any:
    """``to_number``, of which a float can hold each."""
    number = to_number(value)
    if type(number) is int and not -(2**63) <= number < 2**63:
        try:
            return float(number)
        except OverflowError:
            refuse(ValueError, "fill", "a number that a float can hold", "one of more than 1024 bits")
    return number


def check_dtype(dtype: object, input: Tensor) -> torch.dtype:
    """The dtype of samples: by default the image's; of integers another one that is asked for."""
    if dtype is None:
        return input.dtype
    if not isinstance(dtype, torch.dtype):
        refuse(TypeError, "dtype", "a torch.dtype", repr(dtype))
    taken = [input.dtype]
    if input.dtype in INTEGERS:
        taken += [torch.float32, torch.float16, torch.bfloat16]
    if dtype not in taken:
        expected = " or ".join(map(str, taken))
        refuse(ValueError, "dtype", f"None or {expected} for this input of {input.dtype}", dtype)
    return dtype


def check_antialias(antialias: bool, mode: str) -> bool:
    if check_bool("antialias", antialias) and mode != "bilinear":
        refuse(ValueError, "antialias", 'False unless mode="bilinear"', f"True with mode={mode!r}")
    return antialias


def averaged(
    antialias: bool, mode: str, size: tuple[int, ...], modes: tuple[int, int, bool]
) -> tuple[int, int, bool]:
    """The codes of ``check_modes`` with ``antialias``."""
    if not check_antialias(antialias, mode):
        return modes
    most = MOST_PIXELS // MOST_SAMPLES  # sub-samples are counted along each axis as pixels are
    if max(size) > most:
        refuse(ValueError, "size", f"{most} at most along each axis with antialias=True", size)
    return int(Interpolation.AVERAGED), *modes[1:]


def check_bool(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        refuse(TypeError, name, "a bool", repr(value))
    return value


def check_number(name: str, value: float) -> float:
    number = to_number(value)
    if number is None:
        refuse(TypeError, name, "a number", repr(value))
    return number


def check_regularization(regularization: float) -> float:
    is_float = type(regularization) is float
    number = regularization if is_float else check_number("regularization", regularization)
    if not 0 <= number < math.inf:
        refuse(ValueError, "regularization", "finite and not negative", number)
    return number


# ------------------------------------------------------------------- the arguments of public functions
def grid_sample_fits(input: Any, grid: Any, mode: Any, align_corners: Any) -> bool:
    """Whether ``grid_sample`` takes them, but for the padding."""
    if not (isinstance(input, Tensor) and isinstance(grid, Tensor) and isinstance(mode, str)):
        return False
    shape, of_grid, dtype = input.shape, grid.shape, input.dtype
    return (
        mode in INTERPOLATIONS
        and (align_corners is None or isinstance(align_corners, bool))
        and len(shape) in (4, 5)
        and len(of_grid) == len(shape)
        and of_grid[-1] == len(shape) - 2
        and of_grid[0] == shape[0]
        and dtype in DTYPES
        and grid.dtype == dtype
        and grid.device == input.device
        and input.layout == grid.layout == torch.strided
        and 0 not in shape[2:]
    )


def affine_grid_fits(theta: Any, size: tuple[int, ...], align_corners: Any) -> bool:
    """Whether ``affine_grid`` takes them."""
    return (
        isinstance(theta, Tensor)
        and theta.dtype in DTYPES
        and theta.layout == torch.strided
        and len(size) in (4, 5)
        and theta.dim() == 3
        and theta.shape[1] == len(size) - 2
        and theta.shape[2] == len(size) - 1
        and theta.shape[0] == size[0]
        and all(n > 0 for n in size)
        and (align_corners is None or isinstance(align_corners, bool))
    )


def check_image(input: Tensor, name: str, params: object, dims: int | None = None) -> int:
    """The number of spatial dimensions, which may have to be ``dims``.

    name, params: of the argument after it, for which ``input`` may have been taken.
    """
    if not isinstance(input, Tensor) or input.dtype not in _IMAGES or input.layout != torch.strided:
        check_tensor("input", input, INTEGERS)
    shape = input.shape
    if len(shape) != 4 and (len(shape) != 5 or dims == 2):
        expected = "(N, C, H, W)" if dims == 2 else "(N, C, H, W) or (N, C, D, H, W)"
        hint = "a batch of one is input[None]" if input.dim() == 3 else ""
        if input.dim() in (2, 3) and input.shape[-1] <= 4:  # as parameters have
            hint = hints.swapped(name) if isinstance(params, Tensor) and params.dim() in (4, 5) else hint
        refuse(ValueError, "input", expected, f"shape {tuple(shape)}", hint)
    if 0 in shape[2:]:
        refuse(ValueError, "input", "of non-empty spatial size", f"shape {tuple(shape)}")
    return len(shape) - 2


def check_parameter(name: str, value: Tensor, matrix: tuple[int, int], input: Tensor) -> None:
    """(N, *matrix) or (N, T, *matrix), N that of the images or 1, on their device."""
    if not isinstance(value, Tensor) or value.dtype not in DTYPES or value.layout != torch.strided:
        check_tensor(name, value)
    shape, (rows, columns) = value.shape, matrix
    if (
        len(shape) not in (3, 4)
        or shape[-2] != rows
        or shape[-1] != columns
        or (shape[0] != input.shape[0] and shape[0] != 1)
    ):
        refuse_parameter(
            name, value, f"{rows}, {columns}", input, hints.nearest_parameter(name, value, matrix, input)
        )
    if value.device != input.device:
        check_device(name, value, "input", input)


def check_flow(flow: Tensor, input: Tensor) -> None:
    """(N, dims, ...), N that of the images or 1, on their device."""
    if not isinstance(flow, Tensor) or flow.dtype not in DTYPES or flow.layout != torch.strided:
        check_tensor("flow", flow)
    shape, batch, dims = flow.shape, input.shape[0], input.dim() - 2
    if len(shape) != dims + 2 or shape[1] != dims or (shape[0] != batch and shape[0] != 1):
        sizes, hint = "H, W" if dims == 2 else "D, H, W", ""
        expected = f"({batch_of(batch)}, {dims}, {sizes}) for this {input.dim()}-D input"
        if shape[:1] == (dims,) and len(shape) == dims + 1:
            hint = "a batch of one is flow[None]"
        elif len(shape) == dims + 2 and shape[1] == dims:
            hint = hints.other_batch("flow", flow, input)
        elif len(shape) == dims + 2 and shape[-1] == dims:
            hint = "flow.movedim(-1, 1) puts components first"
        elif len(shape) == dims + 2 and input.shape[1] == dims:
            hint = hints.swapped("flow")
        refuse(ValueError, "flow", expected, f"shape {tuple(flow.shape)}", hint)
    if flow.device != input.device:
        check_device("flow", flow, "input", input)


def check_points(points: Tensor, input: Tensor) -> None:
    """(N, K, 2) or (N, T, K, 2), N that of the images or 1, on their device. (K is the spline's to check.)"""
    if not isinstance(points, Tensor) or points.dtype not in DTYPES or points.layout != torch.strided:
        check_tensor("points", points)
    shape = points.shape
    if len(shape) not in (3, 4) or shape[-1] != 2 or (shape[0] != input.shape[0] and shape[0] != 1):
        hint = hints.nearest_points("points", points)
        if len(shape) in (3, 4) and shape[-1] == 2:
            hint = hints.other_batch("points", points, input)
        elif len(shape) == 4 and input.shape[-1] == 2:
            hint = hints.swapped("points")
        refuse_parameter("points", points, "K, 2", input, hint)
    if points.device != input.device:
        check_device("points", points, "input", input)


def check_grid_points(points: Tensor) -> None:
    """Of a spline's grid: (N, K, 2)."""
    if not isinstance(points, Tensor) or points.dtype not in DTYPES or points.layout != torch.strided:
        check_tensor("points", points)
    if points.dim() != 3 or points.shape[2] != 2:
        hint = hints.nearest_points("points", points)
        refuse(ValueError, "points", "(N, K, 2)", f"shape {tuple(points.shape)}", hint)


def check_grid_size(size: Sequence[int], params: Tensor, align_corners: bool) -> tuple[int, ...]:
    """(H, W) of the (N, C, H, W) that grids are asked for with."""
    check_bool("align_corners", align_corners)
    size = check_size(size, "(N, C, H, W)", 4)
    if size[0] != params.shape[0]:  # put into words only now: to a compiler that makes a constant of N
        refuse(ValueError, "size", f"(N, C, H, W) with N = {params.shape[0]}", size)
    return size[2:]


def check_out_size(size: Sequence[int] | None, input: Tensor) -> tuple[int, ...]:
    return input.shape[2:] if size is None else check_spatial_size(size, input.dim() - 2)
