"""Coordinates that are exact where the mathematics is, and within 2^-30 of a pixel elsewhere.

First the fixed-point coordinates themselves, against rational arithmetic on the given float32 parameters.
Then what follows: identity, whole-pixel shifts and flips between equal sizes, and whole- and half-pixel
flows, read, weigh and slope as in float64, whatever the size.
"""

from fractions import Fraction

import torch
import triton
import triton.language as tl

from stn_triton.kernels.device import affine, sources, tiles
from stn_triton.kernels.modes import Interpolation, Padding, Source
from stn_triton.kernels.spec import SPECIALIZATION, Params, Sizes, Spec, Tiling, Work

BOUND = Fraction(1, 2**30)


# ------------------------------------------------------------------------------------------ coordinates
@triton.jit(**SPECIALIZATION)
def coordinates_kernel(
    source_ptr, words_ptr, index_ptr, fraction_ptr, fits_ptr,
    in_width, in_height, in_depth, out_width, out_height, out_depth, batch, column_tiles, row_tiles, steps,
    SPEC: tl.constexpr,
):  # fmt: skip
    """Of each output pixel and axis the fixed-point coordinate, (batch, [D,] H, W, dims), and the place made of it.

    Pixels are visited as the samplers visit them: ``steps`` blocks below each other from the first one's
    coordinates.
    """
    sizes = Sizes((in_width, in_height, in_depth), (out_width, out_height, out_depth), batch, 1, 1)
    stride = SPEC.dims + 1
    params = Params(source_ptr, (SPEC.dims * stride, 0, stride, 1, 0), source_ptr, 0)
    column_tile, row_tile, _, b = tiles.place_of_program(Tiling(column_tiles, row_tiles, 1, 1, steps))
    column = column_tile * SPEC.columns
    row = tiles.first_row(row_tile, steps * SPEC.rows, SPEC)
    outputs = sources.outputs_of(b, sizes, SPEC)
    map = sources.map_of(params, outputs[0][0], outputs[0][1], sizes, SPEC)
    starts = affine.starts_of(map, column, row, sizes, SPEC)
    work = Work(b, outputs, map, column, row, steps, starts, (0, 1), False, 0, 0, 1)
    tl.store(fits_ptr + b, tl.cast(map.fits, tl.int32))
    for step in range(steps):
        out, mask = tiles.pixels_from(
            column, row + step * SPEC.rows, sizes.output, SPEC.rows, SPEC.columns, SPEC
        )
        places = affine.block_places(work, step, out, sizes, SPEC, False)
        pixel = tiles.offset_of(out, (1, out_width, out_width.to(SPEC.index) * out_height), 1, SPEC)
        at = (b.to(tl.int64) * tiles_pixels(sizes, SPEC) + pixel) * SPEC.dims
        for axis in tl.static_range(SPEC.dims):
            if affine.has_starts(SPEC):
                x = starts[0][axis] + starts[1][axis] * step
            else:
                u = affine.doubled_pixels(out, sizes, SPEC)
                x = affine.fixed_coordinate(map.high[axis], map.low[axis], u, SPEC.dims)
            tl.store(words_ptr + at + axis, x, mask)
            tl.store(index_ptr + at + axis, places[axis].index, mask)
            tl.store(fraction_ptr + at + axis, places[axis].fraction, mask)


@triton.jit
def tiles_pixels(sizes, SPEC: tl.constexpr):
    pixels = sizes.output[0].to(tl.int64) * sizes.output[1]
    if SPEC.dims == 3:
        pixels *= sizes.output[2]
    return pixels


def coordinates(theta, in_size, size, align_corners, rows=4, columns=8, steps=8):
    """(fixed-point words, indices, fractions), each (batch, *size, dims), and whether each map fits, of theta."""
    dims, batch = len(size), len(theta)
    shape = (batch, *size, dims)
    words = torch.zeros(shape, dtype=torch.int64, device=theta.device)
    index = torch.zeros(shape, dtype=torch.int32, device=theta.device)
    fraction = torch.full(shape, float("nan"), device=theta.device)
    fits = torch.zeros(batch, dtype=torch.int32, device=theta.device)
    spec = Spec(
        source=int(Source.AFFINE),
        interpolation=int(Interpolation.BILINEAR),
        padding=(int(Padding.ZEROS),) * dims,
        align_corners=int(align_corners),
        dims=dims,
        compute=tl.float32,
        index=tl.int32,
        fixed_point=True,
        rows=rows,
        columns=columns,
    )
    image_rows = torch.Size(size[:-1]).numel()
    column_tiles, row_tiles = -(-size[-1] // columns), -(-image_rows // (rows * steps))
    coordinates_kernel[(batch * column_tiles * row_tiles,)](
        theta.contiguous(), words, index, fraction, fits,
        *(*reversed(in_size), 1)[:3], *(*reversed(size), 1)[:3], batch, column_tiles, row_tiles, steps, spec,
    )  # fmt: skip
    return words.cpu(), index.cpu(), fraction.cpu(), fits.bool().cpu()


def exact_rows(theta, in_size, size, align_corners):
    """The rows (A_x, A_y[, A_z], C) of one matrix, fractions: x_r = sum over k of A_rk u_k + C_r."""
    n = [width - align_corners for width in reversed(in_size)]
    e = [max(width - align_corners, 1) for width in reversed(size)]
    rows = []
    for r, row in enumerate(theta.tolist()):
        *linear, shift = map(Fraction, row)
        slopes = [entry * n[r] / (2 * e[k]) for k, entry in enumerate(linear)]
        rows.append((*slopes, shift * n[r] / 2 + Fraction(n[r] + align_corners - 1, 2)))
    return rows


def errors(words, theta, in_size, size, align_corners, count=200):
    """Distances, in pixels, of one map's fixed-point coordinates (*size, dims) from exact ones: its corners' and
    those of ``count`` other pixels."""
    dims, pixels = len(size), torch.Size(size).numel()
    corners = torch.cartesian_prod(*(torch.tensor([0, width - 1]) for width in size))
    chosen = torch.randint(pixels, (min(count, pixels),))
    places = torch.stack(torch.unravel_index(chosen, size), -1)
    rows = exact_rows(theta, in_size, size, align_corners)
    found = []
    for place in torch.cat([corners, places]).tolist():
        u = [2 * o - (width - 1) for o, width in zip(reversed(place), reversed(size))]
        for r, row in enumerate(rows):
            exact = sum((slope * distance for slope, distance in zip(row, u)), row[dims])
            found.append(abs(Fraction(words[(*place, r)].item(), 2**32) - exact))
    return found
