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
from examples.files import reading
from examples.scenes import (
    REMAKE,
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

_HOME = "https://www.vision.caltech.edu/datasets/cub_200_2011"
_REMEDY = f"Get CUB-200-2011 anew from {_HOME}"
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
        FileNotFoundError: a table is not there.
        DataError: a file is damaged or missing, or says what cannot be.
        ImportError: Pillow is not installed.
    """
    folder = Path(folder)

    def table(name: str) -> dict[str, str]:
        path = folder / name
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} is not CUB-200-2011: it has no {name}. The data set is at {_HOME}"
            )
        with reading(path, _REMEDY):
            rows = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines()]
            found = {key: value.strip() for key, value in filter(None, rows)}
            if not found:
                raise ValueError("it is empty")
        return found

    def column(name: str, allowed: range) -> Tensor:
        """A whole number for each image."""
        with reading(folder / name, _REMEDY):
            its = table(name)
            values = [int(its[key]) for key in names]
            if not all(value in allowed for value in values):
                raise ValueError(f"it has {min(values)} to {max(values)}, not {allowed[0]} to {allowed[-1]}")
        return torch.tensor(values)

    names = table("images.txt")
    with reading(folder / "classes.txt", _REMEDY):
        its = table("classes.txt")
        classes = [its[str(number)] for number in range(1, len(its) + 1)]
    labels = column("image_class_labels.txt", range(1, len(classes) + 1)) - 1
    for_training = column("train_test_split.txt", range(2)).bool()
    side = round(SPARE * size)

    def make() -> Tensor:
        squares = []
        for name in names.values():
            path = folder / "images" / name
            with reading(path, _REMEDY):
                pixels = decode(path.read_bytes())[None].float() / 255
            squares.append(to_bytes(resized(pixels, middle_square(*pixels.shape[-2:]), side)))
        return torch.cat(squares)

    kept = folder / f"squares-{side}.pt"
    images = remembered(kept, make)
    with reading(kept, REMAKE):
        if images.dtype != torch.uint8 or images.shape != (len(names), 3, side, side):
            raise ValueError(f"it has images of {images.dtype} and shape {tuple(images.shape)}")
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
