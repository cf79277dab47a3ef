"""Coordinate sources: where in the input each output pixel is read.

A source is a few device functions and a few lines of host code, all in this file:

* ``*_coordinates``: the normalised coordinates in the input of a block of output pixels (of a flow, whose
  unit is the pixel, the pixel coordinates);
* ``*_backward``: what a program adds to the parameters' gradient, given the gradient by those
  coordinates; every value has one writer, so that nothing is summed in an unpredictable order. A matrix's
  is summed pixel by pixel over the tiles of a program, and stored at its end (``store_sums``);
* ``pack``, ``gradient_buffer`` and ``reduce_gradient`` on the host.

To add a source, add its code to ``modes.Source``, its functions here, and a branch to each of the
dispatchers ``coordinates`` and ``backward`` and to the host functions. No kernel changes.

A program works on a group of outputs (images or transforms of one) with the same output pixels, so that
what depends on the pixels alone is computed once. Tuples over axes are x first: (x, y) or (x, y, z). Tuples
over the group hold one such tuple for each of its outputs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .coordinates import COMPILED, constant, larger, unnormalise, unnormalise_grad
from .modes import Source
from .tiles import axes, divided, existing, rounded

GRID = constant(Source.GRID.value)
AFFINE = constant(Source.AFFINE.value)
PROJECTIVE = constant(Source.PROJECTIVE.value)
TPS = constant(Source.TPS.value)
FLOW = constant(Source.FLOW.value)


# -------------------------------------------------------------------------------- what sources share
@triton.jit
def true_divide(a, b, COMPUTE: tl.constexpr):
    """a / b rounded to nearest: float32 division is approximate by default."""
    if COMPUTE == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def whole_quotient(a, b, COMPUTE: tl.constexpr):
    """a / b rounded to nearest, for whole a and many a to one b: its reciprocal and two multiply-adds.

    Markstein's correction: the remainder of the first try is exact, and what it adds rounds as a / b does.
    """
    if COMPILED and COMPUTE == tl.float32:
        inverse = tl.div_rn(1.0, b)
        first = a * inverse
        return tl.fma(tl.fma(-first, b, a), inverse, first)
    else:
        return true_divide(a, b, COMPUTE)


@triton.jit
def normalised(o, size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """The normalised coordinate of output pixel ``o``; 0 on an axis of one pixel.

    A quotient of two whole numbers, rounded once: the error differs from pixel to pixel. Folding the
    denominator into theta would give all pixels the same error, which the sum of d theta does not even out.
    """
    doubled = (2 * o - (size - 1)).to(COMPUTE)
    return whole_quotient(doubled, tl.maximum(size - ALIGN_CORNERS, 1).to(COMPUTE), COMPUTE)


@triton.jit
def normalised_pixels(out, out_size, ALIGN_CORNERS: tl.constexpr, DIMS: tl.constexpr, COMPUTE: tl.constexpr):
    """(x, y, 1) or (x, y, z, 1) of the output pixels: what a matrix is multiplied by."""
    x = normalised(out[0], out_size[0], ALIGN_CORNERS, COMPUTE)
    y = normalised(out[1], out_size[1], ALIGN_CORNERS, COMPUTE)
    one = tl.full(x.shape, 1.0, COMPUTE)
    if DIMS == 3:
        return x, y, normalised(out[2], out_size[2], ALIGN_CORNERS, COMPUTE), one
    else:
        return x, y, one


@triton.jit
def matrix_row(pointer, stride_col, DIMS: tl.constexpr, COMPUTE: tl.constexpr):
    x = tl.load(pointer).to(COMPUTE)
    y = tl.load(pointer + stride_col).to(COMPUTE)
    last = tl.load(pointer + DIMS * stride_col).to(COMPUTE)
    if DIMS == 3:
        return x, y, tl.load(pointer + 2 * stride_col).to(COMPUTE), last
    else:
        return x, y, last


@triton.jit
def matrix_rows(source, n, t, ROWS: tl.constexpr, DIMS: tl.constexpr, COMPUTE: tl.constexpr):
    """ROWS rows of DIMS + 1 entries. Strides by image, transform, row and column; the fifth is unused."""
    pointer, stride_n, stride_t, stride_row, stride_col, _ = source
    pointer += n * stride_n + t * stride_t
    stride_row = tl.cast(stride_row, tl.int64)  # matrices may be far apart within, with images innermost
    stride_col = tl.cast(stride_col, tl.int64)
    rows = ()
    for r in tl.static_range(ROWS):
        rows += (matrix_row(pointer + r * stride_row, stride_col, DIMS, COMPUTE),)
    return rows


@triton.jit
def matrix_apply(row, pixels, DIMS: tl.constexpr):
    """The row times (x, y[, z], 1); the same bits wherever a product could be moved out of a loop.

    The last entry comes last: in a crop it is the largest by far, and added earlier its rounding would be
    shared by a row of outputs, whose sums it would not cancel in.
    """
    total = row[DIMS - 1] * pixels[DIMS - 1]
    for k in tl.static_range(1, DIMS):
        total = tl.fma(row[DIMS - 1 - k], pixels[DIMS - 1 - k], total)
    return total + row[DIMS]


@triton.jit
def matrix_backward(sums, gradients, pixels, ROWS: tl.constexpr, DIMS: tl.constexpr):
    """``sums`` of each pixel's share of d matrix[r, k] = sum over pixels of gradients_r pixels_k."""
    new = ()
    for r in tl.static_range(ROWS):
        for k in tl.static_range(DIMS + 1):
            new += (sums[r * (DIMS + 1) + k] + gradients[r] * pixels[k],)
    return new


