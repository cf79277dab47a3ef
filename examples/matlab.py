"""Arrays of numbers in MATLAB's files of version 5 (MathWorks, "MAT-File Format"). No size or type that a
damaged file names leads beyond its bytes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATRIX, _COMPRESSED = 14, 15  # other types of elements
_CLASSES = dict(enumerate(("f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"), start=6))
_COMPLEX = 0x800  # of an array's flags
_HEADER = 128  # bytes


def read_arrays(content: bytes) -> dict[str, Any]:
    """A file's real arrays of numbers, NumPy's, by name; what else is in it is passed over.

    Raises:
        ImportError: NumPy is not installed.
        Exception: the content is damaged, or of another version; of several kinds.
    """
    order = {b"IM": "<", b"MI": ">"}.get(content[_HEADER - 2 : _HEADER])
    if order is None:
        raise ValueError("it is not a MATLAB file of version 5")
    arrays = {}
    for kind, data in _elements(memoryview(content)[_HEADER:], order):
        if kind == _COMPRESSED:
            ((kind, data),) = _elements(memoryview(zlib.decompress(data)), order)
        if kind == _MATRIX:
            arrays.update(_array(data, order))
    return arrays


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """(type, bytes) of each."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start = at + 8
        if kind >> 16:  # four bytes at most, in the place of a size
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        if start + size > len(data):
            raise ValueError("it ends before its data do")
        yield kind, data[start : start + size]
        at = start + size
        if kind != _COMPRESSED:
            at += -at % 8


def _array(data: memoryview, order: str) -> dict[str, Any]:
    """By its name, if it is one of real numbers."""
    import numpy

    (_, flags), (_, shape), (_, name), (kind, values), *more = _elements(data, order)
    (flag,) = struct.unpack_from(f"{order}I", flags)
    if flag & 0xFF not in _CLASSES or flag & _COMPLEX or more:
        return {}
    sizes = numpy.frombuffer(shape, f"{order}i4").tolist()
    stored = numpy.frombuffer(values, order + _STORED[kind]).reshape(sizes, order="F")
    return {bytes(name).decode("ascii"): stored.astype(_CLASSES[flag & 0xFF])}
