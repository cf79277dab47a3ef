"""Forward mode and second derivatives of the sampler: along a direction, never as matrices.

Of an output pixel with weights w_k(p), as in ``sample.py``, the direction is a tangent of the image, I', and
a tangent of the source's coordinates, in pixels m = (m_x, m_y[, m_z]). The coordinates are still found in
registers; the way they depend on the parameters is the caller's.

    jvp[n, t, c, o]            = sum over k of  w_k I'[n, c, index_k] + w_k[m] I[n, c, index_k]

with w_k[m] = sum over axes a of (d w_k / d p_a) m_a. And of L = <g, sample>, the change of both gradients:

    d input[n, c, index_k]    += w_k[m] g[n, t, c, o]
    d p_a                      = sum over c and k of  g (d w_k / d p_a I' + d w_k[m] / d p_a I)
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .device import sources
from .device.direction import interpolate_grad_tangent, interpolate_tangent, scatter_tangent
from .device.interpolation import curvatures_of_axes, slopes_of_axes, taps_of_axes
from .device.programs import block_of, image_of, kept_pixels, output_of, work_of
from .device.sampling import add_product, interpolate, interpolate_grad
from .device.tiles import channel_block, load_blocks, store_blocks
from .host import parameters
from .host.cut import coordinate_numbers, source_numbers
from .host.launch import Plan, compute_dtypes, planned
from .sample import cut_samples
from .spec import Block, Image, Images, Params, Plane, Sizes, Strides, Tiling, kernel


@triton.jit
def coord_tangent_of(coord, n, t, out, mask, sizes, SPEC: tl.constexpr):
    """How far the coordinates of an output move, in pixels of the input; 0 outside ``mask``.

    coord: images of each transform, with a channel for each axis, in the source's unit.
    """
    begin = coord.pointer + n * coord.strides.n + t * coord.strides.t
    return sources.scaled_to_pixels(sources.dense_load(begin, coord.strides, out, mask, SPEC), sizes, SPEC)


# ----------------------------------------------------------------------------------------- forward mode
@triton.jit
def jvp_block(images, work, sizes, SPEC: tl.constexpr):
    """The derivative of the samples of a block of pixels."""
    input, tangent, output = images.input, images.tangent, images.output
    block = block_of(work, 0, sizes, SPEC)
    places = sources.places_of(work, block, sizes, SPEC)
    for g in tl.static_range(SPEC.group):
        n, t = work.outputs[g]
        taps = taps_of_axes(places[g], sizes, SPEC)
        if SPEC.coord_tangent:
            m = coord_tangent_of(images.coord, n, t, block.out, block.mask, sizes, SPEC)
            slopes = slopes_of_axes(places[g], sizes, SPEC)
        target = output_of(output, work, g, block, SPEC)
        kept = kept_pixels(block, work, g, sizes)
        for number in range(work.blocks[0], work.blocks[1]):
            # all loads before the first store, as in the forward kernel
            values = ()
            for k in tl.static_range(SPEC.unroll):
                c, exists = channel_block(number * SPEC.unroll + k, sizes.channels, SPEC)
                value = tl.zeros([SPEC.rows * SPEC.columns, SPEC.channels], SPEC.compute)
                if SPEC.tangent:
                    begin = image_of(tangent, n, SPEC.vector_tangent) + c * tangent.strides.c
                    plane = Plane(begin, tangent.strides.pixel, exists)
                    value += interpolate(plane, taps, SPEC.vector_tangent, SPEC)
                if SPEC.coord_tangent:
                    begin = image_of(input, n, SPEC.vector_input) + c * input.strides.c
                    plane = Plane(begin, input.strides.pixel, exists)
                    value += interpolate_tangent(plane, taps, slopes, m, SPEC)
                values += (value,)
            store_blocks(values, target, output.strides.c, number, kept, sizes.channels, SPEC.unroll, SPEC)


@kernel()
def sample_jvp_kernel(
    input_ptr, tangent_ptr, coord_ptr, output_ptr, source_ptr, control_ptr,
    stride_input_n, stride_input_c, stride_input_x, stride_input_y, stride_input_z,
    stride_tangent_n, stride_tangent_c, stride_tangent_x, stride_tangent_y, stride_tangent_z,
    stride_coord_n, stride_coord_t, stride_coord_c, stride_coord_x, stride_coord_y, stride_coord_z,
    stride_output_n, stride_output_t, stride_output_c, stride_output_x, stride_output_y, stride_output_z,
    stride_source_0, stride_source_1, stride_source_2, stride_source_3, stride_source_4, num_controls,
    in_width, in_height, in_depth, out_width, out_height, out_depth, batch, transforms, channels,
    column_tiles, row_tiles, splits, split_blocks, steps,
    SPEC: tl.constexpr,
):  # fmt: skip
    """output = sample(tangent, source) + the derivative of sample(input, source) along coord.

    input_ptr and coord_ptr are read only for ``coord_tangent``, tangent_ptr only for ``tangent``; else they
    may be None.
    """
    in_size = (in_width, in_height, in_depth)
    sizes = Sizes(in_size, (out_width, out_height, out_depth), batch, transforms, channels, (1, 1, 1))
    tiling = Tiling(column_tiles, row_tiles, splits, split_blocks, steps)
    stride_input = (stride_input_x, stride_input_y, stride_input_z)
    input = Image(input_ptr, Strides(stride_input_n, 0, stride_input_c, stride_input))
    stride_tangent = (stride_tangent_x, stride_tangent_y, stride_tangent_z)
    tangent = Image(tangent_ptr, Strides(stride_tangent_n, 0, stride_tangent_c, stride_tangent))
    stride_output = (stride_output_x, stride_output_y, stride_output_z)
    output = Image(output_ptr, Strides(stride_output_n, stride_output_t, stride_output_c, stride_output))
    stride_source = (stride_source_0, stride_source_1, stride_source_2, stride_source_3, stride_source_4)
    params = Params(source_ptr, stride_source, control_ptr, num_controls)
    stride_coord = (stride_coord_x, stride_coord_y, stride_coord_z)
    coord = Image(coord_ptr, Strides(stride_coord_n, stride_coord_t, stride_coord_c, stride_coord))
    images = Images(input=input, tangent=tangent, coord=coord, output=output)

    jvp_block(images, work_of(params, sizes, tiling, SPEC), sizes, SPEC)


# ---------------------------------------------------------------------------------- second derivatives
@triton.jit
def hvp_block(images, by_coord_ptr, work, sizes, SPEC: tl.constexpr):
    """The change of both gradients by a block of pixels."""
    input, tangent, grad = images.input, images.tangent, images.grad
    block = block_of(work, 0, sizes, SPEC)
    places = sources.places_of(work, block, sizes, SPEC)
    for g in tl.static_range(SPEC.group):
        n, t = work.outputs[g]
        taps = taps_of_axes(places[g], sizes, SPEC)
        slopes = slopes_of_axes(places[g], sizes, SPEC)
        if SPEC.coord_tangent:
            m = coord_tangent_of(images.coord, n, t, block.out, block.mask, sizes, SPEC)
            curvatures = curvatures_of_axes(places[g], SPEC)
        target = output_of(images.output, work, g, block, SPEC)
        kept = kept_pixels(block, work, g, sizes)
        # held by channel until the end, as in the backward kernel
        zero = tl.zeros([SPEC.rows * SPEC.columns, SPEC.channels], SPEC.compute)
        by_place = (zero, zero, zero)
        for number in range(work.blocks[0], work.blocks[1]):
            # all loads before the first atomic, as there
            values = load_blocks(target, images.output.strides.c, number, kept, sizes.channels, SPEC)
            for k in tl.static_range(SPEC.unroll):
                c, exists = channel_block(number * SPEC.unroll + k, sizes.channels, SPEC)
                if SPEC.coord_grad and SPEC.tangent:
                    begin = image_of(tangent, n, SPEC.vector_tangent) + c * tangent.strides.c
                    plane = Plane(begin, tangent.strides.pixel, exists)
                    slope = interpolate_grad(plane, taps, slopes, SPEC.vector_tangent, SPEC)
                    by_place = add_product(by_place, values[k], slope)
                if SPEC.coord_grad and SPEC.coord_tangent:
                    begin = image_of(input, n, SPEC.vector_input) + c * input.strides.c
                    plane = Plane(begin, input.strides.pixel, exists)
                    slope_tangent = interpolate_grad_tangent(plane, taps, slopes, curvatures, m, SPEC)
                    by_place = add_product(by_place, values[k], slope_tangent)
            if SPEC.input_grad:
                for k in tl.static_range(SPEC.unroll):
                    c, exists = channel_block(number * SPEC.unroll + k, sizes.channels, SPEC)
                    begin = image_of(grad, n, SPEC.vector_grad) + c * grad.strides.c
                    plane = Plane(begin, grad.strides.pixel, exists)
                    scatter_tangent(plane, values[k], taps, slopes, m, kept, SPEC)
        if SPEC.coord_grad:
            total = [tl.sum(by_place[axis], 1, keep_dims=True) for axis in SPEC.axes]
            total = sources.scaled_to_pixels(total, sizes, SPEC)
            existing = Block(block.step, block.out, kept)
            sources.dense_store(by_coord_ptr, total, work, g, existing, sizes, SPEC, True)


@kernel()
def sample_hvp_kernel(
    grad_output_ptr, input_ptr, tangent_ptr, coord_ptr, grad_input_ptr, by_coord_ptr, source_ptr, control_ptr,
    stride_output_n, stride_output_t, stride_output_c, stride_output_x, stride_output_y, stride_output_z,
    stride_input_n, stride_input_c, stride_input_x, stride_input_y, stride_input_z,
    stride_tangent_n, stride_tangent_c, stride_tangent_x, stride_tangent_y, stride_tangent_z,
    stride_coord_n, stride_coord_t, stride_coord_c, stride_coord_x, stride_coord_y, stride_coord_z,
    stride_grad_n, stride_grad_c, stride_grad_x, stride_grad_y, stride_grad_z,
    stride_source_0, stride_source_1, stride_source_2, stride_source_3, stride_source_4, num_controls,
    in_width, in_height, in_depth, out_width, out_height, out_depth, batch, transforms, channels,
    column_tiles, row_tiles, splits, split_blocks, steps,
    SPEC: tl.constexpr,
):  # fmt: skip
    """How d input and d coordinates change along (tangent, coord), either or both.

    What is not touched may be None. input_ptr: read only for ``coord_grad`` with ``coord_tangent``.
    tangent_ptr: only for ``coord_grad`` with ``tangent``. grad_input_ptr: zeros in the compute type, added to
    only for ``input_grad``, with ``coord_tangent``. by_coord_ptr: (splits, batch, [D,] H, W, dims) in the
    compute type, written only for ``coord_grad``.
    """
    in_size = (in_width, in_height, in_depth)
    sizes = Sizes(in_size, (out_width, out_height, out_depth), batch, transforms, channels, (1, 1, 1))
    tiling = Tiling(column_tiles, row_tiles, splits, split_blocks, steps)
    stride_output = (stride_output_x, stride_output_y, stride_output_z)
    output = Image(grad_output_ptr, Strides(stride_output_n, stride_output_t, stride_output_c, stride_output))
    stride_input = (stride_input_x, stride_input_y, stride_input_z)
    input = Image(input_ptr, Strides(stride_input_n, 0, stride_input_c, stride_input))
    stride_tangent = (stride_tangent_x, stride_tangent_y, stride_tangent_z)
    tangent = Image(tangent_ptr, Strides(stride_tangent_n, 0, stride_tangent_c, stride_tangent))
    stride_grad = (stride_grad_x, stride_grad_y, stride_grad_z)
    grad = Image(grad_input_ptr, Strides(stride_grad_n, 0, stride_grad_c, stride_grad))
    stride_source = (stride_source_0, stride_source_1, stride_source_2, stride_source_3, stride_source_4)
    params = Params(source_ptr, stride_source, control_ptr, num_controls)
    stride_coord = (stride_coord_x, stride_coord_y, stride_coord_z)
    coord = Image(coord_ptr, Strides(stride_coord_n, stride_coord_t, stride_coord_c, stride_coord))
    images = Images(input=input, output=output, grad=grad, tangent=tangent, coord=coord)

    hvp_block(images, by_coord_ptr, work_of(params, sizes, tiling, SPEC), sizes, SPEC)


# ------------------------------------------------------------------------------------------- launchers
@planned
def _jvp_plan(
    output: torch.Tensor,
    input: torch.Tensor | None,
    tangent: torch.Tensor | None,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    coord_tangent: torch.Tensor | None,
    *modes: Any,
) -> Plan:
    gathered = tangent if coord_tangent is None else input
    assert gathered is not None
    tensors = input, tangent, coord_tangent, output
    work = cut_samples("forward mode", gathered, output, params, tensors, modes, stepped=False)
    return work.plan(
        sample_jvp_kernel,
        (*tensors, *parameters.pointers(params, control_points)),
        {"input": input, "tangent": tangent, "output": output},
        source_numbers(modes[0], params, control_points) | coordinate_numbers(coord_tangent, work.dims),
        tangent=tangent is not None,
        coord_tangent=coord_tangent is not None,
    )


def sample_jvp(
    input: torch.Tensor | None,
    tangent: torch.Tensor | None,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    coord_tangent: torch.Tensor | None,
    output: torch.Tensor,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
) -> None:
    """Fills ``output``, (N, C, ...) or (N, T, C, ...), with the derivative of samples along a direction.

    ``tangent``: that of ``input``, of any strides; None is 0. ``coord_tangent``, (N, T, ..., dims) of any
    strides and in the compute type: the tangent of the source's coordinates, normalised (a flow's: in
    pixels), x first; None is 0, and then no ``input`` is needed. One of the two must be given.
    """
    tensors = output, input, tangent, params, control_points, coord_tangent
    plan = _jvp_plan(tensors, source, interpolation, padding, align_corners)
    given = input, tangent, coord_tangent, output, *parameters.pointers(params, control_points)
    plan(*(tensor for tensor in given if tensor is not None))


@planned
def _hvp_plan(
    grad_output: torch.Tensor,
    input: torch.Tensor | None,
    tangent: torch.Tensor | None,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    coord_tangent: torch.Tensor | None,
    grad_input: torch.Tensor | None,
    coord_grad: bool,
    *modes: Any,
) -> tuple[Plan, tuple[int, ...], torch.dtype]:
    """And the shape and type of the gradient by the coordinates."""
    gathered = next(tensor for tensor in (grad_input, input, tangent) if tensor is not None)
    tensors = grad_output, input, tangent, coord_tangent, grad_input
    work = cut_samples(
        "second derivatives", gathered, grad_output, params, tensors, modes, True, dense=True, stepped=False
    )
    buffer = grad_output if coord_grad else None  # in its place
    plan = work.plan(
        sample_hvp_kernel,
        (*tensors, buffer, *parameters.pointers(params, control_points)),
        {"output": grad_output, "input": input, "tangent": tangent, "grad": grad_input},
        source_numbers(modes[0], params, control_points) | coordinate_numbers(coord_tangent, work.dims),
        input_grad=grad_input is not None,
        coord_grad=coord_grad,
        tangent=tangent is not None,
        coord_tangent=coord_tangent is not None,
    )
    outputs = gathered.shape[0], work.numbers["transforms"]
    shape = (work.splits, *outputs, *grad_output.shape[-work.dims :], work.dims)
    return plan, shape, compute_dtypes(gathered, params)[1]


def sample_hvp(
    grad_output: torch.Tensor,
    input: torch.Tensor | None,
    tangent: torch.Tensor | None,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    coord_tangent: torch.Tensor | None,
    grad_input: torch.Tensor | None,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
    coord_grad: bool,
) -> torch.Tensor | None:
    """The Hessian of <grad_output, samples> by image and coordinates, times a direction as of ``sample_jvp``.

    Adds its image part to ``grad_input`` (zeros, in the compute type) if given, which needs
    ``coord_tangent``. Returns its part by the source's coordinates, (N, T, ..., dims) in the compute type, if
    asked for; ``input`` is needed only for this one, and only with ``coord_tangent``.
    """
    tensors = grad_output, input, tangent, params, control_points, coord_tangent, grad_input
    plan, shape, dtype = _hvp_plan(tensors, coord_grad, source, interpolation, padding, align_corners)
    buffer = grad_output.new_empty(shape, dtype=dtype) if coord_grad else None
    given = grad_output, input, tangent, coord_tangent, grad_input, buffer
    plan(*(tensor for tensor in given if tensor is not None), *parameters.pointers(params, control_points))
    if buffer is None:
        return None
    return buffer[0] if shape[0] == 1 else buffer.sum(0)
