"""`torch.compile` takes the functions whole: one graph, forward and backward, for all sizes if dynamic."""

import shutil

import pytest
import torch
from common import MIXED, assert_close, pairwise, random_grid, random_theta
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import stn_triton as stn
from stn_triton import backend

TRANSFORMS = ["affine", "attention", "similarity", "projective", "tps"]


def homography(batch, device):
    return torch.eye(3, device=device) + 0.1 * torch.randn(batch, 3, 3, device=device)


def points(batch, device):
    return stn.transforms.identity(batch, "tps", device=device) + 0.1 * torch.randn(
        batch, 16, 2, device=device
    )


def transformer(transform):
    """SpatialTransformer's function of its images and of what the localisation net makes of them."""

    def build(device):
        net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        module = stn.nn.SpatialTransformer(net, transform, features=12).to(device)
        nn.init.normal_(module.regression.weight, std=0.1)
        return lambda x, _: module(x)

    return build


# name -> (the function of an image and of parameters, the parameters for so many images of a size)
def functions():
    f32 = torch.float32
    fixed = {
        "grid_sample": (
            lambda x, p: stn.grid_sample(x, p, padding_mode=MIXED[2], align_corners=False),
            lambda n, size, device: random_grid(n, size, f32, device),
        ),
        "affine_grid": (
            lambda x, p: stn.affine_grid(p, x.shape, False) * x.mean(),
            lambda n, size, device: random_theta(n, 2, f32, device),
        ),
        "projective_grid": (
            lambda x, p: stn.projective_grid(p, x.shape) * x.mean(),
            lambda n, size, device: homography(n, device),
        ),
        "tps_grid": (
            lambda x, p: stn.tps_grid(p, x.shape) * x.mean(),
            lambda n, size, device: points(n, device),
        ),
        "affine_grid_sample": (
            lambda x, p: stn.affine_grid_sample(x, p),
            lambda n, size, device: random_theta(n, 2, f32, device),
        ),
        "projective_grid_sample": (
            lambda x, p: stn.projective_grid_sample(x, p, (5, 6), padding_mode="circular", antialias=True),
            lambda n, size, device: homography(n, device),
        ),
        "tps_grid_sample": (
            lambda x, p: stn.tps_grid_sample(x, p, padding_mode="border", fill=(1.0, 2.0, 3.0)),
            lambda n, size, device: points(n, device),
        ),
        "flow_grid_sample": (
            lambda x, p: stn.flow_grid_sample(x, p),
            lambda n, size, device: torch.randn(n, 2, *size, device=device),
        ),
        "of integers": (
            lambda x, p: stn.affine_grid_sample((99 * x).to(torch.int16), p, fill=7, dtype=torch.float32),
            lambda n, size, device: random_theta(n, 2, f32, device),
        ),
    }
    table = {name: (lambda device, f=f: f, make) for name, (f, make) in fixed.items()}
    for name in TRANSFORMS:
        table[f"SpatialTransformer-{name}"] = (
            transformer(name),
            lambda n, size, device: torch.zeros(n, device=device),
        )
    return table


FUNCTIONS = functions()
# (batch, image size), the last two new to a graph made for the first. PyTorch takes sizes that are equal at
# first for one: a batch of 2 or 3 for the fixed sizes of a matrix.
SHAPES = [(4, (10, 11)), (5, (10, 11)), (7, (8, 9))]


def case(make, batch, size, device, backward):
    image = torch.randn(batch, 3, *size, device=device)
    return [tensor.requires_grad_(backward) for tensor in (image, make(batch, size, device))]


def gradients(output, inputs):
    return torch.autograd.grad(output.square().sum(), inputs, allow_unused=True)


