"""``torch.func``, ``torch.autograd.functional``, dual numbers, checkpoints, and compiling these."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.autograd.functional as functional
from common import MIXED, assert_close
from test_derivatives import SOURCES, Calls, arguments, leaves, sampler
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import stn_triton as stn
from stn_triton import autograd, backend
from stn_triton.kernels.modes import Source

SAMPLES = 3
NAMES = ("grid-2d", "affine-2d", "affine-transforms", "projective", "tps", "tps-transforms", "flow-2d")
PUBLIC = {
    "grid_sample": lambda x, p: stn.grid_sample(x, p, "bicubic", "border", False),
    "affine_grid_sample": lambda x, p: stn.affine_grid_sample(
        x, p, (2, 3), "bilinear", MIXED[2], antialias=True
    ),
    "projective_grid_sample": lambda x, p: stn.projective_grid_sample(x, p, (3, 4), fill=2.5),
    "tps_grid_sample": lambda x, p: stn.tps_grid_sample(x, p, (3, 4)),
    "tps_grid_sample by all points": lambda x, p: stn.tps_grid_sample(
        x, 0.9 * p, (3, 4), control_points=p[0].roll(1, 0)
    ),
    "flow_grid_sample": lambda x, p: stn.flow_grid_sample(x, p, padding_mode=MIXED[2]),
    "affine_grid": lambda x, p: x.mean() * stn.affine_grid(p, (2, 1, 3, 4), True),
    "projective_grid": lambda x, p: x.mean() * stn.projective_grid(p, (2, 1, 3, 4)),
    "tps_grid": lambda x, p: x.mean() * stn.tps_grid(p, (2, 1, 3, 4)),
}


@pytest.fixture
def anywhere(device):
    """PyTorch's operators on the CPU, where the interpreter would take minutes; on a GPU the kernels."""
    if device.type != "cpu":
        yield
    else:
        with backend.use("torch"):
            yield


def public_arguments(name, device):
    """An image and the parameters of a public function."""
    options = {"dtype": torch.float64, "device": device}
    image, noise = torch.randn(2, 1, 4, 5, **options), torch.randn(2, 3, 4, 2, **options)
    if name == "grid_sample":
        return image, noise
    if name == "flow_grid_sample":
        return image, noise.movedim(-1, 1)
    if name.startswith("tps"):
        return image, stn.transforms.identity(2, "tps", **options) + 0.1 * torch.randn(2, 16, 2, **options)
    if name.startswith("affine"):
        return image, torch.eye(2, 3, **options) + 0.2 * torch.randn(2, 2, 3, **options)
    return image, torch.eye(3, **options) + 0.1 * torch.randn(2, 3, 3, **options)


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def several(tensor, dim):
    """Samples around a tensor along a new dimension; the tensor itself for None."""
    if dim is None:
        return tensor
    return torch.stack([tensor + 0.1 * torch.randn_like(tensor) for _ in range(SAMPLES)], dim)


def assert_vmaps(function, in_dims, args):
    """``vmap`` gives what a loop gives."""
    loop = [
        as_tuple(function(*(a if d is None else a.select(d, k) for a, d in zip(args, in_dims))))
        for k in range(SAMPLES)
    ]
    results = as_tuple(vmap(function, in_dims=in_dims)(*args))
    for result, expected in zip(results, zip(*loop, strict=True), strict=True):
        assert_close(result, torch.stack(expected))


def derivatives(function, tensors):
    """Functions of the tensors: the samples, and derivatives of a loss or of the samples in a direction."""
    weights = torch.randn_like(function(*tensors))
    directions = tuple(torch.randn_like(tensor) for tensor in tensors)
    everything = tuple(range(len(tensors)))

    def loss(*args):
        return (function(*args) * weights).square().sum()

    def gradient(*args):
        return grad(loss, everything)(*args)

    def along(*args):
        return jvp(function, args, directions)[1]

    return {
        "samples": function,
        "grad": gradient,
        "grad by image": grad(loss, 0),
        "grad by params": grad(loss, 1),
        "jvp": along,
        "jvp by params": lambda x, p, *c: jvp(lambda q: function(x, q, *c), (p,), (directions[1],))[1],
        "jvp of grad": lambda *args: jvp(gradient, args, directions)[1],
        "grad of grad": grad(lambda *args: sum(g.square().sum() for g in gradient(*args)), everything),
        "grad of jvp": grad(lambda *args: (along(*args) * weights).sum(), everything),
        "jvp of jvp": lambda *args: jvp(along, args, directions)[1],
    }


