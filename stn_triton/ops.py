"""The registered operators: the only file that touches ``torch.library``.

Seven operators serve every transform; ``source`` (a ``kernels.modes.Source``) says what ``params`` is, so
that a new coordinate source adds no operator:

* ``stn_triton::sample``, its transposed derivative ``stn_triton::sample_backward``, its derivative in a
  direction ``stn_triton::sample_jvp`` and its second derivative in a direction ``stn_triton::sample_hvp``,
* ``stn_triton::sample_as``, samples with a fill, and in another dtype,
* ``stn_triton::grid`` and its transposed derivative ``stn_triton::grid_backward``.

``params`` is a grid, theta, a homography, a spline's coefficients or a flow; ``control_points`` are the
spline's, else None. In what an operator returns an empty tensor stands for a gradient not asked for.

``padding`` is one code for all axes, or of one for each (``kernels.modes.padding_code``).

The arguments of each are a named tuple. Its fields are the operator's schema; its fake (``allocate``) and its
implementation take the tuple. There is one implementation for all devices, which goes to the kernels or to
``reference`` (see ``backend``). ``autograd`` makes the operators differentiable.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend, kernels, reference
from .calls import PLAIN, exports_onnx, plain
from .kernels.modes import Interpolation, Source

__all__ = ["grid", "grid_backward", "sample", "sample_as", "sample_backward", "sample_hvp", "sample_jvp"]

_LIBRARY = torch.library.Library("stn_triton", "DEF")
# The kernels honour strides, and a result's memory format follows them: they must not be changed on the way.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
_SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    bool: "bool",
    Sequence[int]: "SymInt[]",
    torch.dtype: "ScalarType",
}


def _operator(allocate: Callable[[Any], Any]) -> Callable[[Callable[[Any], Any]], Any]:
    """Decorates the implementation ``name(a: Arguments)``: it becomes the operator ``stn_triton::name``.

    ``allocate(a)`` makes its results without computing them. Tensors come first in ``Arguments``.
    """

    def register(implementation: Callable[[Any], Any]) -> Any:
        name = implementation.__name__
        hints = typing.get_type_hints(implementation)
        arguments, result = hints["a"], hints["return"]
        fields = typing.get_type_hints(arguments)
        tensors = sum(kind in (Tensor, Tensor | None) for kind in fields.values())
        given = ", ".join(f"{_SCHEMA[kind]} {field}" for field, kind in fields.items())
        returned = ", ".join(_SCHEMA[kind] for kind in typing.get_args(result) or (result,))
        make = arguments._make

        def run(*values: Any) -> Any:
            if not PLAIN.issuperset(map(type, values[:tensors])):
                values = *map(plain, values[:tensors]), *values[tensors:]
            return implementation(make(values))

        def fake(*values: Any) -> Any:
            a = make(values)
            if exports_onnx():
                refuse_averages(getattr(a, "interpolation", None))
            return allocate(a)

        _LIBRARY.define(f"{name}({given}) -> ({returned})", tags=_TAGS)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"stn_triton::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.stn_triton, name).default

    return register


def differentiate(operator: Any, derived: Callable[..., Any]) -> None:
    """Has ``derived`` called for an operator wherever derivatives, or other function transforms, are made."""
    name = operator.name().partition(".")[0]
    for key in ("Autograd", "FuncTorchDynamicLayerFrontMode"):  # the second: all function transforms
        _LIBRARY.impl(name, derived, key)


def refuse_averages(interpolation: int | None) -> None:
    """For what is to become PyTorch's own operators.

    ``export`` asks for who takes a call elsewhere or decomposes it, the fakes ask for ONNX: where
    ``torch.onnx.export`` fails to trace a model it tries Dynamo, which ``exports_onnx`` does not see.
    """
    if interpolation == Interpolation.AVERAGED:
        raise NotImplementedError(
            "antialias=True cannot be exported to PyTorch's operators (torch.jit.trace, ONNX): how many "
            "samples are averaged depends on the values of the map"
        )


def named_modes(interpolation: int, padding: int, align_corners: bool) -> tuple[Interpolation, int, bool]:
    """The modes of an operator's codes, for ``reference``."""
    return Interpolation(interpolation), padding, align_corners


# ----------------------------------------------------------------------------------------- allocation
def is_channels_last(image: Tensor) -> bool:
    """Whether an image's channels lie innermost: what is made from it then is channels_last too."""
    channels, stride = image.shape[1], image.stride()
    return channels > 1 and stride[1] == 1 and all(step >= channels for step in stride[2:])


def _new_images(
    like: Tensor, shape: tuple[Any, ...], channels_last: bool, dtype: torch.dtype | None = None
) -> Tensor:
    dtype = dtype or like.dtype
    if not channels_last:
        return like.new_empty(shape, dtype=dtype)
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


