"""``torch.export`` of models with each transform; the same in PyTorch's operators; and in ONNX."""

import itertools

import pytest
import torch
from common import random_grid
from torch import nn

import stn_triton as stn
from stn_triton import backend
from stn_triton.versions import TRICUBIC

TRANSFORMS = ["affine", "attention", "similarity", "projective", "tps"]
SIZE = (5, 6)


@pytest.fixture(autouse=True)
def _eager_backend(device):
    """Tracing and decompositions are the same on any backend; the interpreter would only take longer."""
    with backend.use("torch"):
        yield


class Moments(nn.Module):
    """A localisation net for any number of dimensions: the mean of each channel and of its square."""

    def forward(self, x):
        pixels = x.flatten(2)
        return torch.cat([pixels.mean(2), pixels.square().mean(2)], 1)


class Model(nn.Module):
    """A spatial transformer away from where it starts."""

    def __init__(
        self, transform, mode="bilinear", padding="zeros", align_corners=False, transforms=1, dims=2
    ):
        super().__init__()
        options = {"size": SIZE if dims == 2 else (3, *SIZE), "transforms": transforms, "dims": dims}
        self.transformer = stn.nn.SpatialTransformer(
            Moments(), transform, mode=mode, padding_mode=padding, align_corners=align_corners,
            features=4, **options,
        )  # fmt: skip
        nn.init.normal_(self.transformer.regression.weight, std=0.1)

    def forward(self, x):
        return self.transformer(x)


class Flow(nn.Module):
    def __init__(self, *modes, dims=2):
        super().__init__()
        self.modes, self.net = modes, (nn.Conv2d if dims == 2 else nn.Conv3d)(2, dims, 3, padding=1)

    def forward(self, x):
        return stn.flow_grid_sample(x, self.net(x), *self.modes)


class Grids(nn.Module):
    """The functions that make grids, with parameters of their own, and the one that takes a grid."""

    def __init__(self, *modes):
        super().__init__()
        self.modes = modes
        self.theta = nn.Parameter(torch.eye(2, 3) + 0.1 * torch.randn(1, 2, 3))
        self.homography = nn.Parameter(torch.eye(3) + 0.05 * torch.randn(1, 3, 3))
        self.points = nn.Parameter(stn.transforms.identity(1, "tps") + 0.1 * torch.randn(1, 16, 2))

    def forward(self, x):
        size = 1, 1, *SIZE
        grid = stn.affine_grid(self.theta, size, False) + stn.projective_grid(self.homography, size)
        grid = (grid + stn.tps_grid(self.points, size)) / 3
        return stn.grid_sample(x, grid.expand(x.shape[0], -1, -1, -1), *self.modes)


class Broadcast(nn.Module):
    """One set of three transforms for all images."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.eye(2, 3) + 0.2 * torch.randn(1, 3, 2, 3))

    def forward(self, x):
        return stn.affine_grid_sample(x, self.theta, SIZE)


MODELS = {
    **{name: lambda name=name: Model(name) for name in TRANSFORMS},
    "flow": lambda: Flow("bilinear", "zeros", False),
    "grids": lambda: Grids("bilinear", "zeros", False),
    "transforms": lambda: Model("affine", transforms=2),
    "broadcast": Broadcast,
    "volume": lambda: Model("affine", dims=3),
    "volume-flow": lambda: Flow("bilinear", "border", False, dims=3),
    # sampled tap by tap, of an image's size, in ONNX and where PyTorch has no sampler for it
    "tricubic": lambda: Model("affine", "bicubic", dims=3),
    "wrapped": lambda: Model("projective", "bilinear", ("circular", "border")),
}
NOT_IN_ONNX = ("tricubic", "wrapped")
NOT_IN_ATEN = NOT_IN_ONNX[TRICUBIC:]


def images(name, device="cpu", batch=2, grow=0):
    size = (5 + grow, 7 + grow)
    if name.startswith(("volume", "tricubic")):
        size = (4 + grow, *size)
    return torch.randn(batch, 2, *size, device=device)


def operators(program):
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


def exported(name, device="cpu", dynamic=False):
    """The model and its program; whether the batch and the image's size are fixed."""
    model = MODELS[name]().to(device).eval()
    x = images(name, device)
    shapes = (dict.fromkeys((0, *range(2, x.dim())), torch.export.Dim.DYNAMIC),) if dynamic else None
    return model, torch.export.export(model, (x,), dynamic_shapes=shapes), x


