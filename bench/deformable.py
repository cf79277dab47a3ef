"""Spatial transformers beside deformable convolution: ``python -m bench.deformable``.

Dai et al., Deformable Convolutional Networks, 2017, say that a spatial transformer with thin-plate splines
costs too much. Here both do the same job, a 3 x 3 convolution of a feature map that adapts where it reads:
deformable convolution by an offset for each tap of each output, the transformer by one transformation of the
whole map before an ordinary convolution.

Parameters, arithmetic and memory follow from the shapes, for any device, and are derived below. Times are
those of the machine this runs on; on a CPU, of a small map, they show that it runs and nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stn_triton.kernels.host.files import replacing
from stn_triton.nn import SpatialTransformer, localisation_fcn
from stn_triton.transforms import control_lattice, tps_coefficients

from .machine import accelerator, facts
from .timing import own_stream, peak_bytes, time_device

TAPS = 9  # 3 x 3
POOLED = 8  # the localisation net sees the map averaged to 8 x 8
HIDDEN = 32, 32  # SVHN's ST-CNN Multi
LATTICE = 4
AFFINE = 8  # two coordinates, each a scalar product of three numbers, the third 1
TOGETHER = 32  # images whose columns torchvision's operator makes at a time
WEIGHING = 16  # two coordinates to pixels, their floors and fractions, four products


class Shape(NamedTuple):
    """Of the feature map that is read, and of the one that is written."""

    n: int
    c: int
    h: int
    w: int

    @property
    def pixels(self) -> int:
        return self.n * self.h * self.w

    def __str__(self) -> str:
        return "x".join(map(str, self))


# SVHN's feature maps in front of which ST-CNN Multi has transformers, and stages of a ResNet at batch 32.
SHAPES = Shape(128, 48, 32, 32), Shape(128, 64, 32, 32), Shape(128, 128, 16, 16)
SHAPES += Shape(32, 128, 56, 56), Shape(32, 256, 28, 28), Shape(32, 512, 28, 28)
SMALL = (Shape(2, 8, 12, 16),)


# --------------------------------------------------------------------------------------------- the layers
class DeformableConvolution(nn.Module):
    """torchvision's operator, its offsets from a 3 x 3 convolution that starts at zero, as by Dai et al."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.offsets = nn.Conv2d(channels, 2 * TAPS, 3, padding=1)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.offsets.bias)
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, map: Tensor) -> Tensor:
        weight, bias = self.convolution.weight, self.convolution.bias
        return deform_conv2d(map, self.offsets(map), weight, bias, padding=1)


def deform_conv2d(*arguments: Any, **options: Any) -> Tensor:
    """torchvision's.

    Raises:
        ImportError: it is not installed, or not for this build of PyTorch.
    """
    try:
        from torchvision import ops
    except (ImportError, RuntimeError) as error:  # the latter where its operators cannot be loaded
        raise ImportError(f"torchvision.ops.deform_conv2d is not there: {error}") from error
    return ops.deform_conv2d(*arguments, **options)


class Unfused(SpatialTransformer):
    """The transformer as it is written in PyTorch: a grid in memory, then ``grid_sample``.

    The spline's kernel at every pixel depends on the output's size alone: it is computed once, and the grid
    is its product with the coefficients.
    """

    def sample(self, input: Tensor, theta: Tensor) -> Tensor:
        shape = list(input.shape)
        if self.transform == "affine":
            grid = F.affine_grid(theta, shape, align_corners=False)
        else:
            kernel = self._kernel(shape[2:], theta)
            grid = (kernel @ tps_coefficients(theta)).unflatten(1, shape[2:])
        return F.grid_sample(input, grid, align_corners=False)

    def _kernel(self, size: Sequence[int], like: Tensor) -> Tensor:
        """(H W, K + 3): U(|p - c_k|), x, y, 1."""
        if not hasattr(self, "kernel"):
            axes = [(2 * torch.arange(n, device=like.device) + 1) / n - 1 for n in size]
            y, x = torch.meshgrid(*axes, indexing="ij")
            places = torch.stack([x, y], -1).flatten(0, 1)
            lattice = control_lattice(self.lattice, device=like.device)
            squared = (places[:, None] - lattice).square().sum(-1)
            radial = torch.xlogy(squared, squared)
            self.kernel = torch.cat([radial, places, torch.ones_like(places[:, :1])], 1)
        return self.kernel


