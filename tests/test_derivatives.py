"""First, second and third derivatives, reverse and forward: every source, interpolation and padding."""

import gc
import itertools
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from common import MODES, PADDINGS, assert_close, padding_of
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import stn_triton as stn
from stn_triton import autograd, backend, ops
from stn_triton.checks import to_padding
from stn_triton.kernels.modes import Interpolation, Source
from stn_triton.reference import operators

DOUBLE = torch.float64
# (source, dims, transforms of each image, one set of parameters for all images)
SOURCES = {
    "grid-2d": (Source.GRID, 2, None, False),
    "grid-3d": (Source.GRID, 3, None, False),
    "affine-2d": (Source.AFFINE, 2, None, False),
    "affine-3d": (Source.AFFINE, 3, None, False),
    "affine-transforms": (Source.AFFINE, 2, 2, True),
    "projective": (Source.PROJECTIVE, 2, None, True),
    "projective-transforms": (Source.PROJECTIVE, 2, 2, False),
    "tps": (Source.TPS, 2, None, False),
    "tps-transforms": (Source.TPS, 2, 2, True),
    "flow-2d": (Source.FLOW, 2, None, True),
    "flow-3d": (Source.FLOW, 3, None, False),
}


@pytest.fixture
def anywhere(device):
    """PyTorch's operators on the CPU, where the interpreter would take minutes; on a GPU the kernels."""
    if device.type != "cpu":
        yield
    else:
        with backend.use("torch"):
            yield


def arguments(name, device, dtype=DOUBLE, images=2, channels=1):
    """The tensors of a source (image, parameters[, control points]) and the output's size."""
    source, dims, transforms, shared = SOURCES[name]
    in_size, size = ((4, 5), (2, 3)) if dims == 2 else ((3, 4, 3), (1, 2, 2))
    options = {"dtype": DOUBLE}
    lead = (1 if shared else images, *([transforms] if transforms else []))
    image, controls = torch.randn(images, channels, *in_size, **options), ()
    if source == Source.GRID:
        params = torch.rand(images, *size, dims, **options) * 2.6 - 1.3
    elif source == Source.FLOW:
        params = 1.3 * torch.randn(lead[0], dims, *size, **options)
    elif source == Source.AFFINE:
        params = torch.eye(dims, dims + 1, **options) + 0.3 * torch.randn(*lead, dims, dims + 1, **options)
    elif source == Source.PROJECTIVE:
        params = torch.eye(3, **options) + 0.15 * torch.randn(*lead, 3, 3, **options)
    else:
        controls = (torch.rand(4, 2, **options) * 2 - 1,)
        params = 0.2 * torch.randn(*lead, 7, 2, **options)
        params[..., -3:, :] += torch.eye(3, 2, **options)
    wide = DOUBLE if dtype == DOUBLE else torch.float32
    return (
        image.to(device, dtype),
        params.to(device, wide),
        *(control_points.to(device, wide) for control_points in controls),
    ), size


def sampler(name, size, mode, padding, align_corners=False):
    """The samples as a function of the source's tensors."""
    source, dims, *_ = SOURCES[name]
    codes = Interpolation[mode.upper()], to_padding(padding_of(padding, dims), dims), align_corners

    def function(image, params, control_points=None):
        return autograd.sample(image, params, control_points, int(source), size, *codes)

    return function


def leaves(tensors):
    return tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)


# ------------------------------------------------------------------------------- against differences
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SOURCES)
def test_first_and_second(anywhere, device, name, mode):
    """Reverse, forward, reverse over reverse and forward over reverse, alone and for several at once."""
    first = list(SOURCES).index(name) + MODES.index(mode)  # each padding in each mode
    padding, align_corners = (*PADDINGS, "mixed")[first % 4], first // 4 % 2 == first % 2
    tensors, size = arguments(name, device, images=1 if "3d" in name else 2)
    function = sampler(name, size, mode, padding, align_corners)
    several = mode == "bilinear"  # PyTorch's batching is the same for all modes
    assert gradcheck(
        function,
        leaves(tensors),
        check_forward_ad=True,
        check_batched_grad=several,
        check_batched_forward_grad=several,
        fast_mode=True,
    )
    assert gradgradcheck(
        function,
        leaves(tensors),
        check_fwd_over_rev=True,
        check_batched_grad=several,
        fast_mode=True,
    )