# -------------------------------------------------------------------------------- dense grid and flow
@triton.jit
def dense_load(source, n, out, mask, DIMS: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr):
    """DIMS numbers for each output pixel. Strides by image, component, x, y and z."""
    pointer, stride_n, stride_component, stride_x, stride_y, stride_z = source
    base = pointer + n * stride_n
    stride_component = tl.cast(stride_component, INDEX)  # twice of it may pass 2^31
    offset = out[0].to(INDEX) * stride_x + out[1].to(INDEX) * stride_y
    if DIMS == 3:
        offset += out[2].to(INDEX) * stride_z
    x = tl.load(base + offset, mask, other=0.0).to(COMPUTE)
    y = tl.load(base + (offset + stride_component), mask, other=0.0).to(COMPUTE)
    if DIMS == 3:
        z = tl.load(base + (offset + 2 * stride_component), mask, other=0.0).to(COMPUTE)
        return x, y, z
    else:
        return x, y


@triton.jit
def dense_backward(
    gradient_ptr,
    gradients,
    out,
    mask,
    out_size,
    b,
    split,
    batch,
    INNERMOST: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Stores the gradient of each entry: (splits, batch, [D,] H, W, DIMS), or components before pixels."""
    pixel = out[1].to(INDEX) * out_size[0] + out[0]
    pixels = out_size[0].to(tl.int64) * out_size[1]
    if DIMS == 3:
        pixel += out[2].to(INDEX) * out_size[1] * out_size[0]
        pixels *= out_size[2]
    base = gradient_ptr + (split.to(tl.int64) * batch + b) * pixels * DIMS
    for k in tl.static_range(DIMS):
        if INNERMOST:
            target = base + (pixel * DIMS + k)
        else:
            target = base + k * pixels + pixel
        tl.store(target, rounded(gradients[k], gradient_ptr), mask)


@triton.jit
def flow_coordinates(
    source,
    n,
    out,
    out_size,
    in_size,
    mask,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Pixel coordinates: the output's identity grid in the input, plus the displacement."""
    flow = dense_load(source, n, out, mask, DIMS, INDEX, COMPUTE)
    identity = normalised_pixels(out, out_size, ALIGN_CORNERS, DIMS, COMPUTE)
    x = unnormalise(identity[0], in_size[0], ALIGN_CORNERS, COMPUTE) + flow[0]
    y = unnormalise(identity[1], in_size[1], ALIGN_CORNERS, COMPUTE) + flow[1]
    if DIMS == 3:
        return x, y, unnormalise(identity[2], in_size[2], ALIGN_CORNERS, COMPUTE) + flow[2]
    else:
        return x, y


# -------------------------------------------------------------------------------------- affine
@triton.jit
def affine_map(rows, pixels, DIMS: tl.constexpr):
    """theta (x, y[, z], 1)."""
    x = matrix_apply(rows[0], pixels, DIMS)
    y = matrix_apply(rows[1], pixels, DIMS)
    if DIMS == 3:
        return x, y, matrix_apply(rows[2], pixels, DIMS)
    else:
        return x, y


# ---------------------------------------------------------------------------------- projective
@triton.jit
def projective_inverse(row, pixels, COMPUTE: tl.constexpr):
    """1 / w for w = row (x, y, 1), and 0 on the horizon, with a flag.

    The horizon is where w cannot be told from 0: its terms cancel to within their rounding. The bound is
    relative, so that it does not depend on the scale of the homography, which means nothing.
    """
    w = matrix_apply(row, pixels, 2)
    size = tl.abs(row[0] * pixels[0]) + tl.abs(row[1] * pixels[1]) + tl.abs(row[2])
    ROUNDING: tl.constexpr = 2.0**-50 if COMPUTE == tl.float64 else 2.0**-21
    TINY: tl.constexpr = 1e-300 if COMPUTE == tl.float64 else 1e-37  # below, 1 / w overflows
    seen = (tl.abs(w) > ROUNDING * size) & (tl.abs(w) > TINY)
    one = tl.full(w.shape, 1.0, COMPUTE)
    return tl.where(seen, true_divide(one, tl.where(seen, w, 1.0), COMPUTE), 0.0), seen


@triton.jit
def projective_map(rows, pixels, COMPUTE: tl.constexpr):
    """(h_0 p, h_1 p) / h_2 p with p = (x, y, 1); NaN on the horizon."""
    inverse, seen = projective_inverse(rows[2], pixels, COMPUTE)
    x = tl.where(seen, matrix_apply(rows[0], pixels, 2) * inverse, float("nan"))
    y = tl.where(seen, matrix_apply(rows[1], pixels, 2) * inverse, float("nan"))
    return x, y


@triton.jit
def projective_backward(rows, gradients, pixels, COMPUTE: tl.constexpr):
    """The gradients by the numerators and by the denominator; 0 where nothing finite is seen."""
    inverse, seen = projective_inverse(rows[2], pixels, COMPUTE)
    x = matrix_apply(rows[0], pixels, 2) * inverse
    y = matrix_apply(rows[1], pixels, 2) * inverse
    placed = seen & (tl.abs(x) < float("inf")) & (tl.abs(y) < float("inf"))
    by_x = tl.where(placed, gradients[0] * inverse, 0.0)
    by_y = tl.where(placed, gradients[1] * inverse, 0.0)
    return by_x, by_y, -(by_x * tl.where(placed, x, 0.0) + by_y * tl.where(placed, y, 0.0))


# -------------------------------------------------------------------------- affine or projective
@triton.jit
def matrix_of(source, n, t, SOURCE: tl.constexpr, DIMS: tl.constexpr, COMPUTE: tl.constexpr):
    """The matrix of transform t of image n, by rows."""
    if SOURCE == PROJECTIVE:
        return matrix_rows(source, n, t, 3, 2, COMPUTE)
    else:
        tl.static_assert(SOURCE == AFFINE)
        return matrix_rows(source, n, t, DIMS, DIMS, COMPUTE)


@triton.jit
def matrix_map(rows, pixels, SOURCE: tl.constexpr, DIMS: tl.constexpr, COMPUTE: tl.constexpr):
    """The coordinates that a matrix sends ``normalised_pixels`` to."""
    if SOURCE == PROJECTIVE:
        return projective_map(rows, pixels, COMPUTE)
    else:
        return affine_map(rows, pixels, DIMS)


# ------------------------------------------------------------------------------ thin-plate spline
@triton.jit
def tps_log(squared, COMPUTE: tl.constexpr):
    """The logarithm of a squared distance, finite at 0: r^2 log r^2 is 0 there.

    In float32 2^e m with m in [2/3, 4/3) and log m = f R(f), f = m - 1, to 4.3e-8: about as exact as
    ``tl.log``, which also sees to arguments that no distance is.
    """
    if COMPUTE == tl.float32:
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
def tps_coordinates(
    source,
    control_ptr,
    controls,
    outputs,
    pixels,
    GROUP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """sum over k of w_k U(|p - c_k|^2) + A (x, y, 1), U(s) = s log s, for each output of the group.

    source: coefficients (controls + 3, 2): w, then the columns of A. Strides by image, transform, row and
    column. control_ptr: (controls, 2), contiguous. The basis U is evaluated once for the group.
    """
    pointer, stride_n, stride_t, stride_row, stride_col, _ = source
    stride_row = tl.cast(stride_row, tl.int64)  # as in matrix_rows
    bases = ()
    sums = ()
    for g in tl.static_range(GROUP):
        base = pointer + outputs[g][0] * stride_n + outputs[g][1] * stride_t
        tail = base + controls * stride_row
        bases += (base,)
        sum_x = tl.load(tail).to(COMPUTE) * pixels[0] + tl.load(tail + 2 * stride_row).to(COMPUTE)
        sum_y = tl.load(tail + stride_col).to(COMPUTE) * pixels[0]
        sum_y += tl.load(tail + 2 * stride_row + stride_col).to(COMPUTE)
        sum_x += tl.load(tail + stride_row).to(COMPUTE) * pixels[1]
        sum_y += tl.load(tail + stride_row + stride_col).to(COMPUTE) * pixels[1]
        sums += ((sum_x, sum_y),)
    for k in range(controls):
        x = pixels[0] - tl.load(control_ptr + 2 * k).to(COMPUTE)
        y = pixels[1] - tl.load(control_ptr + 2 * k + 1).to(COMPUTE)
        squared = x * x + y * y
        basis = squared * tps_log(squared, COMPUTE)
        new = ()
        for g in tl.static_range(GROUP):
            weight = bases[g] + k * stride_row
            sum_x = sums[g][0] + tl.load(weight).to(COMPUTE) * basis
            sum_y = sums[g][1] + tl.load(weight + stride_col).to(COMPUTE) * basis
            new += ((sum_x, sum_y),)
        sums = new
    return sums


@triton.jit
def tps_backward(
    gradient_ptr,
    source,
    control_ptr,
    controls,
    outputs,
    gradients,
    pixels,
    b,
    batch,
    program,
    programs,
    GROUP: tl.constexpr,
    CONTROL_GRAD: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """This program's shares of d w_k = sum of g U_k, of d A, and if asked for of d c_k.

    d c_k = sum over pixels of (g . w_k) U'(s) (-2) (p - c_k), with U'(s) = log s + 1. The buffer is (batch,
    2 * (controls + 3) [+ 2 * controls], programs).
    """
    pointer, stride_n, stride_t, stride_row, stride_col, _ = source
    stride_row = tl.cast(stride_row, tl.int64)
    entries = 2 * (controls + 3)
    if CONTROL_GRAD:
        entries += 2 * controls
    programs = tl.cast(programs, tl.int64)  # times the number of entries it may pass 2^31
    BLOCK: tl.constexpr = 16
    for k0 in range(0, controls, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        exists = k < controls
        x = pixels[0] - tl.load(control_ptr + 2 * k, exists, other=0.0).to(COMPUTE)[None, :]
        y = pixels[1] - tl.load(control_ptr + 2 * k + 1, exists, other=0.0).to(COMPUTE)[None, :]
        squared = x * x + y * y
        log = tps_log(squared, COMPUTE)
        basis = squared * log
        for g in tl.static_range(GROUP):
            base = gradient_ptr + (b + g).to(tl.int64) * entries * programs + program
            kept = existing(exists, b + g, batch)
            tl.store(base + (2 * k) * programs, tl.sum(gradients[g][0] * basis, 0), kept)
            tl.store(base + (2 * k + 1) * programs, tl.sum(gradients[g][1] * basis, 0), kept)
            if CONTROL_GRAD:
                weight = pointer + outputs[g][0] * stride_n + outputs[g][1] * stride_t + k * stride_row
                w_x = tl.load(weight, exists, other=0.0).to(COMPUTE)[None, :]
                w_y = tl.load(weight + stride_col, exists, other=0.0).to(COMPUTE)[None, :]
                slope = (gradients[g][0] * w_x + gradients[g][1] * w_y) * (log + 1.0) * -2.0
                # at the control point itself U' is infinite, and U' (p - c) has the limit 0
                slope = tl.where(squared > 0, slope, 0.0)
                moved = base + 2 * (controls + 3) * programs
                tl.store(moved + (2 * k) * programs, tl.sum(slope * x, 0), kept)
                tl.store(moved + (2 * k + 1) * programs, tl.sum(slope * y, 0), kept)
    for g in tl.static_range(GROUP):
        base = gradient_ptr + (b + g).to(tl.int64) * entries * programs + program
        for column in tl.static_range(3):
            for component in tl.static_range(2):
                share = tl.sum(tl.sum(gradients[g][component] * pixels[column], 1), 0)
                target = base + (2 * (controls + column) + component) * programs
                tl.store(target, share, b + g < batch)


# ---------------------------------------------------------------------------------- dispatchers
@triton.jit
def outputs_of(b, batch, transforms, GROUP: tl.constexpr):
    """(image, transform), int64, of the outputs b, b + 1, ...; past the last one, the last one again."""
    outputs = ()
    for g in tl.static_range(GROUP):
        n = tl.minimum(b + g, batch - 1)
        t = n * 0
        if transforms > 1:
            n, t = divided(n, transforms)
        outputs += ((n.to(tl.int64), t.to(tl.int64)),)
    return outputs


@triton.jit
def matrix_for(source, outputs, SOURCE: tl.constexpr, DIMS: tl.constexpr, COMPUTE: tl.constexpr):
    """What ``coordinates`` reads of the parameters for all pixels at once: the matrix, if they are one."""
    if SOURCE == AFFINE or SOURCE == PROJECTIVE:
        return matrix_of(source, outputs[0][0], outputs[0][1], SOURCE, DIMS, COMPUTE)
    else:
        return ()


@triton.jit
def coordinates(
    source,
    matrix,
    control_ptr,
    controls,
    outputs,
    out,
    out_size,
    mask,
    SOURCE: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Normalised (x, y[, z]) of the pixels ``out``, for each output; NaN and infinities are possible."""
    if SOURCE == GRID:
        p = (dense_load(source, outputs[0][0], out, mask, DIMS, INDEX, COMPUTE),)
    else:
        pixels = normalised_pixels(out, out_size, ALIGN_CORNERS, DIMS, COMPUTE)
        if SOURCE == TPS:
            p = tps_coordinates(source, control_ptr, controls, outputs, pixels, GROUP, COMPUTE)
        else:
            p = (matrix_map(matrix, pixels, SOURCE, DIMS, COMPUTE),)
    return p


@triton.jit
def input_pixels(
    source,
    matrix,
    control_ptr,
    controls,
    outputs,
    out,
    out_size,
    in_size,
    mask,
    SOURCE: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """``coordinates`` in pixels of the input."""
    if SOURCE == FLOW:
        n = outputs[0][0]
        p = (flow_coordinates(source, n, out, out_size, in_size, mask, ALIGN_CORNERS, DIMS, INDEX, COMPUTE),)
        return p
    else:
        normalised_p = coordinates(
            source,
            matrix,
            control_ptr,
            controls,
            outputs,
            out,
            out_size,
            mask,
            SOURCE,
            GROUP,
            ALIGN_CORNERS,
            DIMS,
            INDEX,
            COMPUTE,
        )
        p = ()
        for g in tl.static_range(GROUP):
            pixel = ()
            for axis in tl.static_range(DIMS):
                pixel += (unnormalise(normalised_p[g][axis], in_size[axis], ALIGN_CORNERS, COMPUTE),)
            p += (pixel,)
        return p


@triton.jit
def in_pixels(
    values,
    in_size,
    SOURCE: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Changes of a source's coordinates as changes of pixel coordinates; or, as this scaling is its own
    transpose, gradients by pixel coordinates as gradients by the source's. A flow's unit is the pixel.
    """
    if SOURCE == FLOW:
        return values
    else:
        scaled = ()
        for axis in tl.static_range(DIMS):
            scaled += (values[axis] * unnormalise_grad(in_size[axis], ALIGN_CORNERS, COMPUTE),)
        return scaled


@triton.jit
def zero_sums(SOURCE: tl.constexpr, DIMS: tl.constexpr, PIXELS: tl.constexpr, COMPUTE: tl.constexpr):
    """What ``backward`` adds a matrix's gradient to, for each pixel of a tile; of other sources, nothing."""
    sums = ()
    if SOURCE == AFFINE or SOURCE == PROJECTIVE:
        ROWS: tl.constexpr = 3 if SOURCE == PROJECTIVE else DIMS
        for _ in tl.static_range(ROWS * (DIMS + 1)):
            sums += (tl.zeros([PIXELS, 1], COMPUTE),)
    return sums


@triton.jit
def store_sums(gradient_ptr, sums, b, program, programs, SOURCE: tl.constexpr, DIMS: tl.constexpr):
    """This program's part of the buffer (batch, entries of the matrix, programs)."""
    if SOURCE == AFFINE or SOURCE == PROJECTIVE:
        ENTRIES: tl.constexpr = (3 if SOURCE == PROJECTIVE else DIMS) * (DIMS + 1)
        programs = tl.cast(programs, tl.int64)
        base = gradient_ptr + b.to(tl.int64) * ENTRIES * programs + program
        for k in tl.static_range(ENTRIES):
            tl.store(base + k * programs, tl.sum(tl.sum(sums[k], 1), 0))


@triton.jit
def backward(
    gradient_ptr,
    sums,
    source,
    matrix,
    control_ptr,
    controls,
    outputs,
    gradients,
    out,
    out_size,
    mask,
    b,
    batch,
    split,
    program,
    programs,
    SOURCE: tl.constexpr,
    GROUP: tl.constexpr,
    CONTROL_GRAD: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """From ``gradients`` by the coordinates, 0 outside ``mask``, to this program's part of the buffer.

    Returns ``sums``, with a matrix's share added, for ``store_sums``. The others' is stored here.
    """
    if SOURCE == GRID:
        dense_backward(gradient_ptr, gradients[0], out, mask, out_size, b, split, batch, True, DIMS, INDEX)
    elif SOURCE == FLOW:
        dense_backward(gradient_ptr, gradients[0], out, mask, out_size, b, split, batch, False, DIMS, INDEX)
    else:
        pixels = normalised_pixels(out, out_size, ALIGN_CORNERS, DIMS, COMPUTE)
        if SOURCE == TPS:
            tps_backward(
                gradient_ptr,
                source,
                control_ptr,
                controls,
                outputs,
                gradients,
                pixels,
                b,
                batch,
                program,
                programs,
                GROUP,
                CONTROL_GRAD,
                COMPUTE,
            )
        elif SOURCE == PROJECTIVE:
            homogeneous = projective_backward(matrix, gradients[0], pixels, COMPUTE)
            sums = matrix_backward(sums, homogeneous, pixels, 3, 2)
        else:
            sums = matrix_backward(sums, gradients[0], pixels, DIMS, DIMS)
    return sums


@triton.jit
def input_pixels_backward(
    gradient_ptr,
    sums,
    source,
    matrix,
    control_ptr,
    controls,
    outputs,
    gradients,
    out,
    out_size,
    in_size,
    mask,
    b,
    batch,
    split,
    program,
    programs,
    SOURCE: tl.constexpr,
    GROUP: tl.constexpr,
    CONTROL_GRAD: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """``backward`` from gradients by pixel coordinates."""
    scaled = ()
    for g in tl.static_range(GROUP):
        scaled += (in_pixels(gradients[g], in_size, SOURCE, ALIGN_CORNERS, DIMS, COMPUTE),)
    return backward(
        gradient_ptr,
        sums,
        source,
        matrix,
        control_ptr,
        controls,
        outputs,
        scaled,
        out,
        out_size,
        mask,
        b,
        batch,
        split,
        program,
        programs,
        SOURCE,
        GROUP,
        CONTROL_GRAD,
        ALIGN_CORNERS,
        DIMS,
        INDEX,
        COMPUTE,
    )


# ----------------------------------------------------------------------------------------- host
DENSE = (Source.GRID, Source.FLOW)


def pack(source: int, params: torch.Tensor, control_points: torch.Tensor | None) -> tuple:
    """A source's pointer and its five strides, the control points and their number (see ``pointers``).

    A parameter batch of 1 is broadcast.
    """
    strides = params.stride()
    stride_n = 0 if params.shape[0] == 1 else strides[0]
    if source == Source.GRID:
        packed = (params, stride_n, strides[-1], *axes(strides[1:-1]))
    elif source == Source.FLOW:
        packed = (params, stride_n, strides[1], *axes(strides[2:]))
    else:
        stride_t = strides[1] if params.dim() == 4 else 0
        packed = (params, stride_n, stride_t, strides[-2], strides[-1], 0)
    return (
        *packed,
        pointers(params, control_points)[1],
        0 if control_points is None else control_points.shape[0],
    )


def pointers(params: torch.Tensor, control_points: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensors that ``pack`` packs: without control points there is another to point to."""
    return params, params if control_points is None else control_points.contiguous()


class Sums(NamedTuple):
    """What, besides the parameters, says what ``backward`` writes.

    ``controls``: control points for which a gradient is wanted.
    """

    batch: int
    splits: int
    programs: int
    compute: torch.dtype
    controls: int


def gradient_buffer(
    source: int,
    params: torch.Tensor,
    batch: int,
    splits: int,
    programs: int,
    compute: torch.dtype,
    controls: int,
) -> torch.Tensor:
    """What ``backward`` writes: the gradient itself where one program sees all of it, else partial sums."""
    if source in DENSE:
        final = splits == 1 and params.shape[0] == batch
        shape = (splits, batch, *params.shape[1:])
        return params.new_empty(shape, dtype=params.dtype if final else compute)
    rows, columns = params.shape[-2:]
    # a spline's have two columns too
    return params.new_empty((batch, rows + controls, columns, programs), dtype=compute)


def reduce_gradient(
    source: int, params: torch.Tensor, buffer: torch.Tensor, control_points: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """d params, and d control points if these are given, from the filled buffer, in a fixed order of sums."""
    if source in DENSE:
        if buffer.dtype == params.dtype and buffer.shape[0] == 1 and buffer.shape[1:] == params.shape:
            return buffer[0], None
        return buffer.sum((0, 1) if params.shape[0] == 1 else 0).to(params.dtype).view(params.shape), None
    gradient = buffer[..., 0] if buffer.shape[-1] == 1 else buffer.sum(-1)
    by_controls = None
    if control_points is not None:
        rows = params.shape[-2]
        by_controls = gradient[:, rows:].sum(0).to(control_points.dtype)
        gradient = gradient[:, :rows]
    if params.shape[0] == 1 < gradient.shape[0]:
        gradient = gradient.unflatten(0, (-1, params.shape[1] if params.dim() == 4 else 1)).sum(0)
    if gradient.dtype != params.dtype:
        gradient = gradient.to(params.dtype)
    return gradient if gradient.shape == params.shape else gradient.reshape(params.shape), by_controls
