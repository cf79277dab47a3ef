"""d image by sorting: against float64, to the same bits each time, and inside its tensors."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from common import (
    CANARY,
    DENSE_LAYOUTS,
    LAYOUTS,
    MODES,
    NAN,
    PADDINGS,
    assert_band,
    assert_close,
    away_from_kinks,
    pairwise,
    place,
    random_grid,
    random_theta,
)

import stn_triton as stn
from bench.interpreter import checked_addresses
from bench.specialisations import field_of
from stn_triton import reference
from stn_triton.kernels.host import configs
from stn_triton.kernels.modes import Interpolation, Padding, Source

INTERPOLATION = dict(zip(MODES, Interpolation))
PADDING = dict(zip(PADDINGS, Padding))
INF = float("inf")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
IN_SIZE = {2: (5, 7), 3: (3, 4, 3)}
OUT_SIZE = {2: (4, 6), 3: (2, 2, 2)}
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def parameters(source, batch, size, dtype, device, transforms=None):
    """A source's parameters, and a spline's control points; coordinates inside and outside the image."""
    dims, count = len(size), batch * (transforms or 1)
    control_points = None
    if source == Source.GRID:
        params = random_grid(batch, size, dtype, device)
    elif source == Source.FLOW:
        params = (2 * torch.randn(batch, dims, *size)).to(device, dtype)
    elif source == Source.AFFINE:
        params = random_theta(count, dims, dtype, device)
    elif source == Source.PROJECTIVE:
        params = (torch.eye(3) + 0.2 * torch.randn(count, 3, 3)).to(device, dtype)
    else:
        control_points = stn.transforms.control_lattice(2).to(device, dtype)
        affine = torch.tensor([[0.1, -0.1], [0.9, 0.2], [-0.1, 1.2]])
        spline = torch.cat([torch.zeros(4, 2), affine]) + 0.1 * torch.randn(count, 7, 2)
        params = spline.to(device, dtype)
    if transforms:
        params = params.unflatten(0, (batch, transforms))
    return params, control_points


def places(params, control_points, in_size, size, source, align_corners):
    """The normalised coordinates (N or 1, T, *size, dims) in float64, on the CPU."""
    params, points = (None if t is None else t.double().cpu() for t in (params, control_points))
    place = source, params, points, tuple(size), torch.Size(in_size), align_corners, F64
    return reference.operators.places(*place, in_pixels=False)


def expected(
    grad_output, grid, grad_input, source, interpolation, padding, align_corners, coord_tangent=None
):
    """d image in float64, tap by tap; with ``coord_tangent`` its derivative along it, by forward mode."""
    n = grad_input.shape[0]
    g = grad_output.double().cpu()
    g = (g if g.dim() > grad_input.dim() else g.unsqueeze(1)).movedim(1, 2).flatten(2, 3)
    image = torch.zeros(grad_input.shape, dtype=F64)
    grid = grid.expand(n, *grid.shape[1:]).flatten(1, 2)

    def backward(grid):
        def forward(image):
            return reference.sample_taps(image, grid, interpolation, padding, align_corners)

        return torch.func.vjp(forward, image)[1](g)[0]

    if coord_tangent is None:
        return backward(grid)
    tangent = coord_tangent.double().cpu().expand(n, *coord_tangent.shape[1:]).flatten(1, 2)
    if source == Source.FLOW:
        sizes = torch.tensor(grad_input.shape[:1:-1], dtype=F64)
        tangent = tangent / ((sizes - int(align_corners)) / 2)
    return torch.func.jvp(backward, (grid,), (tangent,))[1]


def solve(grad_output, params, control_points, grad_input, *modes, coord_tangent=None, **tile):
    """Fills ``grad_input``, whatever is in it."""
    from stn_triton.kernels.sort import sorted_backward

    grad_input.fill_(NAN)
    with configs.override(**tile):
        sorted_backward(grad_output, params, control_points, grad_input, *modes, coord_tangent)
    return grad_input


def check(
    device,
    dims,
    source,
    mode,
    padding,
    align_corners,
    dtype=F64,
    transforms=None,
    move=False,
    in_size=None,
    size=None,
    batch=2,
    channels=3,
    tile=None,
):
    """One call with random arguments. ``tile``: fields of the tiles that are not to be chosen."""
    in_size, size = in_size or IN_SIZE[dims], size or OUT_SIZE[dims]
    modes = source, INTERPOLATION[mode], PADDING[padding], align_corners
    # parameters in bfloat16 would place whole rows on kinks
    wide = F32 if dtype == BF16 and source != Source.GRID else dtype
    compute = F64 if wide == F64 else F32
    params, control_points = parameters(source, batch, size, wide, device, transforms)
    grid = places(params, control_points, in_size, size, source, align_corners)
    grad_output = torch.randn(batch, transforms or 1, channels, *size)
    if mode == "nearest" or move:
        grad_output *= away_from_kinks(grid, in_size, mode, align_corners).unsqueeze(2)
    grad_output = (grad_output if transforms else grad_output.squeeze(1)).to(device, dtype)
    coord_tangent = torch.randn(grid.shape).to(device, compute) if move else None
    grad_input = torch.empty(batch, channels, *in_size, dtype=compute if move else dtype, device=device)
    solve(
        grad_output, params, control_points, grad_input, *modes, coord_tangent=coord_tangent, **(tile or {})
    )
    assert_close(grad_input, expected(grad_output, grid, grad_input, *modes, coord_tangent=coord_tangent))


PLANAR_SOURCES = (Source.PROJECTIVE, Source.TPS)
CASES = [(dims, source) for dims in (2, 3) for source in Source if dims == 2 or source not in PLANAR_SOURCES]


@pairwise
@pytest.mark.parametrize(
    "dims, source", CASES, ids=[f"{dims}d-{source.name.lower()}" for dims, source in CASES]
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("transforms", [None, 2])
def test_every_mode(device, dims, source, mode, padding, align_corners, dtype, transforms):
    """Every source in every mode, of every dtype, with and without transforms."""
    if source in (Source.GRID, Source.FLOW):
        transforms = None
    few = {"batch": 1, "size": (2, 1, 2)} if (dims, mode) == (3, "bicubic") else {}
    check(device, dims, source, mode, padding, align_corners, dtype, transforms, channels=2, **few)


@pairwise
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])
def test_every_mode_moved(device, dims, mode, padding, align_corners):
    """The derivative along a motion of the coordinates; of nearest samples there is none."""
    size = (2, 1, 2) if (dims, mode) == (3, "bicubic") else None
    check(device, dims, Source.GRID, mode, padding, align_corners, move=True, size=size, batch=1, channels=1)


@pytest.mark.parametrize("source", list(Source), ids=lambda source: source.name.lower())
def test_every_source_moved(device, source):
    """A motion is given in the source's unit, for each transform."""
    transforms = None if source in (Source.GRID, Source.FLOW) else 3
    check(device, 2, source, "bilinear", "border", True, F32, transforms, move=True)


