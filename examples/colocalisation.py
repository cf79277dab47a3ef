"""Finding what images have in common, with no labels: ``python -m examples.colocalisation``.

A hundred images of one digit, each somewhere on 84 x 84 pixels, translated (T) or translated among clutter
(TC: 16 pieces of 6 x 6 pixels of other digits). An attention transformer learns that its crops of two images
shall be more alike than its crop of one and a random crop of the same image, by a margin of 1 (Jaderberg et al.,
2015, section A.2).

Convention: a box is its centre and half its side, normalised: an attention's translation and scale.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import stn_triton as stn
from examples.data import SIDE, Cluttered, Digits, Similar, load_mnist
from examples.fit import Schedule, arguments_of, device_of, fit, schedule_of, seeded
from examples.outputs import Line, Panel, looks, save_picture, save_table
from stn_triton.nn import SpatialTransformer
from stn_triton.transforms import attention, invert

CANVAS, CROP, PIECES = 84, 28, 16
MARGIN = 1.0
LENGTH = 1.0
FULL = Schedule(iterations=4000, batch=100, rate=2e-3, divide_every=3000, optimiser="adam")
"""The batch is the whole collection. The paper does not give this schedule."""
QUICK = Schedule(iterations=600, batch=100, rate=3e-3, divide_every=450, optimiser="adam")
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
    """(N,): intersection over union. A negative half side, of a crop turned by 180 degrees, counts as its size."""
    low = torch.maximum(*(box.centre - box.half.abs().unsqueeze(-1) for box in (a, b)))
    high = torch.minimum(*(box.centre + box.half.abs().unsqueeze(-1) for box in (a, b)))
    common = (high - low).clamp_min(0).prod(-1)
    return common / (4 * a.half.square() + 4 * b.half.square() - common)


def boxes_of(theta: Tensor) -> Boxes:
    return Boxes(theta[:, :, 2], theta[:, 0, 0])


def train(
    collection: Collection, encode: Encoder, schedule: Schedule, start: float, name: str, seed: int
) -> tuple[SpatialTransformer, float]:
    """A transformer for one collection, all of which is every batch; and the seconds it took."""
    device = collection.images.device
    with seeded(seed, device) as generator:
        transformer = make_transformer(start).to(device)

        def loss_of(iteration: int) -> Tensor:
            crops = transformer(collection.images)
            others = random_crops(collection.images, generator)
            return triplet_hinge(encode(crops), encode(others))

        return transformer, fit(transformer, loss_of, schedule, name).seconds


@torch.no_grad()
def found_boxes(transformer: SpatialTransformer, collection: Collection) -> Boxes:
    return boxes_of(transformer.localise(collection.images))


def picture(transformer: SpatialTransformer, collection: Collection, title: str, path: str) -> None:
    """The crop, and in a second colour the box that was to be found."""
    images = collection.images[:10]
    (look,) = looks(lambda: transformer(images), transformer)
    truth = attention(collection.boxes.half[:10], collection.boxes.centre[:10])
    panels = [
        Panel(image, torch.stack([theta, box]), [output], outlines=True)
        for image, theta, box, output in zip(images, look.parameters, truth, look.output)
    ]
    save_picture(path, panels, title)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.colocalisation", description=(__doc__ or "").partition(":")[0]
    )
    arguments_of(parser, FULL)
    parser.add_argument("--kinds", nargs="+", choices=list(DISTORTIONS), default=list(DISTORTIONS))
    parser.add_argument("--digits", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--encoder", choices=get_args(Encoding), default="classifier")
    parser.add_argument(
        "--start", type=float, default=1.0, help="share of the side that all crops start from"
    )
    options = parser.parse_args(arguments)
    schedule = schedule_of(options, FULL, QUICK)
    device = device_of(options.device)
    mnist = load_mnist(options.data, device, stand_in=options.stand_in)
    encode = make_encoder(options.encoder, mnist.train)
    lines = []
    for kind in options.kinds:
        for label in options.digits:
            values, overlaps, seconds = [], [], 0.0
            for seed in range(options.seeds):
                chance = torch.Generator(device).manual_seed(seed)
                collection = collect(mnist.train, label, kind, chance, schedule.batch)
                name = f"{kind}, digit {label}, seed {seed}"
                transformer, took = train(collection, encode, schedule, options.start, name, seed)
                ratio = overlap(found_boxes(transformer, collection), collection.boxes)
                values.append(100 * (ratio > 0.5).double().mean().item())
                overlaps.append(ratio.mean().item())
                seconds += took / options.seeds
            mean = sum(overlaps) / len(overlaps)
            lines.append(
                Line(f"{kind}, digit {label}, mean IoU {mean:.2f}", values, PAPER[kind], seconds=seconds)
            )
            title = f"Co-localisation, {kind}: blue the crop, orange the box to be found"
            picture(transformer, collection, title, f"{options.output}/colocalisation_{kind}.png")
    settings = {
        "images": schedule.batch, "encoder": options.encoder, "start": options.start, "encoding's length": LENGTH,
        "chance": "a 28 x 28 box at random has IoU > 0.5 in 5 %",
    }  # fmt: skip
    print(
        save_table(
            options.output, "colocalisation", "Co-localisation, % of the images with IoU > 0.5", "found, %",
            lines, schedule, FULL, mnist.train.source, settings, device,
        )
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