# ----------------------------------------------------------------------------------------------- vmap
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("name", [*NAMES, "grid-3d"])
def test_vmap(anywhere, device, name, mode):
    """Over any of the arguments and any of their dimensions: the samples and all derivatives."""
    tensors, size = arguments(name, device)
    for what, function in derivatives(sampler(name, size, mode, "reflection"), tensors).items():
        choices = [(0, None), (None, 0), (1, 2)]
        if len(tensors) == 3:
            choices = [(*dims, None) for dims in choices] + [(None, None, 1), (0, None, 0), (1, 0, 0)]
        for in_dims in choices:
            args = [several(tensor, dim) for tensor, dim in zip(tensors, in_dims)]
            try:
                assert_vmaps(function, in_dims, args)
            except Exception as error:
                raise AssertionError(f"{what}, in_dims={in_dims}") from error


@pytest.mark.parametrize("name", ["grid-2d", "affine-2d", "tps"])
def test_vmap_in_kernels(device, name):
    tensors, size = arguments(name, device)
    functions = derivatives(sampler(name, size, "bilinear", "border"), tensors)
    for what, dims in itertools.product(("samples", "grad", "jvp by params"), ((0, None), (None, 0), (0, 1))):
        in_dims = (*dims, None)[: len(tensors)]
        assert_vmaps(functions[what], in_dims, [several(t, dim) for t, dim in zip(tensors, in_dims)])


@pytest.mark.parametrize("name", NAMES)
def test_nested_vmap(anywhere, device, name):
    """Twice, over the image outside and the parameters inside, and the other way around."""
    tensors, size = arguments(name, device)
    image, params = several(tensors[0], 0), several(tensors[1], 0)
    rest = tensors[2:]
    for what, function in derivatives(sampler(name, size, "bilinear", "border"), tensors).items():
        if what not in ("samples", "grad", "jvp"):
            continue
        nothing = (None,) * len(rest)
        inside = vmap(function, in_dims=(None, 0, *nothing))
        results = as_tuple(vmap(inside, in_dims=(0, None, *nothing))(image, params, *rest))
        other = vmap(function, in_dims=(0, None, *nothing))
        others = as_tuple(vmap(other, in_dims=(None, 0, *nothing))(image, params, *rest))
        for k, j in itertools.product(range(SAMPLES), repeat=2):
            for result, swapped, expected in zip(
                results, others, as_tuple(function(image[k], params[j], *rest)), strict=True
            ):
                assert_close(result[k, j], expected)
                assert_close(swapped[j, k], expected)


@pytest.mark.parametrize("name", ["grid-2d", "grid-3d", "affine-2d", "affine-transforms", "tps"])
def test_vmap_copies_no_image(anywhere, device, name):
    """Parameters alone are mapped: the one call has the image as it is; so in the backward to them."""
    tensors, size = arguments(name, device)
    image, params, *rest = tensors
    params, function = several(params, 0), sampler(name, size, "bilinear", "border")
    in_dims = (None, 0, *[None for _ in rest])
    with Calls() as calls:
        vmap(function, in_dims=in_dims)(image, params, *rest)
        vmap(grad(lambda *args: function(*args).square().sum(), 1), in_dims=in_dims)(image, params, *rest)
    for operator, position in (("sample", 0), ("sample_backward", 1)):
        for args in calls.named(operator):
            assert args[position].data_ptr() == image.data_ptr()
            assert args[position].shape == image.shape
    assert [called for called, _ in calls.calls if called.startswith("sample")] == [
        "sample",
        "sample",
        "sample_backward",
    ]


