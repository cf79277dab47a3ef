"""A transformer in 3-D: ``python -m examples.extruded_digits``.

A digit is extruded to a solid, turned, and put somewhere into 60 x 60 x 60 voxels. A 3-D affine transformer
turns the volume before it is flattened along its depth to an image, which a 2-D network classifies: trained by
labels alone, it learns to look at digits from the front (Jaderberg et al., 2015, section A.3).

Convention: as in the package, parameters map output coordinates to input coordinates, x first, then y, then z.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import stn_triton as stn
from examples.data import SIDE, Digits, Distortion, Drawn, load_mnist
from examples.fit import Schedule, arguments_of, device_of, fit, schedule_of, seeded, share_wrong
from examples.outputs import Line, Panel, looks, save_picture, save_table
from stn_triton.nn import SpatialTransformer
from stn_triton.transforms import attention, compose

FULL = Schedule(iterations=150_000, batch=256, rate=0.01, divide_every=50_000)  # distorted MNIST's
QUICK = Schedule(iterations=400, batch=32, rate=1e-3, divide_every=320, optimiser="adam")


@dataclass(frozen=True)
class Extruded(Distortion):
    """A digit as a solid in ``size`` voxels a side, turned about the three axes by up to ``degrees`` to both
    sides, at a random place in which upright it would fit. :meth:`draw` gives theta, (N, 3, 4).

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
    """The localisation net of the paper's ST-CNN with convolutions in 3-D, on volumes of half the size."""
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


def make_model(size: int, transformed: bool, filters: int = 32, units: int = 128) -> nn.Sequential:
    """(N, 1, size, size, size) -> (N, 10): turn the volume or not, flatten it, halve the image, classify it."""
    side = size // 2 // 4
    return nn.Sequential(
        *([make_transformer(size)] if transformed else []),
        Flatten(),
        nn.AvgPool2d(2),
        *(nn.Conv2d(1, filters, 9, padding=4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(filters, filters, 7, padding=3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(filters * side**2, units), nn.ReLU(), nn.Linear(units, 10)),
    )


def test_volumes(digits: Digits, distortion: Extruded, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same volumes each time."""
    generator = Generator(digits.images.device).manual_seed(0)
    for start in range(0, count, 50):
        yield distortion.batch(digits, min(50, count - start), generator)


def train(
    transformed: bool, digits: Digits, distortion: Extruded, schedule: Schedule, seed: int
) -> tuple[nn.Sequential, float]:
    """A model, and the seconds it took."""
    device = digits.images.device
    with seeded(seed, device) as generator:
        model = make_model(distortion.size, transformed).to(device)

        def loss_of(iteration: int) -> Tensor:
            volumes, labels = distortion.batch(digits, schedule.batch, generator)
            return F.cross_entropy(model(volumes), labels)

        return model, fit(model, loss_of, schedule, f"transformer: {transformed}, seed {seed}").seconds


def picture(model: nn.Sequential, digits: Digits, distortion: Extruded, path: str) -> None:
    """What is seen from the front before and after; over the former the front and the back face of the box that
    becomes the output."""
    volumes, labels = distortion.batch(digits, 10, Generator(digits.images.device).manual_seed(1))
    model.eval()
    (look,) = looks(lambda: model(volumes), model)
    panels = []
    for volume, theta, output, label in zip(volumes, look.parameters, look.output, labels):
        faces = torch.stack([face(theta, depth) for depth in (-1.0, 1.0)])
        front = volume.amax(1)
        panels.append(Panel(front, faces, [output.amax(1)], title=str(label.item()), outlines=True))
    save_picture(
        path, panels, "Extruded digits, seen from the front: the input, the transformer's box, the output"
    )


def face(theta: Tensor, depth: float) -> Tensor:
    """(3, 4) -> (2, 3): where x and y of the output at this z are read, seen from the front."""
    return torch.cat([theta[:2, :2], (theta[:2, 3] + depth * theta[:2, 2]).unsqueeze(-1)], -1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.extruded_digits", description=(__doc__ or "").partition(":")[0]
    )
    arguments_of(parser, FULL)
    parser.add_argument("--size", type=int, help="voxels a side; default: 60, with --quick 30")
    parser.add_argument("--degrees", type=float, default=Extruded.degrees)
    parser.add_argument("--test", type=int, help="how many test volumes; default: 10,000, with --quick 500")
    options = parser.parse_args(arguments)
    schedule = schedule_of(options, FULL, QUICK)
    size = options.size or (30 if options.quick else 60)
    count = options.test or (500 if options.quick else 10_000)
    distortion = Extruded(size=size, degrees=options.degrees, scale=size / 60)
    device = device_of(options.device)
    mnist = load_mnist(options.data, device, stand_in=options.stand_in)
    lines = []
    for transformed, name in ((False, "CNN"), (True, "3-D ST-CNN")):
        values, seconds = [], 0.0
        for seed in range(options.seeds):
            model, took = train(transformed, mnist.train, distortion, schedule, seed)
            values.append(share_wrong(model, test_volumes(mnist.test, distortion, count)))
            seconds += took / options.seeds
        parameters = sum(parameter.numel() for parameter in model.parameters())
        lines.append(Line(name, values, "-", parameters, seconds))
    settings = {"voxels a side": size, "degrees": options.degrees, "test volumes": count}
    print(
        save_table(
            options.output, "extruded_digits", "Extruded digits, % error (the paper gives a picture, and no number)",
            "error, %", lines, schedule, FULL, mnist.train.source, settings, device,
        )
    )  # fmt: skip
    picture(model, mnist.test, distortion, f"{options.output}/extruded_digits.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
