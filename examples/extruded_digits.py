"""A transformer in 3-D: ``python -m examples.extruded_digits``.

A digit is extruded to a solid, turned, and put somewhere into 60 x 60 x 60 voxels. A 3-D affine transformer turns
the volume before it is flattened along its depth to an image, which a 2-D network classifies: trained by labels
alone, it learns to look at digits from the front (Jaderberg et al., 2015, section A.3).

Convention: as in the package, parameters map output coordinates to input coordinates, x first, then y, then z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

import stn_triton as stn
from examples.data import SIDE, Digits, Distortion, Drawn
from stn_triton.nn import SpatialTransformer
from stn_triton.transforms import attention, compose


@dataclass(frozen=True)
class Extruded(Distortion):
    """A digit as a solid in ``size`` x ``size`` x ``size`` voxels, turned about the three axes by up to ``degrees``
    to both sides, at a random place in which upright it would fit. :meth:`draw` gives theta, (N, 3, 4).

    Angle, scale and depth are not in the paper.
    """

    size: int = 60
    degrees: float = 60.0
    scale: float = 1.0  # of the digit's 28 pixels, in voxels
    depth: int = 14  # of the solid, in the digit's pixels

    def draw(self, count: int, generator: Generator) -> Drawn:
        angles, place = (
            2 * torch.rand(count, 3, generator=generator, device=generator.device) - 1 for _ in range(2)
        )
        turn = rotation(math.radians(self.degrees) * angles)
        reach = self.scale * SIDE / self.size  # of the digit's box, normalised
        sides = turn.new_tensor([reach, reach, reach * self.depth / SIDE])
        to_solid = torch.cat([turn / sides.unsqueeze(-1), torch.zeros_like(place).unsqueeze(-1)], -1)
        return (compose(to_solid, attention(1.0, -(1 - sides) * place)),)

    def apply(self, digits: Digits, index: Tensor, drawn: Drawn) -> Tensor:
        """(N,) -> (N, 1, size, size, size). A solid is one image, ``depth`` times: no copy is made of it."""
        (theta,) = drawn
        solids = digits.take(index).unsqueeze(2).expand(-1, -1, self.depth, -1, -1)
        return stn.affine_grid_sample(solids, theta, (self.size,) * 3)


def rotation(angles: Tensor) -> Tensor:
    """(N, 3), about x, y and z in radians -> (N, 3, 3): about x first."""
    cos, sin = angles.cos(), angles.sin()
    zero, one = torch.zeros_like(cos[:, 0]), torch.ones_like(cos[:, 0])
    (cx, cy, cz), (sx, sy, sz) = cos.unbind(-1), sin.unbind(-1)
    about_x = [[one, zero, zero], [zero, cx, -sx], [zero, sx, cx]]
    about_y = [[cy, zero, sy], [zero, one, zero], [-sy, zero, cy]]
    about_z = [[cz, -sz, zero], [sz, cz, zero], [zero, zero, one]]
    x, y, z = (
        torch.stack([torch.stack(row, -1) for row in rows], -2) for rows in (about_x, about_y, about_z)
    )
    return z @ y @ x


class Flatten(nn.Module):
    """(N, C, D, H, W) -> (N, C, H, W): what one sees from the front, the brightest voxel of each column."""

    def forward(self, volume: Tensor) -> Tensor:
        return volume.amax(2)


def localisation_3d(size: int) -> nn.Sequential:
    """The paper's localisation net of ST-CNN with convolutions in 3-D, on volumes averaged to half the size."""
    side = ((size // 2 - 4) // 2 - 4) ** 3
    return nn.Sequential(
        nn.AvgPool3d(2),
        nn.Conv3d(1, 20, 5),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(20, 20, 5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20 * side, 20),
        nn.ReLU(),
    )


def make_transformer(size: int) -> SpatialTransformer:
    return SpatialTransformer(localisation_3d(size), "affine", (size,) * 3, dims=3, features=20)
