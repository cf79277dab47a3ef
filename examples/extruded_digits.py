"""A transformer in 3-D: ``python -m examples.extruded_digits``.

A digit is extruded to a solid, turned, and put somewhere into 60 x 60 x 60 voxels. A 3-D transformer turns
the volume before it is flattened along its depth to an image, which a 2-D network classifies: by labels
alone it learns to look at digits from the front (Jaderberg et al., 2015, section A.3).

Convention: as in the package, parameters map output coordinates to input coordinates, in the order x, y, z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import stn_triton as stn
from examples.data import SIDE, Digits, Distortion, Drawn, Mnist, load_mnist
from examples.models import cnn, count, fit_width
from examples.outputs import Panel, parameters_of, save_picture, save_table, save_training, transformers_of
from examples.runs import Runs, config_of, error, parser_of, positive, run_seeds, sizes
from examples.training import Config, Task, processes, rank
from stn_triton.nn import SpatialTransformer
from stn_triton.transforms import attention, compose

PARAMETERS, QUICK_PARAMETERS = 400_000, 100_000  # of each model, about; the paper has no number
PAPER = Config()  # distorted MNIST's: there is none for this
QUICK = Config(
    steps=1_500,
    batch=32,
    optimiser="adam",
    lr=3e-3,
    schedule="cosine",
    warm_up=0.2,
    log_every=50,
    evaluate_every=1_500,
    checkpoint_every=100,
    snapshots=20,
)


@dataclass(frozen=True)
class Extruded(Distortion):
    """A digit as a solid in ``size`` voxels a side, turned about the three axes by up to ``degrees`` to both
    sides, at a random place in which upright it would fit. :meth:`draw` gives theta, (N, 3, 4).

    Angle, scale and depth are not in the paper.
    """

    size: int = 60
    degrees: float = 45.0
    scale: float = 1.0  # of the digit's 28 pixels, in voxels
    depth: int = 14  # of the solid, in the digit's pixels

    def draw(self, count: int, generator: Generator, strength: Tensor | float = 1.0) -> Drawn:
        angles, place = (
            2 * torch.rand(count, 3, generator=generator, device=generator.device) - 1 for _ in range(2)
        )
        turn = rotation(strength * math.radians(self.degrees) * angles)
        reach = self.scale * SIDE / self.size  # of the digit's box, normalised
        sides = torch.cat([turn.new_full((2,), reach), turn.new_full((1,), reach * self.depth / SIDE)])
        to_solid = torch.cat([turn / sides.unsqueeze(-1), torch.zeros_like(place).unsqueeze(-1)], -1)
        return (compose(to_solid, attention(1.0, -strength * (1 - sides) * place)),)

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
    """(N, C, D, H, W) -> (N, C, H, W): what X-rays show from the front, the mean of each column, as a
    multiple of what an upright solid has, which takes ``share`` of the depth.

    It is the mean, as the brightest voxel of a column is often one inside the solid, which no small turn
    changes.
    """

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.share = share

    def forward(self, volume: Tensor) -> Tensor:
        return volume.mean(2) / self.share


SHARE = 14 / 60  # of the depth, that an upright solid of Extruded takes
WINDOW = 0.6  # of the volume's side: holds the solid however it is turned
LOOK = 15  # voxels a side, of the window that the localisation net sees
GAIN = 6.0  # of those voxels: most are 0, and without it the net has little to begin with


class SolidTransformer(SpatialTransformer):
    """Reads the window around the volume's centre of mass, turned as the localisation net says.

    The net sees that window, and has the pose alone to learn: to tell the place as well delays it. Of its
    matrix the first two columns are made orthonormal, and the third is their cross product: six numbers for
    a rotation, without the jumps that angles have (Zhou et al., 2019); the other six numbers are not used.
    What it returns has fewer slices than the window has voxels in depth: they are flattened anyway.
    """

    def __init__(self, size: int) -> None:
        side = 4 * size // 5
        super().__init__(localisation_3d(), "affine", (size // 4, side, side), dims=3, features=32)
        self.coarser = max(size // (2 * LOOK), 1)  # voxels of the volume, to a side of what the net sees

    def localise(self, input: Tensor) -> Tensor:
        place = centre_of_mass(input)
        window = attention(WINDOW, place)
        coarse = F.avg_pool3d(input, self.coarser)
        theta = super().localise(GAIN * stn.affine_grid_sample(coarse, window, (LOOK,) * 3))
        columns: Tensor = _EqualPulls.apply(theta[:, :, :2])
        first = F.normalize(columns[:, :, 0], dim=1)
        second = columns[:, :, 1]
        second = F.normalize(second - (first * second).sum(1, keepdim=True) * first, dim=1)
        turn = torch.stack([first, second, torch.linalg.cross(first, second)], 2)
        return torch.cat([WINDOW * turn, place.unsqueeze(-1)], 2)


def centre_of_mass(volumes: Tensor) -> Tensor:
    """(N, 1, D, H, W) -> (N, 3): x, y and z, normalised; 0 for what is empty."""
    volumes = volumes[:, 0].float()
    mass = volumes.sum((1, 2, 3)).clamp_min(1e-6)
    places = []
    for axis in (3, 2, 1):
        count = volumes.shape[axis]
        at = (2 * torch.arange(count, device=volumes.device) + 1) / count - 1
        profile = volumes.sum([other for other in (1, 2, 3) if other != axis])
        places.append((profile * at).sum(1) / mass)
    return torch.stack(places, 1)


class _EqualPulls(torch.autograd.Function):
    """The same numbers; to each sample's gradient the length that they have on average.

    A loss that is almost 0 has almost no gradient, though it still points to the front: of a batch, the few
    digits that are read wrongly say nearly all. With equal lengths each digit counts once.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1)
        tiny = torch.finfo(gradient.dtype).tiny
        return gradient / length.clamp_min(tiny) * length.mean()


