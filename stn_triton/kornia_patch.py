"""kornia's ``warp_affine`` and ``warp_perspective``, run as one fused call each.

Many modules hold these functions by value, kornia's own and those of its users. So the functions stay the
same objects, and get another ``__code__``: whoever holds one calls what is in force.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from . import backend, functional, transforms
from .calls import PLAIN, leaves_pytorch
from .checks import DTYPES, INTERPOLATIONS, to_size
from .switch import Patch, Switch
from .versions import refuse_older

__all__ = ["patch_kornia"]


# ------------------------------------------------------------------------------ kornia's functions
# What their code becomes. It runs among the names of kornia's module, and so imports what it needs.
def _warp_affine(
    src: Any, M: Any, dsize: Any, mode: Any, padding_mode: Any, align_corners: Any, fill_value: Any
) -> Any:
    from stn_triton.kornia_patch import warp

    return warp("warp_affine", src, M, dsize, mode, padding_mode, align_corners, fill_value)


def _warp_perspective(
    src: Any, M: Any, dsize: Any, mode: Any, padding_mode: Any, align_corners: Any, fill_value: Any
) -> Any:
    from stn_triton.kornia_patch import warp

    return warp("warp_perspective", src, M, dsize, mode, padding_mode, align_corners, fill_value)


_CODES = {"warp_affine": _warp_affine.__code__, "warp_perspective": _warp_perspective.__code__}
_originals: dict[str, Callable[..., Tensor]] = {}
"""kornia's functions with the code that they had before the patch."""


class _Functions(Switch):
    def __init__(self) -> None:
        super().__init__()
        self._functions: dict[str, FunctionType] = {}
        self._codes: dict[str, CodeType] = {}  # before the patch

    def prepare(self) -> None:
        if self._functions:
            return
        try:
            import kornia
            from kornia.geometry.transform import imgwarp
        except ImportError as error:
            raise ImportError(f"patch_kornia needs kornia ({error}): pip install kornia") from error
        # under align_corners=False, and of singular matrices, older ones make something else
        refuse_older("kornia", kornia.__version__, (0, 9), "patch_kornia")
        functions: dict[str, Any] = {name: getattr(imgwarp, name, None) for name in _CODES}
        for name, function in functions.items():
            if not _takes_the_same(function, _CODES[name]):
                raise ImportError(
                    f"patch_kornia does not know this {name}, {function}, of kornia {kornia.__version__}"
                )
        self._functions = functions

    def turn_on(self) -> None:
        for name, function in self._functions.items():
            code = self._codes[name] = function.__code__
            _originals[name] = FunctionType(code, function.__globals__, name, function.__defaults__)
        for name, function in self._functions.items():
            # where the source is: torch.jit.script compiles kornia's own
            old = self._codes[name]
            function.__code__ = _CODES[name].replace(
                co_name=name, co_filename=old.co_filename, co_firstlineno=old.co_firstlineno
            )

    def turn_off(self) -> None:
        for name, code in self._codes.items():
            self._functions[name].__code__ = code


def _takes_the_same(function: Any, ours: CodeType) -> bool:
    """Whether it is a Python function of the same arguments."""
    if not isinstance(function, FunctionType):
        return False
    code, count = function.__code__, ours.co_argcount
    same = code.co_argcount == count and code.co_varnames[:count] == ours.co_varnames[:count]
    more = code.co_kwonlyargcount or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    return same and not more and not code.co_freevars


