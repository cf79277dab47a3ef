"""Projective maps, thin-plate splines and flows: against float64 computations of their own."""

import contextlib
import functools
import itertools
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from common import MODES, PADDINGS, Watch, assert_close, away_from_kinks, padding_of, pairwise, witness
from test_padding import witness_of
from torch.utils.checkpoint import checkpoint

import stn_triton as stn
from stn_triton import backend, kernels, ops
from stn_triton.kernels.coefficients import spline_product
from stn_triton.kernels.device import sources
from stn_triton.kernels.host import configs
from stn_triton.kernels.modes import Interpolation, Padding, Source
from stn_triton.kernels.spec import Spec
from stn_triton.reference import coordinates
from stn_triton.transforms import splines

align = pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])
padding = pytest.mark.parametrize("padding_mode", PADDINGS)
SOURCES = ["projective", "tps", "flow", "flow3d"]
IN_SIZE = {2: (7, 10), 3: (4, 5, 6)}
OUT_SIZE = {2: (9, 6), 3: (3, 4, 5)}


def dims_of(source):
    return 3 if source == "flow3d" else 2


def parameters(source, batch, dtype, device, controls=9):
    """Mild transforms of all kinds."""
    if source == "projective":
        tilt = torch.tensor([0.25, 0.25, 0.25]).view(3, 1) * torch.tensor([1.0, 1.0, 0.6])
        params = torch.eye(3) + torch.randn(batch, 3, 3) * tilt
    elif source == "tps":
        k = round(controls**0.5)
        params = stn.transforms.control_lattice(k) + 0.2 * torch.randn(batch, k * k, 2)
    else:
        dims = dims_of(source)
        params = 1.5 * torch.randn(batch, dims, *OUT_SIZE[dims])
    return params.to(device, dtype)


def base(size, align_corners):
    """(*size, dims): normalised coordinates of the output pixels, x first, float64."""
    axes = [(2 * torch.arange(n, dtype=torch.float64) - (n - 1)) / max(n - align_corners, 1) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)


def exact_grid(source, params, size, in_size, align_corners, control_points=None, regularization=0.0):
    """The coordinates (N, *size, dims) by the textbook, float64, differentiable."""
    points = base(size, align_corners)
    if source == "projective":
        homogeneous = torch.cat([points, torch.ones(*size, 1, dtype=torch.float64)], -1)
        mapped = torch.einsum("nij,hwj->nhwi", params, homogeneous)
        return mapped[..., :2] / mapped[..., 2:]
    if source == "tps":
        k = params.shape[1]
        if control_points is None:
            control_points = base((round(k**0.5),) * 2, True).reshape(-1, 2)

        def kernel(squared):
            positive = torch.where(squared > 0, squared, 1.0)
            return torch.where(squared > 0, positive * positive.log(), 0.0)

        def affine(at):
            return torch.cat([at, torch.ones(*at.shape[:-1], 1, dtype=torch.float64)], -1)

        between = (control_points[:, None] - control_points).square().sum(-1)
        top = torch.cat(
            [kernel(between) + regularization * torch.eye(k, dtype=torch.float64), affine(control_points)], 1
        )
        bottom = torch.cat([affine(control_points).T, torch.zeros(3, 3, dtype=torch.float64)], 1)
        target = torch.cat([params, torch.zeros(len(params), 3, 2, dtype=torch.float64)], 1)
        coefficients = torch.linalg.solve(torch.cat([top, bottom]), target)
        distance = (points[..., None, :] - control_points).square().sum(-1)
        return torch.cat([kernel(distance), affine(points)], -1) @ coefficients[:, None]
    scale = torch.tensor([(n - align_corners) / 2 for n in in_size[::-1]], dtype=torch.float64)
    return points + params.movedim(1, -1) / scale


def ours(source, input, params, mode="bilinear", padding_mode="zeros", align_corners=False, **options):
    options = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners, **options}
    if source == "projective":
        return stn.projective_grid_sample(input, params, OUT_SIZE[2], **options)
    if source == "tps":
        return stn.tps_grid_sample(input, params, OUT_SIZE[2], **options)
    return stn.flow_grid_sample(input, params, **options)


def image(source, batch, dtype, device, channels=2):
    return torch.randn(batch, channels, *IN_SIZE[dims_of(source)], dtype=dtype, device=device)


def check(source, input, params, mode, padding_mode, align_corners, dtype=None, **options):
    """Values and all gradients of one call."""
    input, params = input.detach().requires_grad_(), params.detach().requires_grad_()
    output = ours(source, input, params, mode, padding_mode, align_corners, **options)
    dims = dims_of(source)
    leaves = [tensor.detach().double().cpu().requires_grad_() for tensor in (input, params)]
    grid = exact_grid(
        source,
        leaves[1].expand(len(input), *params.shape[1:]),
        OUT_SIZE[dims],
        IN_SIZE[dims],
        align_corners,
        **options,
    )
    wanted = witness_of(padding_mode)(leaves[0], grid, mode, padding_mode, align_corners)
    smooth = away_from_kinks(grid.detach(), IN_SIZE[dims], mode, align_corners).unsqueeze(1)
    kept = smooth if mode == "nearest" else torch.ones_like(smooth)
    assert_close(torch.where(kept.to(output.device), output, 0), torch.where(kept, wanted, 0), dtype)
    grad_output = (torch.randn(wanted.shape, dtype=torch.float64) * smooth).to(input.dtype)
    actual = torch.autograd.grad(output, (input, params), grad_output.to(output.device))
    options = {"allow_unused": True, "materialize_grads": True}  # a nearest sample's place
    for result, reference in zip(
        actual, torch.autograd.grad(wanted, leaves, grad_output.double(), **options)
    ):
        assert_close(result, reference)


