"""What versions of Triton could differ in. `make test` runs this file under each supported one.

Every kernel is run against the same function of plain PyTorch, in float64, and the rules are held by which
device code means the same compiled and interpreted, in all versions (``kernels/README.md``).
"""

import ast
import importlib
from pathlib import Path

import pytest
import torch
from common import MODES, NAN, assert_close, padding_of, random_grid, random_theta

import stn_triton as stn
from stn_triton import backend

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
IN_SIZE = {2: (4, 5), 3: (3, 2, 4)}
SIZE = {2: (3, 6), 3: (2, 3, 2)}
# Each padding and each convention, not each with each.
OPTIONS = [("zeros", False), ("border", True), ("mixed", False)]  # reflection beside circular padding

# The interpreter computes with NumPy, which speaks of the infinities that it meets.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _no_float_maxima(monkeypatch):
    """Of NaN the interpreters' ``tl.maximum`` say different things: kernels use ``larger`` and its kin."""
    if not backend.interpreting():
        return
    from triton.runtime import interpreter

    def refuse(*args):
        raise AssertionError(
            "tl.maximum, tl.minimum or tl.clamp of floats: larger, smaller or clamp is meant"
        )

    for operation in ("maxnumf", "minnumf", "maximumf", "minimumf", "clampf"):
        monkeypatch.setattr(interpreter.InterpreterBuilder, f"create_{operation}", refuse)


def case(source, device):
    """The sampler as a function of (image, parameters, mode, padding, align_corners), and parameters."""
    dims = 3 if source.endswith("3d") else 2
    name, size, dtype = source.removesuffix("3d"), SIZE[dims], torch.float64
    if name == "grid":
        return stn.grid_sample, random_grid(2, size, dtype, device)
    if name == "flow":
        return stn.flow_grid_sample, 1.5 * torch.randn(2, dims, *size, dtype=dtype, device=device)
    if name == "affine":
        params = random_theta(2, dims, dtype, device)
    elif name == "projective":
        params = torch.eye(3, dtype=dtype, device=device) + 0.15 * torch.randn(2, 3, 3, device=device)
    else:
        params = stn.transforms.control_lattice(3, device=device).double() + 0.2 * torch.randn(
            2, 9, 2, device=device
        )
    function = getattr(stn, f"{name}_grid_sample")
    return lambda image, params, *options: function(image, params, size, *options), params


def picture(source, device):
    return torch.randn(2, 3, *IN_SIZE[3 if source.endswith("3d") else 2], dtype=torch.float64, device=device)


def agree(function, *arguments, scale=None):
    """``function`` of the arguments gives on the kernels what it gives on PyTorch's operators."""
    actual = function(*arguments)
    with backend.use("torch"):
        expected = function(*arguments)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert_close(one.nan_to_num(), other.nan_to_num(), scale=scale)


def value_and_gradients(function, *options):
    def run(image, params, cotangent):
        leaves = [tensor.clone().requires_grad_() for tensor in (image, params)]
        output = function(*leaves, *options)
        return output.detach(), *torch.autograd.grad(output, leaves, cotangent, materialize_grads=True)

    return run


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "source", ["grid", "grid3d", "affine", "affine3d", "projective", "tps", "flow", "flow3d"]
)
def test_values_and_gradients(device, source, mode):
    """Sampler forward and backward: gather of matrices, scatter of the others."""
    function, params = case(source, device)
    image = picture(source, device)
    # the interpreter takes long over cubics, and over the gather of volumes
    few = source == "affine3d" or (mode == "bicubic" and source != "grid")
    for padding, align_corners in OPTIONS[1:2] if few else OPTIONS:
        dims = image.dim() - 2
        cotangent = torch.randn(2, 3, *SIZE[dims], dtype=torch.float64, device=device)
        options = mode, padding_of(padding, dims), align_corners
        agree(value_and_gradients(function, *options), image, params, cotangent)


@pytest.mark.parametrize(
    "source, padding", [("affine", "mixed"), ("projective", "border"), ("affine3d", "zeros")]
)
def test_averages(device, source, padding):
    """Loops of as many samples as a map asks for: forward, and both gradients."""
    _, params = case(source, device)
    image = picture(source, device)
    dims = image.dim() - 2
    size, options = (1, 2, 2)[-dims:], {"padding_mode": padding_of(padding, dims), "antialias": True}
    function = getattr(stn, f"{source.removesuffix('3d')}_grid_sample")
    cotangent = torch.randn(2, 3, *size, dtype=torch.float64, device=device)

    def run(image, params):
        return function(image, params, size, **options)

    agree(value_and_gradients(run), image, params, cotangent)


