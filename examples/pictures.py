"""What the examples draw: inputs, a transformer's grid over them, outputs; and the grid as training goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stn_triton import viz
from stn_triton.nn import SpatialTransformer

DPI = 60
PANEL = 1.0  # inches
INK = "#222222"


def draw_transformers(
    one: Tensor,
    several: Tensor,
    averaged: Tensor,
    transformers: Sequence[tuple[str, SpatialTransformer]],
    output: Path,
) -> None:
    """A PNG. For each named transformer the inputs with its grid over them, and below what comes out.

    Args:
        one: (K, 1, H, W), images of one kind.
        several: (K, 1, H, W), images of different kinds.
        averaged: (M, 1, H, W), images of one kind, of which the mean is shown.
        transformers: what are compared, and their names.
        output: the file.
    """
    images = torch.cat([one, several])
    columns = len(images) + 1
    figure, axes = _panels(2 * len(transformers), columns)
    for row, (name, transformer) in enumerate(transformers):
        with torch.no_grad():
            theta = transformer.localise(images)
            outputs = transformer.sample(images, theta)
            mean = transformer(averaged).mean(0)
        before, after = axes[2 * row], axes[2 * row + 1]
        for index in range(len(images)):
            _draw_grid(before[index], images[index], theta[index], transformer.transform)
            viz.draw_samples(outputs[index].cpu().clamp(0, 1), labels="", linewidth=1, ax=after[index])
        _show_mean(before[-1], averaged.mean(0))
        _show_mean(after[-1], mean)
        before[0].set_ylabel(f"{name}\ninput, grid", fontsize=9, color=INK)
        after[0].set_ylabel("output", fontsize=9, color=INK)
    axes[0][-1].set_title(f"mean of {len(averaged)}", fontsize=9, color=INK)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=1.6 * DPI)


def animate(
    images: Tensor,
    transformers: Sequence[tuple[str, SpatialTransformer, list[tuple[int, Tensor]]]],
    output: Path,
) -> None:
    """A GIF: the grids over the images, and the outputs, after some of the steps.

    Args:
        images: (K, 1, H, W).
        transformers: names, transformers, and for some steps the transformations of the images. All of the
            same steps.
        output: the file.
    """
    from PIL import Image

    frames = []
    for at, (step, _) in enumerate(transformers[0][2]):
        figure, axes = _panels(2 * len(transformers), len(images))
        for row, (name, transformer, kept) in enumerate(transformers):
            theta = kept[at][1].to(images.device)
            with torch.no_grad():
                outputs = transformer.sample(images, theta)
            for index in range(len(images)):
                before, after = axes[2 * row][index], axes[2 * row + 1][index]
                _draw_grid(before, images[index], theta[index], transformer.transform)
                viz.draw_samples(outputs[index].cpu().clamp(0, 1), labels="", linewidth=1, ax=after)
            axes[2 * row][0].set_ylabel(name, fontsize=9, color=INK)
        axes[0][0].set_title(f"step {step:,}", fontsize=9, color=INK, loc="left")
        figure.canvas.draw()
        frame = Image.fromarray(_pixels(figure)).convert("RGB")
        frames.append(frame.quantize(32))
    durations = [120] * (len(frames) - 1) + [2000]
    output.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(output, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)


def _panels(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws into memory: needs no display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * PANEL + 0.5, rows * PANEL + 0.3), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.subplots_adjust(
        0.5 / (columns * PANEL + 0.5), 0.01, 0.99, 1 - 0.25 / (rows * PANEL + 0.3), 0.06, 0.06
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure, axes


def _draw_grid(ax: Any, image: Tensor, theta: Tensor, kind: Any) -> None:
    viz.draw_grid(
        image.cpu(), theta.cpu(), kind, lines=6, labels=[""], linewidth=0.6, show_points=False, ax=ax
    )


def _show_mean(ax: Any, image: Tensor) -> None:
    ax.imshow((image / image.max())[0].cpu().numpy(), cmap="gray", vmin=0, vmax=1)


def _pixels(figure: Any) -> Any:
    import numpy

    return numpy.asarray(figure.canvas.buffer_rgba())[..., :3]
