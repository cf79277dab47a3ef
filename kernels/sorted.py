"""d image without atomics: outputs sorted by where they read, then one sum for each input pixel.

For any coordinate source, always the same bits (``kernels/README.md`` has the proof):

1. ``sorted_keys_kernel``, for each output pixel: its pixel coordinates, and as its key the cell they lie in,
   which is an input pixel;
2. a stable sort of the keys, and a table of where each cell's outputs begin;
3. ``sorted_sum_kernel``, for each input pixel: only outputs of the cells around it read it; they are added up
   in the list's order, and the sum is stored once.

Pixels are a column and channels a row of every block, as in ``sample.py``.
"""

import torch
import triton
import triton.language as tl

from . import configs, sources
from .coordinates import constant, in_bounds, unnormalise_grad
from .interpolation import at_pixel, axis_tap_count, axis_taps, axis_taps_grad
from .launch import INT32_MAX, channel_dim, compute_dtypes, index_dtype, launch, vector_width
from .modes import Interpolation, Source
from .sample import channel_block
from .tiles import axes, existing, output_pixels, pixel_offset, rounded, strides

# Images are done together as long as their outputs are not more than this: beyond, memory would grow and
# nothing be gained.
OUTPUTS_AT_ONCE = 2**24
# PyTorch sorts fewer than 2^31 at once; what is more than this is several lists.
LIST_LENGTH = 2**30
# Outputs of one row of cells that an input pixel adds up alone; of what is left the whole program takes part.
ALONE = constant(32)

UNSPECIALIZED = (
    "source_ptr",
    "control_ptr",
    "controls",
    *(f"source_stride_{i}" for i in range(5)),
    *(f"stride_moved_{axis}" for axis in "ntkxyz"),
    *(f"stride_in_{axis}" for axis in "nxyz"),
    "stride_out_n",
    *(f"stride_out_{axis}" for axis in range(4)),
    *(f"out_size_{axis}" for axis in range(3)),
    *(f"{tensor}_{size}" for tensor in ("in", "out") for size in ("width", "height", "depth")),
    "batch",
    "transforms",
    "outputs",
    "channels",
    "images",
    "length",
    "lists",
    "column_tiles",
    "row_tiles",
    "splits",
    "split_blocks",
)
CHANNEL_STRIDES = ("stride_out_c", "stride_in_c")