def localisation_3d() -> nn.Sequential:
    """(N, 1, 15, 15, 15) -> (N, 32). With He's initial weights."""
    net = nn.Sequential(
        nn.Conv3d(1, 16, 5, stride=2),
        nn.ReLU(),
        nn.Conv3d(16, 32, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4**3, 32),
        nn.ReLU(),
    )
    for layer in net:
        if isinstance(layer, (nn.Conv3d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return net


def make_model(size: int, transformed: bool, parameters: int) -> nn.Sequential:
    """(N, 1, size, size, size) -> (N, 10): turn the volume or not, flatten it, classify the image. The
    classifier's width makes up for what the transformer takes of the ``parameters``."""
    if not transformed:
        width = fit_width(lambda filters: cnn(filters, size), parameters)
        return nn.Sequential(Flatten(SHARE), cnn(width, size))
    transformer = SolidTransformer(size)
    side = transformer.size[-1]
    width = fit_width(lambda filters: cnn(filters, side), parameters - count(transformer))
    return nn.Sequential(transformer, Flatten(SHARE / WINDOW), cnn(width, side))


class Solids(Task):
    def __init__(self, mnist: Mnist, distortion: Extruded, seed: int, test: int = 10_000) -> None:
        super().__init__(seed, mnist.train.images.device)
        self.mnist, self.distortion, self.test = mnist, distortion, test

    def batch(self, count: int, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        return self.distortion.batch(self.mnist.train, count, self.generator, part, self.strength)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """On the same volumes each time."""
        generator = Generator(self.generator.device).manual_seed(0)
        batches = (self.distortion.batch(self.mnist.test, n, generator) for n in sizes(self.test, 50))
        return {"error": error(model, batches)}

    def snapshot(self, model: nn.Module) -> list[Tensor]:
        return transformations(model, self.mnist.test, self.distortion)


def shown(digits: Digits, distortion: Extruded) -> tuple[Tensor, Tensor]:
    """The volumes in the picture and the animation, and their labels."""
    return distortion.batch(digits, 10, Generator(digits.images.device).manual_seed(1))


def transformations(model: nn.Module, digits: Digits, distortion: Extruded) -> list[Tensor]:
    """Of those volumes, if there is a transformer."""
    return parameters_of(lambda: model(shown(digits, distortion)[0]), model)


def panels(
    model: nn.Module, digits: Digits, distortion: Extruded, parameters: Sequence[Tensor]
) -> list[Panel]:
    """What is seen from the front before and after; over the former the front and the back of the box that
    becomes the output."""
    volumes, labels = shown(digits, distortion)
    (transformer,), (theta,) = transformers_of(model), parameters
    outputs = transformer.sample(volumes, theta.to(volumes))
    return [
        Panel(volume.mean(1), faces(one), [output.mean(1)], title=str(label.item()), outlines=True)
        for volume, one, output, label in zip(volumes, theta, outputs, labels)
    ]


def faces(theta: Tensor) -> Tensor:
    """(3, 4) -> (2, 2, 3): where x and y of the output's front and back are read, seen from the front."""
    return torch.stack([face(theta, depth) for depth in (-1.0, 1.0)])


def face(theta: Tensor, depth: float) -> Tensor:
    """(3, 4) -> (2, 3): where x and y of the output at this z are read, seen from the front."""
    return torch.cat([theta[:2, :2], (theta[:2, 3] + depth * theta[:2, 2]).unsqueeze(-1)], -1)


def draw_results(runs: Runs, digits: Digits, distortion: Extruded, folder: Path) -> None:
    """The picture and the animation."""
    draw = partial(panels, runs.model, digits, distortion)
    title = "Extruded digits, seen from the front: the input, the transformer's box, the output"
    save_picture(folder / "extruded_digits.png", draw(transformations(runs.model, digits, distortion)), title)
    save_training(folder / "extruded_digits.gif", runs.snapshots, draw, "Extruded digits")


def pose(to_solid: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 3, 4), from what is seen to the solid's box of :class:`Extruded` -> (N,), (N,): the angle between
    the line of sight and the solid's depth, and the digit's angle on the image, in degrees."""
    matrix = to_solid[:, :, :3].double() * to_solid.new_tensor([[SIDE], [SIDE], [Extruded.depth]])
    sight = matrix[:, :, 2]
    tilt = torch.atan2(sight[:, :2].norm(dim=1), sight[:, 2])
    angle = torch.atan2(matrix[:, 1, 0] - matrix[:, 0, 1], matrix[:, 0, 0] + matrix[:, 1, 1])
    return tilt.rad2deg(), angle.rad2deg()


def alignment(model: nn.Module, digits: Digits, distortion: Extruded) -> str:
    """How test digits are turned before and after the transformer, in words."""
    index = torch.arange(200, device=digits.images.device) % len(digits.labels)
    (drawn,) = distortion.draw(len(index), Generator(digits.images.device).manual_seed(0))
    (chosen,) = parameters_of(lambda: model(distortion.apply(digits, index, (drawn,))), model)
    (tilt, angle), (tilt_after, angle_after) = pose(drawn), pose(compose(drawn, chosen.to(drawn)))
    return (
        f"over {len(index)} test digits the line of sight is {tilt.mean():.0f} degrees off the digit's depth "
        f"before and {tilt_after.mean():.0f} after; the standard deviation of the angle on the image is "
        f"{angle.std():.0f} and {angle_after.std():.0f}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("extruded_digits", __doc__)
    parser.add_argument("--size", type=int, help="voxels a side; default: 60, with --quick 30")
    parser.add_argument("--degrees", type=float, default=Extruded.degrees)
    parser.add_argument("--parameters", type=int, help="of each model, about")
    parser.add_argument(
        "--test", type=positive, help="how many test volumes; default: 10,000, with --quick 1,000"
    )
    options = parser.parse_args(arguments)
    config = config_of(options, PAPER, QUICK)
    size = options.size or (30 if options.quick else 60)
    parameters = options.parameters or (QUICK_PARAMETERS if options.quick else PARAMETERS)
    test = options.test or (1000 if options.quick else 10_000)
    distortion = Extruded(size=size, degrees=options.degrees, scale=size / 60)
    with processes(options.device) as device:
        mnist = load_mnist(options.data, device, stand_in=options.stand_in)
        data = mnist.train.source
        settings = {
            "voxels a side": size,
            "degrees": options.degrees,
            "parameters": f"about {parameters:,}",
            "test volumes": test,
        }
        found = {
            name: run_seeds(
                name,
                lambda: make_model(size, name != "CNN", parameters),  # noqa: B023
                lambda seed: Solids(mnist, distortion, seed, test),
                config,
                options,
                device,
                settings | {"data": data},
            )
            for name in ("CNN", "3-D ST-CNN")
        }
        if rank() == 0:
            runs = found["3-D ST-CNN"]
            settings["pose:"] = alignment(runs.model, mnist.test, distortion)
            title = "Extruded digits, of which the paper gives a picture and no number"
            lines = [one.line for one in found.values()]
            where = options.output, "extruded_digits"
            print(save_table(*where, title, "error, %", lines, config, PAPER, data, settings, device))
            draw_results(runs, mnist.test, distortion, options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
