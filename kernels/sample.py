"""The sampler: one kernel forward, one backward, for every source, interpolation and padding.

Forward, per output pixel o of transform t of image n, read at p = places_of(o):

    output[n, t, c, o] = sum over taps k of  weight_k(p) input[n, c, index_k(p)]

Backward, from g = d loss / d output:

    d input[n, c, index_k(p)] += weight_k(p) g[n, t, c, o]
    d p                        = sum over c and k of  weight_k'(p) input[n, c, index_k(p)] g[n, t, c, o]

and d p goes on to the source (``sources.add_gradient``). Pixels are a column and channels a row of every
block: shapes are [pixels, 1], [1, channels] and [pixels, channels].
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .device import footprints, sources
from .device.arithmetic import widened
from .device.bounds import has_interior_path
from .device.filling import filled, outside_of
from .device.interpolation import slopes_of_axes, taps_of_axes
from .device.programs import block_of, image_of, kept_pixels, output_of, work_of
from .device.sampling import add_coordinate_gradient, gradient_of, interpolate, scatter
from .device.tiles import channel_block, load_blocks, store_blocks, zero_blocks
from .host import configs, parameters
from .host.cut import Cut, cut, source_numbers
from .host.launch import INT32_MAX, Plan, compute_dtypes, index_dtype, planned
from .host.parameters import channel_dim
from .modes import INVERTIBLE, MOST_STEPS, Source
from .spec import Image, Images, Params, Plane, Sizes, Strides, Tiling, kernel


# ---------------------------------------------------------------------------------------------- forward
@triton.jit
def forward_block(images, work, step, sizes, SPEC: tl.constexpr, INTERIOR: tl.constexpr):
    """The samples of one block of pixels."""
    input, output = images.input, images.output
    block = block_of(work, step, sizes, SPEC)
    places = sources.places_of(work, block, sizes, SPEC, INTERIOR)
    for g in tl.static_range(SPEC.group):
        n, _ = work.outputs[g]
        taps = taps_of_axes(places[g], sizes, SPEC, INTERIOR)
        image = image_of(input, n, SPEC.vector_input)
        target = output_of(output, work, g, block, SPEC)
        kept = kept_pixels(block, work, g, sizes, INTERIOR)
        if SPEC.fill and not INTERIOR:
            outside = outside_of(places[g], taps, sizes, SPEC)
        for number in range(work.blocks[0], work.blocks[1]):
            # all loads before the first store, behind which the compiler may not move them
            values = ()
            for k in tl.static_range(SPEC.unroll):
                c, exists = channel_block(number * SPEC.unroll + k, sizes.channels, SPEC)
                plane = Plane(image + c * input.strides.c, input.strides.pixel, exists)
                value = interpolate(plane, taps, SPEC.vector_input, SPEC, INTERIOR)
                if SPEC.fill and not INTERIOR:
                    value = filled(value, outside, images.fill, n, c, exists, SPEC)
                values += (value,)
            store_blocks(values, target, output.strides.c, number, kept, sizes.channels, SPEC.unroll, SPEC)


@triton.jit
def averaged_block(images, work, step, sizes, SPEC: tl.constexpr):
    """The averages of one block of pixels over their sub-samples."""
    input, output = images.input, images.output
    block = block_of(work, step, sizes, SPEC)
    footprint = footprints.footprint_of(work.map, block.out, block.mask, sizes, SPEC)
    n, _ = work.outputs[0]
    image = image_of(input, n, SPEC.vector_input)
    target = output_of(output, work, 0, block, SPEC)
    for number in range(work.blocks[0], work.blocks[1]):
        values = zero_blocks(SPEC.unroll, SPEC)
        for i in range(footprint.most):
            sample = footprints.sample_of(i, footprint, block.out, SPEC)
            places = footprints.places_of_sample(work, sample, footprint, block, SPEC)
            taps = taps_of_axes(places, sizes, SPEC)
            if SPEC.fill:
                outside = outside_of(places, taps, sizes, SPEC)
            new = ()
            for k in tl.static_range(SPEC.unroll):
                c, exists = channel_block(number * SPEC.unroll + k, sizes.channels, SPEC)
                read = exists & sample.exists
                plane = Plane(image + c * input.strides.c, input.strides.pixel, read)
                value = interpolate(plane, taps, SPEC.vector_input, SPEC)
                if SPEC.fill:
                    value = filled(value, outside, images.fill, n, c, exists, SPEC)
                    value = tl.where(sample.exists, value, 0.0)
                new += (values[k] + value,)
            values = new
        values = [value * footprint.share for value in values]
        store_blocks(values, target, output.strides.c, number, block.mask, sizes.channels, SPEC.unroll, SPEC)


@kernel()
def sample_forward_kernel(
    input_ptr, output_ptr, source_ptr, control_ptr, fill_ptr,
    stride_input_n, stride_input_c, stride_input_x, stride_input_y, stride_input_z,
    stride_output_n, stride_output_t, stride_output_c, stride_output_x, stride_output_y, stride_output_z,
    stride_source_0, stride_source_1, stride_source_2, stride_source_3, stride_source_4, num_controls,
    stride_fill_n, stride_fill_c,
    in_width, in_height, in_depth, out_width, out_height, out_depth, batch, transforms, channels,
    column_tiles, row_tiles, splits, split_blocks, steps,
    SPEC: tl.constexpr,
):  # fmt: skip
    """output = sample(input, source). One image is addressed in the index type, the images in int64.

    In 2-D whatever belongs to z is 0 and unused. The fill is (N, C), in the compute type; without one its
    pointer and strides are None. ``spec`` says what the tuples hold.
    """
    in_size = (in_width, in_height, in_depth)
    sizes = Sizes(in_size, (out_width, out_height, out_depth), batch, transforms, channels, (1, 1, 1))
    tiling = Tiling(column_tiles, row_tiles, splits, split_blocks, steps)
    stride_input = (stride_input_x, stride_input_y, stride_input_z)
    input = Image(input_ptr, Strides(stride_input_n, 0, stride_input_c, stride_input))
    stride_output = (stride_output_x, stride_output_y, stride_output_z)
    output = Image(output_ptr, Strides(stride_output_n, stride_output_t, stride_output_c, stride_output))
    stride_source = (stride_source_0, stride_source_1, stride_source_2, stride_source_3, stride_source_4)
    params = Params(source_ptr, stride_source, control_ptr, num_controls)
    fill = Image(fill_ptr, Strides(stride_fill_n, 0, stride_fill_c, 0))
    images = Images(input=input, output=output, fill=fill)

    work = work_of(params, sizes, tiling, SPEC)
    if has_interior_path(SPEC) and work.interior:
        for step in range(work.steps):
            forward_block(images, work, step, sizes, SPEC, True)
    elif SPEC.antialias:
        for step in range(work.steps):
            averaged_block(images, work, step, sizes, SPEC)
    else:
        for step in range(work.steps):
            forward_block(images, work, step, sizes, SPEC, False)


# --------------------------------------------------------------------------------------------- backward
@triton.jit
def backward_block(
    images, partial_ptr, sums, work, step, sizes, SPEC: tl.constexpr, INTERIOR: tl.constexpr
):  # fmt: skip
    """What a block of pixels adds to d input and d params. Returns ``sums`` with a matrix's share added."""
    input, grad = images.input, images.grad
    block = block_of(work, step, sizes, SPEC)
    places = sources.places_of(work, block, sizes, SPEC, INTERIOR)
    gradients = ()
    for g in tl.static_range(SPEC.group):
        n, _ = work.outputs[g]
        taps = taps_of_axes(places[g], sizes, SPEC, INTERIOR)
        slopes = slopes_of_axes(places[g], sizes, SPEC, INTERIOR)
        image = image_of(input, n, SPEC.vector_input)
        grad_image = image_of(grad, n, SPEC.vector_grad)
        target = output_of(images.output, work, g, block, SPEC)
        kept = kept_pixels(block, work, g, sizes, INTERIOR)
        # held by channel until the end: one reduction in all, not one for each block of channels
        zero = tl.zeros([SPEC.rows * SPEC.columns, SPEC.channels], SPEC.compute)
        by_place = (zero, zero, zero)
        for number in range(work.blocks[0], work.blocks[1]):
            # all loads before the first atomic, behind which the compiler may not move them
            values = load_blocks(target, images.output.strides.c, number, kept, sizes.channels, SPEC)
            if SPEC.source_grad:
                for k in tl.static_range(SPEC.unroll):
                    c, exists = channel_block(number * SPEC.unroll + k, sizes.channels, SPEC)
                    plane = Plane(image + c * input.strides.c, input.strides.pixel, exists)
                    by_place = add_coordinate_gradient(
                        by_place, values[k], plane, taps, slopes, SPEC, INTERIOR
                    )
            if SPEC.input_grad:
                for k in tl.static_range(SPEC.unroll):
                    c, exists = channel_block(number * SPEC.unroll + k, sizes.channels, SPEC)
                    plane = Plane(grad_image + c * grad.strides.c, grad.strides.pixel, exists)
                    scatter(plane, values[k], taps, kept, SPEC, INTERIOR)
        gradient = gradient_of(by_place, taps, slopes, kept, SPEC)
        if not sources.is_affine(SPEC):
            gradient = sources.scaled_to_pixels(gradient, sizes, SPEC)
        gradients += (gradient,)
    if SPEC.source_grad:
        sums = sources.add_gradient(partial_ptr, sums, work, gradients, block, sizes, SPEC)
    return sums


