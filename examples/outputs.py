"""What examples leave behind: a table beside the paper's, as Markdown and JSON, and a picture."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.machine import facts
from examples.files import replacing, write_json, write_text
from examples.training import Config
from stn_triton import viz
from stn_triton.nn import SpatialTransformer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Line(NamedTuple):
    """One row: a model's results with several seeds, and what the paper has."""

    name: str
    values: list[float]
    paper: str
    parameters: int | None = None
    seconds: float | None = None  # of training, the mean over seeds
    figures: Sequence[dict[str, float]] = ()  # all that were evaluated, for each seed
    warm_up: float = 0.0  # see Config


@functools.cache
def origin(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit at the first call, which is before training: the tree may change."""
    return facts(device)


def save_table(
    folder: Path,
    name: str,
    title: str,
    unit: str,
    lines: Sequence[Line],
    config: Config,
    paper: Config | None,
    source: str,
    settings: dict[str, Any],
    device: torch.device,
    *,
    notes: Sequence[str] = (),
) -> str:
    """Writes ``{name}.md`` and ``{name}.json``; returns the Markdown.

    Args:
        unit: of the values, the heading of their column.
        config, paper: what was run, and the paper's, if it has any; a shorter run is named so.
        source: of the data.
        settings: whatever else decided the numbers.
        notes: what else was found, a paragraph each.
    """
    described = origin(device)
    stand_in = "stand-in" in source
    title, theirs = (f"{title}: a stand-in", "the paper, on its data") if stand_in else (title, "the paper")
    rows = [f"| model | parameters | {unit} | {theirs} | training, s |", "|---|---|---|---|---|"]
    for line in lines:
        parameters = "" if line.parameters is None else f"{line.parameters:,}"
        seconds = "" if line.seconds is None else f"{line.seconds:.0f}"
        rows.append(f"| {line.name} | {parameters} | {spread(line.values)} | {line.paper} | {seconds} |")
    ran = f"{config.steps:,} iterations of {config.batch}"
    if paper is None:
        ran += ", for which the paper gives no schedule"
    elif config.steps < paper.steps or config.batch < paper.batch:
        ran += f", **run short of the paper's schedule** of {paper.steps:,} of {paper.batch}"
    seeds = max((len(line.values) for line in lines), default=0)
    told = "; ".join(f"{key} {value}" for key, value in settings.items())
    commit, mark, _ = described["commit"].partition("+")
    trained = [
        f"{ran}; {config.optimiser.upper()}, rate {config.lr:g}; {seeds} seed{'s' if seeds > 1 else ''}.",
        *warmed_up((line.name, line.warm_up) for line in lines),
    ]
    paragraphs = [
        *notes,
        " ".join(trained),
        f"Data: {source}." + (f" {told[:1].upper()}{told[1:]}." if told else ""),
        f"{described['device']}, {described['host_cores']} cores, PyTorch {described['torch']}, Triton "
        f"{described['triton']}, commit {commit[:12]}{mark}, {described['date'][:10]}. Seconds are of "
        "a machine that had other work too.",
    ]
    text = f"# {title}\n\n" + "\n".join(rows) + "\n\n" + "\n\n".join(paragraphs) + "\n"
    content = {
        "title": title,
        "unit": unit,
        "lines": [line._asdict() for line in lines],
        "config": asdict(config),
        "paper_config": paper and asdict(paper),
        "data": source,
        "settings": settings,
        "notes": list(notes),
        "facts": described,
    }
    write_text(folder / f"{name}.md", text)
    write_json(folder / f"{name}.json", content)
    return text


def warmed_up(shares: Iterable[tuple[str, float]]) -> list[str]:
    """Of models' names and ``Config.warm_up``, sentences: whose distortions grew during training."""
    names: dict[float, dict[str, None]] = {}
    for name, share in shares:
        if share:
            names.setdefault(share, {})[name] = None
    return [
        f"Distortions grow from none over the first {100 * share:g} % of the run for {', '.join(its)}."
        for share, its in sorted(names.items())
    ]


def spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "-"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


class Look(NamedTuple):
    """What one transformer did to a batch."""

    module: SpatialTransformer
    input: Tensor
    parameters: Tensor
    output: Tensor


def transformers_of(model: nn.Module) -> list[SpatialTransformer]:
    return [module for module in model.modules() if isinstance(module, SpatialTransformer)]


@torch.no_grad()
def looks(run: Callable[[], Any], model: nn.Module) -> list[Look]:
    """Of each transformer in the model, in the order in which ``run`` came to them."""
    found: list[Look] = []

    def note(module: SpatialTransformer, arguments: tuple[Tensor], output: Tensor) -> None:
        found.append(Look(module, arguments[0], module.localise(arguments[0]), output))

    hooks = [module.register_forward_hook(note) for module in transformers_of(model)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def visible(image: Tensor) -> Tensor:
    """(C, H, W) of any values -> (1, H, W) or (3, H, W) from 0 to 1; more channels as their mean."""
    image = image.detach().float().cpu()
    if image.shape[0] not in (1, 3):
        image = image.mean(0, keepdim=True)
    low, high = image.min(), image.max()
    return (image - low) / (high - low).clamp_min(1e-6)


class Panel(NamedTuple):
    """One column of a picture: an image with grids over it, and what came out."""

    image: Tensor  # (C, H, W)
    parameters: Tensor | None  # of one transformer, or (T, ...) of several
    outputs: Sequence[Tensor]  # T of (C, H, W)
    kind: viz.Kind = "affine"
    title: str = ""
    outlines: bool = (
        False  # of the parameters draw the borders alone; they need not be as many as the outputs
    )


def save_picture(path: Path, panels: Sequence[Panel], title: str, columns: int = 10) -> None:
    """A PNG: inputs with the transformers' grids, and below each what the transformers made of it."""
    with replacing(path) as part:
        _draw(panels, title, columns).savefig(part, dpi=80)


def save_animation(path: Path, frames: Sequence[tuple[str, Sequence[Panel]]], columns: int = 10) -> None:
    """A GIF of several such pictures, each a title and panels; the last one stays for a while."""
    import numpy
    from PIL import Image

    images = []
    for title, panels in frames:
        figure = _draw(panels, title, columns)
        figure.set_dpi(50)
        figure.canvas.draw()
        images.append(Image.fromarray(numpy.asarray(figure.canvas.buffer_rgba())).convert("RGB").quantize(32))
    durations = [150] * (len(images) - 1) + [2000]  # milliseconds
    with replacing(path) as part:
        images[0].save(
            part, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True
        )


def save_training(
    path: Path,
    snapshots: Sequence[tuple[int, Any]],
    panels: Callable[[Any], Sequence[Panel]],
    title: str,
    columns: int = 10,
) -> None:
    """A GIF of the transformers as training goes; none if there are no snapshots.

    Args:
        snapshots: steps, and what ``Task.snapshot`` kept at each; see :func:`parameters_of`.
        panels: what is to be drawn of that.
        title: of the frames, before the step.
    """
    frames = [(f"{title}, step {step:,}", panels(kept)) for step, kept in snapshots]
    if frames:
        save_animation(path, frames, columns)


def parameters_of(run: Callable[[], Any], model: nn.Module) -> list[Tensor]:
    """Of each transformer, (N, ...), on the CPU: what a snapshot keeps when all inputs are known."""
    return [look.parameters.cpu() for look in looks(run, model)]


def _draw(panels: Sequence[Panel], title: str, columns: int) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws into memory: needs no display
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    deep = 1 + max(len(panel.outputs) for panel in panels)
    rows = deep * -(-len(panels) // columns)
    figure = Figure(figsize=(1.25 * columns, 1.3 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for index, panel in enumerate(panels):
        top, column = deep * (index // columns), index % columns
        ax = axes[top, column]
        ax.set_axis_on()
        ax.set_title(panel.title, fontsize=7)
        if panel.parameters is None:
            viz.draw_samples(visible(panel.image), labels=(), linewidth=0, ax=ax)
        else:
            outlines = panel.outlines or len(panel.outputs) > 1
            single = panel.parameters.dim() == 2
            viz.draw_grid(
                visible(panel.image),
                panel.parameters.float(),
                panel.kind,
                lines=0 if outlines else 6,
                labels=[[]] * (1 if single else len(panel.parameters)),
                linewidth=1.5 if outlines else 0.6,
                show_points=False,
                ax=ax,
            )
        for at, output in enumerate(panel.outputs):
            ax = axes[top + 1 + at, column]
            ax.set_axis_on()
            color = viz.PALETTE[at % len(viz.PALETTE)]
            viz.draw_samples(visible(output), color=color, labels=(), linewidth=2, ax=ax)
    return figure
