"""The second way of the samplers, for blocks of outputs that read nothing outside the image.

It limits and masks nothing, so that a block that is told to lie inside and does not would read other memory:
images lie among NaNs here, and the interpreter checks every address.
"""

import itertools
import math

import pytest
import torch
import triton.language as tl
from common import (
    MODES,
    PADDINGS,
    affine_witness,
    assert_band,
    assert_close,
    place,
    witness,
)

from bench.interpreter import checked_addresses, quick_interpreter
from stn_triton.kernels import sample
from stn_triton.kernels.device import interpolation, programs, sources
from stn_triton.kernels.device.affine import starts_of
from stn_triton.kernels.device.arithmetic import PROJECTIVE
from stn_triton.kernels.device.bounds import is_interior
from stn_triton.kernels.device.tiles import place_of_program
from stn_triton.kernels.host import configs
from stn_triton.kernels.modes import Interpolation, Padding, Source
from stn_triton.kernels.spec import Params, Sizes, Spec, Tiling, Work, kernel

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


@kernel()
def told_kernel(
    source_ptr, told_ptr, inside_ptr,
    in_width, in_height, out_width, out_height, batch, column_tiles, row_tiles,
    SPEC: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Of each tile what ``is_interior`` tells, and whether all its pixels exist and read inside."""
    entries: tl.constexpr = 9 if SPEC.source == PROJECTIVE else 6
    sizes = Sizes((in_width, in_height, 0), (out_width, out_height, 0), batch, 1, 1, (1, 1, 1))
    params = Params(source_ptr, (entries, 0, 3, 1, 0), source_ptr, 0)
    column_tile, row_tile, _, b = place_of_program(Tiling(column_tiles, row_tiles, 1, 1, STEPS))
    column = column_tile * SPEC.columns
    row = row_tile * (SPEC.rows * STEPS)
    outputs = sources.outputs_of(b, sizes, SPEC)
    map = sources.map_of(params, outputs[0][0], outputs[0][1], sizes, SPEC)
    told = is_interior(map, column, row, SPEC.rows * STEPS, sizes, SPEC)
    numbers = programs.numbers_of_lanes(map, sizes, SPEC)
    starts = starts_of(map, column, row, numbers, sizes, SPEC)
    work = Work(params, b, outputs, map, column, row, STEPS, numbers, starts, (0, 1), False, 0, 0, 1)
    at = tl.program_id(0)
    tl.store(told_ptr + at, tl.cast(told, tl.int32))
    inside = 1
    for step in tl.static_range(STEPS):
        block = programs.block_of(work, step, sizes, SPEC)
        mask, places = block.mask, sources.places_of(work, block, sizes, SPEC)
        x, y, _ = interpolation.taps_of_axes(places[0], sizes, SPEC)
        for k in tl.static_range(interpolation.tap_count(SPEC)):
            mask = mask & x.inside[k] & y.inside[k]
        inside = tl.minimum(tl.min(tl.min(mask.to(tl.int32), 1), 0), inside)
    tl.store(inside_ptr + at, inside)


def spec_of(source, mode, align_corners, fixed_point, **tile):
    return Spec(
        source=int(source),
        interpolation=int(INTERPOLATION[mode]),
        padding=(0, 0),
        align_corners=int(align_corners),
        dims=2,
        compute=tl.float32,
        index=tl.int32,
        fixed_point=fixed_point,
        **tile,
    )


def tell(matrices, source, mode, align_corners, fixed_point, in_size, out_size):
    """Of tiles of two steps, 2 x 4 pixels each."""
    column_tiles, row_tiles = -(-out_size[1] // 4), -(-out_size[0] // 4)
    told, inside = (
        torch.empty(len(matrices), column_tiles * row_tiles, dtype=torch.int32, device=matrices.device)
        for _ in range(2)
    )
    told_kernel[(told.numel(),)](
        matrices,
        told,
        inside,
        in_size[1],
        in_size[0],
        out_size[1],
        out_size[0],
        len(matrices),
        column_tiles,
        row_tiles,
        SPEC=spec_of(source, mode, align_corners, fixed_point, rows=2, columns=4),
        STEPS=2,
    )
    return told.bool().cpu(), inside.bool().cpu()


@pytest.mark.parametrize(
    "source, mode, align_corners, fixed_point",
    [
        pytest.param(Source.AFFINE, "bilinear", True, True, id="affine-bilinear-corners"),
        pytest.param(Source.AFFINE, "bilinear", True, False, id="affine-bilinear-corners-floats"),
        pytest.param(Source.AFFINE, "nearest", False, True, id="affine-nearest-edges"),
        pytest.param(Source.AFFINE, "bicubic", False, True, id="affine-bicubic-edges"),
        pytest.param(Source.PROJECTIVE, "bilinear", False, False, id="projective-bilinear-edges"),
    ],
)
def test_what_is_told_inside_is(device, source, mode, align_corners, fixed_point):
    """And blocks that are well inside are told so."""
    matrices = batch(device) if source == Source.AFFINE else homographies(device)
    for in_size, out_size in (((SIZE, SIZE), (8, 9)), ((5, 3), (4, 4))):
        told, inside = tell(matrices, source, mode, align_corners, fixed_point, in_size, out_size)
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
    input = place(torch.randn(len(FEW), 2, SIZE, SIZE), layout, device=device)
    g = torch.randn(len(FEW), 2, SIZE, SIZE).to(device)
    modes = INTERPOLATION[mode], PADDING[padding], False

    def run(**tile):
        output, by_input = torch.empty_like(g), torch.zeros_like(g)
        with configs.override(channels=2 if layout == "channels_last" else 1, unroll=2, **tile):
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


@kernel()
def ask_kernel(
    out_ptr, source_ptr, column, row, rows, in_width, in_height, out_width, out_height, SPEC: tl.constexpr
):
    sizes = Sizes((in_width, in_height, 0), (out_width, out_height, 0), 1, 1, 1, (1, 1, 1))
    n = tl.program_id(0).to(tl.int64)
    map = sources.map_of(Params(source_ptr, (6, 0, 3, 1, 0), source_ptr, 0), n, n, sizes, SPEC)
    tl.store(out_ptr, is_interior(map, column, row, rows, sizes, SPEC).to(tl.int32))


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
        spec = spec_of(Source.AFFINE, "bilinear", False, False, columns=32)
        ask_kernel[(1,)](found, matrix, column, row, 512, 100, 100, width, height, SPEC=spec)
    assert not found.item()