@triton.jit
def averaged_backward_block(images, sums, work, step, sizes, SPEC: tl.constexpr):
    """``sums`` with what a block of pixels adds to d params, sub-sample by sub-sample."""
    input, output = images.input, images.output
    block = block_of(work, step, sizes, SPEC)
    footprint = footprints.footprint_of(work.map, block.out, block.mask, sizes, SPEC)
    image = image_of(input, work.outputs[0][0], SPEC.vector_input)
    target = output_of(output, work, 0, block, SPEC)
    zero = tl.zeros([SPEC.rows * SPEC.columns, SPEC.channels], SPEC.compute)
    for i in range(footprint.most):
        sample = footprints.sample_of(i, footprint, block.out, SPEC)
        places = footprints.places_of_sample(work, sample, footprint, block, SPEC)
        taps = taps_of_axes(places, sizes, SPEC)
        slopes = slopes_of_axes(places, sizes, SPEC)
        kept = block.mask & sample.exists
        by_place = (zero, zero, zero)
        for number in range(work.blocks[0], work.blocks[1]):
            for k in tl.static_range(SPEC.unroll):
                c, exists = channel_block(number * SPEC.unroll + k, sizes.channels, SPEC)
                g = widened(tl.load(target + c * output.strides.c, kept & exists, other=0.0), SPEC)
                plane = Plane(image + c * input.strides.c, input.strides.pixel, exists)
                by_place = add_coordinate_gradient(by_place, g * footprint.share, plane, taps, slopes, SPEC)
        gradient = gradient_of(by_place, taps, slopes, kept, SPEC)
        sums = footprints.add_gradient(sums, work.map, gradient, sample, footprint, block, sizes, SPEC)
    return sums


