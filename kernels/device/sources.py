"""Coordinate sources: where in the input each output pixel is read, and the transpose.

Forward: ``coordinates_of``, with a branch for each source. Backward: ``add_gradient``, and ``store_sums`` for
matrices, whose gradient is summed pixel by pixel over the blocks of a program. Every value has one writer, so
that nothing is summed in an unpredictable order. ``host/parameters.py`` makes the buffers and reduces them.

To add a source, add its code to ``modes.Source``, a branch to ``coordinates_of`` and to ``add_gradient``, and
one to ``host/parameters.py``. ``map_of`` has a branch for sources whose pixels share something, and
``scaled_to_pixels`` for those whose coordinates are not normalised. No kernel changes.

A program works on a group of outputs with the same pixels, so that what depends on the pixels alone is
computed once.
"""

import triton
import triton.language as tl

from ..modes import Source
from ..spec import Strides, plain
from .affine import (
    affine_map,
    affine_places,
    block_places,
    displaced,
    doubled,
    has_starts,
    identity_map,
    identity_places,
    stepped_places,
    steps_per_unit,
)
from .arithmetic import (
    AFFINE,
    FLOW,
    GRID,
    PROJECTIVE,
    TPS,
    divided,
    larger,
    rounded,
    true_divide,
    whole_quotient,
)
from .padding import place_of
from .tiles import existing, offset_of, pixel_count, pixels_from


@triton.constexpr_function
def matrix_rows(spec):
    """Rows of the source's matrix; 0 of a source that has none."""
    if plain(spec.source) == Source.PROJECTIVE:
        return 3
    return plain(spec.dims) if plain(spec.source) == Source.AFFINE else 0


@triton.constexpr_function
def is_affine(spec):
    return plain(spec.source) == Source.AFFINE


@triton.jit
def outputs_of(b, sizes, SPEC: tl.constexpr):
    """(image, transform), int64, of the outputs b, b + 1, ...; past the last one, the last one again."""
    outputs = ()
    for g in tl.static_range(SPEC.group):
        n = tl.minimum(b + g, sizes.batch - 1)
        t = n * 0
        if sizes.transforms > 1:
            n, t = divided(n, sizes.transforms)
        outputs += ((n.to(tl.int64), t.to(tl.int64)),)
    return outputs


# ------------------------------------------------------------------------------------ normalised units
@triton.jit
def normalised(o, sizes, axis: tl.constexpr, SPEC: tl.constexpr):
    """The normalised coordinate of output pixel ``o``, rounded once; 0 on an axis of one pixel."""
    e = steps_per_unit(sizes, axis, SPEC).to(SPEC.compute)
    return whole_quotient(doubled(o, sizes.output[axis]).to(SPEC.compute), e, SPEC)


@triton.jit
def normalised_pixels(out, sizes, SPEC: tl.constexpr):
    """(x, y[, z], 1) of the output pixels: what a matrix is multiplied by."""
    pixels = [normalised(out[axis], sizes, axis, SPEC) for axis in SPEC.axes]
    return pixels + [tl.full(out[0].shape, 1.0, SPEC.compute)]


@triton.jit
def pixels_per_unit(size, SPEC: tl.constexpr):
    """The derivative of ``unnormalise``."""
    return (size - SPEC.align_corners).to(SPEC.compute) * 0.5


@triton.jit
def unnormalise(x, size, SPEC: tl.constexpr):
    """The pixel coordinate of normalised ``x``: scale * x + center, both exact, with one rounding."""
    return tl.fma(x, pixels_per_unit(size, SPEC), (size - 1).to(SPEC.compute) * 0.5)


@triton.jit
def scaled_to_pixels(values, sizes, SPEC: tl.constexpr):
    """Changes of a source's coordinates as changes of pixel coordinates. A flow's unit is the pixel.

    The scaling is its own transpose: it makes gradients by the source's coordinates of those by pixels.
    """
    if SPEC.source == FLOW:
        return values
    else:
        return [values[axis] * pixels_per_unit(sizes.input[axis], SPEC) for axis in SPEC.axes]


# -------------------------------------------------------------------------------- dense grid and flow
@triton.jit
def dense_load(pointer, strides, out, mask, SPEC: tl.constexpr):
    """The channels of each output pixel, a number for each axis: (x, y[, z])."""
    offset = offset_of(out, strides.pixel, 1, SPEC)
    stride = tl.cast(strides.c, SPEC.index)  # twice of it may pass 2^31
    return [tl.load(pointer + (offset + stride * k), mask, other=0.0).to(SPEC.compute) for k in SPEC.axes]


