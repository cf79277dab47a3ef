"""The arithmetic of PTX on NumPy's arrays: what each instruction without memory or control flow computes.

Integers, conversions and float32 arithmetic have the GPU's bits, but for fused multiply-adds that round twice
in one of 2^29 cases. Approximate functions (div.full, lg2, ex2, rcp) are correctly rounded instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
# Registers by their bits, values by their type. Halves are computed in float32: ``widened``, ``narrowed``.
BITS = {n: np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)}
TYPES = {
    **{f"b{n}": dtype for n, dtype in BITS.items()},
    **{f"u{n}": dtype for n, dtype in BITS.items()},
    **{f"s{n}": np.dtype(f"i{n // 8}") for n in BITS},
    **{f"f{n}": np.dtype(f"f{n // 8}") for n in (16, 32, 64)},
    "bf16": BITS[16],
    "pred": np.dtype(bool),
}


class Fault(Exception):
    """What a GPU would have done wrong, or what is not known here."""


def widened(x: Array, kind: str) -> Array:
    """A half as float32."""
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32) if kind == "bf16" else x.astype(np.float32)


def narrowed(x: Array, kind: str) -> Array:
    """A float as a half, to the nearest, ties to even."""
    if kind == "f16":
        return x.astype(np.float16)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def fused(a: Array, b: Array, c: Array) -> Array:
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b + c).astype(a.dtype)


def quotient(a: Array, b: Array) -> Array:
    """Of integers, towards zero; of zero, all ones."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    result = a // safe if a.dtype.kind == "u" else np.abs(a) // np.abs(safe) * (np.sign(a) * np.sign(safe))
    return np.where(b == 0, a.dtype.type(0) - a.dtype.type(1), result).astype(a.dtype)


def high_product(a: Array, b: Array) -> Array:
    """The upper half of the product's bits."""
    if a.dtype.itemsize == 4:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * b.astype(wide) >> wide(32)).astype(a.dtype)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.view(np.uint64), b.view(np.uint64)
    middle = (x >> half) * (y & low) + ((x & low) * (y & low) >> half)
    other = (middle & low) + (x & low) * (y >> half)
    high = (x >> half) * (y >> half) + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def shifted_left(a: Array, by: Array) -> Array:
    bits = a.dtype.itemsize * 8
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), a.dtype.type(0))


def shifted_right(a: Array, by: Array) -> Array:
    bits = a.dtype.itemsize * 8
    result = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return result if a.dtype.kind == "i" else np.where(by < bits, result, a.dtype.type(0))


def field(a: Array, start: Array, length: Array) -> Array:
    """``length`` bits from bit ``start`` on; of signed numbers the highest of them is the sign."""
    bits = a.dtype.itemsize * 8
    start = np.minimum(start & 255, bits)
    length = np.minimum(length & 255, bits - start)
    return shifted_right(shifted_left(a, bits - start - length), bits - length)