@kernel()
def sample_backward_kernel(
    grad_output_ptr, input_ptr, grad_input_ptr, partial_ptr, source_ptr, control_ptr,
    stride_output_n, stride_output_t, stride_output_c, stride_output_x, stride_output_y, stride_output_z,
    stride_input_n, stride_input_c, stride_input_x, stride_input_y, stride_input_z,
    stride_grad_n, stride_grad_c, stride_grad_x, stride_grad_y, stride_grad_z,
    stride_source_0, stride_source_1, stride_source_2, stride_source_3, stride_source_4, num_controls,
    in_width, in_height, in_depth, out_width, out_height, out_depth, batch, transforms, channels,
    column_tiles, row_tiles, splits, split_blocks, steps,
    SPEC: tl.constexpr,
):  # fmt: skip
    """d input by scatter and d params, either or both.

    input_ptr: read only for ``source_grad``. grad_input_ptr: zeros in the compute type, added to only for
    ``input_grad``. partial_ptr: the buffer of ``parameters.gradient_buffer``, only for ``source_grad``; with
    room for the control points' gradient for ``control_grad``.
    """
    in_size = (in_width, in_height, in_depth)
    sizes = Sizes(in_size, (out_width, out_height, out_depth), batch, transforms, channels, (1, 1, 1))
    tiling = Tiling(column_tiles, row_tiles, splits, split_blocks, steps)
    stride_output = (stride_output_x, stride_output_y, stride_output_z)
    output = Image(grad_output_ptr, Strides(stride_output_n, stride_output_t, stride_output_c, stride_output))
    stride_input = (stride_input_x, stride_input_y, stride_input_z)
    input = Image(input_ptr, Strides(stride_input_n, 0, stride_input_c, stride_input))
    stride_grad = (stride_grad_x, stride_grad_y, stride_grad_z)
    grad = Image(grad_input_ptr, Strides(stride_grad_n, 0, stride_grad_c, stride_grad))
    images = Images(input=input, output=output, grad=grad)
    stride_source = (stride_source_0, stride_source_1, stride_source_2, stride_source_3, stride_source_4)
    params = Params(source_ptr, stride_source, control_ptr, num_controls)

    work = work_of(params, sizes, tiling, SPEC)
    sums = sources.zero_sums(SPEC)
    if has_interior_path(SPEC) and work.interior:
        for step in range(work.steps):
            sums = backward_block(images, partial_ptr, sums, work, step, sizes, SPEC, True)
    elif SPEC.antialias:
        for step in range(work.steps):
            sums = averaged_backward_block(images, sums, work, step, sizes, SPEC)
    else:
        for step in range(work.steps):
            sums = backward_block(images, partial_ptr, sums, work, step, sizes, SPEC, False)
    if SPEC.source_grad:
        sources.store_sums(partial_ptr, sums, work, sizes, SPEC, sources.is_affine(SPEC))


