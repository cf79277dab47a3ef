"""Footprints: the part of the input that an output pixel stands for, and the sub-samples taken of it.

An output pixel has n_k sub-samples along axis k. Sub-sample j of pixel o is pixel o n_k + j of a grid that
is n_k times finer over the same output. It lies at (j + 1/2) / n_k - 1/2 of a pixel from the middle of o. A
map from outputs to the input is a map from the finer grid as well. Of an affine map, n is the same for all
outputs, and ``map_of`` makes the map from the finer grid: in fixed point its coordinates are as exact as
ever. Of a homography, n is that of a cell of CELL x CELL outputs, by the map's derivative at its corners.

    n_k = ceil(length of a step along axis k, in input pixels, - 1e-3), from 1 to MOST_SAMPLES

Everything that kernels need to know of sub-samples is here: the numbers, the places, and the gradient of the
parameters. ``MATH.md`` has the formulas.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..modes import MOST_SAMPLES
from ..spec import Sizes, constant
from . import sources
from .affine import affine_map, block_places, doubled, moved_starts, steps_per_unit
from .arithmetic import AFFINE, INFINITY, PROJECTIVE, clamp, divided, larger, true_divide
from .bounds import box_in_units, image_bounds

MOST = constant(MOST_SAMPLES)
CELL = constant(16)  # outputs along each axis


class Footprint(NamedTuple):
    """The sub-samples of a block of outputs; of a homography blocks, [pixels, 1], where it says numbers.

    grid: the finer grid, a ``Sizes``, with numbers for ``output`` and ``samples``. count: the number of
    sub-samples. share: the weight of each. most: the largest count, a scalar.
    """

    grid: Any
    count: Any
    share: Any
    most: Any


class Sample(NamedTuple):
    """One sub-sample of each output of a block.

    number: which it is along each axis. exists: whether the output has it. out: its pixel of the finer grid.
    """

    number: Any
    exists: Any
    out: Any


# -------------------------------------------------------------------------------------------- how many
@triton.jit
def finer(sizes, samples, SPEC: tl.constexpr):
    """The grid with so many pixels for each of the output's."""
    output = [sizes.output[k] * samples[k] for k in SPEC.axes]
    if SPEC.dims == 2:
        output += [sizes.output[2]]
    return Sizes(sizes.input, output, sizes.batch, sizes.transforms, sizes.channels, samples)


@triton.jit
def samples_along(squared):
    """n of a step whose squared length is given; of NaN 1."""
    return clamp(tl.ceil(tl.sqrt(squared) - 1e-3), 1.0, 1.0 * MOST).to(tl.int32)


@triton.jit
def pixels_per_step(sizes, r: tl.constexpr, k: tl.constexpr, SPEC: tl.constexpr):
    """Pixels along axis r of the input that one output pixel along axis k is, if the map is 1."""
    n = (sizes.input[r] - SPEC.align_corners).to(SPEC.compute)
    return n / steps_per_unit(sizes, k, SPEC).to(SPEC.compute)


@triton.jit
def affine_samples(theta, sizes, SPEC: tl.constexpr):
    """n along each axis. No product is left that one kernel fuses and another does not: all find the same."""
    samples = ()
    for k in tl.static_range(SPEC.dims):
        step = theta[0][k] * pixels_per_step(sizes, 0, k, SPEC)
        squared = step * step
        for r in tl.static_range(1, SPEC.dims):
            step = theta[r][k] * pixels_per_step(sizes, r, k, SPEC)
            squared = tl.fma(step, step, squared)
        samples += (samples_along(squared),)
    return samples


@triton.jit
def squared_step(rows, place, inverse, sizes, k: tl.constexpr, SPEC: tl.constexpr):
    """The squared length of a step along axis k by a homography's derivative where it reads ``place``."""
    by_x = tl.fma(-place[0], rows[2][k], rows[0][k]) * (inverse * pixels_per_step(sizes, 0, k, SPEC))
    by_y = tl.fma(-place[1], rows[2][k], rows[1][k]) * (inverse * pixels_per_step(sizes, 1, k, SPEC))
    return tl.fma(by_y, by_y, by_x * by_x)


