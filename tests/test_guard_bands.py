"""Nothing is read or written outside a tensor: inputs lie among NaNs, results among canaries.

The launchers take the tensors they write to, so they are called directly here; what a public function
allocates is poisoned with NaN, which stays where nothing is written. In the interpreter every single address
is checked as well: a value that is read outside and then not used is a fault on a GPU, but no wrong result.
"""

import contextlib

import pytest
import torch
from common import (
    CANARY,
    DENSE_LAYOUTS,
    LAYOUTS,
    MODES,
    NAN,
    PADDINGS,
    affine_witness,
    assert_band,
    assert_close,
    away_from_kinks,
    padding_of,
    pairwise,
    place,
    random_grid,
    random_theta,
)
from test_padding import witness_of

import stn_triton as stn
from bench.interpreter import checked_addresses, quick_interpreter
from stn_triton.checks import to_padding
from stn_triton.kernels.host import configs
from stn_triton.kernels.modes import Interpolation, Padding, Source

INTERPOLATION = dict(zip(MODES, Interpolation))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
IN_SIZE = {2: (4, 5), 3: (3, 4, 3)}
OUT_SIZE = {2: (3, 6), 3: (2, 3, 5)}
# Tiles that divide neither a row, nor the rows, nor the channels.
RAGGED = {2: {"rows": 2, "columns": 8, "channels": 2}, 3: {"rows": 4, "columns": 8, "channels": 2}}

# 2^31 and the largest float32 are whole pixels of no image, and cannot be turned into an int32.
BAD = (NAN, float("inf"), -float("inf"), 1e30, -1e30, 2.0**31, -(2.0**31), torch.finfo(torch.float32).max)

AXES = {
    "dims": (2, 3),
    "source": ("grid", "affine"),
    "mode": MODES,
    "padding": (*PADDINGS, "mixed"),  # which has circular padding
    "align_corners": (False, True),
}


def combinations(test):
    for name, values in AXES.items():
        test = pytest.mark.parametrize(name, values)(test)
    return test


# The interpreter computes with NumPy, which speaks of the infinities that it meets.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _checked():
    with quick_interpreter(), checked_addresses():
        yield


@contextlib.contextmanager
def banded_buffers(monkeypatch):
    """The kernels' own buffers too: NaN where something must be written, canaries around them."""
    from stn_triton.kernels.host import parameters

    make, buffers = parameters.gradient_buffer, []

    def banded(*args):
        buffers.append(place(torch.full_like(make(*args), NAN), fill=CANARY))
        return buffers[-1]

    with monkeypatch.context() as patch:
        patch.setattr(parameters, "gradient_buffer", banded)
        yield
    assert buffers
    for buffer in buffers:
        assert_band(buffer, CANARY)


