"""What to write instead: the hints that errors end with. "" where nobody knows."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from .kernels.host.dtypes import WHOLE_NUMBERS
from .kernels.modes import NAMED_PADDINGS

# The values of options that are words.
OPTIONS = {
    "mode": ("bilinear", "nearest", "bicubic"),
    "padding_mode": tuple(padding.name.lower() for padding in NAMED_PADDINGS),
}

# What other libraries call them.
_OTHER_NAMES = {
    "linear": "bilinear",
    "trilinear": "bilinear",
    "cubic": "bicubic",
    "tricubic": "bicubic",
    "constant": "zeros",
    "replicate": "border",
    "edge": "border",
    "clamp": "border",
    "reflect": "reflection",
    "mirror": "reflection",
    "symmetric": "reflection",
    "wrap": "circular",
    "grid-wrap": "circular",
    "periodic": "circular",
    "homography": "projective",
    "perspective": "projective",
    "spline": "tps",
    "thin_plate_spline": "tps",
}


def to_tensor(name: str, value: object) -> str:
    """How a tensor is made of an array or a list; "" for all else."""
    if isinstance(value, (tuple, list)):
        return f"torch.as_tensor({name})"
    if name == "input" and getattr(value, "ndim", 0) == 3 and as_tensor(name, value):
        return "one image (H, W, C) is torch.from_numpy(input).permute(2, 0, 1)[None]"
    return as_tensor(name, value)


def as_tensor(name: str, value: object) -> str:
    """For an array."""
    return f"torch.as_tensor({name})" if type(value).__module__ == "numpy" else ""


def nearest_option(value: str, known: Collection[str]) -> str:
    import difflib

    near = _OTHER_NAMES.get(value.lower(), value)
    close = [near] if near in known else difflib.get_close_matches(value.lower(), known, 1)
    return f"did you mean {close[0]!r}?" if close else option_of(near)


def option_of(word: str) -> str:
    """The option that the word is a value of; "" if of none."""
    return "".join(f"{name}={word!r}" for name, known in OPTIONS.items() if word in known)


def nearest_parameter(name: str, value: Tensor, matrix: tuple[int, int], input: Tensor) -> str:
    """For a matrix of another shape than (N, [T,] *matrix): what would be taken, "" if nobody knows."""
    shape = tuple(value.shape)
    if shape == matrix:
        return f"a batch of one is {name}[None]"
    if len(shape) in (4, 5) and input.shape[-2:] == matrix:
        return swapped(name)
    if len(shape) == input.dim() == shape[-1] + 2:
        return "grid_sample takes grids"
    if shape[-2:] == (3, 3) and matrix == (2, 3):
        return "projective_grid_sample takes homographies"
    if shape[-2:] == (2, 3) and matrix == (3, 3):
        return "affine_grid_sample takes affine maps"
    if shape[-2:] in ((2, 3), (3, 4)) and shape[-2:] != matrix:
        images = "images, (N, C, H, W)" if shape[-1] == 3 else "volumes, (N, C, D, H, W)"
        return f"that is a map for {images}"
    if len(shape) in (3, 4) and shape[-2:] == matrix:
        return other_batch(name, value, input)
    if shape[-2:] == (4, 4) and matrix == (3, 4):
        return f"without the last row {name}[..., :3, :]"
    numbers = matrix[0] * matrix[1]
    if len(shape) == 2 and shape[1] == numbers:
        return f"{name}.view(-1, {matrix[0]}, {matrix[1]})"
    if len(shape) == 2 and matrix == (3, 3) and shape[1] == numbers - 1:
        return f"torch.nn.functional.pad({name}, (0, 1), value=1.0).view(-1, 3, 3) has the last entry, 1, too"
    return ""


def swapped(name: str) -> str:
    return f"arguments are (input, {name}): are they swapped?"


def other_batch(name: str, value: Tensor, input: Tensor) -> str:
    """For parameters that are right but for their batch."""
    given, batch = value.shape[0], input.shape[0]
    hint = f"{name} has a batch of {given}, input of {batch}"
    if batch == 1 and value.dim() == 3:
        return f"{hint}; {name}[None] takes {given} crops of the one image"
    return f"{hint}; {_expanded('input', input, given)}" if batch == 1 else hint


def _expanded(name: str, value: Tensor, batch: int) -> str:
    """Of a batch of one."""
    return f"{name}.expand({batch}{', -1' * (value.dim() - 1)})"


def padding_tuple(padding_mode: object) -> str:
    """For a list that means a padding for each axis."""
    return f"padding_mode={tuple(padding_mode)}" if isinstance(padding_mode, list) else ""


def channels_first(input: Tensor, count: int) -> str:
    """For ``count`` channels, which are last in the input."""
    channels = input.shape[1]
    hint = f"the input has {channels} channels: channels first is input.movedim(-1, 1)"
    return hint if input.shape[-1] == count != channels else ""


def note_on_grid_sample(input: Any, grid: Any, mode: Any, padding_mode: Any, align_corners: Any) -> str:
    """What PyTorch's message on such arguments leaves out; "" if nothing."""
    if not isinstance(input, Tensor) or not isinstance(grid, Tensor):
        return "; ".join(filter(None, (to_tensor("input", input), to_tensor("grid", grid))))
    if input.dtype in WHOLE_NUMBERS:
        others = "affine_grid_sample and flow_grid_sample take uint8 and int16 images too"
        return f"grid_sample takes floats: input.float(). ({others}.)"
    if isinstance(padding_mode, list):
        return f"stn_triton takes a padding for each axis as a tuple, x first: {padding_tuple(padding_mode)}"
    options = isinstance(mode, str) and isinstance(padding_mode, str)
    if options and mode in OPTIONS["mode"] and padding_mode not in OPTIONS["padding_mode"]:
        hint = nearest_option(padding_mode, OPTIONS["padding_mode"])
        return f"stn_triton has padding_mode='circular' too{hint and f'; {hint}'}"
    if isinstance(mode, str) and mode in OPTIONS["padding_mode"]:
        return option_of(mode)
    return _nearest_grid(input, grid)


