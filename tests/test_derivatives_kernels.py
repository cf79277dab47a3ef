"""Forward mode and second derivatives: both kernels against float64.

All that they compute comes out of one scalar, with L = <g, samples>:

    s = <d L / d image, tangent> + <d L / d coordinates, moved>

d s / d g is the derivative of the samples along the direction (tangent, moved); d s / d image and
d s / d coordinates are L's Hessian times the direction. The witness takes them by autograd from the plain
PyTorch sampler, or as differences of PyTorch's own backward.
"""

import itertools

import pytest
import torch
from common import (
    CANARY,
    LAYOUTS,
    NAN,
    TAPPED,
    assert_band,
    assert_close,
    away_from_kinks,
    pairwise,
    place,
    random_grid,
    random_theta,
)

from bench.interpreter import checked_addresses
from bench.specialisations import field_of
from stn_triton import reference
from stn_triton.kernels.host import configs
from stn_triton.kernels.modes import Interpolation, Padding, Source

IN_SIZE = {2: (5, 6), 3: (3, 4, 5)}
OUT_SIZE = {2: (4, 7), 3: (2, 3, 4)}
PLANAR = (Source.PROJECTIVE, Source.TPS)
BILINEAR, NEAREST, BICUBIC = Interpolation.BILINEAR, Interpolation.NEAREST, Interpolation.BICUBIC
F32, F64 = torch.float32, torch.float64
# Tiles that divide neither rows, columns nor channels, and channels shared by several programs.
RAGGED = {"rows": 4, "columns": 4, "channels": 2, "splits": 2}

# The interpreter computes with NumPy, which speaks of the infinities that it meets.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

name = lambda value: value.name.lower()  # noqa: E731
align = pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])
padding_modes = pytest.mark.parametrize("padding", Padding, ids=name)
smooth_modes = pytest.mark.parametrize("interpolation", [BILINEAR, BICUBIC], ids=name)
every_source = pytest.mark.parametrize(
    "dims, source",
    [
        pytest.param(dims, source, id=f"{dims}d-{source.name.lower()}")
        for dims, source in itertools.product((2, 3), Source)
        if dims == 2 or source not in PLANAR
    ],
)


@pytest.fixture
def _checked():
    """Every address that is touched is checked."""
    with checked_addresses():
        yield


def random_params(source, dims, size, batch, transforms):
    """Parameters (batch, [transforms,] ...) and control points, in float64."""
    outputs = batch * (transforms or 1)
    control_points = None
    if source == Source.GRID:
        params = random_grid(outputs, size, F64, "cpu", reach=1.3)
    elif source == Source.FLOW:
        params = 1.5 * torch.randn(outputs, dims, *size, dtype=F64)
    elif source == Source.AFFINE:
        params = random_theta(outputs, dims, F64, "cpu")
    elif source == Source.PROJECTIVE:
        params = torch.eye(3, dtype=F64) + 0.15 * torch.randn(outputs, 3, 3, dtype=F64)
    else:
        control_points = torch.rand(5, 2, dtype=F64) * 2 - 1
        params = 0.15 * torch.randn(outputs, 5 + 3, 2, dtype=F64)
        params[:, 5:7] += torch.eye(2, dtype=F64)
    return params.unflatten(0, (batch, transforms)) if transforms else params, control_points


