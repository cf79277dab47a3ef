"""House numbers: ``python -m examples.svhn``; with ``--step-time`` or ``--counts`` what a step costs.

A CNN that reads up to five digits at once, with no transformer, with one before all, and with four, three of
them on feature maps (Jaderberg et al., 2015, section 4.2). Data are the official files under ``--svhn``, or a
stand-in made of MNIST over photographs, which results name as such.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stn_triton as stn
from bench.machine import facts
from bench.timing import own_stream, time_device
from examples.data import load_mnist
from examples.files import write_json, write_text
from examples.models import count
from examples.outputs import (
    Panel,
    looks,
    parameters_of,
    save_picture,
    save_table,
    save_training,
    transformers_of,
)
from examples.runs import config_of, error, parser_of, run_seeds, sizes
from examples.svhn_cost import cost_table
from examples.svhn_data import (
    LENGTH,
    MARGIN,
    NONE,
    Sequences,
    load_cropped_digits,
    load_full_numbers,
    make_stand_in,
)
from examples.svhn_models import KINDS, TorchTransformer, sequence_errors, sequence_loss, svhn_net
from examples.training import Config, Task, processes, rank
from stn_triton.nn import SpatialTransformer
from stn_triton.transforms import compose

PAPER = Config(
    steps=400_000, batch=128, lr=0.01, lr_every=80_000, weight_decay=5e-4, localisation_lr=0.1, snapshots=20
)
QUICK = Config(
    steps=1600,
    batch=32,
    optimiser="adam",
    lr=2e-3,
    schedule="cosine",
    localisation_lr=0.2,
    warm_up=0.7,
    log_every=50,
    evaluate_every=400,
    checkpoint_every=100,
    snapshots=20,
)
OPTIONS = {
    "size": 64,
    "width": 1.0,
    "dropout": 0.5,
    "scenes": 200_000,
    "longest": 5,
    "spread": 0.2,
    "contrast": 1.0,
}
QUICK_OPTIONS = {
    "size": 32,
    "width": 0.25,
    "dropout": 0.0,
    "scenes": 12_000,
    "longest": 2,
    "spread": 0.4,
    "contrast": 0.3,
}
STAND_IN = "longest", "spread", "contrast"  # how it is made
PAPER_ERRORS = {
    64: {"CNN": "4.0", "ST-CNN Single": "3.7", "ST-CNN Multi": "3.6"},
    128: {"CNN": "5.6", "ST-CNN Single": "3.9", "ST-CNN Multi": "3.9"},
}
SHOWN = 8  # images in the pictures
CLAIM = 6  # %: how much slower ST-CNN Multi is than the CNN, by the paper


class Reading(Task):
    def __init__(self, train: Sequences, test: Sequences, seed: int) -> None:
        super().__init__(seed, train.images.device)
        self.train, self.test = train, test

    def batch(self, count: int, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        drawn = torch.randint(
            len(self.train.labels), (count,), generator=self.generator, device=self.generator.device
        )
        strength = self.strength**3  # digits are to be known before they move
        return self.train.take(drawn[part], strength), self.train.labels[drawn[part]]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return sequence_loss(output.float(), target)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """% of the test set's sequences that are not read right from end to end."""
        parts = torch.arange(len(self.test.labels), device=self.generator.device).split(
            sizes(len(self.test.labels), 500)
        )
        batches = ((self.test.take(part), self.test.labels[part]) for part in parts)
        return {"error": error(model, batches, sequence_errors)}

    def snapshot(self, model: nn.Module) -> list[Tensor]:
        return parameters_of(lambda: model(shown(self.test)), model)


