"""Co-localisation: finding what images have in common, with no labels: ``python -m examples.colocalisation``.

A hundred images of one digit, each somewhere on 84 x 84 pixels, translated (T) or among clutter (TC: 16 pieces of
6 x 6 pixels of other digits). An attention transformer learns that its crops of two images shall be more alike
than its crop of one image and a random crop of that image, by a margin of 1 (Jaderberg et al., 2015, section A.2).

Convention: a box is its centre, normalised, and half its side; both as an attention's translation and scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import stn_triton as stn
from examples.data import SIDE, Cluttered, Digits, Similar
from stn_triton.nn import SpatialTransformer
from stn_triton.transforms import attention, invert

CANVAS, CROP, PIECES, COUNT = 84, 28, 16, 100
MARGIN = 1.0
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


def collect(digits: Digits, label: int, kind: str, generator: Generator, count: int = COUNT) -> Collection:
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
    """What crops are compared by: "classifier", the features of a network that was trained on upright digits and
    stays as it is; or "crop", the pixels. Both of length 1, so that no distance can be won by contrast."""
    if kind == "crop":
        return lambda crops: F.normalize(crops.flatten(1), dim=1)
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
    return lambda crops: F.normalize(features(crops), dim=1)


def random_crops(images: Tensor, generator: Generator) -> Tensor:
    """(N, 1, 28, 28): of each image 28 x 28 of its pixels, anywhere."""
    scale = SIDE / CANVAS
    place = 2 * torch.rand(len(images), 2, generator=generator, device=generator.device) - 1
    return stn.affine_grid_sample(images, attention(scale, (1 - scale) * place), (CROP, CROP))


def triplet_hinge(crops: Tensor, others: Tensor) -> Tensor:
    """Over all pairs n, m of encoded crops, (N, F), the mean of max(0, |c_n - c_m|^2 - |c_n - o_n|^2 + margin)."""
    between = (crops.unsqueeze(1) - crops).square().sum(-1)
    to_other = (crops - others).square().sum(-1, keepdim=True)
    hinge = F.relu(between - to_other + MARGIN)
    return (hinge.sum() - hinge.diagonal().sum()) / (len(crops) * (len(crops) - 1))


def overlap(a: Boxes, b: Boxes) -> Tensor:
    """(N,): intersection over union. A box whose half side is negative, a mirrored crop's, has the same area."""
    low = torch.maximum(*(box.centre - box.half.abs().unsqueeze(-1) for box in (a, b)))
    high = torch.minimum(*(box.centre + box.half.abs().unsqueeze(-1) for box in (a, b)))
    common = (high - low).clamp_min(0).prod(-1)
    return common / (4 * a.half.square() + 4 * b.half.square() - common)


def boxes_of(theta: Tensor) -> Boxes:
    return Boxes(theta[:, :, 2], theta[:, 0, 0])