@pytest.mark.parametrize("name", list(PUBLIC))
def test_public_functions(anywhere, device, name):
    """Each function under vmap, vmap of grad, jvp, and both hessians."""
    image, params = public_arguments(name, device)
    function = PUBLIC[name]

    def gradient(image, params):
        return grad(lambda *args: function(*args).square().sum(), (0, 1))(image, params)

    for in_dims in ((0, None), (None, 0), (1, 1)):
        args = [several(tensor, dim) for tensor, dim in zip((image, params), in_dims)]
        assert_vmaps(function, in_dims, args)
        assert_vmaps(gradient, in_dims, args)
    tangents = torch.randn_like(image), torch.randn_like(params)
    value, along = jvp(function, (image, params), tangents)
    assert_close(value, function(image, params))
    step = 1e-6
    ahead, behind = (function(image + s * tangents[0], params + s * tangents[1]) for s in (step, -step))
    assert (along - (ahead - behind) / (2 * step)).abs().max() < 1e-6 * along.abs().max()


def test_broadcast_over_nothing(anywhere, device):
    """One set of parameters for all images, mapped over: each sample's gradient is summed over its images."""
    image = torch.randn(3, 2, 4, 5, dtype=torch.float64, device=device)
    theta = torch.eye(2, 3, dtype=torch.float64, device=device).repeat(SAMPLES, 1, 1, 1)
    theta += 0.1 * torch.randn_like(theta)

    def gradient(image, theta):
        return grad(lambda t: stn.affine_grid_sample(image, t).square().sum())(theta)

    assert vmap(gradient, in_dims=(None, 0))(image, theta).shape == (SAMPLES, 1, 2, 3)
    assert_vmaps(gradient, (None, 0), (image, theta))
    assert_vmaps(gradient, (1, 0), (several(image, 1), theta))


@pytest.mark.parametrize("name", ["grid-2d", "affine-2d", "tps", "flow-2d"])
def test_vmap_over_one_or_none(anywhere, device, name):
    """One image in the batch, and (where PyTorch's own operators allow it) no samples at all."""
    tensors, size = arguments(name, device, images=1)
    rest = (None,) * len(tensors[2:])
    for what, function in derivatives(sampler(name, size, "bilinear", "zeros"), tensors).items():
        for in_dims in ((0, None, *rest), (None, 0, *rest), (1, 1, *rest)):
            args = [several(tensor, dim) for tensor, dim in zip(tensors, in_dims)]
            assert_vmaps(function, in_dims, args)
            if what != "samples":
                continue
            none = [t if dim is None else t.narrow(dim, 0, 0) for t, dim in zip(args, in_dims)]
            results = as_tuple(vmap(function, in_dims=in_dims)(*none))
            for result, one in zip(results, as_tuple(function(*tensors)), strict=True):
                assert result.shape == (0, *one.shape)


# ------------------------------------------------------------------------------- Jacobians and Hessians
@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("name", ["grid-2d", "affine-transforms", "projective", "tps", "flow-2d"])
def test_jacobians_and_hessians(anywhere, device, name, mode):
    """Of all arguments, by ``torch.func`` and by ``torch.autograd.functional``, in every order."""
    tensors, size = arguments(name, device, images=1)
    function = sampler(name, size, mode, "mixed" if mode == "bilinear" else "reflection")
    everything = tuple(range(len(tensors)))

    def loss(*args):
        return function(*args).square().sum()

    jacobian = functional.jacobian(function, tensors)
    for other in (
        jacfwd(function, everything)(*tensors),
        jacrev(function, everything)(*tensors),
        functional.jacobian(function, tensors, vectorize=True),
        functional.jacobian(function, tensors, vectorize=True, strategy="forward-mode"),
        functional.jacobian(function, tensors, create_graph=True),
    ):
        for result, expected in zip(other, jacobian, strict=True):
            assert_close(result, expected)

    second = list(itertools.chain(*functional.hessian(loss, tensors)))
    for other in (
        *(a(b(loss, everything), everything)(*tensors) for a in (jacfwd, jacrev) for b in (jacfwd, jacrev)),
        hessian(loss, everything)(*tensors),
        functional.hessian(loss, tensors, vectorize=True),
        functional.hessian(loss, tensors, vectorize=True, outer_jacobian_strategy="forward-mode"),
        functional.hessian(loss, tensors, create_graph=True),
    ):
        for result, expected in zip(itertools.chain(*other), second, strict=True):
            assert_close(result, expected)
    assert any(part.count_nonzero() for part in second)


