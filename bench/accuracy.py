"""Errors of the gradients beside PyTorch's, against float64: ``python -m bench.accuracy [--markdown]``.

An error is ||d - exact|| / ||exact||. ``exact`` is what float64 makes of the same inputs, which have been
rounded to the image's dtype before. PyTorch has two ways: ``F.affine_grid`` and ``F.grid_sample`` with
everything in the image's dtype, or with the grid made in float32 and then rounded, as ``F.grid_sample``
asks for it. The ratio is the smaller error of the two over ours.

With a GPU both run there. Without one our kernels run in Triton's interpreter, and PyTorch's sampler on the
CPU. The exit code is 1 if a gradient of a half image is farther from float64 than PyTorch's.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GPU = next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), None)
DEVICE = torch.device("cpu" if GPU is None or os.environ.get("TRITON_INTERPRET") == "1" else GPU)
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import stn_triton as stn  # noqa: E402

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)
CHANNELS = (3, 16)
PADDINGS = ("zeros", "border")
BATCH = 2
# Of images and outputs alike. On the CPU PyTorch's half backward (2.13) writes out of bounds from about 182.
SIZE = 64


# ------------------------------------------------------------------------------------------- the cases
def rotation(degrees: float, zoom: float, shift: float) -> Tensor:
    """(2, 3): the output shows a part of the image ``zoom`` times as wide as itself."""
    cos, sin = math.cos(math.radians(degrees)) * zoom, math.sin(math.radians(degrees)) * zoom
    return torch.tensor([[cos, -sin, shift], [sin, cos, -shift]], dtype=torch.float64)


def waves(size: int) -> Tensor:
    """(size, size, 2): the identity and smooth displacements of some pixels, as a flow makes them."""
    theta = torch.eye(2, 3, dtype=torch.float64)[None]
    grid = F.affine_grid(theta, [1, 1, size, size], align_corners=False)[0]
    return grid + 0.15 * torch.sin(3.0 * grid.flip(-1) + 1.0)


# What is sampled with a matrix; a grid is the other case.
THETAS = {
    "affine, mild": rotation(12.0, 0.9, 0.05),
    "affine, zoom in 16 x": rotation(5.0, 1 / 16, 0.1),
    "affine, zoom out 4 x": rotation(20.0, 4.0, 0.1),
}
CASES = (*THETAS, "grid, smooth")


class Inputs(NamedTuple):
    """An image, theta (N, 2, 3) or a grid (N, H, W, 2), and d output, all of one dtype."""

    image: Tensor
    params: Tensor
    grad_output: Tensor


def make_inputs(case: str, channels: int, dtype: torch.dtype, size: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    image, grad_output = torch.randn(2, BATCH, channels, size, size, dtype=torch.float64, generator=generator)
    params = THETAS[case] if case in THETAS else waves(size)
    # images differ a little
    params = params * (1 + 0.02 * torch.arange(BATCH, dtype=torch.float64).view(-1, *(1,) * params.dim()))
    return Inputs(*(tensor.to(dtype) for tensor in (image, params, grad_output)))


# ----------------------------------------------------------------------------------------- the samplers
class Pair(NamedTuple):
    """Something of d image and of d parameters."""

    image: float | Tensor
    params: float | Tensor


def gradients(output: Tensor, inputs: Inputs) -> Pair:
    return Pair(*torch.autograd.grad(output, inputs[:2], inputs.grad_output))


def leaves(inputs: Inputs, device: torch.device, dtype: torch.dtype | None = None) -> Inputs:
    image, params, grad_output = (tensor.to(device, dtype or tensor.dtype) for tensor in inputs)
    return Inputs(image.detach().requires_grad_(), params.detach().requires_grad_(), grad_output)


def our_gradients(inputs: Inputs, padding: str) -> Pair:
    inputs = leaves(inputs, DEVICE)
    image, params, grad_output = inputs
    if params.dim() == 4:
        output = stn.grid_sample(image, params, padding_mode=padding, align_corners=False)
    else:
        output = stn.affine_grid_sample(image, params, grad_output.shape[2:], "bilinear", padding, False)
    return gradients(output, inputs)


def pytorch_gradients(inputs: Inputs, padding: str, grid_dtype: torch.dtype | None = None) -> Pair:
    """``grid_dtype``: in which theta is made into a grid, which then gets the image's dtype."""
    image, grid, grad_output = inputs
    if grid.dim() == 3:
        theta = grid if grid_dtype is None else grid.to(grid_dtype)
        grid = F.affine_grid(theta, list(grad_output.shape), align_corners=False).to(image.dtype)
    return gradients(F.grid_sample(image, grid, padding_mode=padding, align_corners=False), inputs)


def exact_gradients(inputs: Inputs, padding: str) -> Pair:
    return pytorch_gradients(leaves(inputs, torch.device("cpu"), torch.float64), padding)


# -------------------------------------------------------------------------------------------- the errors
class Errors(NamedTuple):
    """Of one case, the errors of ours and of PyTorch's two; a grid is given, so that it has one way alone."""

    case: str
    dtype: torch.dtype
    channels: int
    padding: str
    ours: Pair
    pytorch: Pair
    float32_grid: Pair | None

    def pytorch_least(self) -> Pair:
        return self.pytorch if self.float32_grid is None else Pair(*map(min, self.pytorch, self.float32_grid))

    def ratios(self) -> Pair:
        """PyTorch's error over ours, for its better way."""
        return Pair(*(other / max(own, 1e-300) for other, own in zip(self.pytorch_least(), self.ours)))


