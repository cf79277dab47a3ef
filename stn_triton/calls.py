"""Who calls: eager code, or something that takes the call for itself.

A public function of tensors begins, as PyTorch's own do, with ::

    if (has_torch_function(input, theta) or tracing_state()) and is_taken():
        return elsewhere(affine_grid_sample, input, theta, ...)

or is decorated with :func:`public`, which does the same and takes longer. Here is decided what then happens:

* tensor subclasses, proxies of ``torch.fx`` and function modes are asked first, by ``__torch_function__``;
* ``torch.jit.trace`` and ``torch.onnx.export`` get PyTorch's own operators, the only ones that they know.

Compilers, ``torch.export``, dispatch modes and function transforms need nothing: they see one operator, and
before a spline's the product of its coefficients. Where nobody would see it (``is_undispatched``) there is
none.
"""

from __future__ import annotations

import functools
import re
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import profiler as _profiler
from torch.overrides import handle_torch_function
from torch.overrides import has_torch_function_variadic as has_torch_function

__all__ = [
    "PLAIN",
    "as_leaf",
    "at_least",
    "check",
    "elsewhere",
    "exports_onnx",
    "has_torch_function",
    "is_taken",
    "is_undispatched",
    "leaves_pytorch",
    "plain",
    "public",
    "tracing_state",
    "unrecorded",
]

Function = TypeVar("Function", bound=Callable[..., Any])

# None unless torch.jit.trace is at work, which torch.onnx.export(dynamo=False) uses too
tracing_state = torch._C._get_tracing_state
_set_tracing_state: Callable[[Any], None] = torch._C._set_tracing_state  # type: ignore[attr-defined]


_NEVER_ASKED = int, float, str, tuple, list, type(None)


class _Checked(threading.local):
    calls = 0


_checked = _Checked()


def is_taken() -> bool:
    """Whether a call that somebody may take for itself is in fact to be taken; see ``elsewhere``."""
    if torch.compiler.is_dynamo_compiling():  # which says of a subclass the same when it has been asked
        return torch._C._is_torch_function_enabled()
    return _checked.calls == 0


