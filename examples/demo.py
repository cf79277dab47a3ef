"""Warp photographs, compare with float64, draw a figure: ``python -m examples.demo`` (``make demo``).

Convention: ``theta`` maps output coordinates to input coordinates, both normalised, x first, -1 and 1 the
outer edges (``align_corners=False``). Images are (N, C, H, W) with values from 0 to 1.

With a GPU the compiled kernels run, and are timed. Without one the same kernels run in Triton's interpreter,
and the package's ordinary CPU path, which is made of PyTorch's operators, runs too.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GPU = next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), None)
DEVICE = "cpu" if GPU is None or os.environ.get("TRITON_INTERPRET") == "1" else GPU
if DEVICE == "cpu":
    # To be set before Triton is imported. Whoever sets it to 0 gets PyTorch's operators alone.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import stn_triton as stn  # noqa: E402
from stn_triton import backend  # noqa: E402

Sampler = Callable[[Tensor, Tensor], Tensor]

# float32 may land on the other side of a jump (a tie of nearest, a kink of bilinear) than float64, and be
# right. Samples this near to one, in input pixels, are left out; float32 coordinates are good to about 5e-5.
JUMP_BAND = 1e-4


# ------------------------------------------------------------------------------------ what is sampled
class Region(NamedTuple):
    """A parallelogram of a photograph, in its pixels, that becomes a whole output image."""

    x: float  # the centre
    y: float
    across: float  # half the extent along the output's x
    down: float  # half the extent along the output's y
    angle: float = 0.0  # of the output's x axis, in degrees, clockwise as y points down
    flatten: float = 1.0  # then scales y: undoes a view from the side

    def theta(self, image: Tensor) -> Tensor:
        """(2, 3)"""
        height, width = image.shape[-2:]
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        pixels = torch.tensor(
            [
                [self.across * cos, -self.down * sin, self.x],
                [self.across * sin * self.flatten, self.down * cos * self.flatten, self.y],
            ]
        )
        centre = torch.tensor([[0.0, 0.0, 1.0]])
        return pixels * torch.tensor([[2.0 / width], [2.0 / height]]) - centre


FACE, SHUTTLE = Region(223, 118, 84, 84, -4), Region(410, 168, 92, 92, 4)
PATCH, NAME_TAG = Region(170, 385, 45, 45, 12), Region(306, 359, 30, 30, 9)
COFFEE = Region(212, 166, 142, 142, -20, 0.8)
CAT = Region(150, 150, 112, 112, 8)
EYE = Region(75, 115, 22, 22, 8)


def photograph(name: str, left: int, side: int) -> Tensor:
    """(1, 3, side, side), channels last in memory as photographs are, from scikit-image's own files."""
    from skimage import data

    pixels = torch.from_numpy(getattr(data, name)()[:side, left : left + side].copy())
    return (pixels.float() / 255).permute(2, 0, 1)[None]


class Case(NamedTuple):
    name: str
    image: Tensor
    theta: Tensor  # (1, 2, 3), or (1, T, 2, 3): T transforms of the image
    size: int  # of the output
    mode: str = "bilinear"


