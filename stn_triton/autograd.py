"""The operators, differentiable: an ``autograd.Function`` around each of ``ops``.

Its derivatives, forward and reverse, are the Functions of the others. With L = <g, sample(I, P(theta))>, P
the coordinates of a source,

* the derivative of the samples in the direction (I', theta') is sample_jvp with ``moved``, the derivative of
  P in the direction theta';
* the derivatives of L by I and theta, in the same direction, are the two results of sample_hvp, the second
  carried from the coordinates to theta, and what P's own curvature adds to it;

and everything else of second order is made of these. Only sample_hvp is differentiated in plain PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backend, distributed, export, ops, reference
from .calls import PLAIN, leaves_pytorch, plain
from .kernels.modes import Interpolation, Padding, Source

__all__ = ["grid", "sample"]

_Tensors = Sequence[Tensor | None]


def _is_transformed() -> bool:
    """Whether a function transform or forward mode may ask for derivatives, which no tensor's flag tells."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


class _Function(torch.autograd.Function):
    """The derivatives and the ``vmap`` of an operator, ``op``, which thereby has them itself. ``forward`` is
    the operator without them."""

    op: Any
    in_pytorch: Callable[..., Any] | None = None
    """The operator in PyTorch's own, where these are to be traced."""
    run: Callable[..., Any]
    """The operator. Eager code goes straight to the derivatives, and where none can be asked for does without
    them; compilers see the operator alone, as Dynamo traces no Function that has a ``jvp``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        op, apply, in_pytorch = cls.op, cls.apply, cls.in_pytorch
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
            if forward_ad._current_level >= 0 or has_transforms():  # ``_is_transformed``
                return apply(*inputs)
            if is_grad_enabled():
                for tensor in inputs[:tensors]:
                    if tensor is not None and tensor.requires_grad:
                        return record(*map(_unwrapped, inputs[:tensors]), *inputs[tensors:])
            return compute(*inputs)

        def dispatched(*inputs: Any) -> Any:
            # in compiled code forward_ad does not know of duals
            tracked = torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled() or _is_transformed()
            inputs = *map(plain, inputs[:tensors]), *inputs[tensors:]
            return apply(*inputs) if tracked else compute(*inputs)

        cls.forward = staticmethod(compute)  # type: ignore[method-assign]
        cls.run = staticmethod(run)
        ops.differentiate(op, dispatched)


def _unwrapped(tensor: Tensor | None) -> Tensor | None:
    """What a function transform left wrapped when it ended."""
    return None if tensor is None else torch._C._functorch.unwrap_if_dead(tensor)


def _primals(ctx: Any) -> tuple[Any, ...]:
    """What a ``jvp`` finds saved, without the tangents that it was given with.

    There is one level of duals to each function transform. Compiled code enters it unknown to ``forward_ad``.
    """
    return tuple(t if t is None else forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors)


def _tracked(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """A ``jvp`` whose result can be differentiated in forward mode again.

    PyTorch calls it with forward mode off, and so it stays for the transforms further out, which would
    take the result for a constant. It must begin with ``_primals``.
    """

    @functools.wraps(jvp)
    def tracked(ctx: Any, *tangents: Tensor | None) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(ctx, *tangents)

    return tracked


def _admitted(*tensors: Any) -> Any:
    """Tensors of any type as the Functions take them: what they save is plain too."""
    if distributed.is_sharded(tensors[0]):
        distributed.register()
    return map(plain, tensors)


# ------------------------------------------------------------------------------------------------ vmap
# The axis of each kind of tensor into which a mapped dimension goes.
_IMAGES = {"image": 0, "output": 0, "params": 0, "coordinates": 0, "grid": 0}
_TRANSFORMS = {"output": 1, "params": 1, "coordinates": 1}
_TALL_GRID = {"output": 2, "params": 1, "coordinates": 2}


def _vmap(
    function: type[_Function],
    arguments: tuple[str, ...],
    results: tuple[str | None, ...],
    info: Any,
    in_dims: tuple[Any, ...],
    inputs: tuple[Any, ...],
) -> tuple[Any, Any]:
    """``function`` over one more dimension, with one call of it: a ``vmap`` staticmethod's two results.

    arguments: the kinds of the first inputs, which are tensors or None; then come the source and a shape.
    results: the kinds of the results; None for what is not asked for.

    The samples become more images of the batch; or, if all read the same images, more transforms of each, or
    one taller grid, and the images are not copied. Control points there is one set of in a call: where these
    are mapped, or each sample's gradient by them is asked for, each sample has a call of its own.
    """
    count = len(arguments)
    tensors, dims = inputs[:count], in_dims[:count]
    source, shape = inputs[count : count + 2]
    samples = info.batch_size
    mapped = [kind for kind, dim in zip(arguments, dims, strict=True) if dim is not None]
    if "control" in (*mapped, *results) or samples == 0:
        found = []
        for k in range(max(samples, 1)):  # of no samples, one of zeros, whose results are dropped
            chosen = (
                t if dim is None else t.select(dim, k) if samples else t.sum(dim)
                for t, dim in zip(tensors, dims, strict=True)
            )
            one = function.run(*chosen, *inputs[count:])
            found.append(one if isinstance(one, tuple) else (one,))
        stacked = tuple(
            column[0] if kind is None else torch.stack(column)[:samples]
            for kind, column in zip(results, zip(*found, strict=True), strict=True)
        )
        out_dims = tuple(None if kind is None else 0 for kind in results)
        return (stacked, out_dims) if len(results) > 1 else (stacked[0], out_dims[0])

    logical = {
        kind: t.shape if dim is None else (*t.shape[:dim], *t.shape[dim + 1 :])
        for kind, t, dim in zip(arguments, tensors, dims, strict=True)
        if t is not None
    }
    matrices = source not in (Source.GRID, Source.FLOW)
    if "image" in (*mapped, *results) or "grid" in (*arguments, *results) or source == Source.FLOW:
        axes = _IMAGES
    else:
        axes = _TRANSFORMS if matrices else _TALL_GRID
    # one output for each image: there is no axis of the transforms yet
    single = axes is _TRANSFORMS and len(logical["params"]) == 3
    batch = next(logical[kind][0] for kind in ("image", "output", "grid", "params") if kind in logical)
    broadcast = axes is _IMAGES and logical["params"][0] == 1 < batch

    def folded(kind: str, tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if tensor is None or kind not in axes:
            return tensor
        axis = axes[kind]
        if dim is not None:
            tensor = tensor.movedim(dim, 0)
        elif kind == "params" and axes is _IMAGES and len(tensor) == 1 and "params" not in results:
            return tensor
        else:
            tensor = tensor.expand(samples, *tensor.shape)
        if kind == "params" and broadcast:
            tensor = tensor.expand(samples, batch, *tensor.shape[2:])
        if single and kind != "coordinates":
            tensor = tensor.unsqueeze(2)
        return tensor.movedim(0, axis).flatten(axis, axis + 1)

    def unfolded(kind: str | None, tensor: Tensor) -> Tensor:
        if kind is None:
            return tensor
        axis = axes[kind]
        tensor = tensor.unflatten(axis, (samples, tensor.shape[axis] // samples)).movedim(axis, 0)
        if single and kind != "coordinates":
            tensor = tensor.squeeze(2)
        return tensor.sum(1, keepdim=True) if kind == "params" and broadcast else tensor

    if ("output" in results and axes is _TALL_GRID) or ("output" in arguments and axes is _IMAGES):
        shape = (samples * shape[0], *shape[1:])  # the output's size, or the images' shape
    found = function.run(
        *(folded(*argument) for argument in zip(arguments, tensors, dims, strict=True)),
        source,
        shape,
        *inputs[count + 2 :],
    )
    if isinstance(found, Tensor):
        return unfolded(results[0], found), 0
    unfolded_results = tuple(unfolded(*result) for result in zip(results, found, strict=True))
    return unfolded_results, tuple(None if kind is None else 0 for kind in results)


# ------------------------------------------------------------------------------------ in plain PyTorch
def _vector_jacobian(
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


def _jacobian_vector(
    function: Callable[..., tuple[Tensor | None, ...]],
    tensors: tuple[Tensor | None, ...],
    tangents: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """The derivative of the wanted results of ``function(*tensors)`` in the direction of ``tangents``.

    It is the transpose of ``_vector_jacobian``, which is linear in its weights: unlike a forward mode of
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


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


