"""What is measured: rows with targets, cases in them, their inputs, and the bytes that each must move.

Shapes are those of real use: digits of 42 x 42, house numbers of 64 and 128, feature maps of 7 to 56 with 64
to 1024 channels, crops of 224 from 448, frames of 1080p and 4K, volumes of 96^3 to 192^3. Where a row is
about bandwidth its tensors are larger than L2. ``bench.rivals`` has what runs on these cases.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CONTROLS = 4  # the side of a spline's lattice of control points: K = 16


class Row(NamedTuple):
    """A line of the table: what it is about, and what ours is to reach.

    ``targets``: how many times as fast as a rival; "eager" stands for the fastest of PyTorch's eager ways.
    ``roof``: which share of the copy's bandwidth.
    """

    title: str
    targets: dict[str, float]
    roof: float | None = None


ROWS = {
    "rgb": Row("forward, NCHW, C 1-3, float32", {"eager": 2.5, "compiled": 1.3}, 0.70),
    "rgb-last": Row("forward, channels_last, C 1-3", {"eager": 3, "compiled": 1.5}, 0.65),
    "features": Row("forward, NCHW, C >= 64, small", {"eager": 4, "compiled": 1.3}, 0.60),
    "features-large": Row("forward, NCHW, C >= 64, large", {"eager": 1.5, "compiled": 1.2}, 0.70),
    "last": Row("forward, channels_last, C % 8 = 0", {"eager": 4, "compiled": 2}, 0.80),
    "half": Row("forward, half image, float32 theta", {"eager": 5, "compiled": 1.5}, 0.65),
    "bytes": Row("forward, integers", {"eager": 4}, 0.50),
    "nearest": Row("forward, nearest", {"eager": 4, "compiled": 1.2}),
    "bicubic": Row("forward, bicubic", {"eager": 2.5, "compiled": 2}),
    "image-rgb": Row("backward to the image, few channels", {"eager": 2, "compiled": 2}, 0.50),
    "image-features": Row("backward to the image, NCHW, C >= 64", {"eager": 4, "compiled": 4}, 0.50),
    "image-last": Row("backward to the image, channels_last", {"eager": 5, "compiled": 5}, 0.50),
    "theta": Row("backward to theta", {"eager": 3, "compiled": 3}, 0.60),
    "step": Row("forward + backward", {"eager": 3, "compiled": 2.5}, 0.50),
    "grid": Row("general grid, backward", {"eager": 3, "compiled": 3}),
    "deterministic": Row("general grid, deterministic backward", {"eager": 1}),
    "tps": Row("spline, K = 16, forward", {"ours affine": 1 / 1.15, "kornia": 20, "compiled": 3}),
    "tps-backward": Row("spline, K = 16, backward", {"ours affine": 1 / 1.15, "kornia": 10, "compiled": 3}),
    "volume": Row("trilinear, forward", {"eager": 2, "compiled": 2}, 0.50),
    "volume-backward": Row("trilinear, backward", {"eager": 3, "compiled": 2}, 0.50),
    "small": Row("small images", {"eager": 2, "compiled": 1, "grid_sample alone": 1}),
    "antialias": Row("shrunk with antialias", {"eager": 1, "compiled": 1}),
    "other": Row("homographies, flows, libraries", {"eager": 1}),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    ``source`` is where coordinates come from: "affine", "projective", "tps", "flow" or "grid". ``work`` is
    what runs: "forward"; "image", "params" or "both", the backward pass to these; "step", forward and
    backward to both. ``shape`` is the image's, (N, C, *spatial); ``size`` the output's spatial size. The
    image has ``dtype``, a grid as well; other parameters are float32. ``shared``: one set of parameters for
    the batch. ``zoom``: about how much of the image's width is seen. ``turn``: by how many degrees, 0 for
    those of ``affine_matrices``. ``fill``: what taps outside read. ``antialias``: of affine maps, and of
    homographies that shrink alike everywhere. ``boxes``: so many crops of each image.
    """

    row: str
    source: str
    work: str
    shape: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    mode: str = "bilinear"
    padding: str | tuple[str, ...] = "zeros"
    align_corners: bool = False
    deterministic: bool = False
    shared: bool = False
    zoom: float = 0.9
    turn: int = 0
    fill: float | None = None
    antialias: bool = False
    boxes: int = 0

    @property
    def id(self) -> str:
        words = [self.row, self.source, self.work, "x".join(map(str, self.shape))]
        if self.size != self.shape[2:]:
            words.append("to_" + "x".join(map(str, self.size)))
        words.append(dtype_name(self.dtype))
        words += [self.mode] * (self.mode != "bilinear")
        if self.padding != "zeros":
            words.append(self.padding if isinstance(self.padding, str) else "+".join(self.padding))
        words += ["fill"] * (self.fill is not None) + [f"boxes_{self.boxes}"] * (self.boxes > 0)
        words += [f"{self.turn}deg"] * bool(self.turn)
        flags = ("channels_last", "align_corners", "deterministic", "shared", "antialias")
        return "-".join(words + [flag for flag in flags if getattr(self, flag)])

    @property
    def dims(self) -> int:
        return len(self.size)

    @property
    def samples(self) -> tuple[int, ...]:
        """An output pixel's along each axis, in the order of ``size``: alike in all maps and places."""
        if not self.antialias:
            return (1,) * self.dims
        numbers = (step_lengths(self) - 1e-3).ceil().clamp(1, 16).amax(0)
        return tuple(int(number) for number in reversed(numbers.tolist()))

    @property
    def outputs(self) -> tuple[int, ...]:
        """The shape of the samples."""
        several = (self.boxes,) * (self.boxes > 0)
        return self.shape[0], *several, self.shape[1], *self.size

    @property
    def gradients(self) -> tuple[bool, bool]:
        """Whether the image's and the parameters' gradients are computed."""
        return self.work in ("image", "both", "step"), self.work in ("params", "both", "step")

    @property
    def memory_format(self) -> torch.memory_format:
        if not self.channels_last:
            return torch.contiguous_format
        return torch.channels_last if self.dims == 2 else torch.channels_last_3d

    def small(self) -> Case:
        """The same case with few pixels: for machines without a GPU."""
        most = 12 if self.dims == 2 else 6
        channels = min(self.shape[1], 8)
        spatial = tuple(min(n, most + axis) for axis, n in enumerate(self.shape[2:]))
        size = spatial if self.size == self.shape[2:] else tuple(n - 3 for n in spatial)
        shape = min(self.shape[0], 2), channels, *spatial
        return dataclasses.replace(self, shape=shape, size=size, boxes=min(self.boxes, 3))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------ the registry
