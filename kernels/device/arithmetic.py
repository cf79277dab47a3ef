"""Arithmetic that the compiler and every interpreter do alike."""

import triton
import triton.language as tl

from ..modes import Interpolation, Padding, Source
from ..spec import constant

BILINEAR = constant(Interpolation.BILINEAR.value)
NEAREST = constant(Interpolation.NEAREST.value)
BICUBIC = constant(Interpolation.BICUBIC.value)
ZEROS = constant(Padding.ZEROS.value)
REFLECTION = constant(Padding.REFLECTION.value)
CIRCULAR = constant(Padding.CIRCULAR.value)
GRID = constant(Source.GRID.value)
AFFINE = constant(Source.AFFINE.value)
PROJECTIVE = constant(Source.PROJECTIVE.value)
TPS = constant(Source.TPS.value)
FLOW = constant(Source.FLOW.value)

# The interpreter has no libdevice, and rounds the product of a multiply-add.
COMPILED = constant(not triton.knobs.runtime.interpret)
INFINITY = constant(float("inf"))
# Added to a small float these leave no bits for a fraction: the sum is rounded, half to even, and its lowest
# 16 bits are those of the whole number.
TO_WHOLE_32 = constant(1.5 * 2**23)
TO_WHOLE_64 = constant(1.5 * 2**52)


# Of floats, device code takes these and never tl.maximum, tl.minimum and tl.clamp: of NaN and a number they
# return the number everywhere. (Compiled, Triton's do so too, in one instruction; not so in every
# interpreter.)
@triton.jit
def larger(a, b):
    """The larger of two floats, of which the first is a block or a scalar tensor."""
    if COMPILED:
        return tl.maximum(a, b)
    else:
        return tl.where((a < b) | (a != a), b, a)


@triton.jit
def smaller(a, b):
    if COMPILED:
        return tl.minimum(a, b)
    else:
        return tl.where((a > b) | (a != a), b, a)


@triton.jit
def clamp(x, low, high):
    """``x`` limited to [low, high]. NaN becomes ``low``: nothing after this can be NaN or infinite."""
    return smaller(larger(x, low), high)


@triton.jit
def true_divide(a, b, SPEC: tl.constexpr):
    """a / b rounded to nearest: float32 division is approximate by default."""
    if SPEC.compute == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def exact_fma(a, b, c):
    """a b + c of float32 scalars, rounded once."""
    if COMPILED:
        return tl.fma(a, b, c)
    else:
        exact = tl.cast(a, tl.float64) * tl.cast(b, tl.float64) + tl.cast(c, tl.float64)
        return exact.to(tl.float32)


@triton.jit
def whole_quotient(a, b, SPEC: tl.constexpr):
    """a / b rounded to nearest, for whole a and many a to one b: its reciprocal and two multiply-adds.

    Markstein's correction: the remainder of the first try is exact, and what it adds rounds as a / b does.
    """
    if COMPILED and SPEC.compute == tl.float32:
        inverse = tl.div_rn(1.0, b)
        first = a * inverse
        return tl.fma(tl.fma(-first, b, a), inverse, first)
    else:
        return true_divide(a, b, SPEC)


@triton.jit
def divided(a, b):
    """(a // b, a % b) of numbers that are not negative: an unsigned division is half of a signed one."""
    quotient = (a.to(tl.uint32) // tl.cast(b, tl.uint32)).to(tl.int32)
    return quotient, a - quotient * b


@triton.jit
def in_bounds(i, size):
    """0 <= i < size in one unsigned comparison."""
    return i.to(tl.uint32, bitcast=True) < tl.cast(size, tl.uint32)


@triton.jit
def to_integer(value, DTYPE: tl.constexpr):
    """``value`` as uint8 or int16: half to even, and saturated; NaN is 0."""
    if DTYPE == tl.uint8:
        value = clamp(value, 0.0, 255.0)
    else:
        value = clamp(tl.where(value == value, value, 0.0), -32768.0, 32767.0)
    COMPUTE: tl.constexpr = value.dtype
    if COMPUTE == tl.float64:
        return (value + TO_WHOLE_64).to(tl.int64, bitcast=True).to(DTYPE)
    else:
        return (value + TO_WHOLE_32).to(tl.int32, bitcast=True).to(DTYPE)


@triton.jit
def rounded(value, pointer):
    """``value`` in the type that ``pointer`` points to."""
    DTYPE: tl.constexpr = pointer.dtype.element_ty
    if DTYPE == tl.uint8 or DTYPE == tl.int16:
        return to_integer(value, DTYPE)
    else:
        if DTYPE == tl.bfloat16:
            value = value.to(tl.float32)  # the interpreter has no float64 -> bfloat16
        return value.to(DTYPE)


@triton.jit
def widened(value, SPEC: tl.constexpr):
    """``value`` in the type of sums."""
    if value.dtype == tl.bfloat16 and SPEC.compute == tl.float32:
        # of a vector a shift and a mask for each two: the compiler's own conversion takes three instructions
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return value.to(SPEC.compute)
