"""Pixel coordinates: un-normalisation and padding, as pairs of a value and a derivative.

Everything here is per axis. ``x`` is a pixel coordinate of the input (0 is the centre of its first
pixel), ``size`` the input's extent along the axis. ``kernels/README.md`` derives the formulas.
"""

from typing import Any

import triton
import triton.language as tl

from .modes import Interpolation, Padding


def constant(value: Any) -> Any:
    """A value of a module that device code reads: a ``tl.constexpr``, but interpreted the value itself.

    The interpreter does not wrap arguments marked constexpr either. A constexpr to the left of a block
    would wrap their result, and Triton 3.7 and 3.8 do not take that for a block.
    """
    return value if triton.knobs.runtime.interpret else tl.constexpr(value)


BILINEAR = constant(Interpolation.BILINEAR.value)
NEAREST = constant(Interpolation.NEAREST.value)
BICUBIC = constant(Interpolation.BICUBIC.value)
ZEROS = constant(Padding.ZEROS.value)
BORDER = constant(Padding.BORDER.value)
REFLECTION = constant(Padding.REFLECTION.value)
# The interpreter has no libdevice, and rounds the product of a multiply-add.
COMPILED = constant(not triton.knobs.runtime.interpret)


@triton.jit
def unnormalise(x, size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """The pixel coordinate of normalised ``x``: scale * x + center, both exact, with one rounding."""
    return tl.fma(x, unnormalise_grad(size, ALIGN_CORNERS, COMPUTE), (size - 1).to(COMPUTE) * 0.5)


@triton.jit
def unnormalise_grad(size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """Pixels per normalised unit."""
    return (size - ALIGN_CORNERS).to(COMPUTE) * 0.5


@triton.jit
def larger(a, b):
    """The larger of two floats; of NaN and a number the number.

    Compiled code has one instruction for it. The interpreter's ``tl.maximum`` returns NaN before Triton 3.8.
    """
    if COMPILED:
        return tl.maximum(a, b)
    else:
        return tl.where((a < b) | (a != a), b, a)


@triton.jit
def smaller(a, b):
    """The smaller of two floats; of NaN and a number the number."""
    if COMPILED:
        return tl.minimum(a, b)
    else:
        return tl.where((a > b) | (a != a), b, a)


@triton.jit
def clamp(x, low, high):
    """``x`` limited to [low, high]. NaN becomes ``low``: nothing after this can be NaN or infinite."""
    return smaller(larger(x, low), high)


@triton.jit
def reflection_bounds(size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """The lower mirror and the distance of the two mirrors: pixel centres or pixel edges."""
    low = -0.5 * (1 - ALIGN_CORNERS)
    return low, (size - ALIGN_CORNERS).to(COMPUTE)


@triton.jit
def unfold(x, size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """How far along its way out (first half) and back (second half) ``x`` is, in [0, 2 span)."""
    low, span = reflection_bounds(size, ALIGN_CORNERS, COMPUTE)
    distance = tl.abs(x - low)
    return distance - tl.floor(distance / (2 * span)) * (2 * span)


@triton.jit
def reflect(x, size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """``x`` folded between the mirrors. NaN where the two mirrors coincide."""
    low, span = reflection_bounds(size, ALIGN_CORNERS, COMPUTE)
    return span - tl.abs(unfold(x, size, ALIGN_CORNERS, COMPUTE) - span) + low


@triton.jit
def reflect_grad(x, size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """+1 or -1."""
    low, span = reflection_bounds(size, ALIGN_CORNERS, COMPUTE)
    outward = unfold(x, size, ALIGN_CORNERS, COMPUTE) < span
    return tl.where(outward == (x >= low), 1.0, -1.0).to(COMPUTE)


@triton.jit
def pad_coordinate(x, size, PADDING: tl.constexpr, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """The coordinate that is read in place of ``x``; always finite and within an int32.

    zeros: limited to [-2, size + 1], which changes no value, since from -1 and ``size`` on no pixel is
    read. border: the nearest pixel. reflection: folded between the mirrors, then the nearest pixel.
    """
    if PADDING == ZEROS:
        padded = clamp(x, -2.0, (size + 1).to(COMPUTE))
    else:
        if PADDING == REFLECTION:
            x = reflect(x, size, ALIGN_CORNERS, COMPUTE)
        padded = clamp(x, 0.0, (size - 1).to(COMPUTE))
    return padded


@triton.jit
def pad_coordinate_grad(x, size, PADDING: tl.constexpr, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """The derivative of ``pad_coordinate``, which like PyTorch's is 0 on the border itself."""
    if PADDING == ZEROS:
        slope = tl.full(x.shape, 1.0, COMPUTE)
    else:
        padded = pad_coordinate(x, size, PADDING, ALIGN_CORNERS, COMPUTE)
        slope = ((padded > 0) & (padded < (size - 1).to(COMPUTE))).to(COMPUTE)
        if PADDING == REFLECTION:
            slope *= reflect_grad(x, size, ALIGN_CORNERS, COMPUTE)
    return slope


@triton.jit
def cubic_coordinate(x, size, PADDING: tl.constexpr, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """``x`` brought near the image without changing what a cubic reads: its taps are padded one by one.

    zeros, border: limited to where all four taps already lie outside. reflection: moved by whole
    periods. NaN goes to the lower limit.
    """
    if PADDING == REFLECTION:
        low, span = reflection_bounds(size, ALIGN_CORNERS, COMPUTE)
        period = larger(2 * span, 1.0)
        x = x - tl.floor((x - low) / period) * period
        near = clamp(x, low, (2 * size + 1).to(COMPUTE))
    else:
        near = clamp(x, -3.0, (size + 2).to(COMPUTE))
    return near


@triton.jit
def pad_index(i, size, PADDING: tl.constexpr, ALIGN_CORNERS: tl.constexpr):
    """The pixel read in place of pixel ``i``, one of the taps of ``cubic_coordinate``."""
    if PADDING == REFLECTION:
        i = fold_index(i, ALIGN_CORNERS)
        i = tl.where(i >= size, 2 * size - 1 - ALIGN_CORNERS - i, i)
        i = fold_index(i, ALIGN_CORNERS)
    if PADDING != ZEROS:
        i = tl.minimum(tl.maximum(i, 0), size - 1)
    return i


@triton.jit
def fold_index(i, ALIGN_CORNERS: tl.constexpr):
    """A negative index mirrored at the lower mirror: -1 -> 1 with aligned corners, else -1 -> 0."""
    return tl.where(i < 0, -i - (1 - ALIGN_CORNERS), i)


@triton.jit
def in_bounds(i, size):
    """0 <= i < size in one unsigned comparison."""
    return i.to(tl.uint32, bitcast=True) < tl.cast(size, tl.uint32)