def transformed(make: type[SpatialTransformer], transform: Any, shape: Shape) -> nn.Sequential:
    looking = nn.Sequential(
        nn.AdaptiveAvgPool2d(POOLED), localisation_fcn(HIDDEN, input_shape=(shape.c, POOLED, POOLED))
    )
    transformer = make(looking, transform, features=HIDDEN[-1])
    return nn.Sequential(transformer, nn.Conv2d(shape.c, shape.c, 3, padding=1))


# --------------------------------------------------------------------------------------- what they cost
def convolution_flops(shape: Shape, out: int) -> int:
    return 2 * TAPS * shape.c * out * shape.pixels


def localisation_flops(shape: Shape, parameters: int) -> int:
    widths = [shape.c * POOLED**2, *HIDDEN, parameters]
    return shape.n * (shape.c * shape.h * shape.w + sum(2 * a * b for a, b in itertools.pairwise(widths)))


def sampling_flops(shape: Shape, samples: int) -> int:
    """Of ``samples`` at each pixel: four corners, each a multiplication and an addition for each channel."""
    return samples * shape.pixels * (WEIGHING + 8 * shape.c)


def kernel_flops(shape: Shape) -> int:
    """At each pixel for each control point a difference, a squared length, a logarithm and a product, which
    are 7, and two multiplications and additions; then the affine part."""
    return shape.pixels * (LATTICE**2 * (7 + 4) + AFFINE)


def product_flops(shape: Shape) -> int:
    """At each pixel the product of the kernel, which is remembered, with two columns of coefficients."""
    return shape.pixels * 4 * (LATTICE**2 + 3)


def transformer_flops(shape: Shape, parameters: int, grid: int) -> int:
    own = localisation_flops(shape, parameters) + grid + sampling_flops(shape, 1)
    return own + convolution_flops(shape, shape.c)


def affine_flops(shape: Shape) -> int:
    return transformer_flops(shape, 6, AFFINE * shape.pixels)


def spline_flops(shape: Shape, grid: Callable[[Shape], int]) -> int:
    """``grid``: of what coefficients become a grid by; they are (K + 3) x K times K x 2 for each image."""
    k = LATTICE**2
    return transformer_flops(shape, 2 * k, shape.n * 4 * (k + 3) * k + grid(shape))


class Method(NamedTuple):
    """``kept`` counts neither the map that comes in nor parameters and their like, a few numbers an image."""

    name: str
    build: Callable[[Shape], nn.Module]
    flops: Callable[[Shape], int]  # forward; a multiplication and an addition are two
    kept: Callable[[Shape], int]  # float32 bytes of maps, grids and offsets kept for the backward pass
    scratch: Callable[[Shape], int]  # of the largest buffer that a step makes and drops


METHODS = (
    Method(
        "convolution",
        lambda shape: nn.Conv2d(shape.c, shape.c, 3, padding=1),
        lambda shape: convolution_flops(shape, shape.c),
        lambda shape: 0,
        lambda shape: 0,
    ),
    Method(
        "deformable convolution",
        lambda shape: DeformableConvolution(shape.c),
        lambda shape: (
            convolution_flops(shape, 2 * TAPS)
            + sampling_flops(shape, TAPS)
            + convolution_flops(shape, shape.c)
        ),
        lambda shape: 4 * 2 * TAPS * shape.pixels,  # offsets; the columns are made again
        lambda shape: 4 * TAPS * shape.c * shape.h * shape.w * min(shape.n, TOGETHER),
    ),
    Method(
        "affine transformer, unfused",
        lambda shape: transformed(Unfused, "affine", shape),
        affine_flops,
        lambda shape: 4 * (shape.c + 2) * shape.pixels,  # the sampled map, the grid
        lambda shape: 4 * 2 * shape.pixels,  # the grid's gradient
    ),
    Method(
        "affine transformer, fused",
        lambda shape: transformed(SpatialTransformer, "affine", shape),
        affine_flops,
        lambda shape: 4 * shape.c * shape.pixels,
        lambda shape: 0,
    ),
    Method(
        "spline transformer, unfused",
        lambda shape: transformed(Unfused, "tps", shape),
        lambda shape: spline_flops(shape, product_flops),
        lambda shape: 4 * (shape.c + 2) * shape.pixels + 4 * (LATTICE**2 + 3) * shape.h * shape.w,
        lambda shape: 4 * 2 * shape.pixels,
    ),
    Method(
        "spline transformer, fused",
        lambda shape: transformed(SpatialTransformer, "tps", shape),
        lambda shape: spline_flops(shape, kernel_flops),
        lambda shape: 4 * shape.c * shape.pixels,
        lambda shape: 0,
    ),
)


