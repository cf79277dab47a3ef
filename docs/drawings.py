"""Draws the pictures of the documentation, light and dark: ``python docs/drawings.py``, into docs/images/.

Needs matplotlib and scikit-image. What a transform reads is drawn by ``stn.viz`` and sampled by the package.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from skimage import data as photographs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import stn_triton as stn
from stn_triton import viz

IMAGES = Path(__file__).resolve().parent / "images"
BLUE, ORANGE, YELLOW, PINK, GREEN, RED, DEEP = viz.PALETTE
THEMES = {  # ink, paper, faint lines, and an accent that shows on the paper
    "light": {
        "ink": "#222222",
        "paper": "#ffffff",
        "faint": "#b0b0b0",
        "accent": "#0072B2",
        "warm": "#B35900",
    },
    "dark": {
        "ink": "#dddddd",
        "paper": "#131416",
        "faint": "#666666",
        "accent": "#56B4E9",
        "warm": "#E69F00",
    },
}
ink = paper = faint = accent = warm = ""  # of the theme at hand
DRAWINGS: dict[str, Callable[[], Any]] = {}


def drawing(function: Callable[[], Any]) -> Callable[[], Any]:
    DRAWINGS[function.__name__] = function
    return function


def photograph(side: int = 112) -> torch.Tensor:
    """(3, side, side), NASA's portrait of Eileen Collins, in the public domain."""
    pixels = torch.from_numpy(photographs.astronaut()[:256, 100:356].copy()).permute(2, 0, 1)
    image = pixels[None].float() / 255
    return torch.nn.functional.interpolate(image, (side, side), mode="area")[0]


def panels(count: int, width: float, height: float, **options: Any) -> Any:
    figure, axes = plt.subplots(1, count, figsize=(width, height), layout="constrained", **options)
    return figure, (axes if count > 1 else [axes])


def bare(ax: Any, title: str = "") -> None:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=10, color=ink)


def arrow(ax: Any, start: Any, end: Any, color: str, **options: Any) -> None:
    shape = {"arrowstyle": "-|>", "mutation_scale": 12, "linewidth": 1.6, "color": color} | options
    ax.add_patch(FancyArrowPatch(start, end, **shape))


@drawing
def start() -> Any:
    theta = stn.transforms.similarity(0.5, math.radians(20), torch.zeros(2))
    figure = plt.figure(figsize=(5.2, 2.7), layout="constrained")
    return viz.draw_before_after(photograph(), theta, size=(112, 112), lines=8, figure=figure)


@drawing
def map() -> Any:
    """One output pixel, the place it is read at, and the four pixels around that."""
    image = photograph(16)
    theta = stn.transforms.similarity(0.5, math.radians(20), torch.tensor([0.1, -0.1]))
    out = 8
    output = stn.affine_grid_sample(image[None], theta[None], (out, out))[0]
    figure, (left, right) = panels(2, 5.2, 3.1)
    viz.draw_grid(image, theta, lines=out, labels=[["1", "2", "3", "4"]], ax=left)
    viz.draw_samples(output, ax=right)
    left.set_title("input, 16 x 16", fontsize=10, color=ink)
    right.set_title("output, 8 x 8", fontsize=10, color=ink)
    column, row = 5, 2
    right.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2.5))
    x, y = (2 * column + 1) / out - 1, (2 * row + 1) / out - 1
    place = (theta @ torch.tensor([x, y, 1.0]) + 1) * 16 / 2 - 0.5
    px, py = place.tolist()
    corner = math.floor(px) - 0.5, math.floor(py) - 0.5
    left.add_patch(Rectangle(corner, 2, 2, fill=False, edgecolor=ORANGE, linewidth=2.5, zorder=5))
    left.plot([px], [py], "o", color=ORANGE, markeredgecolor="#222222", markersize=6, zorder=6)
    joined = {"coordsA": "data", "coordsB": "data", "axesA": right, "axesB": left}
    from matplotlib.patches import ConnectionPatch

    line = ConnectionPatch(
        (column - 0.5, row),
        (px + 0.25, py),
        **joined,
        color=ORANGE,
        arrowstyle="-|>",
        mutation_scale=16,
        linewidth=2,
        connectionstyle="arc3,rad=0.25",
        zorder=9,
    )
    figure.add_artist(line)
    figure.supxlabel(
        "theta takes the output pixel's place to the input;\nthe four pixels there are mixed",
        fontsize=9,
        color=ink,
    )
    return figure


