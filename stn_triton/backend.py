"""Which code computes on a device, and why."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch

from .kernels.host.blocks import Block, Blocks
from .versions import is_folder

__all__ = ["Backend", "has_autocast", "select", "use", "without_autocast"]

Name = Literal["triton", "interpreter", "torch"]


class Backend(NamedTuple):
    """``name`` is "triton" (compiled kernels), "interpreter" (the same kernels, run in Python on CPU
    tensors) or "torch" (PyTorch's operators). ``advice``: what would make it faster, if known."""

    name: Name
    reason: str
    advice: str = ""


OLDEST_GPU = 70  # compute capability 7.0, NVIDIA's first that PyTorch's compiler gives to Triton


_forced: Blocks[Backend] = Blocks()


def interpreting() -> bool:
    """Whether TRITON_INTERPRET is set, as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def select(device_type: str) -> Backend:
    """The backend for tensors on a device of this type ("cpu", "cuda", "xpu", ...).

    Where an accelerator has to do without the kernels, a warning says why: once.

    Raises:
        ImportError: TRITON_INTERPRET asks for Triton's interpreter, and Triton cannot be imported, or was
            before that was set.
    """
    if _forced.open and (forced := _forced.values()):
        return forced[-1]
    return _select(device_type, device_type == "cpu" and interpreting())


@cache
def _select(device_type: str, interpret: bool) -> Backend:
    if device_type == "cpu":
        if interpret:
            _need_triton("TRITON_INTERPRET is set", "or unset that")
            _need_interpreter()
            return Backend("interpreter", "TRITON_INTERPRET is set")
        return Backend("torch", "Triton has no CPU driver; TRITON_INTERPRET=1 runs the kernels in Python")
    chosen = _of_accelerator(device_type)
    if chosen.name == "torch" and device_type != "meta":
        more = chosen.advice and f" Faster: {chosen.advice}."
        warnings.warn(
            f"stn_triton runs on PyTorch's own operators on {device_type}: {chosen.reason}.{more}",
            stacklevel=4,
        )
    return chosen


def _triton() -> Any:
    """
    Raises:
        ImportError: it is not there, or its import fails, in whatever way.
    """
    try:
        import triton
    except ImportError:
        raise
    except Exception as error:  # of a damaged installation, a library that does not load, ...
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImportError(f"importing it raises {said}") from error
    if is_folder(triton):
        raise ModuleNotFoundError(
            f"No module named 'triton', but a folder without code: {triton.__path__[0]}"
        )
    return triton


def _of_accelerator(device_type: str) -> Backend:
    if device_type == "mps":
        return Backend("torch", "Triton has no driver for Apple's GPUs")
    try:
        triton = _triton()
        target = triton.runtime.driver.active.get_current_target()
    except Exception as error:  # no triton, no driver, no compiler: whatever it is, the user is told
        return Backend("torch", f"Triton cannot run here: {error}", _advice(error))
    if {"cuda": "cuda", "hip": "cuda"}.get(target.backend, target.backend) != device_type:
        return Backend("torch", f"Triton's active driver is for {target.backend}, not {device_type}")
    if target.backend == "cuda" and target.arch < OLDEST_GPU:
        capability, least = (f"{number // 10}.{number % 10}" for number in (target.arch, OLDEST_GPU))
        return Backend("torch", f"the GPU's compute capability is {capability}, and Triton needs {least}")
    return Backend("triton", f"Triton {triton.__version__} has a {target.backend} driver")


def _advice(error: Exception) -> str:
    """What to do about Triton that does not run."""
    if isinstance(error, ImportError):
        if sys.platform == "linux":
            return "pip install triton"
        return "Triton comes for Linux; on Windows that is WSL 2"
    if "C compiler" in str(error):
        return "install a C compiler (apt install gcc), or name one: CC=/path/to/gcc"
    return ""


def _need_triton(asked: str, otherwise: str) -> None:
    try:
        _triton()
    except ImportError as error:
        raise ImportError(
            f"{asked}, but Triton is missing ({error}): install it (pip install triton), {otherwise}"
        ) from error


def _need_interpreter() -> None:
    triton = _triton()
    # which its functions are for is settled when it is imported
    if isinstance(triton.language.cdiv, triton.runtime.JITFunction):
        raise ImportError("Triton was imported to compile: set TRITON_INTERPRET=1 before Python starts")


def use(name: Name) -> Block[Backend]:
    """Force one backend, in all threads: for comparing them. "torch" works on every device.

    A context manager and decorator. Blocks may overlap; the one that was opened last decides.

    Raises:
        ValueError: there is no such backend.
        ImportError: it needs Triton, which cannot be imported; "interpreter" needs TRITON_INTERPRET=1, too.
    """
    if name not in get_args(Name):
        raise ValueError(f"name must be one of {', '.join(map(repr, get_args(Name)))}, got {name!r}")
    if name != "torch":
        _need_triton(f"backend.use({name!r})", 'or use "torch"')
    if name == "interpreter":
        _need_interpreter()
    return Block(_forced, Backend(name, "asked for by backend.use"))


def has_autocast(device_type: str) -> bool:
    """Whether ``torch.autocast`` takes this type of device.

    The compiler of PyTorch 2.11 cannot trace the question. What it compiles for has autocast, but for meta.
    """
    if torch.compiler.is_compiling():
        return device_type != "meta"
    return torch.amp.is_autocast_available(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Inside, operators compute in the type they are given, autocast or not."""
    if has_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