@triton.jit
def axis_cell(
    x,
    size,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The cell of pixel coordinate ``x``, in [0, size), and whether any pixel is read from there.

    It is the lower one of the pixels that the one tap or the two middle taps read: of n taps, pixel q is one
    in cells q - n // 2 to q - n // 2 + n - 1 alone.
    """
    TAPS: tl.constexpr = axis_tap_count(INTERPOLATION)
    indices, inside, _ = axis_taps(x, size, INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE)
    cell = tl.minimum(indices[(TAPS - 1) // 2], indices[TAPS // 2])
    read = inside[0]
    for k in tl.static_range(1, TAPS):
        read = read | inside[k]
    return tl.minimum(tl.maximum(cell, 0), size - 1), read


@triton.jit
def weight_and_slope(
    x,
    q,
    size,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    COMPUTE: tl.constexpr,
    MOVED: tl.constexpr,
):
    """The weight with which coordinate ``x`` reads pixel ``q``, and with MOVED its derivative by ``x``."""
    indices, inside, weights = axis_taps(x, size, INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE)
    weight = at_pixel(q, indices, inside, weights, INTERPOLATION, COMPUTE)
    slope = tl.zeros(x.shape, COMPUTE)
    if MOVED:
        slopes = axis_taps_grad(x, size, INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE)
        slope = at_pixel(q, indices, inside, slopes, INTERPOLATION, COMPUTE)
    return weight, slope


@triton.jit
def output_weight(
    record,
    read,
    q,
    in_size,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    MOVED: tl.constexpr,
):
    """The weight of the outputs with these records in the sums of pixels ``q``; 0 where not ``read``.

    A record is the pixel coordinates, and with MOVED their tangent: then it is the weight's.
    """
    x = tl.load(record, read, other=0.0)
    y = tl.load(record + 1, read, other=0.0)
    x, x_slope = weight_and_slope(x, q[0], in_size[0], INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE, MOVED)
    y, y_slope = weight_and_slope(y, q[1], in_size[1], INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE, MOVED)
    if MOVED:
        plane = tl.load(record + DIMS, read, other=0.0) * x_slope * y
        plane += tl.load(record + DIMS + 1, read, other=0.0) * x * y_slope
    else:
        plane = x * y
    if DIMS == 3:
        z = tl.load(record + 2, read, other=0.0)
        z, z_slope = weight_and_slope(
            z, q[2], in_size[2], INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE, MOVED
        )
        weight = plane * z
        if MOVED:
            weight += tl.load(record + DIMS + 2, read, other=0.0) * z_slope * x * y
    else:
        weight = plane
    return tl.where(read, weight, 0.0)


@triton.jit
def output_offset(i, sizes, strides, AXES: tl.constexpr, VECTOR: tl.constexpr):
    """The offset of output pixel ``i`` of an image, whose pixels lie along AXES axes, innermost first."""
    if AXES == 1:
        offset = i * strides[0]
    else:
        further = i // sizes[0]
        offset = (i - further * sizes[0]) * strides[0]
        for axis in tl.static_range(1, AXES - 1):
            i = further
            further = i // sizes[axis]
            offset += (i - further * sizes[axis]) * strides[axis]
        offset += further * strides[AXES - 1]
    return tl.multiple_of(offset, (VECTOR, VECTOR))


@triton.jit
def add_outputs(
    sums,
    position,
    read,
    q,
    order_ptr,
    before,
    records_ptr,
    image,
    block,
    channels,
    stride_out_c,
    out_sizes,
    out_strides,
    in_size,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    AXES: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    MOVED: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Adds to ``sums``, (UNROLL of) [pixels, channels], one output each: weight x gradient.

    position: the outputs' places in the list, [pixels, 1]; ``before`` is the first output's number in it.
    A gradient of weight 0 is not read: what is no number stays where it was.
    """
    i = (tl.load(order_ptr + position, read, other=0) - before).to(INDEX)
    record = records_ptr + i * (2 * DIMS if MOVED else DIMS)
    weight = output_weight(
        record, read, q, in_size, INTERPOLATION, PADDING, ALIGN_CORNERS, DIMS, COMPUTE, MOVED
    )
    target = image + output_offset(i, out_sizes, out_strides, AXES, VECTOR)
    new = ()
    for step in tl.static_range(UNROLL):
        c, exists = channel_block(block * UNROLL + step, channels, BLOCK_CHANNELS, EVEN_CHANNELS, INDEX)
        g = tl.load(target + c * stride_out_c, (weight != 0) & exists, other=0.0).to(COMPUTE)
        new += (sums[step] + weight * g,)
    return new


@triton.jit
def cell_row(
    starts_ptr, q, row, in_size, exists, TAPS: tl.constexpr, DIMS: tl.constexpr, INDEX: tl.constexpr
):
    """Where the outputs of one row of the cells around pixels ``q`` begin and end in the list."""
    y = q[1] + (row % TAPS - TAPS // 2)
    exists = exists & in_bounds(y, in_size[1])
    cell = y.to(INDEX)
    if DIMS == 3:
        z = q[2] + (row // TAPS - TAPS // 2)
        exists = exists & in_bounds(z, in_size[2])
        cell += z.to(INDEX) * in_size[1]
    cell *= in_size[0]
    first = tl.maximum(q[0] - TAPS // 2, 0)
    last = tl.minimum(q[0] + (TAPS - TAPS // 2), in_size[0])
    return tl.load(starts_ptr + (cell + first), exists, other=0), tl.load(
        starts_ptr + (cell + last), exists, other=0
    )


@triton.jit
def at(values, chosen):
    """The one entry of a column that is ``chosen``."""
    return tl.sum(tl.sum(tl.where(chosen, values, 0), 1), 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sorted_keys_kernel(
    keys_ptr,
    records_ptr,
    moved_ptr,
    source_ptr,
    source_stride_0,
    source_stride_1,
    source_stride_2,
    source_stride_3,
    source_stride_4,
    control_ptr,
    controls,
    stride_moved_n,
    stride_moved_t,
    stride_moved_x,
    stride_moved_y,
    stride_moved_z,
    stride_moved_k,
    in_width,
    in_height,
    in_depth,
    out_width,
    out_height,
    out_depth,
    batch,
    transforms,
    column_tiles,
    row_tiles,
    SOURCE: tl.constexpr,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    GROUP: tl.constexpr,
    MOVED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The cell that each output pixel lies in, and its record.

    keys_ptr: image x cells + cell, or images x cells where nothing is read; outputs in the order (image,
    transform, pixel).
    records_ptr: in the same order DIMS pixel coordinates, in COMPUTE, and with MOVED as many tangents.
    moved_ptr, stride_moved_*: the tangents in the source's unit, strides by image, transform, x, y, z and
    component. The rest as in ``sample_forward_kernel``.
    """
    KEY: tl.constexpr = keys_ptr.dtype.element_ty
    RECORD: tl.constexpr = 2 * DIMS if MOVED else DIMS
    pid = tl.program_id(0)
    tiles = column_tiles * row_tiles
    b = pid // tiles * GROUP
    source = (source_ptr, source_stride_0, source_stride_1, source_stride_2, source_stride_3, source_stride_4)
    in_size = (in_width, in_height, in_depth)
    out_size = (out_width, out_height, out_depth)
    stride_moved = (stride_moved_x, stride_moved_y, stride_moved_z)
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
    cells = in_size[0].to(KEY) * in_size[1]
    pixels = out_size[0].to(tl.int64) * out_size[1]
    if DIMS == 3:
        cells *= in_size[2]
        pixels *= out_size[2]
    pixel = pixel_offset(out, (1, out_size[0], out_size[0].to(INDEX) * out_size[1]), DIMS, INDEX)
    if MOVED:
        moved_offset = pixel_offset(out, stride_moved, DIMS, INDEX)
    for g in tl.static_range(GROUP):
        n, t = outputs[g]
        kept = existing(mask, b + g, batch)
        x, read = axis_cell(p[g][0], in_width, INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE)
        y, read_y = axis_cell(p[g][1], in_height, INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE)
        read = read & read_y
        cell = y.to(KEY)
        if DIMS == 3:
            z, read_z = axis_cell(p[g][2], in_depth, INTERPOLATION, PADDING, ALIGN_CORNERS, COMPUTE)
            read = read & read_z
            cell += z.to(KEY) * in_height
        cell = cell * in_width + x
        key = tl.where(read, n.to(KEY) * cells + cell, (batch // transforms).to(KEY) * cells)
        first = (b + g).to(tl.int64) * pixels
        tl.store(keys_ptr + first + pixel, key, kept)
        record = records_ptr + first * RECORD + pixel * RECORD
        for k in tl.static_range(DIMS):
            tl.store(record + k, p[g][k], kept)
        if MOVED:
            moved = moved_ptr + n * stride_moved_n + t * stride_moved_t + moved_offset
            for k in tl.static_range(DIMS):
                tangent = tl.load(moved + tl.cast(k, INDEX) * stride_moved_k, kept, other=0.0).to(COMPUTE)
                if SOURCE != sources.FLOW:
                    tangent *= unnormalise_grad(in_size[k], ALIGN_CORNERS, COMPUTE)
                tl.store(record + DIMS + k, tangent, kept)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=CHANNEL_STRIDES)
def sorted_sum_kernel(
    grad_output_ptr,
    grad_input_ptr,
    records_ptr,
    order_ptr,
    starts_ptr,
    stride_out_n,
    stride_out_c,
    stride_out_0,
    stride_out_1,
    stride_out_2,
    stride_out_3,
    out_size_0,
    out_size_1,
    out_size_2,
    stride_in_n,
    stride_in_c,
    stride_in_x,
    stride_in_y,
    stride_in_z,
    in_width,
    in_height,
    in_depth,
    images,
    outputs,
    channels,
    length,
    lists,
    column_tiles,
    row_tiles,
    splits,
    split_blocks,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    AXES: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    MOVED: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    VECTOR_IN: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """grad_input = for each input pixel the sum of the outputs that read it.

    grad_output_ptr: stride_out_n, _c and those of the AXES axes of its pixels (out_size_*), innermost first.
    grad_input_ptr: written with stride_in_*.
    records_ptr: what ``sorted_keys_kernel`` wrote.
    order_ptr: the numbers of the outputs, sorted, in ``lists`` lists of ``length``, each from 0 on.
    starts_ptr: for each list where each of images x cells begins in it, and where the last one ends.
    outputs: output pixels of an image. Tiles are of input pixels; the rest as in ``sample_forward_kernel``.
    """
    TAPS: tl.constexpr = axis_tap_count(INTERPOLATION)
    ROWS: tl.constexpr = TAPS * TAPS if DIMS == 3 else TAPS
    PIXELS: tl.constexpr = BLOCK_ROWS * BLOCK_COLUMNS
    pid = tl.program_id(0)
    tiles = column_tiles * row_tiles
    split = (pid // tiles) % splits
    n = (pid // (tiles * splits)).to(tl.int64)
    in_size = (in_width, in_height, in_depth)
    stride_in = (stride_in_x, stride_in_y, stride_in_z)
    out_sizes = (out_size_0, out_size_1, out_size_2)
    out_strides = (stride_out_0, stride_out_1, stride_out_2, stride_out_3)
    q, mask = output_pixels(pid % tiles, column_tiles, in_size, DIMS, BLOCK_ROWS, BLOCK_COLUMNS, INDEX)
    lane = tl.arange(0, PIXELS)[:, None]
    cells = in_size[0].to(tl.int64) * in_size[1]
    if DIMS == 3:
        cells *= in_size[2]
    image = grad_output_ptr + tl.multiple_of(n * stride_out_n, VECTOR_OUT)
    target = grad_input_ptr + tl.multiple_of(n * stride_in_n, VECTOR_IN)
    target += tl.multiple_of(pixel_offset(q, stride_in, DIMS, INDEX), (VECTOR_IN, VECTOR_IN))
    records = records_ptr + n * outputs * (2 * DIMS if MOVED else DIMS)
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(channels, BLOCK_CHANNELS * UNROLL))
    for block in range(first, last):
        sums = ()
        for _ in tl.static_range(UNROLL):
            sums += (tl.zeros([PIXELS, BLOCK_CHANNELS], COMPUTE),)
        for number in range(lists):
            part = tl.cast(number, tl.int64)
            order = order_ptr + part * length
            before = n * outputs - part * length
            starts = starts_ptr + part * (images * cells + 1) + n * cells
            for row in range(ROWS):
                begin, end = cell_row(starts, q, row, in_size, mask, TAPS, DIMS, INDEX)
                # alone, or together from ALONE on: whichever takes fewer steps
                alone = tl.max(tl.max(end - begin, 1), 0)
                left = tl.maximum(end - begin - ALONE, 0)
                together = ALONE + tl.sum(tl.sum((left + (PIXELS - 1)) // PIXELS, 1), 0)
                steps = tl.where(together < alone, ALONE, alone)
                for k in range(steps):
                    sums = add_outputs(
                        sums,
                        begin + k,
                        begin + k < end,
                        q,
                        order,
                        before,
                        records,
                        image,
                        block,
                        channels,
                        stride_out_c,
                        out_sizes,
                        out_strides,
                        in_size,
                        INTERPOLATION,
                        PADDING,
                        ALIGN_CORNERS,
                        DIMS,
                        AXES,
                        COMPUTE,
                        INDEX,
                        MOVED,
                        VECTOR_OUT,
                        EVEN_CHANNELS,
                        BLOCK_CHANNELS,
                        UNROLL,
                    )
                waiting = tl.where(end - begin > steps, lane, PIXELS)
                helped = tl.min(tl.min(waiting, 1), 0)
                while helped < PIXELS:
                    chosen = lane == helped
                    pixel = (at(q[0], chosen), at(q[1], chosen))
                    if DIMS == 3:
                        pixel += (at(q[2], chosen),)
                    shares = ()
                    for _ in tl.static_range(UNROLL):
                        shares += (tl.zeros([PIXELS, BLOCK_CHANNELS], COMPUTE),)
                    stop = at(end, chosen)
                    for start in range(at(begin, chosen) + steps, stop, PIXELS):
                        shares = add_outputs(
                            shares,
                            start + lane,
                            start + lane < stop,
                            pixel,
                            order,
                            before,
                            records,
                            image,
                            block,
                            channels,
                            stride_out_c,
                            out_sizes,
                            out_strides,
                            in_size,
                            INTERPOLATION,
                            PADDING,
                            ALIGN_CORNERS,
                            DIMS,
                            AXES,
                            COMPUTE,
                            INDEX,
                            MOVED,
                            VECTOR_OUT,
                            EVEN_CHANNELS,
                            BLOCK_CHANNELS,
                            UNROLL,
                        )
                    new = ()
                    for step in tl.static_range(UNROLL):
                        share = tl.sum(shares[step], 0, keep_dims=True)
                        new += (sums[step] + tl.where(chosen, share, 0.0),)
                    sums = new
                    waiting = tl.where(chosen, PIXELS, waiting)
                    helped = tl.min(tl.min(waiting, 1), 0)
        for step in tl.static_range(UNROLL):
            c, exists = channel_block(block * UNROLL + step, channels, BLOCK_CHANNELS, EVEN_CHANNELS, INDEX)
            tl.store(target + c * stride_in_c, rounded(sums[step], grad_input_ptr), mask & exists)


# ------------------------------------------------------------------------------------ launchers
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


def _tiles(tile: configs.Tile, columns: int, rows: int) -> tuple[int, int]:
    return triton.cdiv(columns, tile.columns), triton.cdiv(rows, tile.rows)


def _keys(
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    moved: torch.Tensor | None,
    keys: torch.Tensor,
    records: torch.Tensor,
    images: int,
    size: torch.Size,
    source: int,
    interpolation: int,
    small: bool,
    shared: dict,
) -> None:
    """Fills ``keys`` and ``records``."""
    columns, rows = size[-1], size[:-1].numel()
    batch = keys.numel() // size.numel()
    problem = configs.Problem(
        kernel="sorted keys",
        source=source,
        images=batch,
        channels=1,
        rows=rows,
        columns=columns,
        element_size=records.element_size(),
        channels_last=False,
        interpolation=interpolation,
        dims=len(size),
        backward=False,
    )
    tile = configs.choose(keys.device, problem)
    group = tile.group
    column_tiles, row_tiles = _tiles(tile, columns, rows)
    stride_moved: tuple = (0,) * 6
    if moved is not None:
        stride_moved = *moved.stride()[:2], *axes(moved.stride()[2:-1]), moved.stride(-1)
    launch(
        sorted_keys_kernel,
        triton.cdiv(batch, group) * column_tiles * row_tiles,
        keys.device,
        keys,
        records,
        records if moved is None else moved,
        *sources.pack(source, params, control_points),
        *stride_moved,
        **dict(zip(("out_width", "out_height", "out_depth"), axes(size))),
        batch=batch,
        transforms=batch // images,
        column_tiles=column_tiles,
        row_tiles=row_tiles,
        SOURCE=int(source),
        INDEX=index_dtype(params, *(() if moved is None else (moved,))) if small else tl.int64,
        GROUP=group,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        num_warps=tile.warps,
        **shared,
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


def _sums(
    grad_output: torch.Tensor,
    grad_input: torch.Tensor,
    records: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    length: int,
    small: bool,
    shared: dict,
) -> None:
    """Fills ``grad_input``."""
    dims, (images, channels) = grad_input.dim() - 2, grad_input.shape[:2]
    columns, rows = grad_input.shape[-1], grad_input.shape[2:-1].numel()
    stride_out_c = grad_output.stride(channel_dim(grad_output, dims))
    problem = configs.Problem(
        kernel="sorted sum",
        source=Source.GRID,  # by then all are alike
        images=images,
        channels=channels,
        rows=rows,
        columns=columns,
        element_size=grad_output.element_size(),
        channels_last=stride_out_c == 1,
        # a pixel adds up one output at a time: registers are for channels, however many taps there are
        interpolation=Interpolation.BILINEAR,
        dims=2,
        backward=True,
    )
    tile = configs.choose(grad_input.device, problem)
    block = tile.channels * tile.unroll
    blocks = triton.cdiv(channels, block)
    split_blocks = triton.cdiv(blocks, tile.splits)
    splits = triton.cdiv(blocks, split_blocks)
    column_tiles, row_tiles = _tiles(tile, columns, rows)
    out_sizes, out_strides = zip(*_pixel_axes(grad_output, dims))
    stride_in_n, _, *stride_in = strides(grad_input, dims)
    launch(
        sorted_sum_kernel,
        images * column_tiles * row_tiles * splits,
        grad_input.device,
        grad_output,
        grad_input,
        records,
        order,
        starts,
        grad_output.stride(0),
        stride_out_c,
        *(*out_strides, 0, 0, 0)[:4],
        *(*out_sizes, 0, 0)[:3],
        stride_in_n,
        *stride_in,
        images=images,
        outputs=order.numel() // images,
        channels=channels,
        length=length,
        lists=triton.cdiv(order.numel(), length),
        column_tiles=column_tiles,
        row_tiles=row_tiles,
        splits=splits,
        split_blocks=split_blocks,
        AXES=len(out_sizes),
        INDEX=index_dtype(grad_output, grad_input) if small else tl.int64,
        VECTOR_OUT=vector_width(grad_output, dims),
        VECTOR_IN=vector_width(grad_input, dims),
        EVEN_CHANNELS=channels % block == 0,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        BLOCK_CHANNELS=tile.channels,
        UNROLL=tile.unroll,
        num_warps=tile.warps,
        **shared,
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
    moved: torch.Tensor | None = None,
) -> None:
    """Fills ``grad_input``, of any strides and dtype, with d image: always the same bits.

    ``moved``, (N, T, *size, dims) of any strides: a tangent of the source's coordinates (normalised; of a
    flow, in pixels). Then it is the tangent of d image, which is linear in it.
    """
    dims, size = grad_input.dim() - 2, grad_output.shape[2 - grad_input.dim() :]
    images, cells = grad_input.shape[0], grad_input.shape[2:].numel()
    outputs = grad_output.shape[1 : channel_dim(grad_output, dims)].numel() * size.numel()
    if grad_input.numel() == 0:
        return
    if outputs == 0 or (moved is not None and interpolation == Interpolation.NEAREST):
        grad_input.zero_()
        return
    compute, compute_torch = compute_dtypes(grad_output, params)
    shared = {
        **dict(zip(("in_width", "in_height", "in_depth"), axes(grad_input.shape[2:]))),
        "INTERPOLATION": int(interpolation),
        "PADDING": int(padding),
        "ALIGN_CORNERS": int(align_corners),
        "DIMS": dims,
        "COMPUTE": compute,
        "MOVED": moved is not None,
    }
    record = dims if moved is None else 2 * dims
    small = max(outputs * record, cells) < INT32_MAX
    at_once = max(1, min(OUTPUTS_AT_ONCE // outputs, (INT32_MAX - 1) // cells))
    for first in range(0, images, at_once):
        part = slice(first, first + at_once)
        count = min(at_once, images - first)
        key = torch.int32 if count * cells < INT32_MAX else torch.int64
        keys = grad_input.new_empty(count * outputs, dtype=key)
        records = grad_input.new_empty((count * outputs, record), dtype=compute_torch)
        _keys(
            params if params.shape[0] == 1 else params[part],
            control_points,
            None if moved is None else moved[part],
            keys,
            records,
            count,
            size,
            source,
            interpolation,
            small,
            shared,
        )
        length = min(count * outputs, LIST_LENGTH)
        order, starts = _sort(keys, length, count * cells)
        _sums(grad_output[part], grad_input[part], records, order, starts, length, small, shared)