@pytest.mark.parametrize("name", ["grid-2d", "affine-2d", "tps"])
def test_products(either_backend, device, name):
    """``vhp``, ``hvp``, ``vjp`` and ``jvp`` of ``torch.autograd.functional`` agree with each other."""
    tensors, size = arguments(name, device, images=1)
    function = sampler(name, size, "bilinear", "zeros")
    directions = tuple(torch.randn_like(tensor) for tensor in tensors)

    def loss(*args):
        return function(*args).square().sum()

    _, forward = functional.hvp(loss, tensors, directions)
    _, reverse = functional.vhp(loss, tensors, directions, create_graph=True)
    for one, other in zip(forward, reverse, strict=True):
        assert_close(one, other)
    samples, along = functional.jvp(function, tensors, directions, create_graph=True)
    assert_close(along, jvp(function, tensors, directions)[1])
    _, back = functional.vjp(function, tensors, torch.ones_like(samples), create_graph=True)
    assert_close(sum((b * d).sum() for b, d in zip(back, directions)), along.sum())


# ---------------------------------------------------------------------------- dual numbers, checkpoints
@pytest.mark.parametrize("name", ["grid-2d", "affine-2d", "projective", "tps", "flow-2d"])
def test_dual_numbers(either_backend, device, name):
    """Forward mode without ``torch.func``: for each argument alone, and reverse over it."""
    tensors, size = arguments(name, device)
    function = sampler(name, size, "bilinear", "reflection")
    directions = [torch.randn_like(tensor) for tensor in tensors]
    for chosen in range(len(tensors)):
        inputs = leaves(tensors)
        with forward_ad.dual_level():
            dual = [
                forward_ad.make_dual(t, d) if k == chosen else t
                for k, (t, d) in enumerate(zip(inputs, directions))
            ]
            value, along = forward_ad.unpack_dual(function(*dual))
            second = torch.autograd.grad(
                along.square().sum(), inputs, allow_unused=True, materialize_grads=True
            )

        def of_one(tensor, chosen=chosen):
            return function(*(tensor if k == chosen else t for k, t in enumerate(tensors)))

        expected = jvp(of_one, (tensors[chosen],), (directions[chosen],))[1]
        assert_close(value.detach(), function(*tensors))
        assert_close(along.detach(), expected)
        assert any(g.count_nonzero() for g in second)


def test_no_tangent_is_dropped(anywhere, device):
    """A tangent of zeros where there should be none is a defect: nearest samples move with the image."""
    (image, theta), size = arguments("affine-2d", device)
    function = sampler("affine-2d", size, "nearest", "border")
    tangent = torch.randn_like(image)
    assert_close(jvp(lambda x: function(x, theta), (image,), (tangent,))[1], function(tangent, theta))
    _, along = jvp(lambda t: function(image, t), (theta,), (torch.ones_like(theta),))
    assert along.shape == function(image, theta).shape
    assert along.count_nonzero() == 0


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["grid-2d", "affine-transforms", "tps", "flow-2d"])
def test_checkpoint(either_backend, device, name, reentrant):
    tensors, size = arguments(name, device)
    function = sampler(name, size, "bilinear", "zeros")
    inputs, others = leaves(tensors), leaves(tensors)
    function(*inputs).square().sum().backward()
    checkpoint(lambda *args: function(*args).square(), *others, use_reentrant=reentrant).sum().backward()
    for one, other in zip(inputs, others):
        assert_close(other.grad, one.grad)


def test_channels_last(either_backend, device):
    """Kept through function transforms: d image is channels_last as the image is."""
    image = torch.randn(2, 3, 4, 5, device=device).contiguous(memory_format=torch.channels_last)
    theta = torch.eye(2, 3, device=device).repeat(2, 1, 1)
    gradient = grad(lambda x: stn.affine_grid_sample(x, theta).square().sum())(image)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    _, along = jvp(lambda t: stn.affine_grid_sample(image, t), (theta,), (torch.ones_like(theta),))
    assert along.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------ compilation