@pairwise
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "mixed"])
@align
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_values_and_gradients(either_backend, device, source, mode, padding_mode, align_corners, dtype):
    """Forward, d image and d parameters, in every mode."""
    if source == "flow3d" and mode == "bicubic":
        mode = "bilinear"  # tricubic has tests of its own
    check(
        source,
        image(source, 2, dtype, device),
        parameters(source, 2, dtype, device),
        mode,
        padding_of(padding_mode, dims_of(source)),
        align_corners,
    )


@pytest.mark.parametrize("batch", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("source", SOURCES)
def test_batches(device, source, batch):
    """Splines share their basis among four outputs: whole groups, broken ones, and one parameter for all."""
    for params_batch in {1, batch}:
        params = parameters(source, params_batch, torch.float64, device)
        check(source, image(source, batch, torch.float64, device), params, "bilinear", "zeros", False)


@pairwise
@pytest.mark.parametrize("source", ["projective", "tps"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_many_transforms(either_backend, device, source, shared, memory_format):
    """(N, T, ...) is T outputs of each image; shared parameters get the sum of the gradients."""
    n, t = 2, 3
    input = (
        image(source, n, torch.float64, device, 8).contiguous(memory_format=memory_format).requires_grad_()
    )
    params = parameters(source, (1 if shared else n) * t, torch.float64, device)
    params = params.view(-1, t, *params.shape[1:]).requires_grad_()
    output = ours(source, input, params)
    assert output.shape == (n, t, 8, *OUT_SIZE[2])
    assert output.flatten(0, 1).is_contiguous(memory_format=memory_format)
    grad_output = torch.randn_like(output)
    actual = torch.autograd.grad(output, (input, params), grad_output)
    each = ours(
        source, input.repeat_interleave(t, 0), params.expand(n, *params.shape[1:]).flatten(0, 1)
    ).unflatten(0, (n, t))
    assert_close(output, each.double())
    for result, reference in zip(actual, torch.autograd.grad(each, (input, params), grad_output)):
        assert_close(result, reference)
    assert actual[0].is_contiguous(memory_format=memory_format)


@pairwise
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("params_dtype", [torch.float32, None], ids=["fp32-parameters", "half-parameters"])
def test_half_images(either_backend, device, source, dtype, params_dtype):
    """The result has the image's dtype; parameters of either width."""
    params = parameters(source, 2, params_dtype or dtype, device)
    check(source, image(source, 2, dtype, device), params, "bilinear", "zeros", False, dtype)


@pairwise
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@align
def test_gradcheck(either_backend, device, source, mode, align_corners):
    """fp64 gradcheck by image and parameters, clear of kinks."""
    dims = dims_of(source)
    for seed in range(200):
        torch.manual_seed(seed)
        params = parameters(source, 1, torch.float64, device, controls=4)
        if source.startswith("flow"):
            params = params[(..., *[slice(2)] * dims)].contiguous()
        grid = exact_grid(
            source,
            params.cpu(),
            params.shape[2:] if "flow" in source else (2, 2),
            IN_SIZE[dims],
            align_corners,
        )
        try:
            if away_from_kinks(grid, IN_SIZE[dims], mode, align_corners, 1e-2).all():
                break
        except AssertionError:
            continue
    input = image(source, 1, torch.float64, device, 1).requires_grad_()

    def function(x, p):
        options = {"mode": mode, "padding_mode": "border", "align_corners": align_corners}
        if source == "projective":
            return stn.projective_grid_sample(x, p, (2, 2), **options)
        if source == "tps":
            return stn.tps_grid_sample(x, p, (2, 2), **options)
        return stn.flow_grid_sample(x, p, **options)

    fast = {"fast_mode": True, "nondet_tol": 1e-9}
    assert torch.autograd.gradcheck(function, (input, params.requires_grad_()), eps=1e-5, atol=1e-6, **fast)


@pytest.mark.parametrize("source", SOURCES)
def test_tile_seams(device, source):
    """No result depends on how the work is cut."""
    batch = 5 if source == "tps" else 1
    input = image(source, batch, torch.float64, device, 3)
    params = parameters(source, batch, torch.float64, device)
    for tile in (
        {"rows": 8, "columns": 4, "channels": 1, "unroll": 2, "splits": 2},
        {"rows": 4, "columns": 8, "channels": 2, "unroll": 1, "splits": 1},
    ):
        with configs.override(**tile):
            check(source, input, params, "bilinear", "zeros", False)


# ---------------------------------------------------------------------------------------- projective
def test_scale_of_a_homography_means_nothing(either_backend, device):
    """H and -3 H are one map; the gradient along H itself is 0."""
    input = image("projective", 2, torch.float64, device)
    homography = parameters("projective", 2, torch.float64, device).requires_grad_()
    output = ours("projective", input, homography)
    assert_close(ours("projective", input, -3 * homography), output.double())
    (grad,) = torch.autograd.grad(output.square().sum(), homography)
    along = (grad * homography).sum((1, 2)) / (grad.norm(dim=(1, 2)) * homography.norm(dim=(1, 2)))
    assert along.abs().max() < 1e-10


@pairwise
@padding
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "third",
    [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 0, -1), (0, 0, 1e-39), (float("nan"), 0, 1), (float("inf"), 0, 1)],
    ids=str,
)
def test_horizon(either_backend, device, mode, padding_mode, third):
    """w = 0, tiny, negative or not finite: finite pixels out, finite gradients of the image and of H."""
    input = image("projective", 1, torch.float32, device).requires_grad_()
    homography = torch.eye(3, device=device)[None].clone()
    homography[0, 2] = torch.tensor(third, device=device)
    homography.requires_grad_()
    # 9 x 7: the middle row and column lie at 0 exactly
    output = stn.projective_grid_sample(input, homography, (9, 7), mode, padding_mode)
    assert output.isfinite().all()
    by_input, by_homography = torch.autograd.grad(output.sum(), (input, homography))
    assert by_input.isfinite().all()
    assert by_homography.isfinite().all()
    grid = stn.projective_grid(homography.detach(), (1, 1, 9, 7))
    if padding_mode == "zeros":
        unseen = grid.isnan().any(-1)
        assert output[unseen[:, None].expand_as(output)].count_nonzero() == 0
    if third == (1, 0, 0):
        assert grid[0, :, 3].isnan().all()  # and nothing else is the horizon
        assert grid[0, :, [0, 1, 2, 4, 5, 6]].isfinite().all()


# ------------------------------------------------------------------------------- thin-plate splines
@pytest.mark.parametrize("regularization", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_tps_grid_is_scipys(either_backend, device, regularization, dtype):
    """Against SciPy's thin-plate spline, scattered control points."""
    interpolate = pytest.importorskip("scipy.interpolate")
    control_points = torch.rand(12, 2, dtype=torch.float64) * 2 - 1
    points = control_points + 0.3 * torch.randn(12, 2, dtype=torch.float64)
    # SciPy's kernel is r^2 log r, half of ours: its smoothing weighs twice as much
    spline = interpolate.RBFInterpolator(
        control_points.numpy(),
        points.numpy(),
        kernel="thin_plate_spline",
        degree=1,
        smoothing=regularization / 2,
    )
    size = (5, 8)
    grid = stn.tps_grid(
        points[None].to(device, dtype), (1, 1, *size), control_points.to(device, dtype), regularization
    )
    at = base(size, False)
    wanted = exact_grid("tps", points[None], size, None, False, control_points, regularization)
    assert np.allclose(spline(at.reshape(-1, 2).numpy()), wanted.reshape(-1, 2).numpy(), atol=1e-9)
    scale = {torch.float64: 1.0, torch.float32: 30.0}[dtype]  # large weights of either sign cancel
    assert_close(grid, wanted, dtype, scale=scale)


@triton.jit
def log_kernel(x_ptr, log_ptr, COUNT: tl.constexpr, SPEC: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(log_ptr + at, sources.tps_log(tl.load(x_ptr + at), SPEC))


def test_logarithm_of_splines(device):
    """To two and a half half-units of float32 from the smallest distances on, and finite at 0."""
    x = torch.logspace(-37, 3, 2**15, dtype=torch.float64).float()
    x[:256] = 1 + torch.linspace(-0.4, 0.4, 256)
    x[256] = 0.0
    log = torch.empty_like(x, device=device)
    spec = Spec(int(Source.TPS), 0, (0, 0), 0, dims=2, compute=tl.float32, index=tl.int32)
    log_kernel[(1,)](x.to(device), log, COUNT=x.numel(), SPEC=spec)
    exact = x.double().log()
    exact[256] = log[256].item()
    assert exact.isfinite().all()
    error = (log.cpu().double() - exact).abs() / exact.abs().clamp(min=1)
    assert error.max().item() <= 2.5 * 2.0**-24


@pytest.mark.parametrize("side", [4, 8, 16])
def test_spline_coordinates_err_as_pytorchs(device, side):
    """Against float64 of the same coefficients, root mean square, beside PyTorch's operators in float32."""
    control_points = stn.transforms.control_lattice(side)
    points = control_points + 0.1 * torch.randn(4, side * side, 2)
    coefficients = stn.transforms.tps_coefficients(points)

    def spline(dtype):
        arguments = coefficients.to(dtype), control_points.to(dtype)
        return coordinates(Source.TPS, *arguments, (24, 24), False, dtype).squeeze(1)

    ours = ops.grid(coefficients.to(device), control_points.to(device), Source.TPS, [24, 24], False)
    assert ours.dtype == torch.float32

    def error(grid):
        return (grid.cpu().double() - spline(torch.float64)).square().mean().sqrt().item()

    assert error(ours) <= 1.25 * error(spline(torch.float32))


@pytest.mark.parametrize("controls", [3, 4, 16, 25, 64, 256])
def test_numbers_of_control_points(device, controls):
    """From 3 to 256, forward and backward, in one block of 16 and in many."""
    generator = torch.Generator().manual_seed(controls)
    control_points = torch.rand(controls, 2, generator=generator, dtype=torch.float64) * 2 - 1
    points = (
        control_points + 0.05 * torch.randn(2, controls, 2, generator=generator, dtype=torch.float64)
    ).to(device)
    input = image("tps", 2, torch.float64, device).requires_grad_()
    points.requires_grad_()
    output = ours("tps", input, points, control_points=control_points.to(device))
    leaves = [input.detach().cpu().requires_grad_(), points.detach().cpu().requires_grad_()]
    grid = exact_grid("tps", leaves[1], OUT_SIZE[2], IN_SIZE[2], False, control_points)
    wanted = witness(leaves[0], grid, "bilinear", "zeros", False)
    largest = 1e4 if controls > 100 else 1e2  # the system's condition
    assert_close(output, wanted, scale=largest)
    grad_output = torch.randn_like(wanted)
    actual = torch.autograd.grad(output, (input, points), grad_output.to(device))
    for result, reference in zip(actual, torch.autograd.grad(wanted, leaves, grad_output)):
        assert_close(result, reference, scale=largest * reference.abs().max().item())


SHAPES = {
    "images": lambda k: torch.randn(3, k, 2),
    "transforms": lambda k: torch.randn(2, 3, k, 2),
    "of other strides": lambda k: torch.randn(2, k, 3, 3).permute(3, 2, 1, 0),
    "one of all images": lambda k: torch.randn(1, k, 2).expand(3, k, 2),
}


@pairwise
@pytest.mark.parametrize("controls", [3, 16, 40])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_product_of_a_spline(either_backend, device, controls, shape, dtype):
    """Coefficients, and the gradient back: summed in float64, rounded once, by one kernel of ours."""
    matrix = torch.randn(controls + 3, controls + 3, dtype=torch.float64)[:, :controls]
    points = SHAPES[shape](controls).to(dtype)
    for result in (torch.float32, torch.float64):
        exact = matrix @ points.double()
        found = ops.spline_product(matrix.to(device), points.to(device), result)
        rounding = 2 * torch.finfo(result).eps
        scale = matrix.abs() @ points.double().abs()
        assert found.dtype == result
        assert ((found.cpu().double() - exact).abs() <= rounding * exact.abs() + 1e-14 * scale).all()
        back = ops.spline_product(matrix.to(device).mT, found, dtype)
        exact = matrix.mT @ found.cpu().double()
        rounding, scale = 2 * torch.finfo(dtype).eps, matrix.mT.abs() @ found.cpu().double().abs()
        assert (back.dtype, back.shape) == (dtype, points.shape)
        assert ((back.cpu().double() - exact).abs() <= rounding * exact.abs() + 1e-14 * scale).all()


@pytest.mark.parametrize("function", ["sample", "grid"])
def test_points_may_change_before_the_backward_pass(either_backend, device, function):
    """It is their coefficients that are kept, and these lead back to the points as often as is asked."""
    points = parameters("tps", 2, torch.float64, device).requires_grad_()
    image = torch.randn(2, 3, 5, 6, dtype=torch.float64, device=device)
    bent = points + 0
    if function == "sample":
        found = stn.tps_grid_sample(image, bent, mode="bicubic")
    else:
        found = stn.tps_grid(bent, (2, 3, 5, 6))
    with torch.no_grad():
        bent.mul_(0)
    weights = torch.randn_like(found)
    (first,) = torch.autograd.grad(found, points, weights, create_graph=True)
    call = stn.tps_grid_sample if function == "sample" else stn.tps_grid
    again = call(image, points, mode="bicubic") if function == "sample" else call(points, (2, 3, 5, 6))
    (expected,) = torch.autograd.grad(again, points, weights, create_graph=True)
    assert_close(first, expected)
    if function == "sample":
        along = torch.randn_like(points)
        second = torch.autograd.grad((first * along).sum(), points)[0]
        moved = 1e-6 * along
        steps = [
            torch.autograd.grad(call(image, p, mode="bicubic"), p, weights)[0]
            for p in ((points + moved).detach().requires_grad_(), (points - moved).detach().requires_grad_())
        ]
        limit = 1e-5 * second.abs().max().item()
        torch.testing.assert_close(second, (steps[0] - steps[1]) / 2e-6, rtol=0, atol=limit)


def bent(device):
    """An image, points, and the spline's samples as a function of both; smooth in the points."""
    image = torch.randn(2, 2, 4, 5, dtype=torch.float64, device=device).requires_grad_()
    points = parameters("tps", 2, torch.float64, device).requires_grad_()
    return image, points, functools.partial(stn.tps_grid_sample, mode="bicubic")


def test_batched_gradients_of_points(either_backend, device):
    """The forward pass is plain eager code, the backward pass a function transform's."""
    image, points, warp = bent(device)
    samples = warp(image, points)
    weights = torch.randn(3, *samples.shape, dtype=torch.float64, device=device)
    tensors = image, points
    found = torch.autograd.grad(samples, tensors, weights, retain_graph=True, is_grads_batched=True)
    alone = [torch.autograd.grad(samples, tensors, each, retain_graph=True) for each in weights]
    for batched, *each in zip(found, *alone, strict=True):
        assert_close(batched, torch.stack(each))
    by_rows, vectorized = (
        torch.autograd.functional.jacobian(lambda points: warp(image, points), points, vectorize=vectorize)
        for vectorize in (False, True)
    )
    assert_close(vectorized, by_rows)


def test_tangents_of_points(either_backend, device):
    """Of points, whether they are recorded or not; and of a gradient whose forward pass knew of none."""
    image, points, warp = bent(device)
    along = torch.randn_like(points)
    _, expected = torch.func.jvp(lambda points: warp(image, points), (points.detach(),), (along,))
    for given in (points, points.detach()):
        with torch.autograd.forward_ad.dual_level():
            samples = warp(image, torch.autograd.forward_ad.make_dual(given, along))
            assert_close(torch.autograd.forward_ad.unpack_dual(samples).tangent, expected)
    samples = warp(image, points)
    with torch.autograd.forward_ad.dual_level():
        weights = torch.autograd.forward_ad.make_dual(torch.ones_like(samples), torch.ones_like(samples))
        (gradient,) = torch.autograd.grad(samples, points, weights)
        tangent = torch.autograd.forward_ad.unpack_dual(gradient).tangent
        assert tangent is not None
        assert_close(tangent, torch.autograd.forward_ad.unpack_dual(gradient).primal)


def test_second_derivatives_by_points_in_any_mode(either_backend, device):
    image, points, warp = bent(device)
    image, points = image.detach()[:1], points.detach()[:1]

    def function(x):  # of which tangents depend on x, too
        return warp(image, x + 0.1 * x.square(), (2, 2)).square().sum()

    expected = torch.autograd.functional.hessian(function, points)
    ways = torch.func.jacfwd, torch.func.jacrev
    for outer, inner in itertools.product(ways, ways):
        assert_close(outer(inner(function))(points), expected)


@pytest.mark.parametrize("regularization", [0.0, 0.2])
def test_derivatives_by_control_points_under_transforms(either_backend, device, regularization):
    """The matrix of the product depends on them, though no tensor's flag says so."""
    image, points, warp = bent(device)
    image, points = image.detach(), points.detach()
    control_points = stn.transforms.control_lattice(3, dtype=torch.float64).to(device)
    control_points = control_points + 0.05 * torch.randn_like(control_points)
    along = torch.randn_like(control_points)

    def function(control_points):
        return warp(image, points, control_points=control_points, regularization=regularization).sum()

    tracked = control_points.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(tracked), tracked)
    assert_close(torch.func.grad(function)(control_points), expected)
    _, tangent = torch.func.jvp(function, (control_points,), (along,))
    assert_close(tangent, (expected * along).sum())
    with torch.autograd.forward_ad.dual_level():
        found = function(torch.autograd.forward_ad.make_dual(control_points, along))
        assert_close(torch.autograd.forward_ad.unpack_dual(found).tangent, tangent)

    def along_points(control_points, way):
        """The derivative by points, of which that by control points is taken."""

        def inner(points):
            return warp(image[:1], points, control_points=control_points, regularization=regularization).sum()

        return way(inner)(points[:1])

    forward, reverse = (
        way(lambda control_points, way=way: along_points(control_points, way))(control_points)
        for way in (torch.func.jacfwd, torch.func.jacrev)
    )
    assert_close(forward, reverse)


def profiled(**options):
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], **options)


