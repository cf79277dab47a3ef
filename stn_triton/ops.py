"""The registered operators: the only file that touches ``torch.library``.

Seven operators serve every transform; ``source`` (a ``kernels.modes.Source``) says what ``params`` is, so
that a new coordinate source adds no operator:

* ``stn_triton::sample``, its transposed derivative ``stn_triton::sample_backward``, its derivative in a
  direction ``stn_triton::sample_jvp`` and its second derivative in a direction ``stn_triton::sample_hvp``,
* ``stn_triton::sample_as``, samples with a fill, and in another dtype,
* ``stn_triton::grid`` and its transposed derivative ``stn_triton::grid_backward``.

``params`` is a grid, theta, a homography, a spline's coefficients or a flow. ``control_points`` are
those of a spline; for other sources they are None. An operator returns an empty tensor in place of a gradient
that was not asked for.

``padding`` is one code for all axes, or of one for each (``kernels.modes.padding_code``).

The parameters of each implementation are the operator's schema; its fake (``allocate``) takes them by name.
There is one implementation for all devices, which goes to the kernels or to ``reference`` (see ``backend``).
``autograd`` makes the operators differentiable, and calls the implementations themselves where nobody would
see the operator: what a user registers for one is called by compiled code, not by plain eager code.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend, kernels, reference
from .calls import PLAIN, exports_onnx, plain
from .kernels.modes import Interpolation, Source
from .transforms import splines

__all__ = ["grid", "grid_backward", "sample", "sample_as", "sample_backward", "sample_hvp", "sample_jvp"]

# Inside, a view is none to autograd: what is part of a buffer can be differentiated and written to as others.
_below_autograd = torch._C._AutoDispatchBelowADInplaceOrView
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


class _Implementation(NamedTuple):
    """What may be called in an operator's place.

    A result that is not asked for is None there. Tensors are ``torch.Tensor``, or what dispatches for itself.
    """

    call: Callable[..., Any]
    tensors: int
    """How many arguments are tensors or None; they come first."""


_IMPLEMENTATIONS: dict[Any, _Implementation] = {}


def implementation_of(operator: Any) -> _Implementation:
    return _IMPLEMENTATIONS[operator]


def _operator(
    allocate: Callable[[Any], Any], absent: tuple[str, ...] = (), images: int = 0
) -> Callable[[Callable[..., Any]], Any]:
    """Decorates an implementation: it becomes the operator ``stn_triton::`` of its name.

    Its parameters are the operator's, tensors first. ``allocate(a)`` makes the results without computing
    them, of the arguments by their names. ``absent``, of each result that may not be asked for: the argument
    whose dtype an empty tensor in its place has. The first ``images`` of them have a memory format; the
    others are contiguous.
    """

    def register(implementation: Callable[..., Any]) -> Any:
        name = implementation.__name__
        fields = typing.get_type_hints(implementation)
        del fields["return"]
        tensors = sum(kind in (Tensor, Tensor | None) for kind in fields.values())
        given = ", ".join(f"{_SCHEMA[kind]} {field}" for field, kind in fields.items())
        returned = ", ".join(["Tensor"] * max(len(absent), 1))
        names = list(fields)
        likes = [names.index(field) for field in absent]

        def run(*values: Any) -> Any:
            if not PLAIN.issuperset(map(type, values[:tensors])):
                values = *map(plain, values[:tensors]), *values[tensors:]
            found = implementation(*values)
            if not absent:
                return found
            present = *found[:images], *(None if t is None else _packed(t) for t in found[images:])
            return tuple(
                values[like].new_empty(0) if t is None else t for t, like in zip(present, likes, strict=True)
            )

        def fake(*values: Any) -> Any:
            a = SimpleNamespace(**dict(zip(names, values, strict=True)))
            if exports_onnx():
                refuse_averages(getattr(a, "interpolation", None))
            return allocate(a)

        _LIBRARY.define(f"{name}({given}) -> ({returned})", tags=_TAGS)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"stn_triton::{name}", fake, lib=_LIBRARY)
        operator = getattr(torch.ops.stn_triton, name).default
        _IMPLEMENTATIONS[operator] = _Implementation(implementation, tensors)
        return operator

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
    stride = image.stride()
    if stride[1] != 1:
        return False
    channels = image.shape[1]
    return channels > 1 and all(step >= channels for step in stride[2:])


def _new_images(
    like: Tensor, shape: Sequence[Any], channel: int, channels_last: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """Images whose channels are dimension ``channel``; with channels last these have the smallest stride."""
    if not channels_last:  # sizes one by one, which PyTorch reads sooner than a tuple
        return like.new_empty(*shape) if dtype is None else like.new_empty(*shape, dtype=dtype)
    strides, step = [0] * len(shape), 1
    for dim in (channel, *range(len(shape) - 1, channel, -1), *range(channel - 1, -1, -1)):
        strides[dim] = step
        step = step * shape[dim]
    return like.new_empty_strided(shape, strides, dtype=dtype)


def has_transforms(params: Tensor, source: int) -> bool:
    return params.dim() == 4 and source not in _DENSE


# plain integers, which compare sooner
_GRID, _DENSE = int(Source.GRID), frozenset((int(Source.GRID), int(Source.FLOW)))
_NEAREST = int(Interpolation.NEAREST)


def _new_output(
    input: Tensor, params: Tensor, source: int, size: Any, dtype: torch.dtype | None = None
) -> Tensor:
    """(N, C, *size), or (N, T, C, *size) where params has transforms; a grid makes contiguous images.

    In ``dtype``, by default the input's, and float32 where that is an integer.
    """
    if dtype is None and not input.is_floating_point():
        dtype = reference.sample_dtype(input)
    channels_last = source != _GRID and is_channels_last(input)
    batch, channels, *_ = input.shape
    if has_transforms(params, source):
        return _new_images(input, (batch, params.shape[1], channels, *size), 2, channels_last, dtype)
    return _new_images(input, (batch, channels, *size), 1, channels_last, dtype)


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


def _new_image_gradient(grad_output: Tensor, in_shape: Any, channels_last: bool) -> Tensor:
    """Its batch and channels are those of ``grad_output``: a shard's, where ``in_shape`` is that of all."""
    shape = grad_output.shape[0], grad_output.shape[1 - len(in_shape)], *in_shape[2:]
    return _new_images(grad_output, shape, 1, channels_last)


