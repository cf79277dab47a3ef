"""What one program of a sampler does: which blocks of pixels and channels, and where they lie in memory."""

import triton
import triton.language as tl

from ..spec import Block, Work, constant
from . import footprints, sources
from .affine import starts_of
from .arithmetic import PROJECTIVE, TPS
from .bounds import has_interior_path, is_interior, minor, rows_of
from .tiles import (
    blocks_of,
    existing,
    first_row,
    offset_of,
    patch_by_patch,
    pixels_from,
    place_of_program,
    row_by_row,
    steps_from,
)

# ``is_interior`` costs about as much as it saves in two blocks of pixels and channels. (In the interpreter,
# which has no costs that matter, both paths are taken.)
INTERIOR_MIN_BLOCKS = constant(3 if not triton.knobs.runtime.interpret else 1)


@triton.jit
def turns(map, sizes, SPEC: tl.constexpr):
    """Whether a step along x of the output is one along y of the input, more than along x; not with NaN.

    A homography's derivative is that in the middle of the output.
    """
    rows = rows_of(map, SPEC)
    if SPEC.source == PROJECTIVE:
        along_x, _ = minor(rows[0][0], rows[0][2], rows[2][0], rows[2][2])
        along_y, _ = minor(rows[1][0], rows[1][2], rows[2][0], rows[2][2])
        return tl.abs(along_y) * sizes.input[1] > tl.abs(along_x) * sizes.input[0]
    else:
        return tl.abs(rows[1][0]) > tl.abs(rows[0][0])


@triton.jit
def turns_back(map, SPEC: tl.constexpr):
    """Whether a step along x of the input is one along y of the output, more than half of that along x.

    Of an affine map's inverse, (d, -b; -c, a) / det, these are c and d.
    """
    rows = rows_of(map, SPEC)
    return tl.abs(rows[1][0]) * 2 > tl.abs(rows[1][1])


@triton.jit
def numbers_of_lanes(map, sizes, SPEC: tl.constexpr, BACK: tl.constexpr = False):
    """Which pixel of a block each lane has. BACK: of a block of the input, of an affine map.

    Rows of pixels that are turned by 90 degrees are columns elsewhere: 32 pixels of one lie in as many rows
    there, and cache lines. Those of a patch, 8 x 4, lie in 8.
    """
    numbers = row_by_row(SPEC.rows * SPEC.columns)
    if SPEC.patches:
        turned = turns_back(map, SPEC) if BACK else turns(map, sizes, SPEC)
        numbers = tl.where(turned, patch_by_patch(SPEC.rows, SPEC.columns), numbers)
    return numbers


@triton.jit
def work_of(params, sizes, tiling, SPEC: tl.constexpr):
    """What this program is to do."""
    column_tile, row_tile, split, group = place_of_program(tiling)
    outputs = sources.outputs_of(group * SPEC.group, sizes, SPEC)
    map = footprints.map_of(params, outputs[0][0], outputs[0][1], sizes, SPEC)
    steps = tiling.steps
    if SPEC.source == TPS:
        steps = 1  # known here, so that there is no loop out of which the group's addresses would be moved
    row = first_row(row_tile, steps * SPEC.rows, SPEC)
    if SPEC.source != TPS:
        steps = steps_from(row, steps, sizes.output, SPEC)
    blocks = blocks_of(split, tiling, sizes.channels, SPEC)
    column = column_tile * SPEC.columns
    interior = False
    if has_interior_path(SPEC):
        interior = steps * (blocks[1] - blocks[0]) >= INTERIOR_MIN_BLOCKS
        if interior:
            interior = is_interior(map, column, row, steps * SPEC.rows, sizes, SPEC)
    tiles = tiling.columns * tiling.rows
    numbers = numbers_of_lanes(map, sizes, SPEC)
    starts = starts_of(map, column, row, numbers, sizes, SPEC)
    return Work(
        params, group * SPEC.group, outputs, map, column, row, steps, numbers, starts, blocks, interior,
        split, split * tiles + row_tile * tiling.columns + column_tile, tiling.splits * tiles,
    )  # fmt: skip


@triton.jit
def block_of(work, step, sizes, SPEC: tl.constexpr):
    """The ``Block`` of a program's step."""
    row = work.row + step * SPEC.rows
    out, mask = pixels_from(work.column, row, sizes.output, work.numbers, SPEC.columns, SPEC)
    return Block(step, out, mask)


@triton.jit
def kept_pixels(block, work, g: tl.constexpr, sizes, INTERIOR: tl.constexpr = False):
    """The pixels that exist of output ``g`` of the group."""
    if INTERIOR:
        return tl.full(block.mask.shape, True, tl.int1)
    else:
        return existing(block.mask, work.b + g, sizes.batch)


@triton.jit
def image_of(image, n, VECTOR: tl.constexpr):
    """Where image n begins."""
    return image.pointer + tl.multiple_of(n * image.strides.n, VECTOR)


@triton.jit
def output_of(output, work, g: tl.constexpr, block, SPEC: tl.constexpr):
    """Where the pixels of output ``g`` of the group are."""
    n, t = work.outputs[g]
    offset = offset_of(block.out, output.strides.pixel, SPEC.vector_output, SPEC)
    begin = tl.multiple_of(n * output.strides.n + t * output.strides.t, SPEC.vector_output)
    return output.pointer + begin + offset