class Problem:
    """A sampling problem, a direction and a gradient, and what the kernels should make of them."""

    def __init__(
        self,
        device,
        dims,
        source,
        interpolation=BILINEAR,
        padding=Padding.ZEROS,
        align_corners=False,
        *,
        in_size=None,
        size=None,
        batch=2,
        channels=3,
        transforms=None,
        broadcast=False,
        dtype=F64,
        params_dtype=None,
        layouts=None,
        tangent=True,
        moved=True,
        params=None,
    ):
        """``layouts``: of whichever of input, tangent, params, moved, grad_output, output and grad_input."""
        self.dims, self.source, self.align_corners = dims, source, align_corners
        self.modes = interpolation, padding, align_corners
        self.layouts, self.device = layouts or {}, device
        in_size, self.size = in_size or IN_SIZE[dims], size or OUT_SIZE[dims]
        compute = F64 if F64 in (dtype, params_dtype) else F32
        made, controls = random_params(source, dims, self.size, 1 if broadcast else batch, transforms)
        outputs = (batch, transforms) if transforms else (batch,)
        self.params = self.placed("params", made if params is None else params, params_dtype or dtype)
        self.control_points = None if controls is None else controls.to(device, params_dtype or dtype)
        image = (batch, channels, *in_size)
        self.input = self.placed("input", torch.randn(image), dtype)
        self.tangent = self.placed("tangent", torch.randn(image), dtype) if tangent else None
        rows = (1 if broadcast else batch, transforms or 1, *self.size, dims)
        self.moved = None
        if moved:
            values = self.placed("moved", 0.3 * torch.randn(rows), compute)
            self.moved = values.expand(batch, *values.shape[1:])
        g = torch.randn(*outputs, channels, *self.size)
        self.steady = self.away_from_kinks()
        if not self.layouts.get("grad_output", "").startswith("expanded"):
            g = g * self.steady
        self.grad_output = self.placed("grad_output", g, dtype)
        self.output = self.placed("output", torch.full_like(g, CANARY), dtype, CANARY)
        self.grad_input = self.placed("grad_input", torch.zeros(image), compute, CANARY)

    def placed(self, role, tensor, dtype, fill=NAN):
        return place(tensor.to(dtype), self.layouts.get(role, "contiguous"), fill, self.device)

    def pixels(self, in_pixels=True):
        """Where the input is read, (N, T, *size, dims)."""
        params = self.params.double().cpu()
        controls = None if self.control_points is None else self.control_points.double().cpu()
        in_size = self.input.shape[2:]
        where = self.source, params, controls, self.size, in_size, self.align_corners, F64
        pixels = reference.operators.places(*where, in_pixels=in_pixels)
        return pixels.expand(self.input.shape[0], *pixels.shape[1:])

    def away_from_kinks(self):
        """(N, [T,] 1, *size): where nothing jumps. A cubic's second derivative does, at whole coordinates."""
        in_size = self.input.shape[2:]
        if 1 in in_size or not self.pixels().isfinite().all():
            return torch.ones(())
        mode = "nearest" if self.modes[0] == NEAREST else "bilinear"
        grid = self.pixels(in_pixels=False)
        steady = away_from_kinks(grid.flatten(0, 1), tuple(in_size), mode, self.align_corners).unsqueeze(1)
        return steady.unflatten(0, grid.shape[:2]) if grid.shape[1] > 1 else steady

    def scales(self):
        """Pixels per unit of the source's coordinates."""
        if self.source == Source.FLOW:
            return torch.ones(self.dims, dtype=F64)
        return torch.tensor(
            reference.sources.pixel_scales(self.input.shape[2:], self.align_corners), dtype=F64
        )

    def expected(self):
        """The derivative along the direction; the Hessian's image part, and its part by the coordinates."""
        g, input, tangent, moved = (
            None if tensor is None else tensor.double().cpu()
            for tensor in (self.grad_output, self.input, self.tangent, self.moved)
        )
        leaves = [leaf.clone().requires_grad_() for leaf in (g, input, self.pixels())]
        g, input, pixels = leaves
        tall = (g if g.dim() > input.dim() else g.unsqueeze(1)).movedim(1, 2).flatten(2, 3)
        samples = reference.taps.sample_pixels(input, pixels.flatten(1, 2), self.modes)
        by_input, by_pixels = torch.autograd.grad(
            (samples * tall).sum(), leaves[1:], create_graph=True, materialize_grads=True
        )
        total = (by_input * (0 if tangent is None else tangent)).sum()
        if moved is not None:
            total = total + (by_pixels * (moved * self.scales())).sum()
        along, by_input, by_pixels = torch.autograd.grad(total, leaves, materialize_grads=True)
        return along, by_input, by_pixels * self.scales()

    def jvp(self):
        from stn_triton.kernels.derivatives import sample_jvp

        where = self.params, self.control_points, self.moved
        input = None if self.moved is None else self.input
        sample_jvp(input, self.tangent, *where, self.output, self.source, *self.modes)
        return self.output

    def hvp(self, input_grad=True, coordinates_grad=True):
        from stn_triton.kernels.derivatives import sample_hvp

        input = self.input if coordinates_grad and self.moved is not None else None
        by_coordinates = sample_hvp(
            self.grad_output,
            input,
            self.tangent if coordinates_grad else None,
            self.params,
            self.control_points,
            self.moved,
            self.grad_input if input_grad else None,
            self.source,
            *self.modes,
            coordinates_grad,
        )
        return self.grad_input, by_coordinates

    def check(self, scale=None):
        """Both kernels, and that nothing around any tensor was touched."""
        along, by_input, by_coordinates = self.expected()
        self.jvp()
        assert_close(self.output.cpu() * self.steady, along * self.steady, self.output.dtype)
        self.hvp_check(by_input, by_coordinates, scale)
        assert_band(self.output, CANARY)
        assert_band(self.grad_input, CANARY)
        for tensor in (self.input, self.params, self.grad_output):
            assert_band(tensor)

    def hvp_check(self, by_input, by_coordinates, scale=None):
        actual = self.hvp(input_grad=self.moved is not None)
        compute = reference.compute_dtype(self.input, self.params)
        if self.moved is not None:
            assert_close(actual[0], by_input, compute, scale)
        assert actual[1].is_contiguous()
        assert_close(actual[1], by_coordinates, compute, scale)


