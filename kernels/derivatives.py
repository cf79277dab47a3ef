"""Forward mode and second derivatives of the sampler: along a direction, never as matrices.

Of an output pixel with weights w_k(p), as in ``sample.py``, the direction is (tangent, moved): the image's
tangent I', and the tangent of the source's coordinates, in pixels m = (m_x, m_y[, m_z]). The coordinates are
still found in registers; the way they depend on the parameters is the caller's.

    jvp[n, t, c, o]            = sum over k of  w_k I'[n, c, index_k] + w_k[m] I[n, c, index_k]

with w_k[m] = sum over axes a of (d w_k / d p_a) m_a. And of L = <g, sample>, the change of both gradients:

    d input[n, c, index_k]    += w_k[m] g[n, t, c, o]
    d p_a                      = sum over c and k of  g (d w_k / d p_a I' + d w_k[m] / d p_a I)
"""

import torch
import triton
import triton.language as tl

from . import sources
from .interpolation import axis_tap_count, axis_taps_curvature, has_curvature
from .launch import Plan, compute_dtypes, planned, vector_width
from .sample import (
    CHANNEL_STRIDES,
    UNSPECIALIZED,
    _plan,
    channel_block,
    interpolate,
    interpolate_grad,
    slopes_of_axes,
    tap_offset,
    taps_of_axes,
)
from .tiles import axes, existing, output_pixels, pixel_offset, rounded, strides

DIRECTION_UNSPECIALIZED = (
    *UNSPECIALIZED,
    "moved_ptr",
    "by_coordinates_ptr",
    *(f"stride_moved_{axis}" for axis in "ntkxyz"),
    *(f"stride_tangent_{axis}" for axis in "nxyz"),
)
DIRECTION_CHANNEL_STRIDES = (*CHANNEL_STRIDES, "stride_tangent_c")


