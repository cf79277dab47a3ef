"""Pictures of a run, from its results alone: ``python -m bench.plot DIR/results.json [--out DIR]``.

``bars``: for each row's first case the bandwidth that every rival reaches, ours last, beside the copy's.
``roofline``: the bandwidth of all cases over the bytes that they move; the roof is the copy's bandwidth and,
for few bytes, the time of the shortest kernel. Bandwidth is the fewest bytes a case can move over its time.
Each as SVG and PNG, the run's conditions below.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stn_triton.kernels.host.files import replacing

from .results import Entry, Results, conditions, load

# In the order of the bars, ours last. Distinct in grey as well, ours the darkest.
COLOURS = {
    "torchvision": "#dfc8e0",
    "flag_gems": "#c4b5a5",
    "kornia": "#f0c27b",
    "half grid": "#d9d9d9",
    "autocast": "#b8d8d8",
    "grid_sample alone": "#9fb8ad",
    "cudnn": "#a6c8e8",
    "eager": "#7ba7cc",
    "compiled": "#e08f62",
    "ours": "#7b1e3b",
}
BAR = 0.13  # inches
GAP = 1.3  # bars
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "svg.hashsalt": "stn_triton",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def bandwidths(entry: Entry) -> dict[str, float]:
    """GB/s by name, of those that were timed."""
    if not entry.bytes:
        return {}
    times = entry.times()
    return {name: entry.bytes / (times[name] * 1e-3) / 1e9 for name in COLOURS if name in times}


def firsts(results: Results) -> list[Entry]:
    """Of each row the first case that was timed."""
    found = []
    for row in results.rows:
        timed = (entry for entry in results.entries if entry.row == row and "ours" in entry.times())
        found += [entry for entry in [next(timed, None)] if entry is not None]
    return found


def shape_of(entry: Entry) -> str:
    case = entry.case
    words = ["×".join(map(str, case["shape"])), case["dtype"]]
    if list(case["size"]) != list(case["shape"][2:]):
        words.insert(1, "to " + "×".join(map(str, case["size"])))
    return ", ".join(words + ["channels_last"] * case["channels_last"])


def factors(entry: Entry) -> str:
    """How many times as fast as PyTorch and its compiler ours is."""
    speedups = entry.speedups()
    return ", ".join(f"{speedups[name]:.1f}× {name}" for name in ("eager", "compiled") if name in speedups)


def bars(results: Results) -> Figure:
    entries = firsts(results)
    counts = [len(bandwidths(entry)) for entry in entries]
    height = BAR * (sum(counts) + GAP * len(entries)) + 1.2
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    place, labels, drawn = 0.0, [], set()
    for entry in entries:
        found = bandwidths(entry)
        middle = place + (len(found) - 1) / 2
        labels.append((middle, f"{results.rows[entry.row]['title']}\n{shape_of(entry)}"))
        for name, value in found.items():
            axes.barh(place, value, 0.9, color=COLOURS[name])
            drawn.add(name)
            place += 1
        told = axes.text(found["ours"], place - 1, f" {factors(entry)}", va="center", fontsize=7)
        told.set(color=COLOURS["ours"], bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        place += GAP
    axes.set_yticks([middle for middle, _ in labels], [text for _, text in labels], fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(place - 1, 0), -1)
    axes.margins(x=0.2)
    if results.roof:
        axes.axvline(results.roof / 1e9, color="black", linewidth=0.8, linestyle="--", zorder=0, label="copy")
    axes.set_xlabel("fewest bytes / time, GB/s")
    for name in COLOURS:  # in their order, whichever was drawn first
        if name in drawn:
            axes.barh(0, 0, color=COLOURS[name], label=name)
    if entries:
        _legend(axes)
    return _finish(figure, results)


def roofline(results: Results) -> Figure:
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    points = [
        (entry.bytes, name, value) for entry in results.entries for name, value in bandwidths(entry).items()
    ]
    for name, colour in COLOURS.items():
        chosen = [(size, value) for size, other, value in points if other == name and size]
        if chosen:
            ours = name == "ours"
            size, edge = (30, "white") if ours else (16, "none")
            across, up = zip(*chosen)
            axes.scatter(across, up, s=size, color=colour, edgecolor=edge, linewidth=0.5, label=name)
    if points and results.roof:
        sizes = [size for size, _, _ in points if size]
        low, high = min(sizes) / 2, max(sizes) * 2
        line = [low * (high / low) ** (k / 200) for k in range(201)]
        axes.plot(line, [_roof(results, size) for size in line], color="black", linewidth=0.8, label="roof")
        axes.set_xlim(low, high)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("fewest bytes that the case moves")
    axes.set_ylabel("fewest bytes / time, GB/s")
    axes.grid(True, which="major", color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)
    if points:
        _legend(axes)
    return _finish(figure, results)


def _roof(results: Results, size: float) -> float:
    """GB/s that a kernel which moves so many bytes can reach."""
    assert results.roof is not None
    by_floor = size / (results.floor * 1e-3) if results.floor else math.inf
    return min(results.roof, by_floor) / 1e9


def _legend(axes: Axes) -> None:
    axes.figure.legend(loc="outside upper center", ncols=6, frameon=False)


def _finish(figure: Figure, results: Results) -> Figure:
    figure.supxlabel(conditions(results), fontsize=6.5, color="#555555")
    return figure


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes the pictures; their paths."""
    written = []
    with plt.rc_context(STYLE):
        for name, make in (("bars", bars), ("roofline", roofline)):
            figure = make(results)
            for suffix in ("svg", "png"):
                path = folder / f"{name}.{suffix}"
                metadata = {"Date": None} if suffix == "svg" else {"Software": None}
                with replacing(path) as part:
                    figure.savefig(part, dpi=160, metadata=metadata)
                written.append(path)
            plt.close(figure)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="a results.json of bench.sweep")
    parser.add_argument(
        "--out", type=Path, help="the folder for the pictures; where the results are by default"
    )
    options = parser.parse_args(arguments)
    if not options.results.exists():
        print(f"no {options.results}: make sweep writes it", file=sys.stderr)
        return 2
    for path in draw(load(options.results), options.out or options.results.parent):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
