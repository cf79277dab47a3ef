"""Street View House Numbers: the official files, or a stand-in of real digits over real photographs.

Convention: a sequence has up to five digits, read from the left; the class of a place without a digit is 10.
Images are kept as uint8 on one device.
"""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import stn_triton as stn
from examples.data import Digits
from examples.files import reading
from examples.scenes import (
    REMAKE,
    backgrounds,
    load_photographs,
    paste,
    remembered,
    resized,
    stand_in_of,
)
from stn_triton.transforms import attention

LENGTH = 5
NONE = 10
MARGIN = {32: 1.8, 64: 1.3, 128: 2.6}
"""Side of the crop over side of the box around a sequence's digits, by the crop's size: Goodfellow et al.,
2014, enlarge the box by 30 % for 64 pixels; at 128 the digits are as large, with more around. (Not in the
paper, which has no crops of 32 either.)"""


class Sequences(NamedTuple):
    """House numbers, on one device."""

    images: Tensor  # (M, 3, S, S), uint8
    labels: Tensor  # (M, 5), int64
    source: str
    places: Tensor | None = None  # (M, 2), of the sequences' middles, normalised; None where all are at 0

    def take(self, index: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """(N,) -> (N, 3, S, S), float32, each image less its mean, values within -1 and 1.

        Args:
            strength: how far from the middle sequences are, as a multiple of how far they are: with 0 images
                are moved so that they are in the middle, and their borders continued.
        """
        images = self.images[index].float() / 255
        if self.places is not None:
            theta = attention(1.0, (1 - strength) * self.places[index])
            images = stn.affine_grid_sample(images, theta, images.shape[2:], padding_mode="border")
        return images - images.mean((1, 2, 3), keepdim=True)

    def to(self, device: torch.device | str) -> Sequences:
        places = None if self.places is None else self.places.to(device)
        return Sequences(self.images.to(device), self.labels.to(device), self.source, places)


# ---------------------------------------------------------------------------------------- full numbers
class Number(NamedTuple):
    """What digitStruct.mat says about one photograph."""

    name: str
    boxes: Tensor  # (n, 4), float32: left, top, width, height of each digit, in pixels
    digits: list[int]


def load_full_numbers(folder: Path | str, half: str, size: int) -> Sequences:
    """``train``, ``test`` or ``extra`` in format 1 (whole photographs), cropped around the sequences.

    Args:
        folder: with ``{half}.tar.gz``, or what that unpacks to, ``{half}/``. The crops are kept there
            afterwards, in ``{half}-{size}.pt``.
        half: "train" (33,402 photographs), "test" (13,068) or "extra" (202,353).
        size: of the crops in pixels, 64 or 128.

    The one photograph with more than five digits is left out, as five places cannot name it.

    Raises:
        ImportError: h5py, which reads digitStruct.mat, or Pillow is not installed.
        FileNotFoundError: neither archive nor folder is there.
        DataError: a file is damaged or missing, or says what cannot be.
    """
    folder = Path(folder)
    kept = folder / f"{half}-{size}.pt"

    def make() -> tuple[Tensor, Tensor]:
        images, labels = [], []
        for pixels, number in _photographs(folder, half):
            if len(number.digits) <= LENGTH:
                images.append(_crop(pixels, number.boxes, size))
                labels.append(torch.tensor(number.digits + [NONE] * (LENGTH - len(number.digits))))
        return torch.stack(images), torch.stack(labels)

    made = remembered(kept, make)
    with reading(kept, REMAKE):
        images, labels = made
        _check(images, labels, size)
    return Sequences(images, labels, f"SVHN {half}, full numbers")


def _check(images: Tensor, labels: Tensor, size: int) -> None:
    if images.dtype != torch.uint8 or images.shape != (len(labels), 3, size, size):
        raise ValueError(f"it has images of {images.dtype} and shape {tuple(images.shape)}")
    if labels.shape[1:] != (LENGTH,) or not ((labels >= 0) & (labels <= NONE)).all():
        raise ValueError(f"it has labels of shape {tuple(labels.shape)}, or beyond 0 to {NONE}")


_REMEDY = "Get SVHN's files anew from http://ufldl.stanford.edu/housenumbers"


def _photographs(folder: Path, half: str) -> Iterator[tuple[Tensor, Number]]:
    """Each photograph, (3, H, W), uint8, in the order in which they are stored."""
    unpacked, archive = folder / half, folder / f"{half}.tar.gz"
    file = unpacked / "digitStruct.mat"
    if file.exists():
        with reading(file, _REMEDY):
            numbers = read_structure(file.read_bytes())
        for number in numbers:
            path = unpacked / number.name
            with reading(path, _REMEDY):
                pixels = decode(path.read_bytes())
            with reading(file, _REMEDY):
                _need_near(pixels, number)
            yield pixels, number
    elif archive.exists():
        with reading(archive, _REMEDY):
            yield from _archived(archive)
    else:
        raise FileNotFoundError(
            f"{folder} has neither {half}.tar.gz nor {half}/digitStruct.mat: SVHN's format 1 is at "
            "http://ufldl.stanford.edu/housenumbers"
        )


def _archived(archive: Path) -> Iterator[tuple[Tensor, Number]]:
    # Twice through the archive, which can be read from its start alone: the structure may come last.
    structure = next((content for name, content in _members(archive, "digitStruct.mat")), None)
    if structure is None:
        raise ValueError("it has no digitStruct.mat")
    described = f"digitStruct.mat in {archive}"
    with reading(described, _REMEDY):
        numbers = {number.name: number for number in read_structure(structure)}
    for name, content in _members(archive, ".png"):
        if name in numbers:
            with reading(f"{name} in {archive}", _REMEDY):
                pixels = decode(content)
            with reading(described, _REMEDY):
                _need_near(pixels, numbers[name])
            yield pixels, numbers.pop(name)
    if numbers:
        raise ValueError(f"it lacks {len(numbers)} photographs, {min(numbers)} among them")


def _need_near(pixels: Tensor, number: Number) -> None:
    """
    Raises:
        ValueError: a box is empty, or is far from the photograph or larger: twice as large at least. (People
            drew them: some reach over the edge.)
    """
    size = torch.tensor([pixels.shape[-1], pixels.shape[-2]])
    corners, sides = number.boxes[:, :2], number.boxes[:, 2:]
    near = (sides > 0) & (sides <= 2 * size) & (corners >= -size) & (corners <= 2 * size)
    if not near.all():
        box = number.boxes[~near.all(1)][0].tolist()
        raise ValueError(
            f"{number.name} is of {size[0]} x {size[1]} pixels, and a digit's left, top, width and height in "
            f"it are {box}"
        )


def _members(archive: Path, ending: str) -> Iterator[tuple[str, bytes]]:
    """Names, without their folders, and contents of files; what macOS adds to archives (``._*``) is none."""
    with tarfile.open(archive, "r|gz") as files:
        for file in files:
            name = Path(file.name).name
            if file.isfile() and name.endswith(ending) and not name.startswith("._"):
                content = files.extractfile(file)
                assert content is not None  # of what is a file
                yield name, content.read()


def read_structure(content: bytes) -> list[Number]:
    """digitStruct.mat, which is HDF5: struct arrays of MATLAB, whose single values stand where of several
    there are references to them, and whose texts are columns of character codes.

    Raises:
        ImportError: h5py is not installed.
        Exception: the content is damaged; of many kinds.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ImportError("digitStruct.mat needs h5py: pip install h5py") from error

    with h5py.File(io.BytesIO(content)) as file:

        def values(field: Any) -> list[float]:
            column = field[()].ravel()
            return [float(file[one][0, 0]) for one in column] if len(column) > 1 else [float(column[0])]

        numbers = []
        structure = file["digitStruct"]
        for name, box in zip(structure["name"][()].ravel(), structure["bbox"][()].ravel()):
            fields = {key: values(field) for key, field in file[box].items()}
            sides = torch.tensor([fields[key] for key in ("left", "top", "width", "height")])
            called, labels = "".join(map(chr, file[name][()].ravel())), fields["label"]
            if not called or Path(called).name != called:
                raise ValueError(f"{called!r} is no name of a file")
            if sides.shape[1] != len(labels) or not sides.isfinite().all():
                raise ValueError(f"of {called} the boxes are not one, of numbers, for each of its digits")
            if any(label not in range(1, 11) for label in labels):
                raise ValueError(f"{called} has the labels {labels}, and labels are 1 to 10")
            numbers.append(Number(called, sides.T, [int(label) % 10 for label in labels]))  # 10 is a zero
    if not numbers:
        raise ValueError("it describes no photograph")
    if all(len(number.digits) > LENGTH for number in numbers):
        raise ValueError(f"it has no number of up to {LENGTH} digits")
    return numbers


def decode(content: bytes) -> Tensor:
    """A picture file -> (3, H, W), uint8."""
    try:
        import numpy
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ImportError("pictures need Pillow and NumPy: pip install pillow numpy") from error
    with Image.open(io.BytesIO(content)) as picture:
        return torch.from_numpy(numpy.array(picture.convert("RGB"))).permute(2, 0, 1)


def _crop(pixels: Tensor, boxes: Tensor, size: int) -> Tensor:
    """(3, H, W) -> (3, size, size), uint8: what is around all digits, stretched to a square."""
    low, high = boxes[:, :2].amin(0), (boxes[:, :2] + boxes[:, 2:]).amax(0)
    sides = torch.tensor([pixels.shape[-1], pixels.shape[-2]])
    centre, reach = (low + high) / sides - 1, MARGIN[size] * (high - low) / sides
    theta = torch.cat([reach.diag(), centre.unsqueeze(-1)], -1)
    return to_bytes(resized(pixels[None].float() / 255, theta[None], size)[0])


def to_bytes(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


# -------------------------------------------------------------------------------------- cropped digits
_READ = """
import sys, numpy, scipy.io
content = scipy.io.loadmat(sys.argv[1])
numpy.savez(sys.stdout.buffer, X=content["X"], y=content["y"])
"""


def _read_matlab(file: Path) -> dict[str, Any]:
    """X and y of a MATLAB file. Damaged ones can end SciPy's process, which is therefore one of its own."""
    import numpy

    result = subprocess.run([sys.executable, "-c", _READ, str(file)], capture_output=True)
    if result.returncode:
        said = result.stderr.decode(errors="replace").strip().splitlines() or ["SciPy's reader crashed"]
        raise ValueError(said[-1])
    with numpy.load(io.BytesIO(result.stdout), allow_pickle=False) as content:
        return dict(content)


def load_cropped_digits(folder: Path | str, half: str, size: int) -> Sequences:
    """Format 2, ``{half}_32x32.mat``: single digits, enlarged, as sequences of one.

    Raises:
        ImportError: SciPy, which reads the file, is not installed.
        FileNotFoundError: it is not there.
        DataError: it is damaged.
    """
    if importlib.util.find_spec("scipy") is None:
        raise ImportError("cropped digits need SciPy: pip install scipy")
    file = Path(folder) / f"{half}_32x32.mat"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is not there: SVHN's format 2 is at http://ufldl.stanford.edu/housenumbers"
        )
    with reading(file, _REMEDY):
        content = _read_matlab(file)
        small = torch.from_numpy(content["X"]).permute(3, 2, 0, 1)
        digits = torch.from_numpy(content["y"]).flatten().long()
        if small.dtype != torch.uint8 or small.shape[1:] != (3, 32, 32) or len(small) != len(digits):
            raise ValueError(f"{len(digits)} labels, and images of {small.dtype}, {tuple(small.shape)}")
        if not len(digits) or digits.min() < 0 or digits.max() > 10:
            raise ValueError("it is empty, or has labels beyond 1 to 10")
    images = torch.cat(
        [
            to_bytes(torch.nn.functional.interpolate(part.float() / 255, (size, size), mode="bilinear"))
            for part in small.split(4096)
        ]
    )
    labels = torch.full((len(images), LENGTH), NONE)
    labels[:, 0] = digits % 10
    return Sequences(images, labels, f"SVHN {half}, cropped digits")