@contextlib.contextmanager
def poisoned_allocations():
    """``torch.empty`` gives NaNs."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def own(tensor):
    """Contiguous values with no band, for the witness."""
    return tensor.detach().double().cpu().contiguous()


class Problem:
    """A sampling problem with every tensor in a layout of its own, and its float64 solution."""

    def __init__(
        self, device, dims, source, mode, padding, align_corners, layouts, dtype=torch.float32, channels=3
    ):
        """``layouts``: of the input, the parameters, the output, its gradient and the input's gradient."""
        in_layout, params_layout, out_layout, grad_out_layout, grad_in_layout = layouts
        in_size, out_size = IN_SIZE[dims], OUT_SIZE[dims]
        batch, self.align_corners, padding = 2, align_corners, padding_of(padding, dims)
        self.source = Source.GRID if source == "grid" else Source.AFFINE
        self.modes = INTERPOLATION[mode], to_padding(padding, dims), align_corners
        if source == "grid":
            params = random_grid(batch, out_size, dtype, "cpu", reach=1.6)
            if mode != "bicubic":  # a pixel off the kinks, which a stride of 0 then gives to all
                size = torch.tensor(in_size[::-1])
                pixel = pixel_off_kinks(params, size, mode, align_corners)
                params = pixel.to(dtype)
        else:
            params = random_theta(batch, dims, dtype, "cpu")
        self.params = place(params, params_layout, device=device)
        self.input = place(torch.randn(batch, channels, *in_size).to(dtype), in_layout, device=device)
        self.grad_output = torch.randn(batch, channels, *out_size).to(dtype)
        self.expected(mode, padding, grad_out_layout, device)
        empty = torch.full((batch, channels, *out_size), CANARY, dtype=dtype)
        self.output = place(empty, out_layout, CANARY, device)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        zeros = torch.zeros(batch, channels, *in_size, dtype=compute)
        self.grad_input = place(zeros, grad_in_layout, CANARY, device)

    def expected(self, mode, padding, grad_out_layout, device):
        input, params = own(self.input).requires_grad_(), own(self.params).requires_grad_()
        in_size, out_size = self.input.shape[2:], self.grad_output.shape[2:]
        grid = params
        if self.source == Source.AFFINE:
            grid = affine_witness(params, out_size, self.align_corners)
        self.steady = torch.ones(grid.shape[:-1], dtype=torch.bool)
        if mode != "bicubic":
            self.steady = away_from_kinks(grid.detach(), in_size, mode, self.align_corners)
        # The gradient is 0 where a slope may jump: expanded layouts have no such places to offer.
        if not grad_out_layout.startswith("expanded"):
            self.grad_output *= self.steady.unsqueeze(1)
        self.grad_output = place(self.grad_output, grad_out_layout, device=device)
        self.value = witness_of(padding)(input, grid, mode, padding, self.align_corners)
        self.by_input, self.by_params = torch.autograd.grad(
            self.value, (input, params), own(self.grad_output), allow_unused=True
        )
        if mode == "nearest":
            self.by_params = torch.zeros_like(params)

    def check_forward(self):
        from stn_triton.kernels.sample import sample_forward

        sample_forward(self.input, self.params, None, self.output, self.source, *self.modes)
        self.check_output(self.output)
        assert_band(self.output, CANARY)
        self.check_inputs()

    def check_output(self, output):
        keep = self.steady.unsqueeze(1)
        assert_close(output.cpu() * keep, self.value * keep)

    def check_backward(self, input_grad=True, params_grad=True):
        from stn_triton.kernels.sample import sample_backward

        by_params, _ = sample_backward(
            self.grad_output,
            self.input,
            self.params,
            None,
            self.grad_input if input_grad else None,
            self.source,
            *self.modes,
            params_grad,
        )
        if input_grad:
            assert_close(self.grad_input, self.by_input)
        else:
            assert (self.grad_input == 0).all()
        assert_band(self.grad_input, CANARY)
        if params_grad:
            assert_close(by_params, self.by_params, scale=self.by_params_scale())
        else:
            assert by_params is None
        self.check_inputs()

    def by_params_scale(self):
        """What the terms of the sum are like: they may cancel."""
        return own(self.grad_output).norm().item() * 4

    def check_inputs(self):
        for tensor in (self.input, self.params, self.grad_output):
            assert_band(tensor)


def pixel_off_kinks(grid, size, mode, align_corners):
    """The grid with its coordinates moved by up to a twelfth of a pixel, off whole or half pixels."""
    scale, center = (size - int(align_corners)) / 2, (size - 1) / 2
    kink = 0.0 if mode == "bilinear" else 0.5
    pixel = grid.double() * scale + center - kink
    fraction = (pixel - pixel.floor()).clamp(1 / 12, 11 / 12)
    return (pixel.floor() + fraction + kink - center) / scale


def hard_layouts(index):
    """Layouts for (input, params, output, grad_output, grad_input): over the cases every pair occurs."""
    count = len(DENSE_LAYOUTS)
    return tuple(DENSE_LAYOUTS[(index * step + role) % count] for role, step in enumerate((1, 2, 3, 4, 5)))


@pairwise
@pytest.mark.parametrize("layouts", range(len(DENSE_LAYOUTS)))
@combinations
def test_sampler_stays_inside(device, monkeypatch, dims, source, mode, padding, align_corners, layouts):
    """Both launchers, every two of the modes, ragged tiles: right values, NaNs and canaries untouched."""
    problem = Problem(device, dims, source, mode, padding, align_corners, hard_layouts(layouts))
    # the interpreter takes half a second for each program of tricubic sampling
    tile = {"channels": 2} if dims == 3 and mode == "bicubic" else RAGGED[dims]
    with configs.override(**tile):
        problem.check_forward()
        with banded_buffers(monkeypatch):
            problem.check_backward()


