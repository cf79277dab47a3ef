"""Fine-grained classification: ``python -m examples.birds``.

Two or four attention transformers, each a window of half the image's side, share one localisation net; their
crops go through one trunk, and the features of all to one classifier (Jaderberg et al., 2015, section 4.3).
Data are CUB-200-2011 under ``--cub``, or a stand-in, which results name as such: photographs with a digit
above and one below, which move together as a bird's head and body do. Its classes are the pairs of digits.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.birds_data import Birds, Photographs, load_cub, make_single, make_stand_in
from examples.birds_models import PartsNet, make_trunk
from examples.data import load_mnist
from examples.outputs import Panel, save_picture, save_table, save_training, spread
from examples.runs import Runs, config_of, error, parser_of, run_seeds, sizes
from examples.training import Config, Task, processes, rank, train
from stn_triton.transforms import attention

PAPER = Config(
    steps=10_000, batch=32, lr=0.1, lr_every=5000, weight_decay=1e-5, localisation_lr=1e-4, snapshots=20
)
"""Steps and batch are not in the paper."""
QUICK = Config(
    steps=700,
    batch=32,
    optimiser="adam",
    lr=1e-3,
    schedule="cosine",
    localisation_lr=0.25,
    log_every=50,
    evaluate_every=350,
    checkpoint_every=100,
    snapshots=20,
)
PRETRAINING = replace(QUICK, steps=2000, batch=48, lr=3e-3, evaluate_every=1000, snapshots=0)
"""Of the built-in trunk, on single digits."""
SHOWN = 8  # photographs in the pictures
PAPER_ACCURACY = {
    (0, 224): "82.3",
    (0, 448): "82.3, from 224 px",
    (2, 224): "83.1",
    (2, 448): "83.9",
    (4, 448): "84.1",
}


class Naming(Task):
    def __init__(self, birds: Birds, size: int, seed: int) -> None:
        super().__init__(seed, birds.train.images.device)
        self.birds, self.size = birds, size

    def batch(self, count: int, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Random windows."""
        train = self.birds.train
        drawn = torch.randint(
            len(train.labels), (count,), generator=self.generator, device=self.generator.device
        )
        windows = train.windows(count, self.size, self.generator)
        return train.take(drawn[part], self.size, windows[part]), train.labels[drawn[part]]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, PartsNet)
        test = self.birds.test
        figures = {"accuracy": accuracy(model, test, self.size)}
        if model.transformer is not None and test.parts is not None:
            figures |= settled(model, test, self.size)
        return figures

    def snapshot(self, model: nn.Module) -> Tensor | None:
        assert isinstance(model, PartsNet)
        if model.transformer is None:
            return None
        return model.look(shown(self.birds.test, self.size))[0].cpu()


def _batches(photographs: Photographs) -> Sequence[Tensor]:
    """Indices of some photographs at a time."""
    count = len(photographs.labels)
    return torch.arange(count, device=photographs.images.device).split(sizes(count, 32))


def accuracy(model: PartsNet, test: Photographs, size: int, held: Tensor | None = None) -> float:
    """% right; with ``held``, (T, 2, 3), where all windows are whatever the image."""
    batches = ((test.take(part, size), test.labels[part]) for part in _batches(test))

    def named(images: Tensor) -> Tensor:
        return model(images, None if held is None else held.expand(len(images), *held.shape))

    return 100 - error(named, batches)


def whole(theta: Tensor, parts: Tensor) -> Tensor:
    """(N, T, 2, 3) or (1, T, 2, 3), windows, and (N, K, 3), squares -> (N, K, T): whether a window holds all
    of a square."""
    middle, half = parts[:, :, None, :2], parts[:, :, None, 2:]
    windows = theta.unsqueeze(1)
    room = windows[..., :2].diagonal(dim1=-2, dim2=-1) - half
    return ((middle - windows[..., 2]).abs() <= room).all(-1)


