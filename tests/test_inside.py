"""The second way of the samplers, for blocks of outputs that read nothing outside the image.

It limits and masks nothing, so that a block that is told to lie inside and does not would read other memory:
images lie among NaNs here, and the interpreter checks every address.
"""

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from common import (
    MODES,
    PADDINGS,
    affine_witness,
    assert_band,
    assert_close,
    checked_addresses,
    place,
    quick_interpreter,
    witness,
)

from stn_triton.kernels import configs, interpolation, sample, sources
from stn_triton.kernels.modes import Interpolation, Padding, Source
from stn_triton.kernels.tiles import pixels_from

INF, NAN = math.inf, math.nan
INTERPOLATION = dict(zip(MODES, Interpolation))
PADDING = dict(zip(PADDINGS, Padding))
SIZE = 16

pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by).*encountered:RuntimeWarning"
)


@pytest.fixture(autouse=True)
def _quick():
    with quick_interpreter():
        yield


def on_pixels(scale, first):
    """The map of a SIZE-wide output's pixel 0 to pixel ``first`` of a SIZE-wide input, ``scale`` apart."""
    center = (SIZE - 1) / 2
    shift = (first + scale * center - center) / (SIZE / 2)
    return [[scale, 0.0, shift], [0.0, scale, shift]]


def rotation(degrees, zoom=1.0):
    c, s = zoom * math.cos(math.radians(degrees)), zoom * math.sin(math.radians(degrees))
    return [[c, -s, 0.03], [s, c, -0.02]]


THETAS = {
    "identity": on_pixels(1.0, 0.0),
    "from -2^-20": on_pixels(1.0, -(2.0**-20)),
    "from 2^-20": on_pixels(1.0, 2.0**-20),
    "from 1": on_pixels(1.0, 1.0),
    "from 1 + 2^-19": on_pixels(1.0, 1.0 + 2.0**-19),
    "to the last": on_pixels(0.5, SIZE - 8.5),
    "to the last but one": on_pixels(0.5, SIZE - 9.5),
    "halves": on_pixels(0.5, 3.25),
    "mirrored": on_pixels(-1.0, SIZE - 1.0),
    "rotated": rotation(30, 0.6),
    "rotated out": rotation(75, 1.4),
    "one place": [[0.0, 0.0, 0.1], [0.0, 0.0, -0.1]],
    "cancelling": [[1e6, -1e6, 0.1], [0.0, 0.5, 0.0]],
    "huge": [[1e30, 0.0, 0.0], [0.0, 1e30, 0.0]],
    "nan": [[NAN, 0.0, 0.0], [0.0, 0.5, 0.0]],
    "nan shift": [[0.5, 0.0, 0.0], [0.0, 0.5, NAN]],
    "infinite": [[0.5, INF, 0.0], [0.0, 0.5, 0.0]],
    "infinite both ways": [[0.5, 0.0, INF], [-INF, 0.5, INF]],
}


def batch(device):
    return torch.tensor(list(THETAS.values()), dtype=torch.float32, device=device)


def homographies(device):
    """The maps above with a bottom row that bends them, one that is all but 0 and one with a horizon."""
    rows = torch.tensor(
        [[0.0, 0.0, 1.0], [0.2, -0.1, 1.3], [0.0, 0.0, 1e-30], [1.0, 0.5, 0.2]], device=device
    )
    theta = batch(device)
    bottom = rows[torch.arange(len(theta), device=device) % len(rows)]
    return torch.cat([theta, bottom[:, None]], 1)