def make_cases(size: int) -> list[Case]:
    astronaut = photograph("astronaut", 0, 512)
    coffee = photograph("coffee", 75, 400)
    cat = photograph("chelsea", 100, 300)
    crops = torch.stack([region.theta(astronaut) for region in (FACE, SHUTTLE, PATCH, NAME_TAG)])[None]
    tilt, level = COFFEE.theta(coffee)[None], CAT.theta(cat)[None]
    # PyTorch's CPU sampler indexes half images with 16-bit integers, and past 32,767 pixels reads and writes
    # outside of them (2.13 does): this one is small.
    small = astronaut[..., 38:198, 143:303].contiguous().half()
    face = Region(80, 80, 60, 60, -12).theta(small)[None]
    return [
        Case("bilinear, four crops", astronaut.contiguous(), crops, size // 2),
        Case("bilinear", coffee.contiguous(), tilt, size),
        Case("bicubic", cat.contiguous(), level, size, "bicubic"),
        Case("nearest", cat.contiguous(), level, size, "nearest"),
        Case("bilinear, channels last", coffee, tilt, size),
        Case("bilinear, float16 image", small, face, size),
    ]


# ----------------------------------------------------------------------------------------- comparison
def ours(image: Tensor, theta: Tensor, size: int, mode: str = "bilinear") -> Tensor:
    return stn.affine_grid_sample(image, theta, (size, size), mode)


def pytorchs(image: Tensor, theta: Tensor, size: int, mode: str = "bilinear") -> Tensor:
    """The same with PyTorch's two functions, in the image's dtype, as they ask for one dtype."""
    theta = theta.to(image.dtype)
    if theta.dim() == 4:
        transforms = theta.shape[1]
        copies = image.unsqueeze(1).expand(-1, transforms, -1, -1, -1).flatten(0, 1)
        return pytorchs(copies, theta.flatten(0, 1), size, mode).unflatten(0, (-1, transforms))
    grid = F.affine_grid(theta, [theta.shape[0], image.shape[1], size, size], align_corners=False)
    return F.grid_sample(image, grid, mode, align_corners=False)


def near_jump(case: Case) -> Tensor:
    """Which samples fall on a jump of nearest or of bilinear's slope; (size, size) or (T, size, size)."""
    theta = case.theta.double().flatten(0, -3)
    grid = F.affine_grid(theta, [theta.shape[0], 1, case.size, case.size], align_corners=False)
    pixels = (grid + 1) * torch.tensor(case.image.shape[:1:-1]) / 2 - 0.5
    return ((2 * pixels - (2 * pixels).round()).abs() < 2 * JUMP_BAND).any(-1)


def roughness(samples: Tensor) -> Tensor:
    """The loss: half the squared differences of neighbours, added up, once each sample is a 5 x 5 mean."""
    samples = F.avg_pool2d(samples.flatten(0, -4), 5, stride=1)
    return (samples.diff(dim=-1).square().sum() + samples.diff(dim=-2).square().sum()) / 2


def evaluate(sampler: Sampler, image: Tensor, theta: Tensor, cotangent: Tensor) -> list[Tensor]:
    """The output, and the gradients with respect to image and theta; in float64, on the CPU."""
    inputs = [x.detach().clone().requires_grad_() for x in (image, theta)]
    output = sampler(*inputs)
    gradients = torch.autograd.grad(output, inputs, cotangent.to(output))
    return [x.detach().cpu().double() for x in (output, *gradients)]


class Row(NamedTuple):
    case: Case
    ran_on: str
    errors: list[tuple[float, float]]  # ours and PyTorch's: of the output, d image and d theta
    times: list[tuple[float, float]]  # ours and PyTorch's, in ms: forward and backward


def accepted(row: Row) -> bool:
    """Whether none of our errors is materially larger than PyTorch's.

    The largest of 100,000 errors has little luck in it: twice PyTorch's is allowed. Those of theta are few,
    of sums that nearly cancel: four times. Below a few roundings to the image's dtype, or half a last place
    of a float32 coordinate in pixels, errors are not compared.
    """
    image = row.case.image
    nothing = max(4 * torch.finfo(image.dtype).eps, torch.finfo(torch.float32).eps * max(image.shape[2:]) / 4)
    return all(our <= max(nothing, factor * its) for (our, its), factor in zip(row.errors, (2, 2, 4)))


def compare(case: Case, name: backend.Name) -> Row:
    """Ours and PyTorch's against float64, each error relative to the largest entry there is."""
    skipped = near_jump(case).view(*case.theta.shape[1:-2], 1, case.size, case.size)
    our_sampler = partial(ours, size=case.size, mode=case.mode)
    pytorchs_sampler = partial(pytorchs, size=case.size, mode=case.mode)
    image, theta = case.image.double(), case.theta.double()
    samples = pytorchs_sampler(image, theta).requires_grad_()
    (cotangent,) = torch.autograd.grad(roughness(samples), samples)
    cotangent = cotangent.masked_fill(skipped, 0).half()  # which every dtype holds: all get the same
    witness = evaluate(pytorchs_sampler, image, theta, cotangent)
    arguments = (case.image.to(DEVICE), case.theta.to(DEVICE), cotangent.to(DEVICE))
    with backend.use(name):
        our_results = evaluate(our_sampler, *arguments)
        times = time_both(case) if name == "triton" else []
    pytorchs_results = evaluate(pytorchs_sampler, *arguments)
    for output in (witness, our_results, pytorchs_results):
        output[0].masked_fill_(skipped, 0)
    errors = []
    for exact, *both in zip(witness, our_results, pytorchs_results):
        scale = exact.abs().max().item() or 1.0
        our_error, pytorchs_error = ((x - exact).abs().max().item() / scale for x in both)
        errors.append((our_error, pytorchs_error))
    return Row(case, name, errors, times)


def time_both(case: Case) -> list[tuple[float, float]]:
    """Medians in ms, on a batch twice the size of the GPU's L2 cache: nothing is found there again."""
    gpu = torch.get_device_module(DEVICE)
    cache = getattr(gpu.get_device_properties(), "L2_cache_size", 0) or 64 << 20
    batch = min(max(2 * cache // case.image.nbytes, 1), 512)
    image = case.image.to(DEVICE).repeat(batch, 1, 1, 1)
    if case.image.stride(1) == 1:
        image = image.contiguous(memory_format=torch.channels_last)
    theta = case.theta.to(DEVICE).repeat(batch, *[1] * (case.theta.dim() - 1))
    image.requires_grad_()
    theta.requires_grad_()

    def median(function: Callable[[], Any], repetitions: int = 50) -> float:
        events = [[gpu.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
        for _ in range(5):
            function()
        for start, stop in events:
            start.record()
            function()
            stop.record()
        gpu.synchronize()
        return statistics.median(start.elapsed_time(stop) for start, stop in events)

    times = []
    for sampler in (ours, pytorchs):
        forward = partial(sampler, image, theta, case.size, case.mode)
        output = forward()
        ones = torch.ones_like(output)
        backward = partial(torch.autograd.grad, output, (image, theta), ones, retain_graph=True)
        times.append((median(forward), median(backward)))
    return list(zip(*times))


# ---------------------------------------------------------------------------------------------- table
def print_table(rows: Sequence[Row]) -> None:
    what = ["forward", "d image", "d theta"] + (["forward, ms", "backward, ms"] if rows[0].times else [])
    print(f"{'':39}" + "".join(f"{title:19}" for title in what).rstrip())
    print(f"{'what':26}{'ran on':13}" + "".join(f"{'ours':9}{'PyTorch':10}" for _ in what).rstrip())
    for above, row in zip([None, *rows], rows):
        name = "" if above and above.case is row.case else row.case.name
        cells = [f"{x:<9.1e}{y:<10.1e}" for x, y in row.errors]
        cells += [f"{x:<9.3f}{y:<10.3f}" for x, y in row.times]
        print(f"{name:26}{row.ran_on:13}" + "".join(cells).rstrip())


def versions() -> str:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "not installed"
    device = platform.machine() if DEVICE == "cpu" else torch.get_device_module(DEVICE).get_device_name()
    return f"stn_triton {stn.__version__}, torch {torch.__version__}, triton {triton}, {DEVICE} ({device})"


# --------------------------------------------------------------------------------------------- figure
INK = "#222222"
COLOURS = ["#E69F00", "#56B4E9", "#F0E442", "#CC79A7"]  # Okabe and Ito's: distinct for the colour-blind too
CORNERS = [(-1, -1), (1, -1), (1, 1), (-1, 1)]  # of an output, clockwise from the upper left
FIGURE, PANEL, GAP, CAPTION = (1600, 1275), 383, 12, 30  # pixels
CAPTIONS = "One photograph, four transforms", "Turned and stretched: the rim made round", "Levelled, enlarged"
DARKEST = 1e-2  # of a photograph's largest gradient


def samples_and_gradient(case: Case) -> tuple[Tensor, Tensor]:
    """The samples, and for each pixel of the photograph the size of the loss's gradient, (H, W)."""
    image = case.image.detach().to(DEVICE).requires_grad_()
    samples = ours(image, case.theta.to(DEVICE), case.size, case.mode)
    (gradient,) = torch.autograd.grad(roughness(samples), image)
    return samples.detach().cpu(), gradient[0].norm(dim=0).cpu()


def pixels_of(image: Tensor) -> Any:
    """(C, H, W) -> (H, W, C) for matplotlib."""
    return image.clamp(0, 1).permute(1, 2, 0).numpy()


def badge(axes: Any, x: float, y: float, text: str, colour: str, **options: Any) -> None:
    circle = {"boxstyle": "circle,pad=0.22", "facecolor": colour, "edgecolor": INK, "linewidth": 0.8}
    centred = {"ha": "center", "va": "center", "fontsize": 8.5, "fontweight": "bold"}
    axes.text(x, y, text, bbox=circle, **centred, **options)


def draw_map(axes: Any, image: Tensor, theta: Tensor, colour: str, lines: int, labels: str = "") -> None:
    """Where the output lies on the input: its border, lines of constant x and y, labelled corners."""
    import matplotlib.patheffects as effects

    half = torch.tensor([image.shape[-1], image.shape[-2]]) / 2

    def on_input(points: Sequence[tuple[float, float]]) -> Any:
        return ((torch.tensor([(*point, 1.0) for point in points]) @ theta.T + 1) * half - 0.5).T.numpy()

    for k in [2 * line / lines - 1 for line in range(1, lines)]:
        for ends in ([(k, -1), (k, 1)], [(-1, k), (1, k)]):
            axes.plot(*on_input(ends), color=colour, linewidth=0.8, alpha=0.85)
    thick = {"linewidth": 2, "path_effects": [effects.withStroke(linewidth=3.6, foreground="#00000090")]}
    border = on_input(CORNERS + CORNERS[:2])
    axes.plot(*border, color=colour, **(thick if lines else {"linewidth": 0.8}))
    for label, x, y in zip(labels, *on_input(CORNERS)):
        badge(axes, x, y, label, colour)


def draw_figure(cases: Sequence[tuple[str, Case]], output: Path) -> None:
    """For each photograph the sampling grid on it, the samples, its gradient; then the interpolations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws into memory: needs no display
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    width, height = FIGURE
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)

    def corner(row: int, column: int) -> tuple[int, int]:
        """The upper left of a panel, in pixels from the upper left; the last column stands apart."""
        return 8 + column * (PANEL + GAP) + (16 if column == 3 else 0), CAPTION + 4 + row * (PANEL + CAPTION)

    def add_axes(left: float, top: float, across: float, down: float) -> Any:
        place = (left / width, 1 - (top + down) / height, across / width, down / height)
        axes = figure.add_axes(place, xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes

    def show(row: int, column: int, pixels: Any, tiles: int = 1, index: int = 0, **options: Any) -> Any:
        """Draws into a panel, or into one of its tiles * tiles."""
        left, top = corner(row, column)
        side = (PANEL - 4 * (tiles - 1)) / tiles
        axes = add_axes(left + index % tiles * (side + 4), top + index // tiles * (side + 4), side, side)
        axes.imshow(pixels, aspect="auto", **options)
        axes.autoscale(False)
        return axes

    def write(row: int, column: int, text: str, above: bool = False, **options: Any) -> None:
        left, top = corner(row, column)
        y = top - 9 if above else top + PANEL + 19
        figure.text(left / width, 1 - y / height, text, color=INK, va="baseline", **options)

    heat: dict[str, Any] = {
        "cmap": "inferno",
        "norm": LogNorm(DARKEST, 1, clip=True),
        "interpolation": "antialiased",
    }
    for row, (caption, case) in enumerate(cases):
        samples, gradient = samples_and_gradient(case)
        photo = show(row, 0, pixels_of(case.image[0]))
        sensitivity = show(row, 2, (gradient / gradient.max()).numpy(), **heat)
        write(row, 0, caption, fontsize=12)
        maps = case.theta.flatten(0, -3)
        for index, (theta, result) in enumerate(zip(maps, samples.flatten(0, -4))):
            single = len(maps) == 1
            colour = COLOURS[1] if single else COLOURS[index]
            labels = "1234" if single else "abcd"[index]
            draw_map(sensitivity, case.image, theta, colour, 0)
            draw_map(photo, case.image, theta, colour, 12 if single else 6, labels)
            axes = show(row, 1, pixels_of(result), 1 if single else 2, index)
            axes.spines[:].set(visible=True, color=colour, linewidth=3)
            inset = 0.456 if single else 0.412  # of the axes: the same distance from the corner
            for label, (x, y) in zip(labels, CORNERS):
                badge(axes, 0.5 + inset * x, 0.5 - inset * y, label, colour, transform=axes.transAxes)
    last = cases[-1][1]
    draw_map(photo, last.image, EYE.theta(last.image), "white", 0)
    for row, mode in enumerate(["nearest", "bilinear", "bicubic"]):
        zoomed = ours(last.image.to(DEVICE), EYE.theta(last.image)[None].to(DEVICE), last.size, mode)
        show(row, 3, pixels_of(zoomed[0].cpu()))
        write(row, 3, mode, fontsize=12)
    titles = "Photograph and sampling grid", "Samples", "Gradient by the photograph", "One eye, enlarged"
    for column, title in enumerate(titles):
        write(0, column, title, above=True, fontsize=13.5, fontweight="bold")
    left, top = corner(len(cases) - 1, 2)
    bar = add_axes(left + 60, top + PANEL + 9, PANEL - 150, 9)
    bar.imshow(torch.logspace(math.log10(DARKEST), 0, 256)[None].numpy(), aspect="auto", **heat)
    write(len(cases) - 1, 2, f"{DARKEST:g}", fontsize=11)
    figure.text((left + PANEL - 80) / width, 1 - (top + PANEL + 19) / height, "1", fontsize=11)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("build/demo.png"), help="default: %(default)s")
    parser.add_argument("--size", type=int, default=320, help="of the sampled images, default: %(default)s")
    options = parser.parse_args(arguments)
    if options.size < 16:
        parser.error(f"--size must be 16 or more, got {options.size}")
    packages = {"matplotlib": "matplotlib", "scikit-image": "skimage"}
    missing = [name for name, module in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        parser.error(f"this needs {' and '.join(missing)}: pip install stn_triton[demo]")

    chosen = backend.select(DEVICE)
    if chosen.name == "interpreter" and importlib.util.find_spec("triton") is None:
        chosen = backend.Backend("torch", "Triton is not installed")
    names: list[backend.Name] = [chosen.name]
    if chosen.name == "interpreter":
        names.append("torch")
    cases = make_cases(options.size)
    print(f"{versions()}, backend: {chosen.name} ({chosen.reason})")
    print("largest error against float64, relative to the largest entry there, beside that of PyTorch's")
    print("F.affine_grid + F.grid_sample (whose grid is as narrow as the image)")
    rows = [compare(case, name) for case in cases for name in names]
    print_table(rows)
    share = torch.cat([near_jump(case).flatten() for case in cases]).double().mean().item()
    print(f"left out: {share:.2%} of the samples, as results or slopes jump within {JUMP_BAND:g} pixels")
    if chosen.name == "interpreter":
        reason = "no GPU" if GPU is None else "TRITON_INTERPRET is set"
        print(f"not timed, {reason}: the interpreter's time says nothing about the kernels'")
    elif chosen.name == "torch":
        print(f"kernels neither run nor timed: {chosen.reason}")
    with backend.use(chosen.name):
        draw_figure(list(zip(CAPTIONS, cases)), options.output)
    print(f"figure: {options.output}")
    worse = [row for row in rows if not accepted(row)]
    for row in worse:
        print(f"FAILED: {row.case.name} on {row.ran_on}: an error is materially larger than PyTorch's")
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