def has_transforms(params: Tensor, source: int) -> bool:
    return params.dim() == 4 and source not in (Source.GRID, Source.FLOW)


def _new_output(
    input: Tensor, params: Tensor, source: int, size: Any, dtype: torch.dtype | None = None
) -> Tensor:
    """(N, C, *size), or (N, T, C, *size) where params has transforms; a grid makes contiguous images.

    In ``dtype``, by default the input's, and float32 where that is an integer.
    """
    if dtype is None and not input.is_floating_point():
        dtype = reference.sample_dtype(input)
    channels_last = source != Source.GRID and is_channels_last(input)
    batch, channels, *_ = input.shape
    if has_transforms(params, source):
        transforms = params.shape[1]
        output = _new_images(input, (batch * transforms, channels, *size), channels_last, dtype)
        return output.view(batch, transforms, *output.shape[1:])
    return _new_images(input, (batch, channels, *size), channels_last, dtype)


def _new_coordinates(grad_output: Tensor, params: Tensor, source: int, dims: int) -> Tensor:
    """(N, T, *size, dims) in the compute type, T = 1 where there are no transforms."""
    transforms = params.shape[1] if has_transforms(params, source) else 1
    shape = grad_output.shape[0], transforms, *grad_output.shape[grad_output.dim() - dims :], dims
    return grad_output.new_empty(shape, dtype=reference.compute_dtype(grad_output, params))


def _packed(tensor: Tensor) -> Tensor:
    """Contiguous with the strides a new tensor has, those of axes of one element included."""
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != step:
            return tensor.new_empty(tensor.shape).copy_(tensor)
        step *= max(size, 1)
    return tensor


def _new_image_gradient(grad_output: Tensor, in_shape: Any, channels_last: bool, input_grad: bool) -> Tensor:
    """Its batch and channels are those of ``grad_output``: a shard's, where ``in_shape`` is that of all."""
    if not input_grad:
        return grad_output.new_empty(0)
    shape = grad_output.shape[0], grad_output.shape[1 - len(in_shape)], *in_shape[2:]
    return _new_images(grad_output, shape, channels_last)


def _new_control_gradient(params: Tensor, control_points: Tensor | None, control_grad: bool) -> Tensor:
    if control_points is None or not control_grad:
        return params.new_empty(0)
    return control_points.new_empty(control_points.shape)


def _result(found: Tensor | None, of: Tensor | None, like: Tensor) -> Tensor:
    """A gradient as an operator returns it: 0 where nothing was found, empty where it is of nothing."""
    if of is None:
        return like.new_empty(0)
    return of.new_zeros(of.shape) if found is None else _packed(found)


def _by_transform(grad_output: Tensor, params: Tensor, source: int) -> Tensor:
    """``grad_output`` as (N, T, C, *size)."""
    return grad_output if has_transforms(params, source) else grad_output.unsqueeze(1)


# --------------------------------------------------------------------------------------------- sample
class Sample(NamedTuple):
    """Of an image (N, C, *in_size), the samples (N, [T,] C, *size)."""

    input: Tensor
    params: Tensor
    control_points: Tensor | None
    source: int
    size: Sequence[int]
    interpolation: int
    padding: int
    align_corners: bool


def _new_samples(a: Sample) -> Tensor:
    return _new_output(a.input, a.params, a.source, a.size)


@_operator(_new_samples)
def sample(a: Sample) -> Tensor:
    output = _new_samples(a)
    return output if output.numel() == 0 else _sample_into(output, a.input, a)


def _sample_into(
    output: Tensor, image: Tensor, a: Sample | SampleAs | SampleJvp, fill: Tensor | None = None
) -> Tensor:
    modes = a.interpolation, a.padding, a.align_corners
    if backend.select(image.device.type).name == "torch":
        place = Source(a.source), tuple(a.size), *named_modes(*modes)
        with backend.without_autocast(image.device.type):
            samples = reference.sample_as(image, a.params, a.control_points, fill, *place, dtype=output.dtype)
        return output.copy_(samples.view(output.shape))
    kernels.dispatch.sample_forward(image, a.params, a.control_points, output, a.source, *modes, fill)
    return output


class SampleAs(NamedTuple):
    """Samples with a fill, (N, C), in place of what lies outside the image, and in ``dtype``.

    The fill goes by taps with zeros padding, of some axes or all, and by centres with border padding. For
    derivatives see ``autograd.filling``.
    """

    input: Tensor
    params: Tensor
    control_points: Tensor | None
    fill: Tensor | None
    source: int
    size: Sequence[int]
    interpolation: int
    padding: int
    align_corners: bool
    dtype: torch.dtype