SIZES = (
    ((1, 1), (1, 1)),
    ((1, 40), (3, 2)),
    ((39, 1), (2, 5)),
    ((2, 3), (23, 17)),
    ((17, 40), (1, 33)),
    ((38, 31), (40, 37)),
    ((1, 1, 1), (2, 3, 1)),
    ((1, 5, 9), (4, 1, 3)),
    ((7, 2, 5), (5, 3, 6)),
)


@pytest.mark.parametrize("in_size, size", SIZES, ids=str)
@pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])
def test_sizes(device, in_size, size, align_corners):
    """Sizes of 1 to 40, alike or not; tiles that divide none of them."""
    tile = {"rows": 64, "columns": 16} if min(in_size) > 1 else {}
    modes = "bilinear", PADDINGS[sum(size) % 3], align_corners
    check(
        device,
        len(size),
        Source.GRID,
        *modes,
        F64,
        in_size=in_size,
        size=size,
        batch=1,
        channels=2,
        tile=tile,
    )


BLOCKS = {
    "chosen": {},
    "unrolled": {"channels": 4, "unroll": 2},
    "split": {"channels": 2, "unroll": 1, "splits": 2},
}


@pytest.mark.parametrize("channels", [1, 5, 8])
@pytest.mark.parametrize("tile", BLOCKS.values(), ids=BLOCKS)
def test_blocks_of_channels(device, channels, tile):
    """Even and uneven blocks, several of them, and programs that share them."""
    check(device, 2, Source.AFFINE, "bilinear", "reflection", False, channels=channels, tile=tile)