def assert_compiles_whole(name, device, dynamic, backward, **options):
    """No graph break, one compilation, and the values and gradients of eager mode."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    build, make = FUNCTIONS[name]
    function = build(device)
    counter = CompileCounterWithBackend(options.pop("backend")) if "backend" in options else None
    compiled = torch.compile(
        function, fullgraph=True, dynamic=dynamic, **({"backend": counter} if counter else {}), **options
    )
    for batch, size in SHAPES if dynamic else SHAPES[:1] * 2:
        inputs = case(make, batch, size, device, backward)
        output, wanted = compiled(*inputs), function(*inputs)
        assert_close(output, wanted.double())
        if backward:
            found, expected = gradients(output, inputs), gradients(wanted, inputs)
            assert [g is None for g in found] == [g is None for g in expected]
            for one, other in zip(found, expected):
                if one is not None:
                    assert_close(one, other.double())
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


@pytest.fixture
def quick(device):
    """What is traced does not depend on the backend; the interpreter would only take longer."""
    if device.type != "cpu":
        yield
        return
    with backend.use("torch"):
        yield


@pairwise
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_one_graph(device, name, dynamic, backward):
    assert_compiles_whole(name, device, dynamic, backward, backend="aot_eager")


@pytest.mark.parametrize("name", ["grid_sample", "affine_grid_sample"])
def test_one_graph_on_kernels(device, name):
    assert_compiles_whole(name, device, True, True, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["affine_grid_sample"])
def test_inductor(device, name):
    assert_compiles_whole(name, device, True, True, backend="inductor")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA graphs")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_modes(device, name, mode, backward):
    assert_compiles_whole(name, device, False, backward, mode=mode)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("forward", ["eager", "compiled"])
@pytest.mark.parametrize("name", ["grid_sample", "affine_grid", "affine_grid_sample", "tps_grid_sample"])
def test_compiled_autograd(device, name, forward):
    """The backward in one graph as well, whether or not the forward is compiled."""
    torch._dynamo.reset()
    build, make = FUNCTIONS[name]
    function = build(device)
    inputs = case(make, 2, (6, 7), device, True)
    expected = gradients(function(*inputs), inputs)
    run = torch.compile(function, fullgraph=True, backend="aot_eager") if forward == "compiled" else function
    output = run(*inputs).square().sum()
    counter = CompileCounterWithBackend("aot_eager")
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=counter, fullgraph=True)):
        output.backward()
    assert counter.frame_count == 1
    for tensor, reference in zip(inputs, expected):
        assert_close(tensor.grad, reference.double())


@pytest.mark.usefixtures("quick")
def test_training(device):
    """The same small network, eager and compiled: the same losses."""
    images = torch.randn(4, 8, 1, 10, 10, device=device)
    labels = torch.randint(3, (4, 8), device=device)
    losses = {}
    for how in ("eager", "compiled"):
        torch._dynamo.reset()
        torch.manual_seed(1)
        localise = nn.Sequential(nn.Flatten(), nn.Linear(100, 8), nn.ReLU())
        net = nn.Sequential(
            stn.nn.SpatialTransformer(localise, size=(6, 6), features=8), nn.Flatten(), nn.Linear(36, 3)
        ).to(device)
        optimiser = torch.optim.SGD(net.parameters(), lr=0.5)
        step = torch.compile(net, fullgraph=True, backend="aot_eager") if how == "compiled" else net
        losses[how] = []
        for x, y in zip(images.repeat(3, 1, 1, 1, 1), labels.repeat(3, 1)):
            loss = nn.functional.cross_entropy(step(x), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[how].append(loss.item())
    assert losses["eager"][-1] < losses["eager"][0]
    torch.testing.assert_close(losses["compiled"], losses["eager"], rtol=1e-4, atol=1e-5)


def test_nothing_is_hidden_from_dynamo():
    """No function of the package opts out of compilation."""
    from pathlib import Path

    for path in Path(stn.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "compiler.disable" not in text, path
        assert "_dynamo.disable" not in text, path
        assert "graph_break" not in text, path


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "name, kind",
    [("grid_sample", "device"), ("grid_sample", "meta"), ("SpatialTransformer-affine", "device")],
)
def test_whether_a_device_has_autocast_is_not_traced(device, monkeypatch, name, kind):
    """The compiler of PyTorch 2.11 cannot."""
    ask = torch.amp.is_autocast_available

    def outside(device_type):
        assert not torch.compiler.is_compiling()
        return ask(device_type)

    monkeypatch.setattr(torch.amp, "is_autocast_available", outside)
    torch._dynamo.reset()
    build, make = FUNCTIONS[name]
    inputs = case(make, *SHAPES[0], device if kind == "device" else torch.device("meta"), False)
    output = torch.compile(build(device), fullgraph=True, backend="eager")(*inputs)
    assert output.shape == inputs[0].shape
    assert output.device.type == inputs[0].device.type