@triton.jit
def projective_samples(rows, out, sizes, SPEC: tl.constexpr):
    """n along each axis for the cells in which the outputs ``out`` lie.

    MOST where the horizon comes near: some corners lie beyond it, or have no place; 1 where none has one.
    """
    longest_x = tl.zeros(out[0].shape, SPEC.compute)
    longest_y = longest_x
    placed = 0
    ahead = 0
    for corner in tl.static_range(4):
        at = ()
        for k in tl.static_range(2):
            o = out[k] & -CELL
            if (corner >> k) % 2 == 1:
                o = tl.minimum(o + (CELL - 1), sizes.output[k] - 1)
            at += (sources.normalised(o, sizes, k, SPEC),)
        inverse, seen = sources.projective_inverse(rows[2], at, SPEC)
        x = sources.matrix_apply(rows[0], at, SPEC) * inverse
        y = sources.matrix_apply(rows[1], at, SPEC) * inverse
        seen = seen & (tl.abs(x) < INFINITY) & (tl.abs(y) < INFINITY)
        placed += seen.to(tl.int32)
        ahead += (seen & (inverse > 0)).to(tl.int32)
        longest_x = larger(longest_x, squared_step(rows, (x, y), inverse, sizes, 0, SPEC))
        longest_y = larger(longest_y, squared_step(rows, (x, y), inverse, sizes, 1, SPEC))
    whole = (placed == 4) & ((ahead == 0) | (ahead == 4))
    near = tl.where(placed == 0, 1, MOST)
    return tl.where(whole, samples_along(longest_x), near), tl.where(whole, samples_along(longest_y), near)


@triton.jit
def product(samples, SPEC: tl.constexpr):
    """The sub-samples of a pixel in all."""
    count = samples[0] * samples[1]
    if SPEC.dims == 3:
        count *= samples[2]
    return count


@triton.jit
def share_of(samples, SPEC: tl.constexpr):
    """The weight of a sub-sample."""
    count = product(samples, SPEC)
    return true_divide((count * 0 + 1).to(SPEC.compute), count.to(SPEC.compute), SPEC)


@triton.jit
def footprint_of(map, out, mask, sizes, SPEC: tl.constexpr):
    """The ``Footprint`` of the outputs ``out``."""
    if SPEC.source == PROJECTIVE:
        samples = projective_samples(map, out, sizes, SPEC)
    else:
        samples = map.samples
    count = product(samples, SPEC)
    most = count
    if SPEC.source == PROJECTIVE:
        most = tl.max(tl.max(tl.where(mask, count, 1), 1), 0)
    return Footprint(finer(sizes, samples, SPEC), count, share_of(samples, SPEC), most)


# --------------------------------------------------------------------------------------------- where
@triton.jit
def map_of(params, n, t, sizes, SPEC: tl.constexpr):
    """``sources.map_of``; with sub-samples, of an affine map, from the grid of these."""
    if SPEC.antialias and SPEC.source == AFFINE:
        theta = sources.load_matrix(params, n, t, SPEC)
        return affine_map(theta, finer(sizes, affine_samples(theta, sizes, SPEC), SPEC), SPEC)
    else:
        return sources.map_of(params, n, t, sizes, SPEC)


@triton.jit
def sample_of(number, footprint, out, SPEC: tl.constexpr):
    """Sub-sample ``number`` of the outputs ``out``, a ``Sample``."""
    samples = footprint.grid.samples
    if SPEC.source == PROJECTIVE:
        exists = number < footprint.count
    else:
        exists = tl.full(out[0].shape, True, tl.int1)
    along = ()
    fine = ()
    for k in tl.static_range(SPEC.dims):
        # its number among all, after those of the axes before; a block, if n is one
        at = (samples[k] * 0 + number) % samples[k]
        number = (samples[k] * 0 + number) // samples[k]
        along += (at,)
        fine += (out[k] * samples[k] + at,)
    return Sample(along, exists, fine)


@triton.jit
def places_of_sample(work, sample, footprint, block, SPEC: tl.constexpr):
    """Where the sub-samples of a program's block are read."""
    if SPEC.source == AFFINE:
        starts = moved_starts(work.starts, work.map, sample.number, SPEC)
        return block_places(work.map, starts, block.step, sample.out, footprint.grid, SPEC, False)
    else:
        return sources.places_at(work, sample.out, block.mask, footprint.grid, SPEC)[0]