def test_shared_parameters(device):
    """One transform, or several, for all images."""
    for transforms in (None, 2):
        params, _ = parameters(Source.AFFINE, 1, OUT_SIZE[2], F64, device, transforms)
        per_image = (transforms, 3) if transforms else (3,)
        grad_output = torch.randn(3, *per_image, *OUT_SIZE[2], dtype=F64, device=device)
        modes = Source.AFFINE, Interpolation.BILINEAR, Padding.ZEROS, False
        grad_input = torch.empty(3, 3, *IN_SIZE[2], dtype=F64, device=device)
        solve(grad_output, params, None, grad_input, *modes)
        grid = places(params, None, IN_SIZE[2], OUT_SIZE[2], Source.AFFINE, False)
        assert_close(grad_input, expected(grad_output, grid, grad_input, *modes))


# ------------------------------------------------------------------------------- many on one pixel
CROWDS = (
    (2, "bilinear", False),
    (2, "nearest", False),
    (2, "bicubic", True),
    (3, "bilinear", True),
    (3, "bilinear", False),
)


@pytest.mark.parametrize("dims, mode, move", CROWDS, ids=str)
def test_collapsed_maps(device, dims, mode, move):
    """All outputs but a few lie on one place: the program shares the work of its pixels."""
    modes = Source.GRID, INTERPOLATION[mode], Padding.BORDER, False
    size, in_size = ((9, 10), (4, 5)) if dims == 2 else ((4, 5, 5), (3, 2, 4))
    grid = torch.full((1, *size, dims), 0.37, dtype=F64)
    grid[:, 0] = random_grid(1, size, F64, "cpu")[:, 0]
    grad_output = torch.randn(1, 3, *size, dtype=F64)
    coord_tangent = torch.randn(1, 1, *size, dims, dtype=F64) if move else None
    if mode == "nearest" or move:
        grad_output *= away_from_kinks(grid, in_size, mode, False).unsqueeze(1)
    grad_input = torch.empty(1, 3, *in_size, dtype=F64, device=device)
    result = expected(grad_output, grid.unsqueeze(1), grad_input, *modes, coord_tangent=coord_tangent)
    arguments = [t if t is None else t.to(device) for t in (grad_output, grid, None, grad_input)]
    coord_tangent = coord_tangent if coord_tangent is None else coord_tangent.to(device)
    for tile in ({}, {"channels": 2, "rows": 2, "columns": 8}) if mode == "bilinear" else ({},):
        assert_close(solve(*arguments, *modes, coord_tangent=coord_tangent, **tile), result)