@torch.no_grad()
def settled(model: PartsNet, test: Photographs, size: int) -> dict[str, float]:
    """Where windows look. For each part, "its window" is the one that holds it whole in most images.

    Returns: % of the images of which both parts are whole, each in some window: at the start of training
        ("whole at first"), now ("whole"), and with each window put to its mean place ("whole if held"; the
        accuracy is then "accuracy if held"); and of part k and its window, across and down, the mean and
        standard deviation of their places, and the correlation of the two from image to image.
    """
    assert model.transformer is not None
    assert test.parts is not None
    theta = torch.cat([model.look(test.take(part, size))[0] for part in _batches(test)])
    parts = test.parts * (test.images.shape[-1] / size)  # of the middle that the network sees
    first = attention(model.transformer.scale, model.transformer.initial).to(theta)
    held = theta.mean(0)
    figures = {"accuracy if held": accuracy(model, test, size, held)}
    for name, windows in (("whole at first", first[None]), ("whole", theta), ("whole if held", held[None])):
        found = whole(windows, parts).any(2).all(1)
        figures[name] = 100 * found.double().mean().item()
    its = whole(theta, parts).double().mean(0).argmax(1)
    for k, window in enumerate(its.tolist()):
        place, part = theta[:, window, :, 2].double(), parts[:, k, :2].double()
        for axis, direction in enumerate(("across", "down")):
            places = {"part": part[:, axis], "window": place[:, axis]}
            for name, values in places.items():
                figures[f"{name} {k} {direction}, mean"] = values.mean().item()
                figures[f"{name} {k} {direction}, deviation"] = values.std().item()
            deviations = [values - values.mean() for values in places.values()]
            figures[f"{k} {direction}, correlation"] = F.cosine_similarity(*deviations, dim=0).item()
    return figures


def told(figures: Sequence[dict[str, float]]) -> str:
    """What :func:`settled` found with each seed, in words."""

    def percent(name: str) -> str:
        return f"{spread([its[name] for its in figures])} %"

    def both(name: str) -> str:
        """Across and down, the mean over seeds."""
        values = (statistics.mean(its[name.format(axis)] for its in figures) for axis in ("across", "down"))
        return "({:.2f}, {:.2f})".format(*values)

    said = [
        f"windows hold both digits whole in {percent('whole at first')} of the test images at the start "
        f"and in {percent('whole')} at the end; with each window put to its mean place, in "
        f"{percent('whole if held')}, and the accuracy is {percent('accuracy if held')}"
    ]
    for k, name in enumerate(("upper", "lower")):
        said.append(
            f"the {name} digit is at {both(f'part {k} {{}}, mean')}, standard deviation "
            f"{both(f'part {k} {{}}, deviation')}, the window that holds it most often at "
            f"{both(f'window {k} {{}}, mean')}, standard deviation {both(f'window {k} {{}}, deviation')}, "
            f"correlation {both(f'{k} {{}}, correlation')}"
        )
    return "; ".join(said)