# ------------------------------------------------------------------------------- against autograd
@pairwise
@every_source
@pytest.mark.parametrize("interpolation", TAPPED, ids=name)
@padding_modes
@align
def test_against_autograd(device, dims, source, interpolation, padding, align_corners):
    """Every combination of modes, in float64."""
    Problem(device, dims, source, interpolation, padding, align_corners).check()


@pairwise
@smooth_modes
@pytest.mark.parametrize("padding", [Padding.ZEROS, Padding.BORDER, Padding.REFLECTION], ids=name)
@align
def test_against_differences(device, interpolation, padding, align_corners):
    """By differences of ATen's sampler and of its backward, which share nothing with the witness above."""
    problem = Problem(device, 2, Source.GRID, interpolation, padding, align_corners)
    input, tangent, grid, g = (
        t.cpu() for t in (problem.input, problem.tangent, problem.params, problem.grad_output)
    )
    step = 1e-5
    codes = int(interpolation), int(padding), align_corners

    def at(sign):
        image = input + sign * step * tangent
        places = grid + sign * step * problem.moved.cpu()[:, 0]
        value = torch.ops.aten.grid_sampler_2d(image, places, *codes)
        return value, *torch.ops.aten.grid_sampler_2d_backward(g, image, places, *codes, [True, True])

    along, by_input, by_grid = ((b - a) / (2 * step) for a, b in zip(at(-1), at(1)))
    keep = problem.steady
    # the differences' own rounding is 1e-16 / 1e-5 of what is subtracted
    assert ((problem.jvp().cpu() - along) * keep).abs().max() < 1e-7
    actual = problem.hvp()
    assert (actual[0].cpu() - by_input).abs().max() < 1e-7
    assert (actual[1].cpu()[:, 0] - by_grid).abs().max() < 1e-7


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("interpolation", TAPPED, ids=name)
def test_parts_of_a_direction(device, dims, interpolation):
    """A tangent alone, a displacement alone, and each result alone."""
    options = device, dims, Source.AFFINE, interpolation, Padding.REFLECTION, True
    Problem(*options, tangent=False).check()
    Problem(*options, moved=False).check()
    problem = Problem(*options)
    _, by_input, by_coordinates = problem.expected()
    assert problem.hvp(input_grad=False)[1].shape == by_coordinates.shape
    assert (problem.grad_input == 0).all()
    actual, nothing = problem.hvp(coordinates_grad=False)
    assert nothing is None
    assert_close(actual, by_input)
    if interpolation == NEAREST:
        assert (actual == 0).all()
        assert (by_coordinates == 0).all()


