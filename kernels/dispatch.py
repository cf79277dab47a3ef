"""What the operators call: one function each, and which kernels compute the gradients.

d image has three ways. Maps that have an inverse gather it (``gather``), always. Others scatter by atomics
into the compute type (``sample``), whose last bits depend on the order; or, where the same bits are asked for
each time, sum a sorted list (``sort``). Only scattering needs zeros first, and a wider copy of half images.
d parameters comes from ``sample`` or ``derivatives``, in a fixed order of sums.
"""

from collections.abc import Callable
from typing import Any

import torch

from . import derivatives, grid, sample
from .coefficients import spline_product as spline_product
from .gather import gather_backward
from .host import configs, tables
from .host.launch import compute_dtypes, planned
from .host.tuning import tunable
from .modes import INVERTIBLE
from .sort import sorted_backward


def sample_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor | None,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    grad_input: torch.Tensor | None,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
    params_grad: bool,
    control_grad: bool,
    repeatable: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Fills ``grad_input``, in the image's type, if given; returns d params and d control points.

    ``input`` is needed for the latter two. ``repeatable``: d image has the same bits each time.
    """
    modes = source, interpolation, padding, align_corners
    total = None
    if grad_input is not None:
        if source in INVERTIBLE:
            gather_backward(grad_output, params, grad_input, *modes)
        elif repeatable or _prefers_sorted((grad_output, grad_input), source, interpolation):
            sorted_backward(grad_output, params, control_points, grad_input, *modes)
        else:
            total = _zeros(grad_input, params)
    by_params, by_controls = None, None
    if total is not None or params_grad or control_grad:
        image = grad_input if input is None else input  # of which nothing is read then
        assert image is not None
        wanted = params_grad or control_grad, control_grad
        by_params, by_controls = sample.sample_backward(
            grad_output, image, params, control_points, total, *modes, *wanted
        )
    _round(total, grad_input)
    return by_params, by_controls


def sample_double_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor | None,
    tangent: torch.Tensor | None,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    coord_tangent: torch.Tensor | None,
    grad_input: torch.Tensor | None,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
    coordinates_grad: bool,
    repeatable: bool,
) -> torch.Tensor | None:
    """As ``derivatives.sample_hvp``, but that ``grad_input`` is filled, in the image's type."""
    modes = source, interpolation, padding, align_corners
    total = None
    if grad_input is not None:
        if repeatable or source in INVERTIBLE:
            sorted_backward(grad_output, params, control_points, grad_input, *modes, coord_tangent)
        else:
            total = _zeros(grad_input, params)
    by_coordinates = None
    if total is not None or coordinates_grad:
        by_coordinates = derivatives.sample_hvp(
            grad_output,
            input,
            tangent,
            params,
            control_points,
            coord_tangent,
            total,
            *modes,
            coordinates_grad,
        )
    _round(total, grad_input)
    return by_coordinates


@planned
def _prefers_sorted(
    grad_output: torch.Tensor, grad_input: torch.Tensor, source: int, interpolation: int
) -> bool:
    (images, channels), size = grad_input.shape[:2], grad_output.shape[2 - grad_input.dim() :]
    modes, last = (source, interpolation), grad_input.stride(1) == 1
    problem = configs.Problem.of("sum", modes, images, channels, size, grad_input, last, backward=True)
    return configs.prefers_sorted(grad_output.device, problem)


def _zeros(grad_input: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """Zeros in the compute type: ``grad_input`` itself, if that is its type."""
    compute = compute_dtypes(grad_input, params)[1]
    return grad_input.zero_() if grad_input.dtype == compute else torch.zeros_like(grad_input, dtype=compute)


def _round(total: torch.Tensor | None, grad_input: torch.Tensor | None) -> None:
    if total is not None and grad_input is not None and total is not grad_input:
        grad_input.copy_(total)


# ----------------------------------------------------------------------------------------------- tuning
LAUNCHERS: dict[str, Callable[..., Any]] = {
    "sample_forward": sample.sample_forward,
    "sample_jvp": derivatives.sample_jvp,
    "sample_backward": sample_backward,
    "sample_double_backward": sample_double_backward,
    "grid_forward": grid.grid_forward,
    "grid_backward": grid.grid_backward,
}
_TUNABLE = {name: tunable(launcher) for name, launcher in LAUNCHERS.items()}


def _route() -> None:
    """Calls go to the launchers themselves; inside ``autotune()``, of any thread, through what tunes them."""
    while True:
        tuning = bool(tables.live)
        globals().update(_TUNABLE if tuning else LAUNCHERS)
        if tuning == bool(tables.live):  # else another thread's block began or ended meanwhile
            return


tables.live.changed = _route
_route()