def test_compiled_without_gradients(device):
    """Nothing requires a gradient: one graph all the same."""
    torch._dynamo.reset()
    image, theta = torch.randn(2, 3, 4, 5, device=device), torch.eye(2, 3, device=device).expand(2, 2, 3)

    def function(image, theta):
        return stn.affine_grid_sample(image, theta), stn.affine_grid(theta, (2, 3, 4, 5), False)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for result, expected in zip(compiled(image, theta), function(image, theta)):
        assert torch.equal(result, expected)


def affine_jvp(image, theta):
    return jvp(stn.affine_grid_sample, (image, theta), (torch.ones_like(image), torch.ones_like(theta)))[1]


def grid_jvp(image, theta):
    return jvp(lambda t: stn.affine_grid(t, image.shape, False), (theta,), (torch.ones_like(theta),))[1]


def dual_numbers(image, theta):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(image, torch.ones_like(image))
        return forward_ad.unpack_dual(stn.affine_grid_sample(dual, theta)).tangent


def gradient(image, theta):
    return grad(lambda t: stn.affine_grid_sample(image, t).square().sum())(theta)


def mapped_gradient(image, theta):
    return vmap(grad(lambda i, t: stn.affine_grid_sample(i[None], t[None]).square().sum()))(image, theta)


def second_gradient(image, theta):
    return grad(lambda t: gradient(image, t).square().sum())(theta)


@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize(
    "function", [affine_jvp, grid_jvp, dual_numbers, gradient, mapped_gradient, second_gradient]
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compiled_transforms(anywhere, device, function, grad_mode):
    """Function transforms and forward mode inside compiled code: one graph."""
    image = torch.randn(2, 3, 4, 5, device=device)
    theta = torch.eye(2, 3, device=device) + 0.1 * torch.randn(2, 2, 3, device=device)
    expected = function(image, theta)
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad_mode):
        result = torch.compile(function, backend="aot_eager", fullgraph=True)(image, theta)
    assert_close(result, expected.double())


def test_sources_are_all_here():
    """A source that is added must be added to these tests."""
    assert {source for source, *_ in SOURCES.values()} == set(Source)
    # the third is made of the others (test_fill.py), the last is a spline's alone (test_sources.py)
    assert autograd.__all__ == ["grid", "sample", "sample_as", "spline_product"]


@pytest.mark.parametrize("side", [2, 6])
def test_second_derivatives_by_control_points(side):
    """By the spline's system too, in every order of the modes; more points than are done at a time."""
    control_points = stn.transforms.control_lattice(side, dtype=torch.float64).clone()
    control_points += 0.02 * torch.randn(side**2, 2, dtype=torch.float64)
    points = control_points[None] + 0.1 * torch.randn(1, side**2, 2, dtype=torch.float64)
    image = torch.randn(1, 1, 4, 5, dtype=torch.float64)
    direction = torch.randn_like(control_points)

    def function(control_points):
        grid = stn.tps_grid(points, (1, 1, 3, 4), control_points)
        samples = stn.tps_grid_sample(image, points, (2, 3), "bicubic", control_points=control_points)
        return grid.square().sum() + samples.square().sum()

    def along(t):
        return control_points + t * direction

    gradient = torch.func.grad(function)
    expected = (gradient(along(1e-6)) - gradient(along(-1e-6))) / 2e-6
    products = [
        torch.func.jvp(gradient, (control_points,), (direction,))[1],
        torch.func.grad(lambda c: (gradient(c) * direction).sum())(control_points),
        torch.func.grad(lambda c: torch.func.jvp(function, (c,), (direction,))[1])(control_points),
    ]
    with torch.autograd.forward_ad.dual_level():
        leaf = control_points.clone().requires_grad_()
        dual = torch.autograd.forward_ad.make_dual(leaf, direction)
        (found,) = torch.autograd.grad(function(dual), leaf)
        products.append(torch.autograd.forward_ad.unpack_dual(found).tangent)
    for product in products:
        torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)

    def twice(inner, t):
        return torch.func.jvp(inner, (t,), (torch.ones_like(t),))[1]

    second = twice(lambda t: twice(lambda u: function(along(u)), t), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(second, (direction * expected).sum(), rtol=1e-5, atol=1e-5)