# -------------------------------------------------------------------------------------------- launchers
def cut_samples(
    kernel: str,
    gathered: torch.Tensor,
    output: torch.Tensor,
    params: torch.Tensor,
    tensors: tuple[torch.Tensor | None, ...],
    modes: tuple[int, int, int, bool],
    backward: bool = False,
    dense: bool = False,
    stepped: bool = True,
) -> Cut:
    """The tile that ``configs`` chooses for samples, and all that follows from it.

    ``gathered`` is the image that is read or added to at the sampled coordinates: its layout decides.
    ``tensors``: of which offsets are taken. ``dense``: a gradient by the coordinates is written out as it is,
    whatever the source. ``stepped``: the kernel goes through several blocks of pixels.
    """
    source, dims = modes[0], gathered.dim() - 2
    batch, size = output.shape[: channel_dim(output, dims)].numel(), output.shape[-dims:]
    # a spline's partial sums are many: its tiles are of pixels, not of channels
    last = gathered.stride(1) == 1 and not (source == Source.TPS and backward and not dense)
    problem = configs.Problem.of(kernel, modes, batch, gathered.shape[1], size, gathered, last, backward)
    tile = configs.choose(gathered.device, problem)
    # a spline's partial sums are those of one block of pixels, and its basis outweighs what steps share
    steps = 1 if not stepped or source == Source.TPS else min(tile.steps, MOST_STEPS)
    index = index_dtype(*tensors, params, rows=problem.rows)
    if (dense or source in parameters.DENSE) and size.numel() * dims > INT32_MAX:
        index = tl.int64  # the gradient's buffer holds what an expanded grid does not
    compute, _ = compute_dtypes(gathered, params)
    work = cut(problem, tile, modes, (gathered.shape[2:], size), compute, index, steps)
    work.numbers["transforms"] = batch // gathered.shape[0]
    work.fields["patches"] = tile.may_have_patches and source in INVERTIBLE
    return work