@pytest.mark.parametrize("watch", [Watch, profiled, torch.autograd.forward_ad.dual_level])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_checkpoints_whoever_watches(either_backend, device, watch, when):
    """What is computed anew in the backward pass keeps what the forward pass kept."""
    image, points, warp = bent(device)
    expected = torch.autograd.grad(warp(image, points).sum(), (image, points))
    with watch() if when == "forward" else contextlib.nullcontext():
        samples = checkpoint(warp, image, points, use_reentrant=False)
    with watch() if when == "backward" else contextlib.nullcontext():
        found = torch.autograd.grad(samples.sum(), (image, points))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


def test_checkpoints_beside_an_export(either_backend, device):
    """Which sets a flag of the whole process while it runs, in whatever thread."""
    image, points, warp = bent(device)
    samples = checkpoint(warp, image, points, use_reentrant=False)
    with mock.patch.object(torch.compiler, "_is_compiling_flag", True):
        samples.sum().backward()
    assert points.grad is not None


def test_checkpoints_with_batched_gradients_of_points(either_backend, device):
    image, points, warp = bent(device)
    weights = torch.randn(3, *image.shape, dtype=torch.float64, device=device)
    samples = checkpoint(warp, image, points, use_reentrant=False)
    (found,) = torch.autograd.grad(samples, points, weights, is_grads_batched=True)
    (expected,) = torch.autograd.grad(warp(image, points), points, weights, is_grads_batched=True)
    assert_close(found, expected)


