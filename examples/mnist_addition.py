"""MNIST addition: ``python -m examples.mnist_addition``.

Two channels of 42 x 42 pixels with a rotated, translated and scaled digit each; the label is their sum, 0 to
18. One transformer can straighten one digit; two in parallel, each applied to both channels, give four
channels in which either digit is upright in one (Jaderberg et al., 2015, section A.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import stn_triton as stn
from examples.data import DISTORTIONS, Digits, Mnist, Similar, load_mnist
from examples.models import cnn, count, fcn, fit_width, make_transformer
from examples.outputs import (
    Line,
    Panel,
    parameters_of,
    save_picture,
    save_table,
    save_training,
    transformers_of,
)
from examples.runs import Runs, config_of, error, parser_of, positive, run_seeds, sizes
from examples.training import Config, Task, processes, rank
from stn_triton.nn import SpatialTransformer, Transform
from stn_triton.transforms import compose

SIZE, CLASSES = 42, 19
PARAMETERS = 400_000  # of each model, about
PAPER = Config()
QUICK = Config(
    steps=3_500,
    batch=64,
    optimiser="adam",
    lr=3e-3,
    schedule="cosine",
    localisation_lr=0.3,
    warm_up=0.4,
    log_every=50,
    evaluate_every=3_500,
    checkpoint_every=200,
    snapshots=20,
)


class Kind(NamedTuple):
    transforms: int
    transform: Transform
    classifier: Callable[..., nn.Module]
    paper: str  # % error


KINDS = {
    "FCN": Kind(0, "affine", fcn, "47.7"),
    "CNN": Kind(0, "affine", cnn, "14.7"),
    "ST-FCN affine": Kind(1, "affine", fcn, "22.6"),
    "2xST-FCN affine": Kind(2, "affine", fcn, "9.0"),
    "2xST-FCN projective": Kind(2, "projective", fcn, "5.9"),
    "2xST-FCN TPS": Kind(2, "tps", fcn, "5.8"),
}


class Parallel(nn.Module):
    """Transformers side by side, each with a localisation net of its own, each applied to all channels:
    (N, C, H, W) -> (N, T C, H, W)."""

    def __init__(self, transformers: Sequence[SpatialTransformer]) -> None:
        super().__init__()
        self.transformers = nn.ModuleList(transformers)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([transformer(images) for transformer in self.transformers], 1)


def make_model(kind: Kind) -> nn.Sequential:
    """(N, 2, 42, 42) -> (N, 19). The classifier sees what comes out averaged over 2 x 2 pixels; its width
    makes up for what the transformers take."""
    transformers = [make_transformer("FCN", kind.transform, SIZE, channels=2) for _ in range(kind.transforms)]
    channels = 2 * max(kind.transforms, 1)
    rest = PARAMETERS - sum(map(count, transformers))

    def classifier(width: int) -> nn.Module:
        return kind.classifier(width, SIZE // 2, channels=channels, classes=CLASSES)

    first = [Parallel(transformers)] if transformers else []
    return nn.Sequential(*first, nn.AvgPool2d(2), classifier(fit_width(classifier, rest)))


def pairs(
    digits: Digits,
    count: int,
    generator: Generator,
    part: slice = slice(None),
    strength: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Images, (count, 2, 42, 42), and the sums."""
    first, second = (DISTORTIONS["RTS"].batch(digits, count, generator, part, strength) for _ in range(2))
    return torch.cat([first[0], second[0]], 1), first[1] + second[1]


