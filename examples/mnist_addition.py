"""MNIST addition: ``python -m examples.mnist_addition``.

Two channels of 42 x 42 pixels with a rotated, translated and scaled digit each; the label is their sum, 0 to 18.
One transformer can straighten one digit; two in parallel, each applied to both channels, give four channels in
which either digit is upright in one (Jaderberg et al., 2015, section A.1).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from examples.data import DISTORTIONS, Digits, load_mnist
from examples.fit import Schedule, arguments_of, device_of, fit, schedule_of, seeded, share_wrong
from examples.outputs import Line, Panel, looks, save_picture, save_table
from stn_triton.nn import SpatialTransformer, Transform, localisation_fcn

SIZE, CLASSES = 42, 19
PAPER_SCHEDULE = Schedule(iterations=150_000, batch=256, rate=0.01, divide_every=50_000)
QUICK = Schedule(iterations=1500, batch=128, rate=2e-3, divide_every=1100, optimiser="adam")


class Kind(NamedTuple):
    transforms: int
    transform: Transform
    convolutional: bool
    units: int  # of hidden layers, so that all have about 400,000 parameters
    paper: str  # % error


KINDS = {
    "FCN": Kind(0, "affine", False, 320, "47.7"),
    "CNN": Kind(0, "affine", True, 416, "14.7"),
    "ST-FCN affine": Kind(1, "affine", False, 256, "22.6"),
    "2xST-FCN affine": Kind(2, "affine", False, 96, "9.0"),
    "2xST-FCN projective": Kind(2, "projective", False, 96, "5.9"),
    "2xST-FCN TPS": Kind(2, "tps", False, 96, "5.8"),
}


class Parallel(nn.Module):
    """Transformers side by side, each with a localisation net of its own, each applied to all channels:
    (N, C, H, W) -> (N, T C, H, W)."""

    def __init__(self, transformers: Sequence[SpatialTransformer]) -> None:
        super().__init__()
        self.transformers = nn.ModuleList(transformers)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([transformer(images) for transformer in self.transformers], 1)


def make_model(kind: Kind, filters: int = 32) -> nn.Sequential:
    """(N, 2, 42, 42) -> (N, 19). The classifier sees what comes out averaged over 2 x 2 pixels.

    An FCN has two hidden layers; a CNN convolutions of 9 x 9 and 7 x 7, padded, each with ``filters`` of them,
    and one hidden layer.
    """
    units = kind.units
    layers: list[nn.Module] = []
    if kind.transforms:
        transformers = [
            SpatialTransformer(localisation_fcn(input_shape=(2, SIZE, SIZE)), kind.transform, features=32)
            for _ in range(kind.transforms)
        ]
        layers.append(Parallel(transformers))
    channels, side = 2 * max(kind.transforms, 1), SIZE // 2
    layers.append(nn.AvgPool2d(2))
    if kind.convolutional:
        layers += [nn.Conv2d(channels, filters, 9, padding=4), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(filters, filters, 7, padding=3), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(filters * (side // 4) ** 2, units), nn.ReLU()]
    else:
        layers += [nn.Flatten(), nn.Linear(channels * side**2, units), nn.ReLU()]
        layers += [nn.Linear(units, units), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(units, CLASSES))


def pairs(digits: Digits, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Images, (count, 2, 42, 42), and the sums."""
    first, second = (DISTORTIONS["RTS"].batch(digits, count, generator) for _ in range(2))
    return torch.cat([first[0], second[0]], 1), first[1] + second[1]


def test_pairs(digits: Digits, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same pairs each time."""
    generator = Generator(digits.images.device).manual_seed(0)
    for start in range(0, count, 1000):
        yield pairs(digits, min(1000, count - start), generator)


def train(kind: Kind, name: str, train: Digits, schedule: Schedule, seed: int) -> tuple[nn.Sequential, float]:
    """A model, and the seconds it took."""
    device = train.images.device
    with seeded(seed, device) as generator:
        model = make_model(kind).to(device)

        def loss_of(iteration: int) -> Tensor:
            images, sums = pairs(train, schedule.batch, generator)
            return F.cross_entropy(model(images), sums)

        return model, fit(model, loss_of, schedule, name).seconds


def picture(model: nn.Sequential, digits: Digits, title: str, path: str) -> None:
    """Of each transformer the channel that it straightens, as one would hope, and what it gives."""
    images, sums = pairs(digits, 5, Generator(digits.images.device).manual_seed(1))
    model.eval()
    found = looks(lambda: model(images), model)
    panels = [
        Panel(images[n, [channel]], torch.stack([one.parameters[n] for one in found]),
              [one.output[n, [channel]] for one in found], found[0].module.transform,
              f"channel {channel + 1}, sum {sums[n]}")
        for n in range(len(images))
        for channel in range(2)
    ]  # fmt: skip
    save_picture(path, panels, title)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.mnist_addition", description=(__doc__ or "").partition(":")[0]
    )
    arguments_of(parser, PAPER_SCHEDULE)
    parser.add_argument("--models", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--test", type=int, default=10_000, help="how many test pairs")
    options = parser.parse_args(arguments)
    schedule = schedule_of(options, PAPER_SCHEDULE, QUICK)
    device = device_of(options.device)
    mnist = load_mnist(options.data, device, stand_in=options.stand_in)
    lines = []
    for name in options.models:
        values, seconds = [], 0.0
        for seed in range(options.seeds):
            model, took = train(KINDS[name], f"{name}, seed {seed}", mnist.train, schedule, seed)
            values.append(share_wrong(model, test_pairs(mnist.test, options.test)))
            seconds += took / options.seeds
        parameters = sum(parameter.numel() for parameter in model.parameters())
        lines.append(Line(name, values, KINDS[name].paper, parameters, seconds))
        table = save_table(
            options.output, "mnist_addition", "MNIST addition, % error", "error, %", lines, schedule,
            PAPER_SCHEDULE, mnist.train.source, {"test pairs": options.test}, device,
        )  # fmt: skip
        if KINDS[name].transforms:
            picture(model, mnist.test, f"MNIST addition, {name}", f"{options.output}/mnist_addition.png")
    print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
