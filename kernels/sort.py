"""d image without atomics: outputs sorted by where they read, then one sum for each input pixel.

For any coordinate source, always the same bits (``MATH.md`` has the proof):

1. ``sort_keys_kernel``, for each output pixel: its places, and as its key the cell they lie in, an input
   pixel;
2. a stable sort of the keys, and a table of where each cell's outputs begin;
3. ``sort_sums_kernel``, for each input pixel: only outputs of the cells around it read it; they are added up
   in the list's order, and the sum is stored once.

Pixels are a column and channels a row of every block, as in ``sample.py``.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .derivatives import coord_tangent_of
from .device import sources
from .device.cells import cell_of, cell_row, row_parts
from .device.interpolation import at_pixel, axis_slopes, axis_taps, tap_count
from .device.programs import block_of, kept_pixels, work_of
from .device.tiles import (
    blocks_of,
    first_row,
    load_blocks,
    offset_of,
    pixel_count,
    pixels_from,
    place_of_program,
    row_by_row,
    store_blocks,
    zero_blocks,
)
from .host import configs, parameters
from .host.cut import coordinate_numbers, cut, source_numbers
from .host.launch import INT32_MAX, Plan, compute_dtypes, index_dtype, planned
from .host.parameters import channel_dim
from .modes import Interpolation, Source
from .spec import Image, Params, Place, Sizes, Strides, Tiling, constant, kernel

# Images are done together as long as their outputs are not more than this: beyond, memory would grow and
# nothing be gained.
OUTPUTS_AT_ONCE = 2**24
# PyTorch sorts fewer than 2^31 at once; what is more than this is several lists.
LIST_LENGTH = 2**30
# Outputs of one row of cells that an input pixel adds up alone; of what is left the whole program takes part.
ALONE = constant(32)


class Outputs(NamedTuple):
    """The outputs of one image, as they stand in one list.

    order: their numbers, sorted. before: the number of the first of the image, among the list's. indices,
    fractions: what ``sort_keys_kernel`` wrote of them. gradients: where their first channel is; stride_c,
    sizes, strides: how their channels and pixels lie, along ``SPEC.pixel_axes`` axes, innermost first.
    """

    order: Any
    before: Any
    indices: Any
    fractions: Any
    gradients: Any
    stride_c: Any
    sizes: Any
    strides: Any


# ------------------------------------------------------------------------------------------------- keys
@kernel()
def sort_keys_kernel(
    keys_ptr, indices_ptr, fractions_ptr, coord_ptr, source_ptr, control_ptr,
    stride_source_0, stride_source_1, stride_source_2, stride_source_3, stride_source_4, num_controls,
    stride_coord_n, stride_coord_t, stride_coord_c, stride_coord_x, stride_coord_y, stride_coord_z,
    in_width, in_height, in_depth, out_width, out_height, out_depth, batch, transforms,
    column_tiles, row_tiles,
    SPEC: tl.constexpr,
):  # fmt: skip
    """The cell that each output pixel lies in, and its places.

    keys_ptr: image x cells + cell, or images x cells where nothing is read; outputs in the order (image,
    transform, pixel). indices_ptr, fractions_ptr: in the same order, for each axis; with ``coord_tangent``
    after the fractions the tangents of the coordinates, in pixels. coord_ptr: those tangents, in the source's
    unit.
    """
    KEY: tl.constexpr = keys_ptr.dtype.element_ty
    FRACTIONS: tl.constexpr = 2 * SPEC.dims if SPEC.coord_tangent else SPEC.dims
    in_size = (in_width, in_height, in_depth)
    sizes = Sizes(in_size, (out_width, out_height, out_depth), batch, transforms, 1, (1, 1, 1))
    stride_source = (stride_source_0, stride_source_1, stride_source_2, stride_source_3, stride_source_4)
    params = Params(source_ptr, stride_source, control_ptr, num_controls)
    stride_coord = (stride_coord_x, stride_coord_y, stride_coord_z)
    coord = Image(coord_ptr, Strides(stride_coord_n, stride_coord_t, stride_coord_c, stride_coord))

    work = work_of(params, sizes, Tiling(column_tiles, row_tiles, 1, 1, 1), SPEC)
    block = block_of(work, 0, sizes, SPEC)
    places = sources.places_of(work, block, sizes, SPEC)
    pixel = offset_of(block.out, (1, out_width, out_width.to(SPEC.index) * out_height), 1, SPEC)
    nothing = (batch // transforms).to(KEY) * pixel_count(sizes.input, SPEC).to(KEY)
    for g in tl.static_range(SPEC.group):
        n, t = work.outputs[g]
        kept = kept_pixels(block, work, g, sizes)
        cell, read = cell_of(places[g], sizes, SPEC, KEY)
        key = tl.where(read, n.to(KEY) * pixel_count(sizes.input, SPEC).to(KEY) + cell, nothing)
        first = (work.b + g).to(tl.int64) * pixel_count(sizes.output, SPEC)
        tl.store(keys_ptr + first + pixel, key, kept)
        index = indices_ptr + first * SPEC.dims + pixel * SPEC.dims
        fraction = fractions_ptr + first * FRACTIONS + pixel * FRACTIONS
        for k in tl.static_range(SPEC.dims):
            tl.store(index + k, places[g][k][0], kept)
            tl.store(fraction + k, places[g][k][1], kept)
        if SPEC.coord_tangent:
            m = coord_tangent_of(coord, n, t, block.out, kept, sizes, SPEC)
            for k in tl.static_range(SPEC.dims):
                tl.store(fraction + (SPEC.dims + k), m[k], kept)


# ------------------------------------------------------------------------------------------------- sums
@triton.jit
def load_place(outputs, i, read, AXIS: tl.constexpr, SPEC: tl.constexpr):
    FRACTIONS: tl.constexpr = 2 * SPEC.dims if SPEC.coord_tangent else SPEC.dims
    index = tl.load(outputs.indices + (i * SPEC.dims + AXIS), read, other=0)
    return Place(index, tl.load(outputs.fractions + (i * FRACTIONS + AXIS), read, other=0.0))


@triton.jit
def output_weight(outputs, i, read, q, sizes, SPEC: tl.constexpr):
    """The weight of the outputs ``i`` in the sums of pixels ``q``; 0 where not ``read``.

    For ``coord_tangent`` it is the weight's tangent: sum over axes of m_a slope_a times the other axes'
    weights.
    """
    weight = tl.full(i.shape, 1.0, SPEC.compute)
    tangent = tl.zeros(i.shape, SPEC.compute)
    for axis in tl.static_range(SPEC.dims):
        size = sizes.input[axis]
        place = load_place(outputs, i, read, axis, SPEC)
        taps = axis_taps(place, size, axis, SPEC)
        along = at_pixel(q[axis], taps, taps.weight, SPEC)
        if SPEC.coord_tangent:
            m = tl.load(outputs.fractions + (i * (2 * SPEC.dims) + (SPEC.dims + axis)), read, other=0.0)
            slope = at_pixel(q[axis], taps, axis_slopes(place, size, axis, SPEC), SPEC)
            tangent = tangent * along + weight * (m * slope)
        weight *= along
    if SPEC.coord_tangent:
        weight = tangent
    return tl.where(read, weight, 0.0)


@triton.jit
def output_offset(i, sizes, strides, SPEC: tl.constexpr):
    """The offset of output pixel ``i`` of an image; ``sizes`` and ``strides`` are as in ``Outputs``."""
    if SPEC.pixel_axes == 1:
        offset = i * strides[0]
    else:
        further = i // sizes[0]
        offset = (i - further * sizes[0]) * strides[0]
        for axis in tl.static_range(1, SPEC.pixel_axes - 1):
            i = further
            further = i // sizes[axis]
            offset += (i - further * sizes[axis]) * strides[axis]
        offset += further * strides[SPEC.pixel_axes - 1]
    return tl.multiple_of(offset, (SPEC.vector_output, SPEC.vector_output))


@triton.jit
def add_outputs(sums, position, read, q, outputs, block, sizes, SPEC: tl.constexpr):
    """Adds to ``sums``, (unroll of) [pixels, channels], one output each: weight x gradient.

    position: the outputs' places in the list, [pixels, 1]. A gradient of weight 0 is not read: what is no
    number stays where it was.
    """
    i = (tl.load(outputs.order + position, read, other=0) - outputs.before).to(SPEC.index)
    weight = output_weight(outputs, i, read, q, sizes, SPEC)
    target = outputs.gradients + output_offset(i, outputs.sizes, outputs.strides, SPEC)
    gradients = load_blocks(target, outputs.stride_c, block, weight != 0, sizes.channels, SPEC)
    new = ()
    for k in tl.static_range(SPEC.unroll):
        new += (sums[k] + weight * gradients[k],)
    return new


@triton.jit
def at(values, chosen):
    """The one entry of a column that is ``chosen``."""
    return tl.sum(tl.sum(tl.where(chosen, values, 0), 1), 0)


@triton.jit
def add_row(sums, begin, end, q, outputs, block, sizes, SPEC: tl.constexpr):
    """Adds to ``sums`` the outputs from ``begin`` to before ``end`` of the list, for each pixel.

    Each lane adds up its own; where some have very many, the program's lanes go through these together.
    """
    PIXELS: tl.constexpr = SPEC.rows * SPEC.columns
    lane = tl.arange(0, PIXELS)[:, None]
    # alone, or together from ALONE on: whichever takes fewer steps
    alone = tl.max(tl.max(end - begin, 1), 0)
    left = tl.maximum(end - begin - ALONE, 0)
    together = tl.sum(tl.sum((left + (PIXELS - 1)) // PIXELS, 1), 0) + ALONE
    steps = tl.where(together < alone, ALONE, alone)
    for i in range(steps):
        sums = add_outputs(sums, begin + i, begin + i < end, q, outputs, block, sizes, SPEC)
    waiting = tl.where(end - begin > steps, lane, PIXELS)
    helped = tl.min(tl.min(waiting, 1), 0)
    while helped < PIXELS:
        chosen = lane == helped
        pixel = [at(along, chosen) for along in q]
        shares = zero_blocks(SPEC.unroll, SPEC)
        stop = at(end, chosen)
        for start in range(at(begin, chosen) + steps, stop, PIXELS):
            shares = add_outputs(
                shares, start + lane, start + lane < stop, pixel, outputs, block, sizes, SPEC
            )
        new = ()
        for k in tl.static_range(SPEC.unroll):
            new += (sums[k] + tl.where(chosen, tl.sum(shares[k], 0, keep_dims=True), 0.0),)
        sums = new
        waiting = tl.where(chosen, PIXELS, waiting)
        helped = tl.min(tl.min(waiting, 1), 0)
    return sums


@kernel()
def sort_sums_kernel(
    grad_output_ptr, grad_input_ptr, indices_ptr, fractions_ptr, order_ptr, starts_ptr,
    stride_output_n, stride_output_c, stride_output_0, stride_output_1, stride_output_2, stride_output_3,
    output_size_0, output_size_1, output_size_2,
    stride_input_n, stride_input_c, stride_input_x, stride_input_y, stride_input_z,
    in_width, in_height, in_depth, images, outputs, channels, length, lists,
    column_tiles, row_tiles, splits, split_blocks,
    SPEC: tl.constexpr,
):  # fmt: skip
    """grad_input = for each input pixel the sum of the outputs that read it. Tiles are of input pixels.

    grad_output_ptr: strides by image, channel and along the axes of its pixels (output_size_*), innermost
    first. grad_input_ptr: written with stride_input_*. indices_ptr, fractions_ptr: what ``sort_keys_kernel``
    wrote. order_ptr: the numbers of the outputs, sorted, in ``lists`` lists of ``length``, each from 0 on.
    starts_ptr: for each list where each of images x cells begins in it, and where the last one ends. outputs:
    pixels of an image.
    """
    FRACTIONS: tl.constexpr = 2 * SPEC.dims if SPEC.coord_tangent else SPEC.dims
    TAPS: tl.constexpr = tap_count(SPEC)
    PIXELS: tl.constexpr = SPEC.rows * SPEC.columns
    CELL_ROWS: tl.constexpr = (TAPS * TAPS if SPEC.dims == 3 else TAPS) * row_parts(SPEC)
    in_size = (in_width, in_height, in_depth)
    sizes = Sizes(in_size, in_size, images, 1, channels, (1, 1, 1))
    stride_input = (stride_input_x, stride_input_y, stride_input_z)
    grad_input = Image(grad_input_ptr, Strides(stride_input_n, 0, stride_input_c, stride_input))
    output_sizes = (output_size_0, output_size_1, output_size_2)
    output_strides = (stride_output_0, stride_output_1, stride_output_2, stride_output_3)

    tiling = Tiling(column_tiles, row_tiles, splits, split_blocks, 1)
    column_tile, row_tile, split, image = place_of_program(tiling)
    n = image.to(tl.int64)
    row = first_row(row_tile, SPEC.rows, SPEC)
    q, mask = pixels_from(column_tile * SPEC.columns, row, in_size, row_by_row(PIXELS), SPEC.columns, SPEC)
    cells = pixel_count(in_size, SPEC)
    gradients = grad_output_ptr + tl.multiple_of(n * stride_output_n, SPEC.vector_output)
    target = grad_input_ptr + tl.multiple_of(n * stride_input_n, SPEC.vector_input)
    target += offset_of(q, grad_input.strides.pixel, SPEC.vector_input, SPEC)
    first, last = blocks_of(split, tiling, channels, SPEC)
    for block in range(first, last):
        sums = zero_blocks(SPEC.unroll, SPEC)
        for number in range(lists):
            part = tl.cast(number, tl.int64)
            listed = Outputs(
                order_ptr + part * length, n * outputs - part * length,
                indices_ptr + n * outputs * SPEC.dims, fractions_ptr + n * outputs * FRACTIONS,
                gradients, stride_output_c, output_sizes, output_strides,
            )  # fmt: skip
            starts = starts_ptr + part * (images * cells + 1) + n * cells
            for cell in range(CELL_ROWS):
                begin, end = cell_row(starts, q, cell, sizes, mask, SPEC)
                sums = add_row(sums, begin, end, q, listed, block, sizes, SPEC)
        store_blocks(sums, target, stride_input_c, block, mask, channels, SPEC.unroll, SPEC)


# ------------------------------------------------------------------------------------------- launchers
def _pixel_axes(tensor: torch.Tensor, dims: int) -> list[tuple[int, int]]:
    """(size, stride) of the axes of an image's pixels, innermost first: as few as tell (T, ...) apart.

    A contiguous image has one, with transforms two: the fewer, the fewer divisions find a pixel.
    """
    channel = channel_dim(tensor, dims)
    joined: list[tuple[int, int]] = []
    for dim in (*reversed(range(channel + 1, tensor.dim())), *reversed(range(1, channel))):
        size, stride = tensor.shape[dim], tensor.stride(dim)
        if joined and stride == joined[-1][0] * joined[-1][1]:
            joined[-1] = joined[-1][0] * size, joined[-1][1]
        elif size > 1:
            joined.append((size, stride))
    return joined or [(1, 0)]


@planned
def _keys_plan(
    keys: torch.Tensor,
    indices: torch.Tensor,
    fractions: torch.Tensor,
    coord_tangent: torch.Tensor | None,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    images: int,
    sizes: tuple[torch.Size, torch.Size],
    small: bool,
    *modes: Any,
) -> Plan:
    batch = keys.numel() // sizes[1].numel()
    problem = configs.Problem.of("sorted keys", modes, batch, 1, sizes[1], fractions)
    index = index_dtype(params, coord_tangent) if small else tl.int64
    tile = configs.choose(keys.device, problem)
    work = cut(problem, tile, modes, sizes, compute_dtypes(fractions)[0], index)
    return work.plan(
        sort_keys_kernel,
        (keys, indices, fractions, coord_tangent, *parameters.pointers(params, control_points)),
        {},
        source_numbers(modes[0], params, control_points)
        | coordinate_numbers(coord_tangent, work.dims)
        | {"transforms": batch // images},
        coord_tangent=coord_tangent is not None,
    )


def _sort(keys: torch.Tensor, length: int, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs in the order of their keys, list by list, and where in each list each cell begins."""
    every = torch.arange(cells + 1, dtype=keys.dtype, device=keys.device)
    orders, starts = [], []
    for part in keys.split(length):
        ordered, order = torch.sort(part, stable=True)
        orders.append(order)
        starts.append(torch.searchsorted(ordered, every, out_int32=True))
    if len(orders) == 1:
        return orders[0], starts[0]
    return torch.cat(orders), torch.cat(starts)