def elsewhere(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, for who takes the call; of numbers alone that is nobody.

    For ``torch.jit.trace`` it is called twice. The tracer does not see the first call: there sizes, which are
    tensors to it, are ints to the checks of arguments, and what is remembered (a spline's system) does not
    become part of the graph. In the second call the checks hold, and ``leaves_pytorch`` is true.
    """
    # Dynamo of PyTorch 2.11 cannot ask numbers and None. A mode (a default device is one) would take them;
    # tensors that are made of numbers inside of it would not see that device.
    given = tuple(arg for arg in (*args, *kwargs.values()) if not isinstance(arg, _NEVER_ASKED))
    if has_torch_function(*given):
        return handle_torch_function(function, given, *args, **kwargs)
    traced = tracing_state() is not None
    if traced:
        with torch.no_grad():
            unrecorded(function, *args, **kwargs)
    _checked.calls += 1
    try:
        with warnings.catch_warnings() if traced else nullcontext():
            if traced:
                warnings.simplefilter("ignore")  # all came in the first call, but for those about checks
            return function(*args, **kwargs)
    finally:
        _checked.calls -= 1


def at_least(size: Any, least: int) -> Any:
    """The larger one. ``size``: an int, a symbol, or to ``torch.jit.trace`` a tensor ()."""
    if isinstance(size, Tensor):
        return size.clamp(min=least)
    # Dynamo of PyTorch 2.11 takes ``max`` alone, a traced size ``sym_max`` alone
    return max(size, least) if isinstance(size, int) else torch.sym_max(size, least)


def public(function: Function) -> Function:
    """A function that begins with the question above, for what is not called often."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if (has_torch_function(*args, *kwargs.values()) or tracing_state()) and is_taken():
            return elsewhere(call, *args, **kwargs)
        return function(*args, **kwargs)

    return cast(Function, call)


def unrecorded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(...)``, of which ``torch.jit.trace`` sees nothing: what it makes is a constant."""
    state = tracing_state()
    if state is None:
        return function(*args, **kwargs)
    _set_tracing_state(None)
    try:
        return function(*args, **kwargs)
    finally:
        _set_tracing_state(state)


def check(function: Callable[..., None], *args: Any) -> None:
    """A check of arguments that nothing records; proxies of ``torch.fx`` have nothing to check."""
    if not any(isinstance(arg, torch.fx.Proxy) for arg in args):
        unrecorded(function, *args)


def exports_onnx() -> bool:
    """Whether what runs is recorded for ``torch.onnx.export``. (Dynamo does not tell.)"""
    if torch.compiler.is_dynamo_compiling() or "torch.onnx" not in sys.modules:
        return False
    is_recorded = tracing_state() is not None or torch.compiler.is_compiling()
    return is_recorded and torch.onnx.is_in_onnx_export()


def leaves_pytorch() -> bool:
    """Whether PyTorch's own operators have to do: TorchScript and ONNX know no others."""
    return tracing_state() is not None or exports_onnx()


# ----------------------------------------------------------------------------------- tensor subclasses
PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
"""The types of what kernels and operators take as it is."""


def plain(tensor: Any) -> Any:
    """The tensor as a ``torch.Tensor``, recorded by autograd; None for None.

    A subclass may redefine whatever Python calls. One that has operators of its own (``__torch_dispatch__``:
    fake tensors, DTensors) is left as it is: the dispatcher takes it there. So is all that Dynamo traces.
    """
    if type(tensor) in PLAIN or torch.compiler.is_dynamo_compiling():
        return tensor
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return tensor
    return Tensor.as_subclass(tensor, Tensor)


# ---------------------------------------------------------------------------------------- the dispatcher
_included: Callable[[], Any] = torch._C._dispatch_tls_local_include_set  # type: ignore[attr-defined]
_keys: Callable[[Tensor], Any] = torch._C._dispatch_keys
_is_profiled: Callable[[], bool] = torch._C._autograd._profiler_enabled  # of this thread alone


def is_undispatched(tensors: tuple[Any, ...]) -> bool:
    """Whether an operator's call would come to its implementation as it is, so that it can be called instead.

    Nobody takes the call of an operator of ours on the way, nor notes it: no dispatch mode, function
    transform, tracer or profiler, nor a tensor that is a subclass, wrapped, without memory, or not what its
    memory says (negated, zero). A lone ``ExecutionTraceObserver`` cannot be asked for, and sees no call. Of
    autograd nothing is said; autocast has nothing to say of our operators.
    """
    if _profiler._is_profiler_enabled or _is_profiled():  # the first: on whatever thread
        return False
    raw = _included().raw_repr()
    for tensor in tensors:
        if tensor is not None:
            if type(tensor) not in PLAIN:
                return False
            raw |= _keys(tensor).raw_repr()
    return _ends_at_device(raw)


_Key: Any = torch._C.DispatchKey
# that pass on the calls of an operator of ours: "AutogradCPU" stands for all of autograd
_PASSING = "BackendSelect", "ADInplaceOrView", "AutogradCPU", *filter(re.compile("Autocast").match, dir(_Key))


@functools.lru_cache(maxsize=64)  # there are a few
def _ends_at_device(raw: int) -> bool:
    """Whether the dispatcher, of these keys, serves one of memory."""
    keys = torch._C.DispatchKeySet.from_raw_repr(raw)
    for name in _PASSING:
        keys = keys.remove(getattr(_Key, name))
    return keys.highestPriorityTypeId() in (_Key.CPU, _Key.CUDA, _Key.XPU, _Key.PrivateUse1)


# -------------------------------------------------------------------------------------------- torch.fx
def as_leaf(module: torch.nn.Module, input: Any) -> Any:
    """The call of ``module`` as one node, where ``torch.fx`` traces a module that contains it; else None."""
    if not isinstance(input, torch.fx.Proxy):
        return None
    path = input.tracer.path_of_module(module)  # type: ignore[attr-defined]
    return input.tracer.create_proxy("call_module", path, (input,), {}) if path else None
