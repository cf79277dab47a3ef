"""Samples: their Functions, and what second derivatives are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import export, ops, reference
from ..kernels.modes import Interpolation, Source
from .coordinates import coord_backward, coord_curvature, coord_tangent_of, is_curved
from .function import (
    Function,
    Tensors,
    added,
    jacobian_vector,
    primals,
    tracks_tangents,
    unwanted,
    vector_jacobian,
)
from .vmap import fold_samples


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
    def averages(self) -> bool:
        """Whether samples are averages. Those of a matrix are no function of the pixels' coordinates alone:
        what is not a first derivative is taken in plain PyTorch."""
        return self.modes[0] == Interpolation.AVERAGED

    def sample(self, input: Tensor, params: Tensor) -> tuple[Tensor]:
        """The averages, in plain PyTorch."""
        found = reference.sample_averages(
            input, params, Source(self.source), tuple(self.size), *self.modes[1:]
        )
        return (found if ops.has_transforms(params, self.source) else found.squeeze(1),)

    @property
    def image(self) -> tuple[Any, ...]:
        return self.source, self.in_shape, self.channels_last, *self.modes


def _directional(
    input: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    tangents: Tensors,
    place: _Place,
    dtype: torch.dtype,
) -> Tensor | None:
    """The samples' derivative in the direction of (input, params, control_points)'s tangents; None for 0."""
    of_input, *of_source = tangents
    if place.averages:
        return _averages_along(input, params, tangents, place)
    coord_tangent = None
    if not place.steps:
        batch, align_corners = place.in_shape[0], place.modes[2]
        coord_tangent = coord_tangent_of(
            place.source, params, control_points, of_source, batch, place.size, align_corners, dtype
        )
    if coord_tangent is None and of_input is None:
        return None
    return _SampleJvp.run(
        None if coord_tangent is None else input,
        of_input,
        params,
        control_points,
        coord_tangent,
        place.source,
        place.size,
        *place.modes,
    )


def _second(
    grad_output: Tensor | None,
    input: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    tangents: Tensors,
    place: _Place,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The derivatives of d input, d params and d control points in a direction; None for 0."""
    of_input, *of_source = tangents
    input_grad, *source_grad = wanted
    if place.steps or grad_output is None:
        return None, None, None
    if place.averages:
        return _second_of_averages(grad_output, input, params, tangents, place, wanted)
    dtype, align_corners = reference.compute_dtype(grad_output, params), place.modes[2]
    batch = place.in_shape[0]
    coord_tangent = coord_tangent_of(
        place.source, params, control_points, of_source, batch, place.size, align_corners, dtype
    )
    input_grad = input_grad and coord_tangent is not None
    coordinates_grad = any(source_grad) and (of_input is not None or coord_tangent is not None)
    by_input, by_params, by_controls = None, None, None
    if input_grad or coordinates_grad:
        by_input, by_coordinates = _SampleHvp.run(
            grad_output,
            input if coordinates_grad and coord_tangent is not None else None,
            of_input if coordinates_grad else None,
            params,
            control_points,
            coord_tangent,
            *place.image,
            input_grad,
            coordinates_grad,
        )
        if coordinates_grad:
            by_params, by_controls = coord_backward(
                place.source, by_coordinates, params, control_points, align_corners, source_grad[1]
            )
    curved = is_curved(place.source, of_source, source_grad)
    if any(curved):
        first = grad_output, None, input, params, control_points, None
        _, by_coordinates = _SampleHvp.run(*first, *place.image, False, True)
        more = coord_curvature(
            place.source, by_coordinates, params, control_points, of_source, align_corners, curved
        )
        by_params, by_controls = added(by_params, more[0]), added(by_controls, more[1])
    return (
        by_input if input_grad else None,
        by_params if source_grad[0] else None,
        by_controls if source_grad[1] else None,
    )


def _averages_along(input: Tensor | None, params: Tensor, tangents: Tensors, place: _Place) -> Tensor | None:
    """``_directional`` of averages, which are linear in the image."""
    of_input, of_params, _ = tangents
    found = None
    if of_input is not None:
        found = _Sample.run(of_input, params, None, place.source, place.size, *place.modes)
    if of_params is not None:
        (more,) = jacobian_vector(place.sample, (input, params), (None, of_params), (True,))
        found = added(found, more)
    return found