class Addition(Task):
    def __init__(self, mnist: Mnist, seed: int, test: int = 10_000) -> None:
        super().__init__(seed, mnist.train.images.device)
        self.mnist, self.test = mnist, test

    def batch(self, count: int, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        return pairs(self.mnist.train, count, self.generator, part, self.strength)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """On the same pairs each time."""
        generator = Generator(self.generator.device).manual_seed(0)
        return {"error": error(model, (pairs(self.mnist.test, n, generator) for n in sizes(self.test, 1000)))}

    def snapshot(self, model: nn.Module) -> list[Tensor]:
        return transformations(model, self.mnist.test)


def held(model: nn.Module, digits: Digits, count: int = 1000) -> str:
    """How much both digits of test pairs differ in place and angle, before and after each transformer; of a
    homography or a spline it is the affine map nearest to it over the middle half of its output."""
    distortion, generator = DISTORTIONS["RTS"], Generator(digits.images.device).manual_seed(2)
    assert isinstance(distortion, Similar)
    index = torch.randint(len(digits.labels), (2, count), generator=generator, device=generator.device)
    drawn = [distortion.draw(count, generator) for _ in index]
    images = torch.cat([distortion.apply(digits, *each) for each in zip(index, drawn)], 1)

    def said(chosen: Tensor) -> str:
        spreads = [distortion.spread(compose(theta.cpu(), chosen)) for (theta,) in drawn]
        return " and ".join(f"{place:.1f} pixels, {angle:.0f} degrees" for place, _, angle in spreads)

    parts = [f"before {said(torch.eye(2, 3).expand(count, 2, 3))}"]
    with torch.no_grad():
        parameters = parameters_of(lambda: model(images), model)
    for number, (one, its) in enumerate(zip(transformers_of(model), parameters), 1):
        parts.append(f"after transformer {number} {said(nearest_affine(one.transform, its))}")
    what = f"standard deviations of place and angle of the first digit and the second, {count} test pairs"
    return f"{what}: {'; '.join(parts)}"


def nearest_affine(transform: Transform, theta: Tensor) -> Tensor:
    """(N, 2, 3), by least squares over 5 x 5 points of the middle half of the output."""
    if transform not in ("projective", "tps"):
        return theta
    function = stn.projective_grid if transform == "projective" else stn.tps_grid
    size, middle = (len(theta), 1, 9, 9), slice(2, 7)
    grid = function(theta, size, align_corners=True)
    points = stn.affine_grid(torch.eye(2, 3)[None], (1, 1, 9, 9), align_corners=True)[0, middle, middle]
    columns = F.pad(points.flatten(0, 1), (0, 1), value=1.0)
    return (columns.pinverse() @ grid[:, middle, middle].flatten(1, 2)).mT


def shown(digits: Digits) -> tuple[Tensor, Tensor]:
    """The pairs in the picture and the animation."""
    return pairs(digits, 5, Generator(digits.images.device).manual_seed(1))


def transformations(model: nn.Module, digits: Digits) -> list[Tensor]:
    """Of those pairs, for each transformer."""
    return parameters_of(lambda: model(shown(digits)[0]), model)


def panels(model: nn.Module, digits: Digits, parameters: Sequence[Tensor]) -> list[Panel]:
    """Both channels, and over each the borders of what the transformers read, which are below."""
    images, sums = shown(digits)
    transformers = transformers_of(model)
    outputs = [one.sample(images, its.to(images)) for one, its in zip(transformers, parameters)]
    return [
        Panel(
            images[n, [channel]],
            torch.stack([one[n] for one in parameters]),
            [output[n, [channel]] for output in outputs],
            transformers[0].transform,
            f"channel {channel + 1}, sum {sums[n]}",
        )
        for n in range(len(images))
        for channel in range(2)
    ]


def draw_results(name: str, runs: Runs, digits: Digits, folder: Path) -> None:
    """The picture and the animation."""
    title, draw = f"MNIST addition, {name}", partial(panels, runs.model, digits)
    save_picture(folder / "mnist_addition.png", draw(transformations(runs.model, digits)), title)
    save_training(folder / "mnist_addition.gif", runs.snapshots, draw, title)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("mnist_addition", __doc__)
    parser.add_argument("--models", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--test", type=positive, default=10_000, help="how many test pairs")
    options = parser.parse_args(arguments)
    config = config_of(options, PAPER, QUICK)
    with processes(options.device) as device:
        mnist = load_mnist(options.data, device, stand_in=options.stand_in)
        settings, data = {"test pairs": options.test}, mnist.train.source
        lines: list[Line] = []
        notes: list[str] = []
        drawn: tuple[str, Runs] | None = None  # the last with transformers
        for name in options.models:
            kind = KINDS[name]
            runs = run_seeds(
                name,
                lambda: make_model(kind),  # noqa: B023
                lambda seed: Addition(mnist, seed, options.test),
                config,
                options,
                device,
                settings | {"data": data},
                paper=kind.paper,
            )
            lines.append(runs.line)
            if kind.transforms and rank() == 0:
                drawn = name, runs
                notes.append(f"{name}: {held(runs.model, mnist.test)}.")
        if rank() == 0:
            where, title = (options.output, "mnist_addition"), "MNIST addition"
            facts = data, settings, device
            print(save_table(*where, title, "error, %", lines, config, PAPER, *facts, notes=notes))
            if drawn is not None:
                draw_results(*drawn, mnist.test, options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