@pytest.mark.parametrize(
    "source, mode", [("grid", "bilinear"), ("tps", "nearest"), ("flow", "bicubic"), ("grid3d", "bilinear")]
)
def test_repeatable_gradients(device, source, mode):
    """The sorted backward pass."""
    function, params = case(source, device)
    image = picture(source, device)
    cotangent = torch.randn(2, 3, *SIZE[image.dim() - 2], dtype=torch.float64, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        options = mode, padding_of("mixed", image.dim() - 2), False
        agree(value_and_gradients(function, *options), image, params, cotangent)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "source, mode", [("grid", "bicubic"), ("affine", "bilinear"), ("tps", "nearest"), ("flow3d", "bilinear")]
)
def test_forward_mode_and_second_derivatives(device, source, mode):
    function, params = case(source, device)
    image = picture(source, device)
    directions = torch.randn_like(image), 0.1 * torch.randn_like(params)
    options = (mode, "border", False)

    def run(image, params):
        def sample(image, params):
            return function(image, params, *options)

        _, along = torch.func.jvp(sample, (image, params), directions)
        gradients = torch.func.grad(lambda *leaves: sample(*leaves).sin().sum(), argnums=(0, 1))
        return along, *torch.func.jvp(gradients, (image, params), directions)[1]

    agree(run, image, params)


@pytest.mark.parametrize("name", ["affine", "affine3d", "projective", "tps"])
def test_grids(device, name):
    """The grid kernel, forward and backward."""
    _, params = case(name, device)
    dims = 3 if name.endswith("3d") else 2
    make = getattr(stn, f"{name.removesuffix('3d')}_grid")

    def run(params, cotangent):
        leaf = params.clone().requires_grad_()
        grid = make(leaf, (2, 1, *SIZE[dims]), align_corners=False)
        return grid.detach(), *torch.autograd.grad(grid, leaf, cotangent)

    agree(run, params, torch.randn(2, *SIZE[dims], dims, dtype=torch.float64, device=device))


@pytest.mark.parametrize("padding", ["zeros", "border", "mixed"])
@pytest.mark.parametrize("source, mode", [*(("grid", mode) for mode in MODES), ("affine", "bilinear")])
def test_coordinates_that_are_no_numbers(device, source, mode, padding):
    """NaN and infinities in a coordinate or a matrix, also to the gather and to the sorted backward pass."""
    function, params = case(source, device)
    image = picture(source, device)
    bad = params.flatten()
    bad[:3] = torch.tensor([NAN, float("inf"), -float("inf")])
    params = bad.view_as(params)
    cotangent = torch.randn(2, 3, *SIZE[2], dtype=torch.float64, device=device)

    def run(image, params, cotangent):
        options = mode, padding_of(padding, 2), False
        value, by_image, _ = value_and_gradients(function, *options)(image, params, cotangent)
        return value, by_image

    agree(run, image, params, cotangent)
    if (source, mode) != ("grid", "bilinear"):
        return
    torch.use_deterministic_algorithms(True)
    try:
        agree(run, image, params, cotangent)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode, padding", [("bilinear", "zeros"), ("bicubic", "border")])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
@pytest.mark.parametrize("wide", [False, True])
def test_fills_and_integers(device, mode, padding, dtype, wide):
    """Rounded from float32 and from float64, around 0 and at both ends."""
    info = torch.iinfo(dtype)
    image = torch.randint(info.min, info.max + 1, (2, 3, 4, 5), device=device).to(dtype)
    flow = 1.5 * torch.randn(2, 2, 3, 6, dtype=torch.float64 if wide else torch.float32, device=device)
    flow[0, 0, 0] = NAN
    fill = torch.tensor([2.0 * info.min - 9.5, 2.0 * info.max, NAN], device=device)

    def run(image, flow, fill):
        return (stn.flow_grid_sample(image, flow, mode, padding, fill=fill).double(),)

    actual = run(image, flow, fill)[0]
    with backend.use("torch"):
        expected = run(image, flow, fill)[0]
    assert (actual - expected).abs().max() <= 1  # of a half, that float32 coordinates make
    assert (actual == expected).double().mean() > 0.95
    assert actual[0, :, 0].tolist() == [[info.min] * 6, [info.max] * 6, [0] * 6]


# --------------------------------------------------------------------------------- rules of device code
def test_constants_are_no_constexprs_to_the_interpreter():
    """``constexpr op block`` is refused by some interpreters: there is no constexpr that could be in one."""
    import triton.language as tl

    strays = []
    for file in sorted(KERNELS.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        allowed = {
            id(node)
            for function in tree.body
            if isinstance(function, ast.FunctionDef) and function.name == "constant"
            for node in ast.walk(function)
        }
        strays += [
            f"{file.name}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and ast.unparse(node.func).rpartition(".")[2] == "constexpr"
            and id(node) not in allowed
        ]
        name = ".".join(file.relative_to(KERNELS).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        module = importlib.import_module(f"stn_triton.kernels.{name}".rstrip("."))
        if backend.interpreting():
            strays += [f"{file.name}: {k}" for k, v in vars(module).items() if isinstance(v, tl.constexpr)]
    assert not strays, f"made by tl.constexpr and not by spec.constant: {strays}"