FRAMES = (8, 3, 1080, 1920)
PHOTOGRAPHS = (8, 3, 1234, 1345)
FILM = (32, 3, 1080, 1920)
MAPS = (64, 256, 56, 56)
SHRUNK = (64, 3, 448, 448)
PANORAMAS = (8, 3, 1024, 2048)
PYRAMID = (1, 256, 200, 304)  # a detector's features of an image of 800 x 1216
BF16 = torch.bfloat16


def case(row: str, source: str, work: str, *shape: int, size: tuple[int, ...] = (), **options: Any) -> Case:
    return Case(row, source, work, shape, size or shape[2:], **options)


# Within a row the most telling case first: a run that is cut off has measured the first ones of all rows.
_LISTED = [
    case("rgb", "affine", "forward", *PHOTOGRAPHS),
    case("rgb", "affine", "forward", *FRAMES, align_corners=True),
    case("rgb", "affine", "forward", 16, 1, 1080, 1920),
    case("rgb", "affine", "forward", 4, 3, 2160, 3840),
    case("rgb", "affine", "forward", 256, 3, 448, 448, size=(224, 224), zoom=0.5),
    case("rgb", "affine", "forward", *FRAMES, turn=45),
    case("rgb", "affine", "forward", *FRAMES, turn=90),
    case("rgb-last", "affine", "forward", *FRAMES, channels_last=True),
    case("rgb-last", "affine", "forward", 16, 1, 1080, 1920, channels_last=True),
    case("rgb-last", "affine", "forward", 8, 4, 1080, 1920, channels_last=True),
    case("features", "affine", "forward", *MAPS),
    case("features", "affine", "forward", 64, 256, 56, 56, align_corners=True),
    case("features", "affine", "forward", *MAPS, turn=45),
    case("features", "affine", "forward", *MAPS, turn=90),
    case("features", "affine", "forward", 256, 512, 28, 28),
    case("features", "affine", "forward", 256, 512, 14, 14),
    case("features", "affine", "forward", 1024, 1024, 7, 7),
    case("features-large", "affine", "forward", 16, 256, 128, 128),
    case("features-large", "affine", "forward", 4, 64, 512, 512),
    case("last", "affine", "forward", *MAPS, channels_last=True),
    case("last", "affine", "forward", *MAPS, channels_last=True, dtype=BF16),
    case("last", "affine", "forward", 16, 256, 128, 128, channels_last=True, dtype=BF16),
    case("last", "affine", "forward", 256, 512, 14, 14, channels_last=True),
    case("half", "affine", "forward", *PHOTOGRAPHS, dtype=BF16),
    case("half", "affine", "forward", *MAPS, dtype=BF16),
    case("half", "affine", "forward", *FRAMES, dtype=BF16, channels_last=True),
    case("half", "affine", "forward", *FRAMES, dtype=torch.float16),
    case("half", "affine", "forward", *PHOTOGRAPHS, dtype=BF16, turn=45),
    case("bytes", "affine", "forward", *FILM, channels_last=True, dtype=torch.uint8, fill=128),
    case("bytes", "affine", "forward", *FILM, channels_last=True, dtype=torch.uint8, shared=True),
    case("bytes", "affine", "forward", *FILM, dtype=torch.uint8, fill=128),
    case("bytes", "affine", "forward", *FILM, channels_last=True, dtype=torch.int16),
    case("nearest", "affine", "forward", *PHOTOGRAPHS, mode="nearest"),
    case("nearest", "affine", "forward", *MAPS, mode="nearest"),
    case("bicubic", "affine", "forward", *PHOTOGRAPHS, mode="bicubic"),
    case("bicubic", "affine", "forward", *MAPS, mode="bicubic"),
    case("image-rgb", "affine", "image", *FRAMES),
    case("image-rgb", "affine", "image", *FRAMES, align_corners=True),
    case("image-rgb", "affine", "image", *FRAMES, padding="border"),
    case("image-rgb", "affine", "image", *FRAMES, turn=45),
    case("image-rgb", "affine", "image", *FRAMES, turn=90),
    case("image-features", "affine", "image", *MAPS),
    case("image-features", "affine", "image", *MAPS, turn=45),
    case("image-features", "affine", "image", 16, 256, 128, 128),
    case("image-last", "affine", "image", *MAPS, channels_last=True),
    case("image-last", "affine", "image", *MAPS, channels_last=True, dtype=BF16),
    case("theta", "affine", "params", *FRAMES),
    case("theta", "affine", "params", *MAPS),
    case("theta", "affine", "params", *MAPS, channels_last=True),
    case("theta", "affine", "params", *FRAMES, turn=45),
    case("step", "affine", "step", *FRAMES),
    case("step", "affine", "step", *MAPS),
    case("step", "affine", "step", *MAPS, channels_last=True),
    case("step", "affine", "step", *MAPS, channels_last=True, dtype=BF16),
    case("step", "affine", "step", 1024, 3, 128, 128),
    case("step", "affine", "step", *FRAMES, mode="bicubic"),
    case("grid", "grid", "both", *MAPS, channels_last=True),
    case("grid", "grid", "both", *MAPS, channels_last=True, dtype=BF16),
    case("grid", "grid", "both", *FRAMES),
    case("grid", "grid", "both", 16, 256, 128, 128, channels_last=True),
    case("deterministic", "grid", "both", *MAPS, channels_last=True, deterministic=True),
    case("deterministic", "grid", "both", *FRAMES, deterministic=True),
    case("tps", "tps", "forward", *FRAMES, align_corners=True),
    case("tps", "tps", "forward", 64, 64, 56, 56, align_corners=True),
    case("tps-backward", "tps", "both", *FRAMES, align_corners=True),
    case("tps-backward", "tps", "both", 64, 64, 56, 56, align_corners=True),
    case("volume", "affine", "forward", 8, 4, 128, 128, 128),
    case("volume", "affine", "forward", 16, 1, 128, 128, 128),
    case("volume", "affine", "forward", 4, 2, 192, 192, 192),
    case("volume", "affine", "forward", 4, 32, 96, 96, 96, channels_last=True),
    case("volume-backward", "affine", "both", 8, 4, 128, 128, 128),
    case("volume-backward", "affine", "both", 16, 1, 96, 96, 96),
    case("small", "affine", "forward", 32, 3, 112, 112),
    case("small", "affine", "forward", 256, 1, 42, 42),
    case("small", "affine", "forward", 32, 3, 64, 64),
    case("small", "affine", "step", 32, 3, 112, 112),
    case("antialias", "affine", "forward", *SHRUNK, size=(112, 112), antialias=True),
    case("antialias", "affine", "step", *SHRUNK, size=(112, 112), antialias=True),
    case("antialias", "affine", "image", *SHRUNK, size=(112, 112), antialias=True, channels_last=True),
    case("antialias", "projective", "forward", *SHRUNK, size=(112, 112), antialias=True, zoom=0.87),
    case("other", "projective", "forward", *FRAMES, align_corners=True),
    case("other", "flow", "forward", *FRAMES),
    case("other", "affine", "forward", *FRAMES, shared=True),
    case("other", "grid", "forward", *PHOTOGRAPHS),
    case("other", "projective", "step", *FRAMES, align_corners=True),
    case("other", "flow", "step", *FRAMES),
    case("other", "flow", "forward", *FRAMES, shared=True),
    case("other", "affine", "forward", *PANORAMAS, padding=("circular", "border"), zoom=1.2),
    case("other", "affine", "forward", *PYRAMID, size=(7, 7), padding="border", boxes=512),
]