class patch_kornia(Patch):
    """Makes kornia's ``warp_affine`` and ``warp_perspective`` one fused call each, in code that nobody edits.

    For a block::

        augment = kornia.augmentation.RandomAffine(30.0, p=1.0)
        with stn.patch_kornia():
            augment(images)

    or, as ``@stn.patch_kornia()``, for a function; or from here on, until ``disable``::

        stn.patch_kornia().enable()

    Their callers are served too, kornia's own (``rotate``, ``crop_and_resize``, the augmentations) and
    others, however they came by the functions. Results are kornia's: the matrix, in pixels from input to
    output, becomes parameters by :func:`stn_triton.transforms.from_pixels`, and these go to
    :func:`stn_triton.affine_grid_sample` or :func:`stn_triton.projective_grid_sample`. So no grid is held,
    and coordinates are computed in float32 or wider. On the horizon of a homography, where kornia's
    coordinates are any, they are NaN.

    Calls that these do not cover run kornia's own code: ``padding_mode="fill"``; images without pixels and
    axes of one pixel; arguments of different dtypes, or that do not fit, which fail as they did; tensor
    subclasses; autocast; ``torch.jit`` and ONNX; and devices without Triton (see ``python -m stn_triton``).
    kornia's other samplers (``remap``, ``homography_warp``, volumes) stay as they are: :class:`patch_torch`
    is for them, and both may be in force.

    The patch holds for the whole process. Blocks may be nested and may overlap in several threads, and are
    entered and left whole or not at all, as those of :class:`patch_torch`. What ``torch.compile`` has
    compiled stays what it was when it was compiled.

    Raises:
        ImportError: kornia cannot be imported, is older than 0.9, or has functions of other arguments.

    Example:
        >>> import kornia
        >>> image = torch.rand(1, 3, 48, 64)
        >>> half = torch.tensor([[[0.5, 0.0, 0.0], [0.0, 0.5, 0.0]]])
        >>> with stn.patch_kornia():
        ...     smaller = kornia.geometry.transform.warp_affine(image, half, (24, 32))
    """

    _switch = _Functions()


# --------------------------------------------------------------------------------------- the calls
def warp(
    name: str,
    src: Tensor,
    M: Tensor,
    dsize: Any,
    mode: str,
    padding_mode: str,
    align_corners: bool,
    fill_value: Tensor | None,
) -> Tensor:
    """kornia's function of this name."""
    size = to_size(dsize)
    if size is None or not _fits(name, src, M, size, mode, padding_mode, align_corners):
        return _originals[name](src, M, dsize, mode, padding_mode, align_corners, fill_value)
    matrix = M.float() if M.dtype in (torch.float16, torch.bfloat16) else M
    if name == "warp_perspective":  # its scale means nothing, and might overflow in the inverse
        scale = matrix.detach().abs().amax((-2, -1), keepdim=True)
        matrix = matrix / torch.where(scale > 0, scale, 1)
    theta = transforms.from_pixels(matrix, src.shape[2:], size, align_corners, inverse=True)
    sampler = functional.affine_grid_sample if name == "warp_affine" else functional.projective_grid_sample
    # contiguous as PyTorch's samplers leave it, whatever the image's memory format
    return sampler(src, theta, size, mode, padding_mode, align_corners).contiguous()


def _fits(
    name: str,
    src: Any,
    M: Any,
    size: tuple[int, ...],
    mode: Any,
    padding_mode: Any,
    align_corners: Any,
) -> bool:
    return (
        not leaves_pytorch()  # asked first: to torch.jit.trace sizes are tensors
        and src is not None
        and M is not None
        and type(src) in PLAIN
        and type(M) in PLAIN
        and src.dim() == 4
        and M.dim() == 3
        and M.shape[1:] == ((2, 3) if name == "warp_affine" else (3, 3))
        and (M.shape[0] == src.shape[0] or (M.shape[0] == 1 and name == "warp_affine"))
        and src.dtype in DTYPES
        and M.dtype == src.dtype
        and M.device == src.device
        and src.layout == M.layout == torch.strided
        and isinstance(mode, str)
        and mode in INTERPOLATIONS
        and isinstance(padding_mode, str)
        and padding_mode in ("zeros", "border", "reflection")  # kornia knows no others of ours
        and isinstance(align_corners, bool)
        and len(size) == 2
        and all(n > 1 for n in (*size, *src.shape[2:]))
        and 0 not in src.shape[:2]
        and not (backend.has_autocast(src.device.type) and torch.is_autocast_enabled(src.device.type))
        and _runs_kernels(src.device.type)
    )


def _runs_kernels(device_type: str) -> bool:
    return backend.select(device_type).name != "torch"


# The compiler calls it while it traces.
_runs_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]