@planned
def _sums_plan(
    grad_output: torch.Tensor,
    grad_input: torch.Tensor,
    indices: torch.Tensor,
    fractions: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    length: int,
    small: bool,
    *modes: Any,
) -> Plan:
    dims, (images, channels), size = grad_input.dim() - 2, grad_input.shape[:2], grad_input.shape[2:]
    last, outputs = grad_output.stride(channel_dim(grad_output, dims)) == 1, order.numel()
    # By then all sources are alike. A pixel adds up one output at a time: registers are for channels, however
    # many taps there are.
    kind = Source.GRID, Interpolation.BILINEAR
    problem = configs.Problem.of("sorted sum", kind, images, channels, size, grad_output, last, backward=True)
    problem = problem._replace(dims=2)
    index = index_dtype(grad_output, grad_input) if small else tl.int64
    tile, compute = configs.choose(grad_input.device, problem), compute_dtypes(fractions)[0]
    work = cut(problem, tile, (Source.GRID, *modes[1:]), (size, size), compute, index)
    output_sizes, output_strides = zip(*_pixel_axes(grad_output, dims))
    return work.plan(
        sort_sums_kernel,
        (grad_output, grad_input, indices, fractions, order, starts),
        {"input": grad_input, "output": grad_output},
        {
            **{f"stride_output_{axis}": stride for axis, stride in enumerate((*output_strides, 0, 0, 0)[:4])},
            **{f"output_size_{axis}": count for axis, count in enumerate((*output_sizes, 0, 0)[:3])},
            "images": images,
            "outputs": outputs // images,
            "length": length,
            "lists": triton.cdiv(outputs, length),
        },
        pixel_axes=len(output_sizes),
        coord_tangent=fractions.shape[1] > dims,
    )


