"""What the operators' Functions share: how they are entered, and derivatives in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backend, distributed, ops
from ..calls import PLAIN, is_undispatched, leaves_pytorch, plain

Tensors = Sequence[Tensor | None]


def is_transformed() -> bool:
    """Whether a function transform or forward mode is active: these ask for derivatives of tensors whose
    ``requires_grad`` is False."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


class Function(torch.autograd.Function):
    """The derivatives and the ``vmap`` of an operator, ``op``. They are registered for it, so that the
    operator itself is differentiable. ``forward`` calls the operator below autograd."""

    op: Any
    in_pytorch: Callable[..., Any] | None = None
    """The operator in PyTorch's own, where these are to be traced."""
    in_parts: Callable[..., Any] | None = None
    """Of an operator without derivatives: what is called instead where one may be asked for."""
    run: Callable[..., Any]
    """The operator, called with its arguments by place. Its tensors may be of any type.

    Plain eager code goes straight to the implementation, recorded if need be. Function transforms and forward
    mode go to the derivatives, and compilers see the operator alone, as Dynamo traces no Function that has a
    ``jvp``. In place of a result that is not asked for there is None or an empty tensor."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        op, in_pytorch, in_parts, setup = cls.op, cls.in_pytorch, cls.in_parts, cls.setup_context
        implementation, tensors = ops.implementation_of(op)
        # looked up here, as they are asked in each call
        is_compiling, is_tracing = torch.compiler.is_compiling, torch._C._is_tracing
        is_traced_by_dynamo = torch.compiler.is_dynamo_compiling
        has_transforms, is_grad_enabled = torch._C._are_functorch_transforms_active, torch.is_grad_enabled
        below_autograd = torch._C._AutoDispatchBelowADInplaceOrView
        # ``apply`` inspects ``forward`` for defaults first, which takes longer than all the rest
        record = super(torch.autograd.Function, cls).apply  # type: ignore[misc]
        has_tangents = "jvp" in cls.__dict__

        def compute(*inputs: Any) -> Any:
            # A result may be a view of a buffer. To autograd it is to be none: some views take no tangents.
            with below_autograd():
                return op(*inputs)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup(ctx, inputs, output)
            if has_tangents:
                ctx.save_for_forward(*inputs[:tensors])

        def apply(*inputs: Any) -> Any:
            if in_parts is not None:
                return in_parts(*inputs)
            if has_transforms():
                return cls.apply(*inputs)
            return record(*map(_unwrapped, inputs[:tensors]), *inputs[tensors:])

        def run(*inputs: Any) -> Any:
            given = inputs[:tensors]
            if is_traced_by_dynamo() or not is_undispatched(given) or forward_ad._current_level >= 0:
                return run_dispatched(*inputs)
            if is_grad_enabled():
                for tensor in given:
                    if tensor is not None and tensor.requires_grad:
                        return record_eager(*inputs)
            return implementation(*inputs)

        def run_dispatched(*inputs: Any) -> Any:
            if not PLAIN.issuperset(map(type, inputs[:tensors])):
                inputs = *admitted(*inputs[:tensors]), *inputs[tensors:]
            if is_compiling() or is_tracing():
                return op(*inputs) if in_pytorch is None or not leaves_pytorch() else in_pytorch(*inputs)
            given = [tensor for tensor in inputs[:tensors] if tensor is not None]
            recorded = is_grad_enabled() and any(tensor.requires_grad for tensor in given)
            return apply(*inputs) if recorded or is_transformed() else compute(*inputs)

        def dispatched(*inputs: Any) -> Any:
            # in compiled code forward_ad does not know of duals
            tracked = torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled() or is_transformed()
            inputs = *map(plain, inputs[:tensors]), *inputs[tensors:]
            return apply(*inputs) if tracked else compute(*inputs)

        cls.forward = staticmethod(compute)  # type: ignore[method-assign]
        cls.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]
        cls.run = staticmethod(run)
        record_eager = in_parts or eager(cls.__name__, implementation, setup, cls.backward)
        ops.differentiate(op, dispatched)


def eager(
    name: str,
    implementation: Callable[..., Any],
    setup: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """``apply`` of a Function that neither knows transforms nor dispatches its operator: of two calls one."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = implementation(*inputs)
        setup(ctx, inputs, output)
        return output

    body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), body)
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def _unwrapped(tensor: Tensor | None) -> Tensor | None:
    """What a function transform left wrapped when it ended."""
    return None if tensor is None else torch._C._functorch.unwrap_if_dead(tensor)


def unwanted(results: tuple[Tensor | None, ...], wanted: Sequence[bool]) -> list[Tensor]:
    """What stands for results that are not asked for."""
    return [t for t, want in zip(results, wanted, strict=True) if t is not None and not want]


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