def test_work_is_shared(device, monkeypatch):
    """1600 outputs on one pixel are not 1600 steps; on a GPU there is nothing to count."""
    if device.type != "cpu":
        pytest.skip("counted in the interpreter")
    from triton.runtime import interpreter

    class Counted:
        loads = 0

        def __getattr__(self, name):
            return getattr(memory, name)

        def load(self, *args):
            self.loads += 1
            return memory.load(*args)

    memory, counted = interpreter._interpreter, Counted()
    monkeypatch.setattr(interpreter, "_interpreter", counted)
    grid = torch.full((1, 40, 40, 2), 0.1, dtype=F64)
    grad_output = torch.randn(1, 1, 40, 40, dtype=F64)
    modes = Source.GRID, Interpolation.BILINEAR, Padding.ZEROS, False
    grad_input = torch.empty(1, 1, 4, 4, dtype=F64)
    solve(grad_output, grid, None, grad_input, *modes, rows=8, columns=8)
    assert_close(grad_input, expected(grad_output, grid.unsqueeze(1), grad_input, *modes))
    # four pixels: 32 outputs alone, the rest by 64 lanes; six loads for each step, two for each axis' place
    assert counted.loads < 6 * (2 * 32 + 4 * 25) + 100


def test_even_crowds(device):
    """Far more outputs than pixels, as many for each: each pixel adds up its own."""
    check(device, 2, Source.AFFINE, "bilinear", "border", False, in_size=(2, 2), size=(9, 13), batch=1)


@pairwise
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [F64, F32], ids=["fp64", "fp32"])
def test_bad_coordinates(device, mode, padding, dtype):
    """NaN, infinities and numbers that no int32 holds, a crowd of each; nothing outside is touched."""
    values = [NAN, INF, -INF, 1e30, -1e30, 2.0**31, -(2.0**31), torch.finfo(F32).max]
    values = values[: 3 if padding == "reflection" else None]  # far reflections depend on the precision
    grid = torch.full((1, len(values), 12, 2), 0.31, dtype=dtype)
    for row, value in enumerate(values):
        grid[0, row, 0::3, 0] = grid[0, row, 1::3, 1] = value
        grid[0, row, 2::3] = value
    modes = Source.GRID, INTERPOLATION[mode], PADDING[padding], False
    grad_output = torch.randn(1, 2, len(values), 12, dtype=dtype)
    grad_input = place(torch.empty(1, 2, 4, 5, dtype=dtype), "gaps", CANARY, device)
    wanted = expected(grad_output, grid.double().unsqueeze(1), grad_input, *modes)
    with checked_addresses():
        solve(grad_output.to(device), place(grid, device=device), None, grad_input, *modes)
    assert_close(grad_input, wanted)
    assert_band(grad_input, CANARY)


def test_a_gradient_that_is_no_number_stays_where_it_is_read(device):
    """Of weight 0 it counts for nothing: at whole coordinates a pixel has no neighbours."""
    theta = torch.eye(2, 3, dtype=F64, device=device).unsqueeze(0)
    for mode, value in itertools.product(MODES, (NAN, INF)):
        grad_output = torch.randn(1, 1, 5, 7, dtype=F64, device=device)
        grad_output[0, 0, 2, 3] = value
        modes = Source.AFFINE, INTERPOLATION[mode], Padding.ZEROS, True
        grad_input = solve(grad_output, theta, None, torch.empty_like(grad_output), *modes)
        torch.testing.assert_close(grad_input, grad_output, equal_nan=True)


