"""What a training step takes with PyTorch's samplers and with ours: ``python -m examples.samplers``.

Forward and backward pass of each experiment's net with affine or attention transformers, at the paper's
sizes, counted and not run: tensors have shapes and no values (PyTorch's "meta" device). No times: those take
a GPU.

Counted are operators that PyTorch's dispatcher sees and that write memory; tensors that autograd keeps for
the backward pass; and the most that lives at once of what the step makes, gradients included. What an
operator allocates inside, for itself, is not seen: ``affine_grid``'s base grid, and the scratch of both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stn_triton as stn
from examples import birds_models, colocalisation, extruded_digits, mnist_addition, models
from examples.files import replacing, write_json, write_text
from examples.outputs import origin
from examples.svhn_models import sequence_loss, svhn_net

MEGABYTE = 1e6


class Counts(NamedTuple):
    operators: int
    kept: int  # bytes for the backward pass
    peak: int  # bytes


class Experiment(NamedTuple):
    """``make``: of a batch's size, a model, and a function from it to the loss, whose data are on "meta"."""

    name: str
    batch: int
    make: Callable[[int], tuple[nn.Module, Callable[[nn.Module], Tensor]]]


def sampled_by_torch(
    input: Tensor,
    theta: Tensor,
    size: Sequence[int] | None = None,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
    antialias: bool = False,
    fill: object = None,
) -> Tensor:
    """``stn_triton.affine_grid_sample`` by PyTorch's two functions, on a grid. Several transforms of
    an image have a copy of it each: PyTorch's sampler has one grid for one image."""
    if antialias:
        raise ValueError("antialias must be False: PyTorch's sampler averages nothing")
    if fill is not None:
        raise ValueError("fill must be None: PyTorch's sampler has no other than 0")
    size = tuple(size or input.shape[2:])
    several = theta.dim() == 4
    if several:
        count = theta.shape[1]
        theta = theta.flatten(0, 1)
        input = input.repeat_interleave(count, 0)
    elif len(theta) != len(input):
        raise ValueError(f"theta must have a batch of {len(input)}, got {len(theta)}")
    grid = F.affine_grid(theta, [len(theta), input.shape[1], *size], align_corners)
    output = F.grid_sample(input, grid, mode, padding_mode, align_corners)
    return output.unflatten(0, (-1, count)) if several else output


@contextmanager
def torch_samplers() -> Iterator[None]:
    """Inside, affine and attention transformers and the examples sample by PyTorch's functions."""
    with (
        mock.patch.object(stn, "affine_grid_sample", sampled_by_torch),
        mock.patch.object(stn.nn, "affine_grid_sample", sampled_by_torch),
    ):
        yield


class _Step(TorchDispatchMode):
    """Counts while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.peak = self.kept = 0
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}  # and alive
        self.saved: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {_storage(one) for one in _tensors((args, kwargs))}
        fresh = [one for one in _tensors(result) if _storage(one) not in before and _bytes(one)]
        self.operators += bool(fresh) or func._schema.is_mutable
        self.made = {key: one for key, one in self.made.items() if not one[0].expired()}
        for one in fresh:
            self.made[_storage(one)] = StorageWeakRef(one.untyped_storage()), _bytes(one)
        self.peak = max(self.peak, sum(size for _, size in self.made.values()))
        return result

    def keep(self, tensor: Tensor) -> Tensor:
        """Autograd's hook for what it saves. A storage counts once, and only if the step made it."""
        key = _storage(tensor)
        if key in self.made and not self.made[key][0].expired() and key not in self.saved:
            self.saved.add(key)  # alive until the backward pass: no other can have its place
            self.kept += self.made[key][1]
        return tensor