# ------------------------------------------------------------------------- coordinates' derivatives
def _by_transform(params: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices or coefficients as (N, T, ., .)."""
    return (params if params.dim() == 4 else params.unsqueeze(1)).to(dtype)


def _moved(
    source: int,
    params: Tensor,
    control_points: Tensor | None,
    tangents: _Tensors,
    batch: Any,
    size: Any,
    align_corners: bool,
    dtype: torch.dtype,
) -> Tensor | None:
    """How the coordinates move with params and control points, (N, T, *size, dims) in the source's units."""
    of_params, of_controls = tangents
    moved = None
    with backend.without_autocast(params.device.type):
        controls = None if control_points is None else control_points.to(dtype)
        if of_params is not None:
            if source == Source.GRID:
                moved = of_params.to(dtype).unsqueeze(1)
            elif source == Source.FLOW:
                moved = of_params.to(dtype).movedim(1, -1).unsqueeze(1)
            elif source == Source.PROJECTIVE:
                homography, tangent = _by_transform(params, dtype), _by_transform(of_params, dtype)
                moved = reference.projective_jvp(homography, tangent, tuple(size), align_corners)
            else:  # linear in the parameters
                tangent = _by_transform(of_params, dtype)
                outputs, *matrix = tangent.shape[:2].numel(), *tangent.shape[2:]
                moved = grid(tangent.reshape(outputs, *matrix), Source(source), size, align_corners, controls)
                moved = moved.reshape(*tangent.shape[:2], *moved.shape[1:])
        if of_controls is not None:
            assert controls is not None
            coefficients, tangent = _by_transform(params, dtype), of_controls.to(dtype)
            place = tuple(size), align_corners
            moved = _sum(moved, reference.spline_control_jvp(coefficients, controls, tangent, *place))
    return None if moved is None else moved.expand(batch, *moved.shape[1:])


def _coordinates_backward(
    source: int,
    by_coordinates: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    align_corners: bool,
    control_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The transpose of ``_moved``."""
    if params.shape[0] == 1:
        by_coordinates = by_coordinates.sum(0, keepdim=True)
    if source == Source.GRID:
        return by_coordinates.squeeze(1).to(params.dtype), None
    if source == Source.FLOW:
        return by_coordinates.squeeze(1).movedim(-1, 1).to(params.dtype), None
    dtype, outputs = by_coordinates.dtype, by_coordinates.shape[:2].numel()
    by_params, by_controls = _GridBackward.run(
        by_coordinates.reshape(outputs, *by_coordinates.shape[2:]),
        params.reshape(outputs, *params.shape[-2:]).to(dtype),
        None if control_points is None else control_points.to(dtype),
        source,
        align_corners,
        control_grad,
    )
    by_params = by_params.reshape(params.shape).to(params.dtype)
    return by_params, by_controls.to(params.dtype) if control_grad else None


def _curvature(
    source: int,
    by_coordinates: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    tangents: _Tensors,
    align_corners: bool,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """d of <by_coordinates, ``_moved``> by params and control points."""
    batch, _, *size, _ = by_coordinates.shape
    of_params, of_controls = tangents
    found: list[Tensor | None] = [None, None]
    if of_params is not None:

        def function(params: Tensor, control_points: Tensor | None) -> tuple[Tensor | None]:
            place = batch, size, align_corners, by_coordinates.dtype
            return (_moved(source, params, control_points, (of_params, None), *place),)

        found = _vector_jacobian(function, (params, control_points), tuple(wanted), (by_coordinates,))
    if of_controls is not None:
        assert control_points is not None
        more = _control_curvature(by_coordinates, params, control_points, of_controls, align_corners, wanted)
        found = [_sum(a, b) for a, b in zip(found, more, strict=True)]
    return found


def _control_curvature(
    by_coordinates: Tensor,
    coefficients: Tensor,
    control_points: Tensor,
    tangent: Tensor,
    align_corners: bool,
    wanted: Sequence[bool],
    chunk: int = 32,
) -> list[Tensor | None]:
    """A few control points at a time, so that what autograd holds is no more than the outputs."""
    batch, _, *size, _ = by_coordinates.shape
    dtype, controls = by_coordinates.dtype, control_points.shape[0]
    parts: list[list[Tensor | None]] = []
    for start in range(0, controls, chunk):
        some = slice(start, min(start + chunk, controls))
        along = tangent[some].to(dtype)

        def function(weights: Tensor, points: Tensor, along: Tensor = along) -> tuple[Tensor]:
            place = tuple(size), align_corners
            moved = reference.spline_control_jvp(
                _by_transform(weights, dtype), points.to(dtype), along, *place
            )
            return (moved.expand(batch, *moved.shape[1:]),)

        chosen = coefficients[..., some, :], control_points[some]
        parts.append(_vector_jacobian(function, chosen, tuple(wanted), (by_coordinates,)))
    by_weights, by_points = zip(*parts, strict=True)
    return [
        # the last three coefficients are the affine part's, which no control point moves
        torch.nn.functional.pad(torch.cat(by_weights, -2), (0, 0, 0, 3)) if wanted[0] else None,
        torch.cat(by_points) if wanted[1] else None,
    ]


def _is_curved(source: int, tangents: _Tensors, wanted: Sequence[bool]) -> tuple[bool, bool]:
    """Whether ``_moved`` depends on params and on control points, of those wanted."""
    of_params, of_controls = (tangent is not None for tangent in tangents)
    if source == Source.PROJECTIVE:
        return wanted[0] and of_params, False
    if source == Source.TPS:
        return wanted[0] and of_controls, wanted[1] and (of_params or of_controls)
    return False, False


# ---------------------------------------------------------------------------------- sample's Functions
class _Place(NamedTuple):
    """What says how samples are taken, but for the tensors."""

    source: int
    in_shape: Any
    channels_last: bool
    size: Any
    modes: tuple[int, int, bool]

    @property
    def steps(self) -> bool:
        """Whether samples jump where they depend on the coordinates at all."""
        return self.modes[0] == Interpolation.NEAREST

    @property
    def image(self) -> tuple[Any, ...]:
        return self.source, self.in_shape, self.channels_last, *self.modes


def _directional(
    input: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    tangents: _Tensors,
    place: _Place,
    dtype: torch.dtype,
) -> Tensor | None:
    """The samples' derivative in the direction of (input, params, control_points)'s tangents; None for 0."""
    of_input, *of_source = tangents
    moved = None
    if not place.steps:
        batch, align_corners = place.in_shape[0], place.modes[2]
        moved = _moved(
            place.source, params, control_points, of_source, batch, place.size, align_corners, dtype
        )
    if moved is None and of_input is None:
        return None
    return _SampleJvp.run(
        None if moved is None else input,
        of_input,
        params,
        control_points,
        moved,
        place.source,
        place.size,
        *place.modes,
    )


def _second(
    grad_output: Tensor | None,
    input: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    tangents: _Tensors,
    place: _Place,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The derivatives of d input, d params and d control points in a direction; None for 0."""
    of_input, *of_source = tangents
    input_grad, *source_grad = wanted
    if place.steps or grad_output is None:
        return None, None, None
    dtype, align_corners = reference.compute_dtype(grad_output, params), place.modes[2]
    batch = place.in_shape[0]
    moved = _moved(place.source, params, control_points, of_source, batch, place.size, align_corners, dtype)
    input_grad = input_grad and moved is not None
    coordinates_grad = any(source_grad) and (of_input is not None or moved is not None)
    by_input, by_params, by_controls = None, None, None
    if input_grad or coordinates_grad:
        by_input, by_coordinates = _SampleHvp.run(
            grad_output,
            input if coordinates_grad and moved is not None else None,
            of_input if coordinates_grad else None,
            params,
            control_points,
            moved,
            *place.image,
            input_grad,
            coordinates_grad,
        )
        if coordinates_grad:
            by_params, by_controls = _coordinates_backward(
                place.source, by_coordinates, params, control_points, align_corners, source_grad[1]
            )
    curved = _is_curved(place.source, of_source, source_grad)
    if any(curved):
        first = grad_output, None, input, params, control_points, None
        _, by_coordinates = _SampleHvp.run(*first, *place.image, False, True)
        more = _curvature(
            place.source, by_coordinates, params, control_points, of_source, align_corners, curved
        )
        by_params, by_controls = _sum(by_params, more[0]), _sum(by_controls, more[1])
    return (
        by_input if input_grad else None,
        by_params if source_grad[0] else None,
        by_controls if source_grad[1] else None,
    )


class _SampleHvp(_Function):
    """Second derivatives in a direction. Its own derivatives are taken in plain PyTorch."""

    op = ops.sample_hvp

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rest, ctx.wanted = inputs[6:12], inputs[12:]
        ctx.save_for_backward(*inputs[:6])
        ctx.save_for_forward(*inputs[:6])
        ctx.mark_non_differentiable(*(t for t, want in zip(output, ctx.wanted, strict=True) if not want))
        ctx.set_materialize_grads(False)

    @staticmethod
    def plain(ctx: Any) -> Callable[..., tuple[Tensor | None, ...]]:
        source, in_shape, _, interpolation, padding, align_corners = ctx.rest
        modes = ops.named_modes(interpolation, padding, align_corners)

        def function(
            grad_output: Tensor,
            input: Tensor | None,
            tangent: Tensor | None,
            params: Tensor,
            control_points: Tensor | None,
            moved: Tensor | None,
        ) -> tuple[Tensor | None, ...]:
            return reference.sample_hvp(
                grad_output if ops.has_transforms(params, source) else grad_output.unsqueeze(1),
                input,
                tangent,
                params,
                control_points,
                moved,
                Source(source),
                in_shape[2:],
                *modes,
                *ctx.wanted,
            )

        return function

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        asked = tuple(c if want else None for c, want in zip(cotangents, ctx.wanted, strict=True))
        found: Sequence[Tensor | None] = [None] * 6
        if saved[0].numel() > 0:
            found = _vector_jacobian(_SampleHvp.plain(ctx), saved, ctx.needs_input_grad[:6], asked)
        return *found, *[None] * 8

    @staticmethod
    @_tracked
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = _primals(ctx)
        if saved[0].numel() == 0:
            nothing = ops.new_second_gradients(saved[0], saved[3], *ctx.rest[:3], *ctx.wanted)
            return tuple(t.zero_() if want else None for t, want in zip(nothing, ctx.wanted, strict=True))
        return tuple(_jacobian_vector(_SampleHvp.plain(ctx), saved, tangents[:6], ctx.wanted))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        arguments = "output", "image", "image", "params", "control", "coordinates"
        results = "image" if inputs[12] else None, "coordinates" if inputs[13] else None
        return _vmap(_SampleHvp, arguments, results, info, in_dims, inputs)


class _SampleJvp(_Function):
    op = ops.sample_jvp

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, tangent, params, control_points, moved, source, size, *modes = inputs
        image = tangent if input is None else input
        ctx.place = _Place(source, image.shape, ops.is_channels_last(image), size, tuple(modes))
        ctx.dtype = reference.compute_dtype(image, params)
        of_input, _, of_params, of_controls, of_moved = ctx.needs_input_grad[:5]
        of_places = (of_params or of_controls) and not ctx.place.steps
        ctx.save_for_backward(
            input if of_moved or of_places else None,
            tangent if of_places else None,
            params,
            control_points,
            moved if of_input or of_places else None,
        )
        ctx.save_for_forward(*inputs[:5])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        input, tangent, params, control_points, moved = ctx.saved_tensors
        of_input, of_tangent, of_params, of_controls, of_moved = ctx.needs_input_grad[:5]
        place = ctx.place
        found: list[Tensor | None] = [None] * 5
        if grad_output is None:
            return *found, *[None] * 5
        if of_tangent:
            first = grad_output, None, params, control_points, *place.image, True, False, False
            found[1] = _SampleBackward.run(*first)[0]
        if place.steps:
            return *found, *[None] * 5
        of_input, of_places = of_input and moved is not None, of_params or of_controls
        if of_input or of_places:
            found[0], by_coordinates = _SampleHvp.run(
                grad_output,
                input if of_places else None,
                tangent,
                params,
                control_points,
                moved,
                *place.image,
                of_input,
                of_places,
            )
            if of_places:
                found[2:4] = _coordinates_backward(
                    place.source, by_coordinates, params, control_points, place.modes[2], of_controls
                )
        if of_moved:
            first_order = grad_output, None, input, params, control_points, None
            found[4] = _SampleHvp.run(*first_order, *place.image, False, True)[1]
        needed = ctx.needs_input_grad[:5]
        return *(g if need else None for g, need in zip(found, needed, strict=True)), *[None] * 5

    @staticmethod
    @_tracked
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        input, tangent, params, control_points, moved = _primals(ctx)
        of_input, of_tangent, of_params, of_controls, of_moved = tangents[:5]
        place = ctx.place
        source = params, control_points
        shift = None
        if not place.steps:
            where = place.in_shape[0], place.size, place.modes[2], ctx.dtype
            shift = _moved(place.source, *source, (of_params, of_controls), *where)
        parts = []
        for image, of_image, by in (
            (of_input, of_tangent, moved),  # linear in the image and its tangent
            (tangent, None, shift),  # and in how the coordinates move
            (input, None, of_moved),
        ):
            by = None if image is None or place.steps else by
            if of_image is not None or by is not None:
                image = None if by is None else image
                rest = *source, by, place.source, place.size, *place.modes
                parts.append(_SampleJvp.run(image, of_image, *rest))
        if input is not None and moved is not None and shift is not None:
            parts.append(_twice_moved(input, params, control_points, moved, shift, place))
        total = parts[0] if parts else None
        for part in parts[1:]:
            total = _sum(total, part)
        return _zero_samples(tangent if input is None else input, *source, place) if total is None else total

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        arguments = "image", "image", "params", "control", "coordinates"
        return _vmap(_SampleJvp, arguments, ("output",), info, in_dims, inputs)


def _zero_samples(image: Tensor, params: Tensor, control_points: Tensor | None, place: _Place) -> Tensor:
    """What an image of zeros gives: mapped over where the image or the source is."""
    zeros = image.new_zeros(()).expand(image.shape)
    return _SampleJvp.run(None, zeros, params, control_points, None, place.source, place.size, *place.modes)


def _twice_moved(
    input: Tensor, params: Tensor, control_points: Tensor | None, one: Tensor, other: Tensor, place: _Place
) -> Tensor:
    """The samples' second derivative in two directions of the coordinates, each (N, T, *size, dims).

    By ``sample_hvp`` with each channel as an image of its own.
    """
    batch, channels, *in_size = input.shape
    transforms = one.shape[1]

    def for_channels(tensor: Tensor) -> Tensor:
        shape = batch, channels, *tensor.shape[1:]
        return tensor.expand(batch, *tensor.shape[1:]).unsqueeze(1).expand(shape).flatten(0, 1)

    several = (transforms,) if ops.has_transforms(params, place.source) else ()
    ones = input.new_ones(()).expand(batch * channels, *several, 1, *place.size)
    _, by_coordinates = _SampleHvp.run(
        ones,
        input.reshape(batch * channels, 1, *in_size),
        None,
        for_channels(params),
        control_points,
        for_channels(one),
        place.source,
        (batch * channels, 1, *in_size),
        False,
        *place.modes,
        False,
        True,
    )
    by_coordinates = by_coordinates.unflatten(0, (batch, channels)).movedim(1, 2)
    samples = (by_coordinates * other.unsqueeze(2)).sum(-1).to(input.dtype)
    return samples if several else samples.squeeze(1)


class _SampleBackward(_Function):
    op = ops.sample_backward

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad_output, input, params, control_points, source, in_shape, channels_last, *rest = inputs
        size = grad_output.shape[grad_output.dim() - len(in_shape) + 2 :]
        ctx.place = _Place(source, in_shape, channels_last, size, tuple(rest[:3]))
        ctx.wanted = wanted = rest[3:]
        ctx.dtype = reference.compute_dtype(grad_output, params)
        read = any(ctx.needs_input_grad[1:4]) and not ctx.place.steps
        ctx.save_for_backward(grad_output if read else None, input, params, control_points)
        ctx.save_for_forward(*inputs[:4])
        ctx.mark_non_differentiable(*(t for t, want in zip(output, wanted, strict=True) if not want))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        grad_output, input, params, control_points = ctx.saved_tensors
        tangents = [c if want else None for c, want in zip(cotangents, ctx.wanted, strict=True)]
        at = input, params, control_points, tangents, ctx.place
        by_output = _directional(*at, ctx.dtype) if ctx.needs_input_grad[0] else None
        return by_output, *_second(grad_output, *at, ctx.needs_input_grad[1:4]), *[None] * 9

    @staticmethod
    @_tracked
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, input, params, control_points = _primals(ctx)
        saved, of_output = (input, params, control_points), tangents[0]
        found: Sequence[Tensor | None]
        found = _second(grad_output, *saved, tangents[1:4], ctx.place, ctx.wanted)
        if of_output is None and any(want and f is None for f, want in zip(found, ctx.wanted, strict=True)):
            of_output = grad_output.new_zeros(()).expand(grad_output.shape)
        if of_output is not None:
            linear = _SampleBackward.run(of_output, *saved, *ctx.place.image, *ctx.wanted)
            found = [_sum(a, b) for a, b in zip(linear, found, strict=True)]
        return tuple(f if want else None for f, want in zip(found, ctx.wanted, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        kinds = "image", "params", "control"
        results = tuple(kind if want else None for kind, want in zip(kinds, inputs[10:], strict=True))
        return _vmap(_SampleBackward, ("output", *kinds), results, info, in_dims, inputs)


class _Sample(_Function):
    op = ops.sample
    in_pytorch = staticmethod(export.sample)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, params, control_points, ctx.source, ctx.size = inputs[:5]
        ctx.modes = inputs[5:]
        ctx.in_shape, ctx.channels_last = input.shape, ops.is_channels_last(input)
        _, of_params, of_controls = ctx.needs_input_grad[:3]
        read = (of_params or of_controls) and ctx.modes[0] != Interpolation.NEAREST
        ctx.save_for_backward(input if read else None, params, control_points)
        ctx.save_for_forward(*inputs[:3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 8
        wanted = ctx.needs_input_grad[:3]
        image = ctx.source, ctx.in_shape, ctx.channels_last, *ctx.modes
        found = _SampleBackward.run(grad_output, *ctx.saved_tensors, *image, *wanted)
        gradients = (g if want else None for g, want in zip(found, wanted, strict=True))
        return *gradients, None, None, None, None, None

    @staticmethod
    @_tracked
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        input, params, control_points = _primals(ctx)
        place = _Place(ctx.source, ctx.in_shape, ctx.channels_last, ctx.size, ctx.modes)
        dtype = reference.compute_dtype(input, params)
        derivative = _directional(input, params, control_points, tangents[:3], place, dtype)
        return _zero_samples(input, params, control_points, place) if derivative is None else derivative

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        arguments = "image", "params", "control"
        return _vmap(_Sample, arguments, ("output",), info, in_dims, inputs)


def sample(
    input: Tensor,
    params: Tensor,
    source: Source,
    size: Any,
    interpolation: Interpolation,
    padding: Padding,
    align_corners: bool,
    control_points: Tensor | None = None,
) -> Tensor:
    """(N, C, *size), or (N, T, C, *size) for params (N or 1, T, ...). Arguments are taken as valid."""
    codes = int(interpolation), int(padding), align_corners
    if not (type(input) is type(params) is Tensor and type(control_points) in PLAIN):
        input, params, control_points = _admitted(input, params, control_points)
    return _Sample.run(input, params, control_points, int(source), size, *codes)


# ------------------------------------------------------------------------------------ grid's Functions
class _GridBackward(_Function):
    op = ops.grid_backward

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad_grid, params, control_points, ctx.source, ctx.align_corners, ctx.control_grad = inputs
        ctx.shape, ctx.dtype = grad_grid.shape, grad_grid.dtype
        ctx.save_for_backward(grad_grid if any(ctx.needs_input_grad[1:3]) else None, params, control_points)
        ctx.save_for_forward(*inputs[:3])
        if not ctx.control_grad:
            ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        grad_grid, *source = ctx.saved_tensors
        tangents = cotangents[0], cotangents[1] if ctx.control_grad else None
        by_grid = None
        if ctx.needs_input_grad[0]:
            by_grid = _grid_moved(ctx, source, tangents, ctx.shape, ctx.dtype)
        found = _grid_curvature(ctx, grad_grid, source, tangents, ctx.needs_input_grad[1:3])
        return by_grid, *found, None, None, None

    @staticmethod
    @_tracked
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        grad_grid, *source = _primals(ctx)
        of_grid, *of_source = tangents[:3]
        by_params, by_controls = _grid_curvature(ctx, grad_grid, source, of_source, (True, ctx.control_grad))
        if of_grid is None and (by_params is None or by_controls is None):
            of_grid = torch.zeros_like(grad_grid)
        if of_grid is not None:
            rest = ctx.source, ctx.align_corners, ctx.control_grad
            linear = _GridBackward.run(of_grid, *source, *rest)
            by_params, by_controls = _sum(linear[0], by_params), _sum(linear[1], by_controls)
        return by_params, by_controls if ctx.control_grad else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        results = "params", "control" if inputs[5] else None
        return _vmap(_GridBackward, ("grid", "params", "control"), results, info, in_dims, inputs)


def _grid_moved(
    ctx: Any, source: _Tensors, tangents: _Tensors, shape: Any, dtype: torch.dtype
) -> Tensor | None:
    """How a grid of this shape and dtype moves with (params, control_points)."""
    params, control_points = source
    assert params is not None
    compute = reference.compute_dtype(params)
    where = shape[0], shape[1:-1], ctx.align_corners, compute
    moved = _moved(ctx.source, params, control_points, tangents, *where)
    return None if moved is None else moved.squeeze(1).to(dtype)


def _grid_curvature(
    ctx: Any, grad_grid: Tensor | None, source: _Tensors, tangents: _Tensors, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The derivatives of ``_GridBackward``'s results by the source, in a direction; None for 0."""
    params, control_points = source
    curved = _is_curved(ctx.source, tangents, wanted)
    if grad_grid is None or params is None or not any(curved):
        return [None, None]
    by_coordinates = grad_grid.to(reference.compute_dtype(params)).unsqueeze(1)
    found = ctx.source, by_coordinates, params, control_points, tangents, ctx.align_corners, curved
    return _curvature(*found)


class _Grid(_Function):
    op = ops.grid
    in_pytorch = staticmethod(export.grid)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        params, control_points, ctx.source, _, ctx.align_corners = inputs
        ctx.shape, ctx.dtype = output.shape, output.dtype
        ctx.save_for_backward(params, control_points)
        ctx.save_for_forward(params, control_points)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_grid: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_grid is None:
            return (None,) * 5
        params_grad, control_grad = ctx.needs_input_grad[:2]
        rest = ctx.source, ctx.align_corners, control_grad
        by_params, by_controls = _GridBackward.run(grad_grid, *ctx.saved_tensors, *rest)
        return by_params if params_grad else None, by_controls if control_grad else None, None, None, None

    @staticmethod
    @_tracked
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        return _grid_moved(ctx, _primals(ctx), tangents[:2], ctx.shape, ctx.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return _vmap(_Grid, ("params", "control"), ("grid",), info, in_dims, inputs)


def grid(
    params: Tensor, source: Source, size: Any, align_corners: bool, control_points: Tensor | None = None
) -> Tensor:
    """The normalised coordinates of a source, (N, *size, dims) in the dtype of ``params``."""
    if not (type(params) is Tensor and type(control_points) in PLAIN):
        params, control_points = _admitted(params, control_points)
    return _Grid.run(params, control_points, int(source), size, align_corners)