def _new_samples_as(a: SampleAs) -> Tensor:
    return _new_output(a.input, a.params, a.source, a.size, a.dtype)


@_operator(_new_samples_as)
def sample_as(a: SampleAs) -> Tensor:
    output = _new_samples_as(a)
    if output.numel() == 0:
        return output
    fill = None if a.fill is None else a.fill.to(reference.compute_dtype(a.input, a.params))
    return _sample_into(output, a.input, a, fill)


class SampleBackward(NamedTuple):
    """Of d samples, d input (channels_last if asked for), d params and d control points.

    The input is needed for the latter two.
    """

    grad_output: Tensor
    input: Tensor | None
    params: Tensor
    control_points: Tensor | None
    source: int
    in_shape: Sequence[int]
    channels_last: bool
    interpolation: int
    padding: int
    align_corners: bool
    input_grad: bool
    params_grad: bool
    control_grad: bool


def _new_gradients(a: SampleBackward) -> tuple[Tensor, Tensor, Tensor]:
    """d input in the input's memory format, d params and d control points contiguous."""
    return (
        _new_image_gradient(a.grad_output, a.in_shape, a.channels_last, a.input_grad),
        a.params.new_empty(a.params.shape if a.params_grad else 0),
        _new_control_gradient(a.params, a.control_points, a.control_grad),
    )


@_operator(_new_gradients)
def sample_backward(a: SampleBackward) -> tuple[Tensor, Tensor, Tensor]:
    if a.grad_output.numel() == 0:
        empty = _new_gradients(a)
        return empty[0].zero_(), empty[1].zero_(), empty[2].zero_()
    grad_input = _new_image_gradient(a.grad_output, a.in_shape, a.channels_last, a.input_grad)
    slopes = a.interpolation != Interpolation.NEAREST  # else steps
    wanted = a.params_grad and slopes, a.control_grad and slopes
    modes = a.interpolation, a.padding, a.align_corners
    by_params: Tensor | None = None
    by_controls: Tensor | None = None
    if not (a.input_grad or any(wanted)):
        pass
    elif backend.select(a.grad_output.device.type).name == "torch":
        with backend.without_autocast(a.grad_output.device.type):
            g = _by_transform(a.grad_output, a.params, a.source)
            place = Source(a.source), a.in_shape[2:], *named_modes(*modes)
            by_input, by_params, by_controls = reference.sample_backward(
                g, a.input, a.params, a.control_points, *place, a.input_grad, *wanted
            )
        if by_input is not None:
            grad_input.copy_(by_input)
    else:
        tensors = a.grad_output, a.input, a.params, a.control_points, grad_input if a.input_grad else None
        repeatable = torch.are_deterministic_algorithms_enabled()
        by_params, by_controls = kernels.dispatch.sample_backward(
            *tensors, a.source, *modes, *wanted, repeatable
        )
    return (
        grad_input,
        _result(by_params, a.params if a.params_grad else None, a.params),
        _result(by_controls, a.control_points if a.control_grad else None, a.params),
    )


# --------------------------------------------------------------------------- derivatives in a direction
class SampleJvp(NamedTuple):
    """The derivative of the samples in the direction of an image and of coordinates, or of either.

    The input is needed for the coordinates' direction alone.
    """

    input: Tensor | None
    tangent: Tensor | None
    params: Tensor
    control_points: Tensor | None
    coord_tangent: Tensor | None
    source: int
    size: Sequence[int]
    interpolation: int
    padding: int
    align_corners: bool


def _new_derivative(a: SampleJvp) -> Tensor:
    image = a.tangent if a.input is None else a.input
    assert image is not None, "neither an image nor its tangent"
    return _new_output(image, a.params, a.source, a.size)


@_operator(_new_derivative)
def sample_jvp(a: SampleJvp) -> Tensor:
    output = _new_derivative(a)
    coord_tangent = None if a.interpolation == Interpolation.NEAREST else a.coord_tangent
    if output.numel() == 0 or (coord_tangent is None and a.tangent is None):
        return output.zero_()
    if coord_tangent is None:  # samples are linear in the image
        assert a.tangent is not None
        return _sample_into(output, a.tangent, a)
    tensors = a.input, a.tangent, a.params, a.control_points, coord_tangent
    modes = a.interpolation, a.padding, a.align_corners
    if backend.select(output.device.type).name == "torch":
        with backend.without_autocast(output.device.type):
            samples = reference.sample_jvp(*tensors, Source(a.source), tuple(a.size), *named_modes(*modes))
        return output.copy_(samples.view(output.shape))
    kernels.dispatch.sample_jvp(*tensors, output, a.source, *modes)
    return output


