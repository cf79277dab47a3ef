"""Warp photographs, compare with float64, draw a figure: ``python -m examples.demo`` (``make demo``).

Convention: every transform maps output coordinates to input coordinates, both normalised, x first, -1 and 1
the outer edges (``align_corners=False``). Images are (N, C, H, W) with values from 0 to 1.

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
if DEVICE == "cpu" and importlib.util.find_spec("triton") is not None:
    # To be set before Triton is imported. Whoever sets it to 0 gets PyTorch's operators alone.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import stn_triton as stn  # noqa: E402
from bench.interpreter import quick_interpreter  # noqa: E402
from examples import straighten  # noqa: E402
from examples.files import replacing  # noqa: E402
from stn_triton import backend, viz  # noqa: E402

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


FACE, SHUTTLE = Region(223, 118, 84, 84), Region(410, 168, 92, 92, 4)
PATCH, NAME_TAG = Region(170, 385, 45, 45, 12), Region(306, 359, 30, 30, 9)
COFFEE = Region(212, 166, 142, 142, -20, 0.8)
EYE = Region(75, 113, 30, 20)  # the cat's
BRICKS = (127, 30), (404, 30), (470, 480), (93, 480)  # a rectangle of the wall, clockwise, in pixels
EYES, NOSE = ((75, 115), (222, 125)), (170, 238)
LENS, EINSTEIN_RADIUS, SOFTENING = (0.5, 0.5), 0.23, 0.09  # in image widths


def photograph(name: str, left: int, top: int, side: int) -> Tensor:
    """(1, 3, side, side), channels last in memory as photographs are, from scikit-image's own files."""
    from skimage import data

    pixels = torch.from_numpy(getattr(data, name)()[top : top + side, left : left + side].copy())
    if pixels.dim() == 2:
        pixels = pixels.unsqueeze(-1).repeat(1, 1, 3)
    return (pixels.float() / 255).permute(2, 0, 1)[None]


def normalised(pixels: Sequence[Sequence[float]], side: int) -> Tensor:
    """Pixel coordinates, (K, 2), of a square image."""
    return (2 * torch.tensor(pixels, dtype=torch.float32) + 1) / side - 1


def homography_to(corners: Tensor) -> Tensor:
    """(4, 2) -> (3, 3): takes the output's corners there. Two linear equations a corner, h_33 = 1."""
    rows = []
    for (x, y), (u, v) in zip(CORNERS, corners.tolist()):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    solution = torch.linalg.solve(torch.tensor(rows).double(), corners.double().flatten())
    return torch.cat([solution, solution.new_ones(1)]).view(3, 3).float()


def wide_eyes(side: int) -> tuple[Tensor, Tensor]:
    """(K, 2) both: control points, and where they are read. A ring at each eye is read from a smaller one."""
    lattice = stn.transforms.control_lattice(4)
    eyes = normalised(EYES, side)
    still = torch.cat([lattice[lattice.abs().amax(1) == 1], normalised([NOSE], side)])
    angle = torch.arange(6) * (math.pi / 3)
    ring = torch.stack([angle.cos(), angle.sin()], -1)
    control_points, points = (
        torch.cat([still, (eyes[:, None] + radius * ring).flatten(0, 1)]) for radius in (0.3, 0.18)
    )
    return control_points, 0.92 * points  # so that the border is seen


def gravitational_lens(side: int, size: int) -> Tensor:
    """(2, size, size): a mass deflects light from behind by an angle of 1 / distance."""
    offset = stn.affine_grid(stn.transforms.identity(1), (1, 1, size, size), False)[0].movedim(-1, 0) / 2
    offset = offset + 0.5 - torch.tensor(LENS).view(2, 1, 1)
    squared = offset.square().sum(0) + SOFTENING**2
    return -offset * (EINSTEIN_RADIUS**2 / squared) * side


class Case(NamedTuple):
    name: str
    kind: viz.Kind
    image: Tensor
    params: Tensor  # (1, ...), or, of affine maps, (1, T, 2, 3): T transforms of the image
    size: int  # of the output
    mode: str = "bilinear"
    control_points: Tensor | None = None


