"""Photographs with real digits in them: what stands in for SVHN and CUB-200-2011 where those cannot be had.

Convention: as in the package, parameters map output coordinates to input coordinates, normalised, x first, -1
and 1 the outer edges. Scenes are made once, by seed, and stay on the device as uint8.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import stn_triton as stn
from examples.data import INK, SIDE, Digits
from examples.files import load, replacing
from stn_triton.transforms import attention

PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
    "immunohistochemistry", "moon", "retina", "rocket",
)  # fmt: skip
"""Those that scikit-image carries in itself."""


def stand_in_of(digits: Digits) -> str:
    """The source of scenes that are made of these digits."""
    return f"stand-in, {digits.source} digits over scikit-image's photographs"


def load_photographs(side: int = 256, device: torch.device | str = "cpu") -> Tensor:
    """(13, 3, side, side), float32 from 0 to 1: the middle squares, grey ones in three equal channels.

    Raises:
        ImportError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ModuleNotFoundError as error:
        raise ImportError("the stand-in needs scikit-image: pip install scikit-image") from error
    photographs = []
    for name in PHOTOGRAPHS:
        pixels = torch.from_numpy(getattr(data, name)().copy()).float() / 255
        pixels = pixels.expand(3, *pixels.shape) if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        photographs.append(resized(pixels[None], middle_square(*pixels.shape[-2:]), side))
    return torch.cat(photographs).to(device)


def middle_square(height: int, width: int) -> Tensor:
    """(1, 2, 3): reads the largest square in the middle of an image."""
    short = min(height, width)
    return torch.tensor([[[short / width, 0.0, 0.0], [0.0, short / height, 0.0]]])


def resized(image: Tensor, theta: Tensor, side: int) -> Tensor:
    """What theta, (1, 2, 3), upright, reads of one image, (1, C, H, W), as (1, C, side, side).

    Sampled densely enough to meet every pixel that is read, then averaged; borders are continued.
    """
    pixels = theta[0].diagonal().abs() * theta.new_tensor([image.shape[-1], image.shape[-2]])
    dense = max(1, int((pixels.max() / side).ceil()))
    found = stn.affine_grid_sample(image, theta, (dense * side, dense * side), padding_mode="border")
    return F.avg_pool2d(found, dense)


def backgrounds(photographs: Tensor, count: int, size: int, generator: Generator) -> Tensor:
    """(count, 3, size, size): random windows of random photographs, mirrored or not, each between a quarter
    and all of it. No photograph is copied: each is read by many transforms."""
    each = -(-count // len(photographs))
    shape = len(photographs), each
    scale = 0.25 + 0.75 * torch.rand(shape, generator=generator, device=generator.device)
    place = 2 * torch.rand(*shape, 2, generator=generator, device=generator.device) - 1
    theta = attention(scale, (1 - scale).unsqueeze(-1) * place)
    mirrored = torch.rand(shape, generator=generator, device=generator.device) < 0.5
    flip = torch.where(mirrored, -1.0, 1.0)
    theta = torch.cat([theta[..., :1] * flip[..., None, None], theta[..., 1:]], -1)
    windows = stn.affine_grid_sample(photographs, theta, (size, size)).flatten(0, 1)
    order = torch.randperm(shape[0] * each, generator=generator, device=generator.device)[:count]
    return windows[order]


def paste(canvas: Tensor, ink: Tensor, centre: Tensor, reach: Tensor, generator: Generator) -> Tensor:
    """Puts digits into scenes, each scene's in one colour that stands out from what is below.

    Args:
        canvas: (N, 3, S, S).
        ink: (N, K, 28, 28), from 0 to 1; empty where there is no digit.
        centre: (N, K, 2), of each digit on the canvas.
        reach: (N, K, 2), half the sides of its box on the canvas. (The box holds the ink; MNIST leaves four
            pixels around it.)
    """
    zoom = INK / SIDE / reach
    theta = torch.cat([zoom.diag_embed(), (-zoom * centre).unsqueeze(-1)], -1)
    size = canvas.shape[-2:]
    mask = stn.affine_grid_sample(ink.flatten(0, 1).unsqueeze(1), theta.flatten(0, 1), size)
    mask = mask.view(*ink.shape[:2], *size).amax(1, keepdim=True)
    below = (canvas * mask).sum((2, 3)) / mask.sum((2, 3)).clamp_min(1e-6)
    tint = torch.rand(below.shape, generator=generator, device=generator.device)
    colour = torch.where(below.mean(1, keepdim=True) > 0.5, 0.3 * tint, 1 - 0.3 * tint)
    return canvas + mask * (colour[..., None, None] - canvas)


REMAKE = "Delete it, and it is made again"


def remembered(path: Path, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, kept in a file that comes into being complete or not at all.

    Raises:
        DataError: the file is damaged.
    """
    if not path.exists():
        made = make()
        with replacing(path) as part:
            torch.save(made, part)
    return load(path, REMAKE, mmap=True)
