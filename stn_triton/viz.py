"""Pictures of what a transform reads: the sampling grid over the image, and before and after.

Convention: every transform maps output coordinates to input coordinates. What is drawn over an image, the
input, is where the output's pixels are read from: the output's lines of constant x and y, its border, its
corners. Corners go clockwise from the output's upper left: 1, 2, 3, 4.

Needs matplotlib, ``pip install stn_triton[viz]``, which is imported by the functions that draw. They need no
display, and show nothing on their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from . import functional
from .checks import PaddingMode, check_bool, check_int, check_size, refuse, refuse_choice, refuse_type
from .transforms import identity

__all__ = ["PALETTE", "GridLines", "Kind", "draw_before_after", "draw_grid", "draw_samples", "grid_lines"]

Kind = Literal["affine", "attention", "similarity", "projective", "tps", "flow", "grid"]

# Okabe and Ito's colours, distinct for the colour-blind too; those that show on dark and bright come first.
PALETTE = ("#56B4E9", "#E69F00", "#F0E442", "#CC79A7", "#009E73", "#D55E00", "#0072B2")

_SHAPES = {
    "affine": "(2, 3)",
    "attention": "(2, 3)",
    "similarity": "(2, 3)",
    "projective": "(3, 3)",
    "tps": "(K, 2)",
    "flow": "(2, h, w)",
    "grid": "(h, w, 2)",
}
_INK = "#222222"
_STEPS = 192  # straight pieces of a line from border to border
_FAR = 100.0  # image sizes; farther out lines are left out


class GridLines(NamedTuple):
    """Where one transform reads, in pixels of the input, x first; 0 is the centre of the first pixel.

    Lines are interrupted by NaN where they cross a homography's horizon.
    """

    lines: list[Tensor]  # each (P, 2): lines of constant output x, then y, between those of the border
    border: Tensor  # (P, 2), once around the output, from its upper left clockwise and back
    corners: Tensor  # (4, 2), from the output's upper left clockwise
    points: Tensor  # (K, 2), where a spline's control points are read; (0, 2) for other kinds


# ----------------------------------------------------------------------------------------- coordinates
def grid_lines(
    image_size: Sequence[int],
    params: Tensor,
    kind: Kind = "affine",
    *,
    lines: int = 12,
    control_points: Tensor | None = None,
    regularization: float = 0.0,
    align_corners: bool = False,
) -> list[GridLines]:
    """The lines that :func:`draw_grid` draws, as coordinates: for other plotting libraries.

    Args:
        image_size: (H, W) of the input.
        params, kind, lines, control_points, regularization, align_corners: as in :func:`draw_grid`.

    Returns:
        One :class:`GridLines` for each of the T transforms; float64, on the CPU.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> (found,) = stn.viz.grid_lines((48, 64), torch.eye(2, 3))
        >>> found.corners[0]
        tensor([-0.5000, -0.5000], dtype=torch.float64)
    """
    params = _check_params(params, kind, control_points)
    if isinstance(control_points, Tensor):
        control_points = control_points.detach().cpu().double()
    lines, align_corners = check_int("lines", lines, 0), check_bool("align_corners", align_corners)
    height, width = check_size(image_size, "(H, W)", 2, "image_size")
    if min(height, width) < 1:
        refuse(ValueError, "image_size", "(H, W), both positive", (height, width))
    sizes = torch.tensor([width, height], dtype=torch.float64)

    def to_pixels(normalised: Tensor) -> Tensor:
        pixels = (normalised + 1) * (sizes - int(align_corners)) / 2 - (0.0 if align_corners else 0.5)
        return pixels.masked_fill((normalised.abs() > _FAR).any(-1, keepdim=True), float("nan"))

    if kind in ("flow", "grid"):
        if kind == "grid":
            pixels = to_pixels(params)
        else:
            size = params.shape[2:]
            start = functional.affine_grid(_eye(1), (1, 1, *size), align_corners)
            pixels = to_pixels(start) + params.movedim(1, -1)
        # Known at pixels alone: lines go through the centres of pixels, the border of the outermost.
        rows, columns = (
            torch.linspace(0, n - 1, max(lines, 1) + 1).round().long() for n in pixels.shape[1:3]
        )
        across, down = pixels[:, rows], pixels[:, :, columns].transpose(1, 2)
    else:
        # Points from border to border, evenly: as grids of aligned corners, whatever align_corners says.
        count = max(lines, 1) + 1

        def coordinates(size: tuple[int, int]) -> Tensor:
            shape = (len(params), 1, *size)
            if kind == "tps":
                grid = functional.tps_grid(params, shape, control_points, regularization, True)
            elif kind == "projective":
                grid = functional.projective_grid(params, shape, True)
                grid = _cut_at_horizon(grid, params)
            else:
                grid = functional.affine_grid(params, shape, True)
            return to_pixels(grid)

        across = coordinates((count, _STEPS + 1))
        down = coordinates((_STEPS + 1, count)).transpose(1, 2)
    points = to_pixels(params) if kind == "tps" else params.new_empty(len(params), 0, 2)

    result = []
    for rows, columns, controls in zip(across, down, points):
        sides = rows[0], columns[-1], rows[-1].flip(0), columns[0].flip(0)
        inner = [*columns[1:-1], *rows[1:-1]] if lines else []
        result.append(GridLines(inner, torch.cat(sides), torch.stack([side[0] for side in sides]), controls))
    return result


def _eye(n: int) -> Tensor:
    return identity(n, dtype=torch.float64)


def _cut_at_horizon(grid: Tensor, homography: Tensor) -> Tensor:
    """NaN on both sides of every step, along rows or columns, that crosses the horizon."""
    start = functional.affine_grid(_eye(1), (1, 1, *grid.shape[1:3]), True)
    xy1 = torch.cat([start, torch.ones_like(start[..., :1])], -1)
    behind = (xy1 * homography[:, None, None, 2]).sum(-1) < 0
    # Only the long direction is one of lines; the short one has no neighbours to speak of.
    dim = 1 if grid.shape[1] > grid.shape[2] else 2
    crossing = behind.diff(dim=dim)
    cut = torch.zeros_like(behind)
    cut.narrow(dim, 0, crossing.shape[dim]).logical_or_(crossing)
    cut.narrow(dim, 1, crossing.shape[dim]).logical_or_(crossing)
    return grid.masked_fill(cut.unsqueeze(-1), float("nan"))


# --------------------------------------------------------------------------------------------- drawing
def draw_grid(
    image: Tensor,
    params: Tensor,
    kind: Kind = "affine",
    *,
    lines: int = 12,
    control_points: Tensor | None = None,
    regularization: float = 0.0,
    align_corners: bool = False,
    colors: Sequence[Any] = PALETTE,
    labels: Sequence[Sequence[str]] | None = None,
    linewidth: float = 0.8,
    margin: float = 0.0,
    show_image: bool = True,
    show_points: bool = True,
    ax: Any = None,
) -> Any:
    """Draw over an image where a transform reads it: grid, control points, border, numbered corners.

    Convention: ``params`` map output coordinates to input coordinates. The border is the edge of the region
    that becomes the output; corner 1 becomes the output's upper left, 2 its upper right, and so on clockwise.

    Args:
        image: the input, (C, H, W) with C of 1 or 3, or (H, W): floating point from 0 to 1, or uint8. Only
            read. Any device.
        params: what one transform of this image has, or T of them. Any device, any floating dtype.

            ==================================== ========================= ==========================
            ``kind``                             one                       T, each in a colour
            ==================================== ========================= ==========================
            "affine", "attention", "similarity"  theta, (2, 3)             (T, 2, 3)
            "projective"                         homography, (3, 3)        (T, 3, 3)
            "tps"                                points, (K, 2)            (T, K, 2)
            "flow"                               pixels, (2, h, w)         (T, 2, h, w)
            "grid"                               coordinates, (h, w, 2)    (T, h, w, 2)
            ==================================== ========================= ==========================
        kind: what ``params`` are, see above.
        lines: into how many strips each direction is divided; 0 draws no lines but the border.
        control_points, regularization: for "tps", as in :func:`stn_triton.tps_grid_sample`.
        align_corners: as for the sampling.
        colors: of the transforms, in turn.
        labels: for each transform the labels of its corners, up to four. Default: 1 to 4; with T > 1 a, b,
            c ... in place of each 1. ``[""] * T`` draws none.
        linewidth: of the lines, in points. The border is thicker; 0 lines have a border as thin as a line.
        margin: how much of the surroundings to show at each side, as a share of the image.
        show_image: False draws over what the axes show already, in the image's pixels.
        show_points: whether to draw a spline's control points, at the places they are read from.
        ax: matplotlib axes. Default: those of a new figure of pyplot.

    Returns:
        The axes.

    What a homography puts on or near its horizon, or farther away than 100 images, is left out.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> image, theta = torch.rand(3, 48, 64), stn.transforms.attention(0.5, torch.zeros(2))
        >>> ax = stn.viz.draw_grid(image, theta, lines=8)
        >>> ax.figure.savefig("grid.png")
    """
    pixels = _check_image("image", image)
    found = grid_lines(
        pixels.shape[:2],
        params,
        kind,
        lines=lines,
        control_points=control_points,
        regularization=regularization,
        align_corners=align_corners,
    )
    labels = _check_labels(labels, len(found))
    if len(colors) == 0:
        refuse(ValueError, "colors", "one colour or more", repr(colors))
    effects, collections = _matplotlib("patheffects"), _matplotlib("collections")
    if ax is None:
        ax = _matplotlib("pyplot").subplots()[1]
    height, width = pixels.shape[:2]
    if show_image:
        _show(ax, pixels)
        ax.set_xlim(-0.5 - margin * width, width - 0.5 + margin * width)
        ax.set_ylim(height - 0.5 + margin * height, -0.5 - margin * height)
    ax.autoscale(False)
    outline = [effects.withStroke(linewidth=4.5 * linewidth, foreground="#00000090")]
    for index, (one, names) in enumerate(zip(found, labels)):
        color = colors[index % len(colors)]
        if lines:
            segments = [line.numpy() for line in one.lines]
            ax.add_collection(
                collections.LineCollection(segments, colors=color, linewidths=linewidth, alpha=0.85)
            )
            ax.plot(*one.border.T.numpy(), color=color, linewidth=2.5 * linewidth, path_effects=outline)
        else:
            ax.plot(*one.border.T.numpy(), color=color, linewidth=linewidth)
        if show_points and len(one.points):
            dots = {"markersize": 5, "markeredgecolor": _INK, "markeredgewidth": 0.8, "zorder": 4}
            ax.plot(*one.points.T.numpy(), "o", color=color, **dots)
        for name, (x, y) in zip(names, one.corners.tolist()):
            if x == x and y == y:
                _badge(ax, x, y, name, color, clip_on=True)
    return ax


def draw_samples(
    samples: Tensor,
    *,
    color: Any = PALETTE[0],
    labels: Sequence[str] = ("1", "2", "3", "4"),
    linewidth: float = 3.0,
    ax: Any = None,
) -> Any:
    """Draw a transform's output, framed and with the corners labelled as :func:`draw_grid` does.

    Args:
        samples: (C, H, W) with C of 1 or 3, or (H, W): floating point from 0 to 1, or uint8.
        color: of the frame.
        labels: of the corners, from the upper left clockwise, up to four.
        linewidth: of the frame, in points.
        ax: matplotlib axes. Default: those of a new figure of pyplot.

    Returns:
        The axes.

    Raises:
        ImportError, TypeError, ValueError: as :func:`draw_grid`.

    Example:
        >>> ax = stn.viz.draw_samples(torch.rand(3, 48, 64))
    """
    pixels = _check_image("samples", samples)
    (labels,) = _check_labels([labels], 1)
    transforms = _matplotlib("transforms")
    if ax is None:
        ax = _matplotlib("pyplot").subplots()[1]
    _show(ax, pixels)
    ax.spines[:].set(visible=True, color=color, linewidth=linewidth)
    inset = 11 / 72  # inches: as far from both sides
    for name, (x, y) in zip(labels, ((0, 1), (1, 1), (1, 0), (0, 0))):
        shift = transforms.ScaledTranslation(
            inset * (1 - 2 * x), inset * (1 - 2 * y), ax.figure.dpi_scale_trans
        )
        _badge(ax, x, y, name, color, transform=ax.transAxes + shift)
    return ax


def draw_before_after(
    image: Tensor,
    params: Tensor,
    kind: Kind = "affine",
    *,
    size: Sequence[int] | None = None,
    mode: str = "bilinear",
    padding_mode: PaddingMode = "zeros",
    control_points: Tensor | None = None,
    regularization: float = 0.0,
    align_corners: bool = False,
    figure: Any = None,
    **options: Any,
) -> Any:
    """The image with the grid over it, and beside it what the transform makes of it.

    Args:
        image, params, kind, control_points, regularization, align_corners: as in :func:`draw_grid`.
        size, mode, padding_mode: of the sampling, as in :func:`stn_triton.affine_grid_sample`. Flows and
            grids have a size of their own: leave out ``size``.
        figure: a matplotlib figure to draw in. Default: a new one of pyplot.
        options: further ones of :func:`draw_grid`: lines, colors, labels, linewidth, margin, show_points.

    Returns:
        The figure: the image at the left, at the right an output for each transform.

    Raises:
        ImportError, TypeError, ValueError: as :func:`draw_grid`.

    Example:
        >>> image, theta = torch.rand(3, 48, 64), stn.transforms.attention(0.5, torch.zeros(2))
        >>> figure = stn.viz.draw_before_after(image, theta, size=(64, 64))
    """
    pixels = torch.from_numpy(_check_image("image", image))
    one = _check_params(params, kind, control_points).float()
    count = len(one)
    if size is not None and kind in ("flow", "grid"):
        refuse(ValueError, "size", f"left out for {kind!r}, which has its own,", tuple(size))
    for name in ("ax", "show_image"):
        if name in options:
            refuse(TypeError, name, "left out", repr(options[name]))
    colors = options.get("colors", PALETTE)
    labels = _check_labels(options.get("labels"), count)
    input = pixels[None, None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)[None]
    modes: dict[str, Any] = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
    if kind in ("flow", "grid"):
        sampler: Any = functional.flow_grid_sample if kind == "flow" else functional.grid_sample
        outputs = sampler(input.expand(count, -1, -1, -1), one, **modes)
    elif kind == "projective":
        (outputs,) = functional.projective_grid_sample(input, one[None], size, **modes)
    elif kind == "tps":
        controls = None if control_points is None else control_points.detach().cpu().float()
        spline: dict[str, Any] = {"control_points": controls, "regularization": regularization}
        (outputs,) = functional.tps_grid_sample(input, one[None], size, **modes, **spline)
    else:
        (outputs,) = functional.affine_grid_sample(input, one[None], size, **modes)

    columns = max(1, round(count**0.5))
    rows = -(-count // columns)
    if figure is None:
        figure = _matplotlib("pyplot").figure(figsize=(9, 4.5), layout="constrained")
    before, after = figure.add_gridspec(1, 2)
    draw_grid(
        image,
        params,
        kind,
        control_points=control_points,
        regularization=regularization,
        align_corners=align_corners,
        ax=figure.add_subplot(before),
        **options,
    )
    tiles = after.subgridspec(rows, columns)
    for index, (output, names) in enumerate(zip(outputs, labels)):
        ax = figure.add_subplot(tiles[index])
        draw_samples(output, color=colors[index % len(colors)], labels=names, ax=ax)
    return figure


def _matplotlib(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ImportError("stn_triton.viz needs matplotlib: pip install stn_triton[viz]") from error


def _show(ax: Any, pixels: Any) -> None:
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _badge(ax: Any, x: float, y: float, text: str, color: Any, **options: Any) -> None:
    if not text:
        return
    circle = {"boxstyle": "circle,pad=0.22", "facecolor": color, "edgecolor": _INK, "linewidth": 0.8}
    centred = {"ha": "center", "va": "center", "fontsize": 8.5, "fontweight": "bold", "color": _INK}
    ax.text(x, y, text, bbox=circle, zorder=5, **centred, **options)


# ------------------------------------------------------------------------------------------ validation
def _check_image(name: str, image: Tensor) -> Any:
    """(H, W) or (H, W, 3) for matplotlib, float32 from 0 to 1."""
    if not isinstance(image, Tensor):
        refuse_type(name, image)
    if not image.is_floating_point() and image.dtype != torch.uint8:
        refuse(TypeError, name, "floating-point, or uint8,", image.dtype)
    if image.dim() not in (2, 3) or (image.dim() == 3 and image.shape[0] not in (1, 3)) or 0 in image.shape:
        expected = "one image, (C, H, W) with C of 1 or 3, or (H, W),"
        hint = f"{name}[0] is one of a batch" if image.dim() == 4 else ""
        if image.dim() == 3 and image.shape[-1] in (1, 3):
            hint = f"{name}.permute(2, 0, 1) has channels first"
        refuse(ValueError, name, expected, f"shape {tuple(image.shape)}", hint)
    pixels = image.detach().cpu().float() / (255 if image.dtype == torch.uint8 else 1)
    if image.dim() == 3:
        pixels = pixels[0] if image.shape[0] == 1 else pixels.permute(1, 2, 0)
    return pixels.nan_to_num().clamp(0, 1).numpy()


def _check_params(params: Tensor, kind: str, control_points: Tensor | None) -> Tensor:
    """(T, ...) in float64 on the CPU."""
    if kind not in get_args(Kind):
        refuse_choice("kind", kind, get_args(Kind))
    if not isinstance(params, Tensor):
        refuse_type("params", params)
    if not params.is_floating_point():
        refuse(TypeError, "params", "a floating-point tensor", params.dtype)
    single = params.dim() == _dims(kind)
    shape = tuple(params.shape if single else params.shape[1:])
    if not _fits(params, kind):
        kinds = ("affine", "projective", "tps", "flow", "grid")
        hint = " or ".join(f"kind={other!r}" for other in kinds if _fits(params, other))
        one = _SHAPES[kind]
        expected = f"{one} or (T, {one[1:]} for kind {kind!r}"
        refuse(
            ValueError,
            "params",
            f"{expected}{' with K >= 3' if kind == 'tps' else ''},",
            f"shape {tuple(params.shape)}",
            hint,
        )
    if control_points is not None and kind != "tps":
        refuse(ValueError, "control_points", f"left out for kind {kind!r}", "a tensor")
    if kind == "tps" and control_points is None and round(shape[0] ** 0.5) ** 2 != shape[0]:
        expected = "a square number of points, as no control_points are given,"
        refuse(ValueError, "params", expected, f"{shape[0]} of them")
    params = params.detach().cpu().double()
    return params.unsqueeze(0) if single else params


def _dims(kind: str) -> int:
    """Of one transform's parameters."""
    return 3 if kind in ("flow", "grid") else 2


def _fits(params: Tensor, kind: str) -> bool:
    """Whether the shape is that of one transform of the kind, or of several."""
    dims = _dims(kind)
    if params.dim() not in (dims, dims + 1) or 0 in params.shape:
        return False
    shape = tuple(params.shape[-dims:])
    return {
        "projective": shape == (3, 3),
        "tps": shape[1:] == (2,) and shape[0] >= 3,
        "flow": shape[:1] == (2,),
        "grid": shape[2:] == (2,),
    }.get(kind, shape == (2, 3))


def _check_labels(labels: Sequence[Sequence[str]] | None, count: int) -> list[Sequence[str]]:
    if labels is None:
        first = ["1"] if count == 1 else [chr(ord("a") + index % 26) for index in range(count)]
        return [[name, "2", "3", "4"] for name in first]
    if len(labels) != count or any(len(names) > 4 for names in labels):
        refuse(ValueError, "labels", f"{count} sequences of up to 4 labels", repr(labels))
    return list(labels)