# ------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", [2, 3])
def test_layouts(device, dims, layout):
    """Any strides; every address is that of an element, what is around is left alone."""
    params, _ = parameters(Source.AFFINE, 2, OUT_SIZE[dims], F32, "cpu", 2)
    params = place(params, layout, device=device)
    grad_output = place(torch.randn(2, 2, 3, *OUT_SIZE[dims]), layout, device=device)
    coord_tangent = (
        place(torch.randn(2, 2, *OUT_SIZE[dims], dims), layout, device=device) if dims == 3 else None
    )
    result = torch.empty(2, 3, *IN_SIZE[dims])
    grad_input = place(result, layout if layout in DENSE_LAYOUTS else "sliced", CANARY, device)
    modes = Source.AFFINE, Interpolation.BILINEAR, Padding.BORDER, True
    grid = places(params, None, IN_SIZE[dims], OUT_SIZE[dims], Source.AFFINE, True)
    with checked_addresses():
        solve(
            grad_output,
            params,
            None,
            grad_input,
            *modes,
            coord_tangent=coord_tangent,
            rows=4,
            columns=8,
            channels=4,
        )
    assert_close(grad_input, expected(grad_output, grid, grad_input, *modes, coord_tangent=coord_tangent))
    assert_band(grad_input, CANARY)
    for tensor in (grad_output, params, *(() if coord_tangent is None else (coord_tangent,))):
        assert_band(tensor)


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("channels", [8, 17])
def test_vectors_stay_inside(device, channels, dtype):
    """Channels innermost, in vectors of 16 bytes, with and without a rest."""
    grad_output = place(torch.randn(2, channels, 3, 4).to(dtype), "channels_last", device=device)
    grid = random_grid(2, (3, 4), dtype, device)
    grad_input = place(torch.empty(2, channels, 4, 3, dtype=dtype), "channels_last", CANARY, device)
    modes = Source.GRID, Interpolation.BILINEAR, Padding.REFLECTION, False
    with checked_addresses():
        solve(grad_output, grid, None, grad_input, *modes, channels=8)
    assert_close(grad_input, expected(grad_output, grid.double().cpu().unsqueeze(1), grad_input, *modes))
    assert_band(grad_input, CANARY)


def test_empty(device):
    """No images and no channels: nothing. No outputs: zeros."""
    modes = Source.GRID, Interpolation.BILINEAR, Padding.ZEROS, False
    for batch, channels, size in ((0, 2, (3, 4)), (2, 0, (3, 4)), (2, 2, (0, 4)), (2, 2, (3, 0))):
        grad_output = torch.randn(batch, channels, *size, device=device)
        grid = torch.zeros(batch, *size, 2, device=device)
        grad_input = solve(grad_output, grid, None, torch.empty(batch, channels, 4, 5, device=device), *modes)
        assert (grad_input == 0).all()


@pytest.mark.parametrize("source", list(Source), ids=lambda source: source.name.lower())
def test_parts(device, monkeypatch, source):
    """Images done in turn give the same bits; lists that are cut, and 64-bit numbers, the same sums."""
    from stn_triton.kernels import sort

    size, in_size = (3, 4), (5, 4)
    params, control_points = parameters(source, 3, size, F64, device)
    grad_output = torch.randn(3, 1, *size, dtype=F64, device=device)
    modes = source, Interpolation.BILINEAR, Padding.BORDER, False

    def result():
        grad_input = torch.empty(3, 1, *in_size, dtype=F64, device=device)
        return solve(grad_output, params, control_points, grad_input, *modes)

    whole = result()
    for outputs in (25, 1):
        monkeypatch.setattr(sort, "OUTPUTS_AT_ONCE", outputs)
        assert torch.equal(result(), whole)
    for length in (12, 5):
        monkeypatch.setattr(sort, "LIST_LENGTH", length)
        assert_close(result(), whole)
    monkeypatch.setattr(sort, "INT32_MAX", 10)
    assert_close(result(), whole)