@triton.jit
def dense_store(partial, values, work, g: tl.constexpr, block, sizes, SPEC: tl.constexpr, LAST: tl.constexpr):
    """Stores a number for each axis: (splits, batch, [D,] H, W, dims), or if not LAST dims before pixels.

    Those of output ``g`` of the group.
    """
    out = block.out
    pixel = out[1].to(SPEC.index) * sizes.output[0] + out[0]
    if SPEC.dims == 3:
        pixel += out[2].to(SPEC.index) * sizes.output[1] * sizes.output[0]
    pixels = pixel_count(sizes.output, SPEC)
    base = partial + (work.split.to(tl.int64) * sizes.batch + (work.b + g)) * pixels * SPEC.dims
    for k in tl.static_range(SPEC.dims):
        if LAST:
            target = base + (pixel * SPEC.dims + k)
        else:
            target = base + pixels * k + pixel
        tl.store(target, rounded(values[k], partial), block.mask)


# ------------------------------------------------------------------------------- affine and projective
@triton.jit
def load_matrix(params, n, t, SPEC: tl.constexpr):
    """The matrix of transform t of image n, by rows."""
    stride_n, stride_t, stride_row, stride_col, _ = params.strides
    pointer = params.pointer + (n * stride_n + t * stride_t)
    rows = ()
    for r in tl.static_range(matrix_rows(SPEC)):
        row = ()
        for k in tl.static_range(SPEC.dims + 1):
            # matrices may be far apart within, with images innermost
            entry = tl.cast(stride_row, tl.int64) * r + tl.cast(stride_col, tl.int64) * k
            row += (tl.load(pointer + entry).to(SPEC.compute),)
        rows += (row,)
    return rows


@triton.jit
def map_of(params, n, t, sizes, SPEC: tl.constexpr):
    """What all pixels of an output share: of a matrix or a flow a map, of others nothing.

    Affine: ``affine.Map``; projective: the matrix by rows, in normalised units.
    """
    if SPEC.source == AFFINE:
        return affine_map(load_matrix(params, n, t, SPEC), sizes, SPEC)
    elif SPEC.source == PROJECTIVE:
        return load_matrix(params, n, t, SPEC)
    elif SPEC.source == FLOW:
        return identity_map(sizes, SPEC)
    else:
        return ()


@triton.jit
def matrix_apply(row, pixels, SPEC: tl.constexpr):
    """The row times (x, y[, z], 1); the same bits wherever a product could be moved out of a loop.

    The last entry comes last: in a crop it is the largest by far, and added earlier its rounding would be
    shared by a row of outputs, whose sums it would not cancel in.
    """
    total = row[SPEC.dims - 1] * pixels[SPEC.dims - 1]
    for k in tl.static_range(1, SPEC.dims):
        total = tl.fma(row[SPEC.dims - 1 - k], pixels[SPEC.dims - 1 - k], total)
    return total + row[SPEC.dims]


@triton.jit
def projective_inverse(row, pixels, SPEC: tl.constexpr):
    """1 / w for w = row (x, y, 1), and 0 on the horizon, with a flag.

    The horizon is where w cannot be told from 0: its terms cancel to within their rounding. The bound is
    relative, so that it does not depend on the scale of the homography, which means nothing.
    """
    w = matrix_apply(row, pixels, SPEC)
    size = tl.abs(row[0] * pixels[0]) + tl.abs(row[1] * pixels[1]) + tl.abs(row[2])
    ROUNDING: tl.constexpr = 2.0**-50 if SPEC.compute == tl.float64 else 2.0**-21
    TINY: tl.constexpr = 1e-300 if SPEC.compute == tl.float64 else 1e-37  # below, 1 / w overflows
    seen = (tl.abs(w) > size * ROUNDING) & (tl.abs(w) > TINY)
    one = tl.full(w.shape, 1.0, SPEC.compute)
    return tl.where(seen, true_divide(one, tl.where(seen, w, 1.0), SPEC), 0.0), seen


@triton.jit
def matrix_coordinates(rows, pixels, SPEC: tl.constexpr):
    """theta (x, y[, z], 1), or (h_0 p, h_1 p) / h_2 p with p = (x, y, 1), NaN on the horizon; normalised."""
    found = [matrix_apply(rows[axis], pixels, SPEC) for axis in SPEC.axes]
    if SPEC.source == PROJECTIVE:
        inverse, seen = projective_inverse(rows[2], pixels, SPEC)
        return [tl.where(seen, x * inverse, float("nan")) for x in found]
    else:
        return found


