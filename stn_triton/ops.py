"""The registered operators and their autograd: the only file that touches ``torch.library``.

Four operators serve every transform; ``source`` (a ``kernels.modes.Source``) says what ``params`` is, so
that a new coordinate source adds no operator:

* ``stn_triton::sample`` and ``stn_triton::sample_backward``,
* ``stn_triton::grid`` and ``stn_triton::grid_backward``.

``params`` is a grid, theta, a homography, a spline's coefficients or a flow; ``control_points`` are the
spline's, else None. In what a backward operator returns an empty tensor stands for a gradient not asked for.

Each has one implementation for all devices, which goes to the kernels or to ``reference`` (see
``backend``), and a fake made by the same allocation functions. ``sample`` and ``grid`` below are
differentiable: one ``autograd.Function`` around one operator call, and one around its backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backend, reference
from .kernels.modes import Interpolation, Padding, Source

__all__ = ["grid", "sample"]

_LIBRARY = torch.library.Library("stn_triton", "DEF")
# The kernels honour strides, and a result's memory format follows them: they must not be changed on the way.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)


def _register(schema: str, implementation: Any, fake: Any) -> Any:
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stn_triton::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.stn_triton, name).default


# ----------------------------------------------------------------------------------------- allocation
def _memory_format(image: Tensor) -> torch.memory_format:
    """The format of what is made from an image: channels_last where its channels lie innermost."""
    channels = image.shape[1]
    if channels > 1 and image.stride(1) == 1 and all(stride >= channels for stride in image.stride()[2:]):
        return torch.channels_last if image.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


def _new_images(like: Tensor, batch: Any, size: Any, memory_format: torch.memory_format) -> Tensor:
    return torch.empty(
        (batch, like.shape[1], *size), dtype=like.dtype, device=like.device, memory_format=memory_format
    )


def _new_output(input: Tensor, params: Tensor, source: int, size: Any) -> Tensor:
    """(N, C, *size), or (N, T, C, *size) where params has transforms; a grid makes contiguous images."""
    memory_format = torch.contiguous_format if source == Source.GRID else _memory_format(input)
    if source not in (Source.GRID, Source.FLOW) and params.dim() == 4:
        transforms = params.shape[1]
        output = _new_images(input, input.shape[0] * transforms, size, memory_format)
        return output.view(input.shape[0], transforms, *output.shape[1:])
    return _new_images(input, input.shape[0], size, memory_format)


def _packed(tensor: Tensor) -> Tensor:
    """Contiguous with the strides a new tensor has, those of axes of one element included."""
    packed = tensor.new_empty(tensor.shape)
    return tensor if tensor.stride() == packed.stride() else packed.copy_(tensor)


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
    output = _new_output(input, params, source, size)
    if output.numel() == 0:
        return output
    modes = Interpolation(interpolation), Padding(padding), align_corners
    if backend.select(input.device.type).name == "torch":
        with backend.without_autocast(input.device.type):
            samples = reference.sample(input, params, control_points, Source(source), tuple(size), *modes)
        return output.copy_(samples.view(output.shape))
    from .kernels.sample import sample_forward

    sample_forward(input, params, control_points, output, Source(source), *modes)
    return output


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


_sample_op = _register(
    "sample(Tensor input, Tensor params, Tensor? control_points, int source, SymInt[] size,"
    " int interpolation, int padding, bool align_corners) -> Tensor",
    _sample,
    _sample_fake,
)


def _new_gradients(
    input: Tensor, params: Tensor, control_points: Tensor | None, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """d input in the input's memory format, d params and d control points contiguous."""
    input_grad, params_grad, control_grad = wanted
    grad_input = (
        _new_images(input, input.shape[0], input.shape[2:], _memory_format(input))
        if input_grad
        else input.new_empty(0)
    )
    grad_params = params.new_empty(params.shape if params_grad else (0,))
    return grad_input, grad_params, _new_control_gradient(params, control_points, control_grad)


def _new_control_gradient(params: Tensor, control_points: Tensor | None, control_grad: bool) -> Tensor:
    if control_points is None or not control_grad:
        return params.new_empty(0)
    return control_points.new_empty(control_points.shape)