@pairwise
@pytest.mark.parametrize("source", ["grid", "affine"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("role", ["input", "params", "output", "grad_output", "grad_input"])
def test_each_layout_of_each_tensor(device, monkeypatch, role, layout, source):
    """Every layout, stride 0 included where a tensor is only read, for one tensor at a time."""
    roles = ["input", "params", "output", "grad_output", "grad_input"]
    if role in ("output", "grad_input") and layout.startswith("expanded"):
        layout = "sliced"  # nothing can be written there
    layouts = ["contiguous"] * 5
    layouts[roles.index(role)] = layout
    problem = Problem(device, 2, source, "bilinear", "zeros", False, layouts, channels=5)
    if role in ("output", "input", "params"):
        problem.check_forward()
    if role != "output":
        with banded_buffers(monkeypatch):
            problem.check_backward()


@pairwise
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("source", ["grid", "affine"])
@pytest.mark.parametrize("channels", [1, 8, 17])
def test_vectors_stay_inside(device, monkeypatch, channels, source, dtype, layout):
    """16-byte vectors of channels, in every dtype, with and without a rest, and on their own splits."""
    problem = Problem(device, 2, source, "bilinear", "border", True, [layout] * 5, dtype, channels)
    with configs.override(channels=8, unroll=2, splits=2), banded_buffers(monkeypatch):
        problem.check_forward()
        problem.check_backward()


@pairwise
@pytest.mark.parametrize("padding", [Padding.ZEROS, Padding.BORDER])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16])
@pytest.mark.parametrize("layout", ["channels_last", "offset"])
def test_fill_and_integers_stay_inside(device, padding, dtype, layout):
    """Every pixel is written, bad coordinates' with the fill, and each access is to an element."""
    from stn_triton.kernels.sample import sample_forward

    image = place(torch.full((2, 17, 4, 5), 100).to(dtype), layout, 77, device)
    flow = torch.zeros(2, 2, 3, 6)
    bad = torch.tensor(BAD).repeat(3)[:18]
    flow[0, 0], flow[1, 1] = bad.view(3, 6), bad.view(3, 6)
    flow = place(flow, "swapped", device=device)
    fill = place(torch.full((2, 17), 200.0), "offset", device=device)
    output = place(torch.zeros(2, 17, 3, 6).to(dtype), layout, 55, device)
    with configs.override(rows=2, columns=8, channels=8):
        sample_forward(image, flow, None, output, Source.FLOW, Interpolation.NEAREST, padding, False, fill)
    assert (output == 200).all()
    flow[flow != 0] = 0.25
    sample_forward(image, flow, None, output, Source.FLOW, Interpolation.NEAREST, padding, False, fill)
    assert (output == 100).all()
    for tensor, around in ((image, 77), (output, 55), (flow, NAN), (fill, NAN)):
        assert_band(tensor, around)


@pytest.mark.parametrize("source", ["grid", "affine"])
@pytest.mark.parametrize("input_grad, params_grad", [(True, False), (False, True)])
def test_one_gradient_alone(device, source, input_grad, params_grad):
    """A gradient that is not asked for is not written."""
    problem = Problem(device, 2, source, "bilinear", "zeros", False, ["contiguous"] * 5)
    problem.check_backward(input_grad, params_grad)


@pytest.mark.parametrize("source", ["grid", "affine"])
def test_pixels_that_do_not_exist_read_no_nan(device, source):
    """A tile's pixels beyond the output are computed too, from other places of the image: to no effect."""
    from stn_triton.kernels.sample import sample_backward, sample_forward

    input, params, columns = torch.rand(1, 2, 8, 8), random_grid(1, (3, 5), torch.float32, "cpu", 0.9), 5
    if source == "grid":  # a masked grid entry is 0: the middle of the image, whence no pixel reads
        params = params.abs().clamp(min=0.5)
        input[:, :, 2:5, 2:5] = NAN
    else:  # outputs end at x = 0.3, and the tile's other pixels go on to the right and below
        params = torch.tensor([[[0.5, 0.0, -0.2], [0.0, 0.5, -0.2]]])
        input[:, :, :, 6:] = NAN
        input[:, :, 6:] = NAN
    input, params = input.to(device), params.to(device)
    output = torch.full((1, 2, 3, columns), CANARY, device=device)
    kind = Source.GRID if source == "grid" else Source.AFFINE
    modes = Interpolation.BILINEAR, Padding.BORDER, False
    by_input = torch.zeros_like(input)
    with configs.override(rows=8, columns=16, channels=2):
        sample_forward(input, params, None, output, kind, *modes)
        by_params, _ = sample_backward(
            torch.ones_like(output), input, params, None, by_input, kind, *modes, True
        )
    for result in (output, by_input, by_params):
        assert result.isfinite().all()
    assert (output != CANARY).all()
    assert abs(by_input.sum().item() - output.numel()) < 1e-3