def test_widths(monkeypatch):
    """Past 2^31 pixels keys have 64 bits, past 2^31 elements offsets have; lists are never longer."""
    from stn_triton.kernels import sort
    from stn_triton.kernels.host import launch

    kernels = {"keys": [], "lists": []}

    def launched(kernel, programs, device, *args, **kwargs):
        index = str(field_of(kwargs["SPEC"], "index"))
        if kernel is sort.sort_keys_kernel:
            kernels["keys"].append((args[0].dtype, index))
        else:
            assert args[5].dtype == torch.int32  # where cells begin
            kernels["lists"].append((kwargs["lists"], index))

    monkeypatch.setattr(launch, "runner", launched)

    def widths(in_shape, out_shape):
        for found in kernels.values():
            found.clear()
        grad_output = torch.empty(out_shape, dtype=F16, device="meta")
        grid = torch.empty(1, 1, 1, 2, device="meta").expand(out_shape[0], *out_shape[2:], 2)
        grad_input = torch.empty(in_shape, dtype=F16, device="meta")
        modes = Source.GRID, Interpolation.BILINEAR, Padding.ZEROS, False
        sort.sorted_backward(grad_output, grid, None, grad_input, *modes)
        return kernels["keys"], kernels["lists"]

    small, wide = (torch.int32, "int32"), (torch.int64, "int64")
    assert widths((2, 3, 9, 9), (2, 3, 9, 9)) == ([small], [(1, "int32")])
    assert widths((1, 3, 30000, 30000), (1, 3, 9, 9)) == ([small], [(1, "int64")])  # 2.7e9 elements
    assert widths((1, 1, 50000, 50000), (1, 1, 9, 9)) == ([wide], [(1, "int64")])  # 2.5e9 pixels
    keys, lists = widths((1, 1, 9, 9), (1, 1, 50000, 50000))
    assert keys == [(torch.int32, "int64")]
    assert lists == [(3, "int64")]
    # 50 images of 10^6 pixels: as many at once as OUTPUTS_AT_ONCE allows
    keys, lists = widths((50, 1, 1000, 1000), (50, 1, 1000, 1000))
    assert keys == [small] * 4
    assert lists == [(1, "int32")] * 4


# -------------------------------------------------------------------------------- repeatable, exact
@pytest.mark.parametrize("mode", MODES)
def test_same_bits_each_time(device, mode):
    """Whatever else the device does; with tiles of other sizes the same up to rounding."""
    grid = random_grid(1, (8, 12), F32, device)
    grid[:, 4:] = 0.123  # a crowd
    grad_output = torch.randn(1, 3, 8, 12, device=device)
    modes = Source.GRID, INTERPOLATION[mode], Padding.BORDER, False

    def result(**tile):
        return solve(grad_output, grid, None, torch.empty(1, 3, 9, 10, device=device), *modes, **tile)

    first = result()
    for _ in range(100 if device.type != "cpu" else 2):
        assert torch.equal(result(), first)
    for tile in ({"rows": 8, "columns": 8}, {"rows": 2, "columns": 16, "channels": 2}):
        assert_close(result(**tile), first.double())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda dtype: str(dtype)[6:])
def test_error_is_no_larger_than_pytorchs(device, mode, dtype):
    """Root mean square against float64, from the same arguments."""
    errors = torch.zeros(2, dtype=F64)
    for padding in PADDINGS:
        lines = torch.linspace(-1.1, 1.1, 32), torch.linspace(-1.1, 1.1, 28)
        grid = torch.stack(torch.meshgrid(*lines, indexing="xy"), -1)
        grid = (grid + 0.1 * torch.randn(1, 28, 32, 2)).to(dtype)
        grad_output = torch.randn(1, 2, 28, 32)
        if mode == "nearest" and dtype == F32:  # of half coordinates the pixels' are exact
            grad_output *= away_from_kinks(grid, (24, 25), mode, False).unsqueeze(1)
        grad_output = grad_output.to(dtype)
        modes = Source.GRID, INTERPOLATION[mode], PADDING[padding], False
        grad_input = torch.empty(1, 2, 24, 25, dtype=dtype, device=device)
        solve(grad_output.to(device), grid.to(device), None, grad_input, *modes)
        exact = expected(grad_output, grid.double().unsqueeze(1), grad_input, *modes)
        image = torch.zeros(1, 2, 24, 25, dtype=dtype, requires_grad=True)
        output = F.grid_sample(image, grid, mode, padding, False)
        (theirs,) = torch.autograd.grad(output, image, grad_output)
        for k, result in enumerate((grad_input.cpu(), theirs)):
            errors[k] += (result.double() - exact).square().mean()
    ours, theirs = errors.sqrt().tolist()
    assert ours <= theirs * 1.01  # in float32 the same sums, perhaps in another order
