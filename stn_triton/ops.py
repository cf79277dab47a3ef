"""The registered operators: the only file that touches ``torch.library``.

Six operators serve every transform; ``source`` (a ``kernels.modes.Source``) says what ``params`` is, so
that a new coordinate source adds no operator:

* ``stn_triton::sample``, its transposed derivative ``stn_triton::sample_backward``, its derivative in a
  direction ``stn_triton::sample_jvp`` and its second derivative in a direction ``stn_triton::sample_hvp``,
* ``stn_triton::grid`` and its transposed derivative ``stn_triton::grid_backward``.

``params`` is a grid, theta, a homography, a spline's coefficients or a flow; ``control_points`` are the
spline's, else None. In what an operator returns an empty tensor stands for a gradient not asked for.

``padding`` is one code for all axes, or of one for each (``kernels.modes.padding_code``).

Each has one implementation for all devices, which goes to the kernels or to ``reference`` (see
``backend``), and a fake made by the same allocation functions. ``autograd`` makes them differentiable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backend, kernels, reference
from .calls import PLAIN, plain
from .kernels.modes import Interpolation, Source

__all__ = ["grid", "grid_backward", "sample", "sample_backward", "sample_hvp", "sample_jvp"]

_LIBRARY = torch.library.Library("stn_triton", "DEF")
# The kernels honour strides, and a result's memory format follows them: they must not be changed on the way.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)


def _register(schema: str, implementation: Any, fake: Any) -> Any:
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stn_triton::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.stn_triton, name).default


def differentiate(operator: Any, derived: Callable[..., Any]) -> None:
    """Has ``derived`` called for an operator wherever derivatives, or other function transforms, are made."""
    name = operator.name().partition(".")[0]
    for key in ("Autograd", "FuncTorchDynamicLayerFrontMode"):  # the second: all function transforms
        _LIBRARY.impl(name, derived, key)


def _on_plain(tensors: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates an implementation, whose first so many arguments are tensors: it is given plain ones.

    (The forward ones ask themselves, which takes less time.)
    """

    def decorate(implementation: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(implementation)
        def on_plain(*arguments: Any) -> Any:
            if not PLAIN.issuperset(map(type, arguments[:tensors])):
                arguments = *map(plain, arguments[:tensors]), *arguments[tensors:]
            return implementation(*arguments)

        return on_plain

    return decorate


# ----------------------------------------------------------------------------------------- allocation
def is_channels_last(image: Tensor) -> bool:
    """Whether an image's channels lie innermost: what is made from it then is channels_last too."""
    channels, stride = image.shape[1], image.stride()
    return channels > 1 and stride[1] == 1 and all(step >= channels for step in stride[2:])


def _new_images(like: Tensor, shape: tuple[Any, ...], channels_last: bool) -> Tensor:
    if not channels_last:
        return like.new_empty(shape)
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def has_transforms(params: Tensor, source: int) -> bool:
    return params.dim() == 4 and source not in (Source.GRID, Source.FLOW)


def _new_output(input: Tensor, params: Tensor, source: int, size: Any) -> Tensor:
    """(N, C, *size), or (N, T, C, *size) where params has transforms; a grid makes contiguous images."""
    channels_last = source != Source.GRID and is_channels_last(input)
    batch, channels, *_ = input.shape
    if has_transforms(params, source):
        transforms = params.shape[1]
        output = _new_images(input, (batch * transforms, channels, *size), channels_last)
        return output.view(batch, transforms, *output.shape[1:])
    return _new_images(input, (batch, channels, *size), channels_last)


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


def _new_grid(params: Tensor, size: Any) -> Tensor:
    return params.new_empty((params.shape[0], *size, len(size)))


# --------------------------------------------------------------------------------------------- sample
def _sample(
    input: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    source: int,
    size: list[int],
    interpolation: int,
    padding: int,
    align_corners: bool,
) -> Tensor:
    if type(input) not in PLAIN or type(params) not in PLAIN or type(control_points) not in PLAIN:
        input, params, control_points = map(plain, (input, params, control_points))
    output = _new_output(input, params, source, size)
    modes = interpolation, padding, align_corners
    return output if output.numel() == 0 else _fill(output, input, params, control_points, source, *modes)


def _fill(
    output: Tensor,
    input: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    source: int,
    *modes: Any,
) -> Tensor:
    if backend.select(input.device.type).name == "torch":
        place = Source(source), tuple(output.shape[2 - input.dim() :]), *named_modes(*modes)
        with backend.without_autocast(input.device.type):
            samples = reference.sample(input, params, control_points, *place)
        return output.copy_(samples.view(output.shape))
    kernels.dispatch.sample_forward(input, params, control_points, output, source, *modes)
    return output


def named_modes(interpolation: int, padding: int, align_corners: bool) -> tuple[Interpolation, int, bool]:
    """The modes of an operator's codes, for ``reference``."""
    return Interpolation(interpolation), padding, align_corners


def _sample_fake(
    input: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    source: int,
    size: Any,
    interpolation: int,
    padding: int,
    align_corners: bool,
) -> Tensor:
    return _new_output(input, params, source, size)


sample = _register(
    "sample(Tensor input, Tensor params, Tensor? control_points, int source, SymInt[] size,"
    " int interpolation, int padding, bool align_corners) -> Tensor",
    _sample,
    _sample_fake,
)


def _new_gradients(
    grad_output: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    in_shape: Any,
    channels_last: bool,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """d input in the input's memory format, d params and d control points contiguous."""
    input_grad, params_grad, control_grad = wanted
    grad_input = _new_image_gradient(grad_output, in_shape, channels_last, input_grad)
    grad_params = params.new_empty(params.shape if params_grad else 0)
    return grad_input, grad_params, _new_control_gradient(params, control_points, control_grad)


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


@_on_plain(4)
def _sample_backward(
    grad_output: Tensor,
    input: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    source: int,
    in_shape: list[int],
    channels_last: bool,
    interpolation: int,
    padding: int,
    align_corners: bool,
    input_grad: bool,
    params_grad: bool,
    control_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if grad_output.numel() == 0:
        wanted = input_grad, params_grad, control_grad
        gradients = _new_gradients(grad_output, params, control_points, in_shape, channels_last, wanted)
        return gradients[0].zero_(), gradients[1].zero_(), gradients[2].zero_()
    grad_input = _new_image_gradient(grad_output, in_shape, channels_last, input_grad)
    by_params, by_controls = None, None
    slopes = interpolation != Interpolation.NEAREST  # else steps
    if not (input_grad or (slopes and (params_grad or control_grad))):
        pass
    elif backend.select(grad_output.device.type).name == "torch":
        with backend.without_autocast(grad_output.device.type):
            by_input, by_params, by_controls = reference.sample_backward(
                grad_output if has_transforms(params, source) else grad_output.unsqueeze(1),
                input,
                params,
                control_points,
                Source(source),
                in_shape[2:],
                *named_modes(interpolation, padding, align_corners),
                input_grad,
                params_grad and slopes,
                control_grad and slopes,
            )
        if by_input is not None:
            grad_input.copy_(by_input)
    else:
        by_params, by_controls = kernels.dispatch.sample_backward(
            grad_output,
            input,
            params,
            control_points,
            grad_input if input_grad else None,
            source,
            interpolation,
            padding,
            align_corners,
            params_grad and slopes,
            control_grad and slopes,
            torch.are_deterministic_algorithms_enabled(),
        )
    grad_params = _result(by_params, params if params_grad else None, params)
    return grad_input, grad_params, _result(by_controls, control_points if control_grad else None, params)


def _result(found: Tensor | None, of: Tensor | None, like: Tensor) -> Tensor:
    """A gradient as an operator returns it: 0 where nothing was found, empty where it is of nothing."""
    if of is None:
        return like.new_empty(0)
    return of.new_zeros(of.shape) if found is None else _packed(found)


def _sample_backward_fake(
    grad_output: Tensor,
    input: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    source: int,
    in_shape: Any,
    channels_last: bool,
    interpolation: int,
    padding: int,
    align_corners: bool,
    input_grad: bool,
    params_grad: bool,
    control_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = input_grad, params_grad, control_grad
    return _new_gradients(grad_output, params, control_points, in_shape, channels_last, wanted)


sample_backward = _register(
    "sample_backward(Tensor grad_output, Tensor? input, Tensor params, Tensor? control_points, int source,"
    " SymInt[] in_shape, bool channels_last, int interpolation, int padding, bool align_corners,"
    " bool input_grad, bool params_grad, bool control_grad) -> (Tensor, Tensor, Tensor)",
    _sample_backward,
    _sample_backward_fake,
)


# --------------------------------------------------------------------------- derivatives in a direction
@_on_plain(5)
def _sample_jvp(
    input: Tensor | None,
    tangent: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    coord_tangent: Tensor | None,
    source: int,
    size: list[int],
    interpolation: int,
    padding: int,
    align_corners: bool,
) -> Tensor:
    output = _sample_jvp_fake(
        input,
        tangent,
        params,
        control_points,
        coord_tangent,
        source,
        size,
        interpolation,
        padding,
        align_corners,
    )
    if interpolation == Interpolation.NEAREST:
        coord_tangent = None
    if output.numel() == 0 or (coord_tangent is None and tangent is None):
        return output.zero_()
    modes = interpolation, padding, align_corners
    if coord_tangent is None:  # samples are linear in the image
        assert tangent is not None
        return _fill(output, tangent, params, control_points, source, *modes)
    if backend.select(output.device.type).name == "torch":
        place = Source(source), tuple(size), *named_modes(*modes)
        with backend.without_autocast(output.device.type):
            samples = reference.sample_jvp(input, tangent, params, control_points, coord_tangent, *place)
        return output.copy_(samples.view(output.shape))
    kernels.dispatch.sample_jvp(input, tangent, params, control_points, coord_tangent, output, source, *modes)
    return output


def _sample_jvp_fake(
    input: Tensor | None,
    tangent: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    coord_tangent: Tensor | None,
    source: int,
    size: Any,
    interpolation: int,
    padding: int,
    align_corners: bool,
) -> Tensor:
    image = tangent if input is None else input
    assert image is not None, "neither an image nor its tangent"
    return _new_output(image, params, source, size)


sample_jvp = _register(
    "sample_jvp(Tensor? input, Tensor? tangent, Tensor params, Tensor? control_points, Tensor? coord_tangent,"
    " int source, SymInt[] size, int interpolation, int padding, bool align_corners) -> Tensor",
    _sample_jvp,
    _sample_jvp_fake,
)


@_on_plain(6)
def _sample_hvp(
    grad_output: Tensor,
    input: Tensor | None,
    tangent: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    coord_tangent: Tensor | None,
    source: int,
    in_shape: list[int],
    channels_last: bool,
    interpolation: int,
    padding: int,
    align_corners: bool,
    input_grad: bool,
    coordinates_grad: bool,
) -> tuple[Tensor, Tensor]:
    grad_input, by_coordinates = new_second_gradients(
        grad_output, params, source, in_shape, channels_last, input_grad, coordinates_grad
    )
    if grad_output.numel() == 0 or interpolation == Interpolation.NEAREST:
        return grad_input.zero_(), by_coordinates.zero_()
    if backend.select(grad_output.device.type).name == "torch":
        with backend.without_autocast(grad_output.device.type):
            by_input, by_places = reference.sample_hvp(
                grad_output if has_transforms(params, source) else grad_output.unsqueeze(1),
                input,
                tangent,
                params,
                control_points,
                coord_tangent,
                Source(source),
                in_shape[2:],
                *named_modes(interpolation, padding, align_corners),
                input_grad,
                coordinates_grad,
            )
        if by_input is not None:
            grad_input.copy_(by_input)
    else:
        by_places = kernels.dispatch.sample_double_backward(
            grad_output,
            input,
            tangent,
            params,
            control_points,
            coord_tangent,
            grad_input if input_grad else None,
            source,
            interpolation,
            padding,
            align_corners,
            coordinates_grad,
            torch.are_deterministic_algorithms_enabled(),
        )
    return grad_input, by_coordinates if by_places is None else _packed(by_places)


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


def _sample_hvp_fake(
    grad_output: Tensor,
    input: Tensor | None,
    tangent: Tensor | None,
    params: Tensor,
    control_points: Tensor | None,
    coord_tangent: Tensor | None,
    source: int,
    in_shape: Any,
    channels_last: bool,
    interpolation: int,
    padding: int,
    align_corners: bool,
    input_grad: bool,
    coordinates_grad: bool,
) -> tuple[Tensor, Tensor]:
    return new_second_gradients(
        grad_output, params, source, in_shape, channels_last, input_grad, coordinates_grad
    )


sample_hvp = _register(
    "sample_hvp(Tensor grad_output, Tensor? input, Tensor? tangent, Tensor params, Tensor? control_points,"
    " Tensor? coord_tangent, int source, SymInt[] in_shape, bool channels_last, int interpolation,"
    " int padding, bool align_corners, bool input_grad, bool coordinates_grad) -> (Tensor, Tensor)",
    _sample_hvp,
    _sample_hvp_fake,
)


# ----------------------------------------------------------------------------------------------- grid
def _grid(
    params: Tensor, control_points: Tensor | None, source: int, size: list[int], align_corners: bool
) -> Tensor:
    if type(params) not in PLAIN or type(control_points) not in PLAIN:
        params, control_points = plain(params), plain(control_points)
    output = _new_grid(params, size)
    if output.numel() == 0:
        return output
    if backend.select(params.device.type).name == "torch":
        place = Source(source), params, control_points, tuple(size), align_corners
        with backend.without_autocast(params.device.type):
            grid = reference.coordinates(*place, reference.compute_dtype(params))
        return output.copy_(grid.squeeze(1))
    kernels.dispatch.grid_forward(params, control_points, output, source, align_corners)
    return output


def _grid_fake(
    params: Tensor, control_points: Tensor | None, source: int, size: Any, align_corners: bool
) -> Tensor:
    return _new_grid(params, size)


grid = _register(
    "grid(Tensor params, Tensor? control_points, int source, SymInt[] size, bool align_corners) -> Tensor",
    _grid,
    _grid_fake,
)


@_on_plain(3)
def _grid_backward(
    grad_grid: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    source: int,
    align_corners: bool,
    control_grad: bool,
) -> tuple[Tensor, Tensor]:
    if grad_grid.numel() == 0:
        nothing = _new_control_gradient(params, control_points, control_grad).zero_()
        return torch.zeros_like(params, memory_format=torch.contiguous_format), nothing
    if backend.select(params.device.type).name == "torch":
        by_transform = grad_grid.unsqueeze(1).to(reference.compute_dtype(params))
        with backend.without_autocast(params.device.type):
            by_params, by_controls = reference.coordinates_backward(
                Source(source), by_transform, params, control_points, align_corners, control_grad
            )
    else:
        by_params, by_controls = kernels.dispatch.grid_backward(
            grad_grid, params, control_points, source, align_corners, control_grad
        )
    return _packed(by_params), params.new_empty(0) if by_controls is None else _packed(by_controls)


def _grid_backward_fake(
    grad_grid: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    source: int,
    align_corners: bool,
    control_grad: bool,
) -> tuple[Tensor, Tensor]:
    return params.new_empty(params.shape), _new_control_gradient(params, control_points, control_grad)


grid_backward = _register(
    "grid_backward(Tensor grad_grid, Tensor params, Tensor? control_points, int source, bool align_corners,"
    " bool control_grad) -> (Tensor, Tensor)",
    _grid_backward,
    _grid_backward_fake,
)