@triton.jit
def projective_backward(rows, gradients, pixels, SPEC: tl.constexpr):
    """The gradients by the numerators and by the denominator; 0 where nothing finite is seen."""
    inverse, seen = projective_inverse(rows[2], pixels, SPEC)
    x = matrix_apply(rows[0], pixels, SPEC) * inverse
    y = matrix_apply(rows[1], pixels, SPEC) * inverse
    placed = seen & (tl.abs(x) < float("inf")) & (tl.abs(y) < float("inf"))
    by_x = tl.where(placed, gradients[0] * inverse, 0.0)
    by_y = tl.where(placed, gradients[1] * inverse, 0.0)
    return by_x, by_y, -(by_x * tl.where(placed, x, 0.0) + by_y * tl.where(placed, y, 0.0))


@triton.jit
def zero_sums(SPEC: tl.constexpr):
    """What ``add_gradient`` adds a matrix's gradient to: ``dims`` sums for each row and pixel.

    With sub-samples as many follow, for their distances from the pixel's centre.
    """
    sums = ()
    if SPEC.source_grad:
        for _ in tl.static_range(matrix_rows(SPEC) * SPEC.dims * (2 if SPEC.antialias else 1)):
            sums += (tl.zeros([SPEC.rows * SPEC.columns, 1], SPEC.compute),)
    return sums


@triton.jit
def add_to_sums(sums, gradients, block, sizes, SPEC: tl.constexpr):
    """``sums`` with the gradients by a matrix's rows added, for each pixel.

    A lane keeps its column from block to block, and in 2-D its rows are evenly apart: the sums of g and of g
    times the block's number are enough. In 3-D they are of g, g u_y and g u_z.
    """
    new = ()
    for r in tl.static_range(matrix_rows(SPEC)):
        new += (sums[SPEC.dims * r] + gradients[r],)
        for k in tl.static_range(1, SPEC.dims):
            factor = block.step
            if SPEC.dims == 3:
                factor = doubled(block.out[k], sizes.output[k])
            new += (sums[SPEC.dims * r + k] + gradients[r] * factor.to(SPEC.compute),)
    return new


@triton.jit
def store_sums(partial, sums, work, sizes, SPEC: tl.constexpr, BY_PIXELS: tl.constexpr = False):
    """This program's part of the buffer (batch, entries of the matrix, programs).

    BY_PIXELS: the gradients that were added are by pixel coordinates, not by normalised ones.
    """
    ROWS: tl.constexpr = matrix_rows(SPEC)
    out, _ = pixels_from(work.column, work.row, sizes.output, work.numbers, SPEC.columns, SPEC)
    programs = tl.cast(work.programs, tl.int64)
    base = partial + work.b.to(tl.int64) * (ROWS * (SPEC.dims + 1)) * programs + work.program
    for r in tl.static_range(ROWS):
        total = sums[SPEC.dims * r]
        for k in tl.static_range(SPEC.dims + 1):
            share = total
            if k == 0 or (k == 1 and SPEC.dims == 2):
                share = total * doubled(out[k], sizes.output[k]).to(SPEC.compute)
            if k > 0 and k < SPEC.dims:
                if SPEC.dims == 3:
                    share = sums[SPEC.dims * r + k]
                else:
                    share += sums[SPEC.dims * r + k] * (2.0 * SPEC.rows)
            if SPEC.antialias and k < SPEC.dims:
                share += sums[SPEC.dims * (ROWS + r) + k]
            found = tl.sum(tl.sum(share, 1), 0)
            if k < SPEC.dims:
                found = true_divide(found, steps_per_unit(sizes, k, SPEC).to(SPEC.compute), SPEC)
            if BY_PIXELS:
                found *= pixels_per_unit(sizes.input[r], SPEC)
            tl.store(base + programs * (r * (SPEC.dims + 1) + k), found)


# ------------------------------------------------------------------------------ thin-plate spline
@triton.jit
def tps_log(squared, SPEC: tl.constexpr):
    """The logarithm of a squared distance, finite at 0: r^2 log r^2 is 0 there.

    In float32 2^e m with m in [2/3, 4/3) and log m = f R(f), f = m - 1, to 4.3e-8: about as exact as
    ``tl.log``, which also sees to arguments that no distance is.
    """
    if SPEC.compute == tl.float32:
        bits = squared.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F2AAAAB) & -0x800000  # 2^23 e
        f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
        r = tl.fma(f, -0.15918611, 0.17194301)
        r = tl.fma(f, r, -0.16307451)
        r = tl.fma(f, r, 0.19784345)
        r = tl.fma(f, r, -0.25014341)
        r = tl.fma(f, r, 0.33338043)
        r = tl.fma(f, r, -0.49999832)
        r = tl.fma(f, r, 1.0)
        return tl.fma(f, r, exponent.to(tl.float32) * 8.2629584e-8)  # 2^-23 log 2
    else:
        return tl.log(larger(squared, 1e-30))


