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
from .modes import Interpolation, Padding, Source
from .spec import Spec, kernel

ROWS, COLUMNS, WARPS = 32, 16, 4  # of the matrix at a time: one program for the 19 coefficients of 16 points


@kernel()
def product_kernel(
    matrix_ptr, input_ptr, output_ptr, stride_matrix_row, stride_matrix_column,
    stride_input_n, stride_input_t, stride_input_k, stride_input_c,
    matrix_rows, matrix_columns, transforms, row_tiles,
    SPEC: tl.constexpr,
):  # fmt: skip
    """output = matrix input, in the output's type. matrix: (matrix_rows, matrix_columns), float64.

    input: (N, T, matrix_columns, 2). output: (N, T, matrix_rows, 2), contiguous. A program makes some rows of
    one of the N * T outputs.
    """
    b, row_tile = divided(tl.program_id(0), row_tiles)
    n, t = divided(b, transforms)
    row = row_tile * SPEC.rows + tl.arange(0, SPEC.rows)[:, None].to(SPEC.index)
    exists = row < matrix_rows
    begin = input_ptr + (n.to(tl.int64) * stride_input_n + t.to(tl.int64) * stride_input_t)
    x = tl.zeros([SPEC.rows, 1], SPEC.compute)
    y = tl.zeros([SPEC.rows, 1], SPEC.compute)
    for first in range(0, matrix_columns, SPEC.columns):
        column = first + tl.arange(0, SPEC.columns)[None, :].to(SPEC.index)
        given = column < matrix_columns
        entry = matrix_ptr + (row * stride_matrix_row + column * stride_matrix_column)
        entries = tl.load(entry, exists & given, other=0.0)
        point = begin + column * stride_input_k
        along_x = tl.load(point, given, other=0.0).to(SPEC.compute)
        along_y = tl.load(point + stride_input_c, given, other=0.0).to(SPEC.compute)
        x += tl.sum(entries * along_x, 1, keep_dims=True)
        y += tl.sum(entries * along_y, 1, keep_dims=True)
    target = output_ptr + (b.to(tl.int64) * matrix_rows + row) * 2
    tl.store(target, rounded(x, output_ptr), exists)
    tl.store(target + 1, rounded(y, output_ptr), exists)


# No pixel is sampled: what says how stays at values of no meaning.
_SPEC = Spec(
    source=int(Source.TPS),
    interpolation=int(Interpolation.BILINEAR),
    padding=(int(Padding.ZEROS),) * 2,
    align_corners=0,
    dims=2,
    compute=tl.float64,
    index=tl.int64,
    rows=ROWS,
    columns=COLUMNS,
)


@planned
def _plan(matrix: torch.Tensor, points: torch.Tensor, output: torch.Tensor) -> Plan:
    has_transforms, row_tiles = points.dim() == 4, triton.cdiv(matrix.shape[0], ROWS)
    return Plan(
        product_kernel,
        points.shape[:-2].numel() * row_tiles,
        points.device,
        *(matrix, points, output),
        stride_matrix_row=matrix.stride(0),
        stride_matrix_column=matrix.stride(1),
        stride_input_n=points.stride(0),
        stride_input_t=points.stride(1) if has_transforms else 0,
        stride_input_k=points.stride(-2),
        stride_input_c=points.stride(-1),
        matrix_rows=matrix.shape[0],
        matrix_columns=matrix.shape[1],
        transforms=points.shape[1] if has_transforms else 1,
        row_tiles=row_tiles,
        SPEC=_SPEC,
        num_warps=WARPS,
    )


def spline_product(matrix: torch.Tensor, points: torch.Tensor, output: torch.Tensor) -> None:
    """Fills ``output``, (N, [T,] rows, 2) and contiguous, with matrix @ points; both of any strides."""
    _plan((matrix, points, output))(matrix, points, output)
