"""Parameters of transforms by what they do to points, and thin-plate splines against SciPy's."""

import gc
import inspect
import math
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.interpolate import RBFInterpolator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from stn_triton import transforms
from stn_triton.transforms import (
    attention,
    compose,
    control_lattice,
    identity,
    invert,
    similarity,
    splines,
    tps_coefficients,
    tps_evaluate,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((2, 3), (3, 4), (3, 3))


def rand(*shape, grad=False):
    return (torch.rand(shape, dtype=torch.float64) * 2 - 1).requires_grad_(grad)


def maps(shape, *leading, grad=False, dtype=torch.float64):
    """Transforms around the identity, none near singular and no point of the square near a horizon."""
    return (
        (torch.eye(*shape, dtype=torch.float64) + 0.2 * rand(*leading, *shape)).to(dtype).requires_grad_(grad)
    )


def apply(theta, points):
    """Points (..., P, d) through affine maps or homographies (..., rows, d + 1)."""
    points = torch.cat([points, torch.ones_like(points[..., :1])], -1) @ theta.mT
    return points[..., :2] / points[..., 2:] if theta.shape[-2:] == (3, 3) else points


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------- making them
@pytest.mark.parametrize("t", (None, 3))
@pytest.mark.parametrize("n", (0, 1, 5))
@pytest.mark.parametrize("kind", ("affine", "attention", "similarity", "projective", "tps"))
def test_identity(kind, n, t):
    parameters = identity(n, kind, transforms=t, dtype=torch.float64)
    leading = (n,) if t is None else (n, t)
    assert parameters.shape[: len(leading)] == leading
    assert parameters.dtype == torch.float64
    assert parameters.is_contiguous()
    if kind == "tps":
        assert torch.equal(parameters, control_lattice(4, dtype=torch.float64).expand(*leading, 16, 2))
    else:
        points = rand(*leading, 6, 2)
        assert torch.equal(apply(parameters, points), points)


def test_identity_is_what_the_parameters_make():
    one, zero, none = torch.ones(4), torch.zeros(4), torch.zeros(4, 2)
    assert torch.equal(identity(4, "attention"), attention(one, none))
    assert torch.equal(identity(4, "attention", dims=3), attention(one, torch.zeros(4, 3)))
    assert torch.equal(identity(4, "similarity"), similarity(one, zero, none))
    assert identity(4, dims=3).shape == (4, 3, 4)
    assert identity(2).dtype == torch.get_default_dtype()
    assert identity(2, "tps", k=5, dtype=torch.float16).shape == (2, 25, 2)
    parameters = identity(3)
    parameters[1] = 0  # its own memory, no expanded view
    assert torch.equal(parameters[0], parameters[2])


@pytest.mark.parametrize("dims", (2, 3))
def test_attention_reads_a_window(dims):
    scale, translation, points = rand(5).abs(), rand(5, dims), rand(5, 4, dims)
    expected = scale[:, None, None] * points + translation[:, None]
    close(apply(attention(scale, translation), points), expected)
    close(apply(attention(0.5, translation), points), 0.5 * points + translation[:, None])
    assert torch.equal(attention(0.5, translation), attention(scale.new_full((5,), 0.5), translation))


def test_attention_off_diagonals_are_zero():
    theta = attention(torch.tensor([float("inf"), float("nan")]), torch.zeros(2, 2))
    assert (theta[:, [0, 1], [1, 0]] == 0).all()


def test_similarity_turns_right_to_down():
    theta = similarity(2.0, math.pi / 2, torch.tensor([0.25, 0.5], dtype=torch.float64))
    right, down = torch.eye(2, dtype=torch.float64)
    close(apply(theta, right[None])[0], 2 * down + torch.tensor([0.25, 0.5]))


def test_similarity_by_complex_numbers():
    scale, angle, translation, points = rand(5).abs(), 3 * rand(5), rand(5, 2), rand(5, 4, 2)
    plane = torch.view_as_complex(points) * torch.polar(scale, angle)[:, None]
    expected = torch.view_as_real(plane + torch.view_as_complex(translation)[:, None])
    close(apply(similarity(scale, angle, translation), points), expected)
    assert torch.equal(similarity(scale, 0.0, translation), attention(scale, translation))


@pytest.mark.parametrize(
    "factor, translation, leading",
    (((), (2,), ()), ((4,), (2,), (4,)), ((3, 4), (2,), (3, 4)), ((4,), (3, 4, 2), (3, 4)))
    + (((3, 1), (1, 4, 2), (3, 4)), ((1,), (4, 2), (4,)), ((0,), (0, 2), (0,)), ((), (3, 4, 2), (3, 4))),
    ids=str,
)
def test_factors_broadcast(factor, translation, leading):
    factor, translation = rand(*factor), rand(*translation)
    assert attention(factor, translation).shape == (*leading, 2, 3)
    theta = similarity(factor, 2 * factor, translation)
    assert theta.shape == (*leading, 2, 3)
    scale = factor.expand(leading)
    close(theta, similarity(scale, 2 * scale, translation.expand(*leading, 2)))


@pytest.mark.parametrize("k", (2, 3, 4, 7, 16))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_control_lattice(k, dtype):
    lattice = control_lattice(k, dtype=dtype)
    axis = torch.tensor([2 * i / (k - 1) - 1 for i in range(k)], dtype=torch.float64)
    rows = lattice.view(k, k, 2)
    tolerance = torch.finfo(dtype).eps
    close(rows[..., 0], axis.expand(k, k), tolerance)
    close(rows[..., 1], axis[:, None].expand(k, k), tolerance)
    assert torch.equal(lattice, -lattice.flip(0))
    assert lattice.aminmax() == (-1, 1)


# ------------------------------------------------------------------------------- their composition
PAIRS = (((2, 3), (2, 3)), ((2, 3), (3, 3)), ((3, 3), (2, 3)), ((3, 3), (3, 3)), ((3, 4), (3, 4)))


@pytest.mark.parametrize("outer, inner", PAIRS, ids=str)
def test_compose_applies_the_inner_first(outer, inner):
    a, b, points = maps(outer, 5), maps(inner, 5), rand(5, 7, inner[1] - 1)
    both = compose(a, b)
    assert both.shape[-2:] == max(outer, inner)
    close(apply(both, points), apply(a, apply(b, points)))


def test_compose_of_images(device):
    """Sampling by the composition is sampling by the outer one first: shown by moves of whole pixels."""
    grids = torch.nn.functional
    image = torch.rand(1, 1, 8, 8, device=device)
    outer = attention(1.0, torch.tensor([[0.25, 0.0]], device=device))
    inner = similarity(1.0, math.pi / 2, torch.zeros(1, 2, device=device))

    def sample(image, theta):
        return grids.grid_sample(image, grids.affine_grid(theta, image.shape, False), align_corners=False)

    close(sample(sample(image, outer), inner), sample(image, compose(outer, inner)), 1e-5)
    close(sample(image, outer)[..., :-1], image[..., 1:], 1e-5)  # the window moves right, the image left


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compose_is_associative(shape):
    a, b, c = maps(shape, 5), maps(shape, 5), maps(shape, 5)
    close(compose(compose(a, b), c), compose(a, compose(b, c)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_invert(shape):
    theta, points = maps(shape, 5), rand(5, 7, shape[1] - 1)
    inverse, unit = invert(theta), torch.eye(*shape, dtype=torch.float64).expand(5, *shape)
    close(compose(theta, inverse), unit)
    close(compose(inverse, theta), unit)
    close(invert(inverse), theta)
    close(apply(inverse, apply(theta, points)), points)
    if shape == (3, 3):
        close(inverse, torch.linalg.inv(theta))
    other = maps(shape, 5)
    close(invert(compose(theta, other)), compose(invert(other), inverse))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-14, 1e13, 1e30])
def test_invert_at_any_scale(shape, scale):
    """In float32, whose range a product of three entries leaves; all rows, or one of them."""
    theta = maps(shape, 5).float()
    linear = shape[0] if shape[0] == shape[1] else shape[1] - 1
    for rows in (slice(None, linear), slice(1, 2)):
        scaled, expected = theta.clone(), invert(theta)
        scaled[:, rows] *= scale
        expected[..., rows] /= scale
        if shape[0] != shape[1]:
            expected[..., -1] = invert(theta)[..., -1]
        assert torch.allclose(invert(scaled), expected, rtol=1e-4, atol=0)


def test_invert_keeps_affine_maps_affine():
    theta = maps((2, 3), 5)
    whole = invert(torch.cat([theta, torch.tensor([0.0, 0, 1]).double().expand(5, 1, 3)], 1))
    assert torch.equal(whole[:, 2], torch.tensor([0.0, 0, 1]).double().expand(5, 3))
    assert torch.equal(whole[:, :2], invert(theta))


def test_translation_of_numbers():
    """Numbers are a translation of the others' dtype, and by default there is none."""
    scale, angle = rand(3), rand(3)
    offset = torch.tensor([0.25, -1.5], dtype=scale.dtype)
    assert torch.equal(similarity(scale, angle, (0.25, np.float32(-1.5))), similarity(scale, angle, offset))
    assert torch.equal(similarity(scale.half(), 0.3), similarity(scale.half(), 0.3, torch.zeros(2).half()))
    assert torch.equal(attention(scale, [0.25, -1.5]), attention(scale, offset))
    assert attention(0.5, (0, 1, 2)).shape == (3, 4)
    assert similarity(1.0, 0.3).dtype == torch.get_default_dtype()
    compiled = torch.compile(similarity, fullgraph=True, backend="aot_eager")
    close(compiled(scale, angle, (0.25, -1.5)), similarity(scale, angle, offset))


def test_invert_similarity():
    scale, angle, translation = rand(5).abs() + 0.5, 3 * rand(5), rand(5, 2)
    back = invert(similarity(scale, angle, translation))
    close(back[..., :2], similarity(1 / scale, -angle, translation)[..., :2])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_maps_have_no_finite_inverse(shape):
    singular = torch.zeros(shape)
    singular[0] = 1
    inverses = invert(torch.stack([singular, torch.eye(*shape)]))
    assert not inverses[0].isfinite().all()
    assert torch.equal(inverses[1], torch.eye(*shape))  # its neighbour in the batch does not suffer


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leading_dimensions_broadcast(shape):
    a, b = maps(shape, 4, 1), maps(shape, 3)
    both = compose(a, b)
    assert both.shape == (4, 3, *shape)
    close(both, compose(a.expand(4, 3, *shape), b.expand(4, 3, *shape)))
    close(both[2, 1], compose(a[2, 0], b[1]))
    assert compose(a[:0], b[:1]).shape == (0, 1, *shape)
    assert invert(a[:0]).shape == (0, 1, *shape)


# ------------------------------------------------------------------------------------------- dtypes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_computed_wide_and_rounded_once(dtype):
    """In half precision the result is the float32 one rounded; in float32 a few roundings off float64."""
    scale, angle, translation = ((rand(5, *s) + 1.5).to(dtype) for s in ((), (), (2,)))
    a, b = (maps((3, 3), 5, dtype=dtype) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    for function, arguments in (
        (attention, (scale, translation)),
        (similarity, (scale, angle, translation)),
        (compose, (a, b)),
        (invert, (a,)),
    ):
        result = function(*arguments)
        assert result.dtype == dtype
        assert torch.equal(result, function(*(x.to(wide) for x in arguments)).to(dtype))
        close(result, function(*(x.double() for x in arguments)), 8 * torch.finfo(dtype).eps)


def test_dtypes_promote():
    half, single, double = (maps((2, 3), dtype=dtype) for dtype in (DTYPES[0], DTYPES[2], DTYPES[3]))
    assert compose(half, single).dtype == torch.float32
    assert compose(double, half).dtype == torch.float64
    assert compose(half, half.bfloat16()).dtype == torch.float32
    assert attention(half[0, 0], single[:, 2]).dtype == torch.float32
    assert attention(2.0, half[:, 2]).dtype == torch.float16
    assert similarity(half[0, 0], double[0, 0], half[:, 2]).dtype == torch.float64


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_autocast_changes_nothing(device, dtype):
    a, b = (maps((2, 3), 5, dtype=torch.float32).to(device) for _ in range(2))
    points, xy = rand(2, 16, 2).float().to(device), rand(7, 2).float().to(device)

    def results():
        coefficients = tps_coefficients(points)
        return compose(a, b), invert(a), coefficients, tps_evaluate(coefficients, None, xy)

    expected = results()
    with torch.autocast(device.type, dtype):
        actual = results()
    for x, y in zip(actual, expected):
        assert x.dtype == torch.float32
        assert torch.equal(x, y)


# ----------------------------------------------------------------------- every kind of differentiation
def closed_forms():
    yield "attention", attention, (rand(3, grad=True), rand(3, 2, grad=True))
    yield "attention 3-D", attention, (rand(3, grad=True), rand(3, 3, grad=True))
    yield "similarity", similarity, (rand(3, grad=True), rand(3, grad=True), rand(3, 2, grad=True))
    for outer, inner in PAIRS:
        arguments = maps(outer, 2, 1, grad=True), maps(inner, 3, grad=True)
        yield f"compose {outer} {inner}", compose, arguments
    for shape in SHAPES:
        yield f"invert {shape}", invert, (maps(shape, 2, grad=True),)


def spline_cases(grad_control=True):
    torch.manual_seed(3)  # cases are made before the tests are seeded
    for regularization in (0.0, 0.3):
        control_points, points, xy = (
            rand(5, 2, grad=grad_control),
            rand(2, 5, 2, grad=True),
            rand(4, 2, grad=True),
        )

        def spline(points, control_points, xy, regularization=regularization):
            return tps_evaluate(tps_coefficients(points, control_points, regularization), control_points, xy)

        yield f"tps {regularization}", spline, (points, control_points, xy)


CASES = [*closed_forms(), *spline_cases()]
every_function = pytest.mark.parametrize(
    "function, arguments", [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)


@every_function
def test_gradients(function, arguments):
    assert gradcheck(function, arguments, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, arguments)


@every_function
def test_vmap(function, arguments):
    stacked = [torch.stack([x.detach() * f for f in (1.0, 0.9, 1.1)]) for x in arguments]
    expected = torch.stack([function(*each) for each in zip(*stacked)])
    close(torch.vmap(function)(*stacked), expected, 1e-9)
    jacobians = torch.vmap(torch.func.jacrev(function))(*stacked)
    close(jacobians, torch.vmap(torch.func.jacfwd(function))(*stacked), 1e-7)


@pytest.mark.parametrize(
    "name",
    ("attention 3-D", "similarity", "compose (2, 3) (3, 3)", "invert (2, 3)", "invert (3, 4)", "tps 0.3"),
)
def test_compiles_whole(name):
    """With fixed sizes, and at the second call with a dynamic batch."""
    torch._dynamo.reset()
    function, arguments = next(case[1:] for case in CASES if case[0] == name)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        inputs = [x.detach().repeat(batch, *[1] * (x.dim() - 1)).requires_grad_() for x in arguments]
        if name.startswith("tps"):
            inputs[1:] = arguments[1:]
        expected, actual = function(*inputs), compiled(*inputs)
        close(actual, expected, 1e-9)
        weight = torch.rand_like(expected)
        gradients = torch.autograd.grad(expected, inputs, weight)
        for x, y in zip(torch.autograd.grad(actual, inputs, weight), gradients):
            close(x, y, 1e-9)


def test_compiles_what_has_no_gradient():
    torch._dynamo.reset()

    def make(n):
        return identity(n, "tps", k=3), identity(n, "projective", transforms=2), control_lattice(n + 2)

    for actual, expected in zip(torch.compile(make, fullgraph=True, backend="aot_eager")(2), make(2)):
        assert torch.equal(actual, expected)


# ------------------------------------------------------------------------------- thin-plate splines
def scattered(count):
    """Points spread over the square with no two close together: a jittered lattice."""
    side = math.ceil(math.sqrt(count))
    lattice = control_lattice(side, dtype=torch.float64) + 0.3 / side * rand(side * side, 2)
    return lattice[torch.randperm(side * side)[:count]]


COUNTS = (3, 4, 7, 16, 64, 256)


@pytest.mark.parametrize("regularization", (0.0, 1e-3, 0.5, 20.0))
@pytest.mark.parametrize("count", COUNTS)
def test_agrees_with_scipy(count, regularization):
    """SciPy's kernel is r^2 log r, half of ours, and its weights are twice ours: its smoothing is half."""
    control_points, points, xy = scattered(count), rand(count, 2), 1.5 * rand(200, 2)
    theirs = RBFInterpolator(
        control_points.numpy(),
        points.numpy(),
        kernel="thin_plate_spline",
        degree=1,
        smoothing=regularization / 2,
    )
    expected = torch.from_numpy(theirs(xy.numpy()))
    for control in (control_points, control_points.clone().requires_grad_()):  # remembered, and solved anew
        coefficients = tps_coefficients(points, control, regularization)
        assert coefficients.shape == (count + 3, 2)
        close(tps_evaluate(coefficients, control, xy), expected, 1e-9)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_passes_through_the_points(count, dtype):
    """Half-precision arguments are solved in float32 at the least."""
    control_points, points = scattered(count).to(dtype), rand(3, count, 2).to(dtype)
    coefficients = tps_coefficients(points, control_points)
    assert coefficients.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    values = tps_evaluate(coefficients, control_points, control_points)
    assert values.dtype == coefficients.dtype
    # In float32 the rounding of the weights shows, times the kernels they are summed with.
    kernels = tps_evaluate(coefficients.abs(), control_points, control_points).abs().max().item()
    close(values, points, 1e-9 if dtype == torch.float64 else 3e-7 * max(kernels, 1))


@pytest.mark.parametrize("regularization", (0.0, 0.1))
@pytest.mark.parametrize("k", (2, 4, 8, 16))
def test_default_control_points(k, regularization):
    points, lattice, xy = rand(2, k * k, 2), control_lattice(k, dtype=torch.float64), rand(9, 2)
    coefficients = tps_coefficients(points, regularization=regularization)
    close(coefficients, tps_coefficients(points, lattice, regularization), 1e-9)
    close(tps_evaluate(coefficients, None, xy), tps_evaluate(coefficients, lattice, xy))
    assert tps_coefficients(points.float(), regularization=regularization).dtype == torch.float32
    close(tps_coefficients(points.float(), regularization=regularization), coefficients, 1e-4)


@pytest.mark.parametrize("regularization", (0.0, 0.1, 1e6))
def test_reproduces_affine_maps(regularization):
    control_points, theta = scattered(16), maps((2, 3), 5)
    coefficients = tps_coefficients(apply(theta, control_points), control_points, regularization)
    close(coefficients[:, :16], torch.zeros(5, 16, 2))
    close(coefficients[:, 16:], theta.mT)  # the order of the last three rows: x, y, 1


def test_regularization_tends_to_the_nearest_affine_map():
    control_points, points = scattered(25), rand(25, 2)
    basis = torch.cat([control_points, torch.ones(25, 1)], 1)
    nearest = torch.linalg.lstsq(basis, points).solution
    coefficients = tps_coefficients(points, control_points, 1e9)
    close(coefficients, torch.cat([torch.zeros(25, 2), nearest]), 1e-7)


def test_side_conditions():
    control_points = scattered(16)
    weights = tps_coefficients(rand(2, 16, 2), control_points, 0.2)[:, :16]
    close(weights.sum(1), torch.zeros(2, 2))
    close(torch.einsum("nkd,kc->ndc", weights, control_points), torch.zeros(2, 2, 2))


@pytest.mark.parametrize("scale, offset", ((1e-6, 0.0), (1e6, 0.0), (1.0, 1e3), (1e-3, 1.0)))
def test_control_points_anywhere(scale, offset):
    control_points, points = scattered(64) * scale + offset, rand(64, 2)
    coefficients = tps_coefficients(points, control_points)
    close(tps_evaluate(coefficients, control_points, control_points), points, 1e-7)


@pytest.mark.parametrize(
    "coefficients, xy, leading",
    (((), (), ()), ((2,), (), (2,)), ((), (3,), (3,)), ((2, 1), (3,), (2, 3)), ((0,), (), (0,))),
    ids=str,
)
def test_splines_broadcast(coefficients, xy, leading):
    control_points = scattered(6)
    coefficients, xy = tps_coefficients(rand(*coefficients, 6, 2), control_points), rand(*xy, 5, 2)
    values = tps_evaluate(coefficients, control_points, xy)
    assert values.shape == (*leading, 5, 2)
    wide = coefficients.expand(*leading, 9, 2), control_points, xy.expand(*leading, 5, 2)
    close(values, tps_evaluate(*wide))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_derivatives_at_control_points_are_finite(dtype):
    """And next to them, where r^2 or its square underflows."""
    control_points = scattered(9).to(dtype)
    control_points[0] = 0
    control_points.requires_grad_()
    near = torch.tensor([[0.0, 0.0], [1e-19, 0.0], [1e-22, 1e-22], [0.0, 1e-30]], dtype=dtype)
    xy = torch.cat([control_points.detach(), near]).requires_grad_()
    coefficients = rand(12, 2).to(dtype)
    values = tps_evaluate(coefficients, control_points, xy)
    first = torch.autograd.grad(values.sin().sum(), (xy, control_points), create_graph=True)
    second = torch.autograd.grad(sum(g.sin().sum() for g in first), (xy, control_points))
    assert all(g.isfinite().all() for g in (values, *first, *second))
    lone = tps_evaluate(torch.eye(12, 2, dtype=dtype), control_points, xy)[9, 0]  # U at its own centre
    assert lone == 0
    assert not any(g[[0, 9]].any() for g in torch.autograd.grad(lone, (xy,)))


def test_gradients_of_a_remembered_system():
    points, xy = rand(2, 9, 2, grad=True), rand(4, 2)

    def spline(points):
        return tps_evaluate(tps_coefficients(points), None, xy)

    assert gradcheck(spline, (points,), check_forward_ad=True)
    assert gradgradcheck(spline, (points,))


# ------------------------------------------------------------------------------ remembered systems
@pytest.fixture
def solved(monkeypatch):
    """A fresh memory; the number of systems solved since."""
    monkeypatch.setattr(splines, "_lattices", {})
    splines._system_matrix.cache_clear()
    calls, solve = [], splines._solve

    def counted(*arguments):
        calls.append(arguments)
        return solve(*arguments)

    monkeypatch.setattr(splines, "_solve", counted)
    yield lambda: len(calls)
    splines._system_matrix.cache_clear()


@pytest.mark.parametrize("regularization", (0.0, 0.1))
def test_a_lattice_is_solved_once(solved, device, regularization):
    for dtype in DTYPES:
        tps_coefficients(rand(2, 16, 2).to(device, dtype), regularization=regularization)
    assert solved() == 1
    tps_coefficients(rand(2, 9, 2).to(device), regularization=regularization)
    assert solved() == 2
    tps_coefficients(rand(2, 16, 2).to(device), regularization=2.0)
    assert solved() == 3


def test_control_points_are_known_by_their_values(solved):
    """On a CPU: for an accelerator's the host would wait."""
    control_points, points = scattered(6), rand(6, 2)
    first = tps_coefficients(points, control_points)
    for same in (control_points, control_points.clone(), control_points.repeat(1, 2)[:, :2]):
        assert torch.equal(tps_coefficients(points, same), first)
    assert solved() == 1
    tps_coefficients(points, control_points, 0.5)
    assert solved() == 2


def mutations():
    yield "in place", lambda c: c.mul_(2)
    yield "an entry", lambda c: c.__setitem__((0, 0), 5.0)
    yield "through a view", lambda c: c[1:].add_(1)
    yield "resized data", lambda c: c.set_(c * 3)
    yield "in inference mode", torch.inference_mode()(lambda c: c.add_(c.square()))
    yield "data replaced", lambda c: setattr(c, "data", c * 2)
    # these PyTorch does not see
    yield "in its data", lambda c: c.data.add_(1)
    yield "another library's view", lambda c: torch.from_dlpack(torch.utils.dlpack.to_dlpack(c)).add_(1)


def test_values_on_an_accelerator_are_not_read(solved, device):
    """Where the host would wait the system is solved in each call; meta tensors have no values to read."""
    for where in {"meta", *[device.type] * (device.type != "cpu")}:
        control_points, points = scattered(6).to(where), rand(2, 6, 2).to(where)
        before = solved()
        for _ in range(2):
            assert tps_coefficients(points, control_points).shape == (2, 9, 2)
        assert solved() == before + 2


@pytest.mark.parametrize("mutate", [m for _, m in mutations()], ids=[name for name, _ in mutations()])
def test_changed_control_points_are_noticed(device, mutate):
    control_points, points = scattered(6).to(device), rand(6, 2).to(device)
    before = tps_coefficients(points, control_points)
    mutate(control_points)
    after = tps_coefficients(points, control_points)
    assert not torch.equal(after, before)
    assert torch.equal(after, tps_coefficients(points, control_points.clone()))


def test_memory_is_bounded(solved):
    points = rand(5, 2)
    for _ in range(70):
        tps_coefficients(points, scattered(5))
    kept = splines._system_matrix.cache_info()
    assert kept.currsize == kept.maxsize == 64


def test_no_tensor_of_the_users_is_kept():
    control_points, points = scattered(7), rand(7, 2, grad=True)
    alive = weakref.ref(control_points), weakref.ref(points)
    tps_coefficients(points, control_points).sum().backward()
    del control_points, points
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_threads():
    sets = [(scattered(count), rand(count, 2)) for count in (5, 6, 7, 8)]
    expected = [tps_coefficients(points, c.clone().requires_grad_()).detach() for c, points in sets]
    splines._system_matrix.cache_clear()
    splines._lattices.clear()
    failures, start = [], threading.Barrier(8)
    lattice_points = rand(25, 2)

    def work():
        start.wait()
        try:
            for _ in range(20):
                for (control_points, points), right in zip(sets, expected):
                    close(tps_coefficients(points, control_points), right, 1e-9)
                tps_coefficients(lattice_points)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("regularization", (0.0, 0.1))
def test_a_system_made_in_inference_mode_serves_training(solved, regularization):
    control_points = scattered(9)
    for control in (None, control_points):
        with torch.inference_mode():
            tps_coefficients(rand(9, 2), control, regularization)
        points = rand(9, 2, grad=True)
        tps_coefficients(points, control, regularization).sum().backward()
        assert points.grad is not None
    assert solved() == 2


@pytest.mark.parametrize("regularization", (0.0, 0.1))
@pytest.mark.parametrize("control_points", (None, scattered(9)), ids=("lattice", "given"))
def test_nothing_is_kept_of_a_trace(solved, control_points, regularization):
    """Neither of fake tensors nor of those that torch.func wraps; results afterwards are real."""
    points = rand(2, 9, 2)

    def coefficients(points):
        return tps_coefficients(points, control_points, regularization)

    inverse = torch.func.jacrev(coefficients)(points[0])
    mapped = torch.vmap(coefficients)(points)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert coefficients(mode.from_tensor(points)).shape == (2, 12, 2)
    graph = torch.fx.experimental.proxy_tensor.make_fx(coefficients)(points)
    assert not splines._lattices
    assert splines._system_matrix.cache_info().currsize == 0
    real = coefficients(points)
    close(mapped, real, 1e-9)
    close(graph(points), real, 1e-9)
    close(torch.einsum("icjd,jd->ic", inverse, points[0]), real[0], 1e-9)


@pytest.mark.parametrize("given", (False, True), ids=("lattice", "given"))
def test_compiled_splines(device, given):
    """Sizes and strengths that change; what is remembered before and what is not."""
    torch._dynamo.reset()
    control_points = scattered(16).float().to(device) if given else None

    def spline(points, regularization):
        return tps_coefficients(points, control_points, regularization)

    compiled = torch.compile(spline, fullgraph=True, backend="aot_eager")
    for batch, regularization in ((2, 0.0), (2, 0.5), (3, 0.7), (3, 0.0)):
        points = rand(batch, 16, 2).float().to(device).requires_grad_()
        actual, expected = compiled(points, regularization), spline(points, regularization)
        close(actual, expected, 1e-4)
        (x,), (y,) = (torch.autograd.grad(f.square().sum(), points) for f in (actual, expected))
        close(x, y, 1e-3)


def test_a_compiled_lattice_is_a_constant():
    """The graph multiplies; it does not solve."""
    torch._dynamo.reset()
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    points = rand(2, 16, 2)
    torch.compile(tps_coefficients, fullgraph=True, backend=backend, dynamic=True)(points)
    assert targets
    assert not any("solve" in target or "log" in target for target in targets)


class Spline(torch.nn.Module):
    def forward(self, points, xy):
        return tps_evaluate(tps_coefficients(points), None, xy)


@pytest.mark.parametrize("strict", (False, True), ids=("traced", "strict"))
def test_exports(strict):
    points, xy = rand(2, 16, 2), rand(5, 2)
    program = torch.export.export(Spline(), (points, xy), strict=strict)
    close(program.module()(points, xy), Spline()(points, xy), 1e-9)


def test_exports_after_compiled_training(monkeypatch):
    """Compiled code with dynamic sizes leaves no marks on the matrix that it shares with the export."""
    torch._dynamo.reset()
    solve = splines._solve
    monkeypatch.setattr(splines, "_lattices", {})
    # A copy, as on a GPU: up to 2.13 PyTorch marks no tensor that is a view.
    monkeypatch.setattr(splines, "_solve", lambda *arguments: solve(*arguments).clone())
    points, xy = rand(2, 16, 2), rand(5, 2)
    compiled = torch.compile(tps_coefficients, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(points.clone().requires_grad_()).sum().backward()
    program = torch.export.export(Spline(), (points, xy), strict=True)
    close(program.module()(points, xy), Spline()(points, xy), 1e-9)


def test_tangents_of_control_points_are_not_lost():
    control_points, points, direction = scattered(6), rand(6, 2), rand(6, 2)
    _, expected = torch.func.jvp(lambda c: tps_coefficients(points, c), (control_points,), (direction,))
    assert expected.abs().max() > 1e-3
    tps_coefficients(points, control_points)  # remembered
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(control_points, direction)
        close(forward_ad.unpack_dual(tps_coefficients(points, dual)).tangent, expected, 1e-9)


def test_default_device_and_meta():
    with torch.device("meta"):
        assert tps_coefficients(torch.empty(2, 16, 2)).shape == (2, 19, 2)
        assert tps_coefficients(torch.empty(2, 5, 2), torch.empty(5, 2)).device.type == "meta"
        assert tps_coefficients(rand(2, 5, 2).new_ones(2, 25, 2, device="cpu")).device.type == "cpu"
        assert tps_coefficients(torch.ones(5, 2, device="cpu"), scattered_on_cpu()).device.type == "cpu"
        assert identity(2).device.type == "meta"
        assert identity(2, "tps", device="cpu").device.type == "cpu"


def scattered_on_cpu():
    return torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1], [0.5, 0.25]], device="cpu")


# ------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "name, call",
    (
        ("kind", lambda: identity(2, "shear")),
        ("kind", lambda: identity(2, "flow")),
        ("n", lambda: identity(-1)),
        ("dims", lambda: identity(2, dims=4)),
        ("dims", lambda: identity(2, "projective", dims=3)),
        ("dims", lambda: identity(2, "similarity", dims=3)),
        ("k", lambda: identity(2, "tps", k=1)),
        ("transforms", lambda: identity(2, transforms=-1)),
        ("k", lambda: control_lattice(1)),
        ("translation", lambda: attention(1.0, rand(4))),
        ("translation", lambda: attention(1.0, rand())),
        ("translation", lambda: similarity(1.0, 0.0, rand(3))),
        ("scale", lambda: attention(rand(4, 1), rand(4, 2))),  # would make (4, 4, 2, 3)
        ("scale", lambda: attention(rand(3), rand(4, 2))),
        ("scale", lambda: attention(rand(3).to("meta"), rand(3, 2))),
        ("angle", lambda: similarity(1.0, rand(4, 1), rand(4, 2))),
        ("angle", lambda: similarity(rand(3), rand(4), rand(2))),
        ("outer", lambda: compose(rand(2, 2), rand(2, 3))),
        ("outer", lambda: compose(rand(3), rand(2, 3))),
        ("inner", lambda: compose(rand(2, 3), rand(4, 4))),
        ("inner", lambda: compose(rand(2, 3), rand(3, 4))),
        ("inner", lambda: compose(rand(3, 3), rand(3, 4))),
        ("inner", lambda: compose(rand(2, 2, 3), rand(3, 2, 3))),
        ("inner", lambda: compose(rand(2, 3), rand(2, 3).to("meta"))),
        ("theta", lambda: invert(rand(3, 2))),
        ("points", lambda: tps_coefficients(rand(2, 2))),
        ("points", lambda: tps_coefficients(rand(16, 3))),
        ("points", lambda: tps_coefficients(rand(2))),
        ("points", lambda: tps_coefficients(rand(2, 15, 2))),
        ("control_points", lambda: tps_coefficients(rand(2, 16, 2), rand(15, 2))),
        ("control_points", lambda: tps_coefficients(rand(2, 16, 2), rand(1, 16, 2))),
        ("control_points", lambda: tps_coefficients(rand(2, 16, 2), rand(16, 3))),
        ("control_points", lambda: tps_coefficients(rand(16, 2), rand(16, 2).to("meta"))),
        ("control_points", lambda: tps_coefficients(rand(4, 2), 1e200 * scattered(4))),
        ("regularization", lambda: tps_coefficients(rand(16, 2), regularization=-1e-9)),
        ("regularization", lambda: tps_coefficients(rand(16, 2), regularization=math.inf)),
        ("regularization", lambda: tps_coefficients(rand(16, 2), regularization=math.nan)),
        ("coefficients", lambda: tps_evaluate(rand(5, 2), rand(2, 2), rand(4, 2))),
        ("coefficients", lambda: tps_evaluate(rand(8, 2), None, rand(4, 2))),
        ("control_points", lambda: tps_evaluate(rand(8, 2), rand(4, 2), rand(4, 2))),
        ("xy", lambda: tps_evaluate(rand(8, 2), rand(5, 2), rand(4, 3))),
        ("xy", lambda: tps_evaluate(rand(8, 2), rand(5, 2), rand(2))),
        ("xy", lambda: tps_evaluate(rand(2, 8, 2), rand(5, 2), rand(3, 4, 2))),
        ("xy", lambda: tps_evaluate(rand(8, 2), rand(5, 2), rand(4, 2).to("meta"))),
    ),
)
def test_values_that_do_not_fit(name, call):
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        call()