def _sample_backward(
    grad_output: Tensor,
    input: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
    input_grad: bool,
    params_grad: bool,
    control_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = input_grad, params_grad, control_grad
    grad_input, grad_params, grad_controls = _new_gradients(input, params, control_points, wanted)
    if grad_output.numel() == 0:
        return grad_input.zero_(), grad_params.zero_(), grad_controls.zero_()
    if interpolation == Interpolation.NEAREST:  # steps: the slope is 0
        grad_params.zero_()
        grad_controls.zero_()
        params_grad = control_grad = False
    if not (input_grad or params_grad or control_grad):
        return grad_input, grad_params, grad_controls
    modes = Interpolation(interpolation), Padding(padding), align_corners
    if backend.select(input.device.type).name == "torch":
        by_transform = grad_output if grad_output.dim() > input.dim() else grad_output.unsqueeze(1)
        with backend.without_autocast(input.device.type):
            by_input, by_params, by_controls = reference.sample_backward(
                by_transform,
                input,
                params,
                control_points,
                Source(source),
                *modes,
                input_grad,
                params_grad,
                control_grad,
            )
        if by_input is not None:
            grad_input.copy_(by_input)
    else:
        from .kernels.sample import sample_backward

        # added up in the compute type, and rounded once if the image is narrower
        dtype = reference.compute_dtype(input, params)
        total = None
        if input_grad:
            total = grad_input.zero_() if dtype == input.dtype else torch.zeros_like(grad_input, dtype=dtype)
        by_params, by_controls = sample_backward(
            grad_output,
            input,
            params,
            control_points,
            total,
            Source(source),
            *modes,
            params_grad or control_grad,
            control_grad,
        )
        if total is not None and total is not grad_input:
            grad_input.copy_(total)
    if params_grad and by_params is not None:
        grad_params = _packed(by_params)
    if control_grad and by_controls is not None:
        grad_controls = _packed(by_controls)
    return grad_input, grad_params, grad_controls


def _sample_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    params: Tensor,
    control_points: Tensor | None,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
    input_grad: bool,
    params_grad: bool,
    control_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_gradients(input, params, control_points, (input_grad, params_grad, control_grad))


_sample_backward_op = _register(
    "sample_backward(Tensor grad_output, Tensor input, Tensor params, Tensor? control_points, int source,"
    " int interpolation, int padding, bool align_corners, bool input_grad, bool params_grad,"
    " bool control_grad) -> (Tensor, Tensor, Tensor)",
    _sample_backward,
    _sample_backward_fake,
)


def _vector_jacobian(
    function: Callable[..., Any],
    tensors: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    cotangents: tuple[Any, ...],
) -> list[Tensor | None]:
    """d of ``function(*tensors)``'s results, weighted by ``cotangents``, for each tensor that needs it.

    ``function`` is plain PyTorch. Inside ``create_graph`` the result can be differentiated in turn.
    """
    again = torch.is_grad_enabled()
    device = next(tensor.device for tensor in tensors if tensor is not None)
    with torch.enable_grad(), backend.without_autocast(device.type):
        # fresh tensors: in the graph outside, one argument may depend on another, and those paths are
        # the outer engine's to follow
        tensors = tuple(
            None if t is None else t.view_as(t) if again else t.detach().requires_grad_(need)
            for t, need in zip(tensors, needed, strict=True)
        )
        pairs = [
            (result, cotangent)
            for result, cotangent in zip(function(*tensors), cotangents, strict=True)
            if cotangent is not None and result is not None and result.requires_grad
        ]
        inputs = [tensor for tensor, need in zip(tensors, needed, strict=True) if need and tensor is not None]
        if not pairs or not inputs:
            return [None] * len(tensors)
        results, weights = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(results, inputs, weights, create_graph=again, allow_unused=True))
    return [next(found) if need else None for need in needed]