def test_modes_see_the_product_of_a_backward_pass(either_backend, device):
    image, points, warp = bent(device)
    samples = warp(image, points)
    with Watch() as mode:
        samples.sum().backward()
    assert "aten::bmm" in mode.names
    assert points.grad is not None


def test_what_is_not_asked_for_is_not_entered(either_backend, device, monkeypatch):
    """The points' product is a node of its own: neither the image's gradient nor its derivatives pass it."""
    image, points, warp = bent(device)
    made = []
    product = splines.product
    monkeypatch.setattr(splines, "product", lambda *given: (made.append(given), product(*given))[1])
    monkeypatch.setattr(
        kernels.dispatch, "spline_product", lambda *given: made.append(given) or spline_product(*given)
    )
    samples = warp(image, points)
    assert samples.grad_fn.next_functions[1][0].name() == "_SplineProductBackward"
    made.clear()
    torch.autograd.grad(samples.sum(), image, retain_graph=True)
    assert not made
    (gradient,) = torch.autograd.grad(samples.sum(), points, create_graph=True)
    gradient.square().sum().backward(inputs=[image])
    samples.sum().backward(inputs=[image])  # whose graph is still there


def test_gradient_of_control_points(either_backend, device):
    """Through the system and through the basis; also for several images, and beside the other gradients."""
    torch.manual_seed(5)
    control_points = (torch.rand(6, 2, dtype=torch.float64) * 2 - 1).to(device).requires_grad_()
    points = (
        control_points.detach() + 0.1 * torch.randn(5, 6, 2, dtype=torch.float64, device=device)
    ).requires_grad_()
    input = image("tps", 5, torch.float64, device).requires_grad_()
    output = ours("tps", input, points, mode="bicubic", control_points=control_points)
    leaves = [tensor.detach().cpu().requires_grad_() for tensor in (input, points, control_points)]
    grid = exact_grid("tps", leaves[1], OUT_SIZE[2], IN_SIZE[2], False, leaves[2])
    wanted = witness(leaves[0], grid, "bicubic", "zeros", False)
    grad_output = torch.randn_like(wanted)
    actual = torch.autograd.grad(
        output, (input, points, control_points), grad_output.to(device), retain_graph=True
    )
    reference = torch.autograd.grad(wanted, leaves, grad_output)
    for result, expected in zip(actual, reference):
        assert_close(result, expected, scale=100 * expected.abs().max().item())
    (alone,) = torch.autograd.grad(output, control_points, grad_output.to(device))
    assert_close(alone, reference[2], scale=100 * reference[2].abs().max().item())


