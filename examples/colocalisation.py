"""Finding what images have in common, with no labels: ``python -m examples.colocalisation``.

A hundred images of one digit, each somewhere on 84 x 84 pixels, translated (T) or translated among clutter
(TC: 16 pieces of 6 x 6 pixels of other digits). An attention transformer learns that its crops of two images
shall be more alike than its crop of one and a random crop of the same image, by a margin of 1 (Jaderberg et
al., 2015, section A.2).

Convention: a box is its centre and half its side, normalised: an attention's translation and scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import stn_triton as stn
from examples.data import SIDE, Cluttered, Digits, Similar, load_mnist
from examples.outputs import Panel, looks, save_picture, save_table
from examples.runs import config_of, parser_of, run_seeds
from examples.training import Config, Task, processes, rank, world_size
from stn_triton.nn import SpatialTransformer
from stn_triton.transforms import attention, invert

CANVAS, CROP, PIECES = 84, 28, 16
MARGIN = 1.0
LENGTH = 0.7
"""Of encodings. Two are at most 1 apart, squared, so that the hinge is never quite satisfied; at length 1 it
is by crops that are too large. (Not in the paper.)"""
PAPER_SCHEDULE = Config(steps=4000, batch=100, lr=3e-3, lr_every=3000, optimiser="adam", snapshots=0)
"""Every batch is the whole collection. (The paper does not give a schedule.)"""
QUICK = Config(steps=500, batch=100, lr=3e-3, lr_every=400, optimiser="adam", snapshots=0)
DISTORTIONS = {"T": Similar(size=CANVAS), "TC": Cluttered(size=CANVAS, patches=PIECES)}
PAPER = {"T": "100", "TC": "75-93"}  # % of the images found, over the digits

Encoding = Literal["classifier", "crop"]
Encoder = Callable[[Tensor], Tensor]


class Boxes(NamedTuple):
    """Squares: (N, 2) and (N,)."""

    centre: Tensor
    half: Tensor


class Collection(NamedTuple):
    """Images of one digit, and where it is, which is for the score alone."""

    images: Tensor  # (M, 1, 84, 84), from 0 to 1
    boxes: Boxes


def collect(digits: Digits, label: int, kind: str, generator: Generator, count: int = 100) -> Collection:
    """Different digits of one class, each at a random place; the box is its 28 x 28 pixels.

    The pieces of clutter are of any class.
    """
    distortion = DISTORTIONS[kind]
    (which,) = (digits.labels == label).nonzero(as_tuple=True)
    index = which[torch.randperm(len(which), generator=generator, device=generator.device)[:count]]
    drawn = distortion.draw(len(index), generator)
    to_canvas = invert(drawn[0])
    return Collection(distortion.apply(digits, index, drawn), Boxes(to_canvas[:, :, 2], to_canvas[:, 0, 0]))


def make_transformer(start: float = 1.0) -> SpatialTransformer:
    """The paper's: 8 filters of 9 x 9, stride 4, pooling, 8-8-3; crops of 28 x 28.

    ``start``: half the side of the box in the middle from which all crops start; 1 is the whole image.
    """
    side = ((CANVAS - 9) // 4 + 1) // 2
    localisation = nn.Sequential(
        nn.Conv2d(1, 8, 9, stride=4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * side**2, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
    )
    region = (-start, -start, start, start)
    return SpatialTransformer(localisation, "attention", (CROP, CROP), features=8, regions=region)


def make_encoder(kind: Encoding, digits: Digits, steps: int = 400, seed: int = 0) -> Encoder:
    """What crops are compared by: "classifier", the features of a network that was trained on upright digits
    and stays as it is; or "crop", the pixels. Of one length, so that no distance is won by contrast."""
    if kind == "crop":
        return lambda crops: LENGTH * F.normalize(crops.flatten(1), dim=1)
    device = digits.images.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = nn.Sequential(
            *(nn.Conv2d(1, 12, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(12, 24, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(24 * 4 * 4, 64), nn.ReLU()),
        ).to(device)
        head = nn.Linear(64, 10).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    optimiser = torch.optim.Adam([*features.parameters(), *head.parameters()], 1e-3)
    for _ in range(steps):
        index = torch.randint(len(digits.labels), (128,), generator=generator, device=device)
        loss = F.cross_entropy(head(features(digits.take(index))), digits.labels[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    features.requires_grad_(False)
    return lambda crops: LENGTH * F.normalize(features(crops), dim=1)


def random_crops(images: Tensor, generator: Generator) -> Tensor:
    """(N, 1, 28, 28): of each image 28 x 28 of its pixels, anywhere."""
    scale = SIDE / CANVAS
    place = 2 * torch.rand(len(images), 2, generator=generator, device=generator.device) - 1
    return stn.affine_grid_sample(images, attention(scale, (1 - scale) * place), (CROP, CROP))


def triplet_hinge(crops: Tensor, others: Tensor) -> Tensor:
    """Of encoded crops c and random ones o, (N, F), the mean over all pairs n, m of
    ``max(0, |c_n - c_m|^2 - |c_n - o_n|^2 + margin)``."""
    between = (crops.unsqueeze(1) - crops).square().sum(-1)
    to_other = (crops - others).square().sum(-1, keepdim=True)
    hinge = F.relu(between - to_other + MARGIN)
    return (hinge.sum() - hinge.diagonal().sum()) / (len(crops) * (len(crops) - 1))


def overlap(a: Boxes, b: Boxes) -> Tensor:
    """(N,): intersection over union. A negative half side turns a crop by 180 degrees, and is a side too."""
    low = torch.maximum(*(box.centre - box.half.abs().unsqueeze(-1) for box in (a, b)))
    high = torch.minimum(*(box.centre + box.half.abs().unsqueeze(-1) for box in (a, b)))
    common = (high - low).clamp_min(0).prod(-1)
    return common / (4 * a.half.square() + 4 * b.half.square() - common)


def boxes_of(theta: Tensor) -> Boxes:
    return Boxes(theta[:, :, 2], theta[:, 0, 0])


class Finding(Task):
    """The target is the images: the model is the transformer, and its output the crops."""

    def __init__(self, collection: Collection, encode: Encoder, seed: int) -> None:
        super().__init__(seed, collection.images.device)
        self.collection, self.encode = collection, encode

    def batch(self, count: int, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        images = self.collection.images[:count][part]
        return images, random_crops(images, self.generator)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return triplet_hinge(self.encode(output.float()), self.encode(target))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """% of the images whose intersection over union is above a half, its mean, and the loss with the same
        random crops each time, by which runs can be compared without knowing the boxes."""
        assert isinstance(model, SpatialTransformer)
        images, boxes = self.collection
        ratio = overlap(boxes_of(model.localise(images)), boxes)
        others = random_crops(images, Generator(images.device).manual_seed(0))
        return {
            "found": 100 * (ratio > 0.5).double().mean().item(),
            "IoU": ratio.mean().item(),
            "hinge": self.loss(model(images), others).item(),
        }


def picture(transformer: nn.Module, collection: Collection, title: str, path: Path) -> None:
    """Of ten images what is cropped and, in a second colour, the box that was to be found."""
    images = collection.images[:10]
    (look,) = looks(lambda: transformer(images), transformer)
    truth = attention(collection.boxes.half[:10], collection.boxes.centre[:10])
    panels = [
        Panel(image, torch.stack([theta, box]), [output], outlines=True)
        for image, theta, box, output in zip(images, look.parameters, truth, look.output)
    ]
    save_picture(path, panels, title)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("colocalisation", __doc__)
    parser.add_argument("--kinds", nargs="+", choices=list(DISTORTIONS), default=list(DISTORTIONS))
    parser.add_argument("--digits", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--encoder", choices=get_args(Encoding), default="classifier")
    parser.add_argument(
        "--start", type=float, default=1.0, help="share of the side that all crops start from"
    )
    parser.set_defaults(seeds=4)
    options = parser.parse_args(arguments)
    config = config_of(options, PAPER_SCHEDULE, QUICK)
    with processes(options.device) as device:
        if world_size() > 1:
            parser.error("the loss compares all images with each other, so it takes one process")
        mnist = load_mnist(options.data, device, stand_in=options.stand_in)
        encode = make_encoder(options.encoder, mnist.train)
        lines = []
        for kind in options.kinds:
            for label in options.digits:
                chance = Generator(device).manual_seed(label)
                collection = collect(mnist.train, label, kind, chance, config.batch)

                def make_task(seed: int) -> Finding:
                    return Finding(collection, encode, seed)  # noqa: B023

                name = f"{kind}, digit {label}"
                runs = run_seeds(
                    name,
                    lambda: make_transformer(options.start),
                    make_task,
                    config,
                    options,
                    device,
                    figure="found",
                    paper=PAPER[kind],
                )
                best = min(range(options.seeds), key=lambda at: runs.line.figures[at]["hinge"])
                figures = runs.line.figures[best]
                named = f"{name}, mean IoU {figures['IoU']:.2f}"
                lines.append(runs.line._replace(name=named, values=[figures["found"]]))
                if rank() == 0:
                    path = options.output / f"colocalisation_{kind}.png"
                    title = f"{name}: blue is cropped, orange was to be found"
                    picture(runs.models[best], collection, title, path)
        if rank() == 0:
            settings = {
                "starts, of which the one with the least loss counts,": options.seeds,
                "encoder": options.encoder,
                "start": options.start,
            }
            title = "Co-localisation, images with IoU > 0.5"
            where, data = (options.output, "colocalisation"), mnist.train.source
            print(
                save_table(*where, title, "found, %", lines, config, PAPER_SCHEDULE, data, settings, device)
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