def load(options: argparse.Namespace, device: torch.device) -> tuple[Sequences, Sequences]:
    """Training and test set. Of the full numbers train and extra are for training, as in the paper."""
    if options.svhn is None:
        mnist = load_mnist(options.data, device, stand_in=options.stand_in)
        count, made = options.scenes, {key: getattr(options, key) for key in STAND_IN}
        train = make_stand_in(mnist.train, count, options.size, seed=0, **made)
        return train, make_stand_in(mnist.test, max(count // 10, 1), options.size, seed=1, **made)
    loader = load_full_numbers if options.format == "full" else load_cropped_digits
    halves = [loader(options.svhn, half, options.size) for half in ("train", "extra", "test")]
    train = Sequences(
        torch.cat([half.images for half in halves[:2]]),
        torch.cat([half.labels for half in halves[:2]]),
        f"{halves[0].source}, and extra",
    )
    return train.to(device), halves[2].to(device)


# -------------------------------------------------------------------------------------------- step time
def step_times(
    size: int, batch: int, width: float, device: torch.device, budget: float = 1.0
) -> dict[str, Any]:
    """Milliseconds of one step, forward, backward and update, of the CNN and of ST-CNN Multi on PyTorch's
    sampler and on ours; median and 20 % and 80 % quantiles."""
    makers = {
        "CNN": ("CNN", SpatialTransformer),
        "ST-CNN Multi, PyTorch": ("ST-CNN Multi", TorchTransformer),
        "ST-CNN Multi, stn_triton": ("ST-CNN Multi", SpatialTransformer),
    }
    images = torch.rand(batch, 3, size, size, device=device) - 0.5
    labels = torch.randint(NONE + 1, (batch, LENGTH), device=device)
    found: dict[str, Any] = {}
    for name, (kind, transformer) in makers.items():
        torch.manual_seed(0)
        model = svhn_net(kind, size, width=width, transformer=transformer).to(device)
        optimiser = torch.optim.SGD(model.parameters(), 1e-4)

        def step() -> None:
            sequence_loss(model(images), labels).backward()  # noqa: B023
            optimiser.step()  # noqa: B023
            optimiser.zero_grad(set_to_none=False)  # noqa: B023

        with own_stream(device):
            timing = time_device(step, device, budget, flush=False)
        found[name] = {**timing._asdict(), "parameters": count(model)}
    return found


def step_table(found: dict[str, Any], device: torch.device, shape: str) -> str:
    plain = found["CNN"]["median"]
    rows = ["| model | step, ms | 20 % to 80 % | slower than the CNN |", "|---|---|---|---|"]
    for name, timing in found.items():
        rows.append(
            f"| {name} | {timing['median']:.2f} | {timing['low']:.2f} to {timing['high']:.2f} | "
            f"{100 * (timing['median'] / plain - 1):.1f} % |"
        )
    note = f"{shape}. The paper: ST-CNN Multi is {CLAIM} % slower than the CNN."
    if device.type == "cpu":
        note += " **Times of a CPU, where both samplers are PyTorch's: they show that it runs, and no more.**"
    return "\n".join(rows) + f"\n\n{note}\n"


def measure_steps(options: argparse.Namespace, config: Config, device: torch.device) -> None:
    shape = f"Batches of {config.batch}, {options.size} px, width {options.width:g}"
    found = step_times(options.size, config.batch, options.width, device)
    table = step_table(found, device, shape)
    content = {"facts": facts(device), "size": options.size, "batch": config.batch, "width": options.width}
    write_json(options.output / "svhn_step.json", content | {"steps": found})
    write_text(options.output / "svhn_step.md", "# SVHN: the time of a step\n\n" + table)
    print(table)


# ------------------------------------------------------------------------------------------------- main
def shown(sequences: Sequences) -> Tensor:
    """The images in the picture and the animation."""
    return sequences.take(torch.arange(min(SHOWN, len(sequences.labels)), device=sequences.images.device))


def picture(model: nn.Module, images: Tensor, title: str, path: Path) -> None:
    """What each transformer saw, with its grid, and below what it gave. Feature maps are the means of their
    channels."""
    panels = [
        Panel(
            look.input[n],
            look.parameters[n],
            [look.output[n]],
            title=f"transformer {at + 1}" if n == 0 else "",
        )
        for at, look in enumerate(looks(lambda: model(images), model))
        for n in range(len(images))
    ]
    save_picture(path, panels, title, columns=SHOWN)


def read_places(parameters: Sequence[Tensor]) -> list[Tensor]:
    """(N, 2, 3) of transformers in a row -> of each, where in the image its output comes from: convolutions
    and pooling leave normalised coordinates as they are."""
    return list(itertools.accumulate(parameters, compose))


@torch.no_grad()
def following(model: nn.Module, test: Sequences) -> dict[str, float]:
    """Where the transformers together look, over the first test images of a stand-in: its correlation with
    where the numbers are, and the standard deviations of both, across (x) and down (y); and the error, in %,
    with all transformers put to the identity."""
    assert test.places is not None
    index = torch.arange(min(1000, len(test.labels)), device=test.images.device)
    images, places = test.take(index), test.places[index]
    seen = read_places(parameters_of(lambda: model(images), model))[-1][:, :, 2].to(places)
    found = {}
    for axis, name in enumerate("xy"):
        both = torch.stack([seen[:, axis], places[:, axis]])
        found[f"correlation_{name}"] = both.corrcoef()[0, 1].item()
        found[f"seen_{name}"], found[f"places_{name}"] = both.std(1).tolist()
    hooks = [one.register_forward_hook(lambda _, given, out: given[0]) for one in transformers_of(model)]
    found["error_at_identity"] = error(model, [(images, test.labels[index])], sequence_errors)
    for hook in hooks:
        hook.remove()
    return found


def frame(images: Tensor, parameters: Sequence[Tensor]) -> list[Panel]:
    """Images with the borders of what each transformer reads, and below what the last one would, of the
    image."""
    places = read_places([theta.to(images) for theta in parameters])
    outputs = stn.affine_grid_sample(images, places[-1], images.shape[2:])
    return [
        Panel(images[n], torch.stack([place[n] for place in places]), [outputs[n]], outlines=True)
        for n in range(len(images))
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("svhn", __doc__)
    parser.add_argument("--svhn", type=Path, help="folder of the official files; default: the stand-in")
    parser.add_argument(
        "--format", choices=["full", "cropped"], default="full", help="full numbers or digits"
    )
    parser.add_argument(
        "--size", type=int, choices=sorted(MARGIN), help="pixels; default: 64, with --quick 32"
    )
    parser.add_argument("--models", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--width", type=float, help="scales all layers; default: 1, with --quick 0.25")
    parser.add_argument("--dropout", type=float, help="default: 0.5, with --quick 0")
    parser.add_argument("--hidden", type=int, choices=[2, 3], default=2, help="layers of 3072")
    parser.add_argument("--scenes", type=int, help="of the stand-in; default: 200,000, with --quick 12,000")
    parser.add_argument(
        "--longest", type=int, choices=range(1, LENGTH + 1), help="the stand-in's; default: 5, with --quick 2"
    )
    parser.add_argument(
        "--spread",
        type=float,
        help="how far from the middle the stand-in's are, over half the side; default: 0.2, with --quick 0.4",
    )
    parser.add_argument(
        "--contrast", type=float, help="of the stand-in's photographs; default: 1, with --quick 0.3"
    )
    parser.add_argument("--step-time", action="store_true", help="only time the steps")
    parser.add_argument("--counts", action="store_true", help="only count what a step comes to, from shapes")
    options = parser.parse_args(arguments)
    config = config_of(options, PAPER, QUICK)
    for name, value in (QUICK_OPTIONS if options.quick else OPTIONS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.counts:
        print(cost_table(options.size, config.batch, options.width))
        return 0
    with processes(options.device) as device:
        if options.step_time:
            measure_steps(options, config, device)
            return 0
        train, test = load(options, device)
        model_options = {key: getattr(options, key) for key in ("width", "dropout", "hidden")}
        settings = model_options | {"size": options.size, "scenes": len(train.labels)}
        if options.svhn is None:
            settings |= {key: getattr(options, key) for key in STAND_IN}
        lines = []
        for kind in options.models:
            runs = run_seeds(
                kind,
                lambda: svhn_net(kind, options.size, **model_options),  # noqa: B023
                lambda seed: Reading(train, test, seed),
                config,  # the plain net does better too when numbers move off the middle bit by bit
                options,
                device,
                settings | {"data": train.source},
                paper=PAPER_ERRORS.get(options.size, {}).get(kind, "-"),
            )
            line = runs.line
            if kind != "CNN" and test.places is not None:
                figures = [own | following(net, test) for own, net in zip(line.figures, runs.models)]
                line = line._replace(figures=figures)
            lines.append(line)
            if kind != "CNN" and rank() == 0:
                title, images = f"{kind} on {test.source}", shown(test)
                path = options.output / f"svhn_{kind.split()[-1].lower()}.png"
                picture(runs.model, images, title, path)
                draw = partial(frame, images)
                save_training(path.with_suffix(".gif"), runs.snapshots, draw, title, columns=SHOWN)
        if rank() == 0:
            title = f"House numbers, {options.size} px"
            where = options.output, "svhn"
            print(save_table(*where, title, "error, %", lines, config, PAPER, train.source, settings, device))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
