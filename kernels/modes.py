"""The integer codes that the operators, the launchers and the kernels share.

Pure Python: importing this module imports neither torch nor triton.
"""

from enum import IntEnum

# Blocks of pixels, one below the other, over which coordinates may be carried on (``device/affine.py``).
MOST_STEPS = 13


class Interpolation(IntEnum):
    """How a value between pixels is made. The codes are those of ATen's ``grid_sampler``."""

    BILINEAR = 0
    NEAREST = 1
    BICUBIC = 2


class Padding(IntEnum):
    """What is read outside the image. The codes are those of ATen's ``grid_sampler``."""

    ZEROS = 0
    BORDER = 1
    REFLECTION = 2


class Source(IntEnum):
    """Where the coordinates come from (see ``kernels/device/sources.py``)."""

    GRID = 0
    AFFINE = 1
    PROJECTIVE = 2
    TPS = 3
    FLOW = 4