@pytest.mark.parametrize("dims", [2, 3])
@smooth_modes
def test_the_image_as_its_own_tangent_gives_the_first_derivative(device, dims, interpolation):
    """Samples are linear in the image."""
    from stn_triton.kernels.sample import sample_backward

    problem = Problem(device, dims, Source.GRID, interpolation, Padding.ZEROS, moved=False)
    problem.tangent = problem.input
    where = problem.params, None, None, Source.GRID
    by_grid, _ = sample_backward(problem.grad_output, problem.input, *where, *problem.modes, True)
    assert_close(problem.hvp(input_grad=False)[1][:, 0], by_grid.cpu())


# ------------------------------------------------------------------------------- dtypes and shapes
@pairwise
@pytest.mark.parametrize(
    "dtype, params_dtype",
    [(F32, F32), (torch.float16, F32), (torch.bfloat16, F32), (torch.bfloat16, torch.bfloat16), (F32, F64)],
    ids=lambda dtype: str(dtype)[6:],
)
@smooth_modes
@pytest.mark.parametrize("dims, source", [(2, Source.AFFINE), (2, Source.TPS), (3, Source.FLOW)])
def test_dtypes(device, dims, source, interpolation, dtype, params_dtype):
    """Results in the image's dtype forward; the Hessian's parts in the compute type."""
    options = {"dtype": dtype, "params_dtype": params_dtype}
    Problem(device, dims, source, interpolation, Padding.BORDER, **options).check()


@pairwise
@pytest.mark.parametrize("broadcast", [False, True], ids=["", "broadcast"])
@pytest.mark.parametrize("transforms", [None, 3])
@pytest.mark.parametrize(
    "dims, source", [(2, Source.AFFINE), (3, Source.AFFINE), (2, Source.PROJECTIVE), (2, Source.TPS)]
)
def test_transforms(device, dims, source, transforms, broadcast):
    """Many transforms of an image; parameters for the whole batch; splines in groups of four."""
    options = {"transforms": transforms, "broadcast": broadcast, "layouts": {"moved": "gaps"}}
    problem = Problem(device, dims, source, BICUBIC if dims == 2 else BILINEAR, **options)
    if broadcast:
        assert problem.moved.stride(0) == 0
    problem.check()


@pytest.mark.parametrize("source", [Source.GRID, Source.FLOW], ids=name)
def test_broadcast_dense_sources(device, source):
    """One grid or flow for the whole batch."""
    Problem(device, 2, source, BICUBIC, Padding.REFLECTION, broadcast=True, channels=1).check()


