"""A spline's coefficients from its points, and the gradient back: products with one matrix, in float64.

    coefficients[n, t, i] = sum over k of  inverse[i, k] points[n, t, k]

The matrix is the inverse of the spline's system without its last columns, (K + 3, K), from
``transforms.splines``. The gradient by the points is the product with its transpose.
"""

import torch
import triton
import triton.language as tl

from .device.arithmetic import divided, rounded
from .host.launch import Plan, planned
from .modes import Source
from .spec import SPECIALIZATION, Spec

ROWS, COLUMNS, WARPS = 32, 16, 4  # one program for the 19 coefficients of 16 points


@triton.jit(**SPECIALIZATION)
def product_kernel(
    matrix_ptr, input_ptr, output_ptr, stride_matrix_row, stride_matrix_column,
    stride_input_n, stride_input_t, stride_input_k, stride_input_c, rows, columns, transforms, row_tiles,
    SPEC: tl.constexpr,
):  # fmt: skip
    """output = matrix input, in the output's type. matrix: (rows, columns), float64.

    input: (N, T, columns, 2). output: (N, T, rows, 2), contiguous.
    """
    b, row_tile = divided(tl.program_id(0), row_tiles)
    n, t = divided(b, transforms)
    row = row_tile * SPEC.rows + tl.arange(0, SPEC.rows)[:, None].to(SPEC.index)
    begin = input_ptr + (n.to(tl.int64) * stride_input_n + t.to(tl.int64) * stride_input_t)
    x = tl.zeros([SPEC.rows, 1], SPEC.compute)
    y = tl.zeros([SPEC.rows, 1], SPEC.compute)
    for first in range(0, columns, SPEC.columns):
        column = first + tl.arange(0, SPEC.columns)[None, :].to(SPEC.index)
        exists = column < columns
        entry = matrix_ptr + (row * stride_matrix_row + column * stride_matrix_column)
        entries = tl.load(entry, exists & (row < rows), other=0.0)
        point = begin + column * stride_input_k
        along_x = tl.load(point, exists, other=0.0).to(SPEC.compute)
        along_y = tl.load(point + stride_input_c, exists, other=0.0).to(SPEC.compute)
        x += tl.sum(entries * along_x, 1, keep_dims=True)
        y += tl.sum(entries * along_y, 1, keep_dims=True)
    target = output_ptr + (b.to(tl.int64) * rows + row) * 2
    tl.store(target, rounded(x, output_ptr), row < rows)
    tl.store(target + 1, rounded(y, output_ptr), row < rows)


@planned
def _plan(points: torch.Tensor, matrix: torch.Tensor, output: torch.Tensor, transposed: bool) -> Plan:
    strides = matrix.stride()
    (rows, columns), (row, column) = (pair[::-1] if transposed else pair for pair in (matrix.shape, strides))
    row_tiles = triton.cdiv(rows, ROWS)
    has_transforms = points.dim() == 4
    return Plan(
        product_kernel,
        points.shape[:-2].numel() * row_tiles,
        points.device,
        *(matrix, points, output),
        stride_matrix_row=row,
        stride_matrix_column=column,
        stride_input_n=points.stride(0),
        stride_input_t=points.stride(1) if has_transforms else 0,
        stride_input_k=points.stride(-2),
        stride_input_c=points.stride(-1),
        rows=rows,
        columns=columns,
        transforms=points.shape[1] if has_transforms else 1,
        row_tiles=row_tiles,
        SPEC=Spec(
            source=int(Source.TPS),
            interpolation=0,
            padding=(0, 0),
            align_corners=0,
            dims=2,
            compute=tl.float64,
            index=tl.int64,
            rows=ROWS,
            columns=COLUMNS,
        ),
        num_warps=WARPS,
    )


def spline_product(
    matrix: torch.Tensor, points: torch.Tensor, output: torch.Tensor, transposed: bool
) -> None:
    """Fills ``output``, (N, [T,] rows, 2), with matrix @ points, or matrix.mT @ points."""
    _plan((points, matrix, output), transposed)(matrix, points, output)