@pytest.mark.parametrize("name", ["grid-2d", "affine-2d"])
def test_first_and_second_in_kernels(device, name):
    """The same on the kernels, for some; ``test_backends_agree`` has all."""
    mode = "bicubic" if name == "grid-2d" else "bilinear"
    tensors, size = arguments(name, device, images=1)
    function = sampler(name, size, mode, "mixed")
    assert gradcheck(function, leaves(tensors), check_forward_ad=True, fast_mode=True, nondet_tol=1e-12)
    assert gradgradcheck(function, leaves(tensors), check_fwd_over_rev=True, fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize("name", SOURCES)
def test_backends_agree(device, name):
    """The kernels' derivatives are those of PyTorch's operators, in every interpolation and padding."""
    modes = list(zip(MODES, ("border", "zeros", "mixed")))
    if device.type == "cpu":  # the interpreter has time for two of them
        first = list(SOURCES).index(name)
        modes = [modes[(first + k) % 3] for k in range(2)]
    for mode, padding in modes:
        tensors, size = arguments(name, device, channels=2)
        function = sampler(name, size, mode, padding)
        tangents = [torch.randn_like(tensor) for tensor in tensors]
        weights = torch.randn_like(function(*tensors))
        results = []
        for which in ("torch", None):
            if which is None and device.type == "cpu":
                results.append(second_order(function, tensors, tangents, weights))
            else:
                with backend.use(which or "triton"):
                    results.append(second_order(function, tensors, tangents, weights))
        for expected, result in zip(*results, strict=True):
            assert_close(result, expected)


def second_order(function, tensors, tangents, weights):
    """Double backward, forward mode, and forward mode over the gradient, in one direction."""
    inputs = leaves(tensors)
    first = torch.autograd.grad((function(*inputs) * weights).square().sum(), inputs, create_graph=True)
    along = sum((g * tangent).sum() for g, tangent in zip(first, tangents))
    second = torch.autograd.grad(along, inputs)

    def gradient(*args):
        arguments = tuple(range(len(tensors)))
        return torch.func.grad(lambda *a: (function(*a) * weights).square().sum(), arguments)(*args)

    _, forward = torch.func.jvp(function, tuple(tensors), tuple(tangents))
    _, mixed = torch.func.jvp(gradient, tuple(tensors), tuple(tangents))
    return (*(g.detach() for g in first), *second, forward, *mixed)


@pytest.mark.parametrize("name", ["grid-2d", "affine-2d", "projective", "tps", "flow-2d"])
def test_third(anywhere, device, name):
    """Third derivatives in every mixture of forward and reverse, by differences of the second."""
    (image, params, *controls), size = arguments(name, device, images=1)
    function = sampler(name, size, "bicubic", "border")
    directions = [torch.randn_like(params) for _ in range(3)]

    def loss(params):
        return function(image, params, *controls).square().sum()

    def along(mode, function, direction):
        if mode == "forward":
            return lambda p: torch.func.jvp(function, (p,), (direction,))[1]
        return lambda p: (torch.func.grad(function)(p) * direction).sum()

    def nested(*modes):
        result = loss
        for mode, direction in zip(modes, directions):
            result = along(mode, result, direction)
        return result

    step = 1e-5 * directions[2]
    second = nested("reverse", "reverse")
    wanted = (second(params + step) - second(params - step)) / 2e-5
    for modes in itertools.product(("forward", "reverse"), repeat=3):
        assert (nested(*modes)(params) - wanted).abs() < 1e-6 * wanted.abs(), modes


def test_third_of_everything(anywhere, device):
    """By the image and control points too, in reverse."""
    for name in ("grid-3d", "affine-transforms", "tps"):
        tensors, size = arguments(name, device, images=1)
        function = sampler(name, size, "bicubic", "zeros")
        weights = torch.randn_like(function(*tensors))

        def gradient(*inputs, function=function, weights=weights):
            loss = (function(*inputs) * weights).square().sum()
            return torch.autograd.grad(loss, inputs, create_graph=True)

        assert gradgradcheck(gradient, leaves(tensors), fast_mode=True)


@pytest.mark.parametrize("source", ["affine", "projective", "tps"])
def test_grids(either_backend, device, source):
    """The grids themselves: first and second derivatives, forward and reverse."""
    size = (1, 1, 2, 3)
    if source == "affine":
        tensors, function = (torch.randn(1, 2, 3),), lambda t: stn.affine_grid(t, size, False)
    elif source == "projective":
        tensors = (torch.eye(3) + 0.1 * torch.randn(1, 3, 3),)
        function = lambda h: stn.projective_grid(h, size)  # noqa: E731
    else:
        tensors = (torch.randn(1, 7, 2), torch.rand(4, 2))
        function = lambda c, p: autograd.grid(c, p, int(Source.TPS), (2, 3), False)  # noqa: E731
    tensors = [tensor.to(device, DOUBLE) for tensor in tensors]
    assert gradcheck(function, leaves(tensors), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, leaves(tensors), check_fwd_over_rev=True, fast_mode=True)
    _, along = torch.func.jvp(function, tuple(tensors), tuple(torch.ones_like(t) for t in tensors))
    assert along.count_nonzero() > 0


# --------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_kinks(either_backend, device, mode, padding, align_corners):
    """On whole and half pixels, borders and mirrors the one-sided derivatives are PyTorch's.

    Pixels and grids of 2^n parts, so that all coordinates are exact: in forward mode and in the second
    derivatives (by the image and the grid) as in the first.
    """
    size = 5 if align_corners else 4
    steps = torch.arange(-3 * size * 4, 3 * size * 4 + 1, dtype=DOUBLE, device=device) / (2 * size)
    steps = (steps * 4).round() / 4 if align_corners else steps
    grid = torch.stack(torch.meshgrid(steps[::3], steps[::7], indexing="xy"), -1).unsqueeze(0)
    image = torch.randn(1, 2, size, size, dtype=DOUBLE, device=device)
    g = torch.randn(1, 2, *grid.shape[1:3], dtype=DOUBLE, device=device)
    place = mode, padding, align_corners

    wanted = leaves((image.cpu(), grid.cpu()))
    wanted = torch.autograd.grad(F.grid_sample(*wanted, *place), wanted, g.cpu())

    def function(image, grid):
        return stn.grid_sample(image, grid, *place)

    ours = leaves((image, grid))
    for result, expected in zip(torch.autograd.grad(function(*ours), ours, g), wanted):
        assert_close(result, expected)
    for axis in range(2):
        direction = torch.zeros_like(grid)
        direction[..., axis] = 1
        _, along = torch.func.jvp(lambda grid: function(image, grid), (grid,), (direction,))
        assert_close((along * g).sum(1), wanted[1][..., axis])
    # d <v, d image> / d grid is the first derivative of the samples of v, and is linear in g
    v, leaf = torch.randn_like(image), grid.clone().requires_grad_()
    (by_image,) = torch.autograd.grad(function(ours[0], leaf), ours[0], g, create_graph=True)
    second = torch.autograd.grad((by_image * v).sum(), leaf, allow_unused=True, materialize_grads=True)
    inputs = leaves((v.cpu(), grid.cpu()))
    expected = torch.autograd.grad(F.grid_sample(*inputs, *place), inputs[1], g.cpu())
    assert_close(second[0], expected[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", ["zeros", "border", "mixed"])
def test_bad_coordinates(either_backend, device, padding, mode):
    """NaN, infinite and huge coordinates crash nothing and leave no NaN, in any derivative."""
    bad = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e9, 0.3]
    grid = torch.tensor(list(itertools.product(bad, repeat=2)), dtype=torch.float32, device=device)
    grid = grid.view(1, len(bad), len(bad), 2)
    image = torch.randn(1, 1, 4, 5, device=device)
    tensors, tangents = (image, grid), (torch.randn_like(image), torch.randn_like(grid))

    def function(image, grid):
        return stn.grid_sample(image, grid, mode, padding_of(padding, 2), False)

    for result in second_order(function, tensors, tangents, torch.ones_like(grid[:, None, ..., 0])):
        assert result.isfinite().all()


def test_horizon(either_backend, device):
    """What no coordinate is seen for neither moves nor is moved."""
    tensors, size = arguments("projective", device)
    image, homography = tensors[0], torch.zeros_like(tensors[1])
    function = sampler("projective", size, "bilinear", "zeros")
    tangents = torch.randn_like(image), torch.randn_like(homography)
    weights = torch.ones(2, 1, *size, dtype=DOUBLE, device=device)
    for result in second_order(function, (image, homography), tangents, weights):
        assert result.count_nonzero() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_bad_homographies(either_backend, device, value):
    """An entry of each that is no number, infinite or huge leaves no NaN, in any derivative."""
    homography = torch.eye(3, dtype=DOUBLE).repeat(1, 9, 1, 1) + 0.05
    homography.view(9, 9).diagonal().fill_(value)
    image = torch.randn(1, 1, 4, 5, dtype=DOUBLE).to(device)
    tensors = image, homography.to(device)
    tangents = [torch.randn_like(tensor) for tensor in tensors]
    weights = torch.ones(1, 9, 1, 3, 4, dtype=DOUBLE, device=device)
    function = sampler("projective", (3, 4), "bilinear", "zeros")
    for result in second_order(function, tensors, tangents, weights):
        assert result.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["affine-2d", "tps"])
def test_half_images(either_backend, device, name, dtype):
    """A half image with float32 parameters: rounded once, in every derivative."""
    tensors, size = arguments(name, device, dtype, channels=3)
    function = sampler(name, size, "bilinear", "zeros")
    tangents = [torch.randn_like(tensor) for tensor in tensors]
    weights = torch.ones_like(function(*tensors))
    wide = [[t.double() for t in group] for group in (tensors, tangents)]
    with backend.use("torch"):
        expected = second_order(function, *wide, weights.double())
    results = second_order(function, tensors, tangents, weights)
    assert [r.dtype for r in results[: len(tensors)]] == [t.dtype for t in tensors]
    for result, reference in zip(results, expected, strict=True):
        # the loss in between is squared in the half type: its roundings are doubled on the way
        scale = reference.abs().max().item()
        assert (result.double() - reference).abs().max() <= 40 * torch.finfo(dtype).eps * max(scale, 1)


@pytest.mark.parametrize("name", ["affine-2d", "projective", "tps"])
def test_autocast(either_backend, device, name):
    """Derivatives are computed in the type of their arguments, autocast or not."""
    tensors, size = arguments(name, device, torch.float32)
    function = sampler(name, size, "bicubic", "zeros")
    tangents = [torch.randn_like(tensor) for tensor in tensors]
    weights = torch.ones_like(function(*tensors))
    expected = second_order(function, tensors, tangents, weights)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        results = second_order(function, tensors, tangents, weights)
    for result, reference in zip(results, expected, strict=True):
        assert_close(result, reference, torch.float32)


def test_empty(either_backend, device):
    """Nothing in, nothing out, zeros where there is something."""
    for shape, size in (((0, 1, 4, 5), (2, 3)), ((2, 0, 4, 5), (2, 3)), ((2, 1, 4, 5), (0, 3))):
        tensors = torch.randn(shape, device=device), torch.randn(shape[0], 2, 3, device=device)
        function = sampler("affine-2d", size, "bilinear", "zeros")
        tangents = [torch.ones_like(tensor) for tensor in tensors]
        for result in second_order(function, tensors, tangents, torch.ones((), device=device)):
            assert result.count_nonzero() == 0


# ---------------------------------------------------------------------------------------------- masks
class Calls(TorchDispatchMode):
    """The calls of this package's operators, and of PyTorch's samplers, as (name, arguments)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "stn_triton" or "grid_sampler" in func.name():
            self.calls.append((func.name().split("::")[1], args))
        return func(*args, **(kwargs or {}))

    def named(self, name):
        return [args for called, args in self.calls if called == name]


class Saved:
    def __init__(self):
        self.tensors = []

    def pack(self, tensor):
        self.tensors.append(tensor)
        return tensor


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["grid-2d", "affine-2d", "tps", "flow-2d"])
def test_saved_tensors(device, name, mode):
    """The image is held only for a gradient by the coordinates that is not 0; of a fused source no grid."""
    tensors, size = arguments(name, device)
    function = sampler(name, size, mode, "zeros")
    for needed in itertools.product((False, True), repeat=len(tensors)):
        inputs = [t.clone().requires_grad_(need) for t, need in zip(tensors, needed)]
        saved = Saved()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
            function(*inputs)
        expected = list(inputs[1:]) if any(needed) else []
        if any(needed[1:]) and mode != "nearest":
            expected.insert(0, inputs[0])
        assert [t.data_ptr() for t in saved.tensors] == [t.data_ptr() for t in expected]


def test_nothing_is_kept_for_forward_mode(anywhere, device):
    """Neither without tangents nor after they have been used."""
    (image, theta), size = arguments("affine-2d", device)
    function = sampler("affine-2d", size, "nearest", "zeros")
    for dual in (False, True):
        with forward_ad.dual_level():
            copy = image.clone()
            held = weakref.ref(copy)
            given = forward_ad.make_dual(copy, torch.ones_like(copy)) if dual else copy
            output = function(given, theta.requires_grad_())
            assert output.requires_grad
            del copy, given
        gc.collect()
        assert held() is None


def test_only_what_is_wanted_is_computed(anywhere, device):
    """One operator call each way, with a mask of what is wanted, and ATen gets the mask."""
    (image, theta), size = arguments("affine-2d", device)
    function = sampler("affine-2d", size, "bilinear", "zeros")
    for needed in ((True, False), (False, True), (True, True)):
        inputs = [t.clone().requires_grad_(need) for t, need in zip((image, theta), needed)]
        with Calls() as calls:
            function(*inputs).sum().backward()
        assert [name for name, _ in calls.calls if "sample_" in name] == ["sample_backward"]
        (backward,) = calls.named("sample_backward")
        assert tuple(backward[-3:]) == (*needed, False)
        assert (backward[1] is None) == (not needed[1])
        if backend.select(device.type).name == "torch":
            aten = mock.Mock(wraps=torch.ops.aten.grid_sampler_2d_backward.default)
            with mock.patch.object(operators, "_sampler", return_value=(None, aten)):
                ops.sample_backward(*backward)
            assert list(aten.call_args.args[-1]) == list(needed)


def test_only_what_is_wanted_is_computed_twice(anywhere, device):
    """The second derivative by the image alone is a sample; by theta alone it scatters nothing."""
    (image, theta), size = arguments("affine-2d", device)
    function = sampler("affine-2d", size, "bilinear", "zeros")
    g = torch.randn_like(function(image, theta)).requires_grad_()
    leaf = image.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf, theta), leaf, g, create_graph=True)
    with Calls() as calls:
        (by_g,) = torch.autograd.grad(first.square().sum(), g)
    assert [name for name, _ in calls.calls if name.startswith("sample")] == ["sample_jvp"]
    assert calls.named("sample_jvp")[0][0] is None  # no image: the samples of the cotangent
    assert_close(by_g, 2 * function(first.detach(), theta))

    leaf = theta.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(image, leaf), leaf, g.detach(), create_graph=True)
    with Calls() as calls:
        torch.autograd.grad(first.square().sum(), leaf)
    (hvp,) = calls.named("sample_hvp")
    assert tuple(hvp[-2:]) == (False, True)
    assert not calls.named("sample_jvp")
    assert not calls.named("sample_backward")


def test_operators_make_the_derivatives(anywhere, device):
    """First and second derivatives in any mixture come from the operators, never from plain PyTorch."""
    for name in ("grid-2d", "affine-2d", "projective", "tps", "flow-2d"):
        tensors, size = arguments(name, device)
        function = sampler(name, size, "bilinear", "zeros")
        weights = torch.ones_like(function(*tensors))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(autograd.samples._SampleHvp, "plain", None)
            second_order(function, tensors, [torch.ones_like(t) for t in tensors], weights)