def sorted_backward(
    grad_output: torch.Tensor,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    grad_input: torch.Tensor,
    source: int,
    interpolation: int,
    padding: int,
    align_corners: bool,
    coord_tangent: torch.Tensor | None = None,
) -> None:
    """Fills ``grad_input``, of any strides and dtype, with d image: always the same bits.

    ``coord_tangent``, (N, T, *size, dims) of any strides: a tangent of the source's coordinates (normalised;
    of a flow, in pixels). Then it is the tangent of d image, which is linear in it.
    """
    dims, size = grad_input.dim() - 2, grad_output.shape[2 - grad_input.dim() :]
    images, cells = grad_input.shape[0], grad_input.shape[2:].numel()
    outputs = grad_output.shape[1 : channel_dim(grad_output, dims)].numel() * size.numel()
    if grad_input.numel() == 0:
        return
    if outputs == 0 or (coord_tangent is not None and interpolation == Interpolation.NEAREST):
        grad_input.zero_()
        return
    modes = source, interpolation, padding, align_corners
    fractions = dims if coord_tangent is None else 2 * dims
    small = max(outputs * fractions, cells) < INT32_MAX
    at_once = max(1, min(OUTPUTS_AT_ONCE // outputs, (INT32_MAX - 1) // cells))
    for first in range(0, images, at_once):
        part = slice(first, first + at_once)
        count = min(at_once, images - first)
        key = torch.int32 if count * cells < INT32_MAX else torch.int64
        keys = grad_input.new_empty(count * outputs, dtype=key)
        indices = grad_input.new_empty((count * outputs, dims), dtype=torch.int32)
        compute = compute_dtypes(grad_output, params)[1]
        places = indices, grad_input.new_empty((count * outputs, fractions), dtype=compute)
        tangents = () if coord_tangent is None else (coord_tangent[part],)
        pointers = parameters.pointers(params if params.shape[0] == 1 else params[part], control_points)

        tensors = keys, *places, *(tangents or (None,)), pointers[0], control_points
        plan = _keys_plan(tensors, count, (grad_input.shape[2:], size), small, *modes)
        plan(keys, *places, *tangents, *pointers)
        length = min(count * outputs, LIST_LENGTH)
        lists = grad_output[part], grad_input[part], *places, *_sort(keys, length, count * cells)
        _sums_plan(lists, length, small, *modes)(*lists)