def _tensors(tree: Any) -> list[Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def count(step: Callable[[], Tensor]) -> Counts:
    """Of the forward pass that gives a loss, and its backward pass."""
    counting = _Step()
    with counting, torch.autograd.graph.saved_tensors_hooks(counting.keep, lambda tensor: tensor):
        step().backward()
    return Counts(counting.operators, counting.kept, counting.peak)


# ------------------------------------------------------------------------------------- the experiments
def _classifying(
    build: Callable[[], nn.Module], *shape: int
) -> Callable[[int], tuple[nn.Module, Callable[[nn.Module], Tensor]]]:
    def make(batch: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        images, labels = (
            torch.empty(batch, *shape, device="meta"),
            torch.empty(batch, dtype=torch.long, device="meta"),
        )
        return build(), lambda model: F.cross_entropy(model(images), labels)

    return make


def _reading(kind: str) -> Callable[[int], tuple[nn.Module, Callable[[nn.Module], Tensor]]]:
    def make(batch: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        images, labels = (
            torch.empty(batch, 3, 64, 64, device="meta"),
            torch.empty(batch, 5, dtype=torch.long, device="meta"),
        )
        return svhn_net(kind, 64), lambda model: sequence_loss(model(images), labels)

    return make


def _finding(batch: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    images, others = torch.empty(batch, 1, 84, 84, device="meta"), torch.empty(batch, 64, device="meta")
    encode = nn.Sequential(  # the encoder's shape
        *(nn.Conv2d(1, 12, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 24, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(24 * 4 * 4, 64), nn.ReLU()),
    ).to("meta")
    encode.requires_grad_(False)

    def loss(model: nn.Module) -> Tensor:
        crops = stn.affine_grid_sample(images, model(images), (colocalisation.CROP,) * 2)
        return colocalisation.triplet_hinge(encode(crops), others)

    return colocalisation.make_model(), loss


def experiments() -> list[Experiment]:
    """At the paper's sizes. Birds' trunk is the built-in one."""
    rts = _classifying(lambda: models.build_classifier("ST-CNN-Aff", 42, halved=True), 1, 42, 42)
    addition = _classifying(
        lambda: mnist_addition.make_model(mnist_addition.KINDS["2xST-FCN affine"]), 2, 42, 42
    )
    solids = _classifying(
        lambda: extruded_digits.make_model(60, True, extruded_digits.PARAMETERS), 1, 60, 60, 60
    )
    birds = _classifying(lambda: birds_models.PartsNet(birds_models.BuiltInTrunk(), 200, 4), 3, 448, 448)
    return [
        Experiment("Distorted MNIST, ST-CNN affine, RTS", 256, rts),
        Experiment("Addition, 2xST-FCN affine", 256, addition),
        Experiment("Co-localisation", 100, _finding),
        Experiment("3-D, 60 x 60 x 60 voxels", 32, solids),
        Experiment("SVHN, ST-CNN Single, 64 px", 128, _reading("ST-CNN Single")),
        Experiment("SVHN, ST-CNN Multi, 64 px", 128, _reading("ST-CNN Multi")),
        Experiment("Birds, 4xST-CNN, 448 px", 32, birds),
    ]


def compare(experiment: Experiment) -> tuple[Counts, Counts]:
    """With PyTorch's samplers, and with this package's."""
    found = []
    for samplers in (torch_samplers, _ours):
        model, loss = experiment.make(experiment.batch)
        model.to("meta").train()
        with samplers():
            found.append(count(lambda: loss(model)))  # noqa: B023
    return found[0], found[1]


@contextmanager
def _ours() -> Iterator[None]:
    yield


# ------------------------------------------------------------------------------------------ the results
def table(rows: Sequence[tuple[Experiment, Counts, Counts]]) -> str:
    """Markdown; PyTorch's, an arrow, this package's."""
    lines = [
        "| a step in float32 | batch | operators | kept for the backward pass, MB | most at once, MB |",
        "|---|---|---|---|---|",
    ]
    for experiment, theirs, ours in rows:
        memory = (
            f"{before / MEGABYTE:.1f} → {after / MEGABYTE:.1f}"
            for before, after in ((theirs.kept, ours.kept), (theirs.peak, ours.peak))
        )
        operators = f"{theirs.operators} → {ours.operators}"
        lines.append(f"| {experiment.name} | {experiment.batch} | {operators} | {' | '.join(memory)} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[tuple[Experiment, Counts, Counts]], path: Path) -> None:
    """What a step has at most at once, with PyTorch's samplers as 100 %."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    names = [f"{experiment.name}\n{theirs.peak / MEGABYTE:.0f} MB" for experiment, theirs, _ in rows]
    kinds = ("most at once", "peak", "#0072b2"), ("kept for the backward pass", "kept", "#56b4e9")
    for offset, (label, field, color) in zip((-0.2, 0.2), kinds):
        shares = [100 * getattr(ours, field) / getattr(theirs, field) for _, theirs, ours in rows]
        places = [place + offset for place in range(len(rows))]
        bars = ax.barh(places, shares, 0.38, label=label, color=color)
        ax.bar_label(bars, [f"{share:.0f} %" for share in shares], padding=3, fontsize=8)
    ax.axvline(100, color="black", linewidth=1)
    ax.set_yticks(range(len(rows)), names, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 115)
    ax.set_xlabel("memory of a training step, % of that with PyTorch's samplers", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *ax.get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8, frameon=False
    )
    with replacing(path) as part:
        figure.savefig(part, dpi=80)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.samplers", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("build/samplers"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    rows = [(one, *compare(one)) for one in experiments()]
    text = table(rows)
    write_text(options.output / "samplers.md", text)
    described = origin(torch.device("cpu"))
    content = {
        "rows": [
            {
                "experiment": one.name,
                "batch": one.batch,
                "torch": theirs._asdict(),
                "stn_triton": ours._asdict(),
            }
            for one, theirs, ours in rows
        ],
        "facts": {key: described[key] for key in ("torch", "triton", "commit", "date")},
    }
    write_json(options.output / "samplers.json", content)
    draw(rows, options.output / "samplers.png")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