# ------------------------------------------------------------------------------------------ the gather
@triton.jit
def grid_of(map, sizes, SPEC: tl.constexpr):
    """The grid whose pixels the gather looks for: of a homography the finest one, to bound those of all n."""
    if SPEC.antialias:
        if SPEC.source == PROJECTIVE:
            return finer(sizes, (MOST, MOST), SPEC)
        else:
            return finer(sizes, map.samples, SPEC)
    else:
        return sizes


@triton.jit
def bounds_of(map, first, last, sizes, SPEC: tl.constexpr):
    """``image_bounds`` of a box of outputs, from ``first`` to ``last``, with all sub-samples they have."""
    grid = grid_of(map, sizes, SPEC)
    if SPEC.antialias:
        first = [first[k] * grid.samples[k] for k in SPEC.axes]
        last = [last[k] * grid.samples[k] + (grid.samples[k] - 1) for k in SPEC.axes]
    low, high = box_in_units(first, last, grid, SPEC)
    return image_bounds(map, low, high, grid, SPEC)


@triton.jit
def outputs_of(first, further, grid, SPEC: tl.constexpr):
    """The outputs that the grid's pixels, ``further`` from ``first``, are sub-samples of."""
    return [divided(first[k] + further[k], grid.samples[k])[0] for k in SPEC.axes]


@triton.jit
def outputs_within(most):
    """The most outputs that so many pixels of the finest grid in a row, along x and y, lie in; a float."""
    return (most[0] // MOST + 2).to(tl.float32) * (most[1] // MOST + 2).to(tl.float32)


@triton.jit
def cells_of(visits, SPEC: tl.constexpr):
    """The cells of the pixels of ``grid_of`` that are visited: the first, and the one after the last."""
    begin = ()
    end = ()
    for k in tl.static_range(SPEC.dims):
        first = tl.min(tl.min(visits.first[k], 1), 0)
        last = tl.max(tl.max(visits.first[k], 1), 0) + visits.most[k] - 1
        begin += (first // (MOST * CELL),)
        end += (tl.where(visits.most[k] > 0, last // (MOST * CELL) + 1, 0),)
    return begin, end


@triton.jit
def grid_of_cell(map, cell, sizes, SPEC: tl.constexpr):
    """The grid of a cell's sub-samples, and which of its pixels are the cell's."""
    out = (cell[0] * CELL, cell[1] * CELL)
    samples = projective_samples(map, out, sizes, SPEC)
    begin = [out[k] * samples[k] for k in SPEC.axes]
    end = [tl.minimum(out[k] + CELL, sizes.output[k]) * samples[k] for k in SPEC.axes]
    return finer(sizes, samples, SPEC), (begin, end)


# ----------------------------------------------------------------------------- gradient of parameters
@triton.jit
def add_gradient(sums, map, gradient, sample, footprint, block, sizes, SPEC: tl.constexpr):
    """``sums`` (``sources.zero_sums``) with a gradient by the sub-sample's coordinates added, 0 if none is.

    A matrix is multiplied by the pixel's middle and by the sub-sample's distance from it: each has its sums.
    """
    ROWS: tl.constexpr = sources.matrix_rows(SPEC)
    by_rows = gradient
    if SPEC.source == PROJECTIVE:
        pixels = sources.normalised_pixels(sample.out, footprint.grid, SPEC)
        scaled = sources.scaled_to_pixels(gradient, sizes, SPEC)
        by_rows = sources.projective_backward(map, scaled, pixels, SPEC)
    new = sources.add_to_sums(sums, by_rows, block, sizes, SPEC)
    for r in tl.static_range(ROWS):
        for k in tl.static_range(SPEC.dims):
            n = footprint.grid.samples[k]
            distance = true_divide(doubled(sample.number[k], n).to(SPEC.compute), n.to(SPEC.compute), SPEC)
            new += (sums[SPEC.dims * (ROWS + r) + k] + by_rows[r] * distance,)
    return new