@triton.jit
def curvatures_of_axes(
    p,
    in_size,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """``axis_taps_curvature`` of x, y and z; in 2-D nothing depends on z."""
    x = axis_taps_curvature(p[0], in_size[0], INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE)
    y = axis_taps_curvature(p[1], in_size[1], INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE)
    if DIMS == 3:
        return x, y, axis_taps_curvature(p[2], in_size[2], INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE)
    else:
        return x, y, (0.0,)


@triton.jit
def moved_pixels(
    moved,
    n,
    t,
    out,
    in_size,
    mask,
    SOURCE: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """How far the coordinates of an output move, in pixels of the input; 0 outside ``mask``.

    moved: DIMS numbers for each output pixel. Strides by image, transform, component, x, y and z.
    """
    pointer, stride_n, stride_t, stride_k, stride_x, stride_y, stride_z = moved
    dense = (pointer + t * stride_t, stride_n, stride_k, stride_x, stride_y, stride_z)
    values = sources.dense_load(dense, n, out, mask, DIMS, INDEX, COMPUTE)
    return sources.in_pixels(values, in_size, SOURCE, ALIGN_CORNERS, DIMS, COMPUTE)


@triton.jit
def moved_weights(slopes, m, INTERPOLATION: tl.constexpr):
    """What moving a coordinate by ``m`` does to the weights of its axis."""
    weights = ()
    for k in tl.static_range(axis_tap_count(INTERPOLATION)):
        weights += (slopes[k] * m,)
    return weights


@triton.jit
def moved_weights_of_axes(slopes_x, slopes_y, slopes_z, m, INTERPOLATION: tl.constexpr, DIMS: tl.constexpr):
    """``moved_weights`` of x, y and z; in 2-D nothing moves along z."""
    x = moved_weights(slopes_x, m[0], INTERPOLATION)
    y = moved_weights(slopes_y, m[1], INTERPOLATION)
    if DIMS == 3:
        return x, y, moved_weights(slopes_z, m[2], INTERPOLATION)
    else:
        return x, y, (0.0,)


@triton.jit
def interpolate_moved(
    plane,
    x,
    y,
    z,
    moved_x,
    moved_y,
    moved_z,
    strides,
    exists,
    INTERPOLATION: tl.constexpr,
    VECTOR: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The derivative of ``interpolate`` along a direction, [pixels, channels], from the ``moved_weights``."""
    TAPS: tl.constexpr = axis_tap_count(INTERPOLATION)
    TAPS_Z: tl.constexpr = TAPS if DIMS == 3 else 1
    zero = tl.zeros([x[0][0].shape[0], plane.shape[1]], COMPUTE)
    moved = zero
    for kz in tl.static_range(TAPS_Z):
        plane_moved = zero
        plane_value = zero
        for ky in tl.static_range(TAPS):
            row_moved = zero
            row_value = zero
            for kx in tl.static_range(TAPS):
                offset = tap_offset(x[0][kx], y[0][ky], z[0][kz], strides, VECTOR, DIMS, INDEX)
                inside = x[1][kx] & y[1][ky] & z[1][kz] & exists
                pixel = tl.load(plane + offset, inside, other=0.0).to(COMPUTE)
                row_moved += moved_x[kx] * pixel
                row_value += x[2][kx] * pixel
            plane_moved += y[2][ky] * row_moved
            plane_moved += moved_y[ky] * row_value
            plane_value += y[2][ky] * row_value
        moved += z[2][kz] * plane_moved
        if DIMS == 3:
            moved += moved_z[kz] * plane_value
    return moved


@triton.jit
def interpolate_grad_moved(
    plane,
    x,
    y,
    z,
    slopes_x,
    slopes_y,
    slopes_z,
    curvatures_x,
    curvatures_y,
    curvatures_z,
    m,
    strides,
    exists,
    INTERPOLATION: tl.constexpr,
    VECTOR: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The derivatives of ``interpolate_grad``'s results along ``m``: the Hessian by x, y, z times ``m``."""
    TAPS: tl.constexpr = axis_tap_count(INTERPOLATION)
    TAPS_Z: tl.constexpr = TAPS if DIMS == 3 else 1
    CURVED: tl.constexpr = has_curvature(INTERPOLATION)
    zero = tl.zeros([x[0][0].shape[0], plane.shape[1]], COMPUTE)
    by_x = zero
    by_y = zero
    by_z = zero
    for kz in tl.static_range(TAPS_Z):
        plane_value = zero
        plane_by_x = zero
        plane_by_y = zero
        plane_by_xx = zero
        plane_by_xy = zero
        plane_by_yy = zero
        for ky in tl.static_range(TAPS):
            row_value = zero
            row_by_x = zero
            row_by_xx = zero
            for kx in tl.static_range(TAPS):
                offset = tap_offset(x[0][kx], y[0][ky], z[0][kz], strides, VECTOR, DIMS, INDEX)
                inside = x[1][kx] & y[1][ky] & z[1][kz] & exists
                pixel = tl.load(plane + offset, inside, other=0.0).to(COMPUTE)
                row_value += x[2][kx] * pixel
                row_by_x += slopes_x[kx] * pixel
                if CURVED:
                    row_by_xx += curvatures_x[kx] * pixel
            plane_by_xy += slopes_y[ky] * row_by_x
            if CURVED:
                plane_by_xx += y[2][ky] * row_by_xx
                plane_by_yy += curvatures_y[ky] * row_value
            if DIMS == 3:
                plane_value += y[2][ky] * row_value
                plane_by_x += y[2][ky] * row_by_x
                plane_by_y += slopes_y[ky] * row_value
        moved_by_x = m[1] * plane_by_xy
        moved_by_y = m[0] * plane_by_xy
        if CURVED:
            moved_by_x += m[0] * plane_by_xx
            moved_by_y += m[1] * plane_by_yy
        by_x += z[2][kz] * moved_by_x
        by_y += z[2][kz] * moved_by_y
        if DIMS == 3:
            turn = slopes_z[kz] * m[2]
            by_x += turn * plane_by_x
            by_y += turn * plane_by_y
            by_z += slopes_z[kz] * (m[0] * plane_by_x + m[1] * plane_by_y)
            if CURVED:
                by_z += (curvatures_z[kz] * m[2]) * plane_value
    return by_x, by_y, by_z


@triton.jit
def scatter_moved(
    plane,
    g,
    x,
    y,
    z,
    moved_x,
    moved_y,
    moved_z,
    strides,
    exists,
    INTERPOLATION: tl.constexpr,
    VECTOR: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The transpose of ``interpolate_moved``, as ``scatter`` is ``interpolate``'s."""
    TAPS: tl.constexpr = axis_tap_count(INTERPOLATION)
    TAPS_Z: tl.constexpr = TAPS if DIMS == 3 else 1
    for kz in tl.static_range(TAPS_Z):
        for ky in tl.static_range(TAPS):
            weight_yz = y[2][ky] * z[2][kz]
            moved_yz = moved_y[ky] * z[2][kz]
            if DIMS == 3:
                moved_yz += y[2][ky] * moved_z[kz]
            for kx in tl.static_range(TAPS):
                offset = tap_offset(x[0][kx], y[0][ky], z[0][kz], strides, VECTOR, DIMS, INDEX)
                inside = x[1][kx] & y[1][ky] & z[1][kz] & exists
                weight = moved_x[kx] * weight_yz + x[2][kx] * moved_yz
                tl.atomic_add(plane + offset, weight * g, inside, sem="relaxed")


@triton.jit(
    do_not_specialize=DIRECTION_UNSPECIALIZED, do_not_specialize_on_alignment=DIRECTION_CHANNEL_STRIDES
)
def sample_jvp_kernel(
    input_ptr,
    tangent_ptr,
    moved_ptr,
    output_ptr,
    source_ptr,
    source_stride_0,
    source_stride_1,
    source_stride_2,
    source_stride_3,
    source_stride_4,
    control_ptr,
    controls,
    stride_in_n,
    stride_in_c,
    stride_in_x,
    stride_in_y,
    stride_in_z,
    stride_tangent_n,
    stride_tangent_c,
    stride_tangent_x,
    stride_tangent_y,
    stride_tangent_z,
    stride_moved_n,
    stride_moved_t,
    stride_moved_k,
    stride_moved_x,
    stride_moved_y,
    stride_moved_z,
    stride_out_n,
    stride_out_t,
    stride_out_c,
    stride_out_x,
    stride_out_y,
    stride_out_z,
    in_width,
    in_height,
    in_depth,
    out_width,
    out_height,
    out_depth,
    batch,
    transforms,
    channels,
    column_tiles,
    row_tiles,
    splits,
    split_blocks,
    SOURCE: tl.constexpr,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    GROUP: tl.constexpr,
    TANGENT: tl.constexpr,
    MOVED: tl.constexpr,
    VECTOR_IN: tl.constexpr,
    VECTOR_TANGENT: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """output = sample(tangent, source) + the derivative of sample(input, source) along moved.

    input_ptr: read with stride_in_*, only for MOVED.
    tangent_ptr: the tangent of the input, read with stride_tangent_*, only for TANGENT.
    moved_ptr: that of the source's coordinates, read with stride_moved_* by image, transform, component, x, y
        and z, only for MOVED. The rest as in ``sample_forward_kernel``.
    """
    pid = tl.program_id(0)
    tiles = column_tiles * row_tiles
    split = (pid // tiles) % splits
    b = pid // (tiles * splits) * GROUP
    source = (source_ptr, source_stride_0, source_stride_1, source_stride_2, source_stride_3, source_stride_4)
    in_size = (in_width, in_height, in_depth)
    out_size = (out_width, out_height, out_depth)
    stride_in = (stride_in_x, stride_in_y, stride_in_z)
    stride_tangent = (stride_tangent_x, stride_tangent_y, stride_tangent_z)
    stride_out = (stride_out_x, stride_out_y, stride_out_z)
    outputs = sources.outputs_of(b, batch, transforms, GROUP)
    out, mask = output_pixels(pid % tiles, column_tiles, out_size, DIMS, BLOCK_ROWS, BLOCK_COLUMNS, INDEX)
    matrix = sources.matrix_for(source, outputs, SOURCE, DIMS, COMPUTE)
    p = sources.input_pixels(
        source,
        matrix,
        control_ptr,
        controls,
        outputs,
        out,
        out_size,
        in_size,
        mask,
        SOURCE,
        GROUP,
        ALIGN_CORNERS,
        DIMS,
        INDEX,
        COMPUTE,
    )
    moved = (
        moved_ptr,
        stride_moved_n,
        stride_moved_t,
        stride_moved_k,
        stride_moved_x,
        stride_moved_y,
        stride_moved_z,
    )
    target_offset = tl.multiple_of(pixel_offset(out, stride_out, DIMS, INDEX), (VECTOR_OUT, VECTOR_OUT))
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(channels, BLOCK_CHANNELS * UNROLL))
    for g in tl.static_range(GROUP):
        n, t = outputs[g]
        x, y, z = taps_of_axes(p[g], in_size, INTERPOLATION, PADDING, ALIGN_CORNERS, DIMS, COMPUTE)
        if MOVED:
            slopes_x, slopes_y, slopes_z = slopes_of_axes(
                p[g], in_size, INTERPOLATION, PADDING, ALIGN_CORNERS, DIMS, COMPUTE
            )
            m = moved_pixels(moved, n, t, out, in_size, mask, SOURCE, ALIGN_CORNERS, DIMS, INDEX, COMPUTE)
            moved_x, moved_y, moved_z = moved_weights_of_axes(
                slopes_x, slopes_y, slopes_z, m, INTERPOLATION, DIMS
            )
        image = input_ptr + tl.multiple_of(n * stride_in_n, VECTOR_IN)
        tangent = tangent_ptr + tl.multiple_of(n * stride_tangent_n, VECTOR_TANGENT)
        target = output_ptr + tl.multiple_of(n * stride_out_n + t * stride_out_t, VECTOR_OUT) + target_offset
        kept = existing(mask, b + g, batch)
        for block in range(first, last):
            # all loads before the first store, as in the forward kernel
            values = ()
            for step in tl.static_range(UNROLL):
                c, exists = channel_block(
                    block * UNROLL + step, channels, BLOCK_CHANNELS, EVEN_CHANNELS, INDEX
                )
                value = tl.zeros([BLOCK_ROWS * BLOCK_COLUMNS, BLOCK_CHANNELS], COMPUTE)
                if TANGENT:
                    value += interpolate(
                        tangent + c * stride_tangent_c,
                        x,
                        y,
                        z,
                        stride_tangent,
                        exists,
                        INTERPOLATION,
                        VECTOR_TANGENT,
                        DIMS,
                        INDEX,
                        COMPUTE,
                    )
                if MOVED:
                    value += interpolate_moved(
                        image + c * stride_in_c,
                        x,
                        y,
                        z,
                        moved_x,
                        moved_y,
                        moved_z,
                        stride_in,
                        exists,
                        INTERPOLATION,
                        VECTOR_IN,
                        DIMS,
                        INDEX,
                        COMPUTE,
                    )
                values += (value,)
            for step in tl.static_range(UNROLL):
                c, exists = channel_block(
                    block * UNROLL + step, channels, BLOCK_CHANNELS, EVEN_CHANNELS, INDEX
                )
                tl.store(target + c * stride_out_c, rounded(values[step], output_ptr), kept & exists)


@triton.jit(
    do_not_specialize=DIRECTION_UNSPECIALIZED, do_not_specialize_on_alignment=DIRECTION_CHANNEL_STRIDES
)
def sample_hvp_kernel(
    grad_output_ptr,
    input_ptr,
    tangent_ptr,
    moved_ptr,
    grad_input_ptr,
    by_coordinates_ptr,
    source_ptr,
    source_stride_0,
    source_stride_1,
    source_stride_2,
    source_stride_3,
    source_stride_4,
    control_ptr,
    controls,
    stride_out_n,
    stride_out_t,
    stride_out_c,
    stride_out_x,
    stride_out_y,
    stride_out_z,
    stride_in_n,
    stride_in_c,
    stride_in_x,
    stride_in_y,
    stride_in_z,
    stride_tangent_n,
    stride_tangent_c,
    stride_tangent_x,
    stride_tangent_y,
    stride_tangent_z,
    stride_moved_n,
    stride_moved_t,
    stride_moved_k,
    stride_moved_x,
    stride_moved_y,
    stride_moved_z,
    stride_grad_n,
    stride_grad_c,
    stride_grad_x,
    stride_grad_y,
    stride_grad_z,
    in_width,
    in_height,
    in_depth,
    out_width,
    out_height,
    out_depth,
    batch,
    transforms,
    channels,
    column_tiles,
    row_tiles,
    splits,
    split_blocks,
    SOURCE: tl.constexpr,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    GROUP: tl.constexpr,
    TANGENT: tl.constexpr,
    MOVED: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
    COORDINATES_GRAD: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    VECTOR_IN: tl.constexpr,
    VECTOR_TANGENT: tl.constexpr,
    VECTOR_GRAD: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """How d input and d coordinates change along (tangent, moved), either or both.

    grad_output_ptr: read with stride_out_*.
    input_ptr: read with stride_in_*, only for COORDINATES_GRAD and MOVED.
    tangent_ptr, moved_ptr: as in ``sample_jvp_kernel``; the tangent only for COORDINATES_GRAD.
    grad_input_ptr: zero-filled, in COMPUTE; added to with stride_grad_*, only for INPUT_GRAD, with MOVED.
    by_coordinates_ptr: (splits, batch, [D,] H, W, DIMS), in COMPUTE, only for COORDINATES_GRAD. The rest as
        in ``sample_forward_kernel``.
    """
    pid = tl.program_id(0)
    tiles = column_tiles * row_tiles
    split = (pid // tiles) % splits
    b = pid // (tiles * splits) * GROUP
    source = (source_ptr, source_stride_0, source_stride_1, source_stride_2, source_stride_3, source_stride_4)
    in_size = (in_width, in_height, in_depth)
    out_size = (out_width, out_height, out_depth)
    stride_in = (stride_in_x, stride_in_y, stride_in_z)
    stride_tangent = (stride_tangent_x, stride_tangent_y, stride_tangent_z)
    stride_out = (stride_out_x, stride_out_y, stride_out_z)
    stride_grad = (stride_grad_x, stride_grad_y, stride_grad_z)
    outputs = sources.outputs_of(b, batch, transforms, GROUP)
    out, mask = output_pixels(pid % tiles, column_tiles, out_size, DIMS, BLOCK_ROWS, BLOCK_COLUMNS, INDEX)
    matrix = sources.matrix_for(source, outputs, SOURCE, DIMS, COMPUTE)
    p = sources.input_pixels(
        source,
        matrix,
        control_ptr,
        controls,
        outputs,
        out,
        out_size,
        in_size,
        mask,
        SOURCE,
        GROUP,
        ALIGN_CORNERS,
        DIMS,
        INDEX,
        COMPUTE,
    )
    moved = (
        moved_ptr,
        stride_moved_n,
        stride_moved_t,
        stride_moved_k,
        stride_moved_x,
        stride_moved_y,
        stride_moved_z,
    )
    target_offset = tl.multiple_of(pixel_offset(out, stride_out, DIMS, INDEX), (VECTOR_OUT, VECTOR_OUT))
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(channels, BLOCK_CHANNELS * UNROLL))
    by_pixels = ()
    for g in tl.static_range(GROUP):
        n, t = outputs[g]
        x, y, z = taps_of_axes(p[g], in_size, INTERPOLATION, PADDING, ALIGN_CORNERS, DIMS, COMPUTE)
        slopes_x, slopes_y, slopes_z = slopes_of_axes(
            p[g], in_size, INTERPOLATION, PADDING, ALIGN_CORNERS, DIMS, COMPUTE
        )
        if MOVED:
            m = moved_pixels(moved, n, t, out, in_size, mask, SOURCE, ALIGN_CORNERS, DIMS, INDEX, COMPUTE)
            curvatures_x, curvatures_y, curvatures_z = curvatures_of_axes(
                p[g], in_size, INTERPOLATION, PADDING, ALIGN_CORNERS, DIMS, COMPUTE
            )
            moved_x, moved_y, moved_z = moved_weights_of_axes(
                slopes_x, slopes_y, slopes_z, m, INTERPOLATION, DIMS
            )
        image = input_ptr + tl.multiple_of(n * stride_in_n, VECTOR_IN)
        tangent = tangent_ptr + tl.multiple_of(n * stride_tangent_n, VECTOR_TANGENT)
        grad_image = grad_input_ptr + tl.multiple_of(n * stride_grad_n, VECTOR_GRAD)
        target = (
            grad_output_ptr + tl.multiple_of(n * stride_out_n + t * stride_out_t, VECTOR_OUT) + target_offset
        )
        kept = existing(mask, b + g, batch)
        # held by channel until the end, as in the backward kernel
        grad_x = tl.zeros([BLOCK_ROWS * BLOCK_COLUMNS, BLOCK_CHANNELS], COMPUTE)
        grad_y = tl.zeros([BLOCK_ROWS * BLOCK_COLUMNS, BLOCK_CHANNELS], COMPUTE)
        grad_z = tl.zeros([BLOCK_ROWS * BLOCK_COLUMNS, BLOCK_CHANNELS], COMPUTE)
        for block in range(first, last):
            # all loads before the first atomic, as there
            gradients = ()
            for step in tl.static_range(UNROLL):
                c, exists = channel_block(
                    block * UNROLL + step, channels, BLOCK_CHANNELS, EVEN_CHANNELS, INDEX
                )
                gradients += (tl.load(target + c * stride_out_c, kept & exists, other=0.0).to(COMPUTE),)
            if COORDINATES_GRAD and TANGENT:
                for step in tl.static_range(UNROLL):
                    c, exists = channel_block(
                        block * UNROLL + step, channels, BLOCK_CHANNELS, EVEN_CHANNELS, INDEX
                    )
                    by_x, by_y, by_z = interpolate_grad(
                        tangent + c * stride_tangent_c,
                        x,
                        y,
                        z,
                        slopes_x,
                        slopes_y,
                        slopes_z,
                        stride_tangent,
                        exists,
                        INTERPOLATION,
                        VECTOR_TANGENT,
                        DIMS,
                        INDEX,
                        COMPUTE,
                    )
                    grad_x += gradients[step] * by_x
                    grad_y += gradients[step] * by_y
                    grad_z += gradients[step] * by_z
            if COORDINATES_GRAD and MOVED:
                for step in tl.static_range(UNROLL):
                    c, exists = channel_block(
                        block * UNROLL + step, channels, BLOCK_CHANNELS, EVEN_CHANNELS, INDEX
                    )
                    by_x, by_y, by_z = interpolate_grad_moved(
                        image + c * stride_in_c,
                        x,
                        y,
                        z,
                        slopes_x,
                        slopes_y,
                        slopes_z,
                        curvatures_x,
                        curvatures_y,
                        curvatures_z,
                        m,
                        stride_in,
                        exists,
                        INTERPOLATION,
                        VECTOR_IN,
                        DIMS,
                        INDEX,
                        COMPUTE,
                    )
                    grad_x += gradients[step] * by_x
                    grad_y += gradients[step] * by_y
                    grad_z += gradients[step] * by_z
            if INPUT_GRAD:
                for step in tl.static_range(UNROLL):
                    c, exists = channel_block(
                        block * UNROLL + step, channels, BLOCK_CHANNELS, EVEN_CHANNELS, INDEX
                    )
                    scatter_moved(
                        grad_image + c * stride_grad_c,
                        gradients[step],
                        x,
                        y,
                        z,
                        moved_x,
                        moved_y,
                        moved_z,
                        stride_grad,
                        kept & exists,
                        INTERPOLATION,
                        VECTOR_GRAD,
                        DIMS,
                        INDEX,
                    )
        grad_x = tl.sum(grad_x, 1, keep_dims=True)
        grad_y = tl.sum(grad_y, 1, keep_dims=True)
        grad_z = tl.sum(grad_z, 1, keep_dims=True)
        by_pixels += ((grad_x, grad_y, grad_z),)
    if COORDINATES_GRAD:
        for g in tl.static_range(GROUP):
            sources.dense_backward(
                by_coordinates_ptr,
                sources.in_pixels(by_pixels[g], in_size, SOURCE, ALIGN_CORNERS, DIMS, COMPUTE),
                out,
                existing(mask, b + g, batch),
                out_size,
                b + g,
                split,
                batch,
                True,
                DIMS,
                INDEX,
            )


# ------------------------------------------------------------------------------------ launchers
def _moved_strides(moved: torch.Tensor | None) -> tuple:
    """Strides of (N, T, ..., dims) by (image, transform, component, x, y, z)."""
    if moved is None:
        return (0,) * 6
    stride = moved.stride()
    return stride[0], stride[1], stride[-1], *axes(stride[2:-1])


def _image_strides(image: torch.Tensor) -> tuple:
    """Strides of (N, C, ...) by (image, channel, x, y, z)."""
    stride_n, _, *rest = strides(image, image.dim() - 2)
    return stride_n, *rest


@planned
def _jvp_plan(
    output: torch.Tensor,
    input: torch.Tensor | None,
    tangent: torch.Tensor | None,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    moved: torch.Tensor | None,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
) -> Plan:
    gathered, image, other = _jvp_images(input, tangent, moved)
    dims = gathered.dim() - 2
    tensors = [tensor for tensor in (gathered, other, moved, output) if tensor is not None]
    batch, programs, _, shared = _plan(
        "forward mode", gathered, output, params, tensors, source, interpolation, backward=False
    )
    return Plan(
        sample_jvp_kernel,
        triton.cdiv(batch, shared["GROUP"]) * programs,
        gathered.device,
        image,
        other,
        gathered if moved is None else moved,
        output,
        *sources.pack(source, params, control_points),
        *_image_strides(image),
        *_image_strides(other),
        *_moved_strides(moved),
        *strides(output, dims),
        PADDING=int(padding),
        ALIGN_CORNERS=int(align_corners),
        TANGENT=tangent is not None,
        MOVED=moved is not None,
        VECTOR_IN=vector_width(image, dims),
        VECTOR_TANGENT=vector_width(other, dims),
        VECTOR_OUT=vector_width(output, dims),
        **shared,
    )


def _jvp_images(
    input: torch.Tensor | None, tangent: torch.Tensor | None, moved: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What decides how the work is cut; the kernel's image and its tangent, another where there is none."""
    gathered = tangent if moved is None else input
    assert gathered is not None
    return gathered, gathered if input is None else input, gathered if tangent is None else tangent


def sample_jvp(
    input: torch.Tensor | None,
    tangent: torch.Tensor | None,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    moved: torch.Tensor | None,
    output: torch.Tensor,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
) -> None:
    """Fills ``output``, (N, C, ...) or (N, T, C, ...), with the derivative of samples along a direction.

    ``tangent``: that of ``input``, of any strides; None is 0. ``moved``, (N, T, ..., dims) of any strides and
    in the compute type: the tangent of the source's coordinates, normalised (a flow's: in pixels), x first;
    None is 0, and then no ``input`` is needed. One of the two must be given.
    """
    tensors = output, input, tangent, params, control_points, moved
    plan = _jvp_plan(tensors, source, interpolation, padding, align_corners)
    gathered, image, other = _jvp_images(input, tangent, moved)
    direction = gathered if moved is None else moved
    plan(image, other, direction, output, *sources.pointers(params, control_points))


@planned
def _hvp_plan(
    grad_output: torch.Tensor,
    input: torch.Tensor | None,
    tangent: torch.Tensor | None,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    moved: torch.Tensor | None,
    grad_input: torch.Tensor | None,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
    coordinates_grad: bool,
) -> tuple[Plan, tuple[int, ...], torch.dtype]:
    """And the shape and type of the gradient by the coordinates."""
    image, other, gathered = _hvp_images(input, tangent, grad_input)
    dims = image.dim() - 2
    tensors = [tensor for tensor in (image, other, gathered, moved, grad_output) if tensor is not None]
    batch, programs, splits, shared = _plan(
        "second derivatives",
        gathered,
        grad_output,
        params,
        tensors,
        source,
        interpolation,
        backward=True,
        dense=True,
    )
    plan = Plan(
        sample_hvp_kernel,
        triton.cdiv(batch, shared["GROUP"]) * programs,
        image.device,
        grad_output,
        image,
        other,
        gathered if moved is None else moved,
        gathered,
        gathered,  # or the buffer of the gradient by the coordinates
        *sources.pack(source, params, control_points),
        *strides(grad_output, dims),
        *_image_strides(image),
        *_image_strides(other),
        *_moved_strides(moved),
        *_image_strides(gathered),
        PADDING=int(padding),
        ALIGN_CORNERS=int(align_corners),
        TANGENT=tangent is not None,
        MOVED=moved is not None,
        INPUT_GRAD=grad_input is not None,
        COORDINATES_GRAD=coordinates_grad,
        VECTOR_OUT=vector_width(grad_output, dims),
        VECTOR_IN=vector_width(image, dims),
        VECTOR_TANGENT=vector_width(other, dims),
        VECTOR_GRAD=vector_width(gathered, dims),
        **shared,
    )
    shape = (splits, image.shape[0], shared["transforms"], *grad_output.shape[-dims:], dims)
    return plan, shape, compute_dtypes(gathered, params)[1]


def _hvp_images(
    input: torch.Tensor | None, tangent: torch.Tensor | None, grad_input: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernel's image, its tangent and what is added to, each another where there is none."""
    image = next(tensor for tensor in (input, tangent, grad_input) if tensor is not None)
    return image, image if tangent is None else tangent, image if grad_input is None else grad_input


def sample_hvp(
    grad_output: torch.Tensor,
    input: torch.Tensor | None,
    tangent: torch.Tensor | None,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    moved: torch.Tensor | None,
    grad_input: torch.Tensor | None,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
    coordinates_grad: bool,
) -> torch.Tensor | None:
    """The Hessian of <grad_output, samples> by image and coordinates, times a direction as of ``sample_jvp``.

    Adds its image part to ``grad_input`` (zeros, in the compute type) if given, which needs ``moved``.
    Returns its part by the source's coordinates, (N, T, ..., dims) in the compute type, if asked for;
    ``input`` is needed only for this one, and only with ``moved``.
    """
    tensors = grad_output, input, tangent, params, control_points, moved, grad_input
    modes = source, interpolation, padding, align_corners
    plan, shape, dtype = _hvp_plan(tensors, *modes, coordinates_grad)
    image, other, gathered = _hvp_images(input, tangent, grad_input)
    buffer = image.new_empty(shape, dtype=dtype) if coordinates_grad else None
    plan(
        grad_output,
        image,
        other,
        gathered if moved is None else moved,
        gathered,
        gathered if buffer is None else buffer,
        *sources.pointers(params, control_points),
    )
    if buffer is None:
        return None
    return buffer[0] if shape[0] == 1 else buffer.sum(0)