def test_lattice_as_control_points(either_backend, device):
    """The default is the lattice; pixels on control points (the corners, aligned) have finite gradients."""
    lattice = stn.transforms.control_lattice(3, device=device, dtype=torch.float64)
    points = (lattice + 0.1 * torch.randn(2, 9, 2, dtype=torch.float64, device=device)).requires_grad_()
    input = image("tps", 2, torch.float64, device)
    control_points = lattice.clone().requires_grad_()
    options = {"align_corners": True, "padding_mode": "border"}
    by_default = stn.tps_grid_sample(input, points, (5, 5), **options)
    given = stn.tps_grid_sample(input, points, (5, 5), control_points=control_points, **options)
    assert_close(given, by_default.double())
    for gradient in torch.autograd.grad(given.sum(), (points, control_points)):
        assert gradient.isfinite().all()


# ---------------------------------------------------------------------------------------------- grids
@pytest.mark.parametrize("source", ["projective", "tps"])
@align
def test_grids(either_backend, device, source, align_corners):
    """``*_grid`` gives the coordinates that ``*_grid_sample`` reads at, and has its own gradient."""
    params = parameters(source, 2, torch.float64, device).requires_grad_()
    make = stn.projective_grid if source == "projective" else stn.tps_grid
    grid = make(params, (2, 3, *OUT_SIZE[2]), align_corners=align_corners)
    input = image(source, 2, torch.float64, device)
    fused = ours(source, input, params, align_corners=align_corners)
    assert_close(stn.grid_sample(input, grid, align_corners=align_corners), fused.double())
    leaf = params.detach().cpu().requires_grad_()
    wanted = exact_grid(source, leaf, OUT_SIZE[2], IN_SIZE[2], align_corners)
    assert_close(grid, wanted)
    grad = torch.randn_like(wanted)
    assert_close(
        torch.autograd.grad(grid, params, grad.to(device))[0], torch.autograd.grad(wanted, leaf, grad)[0]
    )


