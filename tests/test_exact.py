"""Coordinates that are exact where the mathematics is, and within 2^-30 of a pixel elsewhere.

First the kernels' coordinates themselves, against rational arithmetic on the given float32 parameters. Then what
follows from them: identity, whole-pixel shifts and flips between equal sizes, and whole- and half-pixel flows, read,
weigh and slope exactly, whatever the size. The CPU path, PyTorch's operators, has their rounding: no test here is of it.
"""

import math
from fractions import Fraction

import pytest
import torch
import triton
import triton.language as tl
from common import assert_close, random_theta

import stn_triton as stn
from stn_triton.kernels.device import affine, sources, tiles
from stn_triton.kernels.modes import Interpolation, Padding, Source
from stn_triton.kernels.spec import SPECIALIZATION, Params, Sizes, Spec, Work

BOUND = Fraction(1, 2**30)
ROWS, COLUMNS = 4, 8
STEPS = 8  # the most that tiles have
ALIGN = pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])


# ------------------------------------------------------------------------------------------ coordinates
@triton.jit(**SPECIALIZATION)
def places_kernel(
    source_ptr, blocks_ptr, out_ptr, index_ptr, fraction_ptr, single_index_ptr, single_fraction_ptr, fits_ptr,
    in_width, in_height, in_depth, out_width, out_height, out_depth, blocks, steps,
    SPEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Where a program's pixels are read, as the samplers find it: from step to step, and (single) each by itself.

    A program for each matrix and each block (column, row) of blocks_ptr. Written, for (program, step, lane, axis):
    the output pixel, and its places with all bits of the fraction, which ``WIDE``, the same with float64, keeps.
    """
    sizes = Sizes((in_width, in_height, in_depth), (out_width, out_height, out_depth), 2**30, 1, 1)
    entries: tl.constexpr = SPEC.dims + 1
    params = Params(source_ptr, (SPEC.dims * entries, 0, entries, 1, 0), source_ptr, 0)
    program = tl.program_id(0)
    outputs = sources.outputs_of(program // blocks, sizes, SPEC)
    column = tl.load(blocks_ptr + 2 * (program % blocks))
    row = tl.load(blocks_ptr + 2 * (program % blocks) + 1)
    map = sources.map_of(params, outputs[0][0], outputs[0][1], sizes, SPEC)
    starts = affine.starts_of(map, column, row, sizes, SPEC)
    work = Work(0, outputs, map, column, row, steps, starts, (0, 1), False, 0, 0, 1)
    tl.store(fits_ptr + program, tl.cast(map.fits, tl.int32))
    LANES: tl.constexpr = SPEC.rows * SPEC.columns
    for step in range(steps):
        out, _ = tiles.pixels_from(column, row + step * SPEC.rows, sizes.output, SPEC.rows, SPEC.columns, SPEC)
        places = affine.block_places(work, step, out, sizes, WIDE, False)
        single = affine.affine_places(map, out, sizes, WIDE)
        at = ((program * steps + step) * LANES + tl.arange(0, LANES)[:, None]) * SPEC.dims
        for axis in tl.static_range(SPEC.dims):
            tl.store(out_ptr + at + axis, out[axis])
            tl.store(index_ptr + at + axis, places[axis].index)
            tl.store(fraction_ptr + at + axis, places[axis].fraction)
            tl.store(single_index_ptr + at + axis, single[axis].index)
            tl.store(single_fraction_ptr + at + axis, single[axis].fraction)


def spec_of(source, dims, align_corners, mode=Interpolation.BILINEAR, compute=tl.float32):
    return Spec(
        source=int(source),
        interpolation=int(mode),
        padding=(int(Padding.ZEROS),) * dims,
        align_corners=int(align_corners),
        dims=dims,
        compute=compute,
        index=tl.int32,
        fixed_point=True,
        rows=ROWS,
        columns=COLUMNS,
    )


class Found:
    """What ``places_kernel`` writes, by (matrix, block, pixel of all steps, axis), on the CPU."""

    def __init__(self, theta, in_size, size, align_corners, blocks, mode=Interpolation.BILINEAR, steps=STEPS):
        dims, blocks = len(size), torch.tensor(blocks, dtype=torch.int32, device=theta.device)
        shape = (len(theta), len(blocks), steps * ROWS * COLUMNS, dims)
        out, index, single_index = (
            torch.zeros(shape, dtype=torch.int32, device=theta.device) for _ in range(3)
        )
        fraction, single_fraction = (
            torch.zeros(shape, dtype=torch.float64, device=theta.device) for _ in range(2)
        )
        fits = torch.zeros(shape[:2], dtype=torch.int32, device=theta.device)
        specs = (
            spec_of(Source.AFFINE, dims, align_corners, mode, compute) for compute in (tl.float32, tl.float64)
        )
        places_kernel[(fits.numel(),)](
            theta.contiguous(), blocks, out, index, fraction, single_index, single_fraction, fits,
            *(*reversed(in_size), 1)[:3], *(*reversed(size), 1)[:3], len(blocks), steps, *specs,
        )  # fmt: skip
        self.out, self.fits = out.cpu(), fits.bool().all(1).cpu()
        self.words = self.in_words(index, fraction)
        self.single = self.in_words(single_index, single_fraction)

    @staticmethod
    def in_words(index, fraction):
        """Units of 2^-32."""
        return index.cpu().long() * 2**32 + (fraction.cpu() * 2**32).long()


def corner_blocks(size):
    """(column, row) of blocks at all corners of an output, the last of STEPS below each other within it."""
    width, rows = size[-1], math.prod(size[:-1])
    columns = {0, max(width - COLUMNS, 0)}
    return [(column, row) for column in columns for row in {0, max(rows - ROWS * STEPS, 0)}]


def exact_rows(theta, in_size, size, align_corners):
    """The rows (A_x, A_y[, A_z], C) of a matrix, fractions: x_r = sum over k of A_rk u_k + C_r."""
    n = [width - align_corners for width in reversed(in_size)]
    e = [max(width - align_corners, 1) for width in reversed(size)]
    rows = []
    for r, row in enumerate(theta.tolist()):
        *linear, shift = map(Fraction, row)
        slopes = [entry * n[r] / (2 * e[k]) for k, entry in enumerate(linear)]
        rows.append((*slopes, shift * n[r] / 2 + Fraction(in_size[-1 - r] - 1, 2)))
    return rows


def errors_of(words, out, theta, in_size, size, align_corners, every=7):
    """Distances, in pixels, of coordinates (pixels, dims) of a matrix from exact ones; of each axis the largest.

    Of every so many pixels, first and last included.
    """
    worst = []
    chosen = [*range(0, len(out), every), len(out) - 1]
    for r, row in enumerate(exact_rows(theta, in_size, size, align_corners)):
        common = math.lcm(*(entry.denominator for entry in row))
        *slopes, shift = (int(entry * common) for entry in row)
        differences = []
        for i in chosen:
            exact = shift
            for slope, o, width in zip(slopes, out[i].tolist(), reversed(size)):
                exact += slope * (2 * o - (width - 1))
            differences.append(abs(words[i, r].item() * common - exact * 2**32))
        worst.append(Fraction(max(differences), common * 2**32))
    return worst


# Of random matrices: factors of the linear part and of the shift.
MAPS = {"ordinary": (1, 1), "crop": (2**-7, 2), "zoom": (100, 3), "far": (1, 2**17)}
SIZES = [
    pytest.param(*sizes, id="-".join("x".join(map(str, size)) for size in sizes))
    for sizes in (
        ((28, 28), (28, 28)),
        ((33, 40), (71, 37)),
        ((600, 1000), (224, 224)),
        ((1, 5), (35, 1)),
        ((5, 6, 7), (6, 7, 9)),
        ((160, 100, 33), (10, 12, 8)),
    )
]


@pytest.mark.parametrize("in_size, size", SIZES)
@ALIGN
def test_affine_coordinates_are_within_their_bound(device, in_size, size, align_corners):
    """Of every kind of map, at the corners of the output, from the first to the last step of a program."""
    dims = len(size)
    theta = torch.cat([random_theta(2, dims, torch.float32, device) for _ in MAPS])
    factors = torch.tensor(list(MAPS.values()), device=device).repeat_interleave(2, 0)
    theta[:, :, :dims] *= factors[:, :1, None]
    theta[:, :, dims] *= factors[:, 1:]
    found = Found(theta, in_size, size, align_corners, corner_blocks(size))
    assert found.fits.all()
    for i, kind in enumerate(name for name in MAPS for _ in range(2)):
        for words in (found.words[i], found.single[i]):
            for block, out in zip(words, found.out[i]):
                errors = errors_of(block, out, theta[i].cpu(), in_size, size, align_corners)
                assert max(errors) <= BOUND, f"{kind}: off by 2^{math.log2(max(errors)):.2f} pixels"
