"""The coordinates of a source written out: the one place where a grid is held in memory, on request.

grid[b, o] = source(o) in normalised units; its transpose sums the gradient as the sampler does.
"""

import torch
import triton
import triton.language as tl

from . import configs, sources
from .launch import Plan, compute_dtypes, index_dtype, planned
from .modes import Interpolation
from .tiles import axes, output_pixels, pixel_offset, rounded

UNSPECIALIZED = (
    "grid_ptr",
    "source_ptr",
    "control_ptr",
    "controls",
    "grad_source_ptr",
    *(f"source_stride_{i}" for i in range(5)),
    *(f"stride_{axis}" for axis in ("b", "k", "x", "y", "z")),
    *(f"out_{size}" for size in ("width", "height", "depth")),
    "batch",
    "transforms",
    "column_tiles",
    "row_tiles",
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def grid_kernel(
    grid_ptr,
    grad_source_ptr,
    source_ptr,
    source_stride_0,
    source_stride_1,
    source_stride_2,
    source_stride_3,
    source_stride_4,
    control_ptr,
    controls,
    stride_b,
    stride_k,
    stride_x,
    stride_y,
    stride_z,
    out_width,
    out_height,
    out_depth,
    batch,
    transforms,
    column_tiles,
    row_tiles,
    SOURCE: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DIMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    BACKWARD: tl.constexpr,
    CONTROL_GRAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Writes the grid; or, BACKWARD, reads its gradient there and reduces it to that of the source.

    grid_ptr: (batch, [D,] H, W, DIMS) with strides stride_b, _z, _y, _x, _k.
    grad_source_ptr: the buffer of ``sources.gradient_buffer``, only for BACKWARD.
    """
    pid = tl.program_id(0)
    tiles = column_tiles * row_tiles
    tile = pid % tiles
    b = pid // tiles
    source = (source_ptr, source_stride_0, source_stride_1, source_stride_2, source_stride_3, source_stride_4)
    out_size = (out_width, out_height, out_depth)
    out, mask = output_pixels(tile, column_tiles, out_size, DIMS, BLOCK_ROWS, BLOCK_COLUMNS, INDEX)
    target = (
        grid_ptr + b.to(tl.int64) * stride_b + pixel_offset(out, (stride_x, stride_y, stride_z), DIMS, INDEX)
    )
    stride_k = tl.cast(stride_k, INDEX)  # twice of it may pass 2^31
    outputs = sources.outputs_of(b, batch, transforms, 1)
    matrix = sources.matrix_for(source, outputs, SOURCE, DIMS, COMPUTE)
    if BACKWARD:
        # a third entry is there in 2-D too, where no one reads it
        g_x = tl.load(target, mask, other=0.0).to(COMPUTE)
        g_y = tl.load(target + stride_k, mask, other=0.0).to(COMPUTE)
        g_z = tl.load(target + (DIMS - 1) * stride_k, mask, other=0.0).to(COMPUTE)
        sums = sources.backward(
            grad_source_ptr,
            sources.zero_sums(SOURCE, DIMS, BLOCK_ROWS * BLOCK_COLUMNS, COMPUTE),
            source,
            matrix,
            control_ptr,
            controls,
            outputs,
            ((g_x, g_y, g_z),),
            out,
            out_size,
            mask,
            b,
            batch,
            0,
            tile,
            tiles,
            SOURCE,
            1,
            CONTROL_GRAD,
            ALIGN_CORNERS,
            DIMS,
            INDEX,
            COMPUTE,
        )
        sources.store_sums(grad_source_ptr, sums, b, tile, tiles, SOURCE, DIMS)
    else:
        p = sources.coordinates(
            source,
            matrix,
            control_ptr,
            controls,
            outputs,
            out,
            out_size,
            mask,
            SOURCE,
            1,
            ALIGN_CORNERS,
            DIMS,
            INDEX,
            COMPUTE,
        )
        for k in tl.static_range(DIMS):
            tl.store(target + k * stride_k, rounded(p[0][k], grid_ptr), mask)


@planned
def _plan(
    grid: torch.Tensor,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    source: int,
    align_corners: bool,
    backward: bool,
    control_grad: bool,
) -> tuple[Plan, sources.Sums]:
    dims = grid.shape[-1]
    size = grid.shape[1:-1]
    columns, rows = size[-1], size[:-1].numel()
    problem = configs.Problem(
        kernel="grid backward" if backward else "grid",
        source=source,
        images=grid.shape[0],
        channels=1,
        rows=rows,
        columns=columns,
        element_size=grid.element_size(),
        channels_last=False,
        interpolation=Interpolation.NEAREST,
        dims=dims,
        backward=backward,
    )
    tile = configs.choose(grid.device, problem)
    column_tiles, row_tiles = triton.cdiv(columns, tile.columns), triton.cdiv(rows, tile.rows)
    tiles = column_tiles * row_tiles
    compute = compute_dtypes(params) if control_points is None else compute_dtypes(params, control_points)
    controls = control_points.shape[0] if control_grad and control_points is not None else 0
    stride = grid.stride()
    plan = Plan(
        grid_kernel,
        grid.shape[0] * tiles,
        grid.device,
        grid,
        grid,  # or the buffer of the sums
        *sources.pack(source, params, control_points),
        stride[0],
        stride[-1],
        *axes(stride[1:-1]),
        *axes(size),
        batch=grid.shape[0],
        transforms=params.shape[1] if params.dim() == 4 else 1,
        column_tiles=column_tiles,
        row_tiles=row_tiles,
        SOURCE=int(source),
        ALIGN_CORNERS=int(align_corners),
        DIMS=dims,
        COMPUTE=compute[0],
        INDEX=index_dtype(grid, rows=rows),
        BACKWARD=backward,
        CONTROL_GRAD=control_grad,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        num_warps=tile.warps,
    )
    return plan, sources.Sums(grid.shape[0], 1, tiles, compute[1], controls)


def grid_forward(
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    grid: torch.Tensor,
    source: int,
    align_corners: bool,
) -> None:
    """Fills ``grid``, (N, [D,] H, W, dims), with normalised coordinates."""
    plan, _ = _plan((grid, params, control_points), source, align_corners, False, False)
    plan(grid, grid, *sources.pointers(params, control_points))


def grid_backward(
    grad_grid: torch.Tensor,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    source: int,
    align_corners: bool,
    control_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """d params, and d control points if asked for, summed in a fixed order."""
    plan, sums = _plan((grad_grid, params, control_points), source, align_corners, True, control_grad)
    buffer = sources.gradient_buffer(source, params, *sums)
    plan(grad_grid, buffer, *sources.pointers(params, control_points))
    return sources.reduce_gradient(source, params, buffer, control_points if control_grad else None)