@drawing
def coordinates() -> Any:
    """Pixels and normalised coordinates of an axis of four pixels, both ways."""
    figure, axes = plt.subplots(2, 1, figsize=(5.0, 3.4), layout="constrained")
    shades = ("#3a6ea5", "#7aa6c2", "#d9a25f", "#b5651d")
    for ax, align in zip(axes, (False, True)):
        low, high = (0.0, 3.0) if align else (-0.5, 3.5)
        for pixel, shade in enumerate(shades):
            ax.add_patch(Rectangle((pixel - 0.5, 0), 1, 0.8, facecolor=shade, edgecolor=paper, linewidth=1.5))
            ax.plot([pixel], [0.4], "o", color="white", markersize=4)
            ax.text(pixel, 0.95, f"{pixel}", ha="center", va="bottom", fontsize=9, color=ink)
        ax.text(-0.95, 0.95, "pixels", ha="right", va="bottom", fontsize=9, color=ink)
        ax.plot([low, high], [-0.28, -0.28], color=accent, linewidth=1.6)
        for value in (-1, -0.5, 0, 0.5, 1):
            at = low + (value + 1) / 2 * (high - low)
            ax.plot([at, at], [-0.4, -0.16], color=accent, linewidth=1.6)
            ax.text(at, -0.5, f"{value:g}", ha="center", va="top", fontsize=9, color=accent)
        for at in (low, high):
            ax.plot([at, at], [-0.16, 0.9], color=accent, linewidth=1, linestyle=":")
        ax.text(-0.95, -0.5, "normalised", ha="right", va="top", fontsize=9, color=accent)
        bare(ax)
        ax.set_title(f"align_corners={align}", fontsize=10, color=ink, family="monospace")
        ax.set(xlim=(-2.0, 3.9), ylim=(-1.0, 1.4))
    return figure


@drawing
def entries() -> Any:
    """What each entry of theta does to the window that is read."""
    image = photograph(80)
    matrices = {
        "[[0.5, 0, 0],\n [0, 0.5, 0]]\nhalf as large": [[0.5, 0, 0], [0, 0.5, 0]],
        "[[0.5, 0, 0.4],\n [0, 0.5, -0.3]]\nright and up": [[0.5, 0, 0.4], [0, 0.5, -0.3]],
        "[[0.5, -0.2, 0],\n [0.2, 0.5, 0]]\nturned": [[0.5, -0.2, 0], [0.2, 0.5, 0]],
        "[[-0.5, 0, 0],\n [0, 0.5, 0]]\nmirrored": [[-0.5, 0, 0], [0, 0.5, 0]],
    }
    figure, axes = plt.subplots(2, 4, figsize=(5.8, 3.7), layout="constrained")
    for (title, matrix), above, below in zip(matrices.items(), *axes):
        theta = torch.tensor(matrix)
        viz.draw_grid(image, theta, lines=4, ax=above)
        viz.draw_samples(stn.affine_grid_sample(image[None], theta[None])[0], ax=below, linewidth=2)
        above.set_title(title, fontsize=8, color=ink, family="monospace")
    return figure


@drawing
def padding() -> Any:
    image = photograph(80)
    theta = stn.transforms.attention(2.0, torch.zeros(2))
    figure, axes = panels(4, 6.9, 2.05)
    for ax, mode in zip(axes, ("zeros", "border", "reflection", "circular")):
        output = stn.affine_grid_sample(image[None], theta[None], padding_mode=mode)[0]
        viz.draw_samples(output, ax=ax, labels=(), linewidth=1, color=faint)
        ax.add_patch(Rectangle((19.5, 19.5), 40, 40, fill=False, edgecolor=BLUE, linewidth=2))
        ax.set_title(f'"{mode}"', fontsize=10, color=ink, family="monospace")
    return figure


@drawing
def interpolation() -> Any:
    image = photograph(24)
    theta = stn.transforms.attention(0.3, torch.tensor([0.05, -0.2]))
    figure, axes = panels(3, 5.2, 2.05)
    for ax, mode in zip(axes, ("nearest", "bilinear", "bicubic")):
        output = stn.affine_grid_sample(image[None], theta[None], (96, 96), mode)[0]
        viz.draw_samples(output, ax=ax, labels=(), linewidth=1, color=faint)
        ax.set_title(f'"{mode}"', fontsize=10, color=ink, family="monospace")
    return figure


