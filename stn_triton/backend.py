"""Which code computes on a device, and why."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Literal, NamedTuple

import torch

__all__ = ["Backend", "has_autocast", "select", "use", "without_autocast"]

Name = Literal["triton", "interpreter", "torch"]


class Backend(NamedTuple):
    """``name`` is "triton" (compiled kernels), "interpreter" (the same kernels, run in Python on CPU
    tensors) or "torch" (PyTorch's operators)."""

    name: Name
    reason: str


_forced: tuple[Backend, ...] = ()  # by the blocks that are open, the last one's last
_lock = threading.Lock()


def interpreting() -> bool:
    """Whether TRITON_INTERPRET is set, as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def select(device_type: str) -> Backend:
    """The backend for tensors on a device of this type ("cpu", "cuda", "xpu", ...)."""
    forced = _forced
    if forced:
        return forced[-1]
    return _select(device_type, device_type == "cpu" and interpreting())


@cache
def _select(device_type: str, interpret: bool) -> Backend:
    if device_type == "cpu":
        if interpret:
            return Backend("interpreter", "TRITON_INTERPRET is set")
        return Backend("torch", "Triton has no CPU driver; TRITON_INTERPRET=1 runs the kernels in Python")
    try:
        import triton

        target = triton.runtime.driver.active.get_current_target().backend
    except Exception as error:  # no triton, no driver, no compiler: whatever it is, the user is told
        return Backend("torch", f"Triton cannot run here: {error}")
    if {"cuda": "cuda", "hip": "cuda"}.get(target, target) != device_type:
        return Backend("torch", f"Triton's active driver is for {target}, not {device_type}")
    return Backend("triton", f"Triton {triton.__version__} has a {target} driver")


@contextmanager
def use(name: Name) -> Iterator[None]:
    """Force one backend, in all threads: for comparing them. "torch" works on every device."""
    global _forced
    chosen = Backend(name, "asked for by backend.use")
    with _lock:
        _forced = *_forced, chosen
    try:
        yield
    finally:
        with _lock:  # other threads' blocks may have been opened since, and stay open
            _forced = tuple(other for other in _forced if other is not chosen)


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