def by_value(cases: list[Case]) -> list[Case]:
    """The first case of each row, then the second ones, and so on."""
    seen: dict[str, int] = {}
    places = []
    for one in cases:
        seen[one.row] = seen.get(one.row, -1) + 1
        places.append(seen[one.row])
    return [cases[i] for i in sorted(range(len(cases)), key=places.__getitem__)]


CASES = by_value(_LISTED)
QUICK = CASES[: len(ROWS)]


# -------------------------------------------------------------------------------------------- the inputs
class Inputs(NamedTuple):
    """The image, what says where it is read, and the gradient of the output."""

    image: Tensor
    params: Tensor
    grad_output: Tensor


def affine_matrices(count: int, dims: int, zoom: float, turn: int = 0) -> Tensor:
    """(count, dims, dims + 1) float64: turned by ``turn`` degrees, or for 0 by 6 to 14; ``zoom`` wide."""
    angles = torch.linspace(0.10, 0.25, count, dtype=torch.float64)
    if turn:
        angles = torch.full_like(angles, math.radians(turn))
    cos, sin = zoom * angles.cos(), zoom * angles.sin()
    theta = zoom * torch.eye(dims, dims + 1, dtype=torch.float64).repeat(count, 1, 1)
    theta[:, 0, 0], theta[:, 0, 1], theta[:, 1, 0], theta[:, 1, 1] = cos, -sin, sin, cos
    theta[:, :2, dims] = torch.stack([0.05 * angles, -0.03 * angles], 1)
    return theta