def _new_control_gradient(params: Tensor, control_points: Tensor | None, control_grad: bool) -> Tensor:
    if control_points is None or not control_grad:
        return params.new_empty(0)
    return control_points.new_empty(control_points.shape)


def _gradient(found: Tensor | None, of: Tensor) -> Tensor:
    """0 where nothing was found."""
    return of.new_zeros(of.shape) if found is None else found.contiguous()


def _by_transform(grad_output: Tensor, params: Tensor, source: int) -> Tensor:
    """``grad_output`` as (N, T, C, *size)."""
    return grad_output if has_transforms(params, source) else grad_output.unsqueeze(1)


# --------------------------------------------------------------------------------------------- sample
@_operator(lambda a: _new_output(a.input, a.params, a.source, a.size))
def sample(
    input: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    source: int,
    size: Sequence[int],
    interpolation: int,
    padding: int,
    align_corners: bool,
) -> Tensor:
    """Of an image (N, C, *in_size), the samples (N, [T,] C, *size)."""
    output = _new_output(input, params, source, size)
    if output.numel() > 0:
        modes = interpolation, padding, align_corners
        if backend.select(input.device.type).name == "torch":
            return _sample_in_pytorch(output, input, params, control_points, None, source, size, *modes)
        kernels.dispatch.sample_forward(input, params, control_points, output, source, *modes)
    return output


def _sample_in_pytorch(
    output: Tensor,
    image: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    fill: Tensor | None,
    source: int,
    size: Sequence[int],
    *modes: Any,
) -> Tensor:
    place = Source(source), tuple(size), *named_modes(*modes)
    with backend.without_autocast(image.device.type):
        samples = reference.sample_as(image, params, control_points, fill, *place, dtype=output.dtype)
    return output.copy_(samples.view(output.shape))