def _nearest_grid(input: Tensor, grid: Tensor) -> str:
    """For a grid that does not go with the input: what would be taken, "" if nobody knows."""
    shape, axes = tuple(grid.shape), input.dim() - 2
    if len(shape) in (3, 4) and shape[-2:] in ((2, 3), (3, 4)):
        return "affine_grid_sample takes theta"
    if axes not in (2, 3):
        return ""
    batch = input.shape[0]
    if len(shape) in (4, 5) and input.shape[-1] == axes != shape[-1]:
        return swapped("grid")
    if len(shape) == 3 and shape[-1] == axes and shape[0] == batch:
        return f"places (N, P, {axes}) are grid[:, {', '.join(['None'] * (axes - 1))}]"
    if len(shape) == axes + 1 and shape[-1] == axes:
        return "a batch of one is grid[None]"
    if len(shape) != axes + 2:
        return ""
    if shape[-1] != axes:
        last = "grid.movedim(1, -1) puts coordinates last; flow_grid_sample takes displacements in pixels"
        return last if shape[1] == axes else ""
    if shape[0] != batch and 1 in (shape[0], batch):
        one = _expanded("grid", grid, batch) if shape[0] == 1 else _expanded("input", input, shape[0])
        return f"a batch of one is not broadcast: {one}"
    return "grid.to(input.dtype)" if grid.dtype != input.dtype else ""


def nearest_points(name: str, points: Tensor) -> str:
    """For what is not (N, [T,] K, 2)."""
    shape = points.shape
    if len(shape) in (3, 4) and shape[-2] == 2:
        return f"{name}.mT puts x and y last"
    if len(shape) != 2:
        return ""
    flat = shape[-1] % 2 == 0 and shape[-1] > 2  # as a linear layer makes them
    return f"{name}.view({shape[0]}, -1, 2)" if flat else f"a batch of one is {name}[None]"