def crops(count: int, boxes: int, dims: int) -> Tensor:
    """(count, boxes, dims, dims + 1) float64: boxes in the image, of a tenth to a third of its sides."""
    spread = torch.linspace(0, 1, boxes, dtype=torch.float64)
    along = torch.stack([(spread * (7 + 4 * k)) % 1 for k in range(dims)], -1)  # all over the image
    half = 0.1 + 0.2 * along.roll(1, -1)
    centre = (2 * along - 1) * (1 - half)
    return torch.cat([half.diag_embed(), centre.unsqueeze(-1)], -1).expand(count, -1, -1, -1)


def step_lengths(case: Case) -> Tensor:
    """(places, dims) float64: the steps of an output pixel, x first, in input pixels, all over the output."""
    in_size, size = (torch.tensor(n[::-1], dtype=torch.float64) for n in (case.shape[2:], case.size))
    matrix = make_params(case)
    linear = matrix[:, : case.dims, :-1]
    if case.source == "projective":  # of A p + t over w: (A - place times the row of w) over w
        lines = [torch.linspace(-1, 1, 17, dtype=torch.float64) for _ in case.size]
        points = torch.cartesian_prod(*lines, torch.ones(1, dtype=torch.float64))
        place = (points @ matrix.mT).unsqueeze(-1)
        linear, last = matrix[:, None, :2, :2], matrix[:, None, 2:, :2]
        linear = (linear - place[:, :, :2] / place[:, :, 2:] * last) / place[:, :, 2:]
    return (linear * in_size[:, None] / size).norm(dim=-2).view(-1, case.dims)


