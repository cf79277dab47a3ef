"""Cells: the input pixel that an output is sorted by, and the cells whose outputs read one (``sort.py``)."""

import triton
import triton.language as tl

from ..spec import plain
from .arithmetic import in_bounds
from .interpolation import axis_taps, tap_count
from .padding import pad_index, wraps


@triton.jit
def axis_cell(place, size, AXIS: tl.constexpr, SPEC: tl.constexpr):
    """The cell of a place, in [0, size), and whether any pixel is read from there.

    It is the lower one of the pixels that the one tap or the two middle taps read (where padding wraps, the
    first of them): of n taps, pixel q is one in cells q - n // 2 to q - n // 2 + n - 1 alone.
    """
    TAPS: tl.constexpr = tap_count(SPEC)
    taps = axis_taps(place, size, AXIS, SPEC)
    cell = taps.index[(TAPS - 1) // 2]
    if not wraps(SPEC, AXIS):
        cell = tl.minimum(cell, taps.index[TAPS // 2])
    read = tl.zeros(cell.shape, tl.int1)
    for k in tl.static_range(TAPS):
        read = read | taps.inside[k]
    return tl.minimum(tl.maximum(cell, 0), size - 1), read


@triton.jit
def cell_of(places, sizes, SPEC: tl.constexpr, KEY: tl.constexpr):
    """The number of the cell among an image's, and whether any pixel is read from there."""
    x, read = axis_cell(places[0], sizes.input[0], 0, SPEC)
    y, read_y = axis_cell(places[1], sizes.input[1], 1, SPEC)
    read = read & read_y
    cell = y.to(KEY)
    if SPEC.dims == 3:
        z, read_z = axis_cell(places[2], sizes.input[2], 2, SPEC)
        read = read & read_z
        cell += z.to(KEY) * sizes.input[1]
    return cell * sizes.input[0] + x, read


@triton.constexpr_function
def row_parts(spec):
    """Pieces of a row of cells around a pixel: one more where it wraps."""
    return 2 if plain(wraps(spec, 0)) and plain(tap_count(spec)) > 1 else 1


@triton.jit
def cell_along(q, k, size, AXIS: tl.constexpr, SPEC: tl.constexpr):
    """The kth of the cells around pixels ``q`` along an axis, and whether it is one of its own."""
    TAPS: tl.constexpr = tap_count(SPEC)
    cell = q + (k - TAPS // 2)
    if wraps(SPEC, AXIS):
        return pad_index(cell, size, AXIS, SPEC), cell < q + (size - TAPS // 2)  # k < size
    else:
        return cell, in_bounds(cell, size)


@triton.jit
def cell_row(starts_ptr, q, row, sizes, exists, SPEC: tl.constexpr):
    """Where the outputs of one row of the cells around pixels ``q`` begin and end in the list."""
    TAPS: tl.constexpr = tap_count(SPEC)
    width = sizes.input[0]
    first = tl.maximum(q[0] - TAPS // 2, 0)
    last = tl.minimum(q[0] + (TAPS - TAPS // 2), width)
    if row_parts(SPEC) == 2:
        # first what lies within the image, then what lies beyond an end of it: from the other end, up to that
        beyond = q[0] < TAPS // 2
        wrapped_first = tl.where(beyond, tl.maximum(q[0] - TAPS // 2 + width, last), 0)
        wrapped_last = tl.where(beyond, width, tl.minimum(q[0] + (TAPS - TAPS // 2) - width, first))
        wrapped = row % 2 == 1
        first = tl.where(wrapped, wrapped_first, first)
        last = tl.maximum(tl.where(wrapped, wrapped_last, last), first)
        row = row // 2
    y, known = cell_along(q[1], row % TAPS, sizes.input[1], 1, SPEC)
    exists = exists & known
    cell = y.to(SPEC.index)
    if SPEC.dims == 3:
        z, known = cell_along(q[2], row // TAPS, sizes.input[2], 2, SPEC)
        exists = exists & known
        cell += z.to(SPEC.index) * sizes.input[1]
    cell *= width
    begin = tl.load(starts_ptr + (cell + first), exists, other=0)
    return begin, tl.load(starts_ptr + (cell + last), exists, other=0)
