"""The coordinates of a source written out: the one place where a grid is held in memory, on request.

grid[b, o] = source(o) in normalised units; its transpose sums the gradient as the sampler does.
"""

import torch
import triton.language as tl

from .device import sources
from .device.arithmetic import rounded
from .device.programs import block_of, work_of
from .device.tiles import offset_of
from .host import configs, parameters
from .host.cut import cut, image_numbers, source_numbers
from .host.launch import Plan, compute_dtypes, index_dtype, planned
from .modes import Interpolation, Padding
from .spec import Params, Sizes, Strides, Tiling, kernel


@kernel()
def grid_kernel(
    grid_ptr, partial_ptr, source_ptr, control_ptr,
    stride_grid_n, stride_grid_c, stride_grid_x, stride_grid_y, stride_grid_z,
    stride_source_0, stride_source_1, stride_source_2, stride_source_3, stride_source_4, num_controls,
    out_width, out_height, out_depth, batch, transforms, column_tiles, row_tiles,
    SPEC: tl.constexpr,
):  # fmt: skip
    """Writes the grid; for ``source_grad``, reads its gradient there and reduces it to the source's.

    grid_ptr: (batch, [D,] H, W, dims), an image with a channel for each axis. partial_ptr: as in
    ``sample_backward_kernel``.
    """
    size = (out_width, out_height, out_depth)
    sizes = Sizes(size, size, batch, transforms, 1, (1, 1, 1))  # no matter what image the grid is for
    stride_source = (stride_source_0, stride_source_1, stride_source_2, stride_source_3, stride_source_4)
    params = Params(source_ptr, stride_source, control_ptr, num_controls)
    work = work_of(params, sizes, Tiling(column_tiles, row_tiles, 1, 1, 1), SPEC)
    block = block_of(work, work.b * 0, sizes, SPEC)
    strides = Strides(stride_grid_n, 0, stride_grid_c, (stride_grid_x, stride_grid_y, stride_grid_z))
    begin = grid_ptr + work.b.to(tl.int64) * stride_grid_n
    if SPEC.source_grad:
        gradients = (sources.dense_load(begin, strides, block.out, block.mask, SPEC),)
        sums = sources.zero_sums(SPEC)
        sums = sources.add_gradient(partial_ptr, sums, work, gradients, block, sizes, SPEC)
        sources.store_sums(partial_ptr, sums, work, sizes, SPEC)
    else:
        coordinates = sources.coordinates_of(work, block.out, block.mask, sizes, SPEC)
        offset = offset_of(block.out, strides.pixel, 1, SPEC)
        for k in tl.static_range(SPEC.dims):
            target = begin + (offset + tl.cast(stride_grid_c, SPEC.index) * k)  # twice of it may pass 2^31
            tl.store(target, rounded(coordinates[0][k], grid_ptr), block.mask)


@planned
def _plan(
    grid: torch.Tensor,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    source: int,
    align_corners: bool,
    backward: bool,
    control_grad: bool,
) -> tuple[Plan, parameters.Sums]:
    modes = source, Interpolation.NEAREST, Padding.ZEROS, align_corners
    size, kernel = grid.shape[1:-1], "grid backward" if backward else "grid"
    problem = configs.Problem.of(kernel, modes, grid.shape[0], 1, size, grid, backward=backward)
    compute = compute_dtypes(params) if control_points is None else compute_dtypes(params, control_points)
    index = index_dtype(grid, rows=problem.rows)
    tile = configs.choose(grid.device, problem)._replace(group=1)
    work = cut(problem, tile, modes, (size, size), compute[0], index)
    plan = work.plan(
        grid_kernel,
        (grid, grid, *parameters.pointers(params, control_points)),  # the second: or the buffer of the sums
        {},
        {
            **source_numbers(source, params, control_points),
            **image_numbers("grid", grid.movedim(-1, 1), len(size)),
            "transforms": params.shape[1] if params.dim() == 4 else 1,
        },
        fixed_point=False,
        source_grad=backward,
        control_grad=control_grad,
    )
    return plan, work.sums(compute[1], control_points if control_grad else None)


def grid_forward(
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    grid: torch.Tensor,
    source: int,
    align_corners: bool,
) -> None:
    """Fills ``grid``, (N, [D,] H, W, dims), with normalised coordinates."""
    plan, _ = _plan((grid, params, control_points), source, align_corners, False, False)
    plan(grid, grid, *parameters.pointers(params, control_points))


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
    buffer = parameters.gradient_buffer(source, params, sums)
    plan(grad_grid, buffer, *parameters.pointers(params, control_points))
    return parameters.reduce_gradient(source, params, buffer, control_points if control_grad else None)