@pytest.mark.parametrize(
    "name, call",
    (
        ("n", lambda: identity(2.0)),
        ("n", lambda: identity(True)),
        ("k", lambda: control_lattice("4")),
        ("transforms", lambda: identity(2, transforms=1.5)),
        ("dtype", lambda: identity(2, dtype=torch.int64)),
        ("dtype", lambda: control_lattice(4, dtype="float32")),
        ("translation", lambda: attention(1.0, [0.0, "0"])),
        ("translation", lambda: attention(1.0, 0.0)),
        ("translation", lambda: similarity(1.0, 0.0, (0.0, 0.0, 0.0))),
        ("translation", lambda: attention(1.0, torch.zeros(2, dtype=torch.int64))),
        ("scale", lambda: attention("1", rand(2))),
        ("scale", lambda: attention(torch.ones((), dtype=torch.int64), rand(2))),
        ("angle", lambda: similarity(1.0, None, rand(2))),
        ("outer", lambda: compose(np.eye(3), rand(3, 3))),
        ("inner", lambda: compose(rand(3, 3), torch.ones(3, 3, dtype=torch.bool))),
        ("theta", lambda: invert(torch.ones(3, 3, dtype=torch.complex64))),
        ("points", lambda: tps_coefficients(np.zeros((16, 2)))),
        ("points", lambda: tps_coefficients(torch.zeros(16, 2, dtype=torch.int32))),
        ("control_points", lambda: tps_coefficients(rand(16, 2), [[0, 0]] * 16)),
        ("control_points", lambda: tps_coefficients(rand(16, 2), torch.zeros(16, 2, dtype=torch.int32))),
        ("regularization", lambda: tps_coefficients(rand(16, 2), regularization=torch.zeros(()))),
        ("regularization", lambda: tps_coefficients(rand(16, 2), regularization="0")),
        ("coefficients", lambda: tps_evaluate(None, None, rand(4, 2))),
        ("xy", lambda: tps_evaluate(rand(7, 2), None, 0.0)),
        ("control_points", lambda: tps_evaluate(rand(7, 2), 4, rand(4, 2))),
    ),
)
def test_types_that_do_not_fit(name, call):
    with pytest.raises(TypeError, match=rf"^{name} must be "):
        call()