@drawing
def antialias() -> Any:
    """A zone plate, whose rings get finer outwards, and a photograph: shrunk, without averaging and with."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 288)] * 2, indexing="ij")
    plate = (0.5 + 0.5 * torch.cos(math.pi / 2 * 144 * (x * x + y * y))).expand(3, -1, -1)
    theta = stn.transforms.similarity(1.0, math.radians(8), torch.zeros(2))
    figure, axes = panels(4, 6.9, 2.05)
    for pair, image, size in ((axes[:2], plate, (72, 72)), (axes[2:], photograph(256), (48, 48))):
        for ax, on in zip(pair, (False, True)):
            output = stn.affine_grid_sample(image[None], theta[None], size, antialias=on)[0]
            viz.draw_samples(output, ax=ax, labels=(), linewidth=1, color=faint)
            ax.set_title(f"antialias={on}", fontsize=10, color=ink, family="monospace")
    return figure


@drawing
def kinds() -> Any:
    """A matrix, a homography, a spline, a flow: grid above, output below."""
    torch.manual_seed(3)
    image = photograph(88)
    points = 0.8 * stn.transforms.control_lattice(4) + 0.1 * torch.randn(16, 2)
    y, x = torch.meshgrid(*[torch.arange(88.0)] * 2, indexing="ij")
    flow = torch.stack([4 * (y / 7).sin(), 4 * (x / 7).sin()])
    homography = torch.tensor([[0.75, 0.1, 0.0], [0.0, 0.65, 0.0], [0.0, 0.35, 1.0]])
    theta = torch.tensor([[0.6, -0.3, 0.0], [0.15, 0.5, 0.0]])
    chosen = {
        "affine": (theta, stn.affine_grid_sample(image[None], theta[None])),
        "projective": (homography, stn.projective_grid_sample(image[None], homography[None])),
        "tps": (points, stn.tps_grid_sample(image[None], points[None])),
        "flow": (flow, stn.flow_grid_sample(image[None], flow[None], padding_mode="border")),
    }
    figure, axes = plt.subplots(2, 4, figsize=(5.6, 3.1), layout="constrained")
    for (kind, (params, output)), above, below, color in zip(chosen.items(), *axes, viz.PALETTE):
        viz.draw_grid(image, params, kind, lines=8, labels=[[]], colors=(color,), ax=above)
        viz.draw_samples(output[0], color=color, labels=(), linewidth=2, ax=below)
        above.set_title(f"{kind}", fontsize=10, color=ink)
    return figure


@drawing
def parts() -> Any:
    """The paper's three parts, and what one kernel does of them."""
    figure, (ax,) = panels(1, 5.6, 2.6)
    ax.set(xlim=(0, 13.6), ylim=(0, 5.4))
    bare(ax)

    def box(x: float, y: float, width: float, text: str, color: str) -> None:
        shape = {"boxstyle": "round,pad=0.1,rounding_size=0.15", "linewidth": 1.6}
        ax.add_patch(FancyBboxPatch((x, y), width, 1.1, facecolor=paper, edgecolor=color, **shape))
        ax.text(x + width / 2, y + 0.55, text, ha="center", va="center", fontsize=8.5, color=ink)

    box(0.2, 0.6, 1.7, "input", ink)
    box(1.6, 3.6, 3.0, "1  localisation\nnet", accent)
    box(6.6, 3.6, 2.4, "2  grid\ngenerator", warm)
    box(8.9, 0.6, 2.2, "3  sampler", warm)
    box(11.8, 0.6, 1.6, "output", ink)
    arrow(ax, (1.1, 1.8), (2.2, 3.5), ink)
    arrow(ax, (4.7, 4.15), (6.5, 4.15), ink)
    ax.text(5.35, 4.35, "theta", ha="center", fontsize=8.5, color=ink, family="monospace")
    arrow(ax, (9.1, 3.9), (9.9, 1.85), ink)
    ax.text(9.55, 3.3, "coordinates", fontsize=8.5, color=ink)
    arrow(ax, (2.1, 1.15), (8.8, 1.15), ink)
    arrow(ax, (11.2, 1.15), (11.7, 1.15), ink)
    shape = {"boxstyle": "round,pad=0.1,rounding_size=0.3", "linewidth": 1.2, "linestyle": "--"}
    ax.add_patch(FancyBboxPatch((6.15, 0.25), 5.35, 4.85, facecolor="none", edgecolor=warm, **shape))
    ax.text(6.35, 2.3, "one kernel:\nno grid in memory", fontsize=8.5, color=warm, va="center")
    return figure


def save(figure: Any, name: str, theme: str) -> None:
    """An SVG of text and lines, with pictures inside as PNG; the same bytes each time."""
    figure.savefig(
        IMAGES / f"{name}-{theme}.svg",
        facecolor="none",
        bbox_inches="tight",
        pad_inches=0.04,
        metadata={"Date": None},
    )
    plt.close(figure)


def main() -> None:
    matplotlib.use("Agg")
    IMAGES.mkdir(exist_ok=True)
    for theme, colors in THEMES.items():
        globals().update(colors)
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": "stn_triton",
                "image.interpolation": "none",
                "text.color": ink,
                "axes.facecolor": "none",
            }
        )
        for name, draw in DRAWINGS.items():
            if not sys.argv[1:] or name in sys.argv[1:]:
                save(draw(), name, theme)


if __name__ == "__main__":
    main()
