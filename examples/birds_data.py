"""CUB-200-2011: the official folder, or a stand-in of real digits at two places of real photographs.

Images are kept as uint8 on one device; training crops and mirrors them there.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor

import stn_triton as stn
from examples.data import Digits
from examples.scenes import (
    backgrounds,
    load_photographs,
    middle_square,
    paste,
    remembered,
    resized,
    stand_in_of,
)
from examples.svhn_data import decode, to_bytes
from stn_triton.transforms import attention

SPARE = 8 / 7
"""Side of the kept images over that of a network's input: room for random crops."""


class Photographs(NamedTuple):
    """Labelled photographs, on one device."""

    images: Tensor  # (M, 3, S, S), uint8
    labels: Tensor  # (M,), int64
    classes: list[str]
    source: str

    def windows(self, count: int, size: int, generator: Generator) -> Tensor:
        """Theta, (count, 2, 3), of squares of ``size`` pixels at random places, half of them mirrored."""
        scale = size / self.images.shape[-1]
        place = 2 * torch.rand(count, 2, generator=generator, device=generator.device) - 1
        theta = attention(scale, (1 - scale) * place)
        mirrored = torch.rand(count, generator=generator, device=generator.device) < 0.5
        flip = torch.where(mirrored, -1.0, 1.0).view(-1, 1, 1)
        return torch.cat([theta[..., :1] * flip, theta[..., 1:]], -1)

    def take(self, index: Tensor, size: int, windows: Tensor | None = None) -> Tensor:
        """(N,) -> (N, 3, size, size), float32 from 0 to 1: the windows, by default those in the middle."""
        if windows is None:
            scale = size / self.images.shape[-1]
            windows = attention(scale, torch.zeros(len(index), 2, device=self.images.device))
        return stn.affine_grid_sample(self.images[index].float() / 255, windows, (size, size))

    def to(self, device: torch.device | str) -> Photographs:
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))


class Birds(NamedTuple):
    train: Photographs  # 5,994
    test: Photographs  # 5,794


def load_cub(folder: Path | str, size: int) -> Birds:
    """Caltech-UCSD Birds 200 2011, with its own split; boxes and parts are not used.

    Args:
        folder: the unpacked archive, ``CUB_200_2011/``: images.txt, image_class_labels.txt, classes.txt,
            train_test_split.txt and images/. The middle squares, scaled, are kept there afterwards, in
            ``squares-{side}.pt``.
        size: of a network's input in pixels; 224 or 448.

    Raises:
        FileNotFoundError: a file is not there.
        ImportError: Pillow is not installed.
    """
    folder = Path(folder)

    def table(name: str) -> dict[str, str]:
        try:
            lines = (folder / name).read_text().splitlines()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder} is not CUB-200-2011: it has no {name}. "
                "The data set is at https://www.vision.caltech.edu/datasets/cub_200_2011"
            ) from error
        return dict(line.split(maxsplit=1) for line in lines if line.strip())

    names, species, split = (
        table(f"{name}.txt") for name in ("images", "image_class_labels", "train_test_split")
    )
    classes = list(table("classes.txt").values())
    labels = torch.tensor([int(species[key]) - 1 for key in names])
    for_training = torch.tensor([split[key] == "1" for key in names])
    side = round(SPARE * size)

    def make() -> Tensor:
        squares = []
        for name in names.values():
            pixels = decode((folder / "images" / name).read_bytes())[None].float() / 255
            squares.append(to_bytes(resized(pixels, middle_square(*pixels.shape[-2:]), side)))
        return torch.cat(squares)

    images = remembered(folder / f"squares-{side}.pt", make)
    halves = (for_training, "training"), (~for_training, "test")
    return Birds(
        *(Photographs(images[is_in], labels[is_in], classes, f"CUB {name}") for is_in, name in halves)
    )


def make_stand_in(digits: Digits, count: int, size: int, kinds: int, seed: int) -> Photographs:
    """Photographs with a digit in the upper left and one in the lower right, each a seventh of the image
    wide. Digits are below ``kinds``; the class is the pair, so neither part alone tells it."""
    middles = torch.tensor([[-0.3, -0.3], [0.3, 0.3]])
    images, values = _scenes(digits, count, size, kinds, seed, middles, spread=0.25, reach=0.13)
    classes = [f"{first} and {second}" for first in range(kinds) for second in range(kinds)]
    return Photographs(images, values[:, 0] * kinds + values[:, 1], classes, stand_in_of(digits))


def make_single(digits: Digits, count: int, size: int, kinds: int, seed: int) -> Photographs:
    """Photographs with one digit, as large as in a window of half the stand-in: what a trunk is trained on
    before, as it is on ImageNet before it sees birds."""
    images, values = _scenes(digits, count, size, kinds, seed, torch.zeros(1, 2), spread=0.6, reach=0.26)
    return Photographs(images, values[:, 0], [str(kind) for kind in range(kinds)], stand_in_of(digits))


def _scenes(
    digits: Digits,
    count: int,
    size: int,
    kinds: int,
    seed: int,
    middles: Tensor,
    *,
    spread: float,
    reach: float,
) -> tuple[Tensor, Tensor]:
    """Images, and (count, K), their digits, each below ``kinds``, up to ``spread`` from one of K ``middles``;
    half the side of a digit is ``reach``, and up to 30 % more."""
    device = digits.images.device
    generator = torch.Generator(device).manual_seed(seed)
    photographs = load_photographs(device=device)
    (usable,) = (digits.labels < kinds).nonzero(as_tuple=True)
    k, side = len(middles), round(SPARE * size)
    images, values = [], []
    for start in range(0, count, 256):
        n = min(256, count - start)
        index = torch.randint(len(usable), (n, k), generator=generator, device=device)
        index = usable[index]
        place = spread * (2 * torch.rand(n, k, 2, generator=generator, device=device) - 1)
        half = reach * (1 + 0.3 * torch.rand(n, k, 1, generator=generator, device=device))
        scenes = backgrounds(photographs, n, side, generator)
        ink = digits.take(index.flatten()).view(n, k, 28, 28)
        scenes = paste(scenes, ink, place + middles.to(device), half.expand(n, k, 2), generator)
        images.append(to_bytes(scenes))
        values.append(digits.labels[index])
    return torch.cat(images), torch.cat(values)