@pytest.mark.parametrize("transforms", [(), (1,), (2,)], ids=str)
@pytest.mark.parametrize("watched", [True, False])
def test_samples_may_be_changed_in_place(either_backend, device, transforms, watched):
    """They are no views, which autograd would refuse to change."""
    image = torch.rand(2, 3, 6, 7, device=device, requires_grad=watched)
    theta = torch.eye(2, 3, device=device).expand(2, *transforms, 2, 3)
    scale = torch.rand(1, device=device, requires_grad=True)
    for options in ({}, {"antialias": True}, {"fill": 0.5}, {"mode": "bicubic", "padding_mode": "circular"}):
        with torch.set_grad_enabled(watched):
            samples = stn.affine_grid_sample(image, theta, (5, 4), **options)
        samples.mul_(scale).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_gradients_of_averages_are_of_the_images_type(either_backend, device, dtype):
    image, grad = (torch.rand(2, 3, *size, device=device).to(dtype) for size in ((20, 20), (9, 8)))
    theta = 2 * torch.eye(2, 3, device=device).repeat(2, 1, 1)
    modes = int(Source.AFFINE), [2, 3, 20, 20], False, int(Interpolation.AVERAGED), int(Padding.ZEROS), False
    found = torch.ops.stn_triton.sample_backward(grad, image, theta, None, *modes, True, True, False)
    assert [one.dtype for one in found[:2]] == [dtype, theta.dtype]


@pytest.mark.parametrize("source", ["affine", "projective", "tps", "control points"])
def test_pytorch_makes_no_product_for_each_image(source):
    """Of a few columns and thousands of points. (Gradients of averages still do.)"""
    options = {}
    if source == "control points":
        source, options = "tps", {"control_points": (2 * torch.rand(6, 2) - 1).requires_grad_()}
    function = getattr(stn, f"{source}_grid_sample")
    affine = torch.eye(2, 3).repeat(4, 1, 1)
    params = affine if source == "affine" else parameters(source, 4, torch.float32, "cpu")
    if options:
        params = options["control_points"].detach() + 0.1 * torch.randn(4, 6, 2)
    x, params = torch.rand(4, 2, 9, 9), params.requires_grad_()
    with backend.use("torch"), profiled(record_shapes=True) as profile:
        function(x, params, (30, 31), **options).sum().backward()
    shapes = [event.input_shapes for event in profile.events() if event.name == "aten::bmm"]
    assert not [one for one in shapes if any(30 * 31 in shape for shape in one)]
    assert any(event.name.startswith("stn_triton::sample_backward") for event in profile.events())