def pretrained_trunk(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, float]:
    """The built-in trunk after it has learned to tell single digits over photographs apart, and the % of
    those of the test set that it then knows."""
    mnist = load_mnist(options.data, device, stand_in=options.stand_in)
    count, kinds, size = options.scenes, options.kinds, options.crop
    make = partial(make_single, size=size, kinds=kinds, contrast=options.contrast)
    train_set = make(mnist.train, 2 * count, seed=2)
    single = Birds(train_set, make(mnist.test, max(count // 5, 1), seed=3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PartsNet(make_trunk("built-in"), 2 * kinds, 0, size=size, crop=size, dropout=0.0).to(device)
    config = replace(PRETRAINING, steps=options.pretraining)
    folder = options.output / "runs" / "trunk"
    settings = {"kinds": 2 * kinds, "size": size, "scenes": 2 * count, "data": train_set.source}
    settings["contrast"] = options.contrast
    found = train(model, Naming(single, size, seed=0), config, folder, settings=settings)
    if rank() == 0:
        print(f"the trunk: {found.figures['accuracy']:.1f} % of single digits", flush=True)
    return model.trunk.cpu(), found.figures["accuracy"]


def load(options: argparse.Namespace, device: torch.device) -> Birds:
    if options.cub is not None:
        birds = load_cub(options.cub, options.size)
        return Birds(birds.train.to(device), birds.test.to(device))
    mnist = load_mnist(options.data, device, stand_in=options.stand_in)
    make = partial(make_stand_in, size=options.size, kinds=options.kinds, contrast=options.contrast)
    train = make(mnist.train, options.scenes, seed=0)
    return Birds(train, make(mnist.test, max(options.scenes // 5, 1), seed=1))


def shown(photographs: Photographs, size: int) -> Tensor:
    """The photographs in the picture and the animation."""
    index = torch.arange(min(SHOWN, len(photographs.labels)), device=photographs.images.device)
    return photographs.take(index, size)


def panels(model: PartsNet, test: Photographs, size: int, theta: Tensor) -> list[Panel]:
    """Photographs with the windows of all transformers, and below their crops."""
    assert model.transformer is not None
    images = shown(test, size)
    crops = model.transformer.sample(images, theta.to(images))
    return [
        Panel(image, its_theta, list(its_crops), title=test.classes[label], outlines=True)
        for image, its_theta, its_crops, label in zip(images, theta, crops, test.labels.tolist())
    ]


def draw_results(name: str, runs: Runs, test: Photographs, size: int, path: Path) -> None:
    """The picture, and beside it the animation."""
    assert isinstance(runs.model, PartsNet)
    title, draw = f"{name} on {test.source}", partial(panels, runs.model, test, size)
    with torch.no_grad():
        save_picture(path, draw(runs.model.look(shown(test, size))[0]), title, columns=SHOWN)
        save_training(path.with_suffix(".gif"), runs.snapshots, draw, title, columns=SHOWN)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("birds", __doc__)
    parser.add_argument("--cub", type=Path, help="the folder CUB_200_2011; default: the stand-in")
    parser.add_argument("--size", type=int, help="pixels of the images; default: 448, with --quick 112")
    parser.add_argument("--crop", type=int, help="pixels of the crops; default: 224, with --quick 56")
    parser.add_argument("--transformers", nargs="+", type=int, choices=[0, 2, 4], default=[0, 2, 4])
    parser.add_argument(
        "--still",
        action="store_true",
        help="also train nets whose windows stay where they start: the control",
    )
    parser.add_argument("--trunk", help="built-in, a torchvision model, or timm:NAME; default: googlenet")
    parser.add_argument("--pretrained", action="store_true", help="start the trunk from ImageNet's weights")
    parser.add_argument("--dropout", type=float, help="default: 0.7, the paper's; with --quick 0")
    parser.add_argument("--scenes", type=int, help="of the stand-in; default: 6,000, with --quick 4,000")
    parser.add_argument(
        "--kinds",
        type=int,
        choices=range(1, 6),
        default=5,
        help="of the stand-in's digits at each of two places; classes: their square",
    )
    parser.add_argument(
        "--contrast", type=float, help="of the stand-in's photographs; default: 1, with --quick 0.3"
    )
    parser.add_argument(
        "--pretraining",
        type=int,
        help="iterations in which the built-in trunk learns single digits; default: 0, with --quick 2,000",
    )
    options = parser.parse_args(arguments)
    config = config_of(options, PAPER, QUICK)
    quick = options.quick
    options.size = options.size or (112 if quick else 448)
    options.crop = options.crop or (56 if quick else 224)
    options.trunk = options.trunk or ("built-in" if quick else "googlenet")
    options.scenes = options.scenes or (4000 if quick else 6000)
    if options.contrast is None:
        options.contrast = 0.3 if quick else 1.0
    if options.dropout is None:
        options.dropout = 0.0 if quick else 0.7
    if options.pretraining is None:
        options.pretraining = PRETRAINING.steps if quick and options.cub is None else 0
    if options.pretraining and (options.trunk != "built-in" or options.cub is not None):
        parser.error("--pretraining is of the built-in trunk, for the stand-in")
    with processes(options.device) as device:
        birds = load(options, device)
        keys = "trunk", "pretrained", "pretraining", "size", "crop", "dropout"
        settings = {key: getattr(options, key) for key in keys}
        settings |= {"classes": len(birds.train.classes), "scenes": len(birds.train.labels)}
        if options.cub is None:
            settings["contrast"] = options.contrast
        source = birds.train.source
        lines, notes = [], []
        trained = None
        if options.pretraining:
            trained, known = pretrained_trunk(options, device)
            notes.append(f"The trunk knows {known:.1f} % of single test digits before it sees pairs.")
        moving = [(transformers, False) for transformers in options.transformers]
        still = [
            (transformers, True) for transformers in options.transformers if transformers and options.still
        ]
        for transformers, is_still in moving + still:
            name = f"{transformers}xST-CNN" if transformers else "CNN"

            def build(transformers: int = transformers) -> PartsNet:
                trunk = (
                    make_trunk(options.trunk, options.pretrained)
                    if trained is None
                    else copy.deepcopy(trained)
                )
                sides = {"size": options.size, "crop": options.crop, "dropout": options.dropout}
                return PartsNet(trunk, len(birds.train.classes), transformers, **sides)

            runs = run_seeds(
                f"{name}, windows still" if is_still else name,
                build,
                lambda seed: Naming(birds, options.size, seed),
                replace(config, localisation_lr=0.0) if is_still else config,
                options,
                device,
                settings | {"data": source},
                figure="accuracy",
                paper="-" if is_still else PAPER_ACCURACY.get((transformers, options.size), "-"),
            )
            lines.append(runs.line)
            if is_still or not transformers:
                continue
            if birds.test.parts is not None:
                notes.append(f"{name}: {told(runs.line.figures)}.")
            if rank() == 0:
                path = options.output / f"birds_{transformers}.png"
                draw_results(name, runs, birds.test, options.size, path)
        if rank() == 0:
            title = f"Fine-grained classification, {options.size} px"
            table = save_table(
                options.output,
                "birds",
                title,
                "accuracy, %",
                lines,
                config,
                PAPER,
                source,
                settings,
                device,
                notes=notes,
            )
            print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