@planned
def _forward_plan(
    input: torch.Tensor,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    output: torch.Tensor,
    fill: torch.Tensor | None,
    *modes: Any,
) -> Plan:
    work = cut_samples("forward", input, output, params, (input, output), modes)
    stride_n, stride_c = (None, None) if fill is None else fill.stride()
    of_source = source_numbers(modes[0], params, control_points)
    return work.plan(
        sample_forward_kernel,
        (input, output, *parameters.pointers(params, control_points), fill),
        {"input": input, "output": output},
        {**of_source, "stride_fill_n": stride_n, "stride_fill_c": stride_c},
        fill=fill is not None,
    )


def sample_forward(
    input: torch.Tensor,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    output: torch.Tensor,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
    fill: torch.Tensor | None = None,
) -> None:
    """Fills ``output``, (N, C, ...) or (N, T, C, ...) of any strides, with samples of ``input``.

    Integers are rounded half to even and saturated. ``fill``: (N, C) of any strides, in the compute type.
    """
    plan = _forward_plan(
        (input, params, control_points, output, fill), source, interpolation, padding, align_corners
    )
    pointers = parameters.pointers(params, control_points)
    if fill is None:
        plan(input, output, *pointers)
    else:
        plan(input, output, *pointers, fill)


@planned
def _backward_plan(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    grad_input: torch.Tensor | None,
    params_grad: bool,
    control_grad: bool,
    *modes: Any,
) -> tuple[Plan, parameters.Sums | None]:
    gathered = input if grad_input is None else grad_input
    wanted = {"image": grad_input is not None, "parameters": params_grad, "control points": control_grad}
    kernel = " ".join(("backward", *(name for name, asked in wanted.items() if asked)))
    tensors = input, gathered, grad_output
    work = cut_samples(kernel, gathered, grad_output, params, tensors, modes, backward=True)
    plan = work.plan(
        sample_backward_kernel,
        # the second gradient: or the buffer of the sums
        (grad_output, input, gathered, gathered, *parameters.pointers(params, control_points)),
        {"output": grad_output, "input": input, "grad": gathered},
        source_numbers(modes[0], params, control_points),
        input_grad=grad_input is not None,
        source_grad=params_grad,
        control_grad=params_grad and control_grad,
    )
    if not params_grad:
        return plan, None
    return plan, work.sums(compute_dtypes(input, params)[1], control_points if control_grad else None)


def sample_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    grad_input: torch.Tensor | None,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
    params_grad: bool,
    control_grad: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Adds to ``grad_input`` (zeros, in the compute type) if given; returns d params and d control points.

    Either is None unless asked for; the control points' comes with the parameters' only.
    """
    tensors = grad_output, input, params, control_points, grad_input
    modes = source, interpolation, padding, align_corners
    plan, sums = _backward_plan(tensors, params_grad, control_grad, *modes)
    gathered = input if grad_input is None else grad_input
    buffer = None if sums is None else parameters.gradient_buffer(source, params, sums)
    target = gathered if buffer is None else buffer
    plan(grad_output, input, gathered, target, *parameters.pointers(params, control_points))
    if buffer is None:
        return None, None
    return parameters.reduce_gradient(source, params, buffer, control_points if control_grad else None)