@pairwise
@pytest.mark.parametrize("in_size", [(1, 1), (1, 6), (6, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (5, 1)], ids=str)
@padding_modes
@align
def test_small_sizes(device, in_size, size, padding, align_corners):
    """Axes of one pixel."""
    for interpolation in (BILINEAR, BICUBIC):
        sizes = {"in_size": in_size, "size": size, "batch": 1, "channels": 1}
        Problem(device, 2, Source.AFFINE, interpolation, padding, align_corners, **sizes).check()


@pytest.mark.parametrize("channels", [1, 2, 5, 17])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_channels(device, channels, layout):
    """Even and uneven blocks of channels, in both patterns, of a tangent in the other layout."""
    other = {"contiguous": "channels_last", "channels_last": "contiguous"}[layout]
    layouts = dict.fromkeys(("input", "output", "grad_output", "grad_input"), layout) | {"tangent": other}
    with configs.override(channels=8 if layout == "channels_last" else 1, unroll=2, splits=2):
        problem = Problem(device, 2, Source.AFFINE, channels=channels, dtype=F32, layouts=layouts)
        problem.check(scale=channels**0.5 * 4)


# ------------------------------------------------------------------------------- memory
ROLES = ("input", "tangent", "moved", "params", "grad_output", "output", "grad_input")


@pytest.mark.usefixtures("_checked")
@pytest.mark.parametrize("first", range(len(LAYOUTS)))
@pytest.mark.parametrize("source", [Source.AFFINE, Source.FLOW], ids=lambda s: s.name.lower())
def test_each_layout_of_each_tensor(device, source, first):
    """Any strides of each tensor, among NaNs; ragged tiles. Together the cases have each in each layout."""
    layouts = {role: LAYOUTS[(first + k) % len(LAYOUTS)] for k, role in enumerate(ROLES)}
    for role in ("output", "grad_input"):
        if layouts[role].startswith("expanded"):
            layouts[role] = "sliced"  # nothing can be written there
    params = None
    if source == Source.AFFINE:
        layouts["params"] = "contiguous"
    elif layouts["params"].startswith("expanded"):  # one number for all pixels: not a whole one
        params = torch.full((2, 2, *OUT_SIZE[2]), 0.3713)
    with configs.override(**RAGGED):
        Problem(device, 2, source, params=params, layouts=layouts).check()


@pytest.mark.usefixtures("_checked")
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("dims, source", [(2, Source.TPS), (3, Source.GRID)])
def test_every_tensor_in_a_layout_of_its_own(device, dims, source, index):
    """Likewise all at a time; with 2 x 3 transforms of a spline the last group is not full."""
    dense = [layout for layout in LAYOUTS if not layout.startswith("expanded")]
    layouts = {role: dense[(index * (k + 1) + k) % len(dense)] for k, role in enumerate(ROLES)}
    transforms = 3 if source == Source.TPS else None
    with configs.override(**RAGGED):
        Problem(device, dims, source, transforms=transforms, layouts=layouts).check()


def test_wide_offsets(device, monkeypatch):
    """64-bit offsets, which the largest of all tensors asks for."""
    import triton.language as tl

    from stn_triton.kernels import sample
    from stn_triton.kernels.host import launch

    seen = []

    def spy(kernel, programs, device, *args, **kwargs):
        seen.append(field_of(kwargs["SPEC"], "index"))
        launch.run(kernel, programs, device, *args, **kwargs)

    monkeypatch.setattr(launch, "runner", spy)
    problem = Problem(device, 2, Source.AFFINE, BICUBIC, channels=2)
    problem.check()
    assert set(seen) == {tl.int32}
    seen.clear()
    monkeypatch.setattr(launch, "INT32_MAX", problem.input[0].numel() - 1)
    Problem(device, 2, Source.AFFINE, BICUBIC, channels=2).check()
    assert set(seen) == {tl.int64}
    # an image and gradients of one number each, but a gradient by the coordinates of many
    monkeypatch.setattr(launch, "INT32_MAX", 100)
    monkeypatch.setattr(sample, "INT32_MAX", 2 * problem.size[0] * problem.size[1] - 1)
    everything = dict.fromkeys(("input", "tangent", "moved", "grad_output"), "expanded_all")
    wide = Problem(device, 2, Source.AFFINE, channels=1, layouts=everything)
    seen.clear()
    assert wide.hvp(input_grad=False)[1].isfinite().all()
    assert seen == [tl.int64]


@pytest.mark.usefixtures("_checked")
@pytest.mark.parametrize("source", [Source.AFFINE, Source.GRID], ids=name)
def test_pixels_that_do_not_exist_move_nothing(device, source):
    """A tile's pixels beyond the output read real memory, where an image may hold NaN: to no effect."""
    params = torch.tensor([[[0.5, 0.0, -0.2], [0.0, 0.5, -0.2]]])  # outputs end at x = 0.3
    if source == Source.GRID:  # a masked entry is 0: the middle of the image
        params = random_grid(1, (3, 5), F32, "cpu", 0.9).abs().clamp(min=0.5)
    sizes = {"in_size": (8, 8), "size": (3, 5), "batch": 1, "channels": 2}
    problem = Problem(device, 2, source, padding=Padding.BORDER, dtype=F32, params=params, **sizes)
    for image in (problem.input, problem.tangent):
        if source == Source.GRID:
            image[:, :, 2:5, 2:5] = NAN
        else:
            image[:, :, :, 6:] = NAN
            image[:, :, 6:] = NAN
    with configs.override(rows=8, columns=16, channels=2):
        results = problem.jvp(), *problem.hvp()
    for result in results:
        assert result.isfinite().all()


# 2^31 and the largest float32 are whole pixels of no image, and cannot be turned into an int32.
BAD = (NAN, float("inf"), -float("inf"), 1e30, -1e30, 2.0**31, -(2.0**31), torch.finfo(F32).max)


@pairwise
@pytest.mark.usefixtures("_checked")
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("interpolation", TAPPED, ids=name)
@padding_modes
@align
def test_bad_coordinates(device, dims, interpolation, padding, align_corners):
    """Coordinates that mean nothing: finite results, no address outside a tensor."""
    rows = [[bad if k in axes else 0.31 for k in range(dims)] for bad in BAD for axes in ([0], range(dims))]
    params = torch.tensor(rows).view(1, *[1] * (dims - 1), len(rows), dims)
    options = {"size": tuple(params.shape[1:-1]), "batch": 1, "channels": 1, "dtype": F32, "params": params}
    problem = Problem(device, dims, Source.GRID, interpolation, padding, align_corners, **options)
    for result in (problem.jvp(), *problem.hvp()):
        assert result.isfinite().all()
    assert (problem.output != CANARY).all()
    assert_band(problem.grad_input, CANARY)


@pytest.mark.usefixtures("_checked")
@pytest.mark.parametrize("source", [Source.PROJECTIVE, Source.AFFINE], ids=name)
def test_coordinates_that_are_nan_read_nothing(device, source):
    """The horizon of a homography crosses the output; a matrix of NaN."""
    params = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 1, 0]]], dtype=F64)
    if source == Source.AFFINE:
        params = torch.full((1, 2, 3), NAN, dtype=F64)
    options = {"params": params, "size": (5, 5), "batch": 1}
    problem = Problem(device, 2, source, BICUBIC, **options)
    horizon = problem.pixels().isnan().all(-1).to(device)
    assert horizon.any()
    problem.grad_output.masked_fill_(~horizon, 0)
    by_input, by_coordinates = problem.hvp()
    assert (problem.jvp().masked_select(horizon) == 0).all()
    assert (by_input == 0).all()
    assert (by_coordinates == 0).all()


def test_a_displacement_of_nan_stays_in_its_pixel(device):
    """Nothing is added where nothing is read. The pixel's own results are NaN, as they are for a g of NaN."""
    params = torch.full((1, 4, 7, 2), 0.2)
    params[0, 0, 0] = 5.0  # outside
    problem = Problem(device, 2, Source.GRID, params=params, batch=1)
    problem.moved[0, 0, 0, 0] = NAN
    by_input, by_coordinates = problem.hvp()
    output = problem.jvp()
    assert by_input.isfinite().all()
    for result in (output.movedim(1, -1)[0], by_coordinates[0, 0]):
        broken = result.isnan().any(-1)
        assert broken[0, 0]
        assert broken.sum() == 1