def waves(count: int, size: tuple[int, ...]) -> Tensor:
    """(count, *size, dims) float64: smooth displacements between -1 and 1, as flows have them."""
    axes = torch.meshgrid(*(torch.linspace(-3, 3, n, dtype=torch.float64) for n in size), indexing="ij")
    phases = torch.arange(count, dtype=torch.float64).view(-1, *(1,) * len(size))
    along = [torch.sin(sum(axes) * (1 + 0.3 * k) + axes[k - 1] + phases) for k in range(len(size))]
    return torch.stack(along, -1)


def make_params(case: Case) -> Tensor:
    """float64, on the CPU: theta, homography, points, flow in pixels, or a grid."""
    count = 1 if case.shared else case.shape[0]
    if case.boxes:
        return crops(count, case.boxes, case.dims)
    theta = affine_matrices(count, case.dims, case.zoom, case.turn)
    if case.source == "affine":
        return theta
    if case.source == "projective":
        bottom = torch.tensor([0.04, -0.03, 1.0], dtype=torch.float64)
        return torch.cat([theta, bottom.repeat(count, 1, 1)], 1)
    if case.source == "tps":
        return lattice() * case.zoom + 0.04 * waves(count, (CONTROLS, CONTROLS)).flatten(1, 2)
    if case.source == "flow":
        return 3.0 * waves(count, case.size).movedim(-1, 1)
    grid = F.affine_grid(theta, [count, 1, *case.size], align_corners=case.align_corners)
    return grid + 6.0 / max(case.size) * waves(count, case.size)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """The case's tensors, the same ones at every call."""
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        if case.dtype.is_floating_point:
            drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        else:
            info = torch.iinfo(case.dtype)
            drawn = torch.randint(info.min, info.max + 1, shape, generator=generator, device=device)
        return drawn.to(case.dtype).contiguous(memory_format=case.memory_format)

    dtype = case.dtype if case.source == "grid" else torch.float32
    params = make_params(case).to(dtype).to(device)
    return Inputs(noise(*case.shape), params, noise(*case.outputs))


def lattice() -> Tensor:
    """(K, 2) float64: the control points, x first and fastest, from -1 to 1."""
    line = torch.linspace(-1, 1, CONTROLS, dtype=torch.float64)
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(-1, 2)


# --------------------------------------------------------------------------------------------- the bytes
def bytes_moved(case: Case, share: float) -> int:
    """The fewest bytes between memory and chip: every input read once, every output written once.

    ``share`` is that of the image's pixels which are read. Neither a grid that is made on the way nor scratch
    counts: whoever needs them moves more, and has a lower share of the roof.
    """
    item = case.dtype.itemsize
    read = share * math.prod(case.shape) * item
    image = math.prod(case.shape) * item
    output = math.prod(case.outputs) * item
    params = params_bytes(case)
    forward = read + output + params
    by_image, by_params = case.gradients
    backward = output + params + by_params * (read + params) + by_image * image
    return round({"forward": forward, "step": forward + backward}.get(case.work, backward))


def bytes_of_floats(case: Case, share: float) -> int:
    """The same for whoever samples a copy of the image in float32, which makes samples in float32.

    What it takes to make the copy, and to round the samples, is not counted.
    """
    return bytes_moved(dataclasses.replace(case, dtype=torch.float32), share)


def params_bytes(case: Case) -> int:
    count = 1 if case.shared else case.shape[0]
    if case.source == "grid":
        return count * math.prod(case.size) * case.dims * case.dtype.itemsize
    numbers = {
        "affine": case.dims * (case.dims + 1),
        "projective": 9,
        "tps": 2 * CONTROLS**2,
        "flow": case.dims * math.prod(case.size),
    }
    return 4 * count * max(case.boxes, 1) * numbers[case.source]