def assert_runs_alike(model, program, inputs):
    for x in inputs:
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, dynamic",
    [*((name, True) for name in MODELS), ("affine", False)],  # test_onnx has others of fixed sizes
)
def test_exported(name, dynamic):
    """One program, for other batches and sizes too; then without an operator of this package."""
    model, program, x = exported(name, dynamic=dynamic)
    ours = {target for target in operators(program) if str(target).startswith("stn_triton")}
    assert ours
    inputs = [x, *([images(name, batch=3), images(name, batch=5, grow=3)] if dynamic else [])]
    assert_runs_alike(model, program, inputs)
    plain = program.run_decompositions(stn.export.decompositions())
    if name in NOT_IN_ATEN:
        inputs = inputs[:1]
    assert all(
        str(target).startswith(("aten", "<built-in", "sym", "<function")) for target in operators(plain)
    )
    assert_runs_alike(model, plain, inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.gpu
@pytest.mark.parametrize("name", list(MODELS))
def test_exported_on_a_gpu(name):
    with backend.use("triton"):
        model, program, x = exported(name, "cuda", dynamic=True)
        assert_runs_alike(model, program, [x, images(name, "cuda", batch=3, grow=2)])


def test_exported_program_trains():
    """The operators are differentiable in the program too."""
    model, program, x = exported("affine")
    results = []
    for module in (model, program.module()):
        weight = dict(module.named_parameters())["transformer.regression.weight"]
        results.append(torch.autograd.grad(module(x).square().sum(), weight)[0])
    assert torch.equal(*results)


def test_averages_are_exported_and_not_decomposed():
    """A program runs on the package's operators; PyTorch's have nothing of the kind, and that is said."""

    class Shrunk(nn.Module):
        def forward(self, x, theta):
            return stn.affine_grid_sample(x, theta, (2, 3), padding_mode="circular", antialias=True)

    x, theta = images("affine"), torch.eye(2, 3).repeat(2, 1, 1)
    program = torch.export.export(Shrunk(), (x, theta))
    other = images("affine"), torch.eye(2, 3) + 0.2 * torch.randn(2, 2, 3)
    for inputs in (x, theta), other:
        torch.testing.assert_close(program.module()(*inputs), Shrunk()(*inputs))
    with pytest.raises(NotImplementedError, match="antialias=True cannot be exported"):
        program.run_decompositions(stn.export.decompositions())


def test_decompositions_keep_the_memory_format():
    """channels_last in, channels_last out."""
    x = images("affine").contiguous(memory_format=torch.channels_last)
    theta = torch.eye(2, 3).repeat(2, 1, 1)

    class Sampled(nn.Module):
        def forward(self, x, theta):
            return stn.affine_grid_sample(x, theta)

    program = torch.export.export(Sampled(), (x, theta))
    plain = program.run_decompositions(stn.export.decompositions())
    assert plain.module()(x, theta).stride() == Sampled()(x, theta).stride()


def test_elimination():
    """The spline's inverse, for any matrix: batches, and zeros where a pivot would be."""
    inverse = torch.ops.aten.linalg_inv_ex.default
    ours = stn.export.decompositions()[inverse]
    a = torch.randn(3, 6, 6, dtype=torch.float64)
    a[:, range(6), range(6)] = 0
    a[0] = torch.eye(6, dtype=torch.float64).flip(0)
    torch.testing.assert_close(ours(a)[0], inverse(a)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["fp16", "fp64"])
def test_decompositions_keep_the_dtype(dtype):
    """A half image with float32 parameters, and float64: computed as by the operator."""
    x, grid = images("affine").to(dtype), random_grid(2, SIZE, dtype, "cpu")
    table = stn.export.decompositions()
    sample = torch.ops.stn_triton.sample.default
    for params, source in ((grid, 0), (torch.eye(2, 3).repeat(2, 1, 1), 1)):
        arguments = x, params, None, source, SIZE, 0, 1, False
        assert torch.equal(table[sample](*arguments), sample(*arguments))
        assert table[sample](*arguments).dtype == dtype


# --------------------------------------------------------------------------------------------------- ONNX
def assert_same_in_onnx(model, x, dynamic=None, others=()):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = model.eval()
    shapes = (dict.fromkeys((0, *range(2, x.dim())), torch.export.Dim.DYNAMIC),) if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    program = program.run_decompositions(stn.export.decompositions())
    made = torch.onnx.export(
        program, (), dynamo=True, opset_version=20, verbose=False,
        custom_translation_table=stn.export.onnx_translations(),
    )  # fmt: skip
    proto = made.model_proto
    onnx.checker.check_model(proto)
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] >= 20
    session = runtime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (name,) = (argument.name for argument in session.get_inputs())
    for one in (x, *others):
        (result,) = session.run(None, {name: one.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(result), model(one), rtol=1e-4, atol=1e-4)
    return proto


ANY_SIZE = ("affine", "tps", "volume")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name in MODELS if name not in (*ANY_SIZE, "tricubic")])
def test_onnx(name):
    """Equal results in onnxruntime, by ONNX's own GridSample."""
    proto = assert_same_in_onnx(MODELS[name](), images(name))
    assert any(node.op_type == "GridSample" for node in proto.graph.node) == (name not in NOT_IN_ONNX)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_modes():
    """All that ONNX has, in one model: an export takes long, and a node of it little."""
    modes = list(
        itertools.product(
            ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection"), (False, True)
        )
    )

    class Modes(nn.Module):
        def forward(self, x):
            theta = torch.tensor([[[1.2, 0.3, 0.1], [-0.3, 1.2, 0.2]]])
            return torch.stack([stn.affine_grid_sample(x, theta, SIZE, *each) for each in modes])

    proto = assert_same_in_onnx(Modes(), images("affine"))
    assert sum(node.op_type == "GridSample" for node in proto.graph.node) == len(modes)


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_onnx_of_integers_and_fills(padding):
    """Labels that stay whole numbers, and samples of bytes in floats: ONNX needs no operator for either."""

    class Bytes(nn.Module):
        def forward(self, x):
            theta = torch.tensor([[[1.2, 0.3, 0.1], [-0.3, 1.2, 0.2]]])
            photos, options = (9 * x).to(torch.uint8), {"padding_mode": padding, "fill": 100.0}
            labels = stn.affine_grid_sample(photos, theta, mode="nearest", **options)
            return labels + stn.affine_grid_sample(photos, theta, dtype=torch.float32, **options)

    assert_same_in_onnx(Bytes(), images("affine").abs())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ANY_SIZE)
def test_onnx_of_any_size(name):
    """One ONNX model for other batches and image sizes."""
    proto = assert_same_in_onnx(MODELS[name](), images(name), True, [images(name, batch=3, grow=2)])
    assert any(node.op_type == "GridSample" for node in proto.graph.node)


def test_gradients_of_an_exported_module():
    """An exported program is trained on."""

    class Warp(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = torch.nn.Parameter(torch.tensor([[[0.9, 0.1, 0.03], [0.0, 0.8, 0.1]]]))

        def forward(self, x):
            return stn.affine_grid_sample(x, self.theta)

    model, x = Warp(), torch.randn(1, 1, 4, 4)
    exported = torch.export.export(model, (x,)).module()
    model(x).square().sum().backward()
    exported(x).square().sum().backward()
    (gradient,) = (parameter.grad for parameter in exported.parameters())
    torch.testing.assert_close(gradient, model.theta.grad)