def permuted(a: Array, b: Array, selector: Array) -> Array:
    """Bytes of (b, a), each chosen by four bits of the selector; the fourth asks for the byte's sign."""
    source, result = b.astype(np.uint64) << np.uint64(32) | a, np.uint64(0)
    for i in range(4):
        choice = selector.astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
        byte = source >> (choice & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        result = result | np.where(choice >= 8, sign, byte) << np.uint64(8 * i)
    return result.astype(np.uint32)


def ones(a: Array) -> Array:
    """How many bits are 1."""
    return np.unpackbits(np.ascontiguousarray(a)[..., None].view(np.uint8), -1).sum(-1, dtype=np.uint32)


def flushed(x: Array) -> Array:
    """Subnormals as zeros of their sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


TO_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(x: Array, dtype: np.dtype) -> Array:
    """Of a whole float, saturated; of NaN, 0, or the top bit alone where 64 bits are involved."""
    info = np.iinfo(dtype)
    low, high, nan = x <= float(info.min), x >= float(info.max), np.isnan(x)
    result = np.where(low | high | nan, 0, x).astype(dtype)
    wide = x.dtype.itemsize == 8 or dtype.itemsize == 8
    of_nan = (info.min if info.min else 1 << 63) if wide else 0
    result = np.where(low, dtype.type(info.min), np.where(high, dtype.type(info.max), result))
    return np.where(nan, np.array(of_nan, dtype), result)


def conversion(parts: list[str]) -> Callable[[Array], Array]:
    """Of ``cvt.(flags).to.from``."""
    target, source, flags = parts[-2], parts[-1], set(parts[1:-2])
    rounding = next((TO_WHOLE[flag] for flag in flags if flag in TO_WHOLE), None)

    def convert(a: Array) -> Array:
        if source in ("f16", "bf16"):
            a = widened(a, source)
        if "ftz" in flags and a.dtype == np.float32:
            a = flushed(a)
        if rounding:
            a = rounding(a)
        if "sat" in flags:
            a = np.clip(np.nan_to_num(a), 0, 1).astype(a.dtype)
        if target in ("f16", "bf16"):
            return narrowed(a, target)
        if a.dtype.kind == "f" and TYPES[target].kind != "f":
            return to_integer(a, TYPES[target])
        return a.astype(TYPES[target])

    if flags - {"rn", "ftz", "sat", *TO_WHOLE} or (source, target) == ("f64", "bf16"):
        raise Fault(f"unknown conversion {'.'.join(parts)}")
    return convert


PLAIN: dict[str, Callable[..., Any]] = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": fused},
    **{"neg": np.negative, "abs": np.abs, "min": np.fmin, "max": np.fmax, "popc": ones},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert},
    **{"shl": shifted_left, "shr": shifted_right, "bfe": field, "prmt": permuted},
    **{"sqrt": np.sqrt, "lg2": np.log2, "ex2": np.exp2},
    "rcp": lambda a: 1 / a,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "rem": lambda a, b: a - quotient(a, b) * b,
    "mad": lambda a, b, c: a * b + c,
    "mov": lambda a: a,
    "selp": lambda a, b, chosen: np.where(chosen, a, b),
}
COMPARE: dict[str, Callable[..., Any]] = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater},
    **{"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
}
KNOWN_FLAGS = {"rn", "lo", "hi", "wide", "full", "approx", "ftz", "relu", "NaN", "sat"}


def operation(parts: list[str], count: int) -> tuple[Callable[..., Array], list[str]]:
    """(function, types of its ``count`` operands) of an instruction without memory."""
    name, kind, flags = parts[0], parts[-1], set(parts[1:-1])
    kinds = [kind] * count
    if name == "setp" and len(parts) == 3:
        return comparison(parts[1], kind), kinds
    if name == "cvt" and parts[2] in ("bf16x2", "f16x2") and kind == "f32":
        half = parts[2].removesuffix("x2")
        return lambda a, b: np.left_shift(as_word(a, half), np.uint32(16)) | as_word(b, half), kinds
    if name == "cvt":
        return conversion(parts), kinds
    function = PLAIN.get(name)
    if function is None or flags - KNOWN_FLAGS:
        raise Fault(f"unknown instruction {'.'.join(parts)}")
    if name == "selp":
        kinds[2] = "pred"
    elif name in ("shl", "shr", "bfe"):
        kinds[1:] = ["u32"] * (count - 1)
    integers = kind[0] in "us"
    if name == "div" and integers:
        function = quotient
    elif name in ("min", "max") and "NaN" in flags:
        function = np.minimum if name == "min" else np.maximum
    elif "hi" in flags:
        function = high_product if name == "mul" else lambda a, b, c: high_product(a, b) + c
    elif "wide" in flags:
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        kinds[2:] = [wide] * (count - 2)
        narrow, dtype = function, TYPES[wide]

        def function(a: Array, b: Array, *c: Array) -> Array:
            return narrow(a.astype(dtype), b.astype(dtype), *c)

    if "relu" in flags:
        limited = function
        return lambda a, b: np.maximum(limited(a, b), 0), kinds
    if kind in ("f16", "bf16") and name not in ("mov", "selp"):
        return lambda *values: narrowed(function(*[widened(value, kind) for value in values]), kind), kinds
    if "ftz" in flags and name not in ("mov", "selp"):
        return lambda *values: flushed(function(*map(flushed, values))), kinds
    if name == "rcp" and kind == "f64" and "approx" in flags:
        raise Fault("rcp.approx.f64")
    return function, kinds


def as_word(x: Array, kind: str) -> Array:
    """A float as a half in the lower bits of a word."""
    return narrowed(x, kind).view(np.uint16).astype(np.uint32)


def comparison(name: str, kind: str) -> Callable[[Array, Array], Array]:
    """Of floats, ordered ones are false beside a NaN, and unordered ones ("ltu") true."""
    if name in COMPARE and (kind[0] in "bus" or name != "ne"):
        return COMPARE[name]
    if name in ("num", "ne"):
        return lambda a, b: ~(np.isnan(a) | np.isnan(b)) & ((a != b) | (name == "num"))
    if name != "nan" and name[:-1] not in COMPARE:
        raise Fault(f"unknown comparison {name}")
    compare = COMPARE.get(name[:-1], np.not_equal)
    return lambda a, b: np.isnan(a) | np.isnan(b) | ((name != "nan") & compare(a, b))