@pairwise
@combinations
def test_bad_coordinates_stay_inside(device, dims, source, mode, padding, align_corners):
    """Coordinates that mean nothing lead to no address outside the image, forward or backward."""
    from stn_triton.kernels.sample import sample_backward, sample_forward

    layouts = ["sliced", "reversed", "channels_last", "gaps", "offset"]
    problem = Problem(device, dims, source, mode, padding, align_corners, layouts)
    if source == "grid":
        flat = torch.tensor(BAD, device=device).repeat(problem.params[..., 0].numel() // len(BAD) + 1)
        bad = flat[: problem.params[..., 0].numel()].view(problem.params.shape[:-1])
        problem.params[0, ..., 0] = bad[0]
        problem.params[1] = bad[1].unsqueeze(-1)
    else:
        problem.params[0, 0, -1] = NAN
        problem.params[1, :, 0] = float("inf")
    sample_forward(problem.input, problem.params, None, problem.output, problem.source, *problem.modes)
    by_params, _ = sample_backward(
        problem.grad_output,
        problem.input,
        problem.params,
        None,
        problem.grad_input,
        problem.source,
        *problem.modes,
        True,
    )
    for result in (problem.output, by_params, problem.grad_input):
        assert result.isfinite().all()
    assert (problem.output != CANARY).all()
    assert_band(problem.output, CANARY)
    assert_band(problem.grad_input, CANARY)
    problem.check_inputs()


# ------------------------------------------------------------------------------------- affine_grid
@pairwise
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])
@pytest.mark.parametrize("dims", [2, 3])
def test_grid_kernel_stays_inside(device, monkeypatch, dims, align_corners, layout):
    """``affine_grid``'s launchers: parameters, grid and the grid's gradient in every layout."""
    from stn_triton.kernels.grid import grid_backward, grid_forward

    size = OUT_SIZE[dims]
    theta = place(random_theta(2, dims, torch.float32, "cpu"), layout, device=device)
    values = own(theta).requires_grad_()
    expected = affine_witness(values, size, align_corners)
    dense = "gaps" if layout.startswith("expanded") else layout
    grid = place(torch.full(expected.shape, CANARY), dense, CANARY, device)
    grad_grid = place(torch.randn(expected.shape), layout, device=device)
    with configs.override(rows=4, columns=4), banded_buffers(monkeypatch):
        grid_forward(theta, None, grid, Source.AFFINE, align_corners)
        by_theta, _ = grid_backward(grad_grid, theta, None, Source.AFFINE, align_corners)
    assert_close(grid, expected.detach())
    assert_close(
        by_theta, torch.autograd.grad(expected, values, own(grad_grid))[0], scale=own(grad_grid).norm()
    )
    assert_band(grid, CANARY)
    assert_band(theta)
    assert_band(grad_grid)


# -------------------------------------------------------------------------------- public functions
# Every layout, and every dtype in the two extreme ones.
DTYPES_AND_LAYOUTS = [
    pytest.param(dtype, layout, id=f"{str(dtype)[6:]}-{layout}")
    for dtype in DTYPES
    for layout in LAYOUTS
    if dtype == torch.float32 or layout in ("gaps", "expanded_all")
]


@pytest.mark.parametrize("dtype, layout", DTYPES_AND_LAYOUTS)
@pytest.mark.parametrize("source", ["grid", "affine"])
def test_public_samplers_among_nans(device, source, dtype, layout):
    """Inputs among NaNs and allocations full of them: what a user gets is right, and of the right dtype."""
    layouts = [layout, layout, "contiguous", layout, "contiguous"]
    problem = Problem(device, 2, source, "bilinear", "reflection", False, layouts, dtype)
    input, params = (tensor.detach().requires_grad_() for tensor in (problem.input, problem.params))
    assert input.stride() == problem.input.stride()
    with poisoned_allocations():
        if source == "grid":
            output = stn.grid_sample(input, params, "bilinear", "reflection", False)
        else:
            output = stn.affine_grid_sample(input, params, OUT_SIZE[2], "bilinear", "reflection", False)
        by_input, by_params = torch.autograd.grad(output, (input, params), problem.grad_output)
    assert output.dtype == by_input.dtype == by_params.dtype == dtype
    problem.check_output(output.detach())
    assert_close(by_input, problem.by_input)
    assert_close(by_params, problem.by_params, scale=problem.by_params_scale())
    problem.check_inputs()


@pytest.mark.parametrize("dtype, layout", DTYPES_AND_LAYOUTS)
def test_public_grid_among_nans(device, dtype, layout):
    """``affine_grid`` likewise."""
    theta = place(random_theta(2, 2, dtype, "cpu"), layout, device=device).detach().requires_grad_()
    values = own(theta).requires_grad_()
    expected = affine_witness(values, OUT_SIZE[2], False)
    grad_grid = place(torch.randn(expected.shape).to(dtype), layout, device=device)
    with poisoned_allocations():
        grid = stn.affine_grid(theta, (2, 3, *OUT_SIZE[2]), False)
        (by_theta,) = torch.autograd.grad(grid, theta, grad_grid)
    assert grid.dtype == by_theta.dtype == dtype
    assert_close(grid.detach(), expected.detach())
    assert_close(
        by_theta, torch.autograd.grad(expected, values, own(grad_grid))[0], scale=own(grad_grid).norm()
    )
    assert_band(theta.detach())
    assert_band(grad_grid)