@_operator(lambda a: _new_output(a.input, a.params, a.source, a.size, a.dtype))
def sample_as(
    input: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    fill: Tensor | None,
    source: int,
    size: Sequence[int],
    interpolation: int,
    padding: int,
    align_corners: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Samples with a fill, (N, C), in place of what lies outside the image, and in ``dtype``.

    The fill goes by taps with zeros padding, of some axes or all, and by centres with border padding. For
    derivatives see ``autograd.filling``.
    """
    output = _new_output(input, params, source, size, dtype)
    if output.numel() > 0:
        modes = interpolation, padding, align_corners
        fill = None if fill is None else fill.to(reference.compute_dtype(input, params))
        if backend.select(input.device.type).name == "torch":
            return _sample_in_pytorch(output, input, params, control_points, fill, source, size, *modes)
        kernels.dispatch.sample_forward(input, params, control_points, output, source, *modes, fill)
    return output


def _new_gradients(
    grad_output: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    in_shape: Sequence[int],
    channels_last: bool,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """d input in the input's memory format, d params and d control points contiguous."""
    input_grad, params_grad, control_grad = wanted
    return (
        _new_image_gradient(grad_output, in_shape, channels_last) if input_grad else grad_output.new_empty(0),
        params.new_empty(params.shape if params_grad else 0),
        _new_control_gradient(params, control_points, control_grad),
    )


@_operator(
    lambda a: _new_gradients(
        a.grad_output,
        a.params,
        a.control_points,
        a.in_shape,
        a.channels_last,
        (a.input_grad, a.params_grad, a.control_grad),
    ),
    absent=("grad_output", "params", "params"),
    images=1,
)
def sample_backward(
    grad_output: Tensor,
    input: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    source: int,
    in_shape: Sequence[int],
    channels_last: bool,
    interpolation: int,
    padding: int,
    align_corners: bool,
    input_grad: bool,
    params_grad: bool,
    control_grad: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of d samples, d input (channels_last if asked for), d params and d control points.

    The input is needed for the latter two.
    """
    tensors, modes = (input, params, control_points), (interpolation, padding, align_corners)
    if grad_output.numel() == 0:
        wanted = input_grad, params_grad, control_grad
        empty = _new_gradients(grad_output, params, control_points, in_shape, channels_last, wanted)
        return empty[0].zero_(), empty[1].zero_(), empty[2].zero_()
    grad_input = _new_image_gradient(grad_output, in_shape, channels_last) if input_grad else None
    slopes = interpolation != _NEAREST  # else steps
    of_params, of_controls = params_grad and slopes, control_grad and slopes
    by_params: Tensor | None = None
    by_controls: Tensor | None = None
    if not (input_grad or of_params or of_controls):
        pass
    elif backend.select(grad_output.device.type).name == "torch":
        with _below_autograd(), backend.without_autocast(grad_output.device.type):
            g = _by_transform(grad_output, params, source)
            place = Source(source), in_shape[2:], *named_modes(*modes)
            by_input, by_params, by_controls = reference.sample_backward(
                g, input, params, control_points, *place, input_grad, of_params, of_controls
            )
        if grad_input is not None and by_input is not None:
            grad_input.copy_(by_input)
    else:
        repeatable = torch.are_deterministic_algorithms_enabled()
        with _below_autograd():
            by_params, by_controls = kernels.dispatch.sample_backward(
                grad_output, *tensors, grad_input, source, *modes, of_params, of_controls, repeatable
            )
    if params_grad:
        by_params = _gradient(by_params, params)
    if control_grad and control_points is not None:
        by_controls = _gradient(by_controls, control_points)
    return grad_input, by_params, by_controls


# --------------------------------------------------------------------------- derivatives in a direction
def _new_derivative(
    input: Tensor | None, tangent: Tensor | None, params: Tensor, source: int, size: Sequence[int]
) -> Tensor:
    image = tangent if input is None else input
    assert image is not None, "neither an image nor its tangent"
    return _new_output(image, params, source, size)


@_operator(lambda a: _new_derivative(a.input, a.tangent, a.params, a.source, a.size))
def sample_jvp(
    input: Tensor | None,
    tangent: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    coord_tangent: Tensor | None,
    source: int,
    size: Sequence[int],
    interpolation: int,
    padding: int,
    align_corners: bool,
) -> Tensor:
    """The derivative of the samples in the direction of an image and of coordinates, or of either.

    The input is needed for the coordinates' direction alone.
    """
    output = _new_derivative(input, tangent, params, source, size)
    modes = interpolation, padding, align_corners
    by_places = None if interpolation == _NEAREST else coord_tangent
    if output.numel() == 0 or (by_places is None and tangent is None):
        return output.zero_()
    in_pytorch = backend.select(output.device.type).name == "torch"
    if by_places is None:  # samples are linear in the image
        assert tangent is not None
        if in_pytorch:
            return _sample_in_pytorch(output, tangent, params, control_points, None, source, size, *modes)
        kernels.dispatch.sample_forward(tangent, params, control_points, output, source, *modes)
        return output
    tensors = input, tangent, params, control_points, by_places
    if in_pytorch:
        with backend.without_autocast(output.device.type):
            samples = reference.sample_jvp(*tensors, Source(source), tuple(size), *named_modes(*modes))
        return output.copy_(samples.view(output.shape))
    kernels.dispatch.sample_jvp(*tensors, output, source, *modes)
    return output


def new_second_gradients(
    grad_output: Tensor,
    params: Tensor,
    source: int,
    in_shape: Any,
    channels_last: bool,
    input_grad: bool,
    coordinates_grad: bool,
) -> tuple[Tensor, Tensor]:
    nothing = grad_output.new_empty(0)
    return (
        _new_image_gradient(grad_output, in_shape, channels_last) if input_grad else nothing,
        _new_coordinates(grad_output, params, source, len(in_shape) - 2) if coordinates_grad else nothing,
    )


@_operator(
    lambda a: new_second_gradients(
        a.grad_output, a.params, a.source, a.in_shape, a.channels_last, a.input_grad, a.coordinates_grad
    ),
    absent=("grad_output", "grad_output"),
    images=1,
)
def sample_hvp(
    grad_output: Tensor,
    input: Tensor | None,
    tangent: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    coord_tangent: Tensor | None,
    source: int,
    in_shape: Sequence[int],
    channels_last: bool,
    interpolation: int,
    padding: int,
    align_corners: bool,
    input_grad: bool,
    coordinates_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The Hessian of <grad_output, samples> by image and coordinates, times a direction of each."""
    if grad_output.numel() == 0 or interpolation == _NEAREST:
        image = source, in_shape, channels_last
        grad_input, places = new_second_gradients(grad_output, params, *image, input_grad, coordinates_grad)
        return grad_input.zero_(), places.zero_()
    tensors = input, tangent, params, control_points, coord_tangent
    modes = interpolation, padding, align_corners
    target = _new_image_gradient(grad_output, in_shape, channels_last) if input_grad else None
    if backend.select(grad_output.device.type).name == "torch":
        with _below_autograd(), backend.without_autocast(grad_output.device.type):
            g = _by_transform(grad_output, params, source)
            place = Source(source), in_shape[2:], *named_modes(*modes)
            by_input, by_coordinates = reference.sample_hvp(g, *tensors, *place, input_grad, coordinates_grad)
        if target is not None and by_input is not None:
            target.copy_(by_input)
    else:
        repeatable = torch.are_deterministic_algorithms_enabled()
        with _below_autograd():
            by_coordinates = kernels.dispatch.sample_double_backward(
                grad_output, *tensors, target, source, *modes, coordinates_grad, repeatable
            )
    return target, by_coordinates


# ----------------------------------------------------------------------------------------------- grid
@_operator(lambda a: a.params.new_empty(a.params.shape[0], *a.size, len(a.size)))
def grid(
    params: Tensor, control_points: Tensor | None, source: int, size: Sequence[int], align_corners: bool
) -> Tensor:
    """The coordinates (N, *size, dims) that a matrix or a spline makes."""
    output = params.new_empty(params.shape[0], *size, len(size))
    if output.numel() == 0:
        return output
    if backend.select(params.device.type).name == "torch":
        place = Source(source), params, control_points, tuple(size), align_corners
        with backend.without_autocast(params.device.type):
            coordinates = reference.coordinates(*place, reference.compute_dtype(params))
        return output.copy_(coordinates.squeeze(1))
    kernels.dispatch.grid_forward(params, control_points, output, source, align_corners)
    return output


def _new_grid_gradients(
    params: Tensor, control_points: Tensor | None, control_grad: bool
) -> tuple[Tensor, Tensor]:
    by_controls = _new_control_gradient(params, control_points, control_grad)
    return params.new_empty(params.shape), by_controls


@_operator(
    lambda a: _new_grid_gradients(a.params, a.control_points, a.control_grad), absent=("params", "params")
)
def grid_backward(
    grad_grid: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    source: int,
    align_corners: bool,
    control_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Of d coordinates, d params and d control points."""
    modes = source, align_corners, control_grad
    if grad_grid.numel() == 0:
        by_params, by_controls = _new_grid_gradients(params, control_points, control_grad)
        return by_params.zero_(), by_controls.zero_()
    if backend.select(params.device.type).name == "torch":
        by_transform = grad_grid.unsqueeze(1).to(reference.compute_dtype(params))
        with _below_autograd(), backend.without_autocast(params.device.type):
            return reference.coordinates_backward(
                Source(source), by_transform, params, control_points, align_corners, control_grad
            )
    with _below_autograd():
        return kernels.dispatch.grid_backward(grad_grid, params, control_points, *modes)


# ------------------------------------------------------------------------------------------- no operator
def spline_product(matrix: Tensor, points: Tensor, dtype: torch.dtype) -> Tensor:
    """``splines.product`` of (rows, K) in float64 and (N, [T,] K, 2), by a kernel where there are kernels.

    Not differentiable. No operator: only plain eager code calls it (``autograd.splines``).
    """
    if backend.select(points.device.type).name == "torch":
        return splines.product(matrix, points, dtype)
    output = points.new_empty(*points.shape[:-2], matrix.shape[0], 2, dtype=dtype)
    if output.numel() > 0:
        kernels.dispatch.spline_product(matrix, points, output)
    return output