def _second_of_averages(
    grad_output: Tensor,
    input: Tensor | None,
    params: Tensor,
    tangents: Tensors,
    place: _Place,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, None]:
    """``_second`` of averages: the derivative of <grad_output, averages along the direction>."""
    image = grad_output.new_zeros(()).expand(place.in_shape) if input is None else input
    of_image, of_params, _ = tangents
    if of_image is None and of_params is None:
        return None, None, None
    # linear in the image: that of the parameters alone makes d image, and none is made without
    needed = wanted[0] and of_params is not None, wanted[1]

    def along(image: Tensor, params: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(jacobian_vector(place.sample, (image, params), (of_image, of_params), (True,)))

    by_image, by_params = vector_jacobian(along, (image, params), needed, (grad_output,))
    return by_image, by_params, None


class _SampleHvp(Function):
    """Second derivatives in a direction. Its own derivatives are taken in plain PyTorch."""

    op = ops.sample_hvp

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rest, ctx.wanted = inputs[6:12], inputs[12:]
        ctx.save_for_backward(*inputs[:6])
        ctx.mark_non_differentiable(*unwanted(output, ctx.wanted))
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
            coord_tangent: Tensor | None,
        ) -> tuple[Tensor | None, ...]:
            return reference.sample_hvp(
                grad_output if ops.has_transforms(params, source) else grad_output.unsqueeze(1),
                input,
                tangent,
                params,
                control_points,
                coord_tangent,
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
            found = vector_jacobian(_SampleHvp.plain(ctx), saved, ctx.needs_input_grad[:6], asked)
        return *found, *[None] * 8

    @staticmethod
    @tracks_tangents
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = primals(ctx)
        if saved[0].numel() == 0:
            nothing = ops.new_second_gradients(saved[0], saved[3], *ctx.rest[:3], *ctx.wanted)
            return tuple(t.zero_() if want else None for t, want in zip(nothing, ctx.wanted, strict=True))
        return tuple(jacobian_vector(_SampleHvp.plain(ctx), saved, tangents[:6], ctx.wanted))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        arguments = "output", "image", "image", "params", "control", "coordinates"
        results = "image" if inputs[12] else None, "coordinates" if inputs[13] else None
        return fold_samples(_SampleHvp, arguments, results, info, in_dims, inputs)


class _SampleJvp(Function):
    op = ops.sample_jvp

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, tangent, params, control_points, coord_tangent, source, size, *modes = inputs
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
            coord_tangent if of_input or of_places else None,
        )
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        input, tangent, params, control_points, coord_tangent = ctx.saved_tensors
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
        of_input, of_places = of_input and coord_tangent is not None, of_params or of_controls
        if of_input or of_places:
            found[0], by_coordinates = _SampleHvp.run(
                grad_output,
                input if of_places else None,
                tangent,
                params,
                control_points,
                coord_tangent,
                *place.image,
                of_input,
                of_places,
            )
            if of_places:
                found[2:4] = coord_backward(
                    place.source, by_coordinates, params, control_points, place.modes[2], of_controls
                )
        if of_moved:
            first_order = grad_output, None, input, params, control_points, None
            found[4] = _SampleHvp.run(*first_order, *place.image, False, True)[1]
        needed = ctx.needs_input_grad[:5]
        return *(g if need else None for g, need in zip(found, needed, strict=True)), *[None] * 5

    @staticmethod
    @tracks_tangents
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        input, tangent, params, control_points, coord_tangent = primals(ctx)
        of_input, of_tangent, of_params, of_controls, of_moved = tangents[:5]
        place = ctx.place
        source = params, control_points
        shift = None
        if not place.steps:
            where = place.in_shape[0], place.size, place.modes[2], ctx.dtype
            shift = coord_tangent_of(place.source, *source, (of_params, of_controls), *where)
        parts = []
        for image, of_image, by in (
            (of_input, of_tangent, coord_tangent),  # linear in the image and its tangent
            (tangent, None, shift),  # and in how the coordinates move
            (input, None, of_moved),
        ):
            by = None if image is None or place.steps else by
            if of_image is not None or by is not None:
                image = None if by is None else image
                rest = *source, by, place.source, place.size, *place.modes
                parts.append(_SampleJvp.run(image, of_image, *rest))
        if input is not None and coord_tangent is not None and shift is not None:
            parts.append(_twice_along(input, params, control_points, coord_tangent, shift, place))
        total = parts[0] if parts else None
        for part in parts[1:]:
            total = added(total, part)
        return _zero_samples(tangent if input is None else input, *source, place) if total is None else total

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        arguments = "image", "image", "params", "control", "coordinates"
        return fold_samples(_SampleJvp, arguments, ("output",), info, in_dims, inputs)


