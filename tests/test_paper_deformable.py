"""bench.deformable: what it says of parameters, arithmetic and memory is so, and all layers run."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench import deformable
from bench.deformable import METHODS, SMALL, Shape, convolution_flops, localisation_flops, main, measure
from stn_triton import backend
from stn_triton.nn import SpatialTransformer
from stn_triton.transforms import control_lattice

CPU = torch.device("cpu")
BY_NAME = {method.name: method for method in METHODS}


def plain_deform_conv2d(input, offset, weight, bias, padding):
    """torchvision's operator for 3 x 3: a bilinear sample for each tap, whose offset is y, then x."""
    n, _, height, width = input.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    total = bias.view(1, -1, 1, 1)
    for tap in range(9):
        dy, dx = offset[:, 2 * tap], offset[:, 2 * tap + 1]
        at_y, at_x = y + tap // 3 - padding + dy, x + tap % 3 - padding + dx
        grid = torch.stack([(2 * at_x + 1) / width - 1, (2 * at_y + 1) / height - 1], -1)
        sampled = F.grid_sample(input, grid.expand(n, -1, -1, -1), align_corners=False)
        total = total + torch.einsum("nchw,oc->nohw", sampled, weight[:, :, tap // 3, tap % 3])
    return total


def torchvisions():
    """torchvision's operator, or None: its wheels are for one build of PyTorch each."""
    try:
        from torchvision import ops

        ops.deform_conv2d(
            torch.zeros(1, 1, 3, 3), torch.zeros(1, 18, 3, 3), torch.zeros(1, 1, 3, 3), padding=1
        )
    except (ImportError, RuntimeError):
        return None
    return ops.deform_conv2d


@pytest.fixture(autouse=True)
def _operator(monkeypatch):
    """Without torchvision's operator a plain one does."""
    if torchvisions() is None:
        monkeypatch.setattr(deformable, "deform_conv2d", plain_deform_conv2d)


def test_plain_operator_is_torchvisions():
    theirs = torchvisions()
    if theirs is None:
        pytest.skip("needs torchvision's operators")
    input, offset = torch.rand(2, 3, 7, 9), torch.randn(2, 18, 7, 9)
    weight, bias = torch.randn(4, 3, 3, 3), torch.randn(4)
    expected = theirs(input, offset, weight, bias, padding=1)
    torch.testing.assert_close(
        plain_deform_conv2d(input, offset, weight, bias, 1), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", BY_NAME)
def test_all_are_the_convolution_at_first(name):
    """Offsets start at zero and transformers at the identity, so all do the same job."""
    (shape,) = SMALL
    layer = BY_NAME[name].build(shape)
    convolution = next(m for m in reversed(list(layer.modules())) if isinstance(m, nn.Conv2d))
    assert convolution.out_channels == shape.c
    map = torch.randn(shape)
    torch.testing.assert_close(layer(map), convolution(map), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("transform", ["affine", "tps"])
def test_unfused_is_fused(transform):
    (shape,) = SMALL
    layers = [
        deformable.transformed(make, transform, shape) for make in (deformable.Unfused, SpatialTransformer)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    if transform == "tps":
        theta = control_lattice(4) + 0.2 * torch.randn(shape.n, 16, 2)
    else:
        theta = torch.eye(2, 3) + 0.2 * torch.randn(shape.n, 2, 3)
    map = torch.randn(shape)
    outputs = [layer[0].sample(map, theta) for layer in layers]
    torch.testing.assert_close(*outputs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", BY_NAME)
def test_flops_of_products(name):
    """PyTorch counts those of convolutions and matrix products; the samplers' are no more than a tenth."""
    shape = Shape(2, 32, 16, 16)
    method = BY_NAME[name]
    layer = method.build(shape)
    if name == "deformable convolution":
        products = convolution_flops(shape, 18) + convolution_flops(shape, shape.c)
    elif name == "convolution":
        products = convolution_flops(shape, shape.c)
    else:
        parameters = 6 if "affine" in name else 32
        adds = shape.n * shape.c * shape.h * shape.w  # the average's
        products = convolution_flops(shape, shape.c) + localisation_flops(shape, parameters) - adds
    with FlopCounterMode(display=False) as counter, backend.use("torch"):
        layer(torch.randn(shape))
    counts = {str(op): value for op, value in counter.get_flop_counts()["Global"].items()}
    counted = sum(value for op, value in counts.items() if "convolution" in op or "addmm" in op)
    if name == "deformable convolution" and deformable.deform_conv2d is not plain_deform_conv2d:
        counted += convolution_flops(shape, shape.c)  # within the operator, which is not counted
    elif name == "deformable convolution":
        counted += sum(value for op, value in counts.items() if "bmm" in op)
    assert counted == products
    assert products <= method.flops(shape) < 1.7 * products


@pytest.mark.parametrize("name", [name for name in BY_NAME if "deformable" not in name])
def test_bytes_kept_for_backward(name):
    """What autograd keeps beside the input and parameters: kernels of the fused ones in the interpreter."""
    shape = Shape(2, 4, 24, 24)
    method = BY_NAME[name]
    layer = method.build(shape)
    map = torch.randn(shape, requires_grad=True)
    known = {map.untyped_storage().data_ptr()} | {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(map)
    grid_of_one = 4 * 2 * shape.h * shape.w  # all that is smaller is not as large as a map
    assert sum(size for size, _ in kept.values() if size >= grid_of_one) == method.kept(shape)
    del output


def test_rows_and_file(tmp_path, capsys):
    path = tmp_path / "new" / "deformable.json"
    with backend.use("torch"):
        assert main(["--small", "--budget", "0.002", "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "Times on a CPU" in printed
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == list(BY_NAME)
    for row in rows:
        assert row["forward"] > 0
        assert row["step"] > 0


def test_missing_operator_is_told(monkeypatch, capsys):
    def missing(*arguments, **options):
        raise ImportError("torchvision.ops.deform_conv2d is not there: no wheel")

    monkeypatch.setattr(deformable, "deform_conv2d", missing)
    row = measure(SMALL[0], BY_NAME["deformable convolution"], CPU, 0.002)
    assert row.forward is None
    assert "not there" in row.missing


def test_without_times_all_shapes(capsys):
    assert main(["--budget", "0"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("128x48x32x32") == len(METHODS)
    assert printed.count("32x512x28x28") == len(METHODS)