@triton.jit
def tps_coordinates(params, outputs, pixels, SPEC: tl.constexpr):
    """sum over k of w_k U(|p - c_k|^2) + A (x, y, 1), U(s) = s log s, for each output of the group.

    Coefficients (num_controls + 3, 2): w, then the columns of A. Control points (num_controls, 2),
    contiguous. The basis U is evaluated once for the group.
    """
    stride_n, stride_t, stride_row, stride_col, _ = params.strides
    stride_row = tl.cast(stride_row, tl.int64)  # as in load_matrix
    bases = ()
    sums = ()
    for g in tl.static_range(SPEC.group):
        base = params.pointer + outputs[g][0] * stride_n + outputs[g][1] * stride_t
        tail = base + params.num_controls * stride_row
        bases += (base,)
        sum_x = tl.load(tail).to(SPEC.compute) * pixels[0] + tl.load(tail + stride_row * 2).to(SPEC.compute)
        sum_y = tl.load(tail + stride_col).to(SPEC.compute) * pixels[0]
        sum_y += tl.load(tail + stride_row * 2 + stride_col).to(SPEC.compute)
        sum_x += tl.load(tail + stride_row).to(SPEC.compute) * pixels[1]
        sum_y += tl.load(tail + stride_row + stride_col).to(SPEC.compute) * pixels[1]
        sums += ((sum_x, sum_y),)
    for k in range(params.num_controls):
        x = pixels[0] - tl.load(params.control + 2 * k).to(SPEC.compute)
        y = pixels[1] - tl.load(params.control + 2 * k + 1).to(SPEC.compute)
        squared = x * x + y * y
        basis = squared * tps_log(squared, SPEC)
        new = ()
        for g in tl.static_range(SPEC.group):
            weight = bases[g] + stride_row * k
            sum_x = sums[g][0] + tl.load(weight).to(SPEC.compute) * basis
            sum_y = sums[g][1] + tl.load(weight + stride_col).to(SPEC.compute) * basis
            new += ((sum_x, sum_y),)
        sums = new
    return sums