def make_cases(size: int) -> list[Case]:
    astronaut = photograph("astronaut", 0, 0, 512)
    coffee = photograph("coffee", 75, 0, 400).contiguous()
    bricks = photograph("brick", 0, 0, 512)
    cat = photograph("chelsea", 100, 0, 300).contiguous()
    stars = photograph("hubble_deep_field", 300, 300, 400).contiguous()
    crops = torch.stack([region.theta(astronaut) for region in (FACE, SHUTTLE, PATCH, NAME_TAG)])[None]
    tilt = COFFEE.theta(coffee)[None]
    wall = homography_to(normalised(BRICKS, 512))[None]
    control_points, points = wide_eyes(300)
    lens = gravitational_lens(400, size)[None]
    # PyTorch's CPU sampler indexes half images with 16-bit integers, and past 32,767 pixels reads and writes
    # outside of them (2.13 does): this one is small.
    small = astronaut[..., 38:198, 143:303].contiguous().half()
    face = Region(80, 80, 60, 60, -12).theta(small)[None]
    cases = [
        Case("affine, four crops", "affine", astronaut.contiguous(), crops, size // 2),
        Case("affine, bicubic", "affine", coffee, tilt, size, "bicubic"),
        Case("affine, nearest", "affine", coffee, tilt, size, "nearest"),
        Case("affine, float16 image", "affine", small, face, size),
        Case("projective, channels last", "projective", bricks, wall, size),
        Case("thin-plate spline", "tps", cat, points[None], size, "bilinear", control_points),
        Case("flow", "flow", stars, lens, size),
    ]
    step = max(1, 96 // size)  # of small outputs the photographs are small too, for the interpreter's time
    return [
        case._replace(
            image=case.image[..., ::step, ::step].contiguous(
                memory_format=torch.channels_last if case.image.stride(1) == 1 else torch.contiguous_format
            ),
            params=case.params / step if case.kind == "flow" else case.params,
        )
        for case in cases
    ]


# ----------------------------------------------------------------------------------------- comparison
def ours(case: Case, image: Tensor, params: Tensor) -> Tensor:
    size = (case.size, case.size)
    if case.kind == "flow":
        return stn.flow_grid_sample(image, params, case.mode)
    if case.kind == "projective":
        return stn.projective_grid_sample(image, params, size, case.mode)
    if case.control_points is not None:
        control_points = case.control_points.to(params)
        return stn.tps_grid_sample(image, params, size, case.mode, control_points=control_points)
    return stn.affine_grid_sample(image, params, size, case.mode)


def pytorchs(case: Case, image: Tensor, params: Tensor) -> Tensor:
    """The same with PyTorch's functions, in the image's dtype, as they ask for one dtype."""
    grid = coordinates(case, params.to(image.dtype))
    transforms = len(grid) // len(image)
    copies = image.unsqueeze(1).expand(-1, transforms, -1, -1, -1).flatten(0, 1)
    samples = F.grid_sample(copies, grid, case.mode, align_corners=False)
    return samples.unflatten(0, (-1, transforms)) if transforms > 1 else samples


def coordinates(case: Case, params: Tensor) -> Tensor:
    """(N T, size, size, 2), by the formulas, in the dtype of the parameters."""
    params = params.flatten(0, -4 if case.kind == "flow" else -3)
    shape = [len(params), 1, case.size, case.size]
    if case.kind == "affine":
        return F.affine_grid(params, shape, align_corners=False)
    xy = F.affine_grid(torch.eye(2, 3).to(params).expand(len(params), -1, -1), shape, align_corners=False)
    if case.kind == "flow":
        return xy + params.movedim(1, -1) * (2 / case.image.shape[-1])
    xy1 = F.pad(xy, (0, 1), value=1.0)
    if case.kind == "projective":
        uvw = xy1 @ params.mT.unsqueeze(1)
        return uvw[..., :2] / uvw[..., 2:]
    assert case.control_points is not None
    controls = case.control_points.to(params)

    def kernel(places: Tensor) -> Tensor:
        squared = (places.unsqueeze(-2) - controls).square().sum(-1)
        return torch.xlogy(squared, squared)

    linear = F.pad(controls, (0, 1), value=1.0)
    system = torch.cat([torch.cat([kernel(controls), linear], 1), F.pad(linear.T, (0, 3))])
    solution = torch.linalg.solve(system, F.pad(params, (0, 0, 0, 3))).unsqueeze(1)
    return kernel(xy[:1]) @ solution[..., :-3, :] + xy1 @ solution[..., -3:, :]


def near_jump(case: Case) -> Tensor:
    """Which samples fall on a jump of nearest or of bilinear's slope; (T, size, size)."""
    pixels = (coordinates(case, case.params.double()) + 1) * torch.tensor(case.image.shape[:1:-1]) / 2 - 0.5
    return ((2 * pixels - (2 * pixels).round()).abs() < 2 * JUMP_BAND).any(-1)


def roughness(samples: Tensor) -> Tensor:
    """The loss: half the squared differences of neighbours, added up, once each sample is a 5 x 5 mean."""
    samples = F.avg_pool2d(samples.flatten(0, -4), 5, stride=1)
    return (samples.diff(dim=-1).square().sum() + samples.diff(dim=-2).square().sum()) / 2


def evaluate(sampler: Sampler, image: Tensor, params: Tensor, cotangent: Tensor) -> list[Tensor]:
    """The output, and the gradients with respect to image and parameters; in float64, on the CPU."""
    inputs = [x.detach().clone().requires_grad_() for x in (image, params)]
    output = sampler(*inputs)
    gradients = torch.autograd.grad(output, inputs, cotangent.to(output))
    return [x.detach().cpu().double() for x in (output, *gradients)]


class Row(NamedTuple):
    case: Case
    ran_on: str
    errors: list[tuple[float, float]]  # ours and PyTorch's: of the output, d image and d params
    times: list[tuple[float, float]]  # ours and PyTorch's, in ms: forward and backward


def accepted(row: Row) -> bool:
    """Whether none of our errors is materially larger than PyTorch's.

    Twice PyTorch's is allowed for luck; three times for the parameters on PyTorch's own operators, whose few
    sums nearly cancel and are float32 in both. Below a few roundings to the image's dtype, or half a last
    place of a float32 coordinate in pixels, errors are not compared.
    """
    image = row.case.image
    nothing = max(4 * torch.finfo(image.dtype).eps, torch.finfo(torch.float32).eps * max(image.shape[2:]) / 4)
    factors = (2, 2, 3 if row.ran_on == "torch" else 2)
    return all(our <= max(nothing, factor * its) for (our, its), factor in zip(row.errors, factors))


def compare(case: Case, name: backend.Name) -> Row:
    """Ours and PyTorch's against float64, each error relative to the largest entry there is."""
    skipped = near_jump(case).unsqueeze(1)
    our_sampler, pytorchs_sampler = partial(ours, case), partial(pytorchs, case)
    image, params = case.image.double(), case.params.double()
    samples = pytorchs_sampler(image, params).requires_grad_()
    (cotangent,) = torch.autograd.grad(roughness(samples), samples)
    cotangent = cotangent.masked_fill(skipped, 0).half()  # which every dtype holds: all get the same
    witness = evaluate(pytorchs_sampler, image, params, cotangent)
    arguments = (case.image.to(DEVICE), case.params.to(DEVICE), cotangent.to(DEVICE))
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
    params = case.params.to(DEVICE).repeat(batch, *[1] * (case.params.dim() - 1))
    image.requires_grad_()
    params.requires_grad_()

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
        forward = partial(sampler, case, image, params)
        output = forward()
        ones = torch.ones_like(output)
        backward = partial(torch.autograd.grad, output, (image, params), ones, retain_graph=True)
        times.append((median(forward), median(backward)))
    return list(zip(*times))


# ---------------------------------------------------------------------------------------------- table
def print_table(rows: Sequence[Row]) -> None:
    what = ["forward", "d image", "d params"] + (["forward, ms", "backward, ms"] if rows[0].times else [])
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
CORNERS = [(-1, -1), (1, -1), (1, 1), (-1, 1)]  # of an output, clockwise from the upper left
FIGURE, LEFT, TOP, PANEL, GAP = (1600, 1198), 31, 54, 306, 8  # pixels
ROWS = "photograph, sampling grid", "samples", "gradient by the photograph"
DIGITS = 14
DARKEST = 1e-2  # of a photograph's largest gradient


class Column(NamedTuple):
    """Of the figure: a transform of a photograph."""

    title: str
    caption: str
    case: Case
    lines: int


def make_columns(cases: Sequence[Case]) -> list[Column]:
    crops, tilt, _, _, wall, eyes, lens = cases
    return [
        Column("attention, similarity", "four transforms of a photograph", crops, 6),
        Column("affine", "turned and stretched: the rim is round", tilt, 12),
        Column("projective", "a wall seen at an angle, put upright", wall, 12),
        Column("thin-plate spline", "control points pull the eyes open", eyes, 16),
        Column("flow", "a gravitational lens before the stars", lens, 20),
    ]


def samples_and_gradient(case: Case) -> tuple[Tensor, Tensor]:
    """The samples, and for each pixel of the photograph the size of the loss's gradient, (H, W)."""
    image = case.image.detach().to(DEVICE).requires_grad_()
    samples = ours(case, image, case.params.to(DEVICE))
    (gradient,) = torch.autograd.grad(roughness(samples), image)
    return samples.detach().cpu(), gradient[0].norm(dim=0).cpu()


def train_on_digits(steps: int) -> straighten.Straightened:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small images gain nothing by more
    try:
        return straighten.train(steps=steps)
    finally:
        torch.set_num_threads(threads)


def draw_figure(columns: Sequence[Column], digits: straighten.Straightened, output: Path) -> None:
    """Each transform's sampling grid, samples and gradient; below the digits and the interpolations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws into memory: needs no display
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    width, height = FIGURE
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)

    def add_axes(left: float, top: float, across: float, down: float) -> Any:
        """Axes at a place in pixels from the upper left."""
        place = (left / width, 1 - (top + down) / height, across / width, down / height)
        axes = figure.add_axes(place, xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes

    def write(left: float, baseline: float, text: str, **options: Any) -> None:
        options = {"color": INK, "va": "baseline", "fontsize": 11, **options}
        figure.text(left / width, 1 - baseline / height, text, **options)

    heat: dict[str, Any] = {
        "cmap": "inferno",
        "norm": LogNorm(DARKEST, 1, clip=True),
        "interpolation": "antialiased",
    }
    bold: dict[str, Any] = {"fontsize": 13, "fontweight": "bold"}
    tops = [TOP + row * (PANEL + GAP) for row in range(3)]
    for top, text in zip(tops, ROWS):
        write(17, top + PANEL / 2, text, rotation=90, va="center", ha="center", fontsize=11.5)
    for index, (title, caption, case, lines) in enumerate(columns):
        left = LEFT + index * (PANEL + GAP)
        write(left, 22, title, **bold)
        write(left, 43, caption)
        samples, gradient = samples_and_gradient(case)
        results = samples.flatten(0, -4)
        tiles = 1 if len(results) == 1 else 2
        labels = ["1234"] if tiles == 1 else list("abcd")
        params = case.params.flatten(0, 1) if tiles == 2 else case.params
        photo, sensitivity = (add_axes(left, top, PANEL, PANEL) for top in (tops[0], tops[2]))
        sensitivity.imshow((gradient / gradient.max()).numpy(), **heat)
        grid = partial(viz.draw_grid, case.image[0], params, case.kind, control_points=case.control_points)
        grid(lines=lines, labels=labels, ax=photo)
        grid(lines=0, labels=[""] * len(results), show_image=False, show_points=False, ax=sensitivity)
        side = (PANEL - 4 * (tiles - 1)) / tiles
        for k, result in enumerate(results):
            axes = add_axes(left + k % tiles * (side + 4), tops[1] + k // tiles * (side + 4), side, side)
            viz.draw_samples(result, color=viz.PALETTE[k], labels=labels[k], ax=axes)

    # How the gradients are coloured stands in the last of their panels, which is dark.
    top = tops[2] + PANEL + 7
    bar = add_axes(width - 9 - 130, top, 104, 8)
    bar.imshow(torch.logspace(math.log10(DARKEST), 0, 256)[None].numpy(), aspect="auto", **heat)
    write(width - 9 - 138, top + 9, f"{DARKEST:g}", fontsize=10, ha="right")
    write(width - 9, top + 9, "1", fontsize=10, ha="right")

    top = tops[2] + PANEL + 30
    write(LEFT, top, "a trained spatial transformer", **bold)
    write(LEFT + 312, top, "it saw rotated digits and their labels, and learned to straighten what it reads")
    top += 11
    side = (3 * PANEL + 2 * GAP - 3 * (DIGITS - 1)) / DIGITS
    with torch.no_grad():
        theta = digits.model[0].localise(digits.before[:DIGITS])
    for k in range(DIGITS):
        before, after = (
            add_axes(LEFT + k * (side + 3), top + row * (side + 3), side, side) for row in (0, 1)
        )
        viz.draw_grid(
            digits.before[k], theta[k], "similarity", lines=0, labels=[""], linewidth=1.2, ax=before
        )
        viz.draw_samples(digits.after[k], labels="", linewidth=1.5, ax=after)
    for row, text in enumerate(("before", "after")):
        middle = top + side / 2 + row * (side + 3)
        write(17, middle, text, rotation=90, va="center", ha="center", fontsize=11.5)

    left = LEFT + 3 * (PANEL + GAP)
    write(left, top - 11, "interpolation", **bold)
    cat = columns[3].case.image
    theta = EYE.theta(cat)[None].to(DEVICE)
    across, down = (2 * PANEL + GAP - 6) / 3, 2 * side + 3
    for k, mode in enumerate(["nearest", "bilinear", "bicubic"]):
        zoomed = stn.affine_grid_sample(cat.to(DEVICE), theta, (round(down), round(across)), mode)
        axes = add_axes(left + k * (across + 3), top, across, down)
        axes.imshow(zoomed[0].clamp(0, 1).permute(1, 2, 0).cpu().numpy(), aspect="auto")
        write(left + k * (across + 3), top + down + 17, mode)
    with replacing(output) as part:
        figure.savefig(part, dpi=100)


@quick_interpreter(overflow_checks=False)
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("build/demo.png"), help="default: %(default)s")
    parser.add_argument("--size", type=int, default=320, help="of the sampled images, default: %(default)s")
    parser.add_argument("--steps", type=int, default=400, help="of training, default: %(default)s")
    options = parser.parse_args(arguments)
    if options.size < 16:
        parser.error(f"--size must be 16 or more, got {options.size}")
    if options.steps < 1:
        parser.error(f"--steps must be 1 or more, got {options.steps}")
    packages = {"matplotlib": "matplotlib", "scikit-image": "skimage", "scikit-learn": "sklearn"}
    missing = [name for name, module in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        parser.error(f"this needs {' and '.join(missing)}: pip install stn_triton[demo]")

    chosen = backend.select(DEVICE)
    names: list[backend.Name] = [chosen.name]
    if chosen.name == "interpreter":
        names.append("torch")
    cases = make_cases(options.size)
    print(f"{versions()}, backend: {chosen.name} ({chosen.reason})")
    print("largest error against float64, relative to the largest entry there, beside that of PyTorch's")
    print("F.grid_sample, whose grid is as narrow as the image")
    rows = [compare(case, name) for case in cases for name in names]
    print_table(rows)
    share = torch.cat([near_jump(case).flatten() for case in cases]).double().mean().item()
    print(f"left out: {share:.2%} of the samples, as results or slopes jump within {JUMP_BAND:g} pixels")
    if chosen.name == "interpreter":
        reason = "no GPU" if GPU is None else "TRITON_INTERPRET is set"
        print(f"not timed, {reason}: the interpreter's time says nothing about the kernels'")
    elif chosen.name == "torch":
        print(f"kernels neither run nor timed: {chosen.reason}")
    digits = train_on_digits(options.steps)
    spreads = [angle.rad2deg().std().item() for angle in (digits.applied, digits.remaining)]
    print(
        "a spatial transformer trained on rotated digits: their angles spread {:.0f} -> {:.0f} degrees, "
        "{:.1%} mistaken".format(*spreads, digits.error)
    )
    with backend.use(chosen.name):
        draw_figure(make_columns(cases), digits, options.output)
    print(f"figure: {options.output}")
    worse = [row for row in rows if not accepted(row)]
    for row in worse:
        print(f"FAILED: {row.case.name} on {row.ran_on}: an error is materially larger than PyTorch's")
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
