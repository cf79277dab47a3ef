"""Fine-grained classification: ``python -m examples.birds``.

Two or four attention transformers, each a window of half the image's side, share one localisation net; their
crops go through one trunk, and the features of all to one classifier (Jaderberg et al., 2015, section 4.3).
Data are CUB-200-2011 under ``--cub``, or a stand-in, which results name as such: photographs with digits at
two places, whose classes are the pairs of them.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.birds_data import Birds, Photographs, load_cub, make_single, make_stand_in
from examples.birds_models import PartsNet, make_trunk
from examples.data import load_mnist
from examples.outputs import Panel, save_picture, save_table, save_training
from examples.runs import Runs, config_of, error, parser_of, run_seeds, sizes
from examples.training import Config, Task, processes, rank, train

PAPER = Config(
    steps=10_000, batch=32, lr=0.1, lr_every=5000, weight_decay=1e-5, localisation_lr=1e-4, snapshots=20
)
"""Steps and batch are not in the paper."""
QUICK = Config(
    steps=500,
    batch=32,
    optimiser="adam",
    lr=1e-3,
    schedule="cosine",
    localisation_lr=0.1,
    log_every=50,
    evaluate_every=250,
    checkpoint_every=100,
    snapshots=20,
)
PRETRAINING = replace(QUICK, steps=800, batch=48, lr=3e-3, evaluate_every=400, snapshots=0)
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
        """Random windows, half of them mirrored."""
        train = self.birds.train
        drawn = torch.randint(
            len(train.labels), (count,), generator=self.generator, device=self.generator.device
        )
        windows = train.windows(count, self.size, self.generator)
        return train.take(drawn[part], self.size, windows[part]), train.labels[drawn[part]]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        test = self.birds.test
        parts = torch.arange(len(test.labels), device=self.generator.device).split(
            sizes(len(test.labels), 32)
        )
        batches = ((test.take(part, self.size), test.labels[part]) for part in parts)
        return {"accuracy": 100 - error(model, batches)}

    def snapshot(self, model: nn.Module) -> Tensor | None:
        assert isinstance(model, PartsNet)
        if model.transformer is None:
            return None
        return model.look(shown(self.birds.test, self.size))[0].cpu()


def pretrained_trunk(options: argparse.Namespace, device: torch.device) -> nn.Module:
    """The built-in trunk after it has learned to tell single digits over photographs apart."""
    mnist = load_mnist(options.data, device, stand_in=options.stand_in)
    count, kinds, size = options.scenes, options.kinds, options.crop
    train_set = make_single(mnist.train, 2 * count, size, kinds, seed=2)
    single = Birds(train_set, make_single(mnist.test, max(count // 5, 1), size, kinds, seed=3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PartsNet(make_trunk("built-in"), kinds, 0, size=size, crop=size, dropout=0.0).to(device)
    config = replace(PRETRAINING, steps=options.pretraining)
    folder = options.output / "runs" / "trunk"
    settings = {"kinds": kinds, "size": size, "scenes": 2 * count, "data": train_set.source}
    found = train(model, Naming(single, size, seed=0), config, folder, settings=settings)
    if rank() == 0:
        print(f"the trunk: {found.figures['accuracy']:.1f} % of single digits", flush=True)
    return model.trunk.cpu()


def load(options: argparse.Namespace, device: torch.device) -> Birds:
    if options.cub is not None:
        birds = load_cub(options.cub, options.size)
        return Birds(birds.train.to(device), birds.test.to(device))
    mnist = load_mnist(options.data, device, stand_in=options.stand_in)
    kinds, test = options.kinds, max(options.scenes // 5, 1)
    train = make_stand_in(mnist.train, options.scenes, options.size, kinds, seed=0)
    return Birds(train, make_stand_in(mnist.test, test, options.size, kinds, seed=1))


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
    parser.add_argument("--trunk", help="built-in, a torchvision model, or timm:NAME; default: googlenet")
    parser.add_argument("--pretrained", action="store_true", help="start the trunk from ImageNet's weights")
    parser.add_argument("--dropout", type=float, help="default: 0.7, the paper's; with --quick 0")
    parser.add_argument("--scenes", type=int, help="of the stand-in; default: 6,000, with --quick 2,000")
    parser.add_argument(
        "--kinds", type=int, default=3, help="of the stand-in's digits; classes: their square"
    )
    parser.add_argument(
        "--pretraining",
        type=int,
        help="iterations in which the built-in trunk learns single digits; default: 0, with --quick 800",
    )
    options = parser.parse_args(arguments)
    config = config_of(options, PAPER, QUICK)
    quick = options.quick
    options.size = options.size or (112 if quick else 448)
    options.crop = options.crop or (56 if quick else 224)
    options.trunk = options.trunk or ("built-in" if quick else "googlenet")
    options.scenes = options.scenes or (2000 if quick else 6000)
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
        source = birds.train.source
        lines = []
        trained = pretrained_trunk(options, device) if options.pretraining else None
        for transformers in options.transformers:
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
                name,
                build,
                lambda seed: Naming(birds, options.size, seed),
                config,
                options,
                device,
                settings | {"data": source},
                figure="accuracy",
                paper=PAPER_ACCURACY.get((transformers, options.size), "-"),
            )
            lines.append(runs.line)
            if transformers and rank() == 0:
                path = options.output / f"birds_{transformers}.png"
                draw_results(name, runs, birds.test, options.size, path)
        if rank() == 0:
            where = options.output, "birds"
            title = f"Fine-grained classification, {options.size} px"
            print(save_table(*where, title, "accuracy, %", lines, config, PAPER, source, settings, device))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