# -------------------------------------------------------------------------------------------- stand-in
LENGTHS = (0.15, 0.5, 0.25, 0.08, 0.02)
"""How often the stand-in's sequences have one to five digits; SVHN's have about these lengths."""


def make_stand_in(
    digits: Digits,
    count: int,
    size: int,
    seed: int,
    *,
    longest: int = LENGTH,
    spread: float = 0.2,
    contrast: float = 1.0,
) -> Sequences:
    """Sequences of real handwritten digits over windows of real photographs.

    Args:
        digits: to choose from.
        count: how many.
        size: of the images; a key of :data:`MARGIN`.
        seed: of all that is drawn.
        longest: the most digits in a sequence; shorter ones are as frequent among each other as they are.
        spread: how far from the middle they are at most, across and down, normalised: 0.2 is a tenth of the
            image.
        contrast: of the photographs, which are faded to their mean colours below 1.
    """
    device = digits.images.device
    generator = torch.Generator(device).manual_seed(seed)
    photographs = load_photographs(device=device)
    images, labels, at = [], [], []
    for start in range(0, count, 1024):
        n = min(1024, count - start)
        lengths = 1 + torch.multinomial(
            torch.tensor(LENGTHS[:longest], device=device), n, replacement=True, generator=generator
        )
        places = torch.arange(longest, device=device)
        index = torch.randint(len(digits.labels), (n, longest), generator=generator, device=device)
        present = places < lengths.unsqueeze(1)
        ink = digits.take(index.flatten()).view(n, longest, 28, 28) * present[..., None, None]

        tilt = 0.15 * (2 * torch.rand(n, 1, generator=generator, device=device) - 1)
        middle = spread * (2 * torch.rand(n, 1, 2, generator=generator, device=device) - 1)
        half = 1 / MARGIN[size]  # of the sequence's box
        across = ((2 * places + 1) / lengths.unsqueeze(1) - 1) * half
        centre = middle + torch.stack([across, tilt * across], -1)
        reach = torch.stack([half / lengths, torch.full_like(half / lengths, half)], -1).unsqueeze(1)
        scenes = backgrounds(photographs, n, size, generator)
        scenes = scenes.mean((2, 3), keepdim=True).lerp(scenes, contrast)
        scenes = paste(scenes, ink, centre, reach.expand(n, longest, 2), generator)
        images.append(to_bytes(scenes))
        found = digits.labels[index].where(present, NONE)
        labels.append(torch.nn.functional.pad(found, (0, LENGTH - longest), value=NONE))
        at.append(middle.squeeze(1))
    return Sequences(torch.cat(images), torch.cat(labels), stand_in_of(digits), torch.cat(at))
