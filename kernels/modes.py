"""The integer codes that the operators, the launchers and the kernels share.

Pure Python: importing this module imports neither torch nor triton.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

# Blocks of pixels, one below the other, over which coordinates may be carried on (``device/affine.py``).
MOST_STEPS = 13


class Interpolation(IntEnum):
    """How a value between pixels is made. The codes are those of ATen's ``grid_sampler``."""

    BILINEAR = 0
    NEAREST = 1
    BICUBIC = 2
    AVERAGED = 3  # bilinear samples, averaged over the footprint of an output pixel: of matrices alone


# Pixels along an axis: twice as many are counted in 32 bits, as a reflection's period or half pixels.
MOST_PIXELS = 2**30 - 1
# Sub-samples of an output pixel along an axis (``device/footprints.py``).
MOST_SAMPLES = 16


def modes_of(interpolation: int) -> dict[str, Any]:
    """The fields of a ``Spec`` that say how samples are made."""
    averaged = interpolation == Interpolation.AVERAGED
    return {"interpolation": 0 if averaged else int(interpolation), "antialias": averaged}


class Padding(IntEnum):
    """What is read outside the image. The codes are those of ATen's ``grid_sampler``, as far as that goes."""

    ZEROS = 0
    BORDER = 1
    REFLECTION = 2
    CIRCULAR = 3
    FRAMED = 4  # border, and nothing where the sample's centre is outside: for gradients with a fill alone


# Those under which what lies beyond an edge reads the pixel at that edge, if any.
EXTENDING = Padding.BORDER, Padding.FRAMED
# Those that users can name.
NAMED_PADDINGS = tuple(padding for padding in Padding if padding != Padding.FRAMED)
_DIGITS = frozenset(padding + 1 for padding in Padding)


def padding_code(paddings: Sequence[int]) -> int:
    """One integer for the paddings of the axes, x first: the padding itself where all are the same.

    Else a digit for each axis in base 8, x the lowest, of 1 more than its padding.
    """
    if len(set(paddings)) == 1:
        return int(paddings[0])
    return sum((padding + 1) << 3 * axis for axis, padding in enumerate(paddings))


def paddings_of(code: int, dims: int) -> tuple[Padding, ...]:
    """The paddings of ``dims`` axes that ``padding_code`` made ``code`` of; ValueError if it made none."""
    digits = [code + 1] * dims if 0 <= code < 8 else [code >> 3 * axis & 7 for axis in range(dims)]
    if code >> max(3 * dims, 3) or not _DIGITS.issuperset(digits):
        raise ValueError(f"padding_mode must be a code of Padding, or of one for each axis, got {code}")
    return tuple(Padding(digit - 1) for digit in digits)


class Source(IntEnum):
    """Where the coordinates come from (see ``kernels/device/sources.py``)."""

    GRID = 0
    AFFINE = 1
    PROJECTIVE = 2
    TPS = 3
    FLOW = 4


# Those of a matrix: maps that have an inverse. Integers, which compare sooner than enum members.
INVERTIBLE = int(Source.AFFINE), int(Source.PROJECTIVE)