# -------------------------------------------------------------------------------------------- measuring
class Row(NamedTuple):
    shape: Shape
    method: str
    parameters: int
    flops: int
    convolution: int  # of the flops, the convolution's own
    kept: int
    scratch: int
    peak: int | None = None  # bytes beyond what was there, forward and backward; None on a CPU
    forward: float | None = None  # milliseconds, the median
    step: float | None = None  # forward and backward, by the map and all parameters
    how: str | None = None  # as bench.timing says
    missing: str | None = None  # why there is no time


def measure(shape: Shape, method: Method, device: torch.device, budget: float) -> Row:
    """``budget``: seconds for each of the two times; 0 leaves them out."""
    torch.manual_seed(0)
    layer = method.build(shape).to(device)
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    flops = method.flops(shape), convolution_flops(shape, shape.c)
    row = Row(shape, method.name, parameters, *flops, method.kept(shape), method.scratch(shape))
    if not budget:
        return row
    map = torch.randn(shape, device=device, requires_grad=True)
    leaves = [map, *layer.parameters()]

    def step() -> tuple[Tensor, ...]:
        output = layer(map)
        return torch.autograd.grad(output, leaves, torch.ones_like(output))

    def forward() -> Tensor:
        with torch.no_grad():
            return layer(map)

    try:
        with own_stream(device):
            forward()
            timed, stepped = time_device(forward, device, budget), time_device(step, device, budget)
            peak = peak_bytes(step, device)
    except ImportError as error:
        return row._replace(missing=str(error))
    return row._replace(forward=timed.median, step=stepped.median, how=stepped.how, peak=peak)


def as_markdown(rows: Sequence[Row]) -> str:
    """A row for each map and layer; arithmetic is the forward pass's."""
    lines = [
        "| map | layer | parameters | GFLOP | beside the convolution | kept, MB | scratch, MB | peak, MB "
        "| forward, ms | step, ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peak = "-" if row.peak is None else f"{row.peak / 1e6:.1f}"
        times = ["-" if value is None else f"{value:.3f}" for value in (row.forward, row.step)]
        lines.append(
            f"| {row.shape} | {row.method} | {row.parameters:,} | {row.flops / 1e9:.2f} | "
            f"{(row.flops - row.convolution) / 1e9:.3f} | {row.kept / 1e6:.1f} | {row.scratch / 1e6:.1f} | "
            f"{peak} | {times[0]} | {times[1]} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.deformable", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("--output", type=Path, help="a JSON file for the rows and the machine's facts")
    parser.add_argument("--budget", type=float, default=0.2, help="seconds for each time; 0: no times")
    parser.add_argument("--small", action="store_true", help="one small map, the default on a CPU if timed")
    options = parser.parse_args(arguments)
    device = accelerator() or torch.device("cpu")
    small = options.small or (device.type == "cpu" and options.budget > 0)
    rows = []
    for shape in SMALL if small else SHAPES:
        for method in METHODS:
            rows.append(measure(shape, method, device, options.budget))
    print(as_markdown(rows))
    for reason in dict.fromkeys(row.missing for row in rows if row.missing):
        print(f"\nnot timed: {reason}")
    if device.type == "cpu" and options.budget > 0:
        print("\nTimes on a CPU, of PyTorch's operators throughout: that it runs, and nothing else.")
    if options.output:
        content = {"facts": facts(device), "rows": [row._asdict() for row in rows]}
        with replacing(options.output) as part:
            part.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
