"""CUB-200-2011: the official folder, or a stand-in of real digits at two places of real photographs.

Images are kept as uint8 on one device; training crops them there, and mirrors photographs of birds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    mirrored: bool = True  # in training, by half; digits, unlike birds, are none when mirrored
    parts: Tensor | None = None  # (M, K, 3), of the stand-in's digits: x, y, and half the side

    def windows(self, count: int, size: int, generator: Generator) -> Tensor:
        """Theta, (count, 2, 3), of squares of ``size`` pixels at random places, half of them mirrored if
        :attr:`mirrored` says so."""
        scale = size / self.images.shape[-1]
        place = 2 * torch.rand(count, 2, generator=generator, device=generator.device) - 1
        theta = attention(scale, (1 - scale) * place)
        if not self.mirrored:
            return theta
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
        parts = None if self.parts is None else self.parts.to(device)
        return self._replace(images=self.images.to(device), labels=self.labels.to(device), parts=parts)


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


PARTS = (-0.1, -0.3), (0.1, 0.3)
"""Where the stand-in's two digits are on average, across and down, on the kept image."""
TOGETHER = 0.3, 0.25
"""How far both are moved at most, across and down: where a bird sits, its head and body are."""
APART = 0.1
"""How far each digit is moved at most on its own, across and down."""
REACH = 0.12
"""Half the side of the smallest digits; the largest have 30 % more."""
OFF_CENTRE = 0.6
"""How far from the middle of a crop single digits are at most."""


def make_stand_in(
    digits: Digits, count: int, size: int, kinds: int, seed: int, *, contrast: float = 1.0
) -> Photographs:
    """Photographs with a digit below ``kinds`` above and one of the ``kinds`` that follow below it. The class
    is the pair, so neither part alone tells it. Both digits move together, and each a little on its own.

    Args:
        digits: to choose from.
        count: how many.
        size: of a network's input; images are kept :data:`SPARE` times as large.
        kinds: of digits at each place, 5 at most.
        seed: of all that is drawn.
        contrast: of the photographs, which are faded to their mean colours below 1.
    """
    device = digits.images.device
    generator = torch.Generator(device).manual_seed(seed)
    means, together = torch.tensor(PARTS, device=device), torch.tensor(TOGETHER, device=device)

    def places(n: int) -> Tensor:
        both = 2 * torch.rand(n, 1, 2, generator=generator, device=device) - 1
        each = 2 * torch.rand(n, 2, 2, generator=generator, device=device) - 1
        return means + together * both + APART * each

    choices = range(kinds), range(kinds, 2 * kinds)
    images, values, parts = _scenes(digits, choices, places, REACH, count, size, generator, contrast)
    classes = [f"{first} and {second}" for first in choices[0] for second in choices[1]]
    labels = values[:, 0] * kinds + values[:, 1] - kinds
    return Photographs(images, labels, classes, stand_in_of(digits), mirrored=False, parts=parts)


def make_single(
    digits: Digits, count: int, size: int, kinds: int, seed: int, *, contrast: float = 1.0
) -> Photographs:
    """Photographs with one digit below twice ``kinds``, as large as in a window of half the stand-in, and as
    far off the middle: what a trunk is trained on before, as it is on ImageNet before it sees birds."""
    device = digits.images.device
    generator = torch.Generator(device).manual_seed(seed)

    def places(n: int) -> Tensor:
        return OFF_CENTRE * (2 * torch.rand(n, 1, 2, generator=generator, device=device) - 1)

    choices = (range(2 * kinds),)
    images, values, parts = _scenes(digits, choices, places, 2 * REACH, count, size, generator, contrast)
    classes = [str(kind) for kind in choices[0]]
    return Photographs(images, values[:, 0], classes, stand_in_of(digits), mirrored=False, parts=parts)


def _scenes(
    digits: Digits,
    choices: Sequence[range],
    places: Callable[[int], Tensor],
    reach: float,
    count: int,
    size: int,
    generator: Generator,
    contrast: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Images; (count, K), their digits, each one of its ``choices``; and :attr:`Photographs.parts`.

    Args:
        places: of N scenes where their digits are, (N, K, 2).
        reach: half the side of a digit, and up to 30 % more.
    """
    device = digits.images.device
    photographs = load_photographs(device=device)
    usable = [
        ((digits.labels >= its.start) & (digits.labels < its.stop)).nonzero().squeeze(1) for its in choices
    ]
    k, side = len(choices), round(SPARE * size)
    images, values, parts = [], [], []
    for start in range(0, count, 256):
        n = min(256, count - start)
        drawn = [its[torch.randint(len(its), (n,), generator=generator, device=device)] for its in usable]
        index = torch.stack(drawn, 1)
        place = places(n)
        half = reach * (1 + 0.3 * torch.rand(n, k, 1, generator=generator, device=device))
        scenes = backgrounds(photographs, n, side, generator)
        scenes = scenes.mean((2, 3), keepdim=True).lerp(scenes, contrast)
        ink = digits.take(index.flatten()).view(n, k, 28, 28)
        scenes = paste(scenes, ink, place, half.expand(n, k, 2), generator)
        images.append(to_bytes(scenes))
        values.append(digits.labels[index])
        parts.append(torch.cat([place, half], 2))
    return torch.cat(images), torch.cat(values), torch.cat(parts)