def relative_errors(actual: Pair, exact: Pair) -> Pair:
    differences = (a.double().cpu() - b for a, b in zip(actual, exact))
    return Pair(*((d.norm() / b.norm()).item() for d, b in zip(differences, exact)))


def measure(case: str, dtype: torch.dtype, channels: int, padding: str, size: int = SIZE) -> Errors:
    inputs = make_inputs(case, channels, dtype, size)
    exact = exact_gradients(inputs, padding)
    ours = relative_errors(our_gradients(inputs, padding), exact)
    pytorch = relative_errors(pytorch_gradients(leaves(inputs, DEVICE), padding), exact)
    float32_grid = None
    if case in THETAS and dtype in HALVES:
        found = pytorch_gradients(leaves(inputs, DEVICE), padding, torch.float32)
        float32_grid = relative_errors(found, exact)
    return Errors(case, dtype, channels, padding, ours, pytorch, float32_grid)


def measure_all(
    dtypes: Sequence[torch.dtype] = DTYPES, channels: Sequence[int] = CHANNELS, size: int = SIZE
) -> Iterator[Errors]:
    for case, dtype, count, padding in itertools.product(CASES, dtypes, channels, PADDINGS):
        yield measure(case, dtype, count, padding, size)


def failures(found: Sequence[Errors]) -> list[Errors]:
    """Half images with a gradient that is farther from float64 than PyTorch's."""
    return [errors for errors in found if errors.dtype in HALVES and not min(errors.ratios()) >= 1]


# --------------------------------------------------------------------------------------------- printing
def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def largest_sum_of_ones(dtype: torch.dtype) -> float:
    """PyTorch's d image of a pixel that is read 4096 times, where d output is 1."""
    image = torch.zeros(1, 1, 8, 8, dtype=dtype, device=DEVICE, requires_grad=True)
    grid = torch.full((1, 64, 64, 2), 0.125, dtype=dtype, device=DEVICE)  # the centre of a pixel
    F.grid_sample(image, grid, align_corners=False).sum().backward()
    return image.grad.max().item()


def header() -> str:
    if DEVICE.type == "cpu":
        device = f"{platform.machine()} CPU, our kernels in Triton's interpreter"
    else:
        device = torch.get_device_module(DEVICE).get_device_name(DEVICE)
    sums = []
    for dtype in HALVES:
        ones = largest_sum_of_ones(dtype)
        kind = "wider" if ones == 4096 else name(dtype)
        sums.append(f"{name(dtype)} in {kind} (4096 ones make {ones:.0f})")
    return (
        f"torch {torch.__version__}, triton {metadata.version('triton')}, {device}.\n"
        f"PyTorch sums d image there: {', '.join(sums)}."
    )


def number(pair: Pair | None, which: int) -> str:
    return "-" if pair is None else f"{pair[which]:.1e}"


def line(errors: Errors) -> str:
    cells = [f"{errors.case:20} {name(errors.dtype):8} {errors.channels:8} {errors.padding:7}"]
    for which, ratio in enumerate(errors.ratios()):
        pairs = (errors.ours, errors.pytorch, errors.float32_grid)
        cells.append(" ".join(f"{number(pair, which):>7}" for pair in pairs) + f" {ratio:6.1f}")
    return " | ".join(cells)


def line_header() -> str:
    gradient = f"{'ours':>7} {'PyTorch':>7} {'f32grid':>7} {'ratio':>6}"
    return (
        f"{'':46} | {'d image':^30} | {'d parameters':^30}\n"
        f"{'case':20} {'dtype':8} {'channels':8} {'padding':7} | {gradient} | {gradient}"
    )


def largest(group: Sequence[Errors], sampler: str) -> Pair | None:
    """The largest errors of a sampler, a field of ``Errors``; None where it has none."""
    pairs = [pair for errors in group if (pair := getattr(errors, sampler)) is not None]
    return Pair(*map(max, zip(*pairs))) if pairs else None


def markdown(found: Sequence[Errors]) -> str:
    """Half images: for each case and dtype the largest errors over channels and paddings."""
    gradient = "ours | PyTorch | PyTorch, float32 grid"
    rows = [f"| case | image | d image: {gradient} | d parameters: {gradient} |", "|---|---|" + "---|" * 6]
    for case, dtype in itertools.product(CASES, HALVES):
        group = [errors for errors in found if (errors.case, errors.dtype) == (case, dtype)]
        pairs = [largest(group, sampler) for sampler in ("ours", "pytorch", "float32_grid")]
        cells = [number(pair, which) for which in range(2) for pair in pairs]
        rows.append(f"| {' | '.join((case, name(dtype), *cells))} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", action="store_true", help="the table of docs/numbers.md alone")
    options = parser.parse_args()
    print(header())
    found = []
    if not options.markdown:
        print(line_header())
    for errors in measure_all(HALVES if options.markdown else DTYPES):
        found.append(errors)
        if not options.markdown:
            print(line(errors), flush=True)
    if options.markdown:
        print(markdown(found))
    failed = failures(found)
    for errors in failed:
        print(f"larger than PyTorch's: {line(errors)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