# ---------------------------------------------------------------------------------------------- flow
@align
def test_flow_is_in_pixels(either_backend, device, align_corners):
    """A displacement of (1, -2) pixels shifts the image by whole pixels; one-pixel axes included."""
    for size in ((5, 6), (1, 6), (5, 1)):
        input = torch.randn(1, 2, *size, device=device)
        flow = torch.zeros(1, 2, *size, device=device)
        assert_close(stn.flow_grid_sample(input, flow, align_corners=align_corners), input.double())
        flow[:, 0], flow[:, 1] = 1, -2
        wanted = torch.zeros_like(input)
        if size[0] > 2 and size[1] > 1:
            wanted[..., 2:, :-1] = input[..., :-2, 1:]
        shifted = stn.flow_grid_sample(input, flow, mode="nearest", align_corners=align_corners)
        assert torch.equal(shifted, wanted)


# -------------------------------------------------------------------------------------- derivatives
@pytest.mark.parametrize("source", SOURCES)
def test_second_derivatives(device, source):
    """gradgradcheck by image and parameters."""
    from stn_triton import backend

    torch.manual_seed(1)
    params = parameters(source, 1, torch.float64, device, controls=4)
    if source.startswith("flow"):
        params = params[(..., *[slice(2)] * dims_of(source))].contiguous()
    input = image(source, 1, torch.float64, device, 1).requires_grad_()

    def function(x, p):
        if source == "projective":
            return stn.projective_grid_sample(x, p, (2, 2), "bicubic")
        if source == "tps":
            return stn.tps_grid_sample(x, p, (2, 2), "bicubic")
        return stn.flow_grid_sample(x, p, "bilinear" if source == "flow3d" else "bicubic")

    with backend.use("torch"):
        options = {"eps": 1e-6, "atol": 1e-4, "nondet_tol": 1e-9, "fast_mode": True}
        assert torch.autograd.gradgradcheck(function, (input, params.requires_grad_()), **options)


@pytest.mark.parametrize("source", SOURCES)
def test_empty(either_backend, device, source):
    """No batch, no channels."""
    for batch, channels in ((0, 2), (2, 0)):
        input = image(source, batch, torch.float32, device, channels).requires_grad_()
        params = parameters(source, batch, torch.float32, device).requires_grad_()
        output = ours(source, input, params)
        assert output.shape == (batch, channels, *OUT_SIZE[dims_of(source)])
        for gradient in torch.autograd.grad(output.sum(), (input, params)):
            assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("source", ["projective", "tps"])
def test_parameter_gradients_are_repeatable(device, source):
    """Bit for bit, with several programs for each output."""
    input = image(source, 5, torch.float32, device)
    params = parameters(source, 5, torch.float32, device).requires_grad_()
    with configs.override(rows=4, columns=4, channels=1, splits=2):
        first, *others = (
            torch.autograd.grad(ours(source, input, params).square().sum(), params)[0] for _ in range(3)
        )
    assert all(torch.equal(first, other) for other in others)


# -------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("name", "call", "kind"),
    [
        ("homography", lambda x: stn.projective_grid_sample(x, torch.eye(3)), ValueError),
        ("homography", lambda x: stn.projective_grid_sample(x, torch.zeros(3, 3, 3)), ValueError),
        (
            "homography",
            lambda x: stn.projective_grid_sample(x, torch.zeros(2, 3, 3, dtype=torch.int64)),
            TypeError,
        ),
        ("homography", lambda x: stn.projective_grid_sample(x, [[1.0]]), TypeError),
        (
            "homography",
            lambda x: stn.projective_grid_sample(x, torch.zeros(2, 3, 3, device="meta")),
            ValueError,
        ),
        ("homography", lambda x: stn.projective_grid(torch.zeros(2, 2, 3), (2, 1, 4, 4)), ValueError),
        ("input", lambda x: stn.projective_grid_sample(x[..., None], torch.zeros(2, 3, 3)), ValueError),
        ("size", lambda x: stn.projective_grid_sample(x, torch.zeros(2, 3, 3), (4,)), ValueError),
        ("size", lambda x: stn.projective_grid(torch.zeros(2, 3, 3), (4, 4)), ValueError),
        ("size", lambda x: stn.projective_grid(torch.zeros(2, 3, 3), (3, 1, 4, 4)), ValueError),
        ("align_corners", lambda x: stn.projective_grid(torch.zeros(2, 3, 3), (2, 1, 4, 4), None), TypeError),
        ("points", lambda x: stn.tps_grid_sample(x, torch.zeros(2, 9, 3)), ValueError),
        ("points", lambda x: stn.tps_grid_sample(x, torch.zeros(3, 9, 2)), ValueError),
        ("points", lambda x: stn.tps_grid_sample(x, torch.zeros(2, 7, 2)), ValueError),
        ("points", lambda x: stn.tps_grid_sample(x, None), TypeError),
        (
            "control_points",
            lambda x: stn.tps_grid_sample(x, torch.zeros(2, 4, 2), control_points=torch.zeros(4, 2)),
            ValueError,
        ),
        (
            "control_points",
            lambda x: stn.tps_grid_sample(x, torch.zeros(2, 4, 2), control_points=torch.zeros(5, 2)),
            ValueError,
        ),
        (
            "regularization",
            lambda x: stn.tps_grid_sample(x, torch.zeros(2, 4, 2), regularization=-1.0),
            ValueError,
        ),
        ("flow", lambda x: stn.flow_grid_sample(x, torch.zeros(2, 3, 4, 4)), ValueError),
        ("flow", lambda x: stn.flow_grid_sample(x, torch.zeros(3, 2, 4, 4)), ValueError),
        ("flow", lambda x: stn.flow_grid_sample(x, torch.zeros(2, 2, 4, 4, 4)), ValueError),
        ("mode", lambda x: stn.flow_grid_sample(x, torch.zeros(2, 2, 4, 4), "cubic"), ValueError),
    ],
)
def test_errors_name_the_argument(name, call, kind):
    with pytest.raises(kind, match=rf"\b{name}\b"):
        call(torch.zeros(2, 1, 4, 5))