def _zero_samples(image: Tensor, params: Tensor, control_points: Tensor | None, place: _Place) -> Tensor:
    """What an image of zeros gives: mapped over where the image or the source is."""
    zeros = image.new_zeros(()).expand(image.shape)
    if place.averages:
        return _Sample.run(zeros, params, control_points, place.source, place.size, *place.modes)
    return _SampleJvp.run(None, zeros, params, control_points, None, place.source, place.size, *place.modes)


def _twice_along(
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
    dtype = reference.sample_dtype(input)
    ones = input.new_ones((), dtype=dtype).expand(batch * channels, *several, 1, *place.size)
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
    samples = (by_coordinates * other.unsqueeze(2)).sum(-1).to(dtype)
    return samples if several else samples.squeeze(1)


class _SampleBackward(Function):
    op = ops.sample_backward

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad_output, input, params, control_points, source, in_shape, channels_last, *rest = inputs
        size = grad_output.shape[grad_output.dim() - len(in_shape) + 2 :]
        ctx.place = _Place(source, in_shape, channels_last, size, tuple(rest[:3]))
        ctx.wanted = rest[3:]
        ctx.dtype = reference.compute_dtype(grad_output, params)
        read = any(ctx.needs_input_grad[1:4]) and not ctx.place.steps
        ctx.save_for_backward(grad_output if read else None, input, params, control_points)
        ctx.mark_non_differentiable(*unwanted(output, ctx.wanted))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        grad_output, input, params, control_points = ctx.saved_tensors
        tangents = [c if want else None for c, want in zip(cotangents, ctx.wanted, strict=True)]
        at = input, params, control_points, tangents, ctx.place
        by_output = _directional(*at, ctx.dtype) if ctx.needs_input_grad[0] else None
        return by_output, *_second(grad_output, *at, ctx.needs_input_grad[1:4]), *[None] * 9

    @staticmethod
    @tracks_tangents
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, input, params, control_points = primals(ctx)
        saved, of_output = (input, params, control_points), tangents[0]
        found: Sequence[Tensor | None]
        found = _second(grad_output, *saved, tangents[1:4], ctx.place, ctx.wanted)
        if of_output is None and any(want and f is None for f, want in zip(found, ctx.wanted, strict=True)):
            of_output = grad_output.new_zeros(()).expand(grad_output.shape)
        if of_output is not None:
            linear = _SampleBackward.run(of_output, *saved, *ctx.place.image, *ctx.wanted)
            found = [added(a, b) for a, b in zip(linear, found, strict=True)]
        return tuple(f if want else None for f, want in zip(found, ctx.wanted, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        kinds = "image", "params", "control"
        results = tuple(kind if want else None for kind, want in zip(kinds, inputs[10:], strict=True))
        return fold_samples(_SampleBackward, ("output", *kinds), results, info, in_dims, inputs)


class _Sample(Function):
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
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 8
        of_input, of_params, of_controls = wanted = ctx.needs_input_grad[:3]
        image = ctx.source, ctx.in_shape, ctx.channels_last, *ctx.modes
        found = _SampleBackward.run(grad_output, *ctx.saved_tensors, *image, *wanted)
        by_input, by_params = found[0] if of_input else None, found[1] if of_params else None
        return by_input, by_params, found[2] if of_controls else None, None, None, None, None, None

    @staticmethod
    @tracks_tangents
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        input, params, control_points = primals(ctx)
        place = _Place(ctx.source, ctx.in_shape, ctx.channels_last, ctx.size, ctx.modes)
        dtype = reference.compute_dtype(input, params)
        derivative = _directional(input, params, control_points, tangents[:3], place, dtype)
        return _zero_samples(input, params, control_points, place) if derivative is None else derivative

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        arguments = "image", "params", "control"
        return fold_samples(_Sample, arguments, ("output",), info, in_dims, inputs)


sample = _Sample.run
"""(N, C, *size), or (N, T, C, *size) for params (N or 1, T, ...). The arguments are the operator's, valid."""