class _SampleBackward(torch.autograd.Function):
    """The backward pass as a function of its own, for second derivatives: those are taken in PyTorch."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _sample_backward_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.source = inputs[4]
        ctx.modes = inputs[5:8]
        ctx.wanted = inputs[8:]
        ctx.save_for_backward(*inputs[:4])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        interpolation, padding, align_corners = ctx.modes
        modes = Interpolation(interpolation), Padding(padding), align_corners

        def function(
            grad_output: Tensor, input: Tensor, params: Tensor, control_points: Tensor | None
        ) -> tuple[Any, ...]:
            by_transform = grad_output if grad_output.dim() > input.dim() else grad_output.unsqueeze(1)
            return reference.sample_backward(
                by_transform,
                input,
                params,
                control_points,
                Source(ctx.source),
                *modes,
                *ctx.wanted,
                by_taps=True,
            )

        asked = tuple(c if wanted else None for c, wanted in zip(cotangents, ctx.wanted, strict=True))
        found = _vector_jacobian(function, ctx.saved_tensors, ctx.needs_input_grad[:4], asked)
        return *found, None, None, None, None, None, None, None


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _sample_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.source = inputs[3]
        ctx.modes = inputs[5:]
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:3]
        # the compiler differentiates once, and does not trace a Function within a Function's backward
        backward = _sample_backward_op if torch.compiler.is_compiling() else _SampleBackward.apply
        found = backward(grad_output, *ctx.saved_tensors, ctx.source, *ctx.modes, *wanted)
        gradients = (g if want else None for g, want in zip(found, wanted, strict=True))
        return *gradients, None, None, None, None, None


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
    return _Sample.apply(input, params, control_points, int(source), size, *codes)


# ----------------------------------------------------------------------------------------------- grid
def _grid(
    params: Tensor, control_points: Tensor | None, source: int, size: list[int], align_corners: bool
) -> Tensor:
    output = _new_grid(params, size)
    if output.numel() == 0:
        return output
    if backend.select(params.device.type).name == "torch":
        place = Source(source), params, control_points, tuple(size), align_corners
        with backend.without_autocast(params.device.type):
            grid = reference.coordinates(*place, reference.compute_dtype(params))
        return output.copy_(grid.squeeze(1))
    from .kernels.grid import grid_forward

    grid_forward(params, control_points, output, Source(source), align_corners)
    return output


def _grid_fake(
    params: Tensor, control_points: Tensor | None, source: int, size: Any, align_corners: bool
) -> Tensor:
    return _new_grid(params, size)


_grid_op = _register(
    "grid(Tensor params, Tensor? control_points, int source, SymInt[] size, bool align_corners) -> Tensor",
    _grid,
    _grid_fake,
)


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
        from .kernels.grid import grid_backward

        by_params, by_controls = grid_backward(
            grad_grid, params, control_points, Source(source), align_corners, control_grad
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


_grid_backward_op = _register(
    "grid_backward(Tensor grad_grid, Tensor params, Tensor? control_points, int source, bool align_corners,"
    " bool control_grad) -> (Tensor, Tensor)",
    _grid_backward,
    _grid_backward_fake,
)


class _GridBackward(torch.autograd.Function):
    """As ``_SampleBackward``."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return _grid_backward_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.source = inputs[3]
        ctx.align_corners = inputs[4]
        ctx.control_grad = inputs[5]
        ctx.save_for_backward(*inputs[:3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, by_grad_params: Tensor | None, by_grad_controls: Tensor | None) -> tuple[Any, ...]:
        def function(grad_grid: Tensor, params: Tensor, control_points: Tensor | None) -> tuple[Any, ...]:
            by_transform = grad_grid.unsqueeze(1).to(reference.compute_dtype(params))
            return reference.coordinates_backward(
                Source(ctx.source), by_transform, params, control_points, ctx.align_corners, ctx.control_grad
            )

        cotangents = by_grad_params, by_grad_controls if ctx.control_grad else None
        found = _vector_jacobian(function, ctx.saved_tensors, ctx.needs_input_grad[:3], cotangents)
        return *found, None, None, None


class _Grid(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _grid_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.source = inputs[2]
        ctx.align_corners = inputs[4]
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad_grid: Tensor) -> tuple[Tensor | None, ...]:
        params_grad, control_grad = ctx.needs_input_grad[:2]
        backward = _grid_backward_op if torch.compiler.is_compiling() else _GridBackward.apply
        by_params, by_controls = backward(
            grad_grid, *ctx.saved_tensors, ctx.source, ctx.align_corners, control_grad
        )
        return by_params if params_grad else None, by_controls if control_grad else None, None, None, None


def grid(
    params: Tensor, source: Source, size: Any, align_corners: bool, control_points: Tensor | None = None
) -> Tensor:
    """The normalised coordinates of a source, (N, *size, dims) in the dtype of ``params``."""
    return _Grid.apply(params, control_points, int(source), size, align_corners)