def test_gradients_only_where_needed(device):
    """Each argument alone."""
    for source, which in itertools.product(SOURCES, (0, 1)):
        tensors = [image(source, 2, torch.float32, device), parameters(source, 2, torch.float32, device)]
        tensors[which].requires_grad_()
        ours(source, *tensors).square().sum().backward()
        assert tensors[which].grad is not None
        assert tensors[1 - which].grad is None


# --------------------------------------------------------------------------- what a review found
def call(source, x, p):
    if source == "affine":
        return stn.affine_grid_sample(x, p, (3, 4), "bicubic")
    if source == "flow":
        return stn.flow_grid_sample(x, p, "bicubic")
    return (
        stn.projective_grid_sample(x, p, (3, 4), "bicubic")
        if source == "projective"
        else stn.tps_grid_sample(x, p, (3, 4), "bicubic")
    )


@pytest.mark.parametrize("source", ["affine", "projective", "tps", "flow"])
def test_second_derivatives_where_arguments_depend_on_each_other(device, source):
    """The gradient that comes in depends on the parameters, and these on the image: nothing counts twice."""
    from torch.autograd.functional import hessian

    from stn_triton import backend

    image = torch.rand(1, 1, 5, 5, dtype=torch.float64, device=device)
    if source == "affine":
        params = 0.9 * torch.eye(2, 3, dtype=torch.float64, device=device)[None]
    elif source == "flow":
        params = 0.3 + 0.1 * torch.rand(1, 2, 3, 4, dtype=torch.float64, device=device)
    else:
        params = parameters(source, 1, torch.float64, device, controls=4)
    with backend.use("torch"):
        plain = hessian(lambda p: call(source, image, p).square().sum(), params)
        again = hessian(lambda p: call(source, image, p).square().sum(), params, create_graph=True)
        assert_close(again.detach(), plain)
        # parameters made from the image, a penalty on the gradient: against finite differences
        weight = 0.01 * torch.rand(params.numel(), 25, dtype=torch.float64, device=device)

        def penalty(x):
            made = params + (weight @ x.flatten()).view(params.shape)
            (grad,) = torch.autograd.grad(call(source, x, made).square().sum(), x, create_graph=True)
            return grad.square().sum()

        leaf = image.clone().requires_grad_()
        assert torch.autograd.gradcheck(penalty, leaf, eps=1e-6, atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding_mode", ["border", "reflection"])
def test_axes_past_what_float32_counts(either_backend, device, mode, padding_mode):
    """On an axis of 2^24 + 4 pixels the last one's number rounds up, past the end: nothing is read there."""
    width = 2**24 + 4
    memory = torch.full((width + 8,), float("nan"), device=device)
    memory[:width] = 1.0
    image = memory[:width].view(1, 1, 1, width)
    grid = torch.tensor([[[[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [0.9999999, 0.0]]]], device=device)
    output = stn.grid_sample(image, grid, mode, padding_mode, align_corners=False)
    assert_close(output, torch.ones(1, 1, 1, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    "diagonal", [(float("nan"), 1, 1), (float("inf"), 1, 1), (1e20, 1, 1e-20)], ids=["nan", "inf", "overflow"]
)
@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_partly_bad_homography(either_backend, device, padding_mode, diagonal):
    """One bad row leaves no NaN in the gradients."""
    image = torch.rand(1, 1, 4, 4, device=device, requires_grad=True)
    homography = torch.diag(torch.tensor(diagonal, device=device))[None].requires_grad_()
    output = stn.projective_grid_sample(image, homography, padding_mode=padding_mode)
    assert output.isfinite().all()
    for gradient in torch.autograd.grad(output.sum(), (image, homography)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("scale", [1e-31, 1e25])
def test_small_and_large_homographies(either_backend, device, scale):
    image = torch.rand(1, 1, 4, 5, device=device)
    output = stn.projective_grid_sample(image, scale * torch.eye(3, device=device)[None])
    assert_close(output, image.double())


def test_float64_image_makes_a_float64_spline(either_backend, device):
    image = torch.rand(1, 1, 5, 6, dtype=torch.float64, device=device)
    points = parameters("tps", 1, torch.float32, device)
    assert_close(stn.tps_grid_sample(image, points), stn.tps_grid_sample(image, points.double()))
