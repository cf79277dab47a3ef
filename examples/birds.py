"""Fine-grained classification: ``python -m examples.birds``.

Two or four attention transformers, each a window of half the image's side, share one localisation net; their
crops go through one trunk, and the features of all to one classifier (Jaderberg et al., 2015, section 4.3).
Data are CUB-200-2011 under ``--cub``, or a stand-in, which results name as such: photographs with digits at
two places, whose classes are the pairs of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.birds_data import Birds, Photographs, load_cub, make_stand_in
from examples.birds_models import PartsNet, make_trunk
from examples.data import load_mnist
from examples.outputs import Panel, save_picture, save_table
from examples.runs import config_of, error, parser_of, run_seeds, sizes
from examples.training import Config, Task, processes, rank

PAPER = Config(
    steps=10_000, batch=32, lr=0.1, lr_every=5000, weight_decay=1e-5, localisation_lr=1e-4, snapshots=0
)
"""Steps and batch are not in the paper."""
QUICK = Config(steps=300, batch=24, lr=2e-3, lr_every=250, optimiser="adam", localisation_lr=0.1, snapshots=0)
PAPER_ACCURACY = {(0, 224): "82.3", (2, 224): "83.1", (2, 448): "83.9", (4, 448): "84.1"}


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


def load(options: argparse.Namespace, device: torch.device) -> Birds:
    if options.cub is not None:
        birds = load_cub(options.cub, options.size)
        return Birds(birds.train.to(device), birds.test.to(device))
    mnist = load_mnist(options.data, device, stand_in=options.stand_in)
    kinds, test = options.kinds, max(options.scenes // 5, 1)
    train = make_stand_in(mnist.train, options.scenes, options.size, kinds, seed=0)
    return Birds(train, make_stand_in(mnist.test, test, options.size, kinds, seed=1))


def picture(model: PartsNet, test: Photographs, size: int, title: str, path: Path) -> None:
    """Photographs with the windows of all transformers, and below their crops."""
    index = torch.arange(min(8, len(test.labels)), device=test.images.device)
    images = test.take(index, size)
    with torch.no_grad():
        theta, crops = model.look(images)
    panels = [
        Panel(image, its_theta, list(its_crops), title=test.classes[label], outlines=True)
        for image, its_theta, its_crops, label in zip(images, theta, crops, test.labels[index].tolist())
    ]
    save_picture(path, panels, title, columns=8)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("birds", __doc__)
    parser.add_argument("--cub", type=Path, help="the folder CUB_200_2011; default: the stand-in")
    parser.add_argument("--size", type=int, help="pixels of the images; default: 448, with --quick 112")
    parser.add_argument("--crop", type=int, help="pixels of the crops; default: 224, with --quick 56")
    parser.add_argument("--transformers", nargs="+", type=int, choices=[0, 2, 4], default=[0, 2, 4])
    parser.add_argument("--trunk", help="built-in, a torchvision model, or timm:NAME; default: googlenet")
    parser.add_argument("--pretrained", action="store_true", help="start the trunk from ImageNet's weights")
    parser.add_argument("--dropout", type=float, help="default: 0.7, the paper's; with --quick 0")
    parser.add_argument("--scenes", type=int, help="of the stand-in; default: 6,000, with --quick 1,000")
    parser.add_argument(
        "--kinds", type=int, default=3, help="of the stand-in's digits; classes: their square"
    )
    options = parser.parse_args(arguments)
    config = config_of(options, PAPER, QUICK)
    quick = options.quick
    options.size = options.size or (112 if quick else 448)
    options.crop = options.crop or (56 if quick else 224)
    options.trunk = options.trunk or ("built-in" if quick else "googlenet")
    options.scenes = options.scenes or (1000 if quick else 6000)
    if options.dropout is None:
        options.dropout = 0.0 if quick else 0.7
    with processes(options.device) as device:
        birds = load(options, device)
        lines = []
        for transformers in options.transformers:
            name = f"{transformers}xST-CNN" if transformers else "CNN"

            def build(transformers: int = transformers) -> PartsNet:
                trunk = make_trunk(options.trunk, options.pretrained)
                sides = {"size": options.size, "crop": options.crop, "dropout": options.dropout}
                return PartsNet(trunk, len(birds.train.classes), transformers, **sides)

            runs = run_seeds(
                name,
                build,
                lambda seed: Naming(birds, options.size, seed),
                config,
                options,
                device,
                figure="accuracy",
                paper=PAPER_ACCURACY.get((transformers, options.size), "-"),
            )
            lines.append(runs.line)
            if transformers and rank() == 0:
                assert isinstance(runs.model, PartsNet)
                title = f"{name} on {birds.test.source}"
                picture(
                    runs.model, birds.test, options.size, title, options.output / f"birds_{transformers}.png"
                )
        if rank() == 0:
            keys = "trunk", "pretrained", "size", "crop", "dropout"
            settings = {key: getattr(options, key) for key in keys} | {"classes": len(birds.train.classes)}
            where, source = (options.output, "birds"), birds.train.source
            title = f"Fine-grained classification, {options.size} px"
            print(save_table(*where, title, "accuracy, %", lines, config, PAPER, source, settings, device))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