class SampleHvp(NamedTuple):
    """The Hessian of <grad_output, samples> by image and coordinates, times a direction of each."""

    grad_output: Tensor
    input: Tensor | None
    tangent: Tensor | None
    params: Tensor
    control_points: Tensor | None
    coord_tangent: Tensor | None
    source: int
    in_shape: Sequence[int]
    channels_last: bool
    interpolation: int
    padding: int
    align_corners: bool
    input_grad: bool
    coordinates_grad: bool


def new_second_gradients(
    grad_output: Tensor,
    params: Tensor,
    source: int,
    in_shape: Any,
    channels_last: bool,
    input_grad: bool,
    coordinates_grad: bool,
) -> tuple[Tensor, Tensor]:
    grad_input = _new_image_gradient(grad_output, in_shape, channels_last, input_grad)
    if coordinates_grad:
        return grad_input, _new_coordinates(grad_output, params, source, len(in_shape) - 2)
    return grad_input, grad_output.new_empty(0)


def _new_second_gradients(a: SampleHvp) -> tuple[Tensor, Tensor]:
    wanted = a.input_grad, a.coordinates_grad
    return new_second_gradients(a.grad_output, a.params, a.source, a.in_shape, a.channels_last, *wanted)


@_operator(_new_second_gradients)
def sample_hvp(a: SampleHvp) -> tuple[Tensor, Tensor]:
    grad_input, by_coordinates = _new_second_gradients(a)
    if a.grad_output.numel() == 0 or a.interpolation == Interpolation.NEAREST:
        return grad_input.zero_(), by_coordinates.zero_()
    tensors = a.input, a.tangent, a.params, a.control_points, a.coord_tangent
    modes = a.interpolation, a.padding, a.align_corners
    if backend.select(a.grad_output.device.type).name == "torch":
        with backend.without_autocast(a.grad_output.device.type):
            g = _by_transform(a.grad_output, a.params, a.source)
            place = Source(a.source), a.in_shape[2:], *named_modes(*modes)
            image, places = reference.sample_hvp(g, *tensors, *place, a.input_grad, a.coordinates_grad)
        if image is not None:
            grad_input.copy_(image)
    else:
        target = grad_input if a.input_grad else None
        wanted = a.coordinates_grad, torch.are_deterministic_algorithms_enabled()
        places = kernels.dispatch.sample_double_backward(
            a.grad_output, *tensors, target, a.source, *modes, *wanted
        )
    return grad_input, by_coordinates if places is None else _packed(places)


# ----------------------------------------------------------------------------------------------- grid
class Grid(NamedTuple):
    """The coordinates (N, *size, dims) that a matrix or a spline makes."""

    params: Tensor
    control_points: Tensor | None
    source: int
    size: Sequence[int]
    align_corners: bool


def _new_grid(a: Grid) -> Tensor:
    return a.params.new_empty((a.params.shape[0], *a.size, len(a.size)))


@_operator(_new_grid)
def grid(a: Grid) -> Tensor:
    output = _new_grid(a)
    if output.numel() == 0:
        return output
    if backend.select(a.params.device.type).name == "torch":
        place = Source(a.source), a.params, a.control_points, tuple(a.size), a.align_corners
        with backend.without_autocast(a.params.device.type):
            coordinates = reference.coordinates(*place, reference.compute_dtype(a.params))
        return output.copy_(coordinates.squeeze(1))
    kernels.dispatch.grid_forward(a.params, a.control_points, output, a.source, a.align_corners)
    return output


class GridBackward(NamedTuple):
    """Of d coordinates, d params and d control points."""

    grad_grid: Tensor
    params: Tensor
    control_points: Tensor | None
    source: int
    align_corners: bool
    control_grad: bool


def _new_grid_gradients(a: GridBackward) -> tuple[Tensor, Tensor]:
    by_controls = _new_control_gradient(a.params, a.control_points, a.control_grad)
    return a.params.new_empty(a.params.shape), by_controls


@_operator(_new_grid_gradients)
def grid_backward(a: GridBackward) -> tuple[Tensor, Tensor]:
    if a.grad_grid.numel() == 0:
        by_params, by_controls = _new_grid_gradients(a)
        return by_params.zero_(), by_controls.zero_()
    params = a.params, a.control_points
    if backend.select(a.params.device.type).name == "torch":
        by_transform = a.grad_grid.unsqueeze(1).to(reference.compute_dtype(a.params))
        with backend.without_autocast(a.params.device.type):
            found = reference.coordinates_backward(
                Source(a.source), by_transform, *params, a.align_corners, a.control_grad
            )
    else:
        wanted = a.source, a.align_corners, a.control_grad
        found = kernels.dispatch.grid_backward(a.grad_grid, *params, *wanted)
    return _packed(found[0]), a.params.new_empty(0) if found[1] is None else _packed(found[1])
