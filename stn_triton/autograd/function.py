"""What the operators' Functions share: how they are entered, and derivatives in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backend, distributed, ops
from ..calls import leaves_pytorch, plain

Tensors = Sequence[Tensor | None]


def is_transformed() -> bool:
    """Whether a function transform or forward mode may ask for derivatives, which no tensor's flag tells."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


class Function(torch.autograd.Function):
    """The derivatives and the ``vmap`` of an operator, ``op``, which thereby has them itself. ``forward`` is
    the operator without them."""

    op: Any
    in_pytorch: Callable[..., Any] | None = None
    """The operator in PyTorch's own, where these are to be traced."""
    in_parts: Callable[..., Any] | None = None
    """Of an operator without derivatives: what is called instead where one may be asked for."""
    run: Callable[..., Any]
    """The operator. Eager code goes straight to the derivatives, and where none can be asked for does without
    them; compilers see the operator alone, as Dynamo traces no Function that has a ``jvp``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        op, apply, in_pytorch, in_parts = cls.op, cls.in_parts or cls.apply, cls.in_pytorch, cls.in_parts
        # looked up here, as they are asked in each call
        is_compiling, is_tracing = torch.compiler.is_compiling, torch._C._is_tracing
        has_transforms, is_grad_enabled = torch._C._are_functorch_transforms_active, torch.is_grad_enabled
        below_autograd = torch._C._AutoDispatchBelowADInplaceOrView
        # ``apply`` inspects ``forward`` for defaults first, which takes longer than all the rest
        record = super(torch.autograd.Function, cls).apply  # type: ignore[misc]
        tensors = sum("Tensor" in str(argument.type) for argument in op._schema.arguments)  # they come first

        def compute(*inputs: Any) -> Any:
            # A result may be a view of a buffer. To autograd it is to be none: some views take no tangents.
            with below_autograd():
                return op(*inputs)

        def run(*inputs: Any) -> Any:
            if is_compiling() or is_tracing():
                return op(*inputs) if in_pytorch is None or not leaves_pytorch() else in_pytorch(*inputs)
            if forward_ad._current_level >= 0 or has_transforms():  # ``is_transformed``
                return apply(*inputs)
            if is_grad_enabled():
                for tensor in inputs[:tensors]:
                    if tensor is not None and tensor.requires_grad:
                        if in_parts is not None:
                            return in_parts(*inputs)
                        return record(*map(_unwrapped, inputs[:tensors]), *inputs[tensors:])
            return compute(*inputs)

        def dispatched(*inputs: Any) -> Any:
            # in compiled code forward_ad does not know of duals
            tracked = torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled() or is_transformed()
            inputs = *map(plain, inputs[:tensors]), *inputs[tensors:]
            return apply(*inputs) if tracked else compute(*inputs)

        cls.forward = staticmethod(compute)  # type: ignore[method-assign]
        cls.run = staticmethod(run)
        ops.differentiate(op, dispatched)


def _unwrapped(tensor: Tensor | None) -> Tensor | None:
    """What a function transform left wrapped when it ended."""
    return None if tensor is None else torch._C._functorch.unwrap_if_dead(tensor)


def primals(ctx: Any) -> tuple[Any, ...]:
    """What a ``jvp`` finds saved, without the tangents that it was given with.

    There is one level of duals to each function transform. Compiled code enters it unknown to ``forward_ad``.
    """
    return tuple(t if t is None else forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors)


def tracks_tangents(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """A ``jvp`` whose result can be differentiated in forward mode again.

    PyTorch calls it with forward mode off, and so it stays for the transforms further out, which would
    take the result for a constant. It must begin with ``primals``.
    """

    @functools.wraps(jvp)
    def tracked(ctx: Any, *tangents: Tensor | None) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(ctx, *tangents)

    return tracked


def admitted(*tensors: Any) -> Any:
    """Tensors of any type as the Functions take them: what they save is plain too."""
    if distributed.is_sharded(tensors[0]):
        distributed.register()
    return map(plain, tensors)


# ------------------------------------------------------------------------------------ in plain PyTorch
def vector_jacobian(
    function: Callable[..., tuple[Tensor | None, ...]],
    tensors: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    cotangents: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """d of ``function(*tensors)``'s results, weighted by ``cotangents``, for each tensor that needs it.

    ``function`` is plain PyTorch. The result can be differentiated in turn.
    """
    weights = tuple(cotangent for cotangent in cotangents if cotangent is not None)
    if not weights or not any(needed):
        return [None] * len(tensors)
    chosen, narrowed = _narrowed(function, tensors, needed, cotangents)
    with backend.without_autocast(weights[0].device.type):
        _, pullback, *_ = torch.func.vjp(narrowed, *chosen)
        found = iter(pullback(weights))
    return [next(found) if need else None for need in needed]


def jacobian_vector(
    function: Callable[..., tuple[Tensor | None, ...]],
    tensors: tuple[Tensor | None, ...],
    tangents: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """The derivative of the wanted results of ``function(*tensors)`` in the direction of ``tangents``.

    It is the transpose of ``vector_jacobian``, which is linear in its weights: unlike a forward mode of
    its own it can be had inside any other.
    """
    asked = tuple(True if want else None for want in wanted)
    chosen, narrowed = _narrowed(function, tensors, tuple(t is not None for t in tangents), asked)
    directions = tuple(tangent for tangent in tangents if tangent is not None)
    with backend.without_autocast(directions[0].device.type):
        results, pullback, *_ = torch.func.vjp(narrowed, *chosen)
        _, transposed, *_ = torch.func.vjp(pullback, tuple(torch.zeros_like(result) for result in results))
        found = iter(transposed(directions)[0])
    return [next(found) if want else None for want in wanted]


def _narrowed(
    function: Callable[..., tuple[Tensor | None, ...]],
    tensors: tuple[Tensor | None, ...],
    chosen: tuple[bool, ...],
    results: tuple[Any, ...],
) -> tuple[list[Tensor], Callable[..., tuple[Tensor, ...]]]:
    """The chosen tensors, and ``function`` of these alone with the results alone that are not None."""

    def narrowed(*some: Tensor) -> tuple[Tensor, ...]:
        given = iter(some)
        arguments = (next(given) if choose else t for t, choose in zip(tensors, chosen, strict=True))
        found = function(*arguments)
        return tuple(
            r for r, asked in zip(found, results, strict=True) if r is not None and asked is not None
        )

    return [t for t, choose in zip(tensors, chosen, strict=True) if choose and t is not None], narrowed


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