@triton.jit
def told_kernel(
    matrix_ptr,
    told_ptr,
    inside_ptr,
    in_width,
    in_height,
    out_width,
    out_height,
    column_blocks,
    SOURCE: tl.constexpr,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of each block what ``reads_inside`` tells, and whether all its pixels exist and read inside."""
    column = tl.program_id(0) % column_blocks * COLUMNS
    row = tl.program_id(0) // column_blocks * ROWS
    entries: tl.constexpr = 9 if SOURCE == sources.PROJECTIVE else 6
    n = tl.program_id(1).to(tl.int64)
    source = (matrix_ptr, entries, 0, 3, 1, 0)
    in_size = (in_width, in_height, 0)
    out_size = (out_width, out_height, 0)
    outputs = ((n, n),)
    matrix = sources.matrix_for(source, outputs, SOURCE, 2, tl.float32)
    told = sample.reads_inside(
        matrix,
        column,
        row,
        ROWS,
        in_size,
        out_size,
        SOURCE,
        INTERPOLATION,
        ALIGN_CORNERS,
        2,
        tl.float32,
        COLUMNS,
    )
    out, mask = pixels_from(column, row, out_size, 2, ROWS, COLUMNS, tl.int32)
    p = sources.input_pixels(
        source,
        matrix,
        matrix_ptr,
        0,
        outputs,
        out,
        out_size,
        in_size,
        mask,
        SOURCE,
        1,
        ALIGN_CORNERS,
        2,
        tl.int32,
        tl.float32,
        False,
    )
    x, y, _ = sample.taps_of_axes(p[0], in_size, INTERPOLATION, 0, ALIGN_CORNERS, 2, tl.float32)
    inside = mask
    for k in tl.static_range(interpolation.axis_tap_count(INTERPOLATION)):
        inside = inside & x[1][k] & y[1][k]
    place = n * tl.num_programs(0) + tl.program_id(0)
    tl.store(told_ptr + place, tl.cast(told, tl.int32))
    tl.store(inside_ptr + place, tl.min(tl.min(inside.to(tl.int32), 1), 0))


def tell(matrices, source, mode, align_corners, in_size, out_size):
    rows, columns = 4, 4
    column_blocks = -(-out_size[1] // columns)
    blocks = -(-out_size[0] // rows) * column_blocks
    told, inside = (
        torch.empty(len(matrices), blocks, dtype=torch.int32, device=matrices.device) for _ in range(2)
    )
    told_kernel[(blocks, len(matrices))](
        matrices,
        told,
        inside,
        in_size[1],
        in_size[0],
        out_size[1],
        out_size[0],
        column_blocks,
        SOURCE=int(source),
        INTERPOLATION=int(INTERPOLATION[mode]),
        PADDING=0,
        ALIGN_CORNERS=int(align_corners),
        ROWS=rows,
        COLUMNS=columns,
    )
    return told.bool().cpu(), inside.bool().cpu()


@pytest.mark.parametrize(
    "source, mode, align_corners",
    [
        pytest.param(Source.AFFINE, "bilinear", True, id="affine-bilinear-corners"),
        pytest.param(Source.AFFINE, "nearest", False, id="affine-nearest-edges"),
        pytest.param(Source.AFFINE, "bicubic", False, id="affine-bicubic-edges"),
        pytest.param(Source.PROJECTIVE, "bilinear", False, id="projective-bilinear-edges"),
    ],
)
def test_what_is_told_inside_is(device, source, mode, align_corners):
    """And blocks that are well inside are told so."""
    matrices = batch(device) if source == Source.AFFINE else homographies(device)
    for in_size, out_size in (((SIZE, SIZE), (8, 9)), ((5, 3), (4, 4))):
        told, inside = tell(matrices, source, mode, align_corners, in_size, out_size)
        assert not (told & ~inside).any()
        if in_size == (SIZE, SIZE):
            places = list(THETAS)
            assert told[places.index("halves")].any() or source == Source.PROJECTIVE
            assert told.sum() > 0.4 * inside.sum() > 0
            for name in THETAS:
                if "nan" in name or "infinite" in name or name == "huge":
                    assert not told[places.index(name)].any(), name


FEW = ["from 2^-20", "to the last", "mirrored", "rotated"]
CASES = [
    pytest.param(*case, id="-".join((case[0].name.lower(), *case[1:])))
    for case in (
        *itertools.product([Source.AFFINE], ["bilinear"], PADDINGS, ["contiguous"]),
        (Source.AFFINE, "nearest", "reflection", "contiguous"),
        (Source.AFFINE, "bicubic", "border", "contiguous"),
        (Source.AFFINE, "bilinear", "zeros", "channels_last"),
        (Source.PROJECTIVE, "bilinear", "zeros", "contiguous"),
    )
]


@pytest.mark.parametrize("source, mode, padding, layout", CASES)
def test_both_ways_agree(device, source, mode, padding, layout):
    """Samples bit by bit; gradients, sums in another order, up to rounding."""
    matrices = batch(device) if source == Source.AFFINE else homographies(device)
    matrices = matrices[[list(THETAS).index(name) for name in FEW]].contiguous()
    input = place(torch.randn(len(FEW), 3, SIZE, SIZE), layout, device=device)
    g = torch.randn(len(FEW), 3, SIZE, SIZE).to(device)
    modes = INTERPOLATION[mode], PADDING[padding], False

    def run(**tile):
        output, by_input = torch.empty_like(g), torch.zeros_like(g)
        with configs.override(channels=4 if layout == "channels_last" else 1, unroll=3, **tile):
            sample.sample_forward(input, matrices, None, output, source, *modes)
            by_matrix, _ = sample.sample_backward(g, input, matrices, None, by_input, source, *modes, True)
        return output, by_input, by_matrix

    with checked_addresses():
        both = run(rows=4, columns=8, steps=2)
    general = run(rows=SIZE, columns=2 * SIZE)  # a block that goes beyond the output is not inside
    assert_band(input)
    assert torch.equal(both[0], general[0])
    assert_close(both[1], general[1].double())
    assert torch.equal(both[2].isfinite(), general[2].isfinite())
    difference = (both[2] - general[2]).nan_to_num(0, 0, 0).abs().max()
    assert difference <= 1e-5 * general[2].nan_to_num(0, 0, 0).abs().max()


@pytest.mark.parametrize("steps, mode", [(1, "nearest"), (2, "bilinear"), (5, "bilinear")])
def test_volumes(device, mode, steps):
    """Blocks of rows that go on in the next slice, and blocks of steps that end with the volume."""
    theta = torch.tensor(
        [[[0.5, 0.1, 0.0, 0.0], [-0.1, 0.6, 0.1, 0.05], [0.0, 0.1, 0.5, -0.1]]], device=device
    )
    input = place(torch.randn(1, 2, 7, 9, 8), device=device)
    size = (5, 3, 8)
    output = torch.empty(1, 2, *size, device=device)
    grid = affine_witness(theta, size, False)
    modes = INTERPOLATION[mode], Padding.ZEROS, False
    with checked_addresses(), configs.override(rows=2, columns=4, channels=1, unroll=2, steps=steps):
        sample.sample_forward(input, theta, None, output, Source.AFFINE, *modes)
    assert_close(output, witness(input, grid, mode, "zeros", False))


@triton.jit
def ask_kernel(out_ptr, matrix_ptr, column, row, rows, in_width, width, height, COLUMNS: tl.constexpr):
    m = ()
    for i in tl.static_range(2):
        m += (
            (tl.load(matrix_ptr + 3 * i), tl.load(matrix_ptr + 3 * i + 1), tl.load(matrix_ptr + 3 * i + 2)),
        )
    inside = sample.reads_inside(
        m, column, row, rows, (in_width, in_width, 0), (width, height, 0), 1, 0, 0, 2, tl.float32, COLUMNS
    )
    tl.store(out_ptr, inside.to(tl.int32))


@pytest.mark.parametrize(
    "width, height, column, row",
    [
        (1, 2**31 - 5, 0, 2**31 - 512),
        (1, 2**31 - 600, 0, 2**31 - 1024),
        (2**31 - 3, 512, 2**31 - 32, 0),
        (2**31 - 1, 2**31 - 1, 2**31 - 32, 2**31 - 512),
    ],
)
def test_blocks_that_pass_the_last_pixel_near_2_to_the_31(width, height, column, row):
    """Their ends are past the largest int32: a block of 512 rows x 32 columns is no smaller for that."""
    found = torch.zeros(1, dtype=torch.int32)
    matrix = torch.tensor([[0.1, 0.0, 0.0], [0.0, 0.1, 0.0]])
    with quick_interpreter(overflow_checks=False):
        ask_kernel[(1,)](found, matrix, column, row, 512, 100, width, height, 32)
    assert not found.item()