def degenerate():
    line = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]
    for slope in (0.0, 1 / 3, 1e3):
        points = torch.cat([line, slope * line], 1)
        yield f"line of slope {slope:.3g}", "one line", points
        yield f"line of slope {slope:.3g} elsewhere", "one line", points + 100
        yield f"small line of slope {slope:.3g}", "one line", 1e-3 * points
    yield "vertical line", "one line", line.flip(0) * torch.tensor([0.0, 1.0])
    yield "duplicates", "distinct, got 0 and 3 both at", torch.tensor([[0.5, 0], [1, 0], [0, 1], [0.5, 0]])
    yield "all zero", "distinct", torch.zeros(5, 2)
    yield "nearly duplicates", "distinct", 1e3 * torch.tensor([[1.0, 0], [0, 1], [1, 1e-7], [1, 1]]).double()
    for value in (math.nan, math.inf, -math.inf):
        yield str(value), "finite, got", torch.tensor([[0.5, 0], [1, value], [0, 1], [1, 1]])


BAD = list(degenerate())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("message, control_points", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_control_points(message, control_points, dtype):
    """Rounding a line to the dtype leaves it a line; a second try fails as the first did. (On a CPU.)"""
    control_points = control_points.to(dtype)
    if torch.finfo(dtype).bits == 16 and message == "one line":
        message = "one line|distinct"  # as rounding may join points
    points = rand(2, len(control_points), 2)
    for regularization in (0.0, 0.0, 0.1):
        with pytest.raises(ValueError, match=rf"^control_points must be .*({message})"):
            tps_coefficients(points, control_points, regularization)
    with pytest.raises(ValueError, match=rf"^control_points must be .*({message})"):
        tps_coefficients(points, control_points.requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thin_sets_of_control_points_are_legal(dtype):
    """Strips and close neighbours that the dtype resolves."""
    strip = scattered(16) * torch.tensor([1.0, 0.05])
    near = torch.tensor([[0.0, 0], [0.0, 2.0**-6], [1, 0], [0, 1]])
    for control_points in (strip, near):
        assert tps_coefficients(rand(len(control_points), 2), control_points.to(dtype)).isfinite().all()


def test_non_finite_points_spoil_only_their_own_spline():
    points = rand(3, 16, 2)
    points[1, 4, 0] = math.nan
    coefficients = tps_coefficients(points)
    assert coefficients[[0, 2]].isfinite().all()
    assert coefficients[1, :, 0].isnan().all()


# -------------------------------------------------------------------------------------- the module
def test_imports_no_compiler():
    code = """if True:
        import sys
        import stn_triton.transforms
        print([name for name in ("triton", "torch._dynamo", "sympy") if name in sys.modules])
    """
    root = Path(transforms.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr


def test_docstrings_are_complete():
    for name in transforms.__all__:
        documentation = inspect.getdoc(getattr(transforms, name))
        assert "Args:" in documentation
        assert "Returns:" in documentation
        assert "Raises:" in documentation