@triton.jit
def tps_backward(partial, work, gradients, pixels, sizes, SPEC: tl.constexpr):
    """This program's shares of d w_k = sum of g U_k, of d A, and if asked for of d c_k.

    d c_k = sum over pixels of (g . w_k) U'(s) (-2) (p - c_k), with U'(s) = log s + 1. The buffer is (batch,
    2 * (num_controls + 3) [+ 2 * num_controls], programs).
    """
    params = work.params
    num_controls = params.num_controls
    stride_n, stride_t, stride_row, stride_col, _ = params.strides
    stride_row = tl.cast(stride_row, tl.int64)
    entries = 2 * (num_controls + 3)
    if SPEC.control_grad:
        entries += 2 * num_controls
    programs = tl.cast(work.programs, tl.int64)  # times the number of entries it may pass 2^31
    BLOCK: tl.constexpr = 16
    for k0 in range(0, num_controls, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        exists = k < num_controls
        x = pixels[0] - tl.load(params.control + 2 * k, exists, other=0.0).to(SPEC.compute)[None, :]
        y = pixels[1] - tl.load(params.control + 2 * k + 1, exists, other=0.0).to(SPEC.compute)[None, :]
        squared = x * x + y * y
        log = tps_log(squared, SPEC)
        basis = squared * log
        for g in tl.static_range(SPEC.group):
            base = partial + (work.b + g).to(tl.int64) * entries * programs + work.program
            kept = existing(exists, work.b + g, sizes.batch)
            tl.store(base + programs * (2 * k), tl.sum(gradients[g][0] * basis, 0), kept)
            tl.store(base + programs * (2 * k + 1), tl.sum(gradients[g][1] * basis, 0), kept)
            if SPEC.control_grad:
                weight = params.pointer + work.outputs[g][0] * stride_n + work.outputs[g][1] * stride_t
                weight += stride_row * k
                w_x = tl.load(weight, exists, other=0.0).to(SPEC.compute)[None, :]
                w_y = tl.load(weight + stride_col, exists, other=0.0).to(SPEC.compute)[None, :]
                slope = (gradients[g][0] * w_x + gradients[g][1] * w_y) * (log + 1.0) * -2.0
                # at the control point itself U' is infinite, and U' (p - c) has the limit 0
                slope = tl.where(squared > 0, slope, 0.0)
                by_controls = base + programs * (2 * (num_controls + 3))
                tl.store(by_controls + programs * (2 * k), tl.sum(slope * x, 0), kept)
                tl.store(by_controls + programs * (2 * k + 1), tl.sum(slope * y, 0), kept)
    for g in tl.static_range(SPEC.group):
        base = partial + (work.b + g).to(tl.int64) * entries * programs + work.program
        for column in tl.static_range(3):
            for component in tl.static_range(2):
                share = tl.sum(tl.sum(gradients[g][component] * pixels[column], 1), 0)
                target = base + programs * (2 * (num_controls + column) + component)
                tl.store(target, share, work.b + g < sizes.batch)


# ---------------------------------------------------------------------------------- dispatchers
@triton.jit
def coordinates_of(work, out, mask, sizes, SPEC: tl.constexpr):
    """The source's own coordinates of the pixels ``out``, (x, y[, z]) in the compute type, for each output.

    Normalised; of a flow, the displacement in pixels. NaN and infinities are possible.
    """
    params = work.params
    if SPEC.source == GRID or SPEC.source == FLOW:
        stride_n, component, stride_x, stride_y, stride_z = params.strides
        strides = Strides(stride_n, 0, component, (stride_x, stride_y, stride_z))
        begin = params.pointer + work.outputs[0][0] * stride_n
        return (dense_load(begin, strides, out, mask, SPEC),)
    else:
        pixels = normalised_pixels(out, sizes, SPEC)
        if SPEC.source == TPS:
            return tps_coordinates(params, work.outputs, pixels, SPEC)
        elif SPEC.source == AFFINE:  # whose map goes from pixels to pixels
            n, t = work.outputs[0]
            return (matrix_coordinates(load_matrix(params, n, t, SPEC), pixels, SPEC),)
        else:
            return (matrix_coordinates(work.map, pixels, SPEC),)


@triton.jit
def places_by(coordinates, identity, sizes, SPEC: tl.constexpr):
    """The places of a source's own coordinates of one output's pixels.

    identity: of a flow, where the output's identity grid lies.
    """
    size = sizes.input
    if SPEC.source == FLOW:
        return [displaced(identity[k], coordinates[k], size[k], k, SPEC) for k in SPEC.axes]
    else:
        return [place_of(unnormalise(coordinates[k], size[k], SPEC), size[k], k, SPEC) for k in SPEC.axes]


@triton.jit
def places_at(work, out, mask, sizes, SPEC: tl.constexpr):
    """Where any pixels ``out`` are read: a ``Place`` for each axis, for each output of the group."""
    if SPEC.source == AFFINE:
        return (affine_places(work.map, out, sizes, SPEC),)
    else:
        coordinates = coordinates_of(work, out, mask, sizes, SPEC)
        identity = ()
        if SPEC.source == FLOW:
            identity = identity_places(work.map, out, sizes, SPEC)
        return [places_by(own, identity, sizes, SPEC) for own in coordinates]


@triton.jit
def places_of(work, block, sizes, SPEC: tl.constexpr, INTERIOR: tl.constexpr = False):
    """``places_at`` of a program's ``Block``."""
    if SPEC.source == AFFINE:
        return (block_places(work.map, work.starts, block.step, block.out, sizes, SPEC, INTERIOR),)
    elif SPEC.source == FLOW and has_starts(SPEC):
        coordinates = coordinates_of(work, block.out, block.mask, sizes, SPEC)
        identity = stepped_places(work.starts, block.step, SPEC)
        return (places_by(coordinates[0], identity, sizes, SPEC),)
    else:
        return places_at(work, block.out, block.mask, sizes, SPEC)


@triton.jit
def add_gradient(partial, sums, work, gradients, block, sizes, SPEC: tl.constexpr):
    """From gradients by the source's coordinates, 0 where pixels do not exist, to this program's share of d
    params.

    Of an affine map they may be by pixel coordinates, which ``store_sums`` is told. Returns ``sums``, with a
    matrix's share added. The others' is stored here.
    """
    if SPEC.source == GRID or SPEC.source == FLOW:
        dense_store(partial, gradients[0], work, 0, block, sizes, SPEC, SPEC.source == GRID)
    elif SPEC.source == AFFINE:
        sums = add_to_sums(sums, gradients[0], block, sizes, SPEC)
    else:
        pixels = normalised_pixels(block.out, sizes, SPEC)
        if SPEC.source == TPS:
            tps_backward(partial, work, gradients, pixels, sizes, SPEC)
        else:
            by_rows = projective_backward(work.map, gradients[0], pixels, SPEC)
            sums = add_to_sums(sums, by_rows, block, sizes, SPEC)
    return sums
