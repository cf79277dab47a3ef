"""Who calls: tracers, tensor subclasses, tensors without values, NumPy's numbers: as of PyTorch's own."""

import contextlib
import fractions
import io
import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import import_torchvision, random_grid, random_theta
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import stn_triton as stn
from stn_triton import backend

TRANSFORMS = ["affine", "attention", "similarity", "projective", "tps"]
REGIONS = [(-1, -1, 0, 0), (0, -0.5, 1, 0.5)]


@pytest.fixture(params=["torch"])
def quick(request):
    """What is traced does not depend on the backend; the interpreter would only take longer."""
    with backend.use(request.param):
        yield


# ---------------------------------------------------------------------------------------- public functions
def image(batch=2, size=(5, 6), dtype=torch.float32):
    return torch.randn(batch, 3, *size, dtype=dtype)


def homography(batch):
    return torch.eye(3) + 0.1 * torch.randn(batch, 3, 3)


def points(batch):
    return stn.transforms.identity(batch, "tps") + 0.1 * torch.randn(batch, 16, 2)


CORNERS = torch.tensor([[-1.0, -1], [1, -1], [0.1, 0.2], [-1, 1], [1, 1]])


def controls(batch=None):
    return CORNERS + 0.1 * torch.randn(5, 2)


def corners(batch):
    return CORNERS + 0.1 * torch.randn(batch, 5, 2)


def grid(batch, size=(4, 7)):
    return random_grid(batch, size, torch.float32, "cpu")


def theta(batch, dims=2):
    return random_theta(batch, dims, torch.float32, "cpu")


def flow(batch):
    return torch.randn(batch, 2, 4, 7)


def volume(batch):
    return image(batch, (3, 4, 5))


def in_pixels_and_back(theta, size):
    return stn.transforms.from_pixels(stn.transforms.to_pixels(theta, size), size)


def about_the_middle(angle, size):
    centre = (size[1] - 1) / 2, (size[0] - 1) / 2
    return stn.transforms.from_pixels(stn.transforms.rotation(angle, centre, 1.5), size)


# name -> (function, the makers of its tensors for a batch)
FUNCTIONS = {
    "grid_sample": (lambda x, g: stn.grid_sample(x, g, align_corners=False), (image, grid)),
    "affine_grid": (lambda x, t: stn.affine_grid(t, x.shape, True), (image, theta)),
    "projective_grid": (lambda x, h: stn.projective_grid(h, x.shape), (image, homography)),
    "tps_grid": (lambda x, p: stn.tps_grid(p, x.shape), (image, points)),
    "affine_grid_sample": (lambda x, t: stn.affine_grid_sample(x, t), (image, theta)),
    "sized": (lambda x, t: stn.affine_grid_sample(x, t, (3, 4)), (image, theta)),
    "sized-by-shape": (
        lambda x, t: stn.affine_grid_sample(x, t, (x.shape[2] // 2, 2 * x.shape[3])),
        (image, theta),
    ),
    "transforms": (
        lambda x, t: stn.affine_grid_sample(x, t.unsqueeze(1).expand(-1, 2, -1, -1)),
        (image, theta),
    ),
    "volume": (lambda x, t: stn.affine_grid_sample(x, t), (volume, lambda n: theta(n, 3))),
    "tricubic": (lambda x, t: stn.affine_grid_sample(x, t, None, "bicubic"), (volume, lambda n: theta(n, 3))),
    "projective_grid_sample": (lambda x, h: stn.projective_grid_sample(x, h), (image, homography)),
    "tps_grid_sample": (lambda x, p: stn.tps_grid_sample(x, p), (image, points)),
    "regularized": (lambda x, p: stn.tps_grid_sample(x, p, regularization=0.3), (image, points)),
    "control_points": (
        lambda x, p, c: stn.tps_grid_sample(x, p, control_points=c),
        (image, corners, controls),
    ),
    "flow_grid_sample": (lambda x, f: stn.flow_grid_sample(x, f), (image, flow)),
    "attention": (lambda t: stn.transforms.attention(t[:, 0, 0], t[:, :, 2]), (theta,)),
    "similarity": (lambda t: stn.transforms.similarity(t[:, 0, 0], 0.3, t[:, :, 2]), (theta,)),
    "pixels": (
        lambda x, t: stn.affine_grid_sample(x, in_pixels_and_back(t, x.shape[2:])),
        (image, theta),
    ),
    "about-the-middle": (
        lambda x, t: stn.affine_grid_sample(x, about_the_middle(t[:, 0, 0], x.shape[2:])),
        (image, theta),
    ),
    "compose": (lambda t, u: stn.transforms.compose(t, stn.transforms.invert(u)), (theta, theta)),
    "coefficients": (
        lambda p: stn.transforms.tps_evaluate(stn.transforms.tps_coefficients(p), None, p),
        (points,),
    ),
}
SAMPLERS = [name for name in FUNCTIONS if "grid" in name]


def case(name, batch=2):
    function, makers = FUNCTIONS[name]
    return function, tuple(make(batch) for make in makers)


class Net(nn.Module):
    """A spatial transformer away from where it starts, inside another module."""

    def __init__(self, transform, **options):
        super().__init__()
        localise = nn.Sequential(nn.AvgPool2d(2), nn.Flatten())
        self.transformer = stn.nn.SpatialTransformer(localise, transform, features=18, **options)
        nn.init.normal_(self.transformer.regression.weight, std=0.1)

    def forward(self, x):
        return self.transformer(x)


NETS = [*TRANSFORMS, "several"]


def net(name):
    model = Net("affine", transforms=2, size=(3, 4)) if name == "several" else Net(name)
    return model.eval(), (image(),)


def any_case(name):
    """A function or a module, and what it is called with."""
    return net(name.partition("-")[2]) if name.startswith("net-") else case(name)


EVERYTHING = [*FUNCTIONS, *(f"net-{name}" for name in NETS)]


# ------------------------------------------------------------------------------------------ torch.compile
def whole(function, *arguments, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="eager", **options)(*arguments)


WARNING = {  # PyTorch's function or ours -> a call that warns
    "default": lambda m, x, g, t: m.grid_sample(x, g),
    "default of a grid": lambda m, x, g, t: m.affine_grid(t, (2, 1, 3, 6)),
    "unit size": lambda m, x, g, t: m.affine_grid(t, (2, 1, 1, 6), True),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name, dynamic", zip(WARNING, (True, False, True)))
def test_what_warns_compiles_whole(name, dynamic):
    """And warns while it compiles, as PyTorch's functions do."""
    arguments = image(), grid(2), theta(2)
    found = {}
    for module in (stn, F):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = whole(lambda *a, m=module: WARNING[name](m, *a), *arguments, dynamic=dynamic)
        found[module] = result, {str(warning.message) for warning in caught}
    torch.testing.assert_close(found[stn][0], found[F][0])
    assert found[stn][1] == found[F][1]
    assert len(found[F][1]) == 1


def test_what_pytorch_refuses_compiles_as_its_own():
    """What is left to PyTorch, which says what is wrong: in a compiled function too."""
    for module in (stn, F):
        with pytest.raises(RuntimeError, match="invalid for input of size"):  # of another batch
            whole(lambda t, m=module: m.affine_grid(t, (3, 1, 4, 4), False), theta(2))


COUNT, HALF = np.int64(4), np.float64(0.5)
NUMPY = {
    "affine_grid": (lambda t: stn.affine_grid(t, (np.int64(2), 1, np.int32(3), COUNT), False), theta),
    "sampled": (lambda t: stn.affine_grid_sample(t[:, None], t, (np.int64(3), COUNT)), theta),
    "identity": (lambda t: t.sum() + stn.transforms.identity(np.int64(3), transforms=COUNT), theta),
    "lattice": (lambda t: t.sum() + stn.transforms.control_lattice(COUNT), theta),
    "regularized": (lambda p: stn.transforms.tps_coefficients(p, regularization=HALF), points),
    "similarity": (lambda t: stn.transforms.similarity(np.float32(0.5), HALF, t[:, :, 2]), theta),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", list(NUMPY))
def test_numpy_compiles_whole(name):
    """NumPy's scalars, which are arrays to the compiler: written in the function, or from outside."""
    function, make = NUMPY[name]
    argument = make(2)
    torch.testing.assert_close(whole(function, argument, dynamic=True), function(argument))


# --------------------------------------------------------------------------------------- tensor subclasses
class Named(torch.Tensor):
    """A tensor with a name, which what is made of it keeps; and with methods of its own, as they are met."""

    name = None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        NOTED.append(function)
        result = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(result, cls):
            result.name = next(arg.name for arg in args if isinstance(arg, cls))
        return result

    def new_empty(self, *args, **kwargs):
        raise AssertionError("a kernel uses a subclass's method")

    new_zeros = new_empty


class Quiet(torch.Tensor):
    """One that wants to hear of nothing."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    new_empty = new_zeros = Named.new_empty


NOTED = []
SUBCLASSED = [
    *SAMPLERS,
    "control_points",
    *("attention", "similarity", "compose", "coefficients"),
]


def disguised(tensors, kind, which):
    """Some of the tensors, leaves, as a subclass."""
    leaves = [t.detach().as_subclass(kind) if i in which else t.detach() for i, t in enumerate(tensors)]
    for leaf in leaves:
        if isinstance(leaf, Named):
            leaf.name = "Jane"
    return [leaf.requires_grad_() for leaf in leaves]


def gradients(output, leaves):
    output.as_subclass(torch.Tensor).square().sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(
    "kind, which",
    [(Named, (0,)), (Named, (-1,)), (Quiet, (0, 1, 2))],
    ids=["minimal-image", "minimal-parameters", "disabled-all"],
)
@pytest.mark.parametrize("name", SUBCLASSED)
def test_subclasses(name, kind, which):
    """The results' types are what PyTorch makes of them; the values are those of plain tensors."""
    function, tensors = case(name)
    which = [index % len(tensors) for index in which]
    leaves, plain = disguised(tensors, kind, which), disguised(tensors, torch.Tensor, ())
    # affine_grid and its like take the image's shape alone
    used = [i for i in which if i or len(tensors) == 1 or not name.endswith("grid")]
    NOTED.clear()
    output = function(*leaves)
    subclass = kind is Named and bool(used)
    assert type(output) is (Named if subclass else torch.Tensor)
    if subclass:
        assert output.name == "Jane"
        public = {getattr(stn, name, None), *(getattr(stn.transforms, n) for n in stn.transforms.__all__)}
        assert name == "control_points" or public & set(NOTED)
    expected = function(*plain)
    torch.testing.assert_close(output.as_subclass(torch.Tensor), expected)
    for one, other in zip(gradients(output, leaves), gradients(expected, plain)):
        assert type(one) is type(other)  # autograd's own gradients are plain
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("patched", [False, True], ids=["function", "patch"])
@pytest.mark.parametrize("kind", [Named, Quiet], ids=["minimal", "disabled"])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["image", "grid", "both"])
def test_subclasses_as_by_pytorch(kind, which, patched):
    """The function, and the patch: types, values and gradients of PyTorch's own."""
    tensors = image(), grid(2)
    options = {"padding_mode": "border", "align_corners": True}
    theirs = disguised(tensors, kind, which)
    wanted = F.grid_sample(*theirs, **options)
    ours = disguised(tensors, kind, which)
    if patched:
        with stn.patch_torch():
            found = F.grid_sample(*ours, **options)
            mine = gradients(found, ours)
    else:
        found = stn.grid_sample(*ours, **options)
        mine = gradients(found, ours)
    assert type(found) is type(wanted)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), wanted.as_subclass(torch.Tensor))
    for one, other in zip(mine, gradients(wanted, theirs)):
        assert type(one) is type(other)
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("inference", [False, True], ids=["grad", "inference"])
def test_operators_of_subclasses(inference):
    """An exported program calls the operators themselves."""
    function, (x, t) = case("affine_grid_sample")

    class Sampler(nn.Module):
        def forward(self, x, t):
            return function(x, t)

    program = torch.export.export(Sampler(), (x, t)).module()
    with torch.inference_mode(inference):
        output = program(x.as_subclass(Quiet), t.as_subclass(Quiet))
    torch.testing.assert_close(output, function(x, t))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "name",
    [
        *("grid_sample", "affine_grid_sample", "tps_grid_sample"),
        pytest.param(
            "similarity",
            marks=pytest.mark.xfail(
                torch.__version__.startswith("2.11"),
                reason="its Dynamo cannot ask the class of what the function made itself",
            ),
        ),
    ],
)
def test_subclasses_compile_whole(name):
    class Silent(torch.Tensor):
        pass

    function, tensors = case(name)
    torch._dynamo.reset()
    disguise = [tensor.as_subclass(Silent) for tensor in tensors]
    output = torch.compile(function, fullgraph=True, backend="eager")(*disguise)
    assert type(output) is Silent
    torch.testing.assert_close(output.as_subclass(torch.Tensor), function(*tensors))


def test_subclass_gradient():
    """A gradient that somebody passes to ``backward``."""
    function, tensors = case("affine_grid_sample")
    leaves, plain = disguised(tensors, torch.Tensor, ()), disguised(tensors, torch.Tensor, ())
    weight = torch.randn_like(function(*tensors))
    function(*leaves).backward(weight.as_subclass(Quiet))
    function(*plain).backward(weight)
    for one, other in zip(leaves, plain):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", SAMPLERS)
def test_function_modes_see_one_call(name):
    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    function, tensors = case(name)
    seen = []
    with Watch():
        output = function(*tensors)
    assert [f for f in seen if getattr(f, "__module__", "").startswith("stn_triton")] == [getattr(stn, name)]
    assert not [f for f in seen if getattr(f, "__module__", "").startswith("torch._ops")]
    torch.testing.assert_close(output, function(*tensors))


OF_NUMBERS = {
    "similarity": lambda: stn.transforms.similarity(0.5, 0.3, (0.1, 0)),
    "attention": lambda: stn.transforms.attention(0.5, (0, 0.2, 0.1)),
    "rotation": lambda: stn.transforms.rotation(0.3, (2.0, 3.0), 2),
    "identity": lambda: stn.transforms.identity(2, "tps"),
    "lattice": lambda: stn.transforms.control_lattice(3),
}


class Sees(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", list(OF_NUMBERS))
def test_functions_of_numbers(name):
    """Under a mode, a default device for one, and by those who record them."""
    function = OF_NUMBERS[name]
    expected, zero = function(), torch.zeros(())
    with Sees():
        assert torch.equal(function(), expected)
    with torch.device("meta"):
        assert function().device.type == "meta"

    class Plus(nn.Module):
        def forward(self, x):
            return function() + x

    for strict in (False, True):
        torch.testing.assert_close(
            torch.export.export(Plus(), (zero,), strict=strict).module()(zero), expected
        )
    torch.testing.assert_close(make_fx(Plus())(zero)(zero), expected)
    torch.testing.assert_close(torch.jit.trace(Plus(), (zero,))(zero), expected)
    for device in (None, "cpu"):
        with torch.device(device) if device else contextlib.nullcontext():
            torch.testing.assert_close(
                torch.compile(function, fullgraph=True, backend="aot_eager")(), expected
            )


def test_bad_arguments_under_a_mode():
    with Sees(), pytest.raises(TypeError, match="input must be a tensor"):
        stn.affine_grid_sample([1.0], [2.0])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_modules_compile_whole_under_a_default_device(transform):
    model, (x,) = net(transform)
    expected = model(x)
    with torch.device("cpu"):
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


def test_tv_tensors():
    """torchvision's unwrap themselves in all but a few functions: in these too."""
    tv_tensors = import_torchvision("tv_tensors").tv_tensors
    x, t = image(), theta(2)
    wrapped = tv_tensors.Image(x)
    g = F.affine_grid(t, x.shape, align_corners=False)
    output = stn.affine_grid_sample(wrapped, t)
    assert type(output) is type(F.grid_sample(wrapped, g, align_corners=False)) is torch.Tensor
    torch.testing.assert_close(output, stn.affine_grid_sample(x, t))
    with stn.patch_torch():
        assert type(F.grid_sample(wrapped, g, align_corners=False)) is torch.Tensor


MONAI = {
    "Rotate": lambda m: m.Rotate(0.4, padding_mode="zeros"),
    "Rotate-volume": lambda m: m.Rotate((0.1, 0.2, 0.3), padding_mode="border"),
    "RandRotate": lambda m: m.RandRotate(0.6, prob=1.0).set_random_state(1),
    "Affine": lambda m: m.Affine(rotate_params=0.3, translate_params=(1, 2), image_only=True),
    "Zoom": lambda m: m.Zoom(1.3, keep_size=False),
}


@pytest.mark.parametrize("name", list(MONAI))
def test_monai(name):
    """Its transforms of its MetaTensor, with its affine matrix, are the same under the patch."""
    transforms = pytest.importorskip("monai.transforms")
    data = pytest.importorskip("monai.data")
    x = image(1, (4, 5, 6) if "volume" in name else (5, 6))[0]
    outputs = []
    for patched in (False, True):
        transform = MONAI[name](transforms)
        with stn.patch_torch() if patched else warnings.catch_warnings():
            outputs.append(transform(data.MetaTensor(x)))
    expected, found = outputs
    assert type(found) is data.MetaTensor
    torch.testing.assert_close(found.as_tensor(), expected.as_tensor(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.affine, expected.affine)


# --------------------------------------------------------------------------------------- torch.jit.trace
def traced(function, arguments, **options):
    """A trace, whose making warns of nothing but of its age."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*deprecated")  # a FutureWarning since PyTorch 2.14
        return torch.jit.trace(function, arguments, **options)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", EVERYTHING)
def test_jit_trace(name):
    """A trace that needs nothing of this package, for every batch; PyTorch traces it twice to compare."""
    function, arguments = any_case(name)
    trace = traced(function, arguments)
    code = io.BytesIO()
    torch.jit.save(trace, code)
    code.seek(0)
    loaded = torch.jit.load(code)
    assert "stn_triton::" not in str(loaded.inlined_graph)
    torch.testing.assert_close(loaded(*arguments), function(*arguments))
    more = (image(5),) if name.startswith("net-") else case(name, 5)[1]
    torch.testing.assert_close(loaded(*more), function(*more))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", [*SAMPLERS, "sized-by-shape", "regularized", "pixels", "about-the-middle"])
def test_jit_trace_of_any_size(name):
    """Sizes that come from shapes stay what they are of."""
    function, arguments = case(name)
    trace = traced(function, arguments)
    for size in ((5, 6), (9, 4)):
        inputs = image(2, size), *arguments[1:]
        torch.testing.assert_close(trace(*inputs), function(*inputs))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "centres"])
@pytest.mark.parametrize(
    "padding",
    ["zeros", "reflection", ("reflection", "border"), ("circular", "reflection")],
    ids=str,
)
def test_jit_trace_keeps_no_size(padding, align_corners):
    """Each mode, sampler and way of taps, traced at one size or at a pixel, run at others."""
    for dims, mode in itertools.product((2, 3), ("bilinear", "nearest", "bicubic")):
        paddings = padding if isinstance(padding, str) else (*padding, "border")[:dims]
        options = {"mode": mode, "padding_mode": paddings, "align_corners": align_corners}
        matrix = torch.eye(dims, dims + 1)[None] * 2.3 + 0.01

        def warp(x, theta, options=options):
            return stn.affine_grid_sample(x, theta, **options)

        sizes = [size[:dims] for size in ((6, 4, 5), (3, 9, 7), (1, 8, 1))]
        for first, *others in (sizes, sizes[::-1]):
            trace = traced(warp, (torch.rand(1, 1, *first), matrix), check_trace=False)
            for size in others:
                inputs = torch.rand(1, 1, *size), matrix
                assert torch.allclose(trace(*inputs), warp(*inputs), atol=1e-5), (options, size)


@pytest.mark.usefixtures("quick")
def test_jit_trace_differentiates():
    function, tensors = case("affine_grid_sample")
    trace = traced(function, tensors)
    leaves, others = disguised(tensors, torch.Tensor, ()), disguised(tensors, torch.Tensor, ())
    for one, other in zip(gradients(trace(*leaves), leaves), gradients(function(*others), others)):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("quick")
def test_jit_trace_checks_arguments():
    """Errors and warnings are those of a call that nobody traces."""
    x, t = image(), theta(3)
    with pytest.raises(ValueError, match=r"theta must be \(2, 2, 3\) .* got shape \(3, 2, 3\)"):
        torch.jit.trace(lambda x, t: stn.affine_grid_sample(x, t), (x, t))
    with pytest.raises(ValueError, match=r"localisation must be a module that returns \(2, ...\)"):
        torch.jit.trace(stn.nn.SpatialTransformer(nn.Flatten(0), features=180), x)
    with pytest.warns(UserWarning, match="align_corners=False since 1.3.0") as caught:
        torch.jit.trace(lambda x, g: stn.grid_sample(x, g), (x, grid(2)), check_trace=False)
    (warning,) = (w for w in caught if "align_corners" in str(w.message))
    assert warning.filename == __file__
    assert torch._C._get_tracing_state() is None


@pytest.mark.usefixtures("quick")
def test_jit_trace_reads_no_control_points():
    """Control points that are an input of the trace are one afterwards."""
    function, (x, p, c) = case("control_points")
    trace = traced(function, (x, p, c))
    other = controls()
    assert not torch.allclose(function(x, p, c), function(x, p, other), atol=1e-3)
    torch.testing.assert_close(trace(x, p, other), function(x, p, other))


# -------------------------------------------------------------------------------------------------- ONNX
class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function(*arguments)


def assert_same_in_onnx(exported, model, arguments):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    given = arguments[len(arguments) - len(names) :]  # an image of which the shape is used is none
    (found,) = session.run(None, {name: value.numpy() for name, value in zip(names, given)})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(*arguments), atol=1e-4, rtol=1e-4)


QUIET = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


@QUIET
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", [name for name in EVERYTHING if name != "tricubic"])  # slow: 64 taps
def test_onnx_by_trace(name):
    """For every batch."""
    pytest.importorskip("onnx")
    model, arguments = any_case(name)
    model = model if isinstance(model, nn.Module) else Calls(model)
    file = io.BytesIO()
    names = [f"argument_{index}" for index in range(len(arguments))]
    batch = {name: {0: "batch"} for name in names[:2]}  # control points have none
    torch.onnx.export(
        model, arguments, file, dynamo=False, opset_version=20, input_names=names, dynamic_axes=batch
    )
    more = (image(5),) if name.startswith("net-") else case(name, 5)[1]
    assert_same_in_onnx(file.getvalue(), model, more)


ONNX = ["net-affine", "control_points", "flow_grid_sample", "volume"]


@QUIET
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ONNX)
def test_onnx_without_decompositions(name):
    """``torch.onnx.export(model, ..., dynamo=True)``, and nothing else."""
    pytest.importorskip("onnxscript")
    model, arguments = any_case(name)
    model = model if isinstance(model, nn.Module) else Calls(model)
    made = torch.onnx.export(model, arguments, dynamo=True, verbose=False)
    assert_same_in_onnx(made.model_proto.SerializeToString(), model, arguments)


@QUIET
@pytest.mark.usefixtures("quick")
def test_onnx_of_volumes_of_any_size():
    """These need a translation, which this package has."""
    pytest.importorskip("onnxscript")
    function, (x, t) = case("volume")
    any_size = dict.fromkeys((0, 2, 3, 4), torch.export.Dim.DYNAMIC), {0: torch.export.Dim.DYNAMIC}
    made = torch.onnx.export(
        Calls(function), (x, t), dynamo=True, verbose=False, dynamic_shapes=(any_size,),
        custom_translation_table=stn.export.onnx_translations(),
    )  # fmt: skip
    assert_same_in_onnx(made.model_proto.SerializeToString(), function, (image(3, (5, 4, 6)), theta(3, 3)))


# -------------------------------------------------------------------------------------------------- fx
def calls_of(graph):
    return [node.target for node in graph.nodes if node.op.startswith("call")]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", [*SAMPLERS, "control_points"])
def test_fx(name):
    """One call of the function of the name; the graph can be kept, and its code read back."""
    function, arguments = case(name)
    module = fx.symbolic_trace(function)
    public = stn.tps_grid_sample if name == "control_points" else getattr(stn, name)
    assert [call for call in calls_of(module.graph) if call is not getattr] == [public]
    torch.testing.assert_close(module(*arguments), function(*arguments))
    kept = pickle.loads(pickle.dumps(module))
    torch.testing.assert_close(kept(*arguments), function(*arguments))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", NETS)
def test_fx_module(name):
    """One call of the module where it is part of another; alone, one for each of its own parts."""
    model, arguments = net(name)
    module = fx.symbolic_trace(model)
    assert calls_of(module.graph) == ["transformer"]
    torch.testing.assert_close(module(*arguments), model(*arguments))
    alone = fx.symbolic_trace(model.transformer)
    calls = calls_of(alone.graph)
    assert "regression" in calls
    assert calls[-1] in (stn.affine_grid_sample, stn.projective_grid_sample, stn.tps_grid_sample)
    torch.testing.assert_close(alone(*arguments), model(*arguments))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", ["grid_sample", "affine_grid_sample", "tps_grid_sample", "flow_grid_sample"])
def test_make_fx(name, mode):
    function, arguments = case(name)
    module = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(*arguments)
    assert torch.ops.stn_triton.sample.default in calls_of(module.graph)
    torch.testing.assert_close(module(*arguments), function(*arguments))


# ---------------------------------------------------------------------------------- tensors without values
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_without_values(name, kind):
    """Shape, dtype and strides are those of real tensors."""
    function, arguments = case(name)
    expected = function(*arguments)
    if kind == "meta":
        found = function(*(argument.to("meta") for argument in arguments))
    else:
        with FakeTensorMode() as mode:
            found = function(*map(mode.from_tensor, arguments))
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert found.device.type == ("meta" if kind == "meta" else "cpu")


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("regions", ["none", "numbers", "tensor", "made there"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_modules_without_values(transform, regions, kind):
    """A spatial transformer is made and called where tensors have no values."""
    boxes = torch.tensor(REGIONS)
    with torch.device("meta") if kind == "meta" else FakeTensorMode():
        given = {"none": None, "numbers": REGIONS, "tensor": boxes}.get(regions, torch.zeros(2, 4))
        localise = nn.Sequential(nn.Flatten(), nn.Linear(90, 8))
        module = stn.nn.SpatialTransformer(
            localise, transform, (3, 4), transforms=2, regions=given, features=8
        )
        assert module(torch.zeros(2, 3, 5, 6)).shape == (2, 2, 3, 3, 4)
    with pytest.raises(ValueError, match=r"regions must be .* x0 < x1"), torch.device("meta"):
        stn.nn.SpatialTransformer(localise, transform, regions=(0, 0, -1, 1))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_from_meta(transform):
    """``to_empty`` and ``reset_parameters``, PyTorch's way from the meta device, lead to the start."""
    with torch.device("meta"):
        module = Net(transform, transforms=2, regions=REGIONS).transformer
    module.to_empty(device="cpu")
    for tensor in (module.initial, *module.regression.parameters()):
        tensor.detach().fill_(7)
    module.reset_parameters()
    fresh = stn.nn.SpatialTransformer(nn.Flatten(), transform, transforms=2, regions=REGIONS, features=18)
    assert torch.equal(module.initial, fresh.initial)
    for one, other in zip(module.regression.parameters(), fresh.regression.parameters()):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------ numbers
class Index:
    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


INTEGERS = [np.int64, np.uint8, np.int16, Index, lambda n: torch.tensor(n), lambda n: np.array(n)]
REALS = [np.float64, np.float32, np.float16, fractions.Fraction, lambda v: np.int8(v * 2) / np.int8(2)]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("of", INTEGERS, ids=["int64", "uint8", "int16", "__index__", "tensor", "array"])
def test_integers(of):
    """Wherever a size or a count is meant; what is remembered of it is an int."""
    x, t, h, p = image(), theta(2), homography(2), points(2)
    size, shape = (of(3), of(4)), (of(2), of(1), of(3), of(4))
    for found, expected in (
        (stn.affine_grid(t, shape, False), stn.affine_grid(t, (2, 1, 3, 4), False)),
        (stn.projective_grid(h, shape), stn.projective_grid(h, (2, 1, 3, 4))),
        (stn.tps_grid(p, list(shape)), stn.tps_grid(p, (2, 1, 3, 4))),
        (stn.affine_grid_sample(x, t, size), stn.affine_grid_sample(x, t, (3, 4))),
        (stn.projective_grid_sample(x, h, size), stn.projective_grid_sample(x, h, (3, 4))),
        (stn.tps_grid_sample(x, p, size), stn.tps_grid_sample(x, p, (3, 4))),
        (stn.transforms.identity(of(2), "tps", k=of(3)), stn.transforms.identity(2, "tps", k=3)),
        (
            stn.transforms.identity(of(2), dims=of(3), transforms=of(2)),
            stn.transforms.identity(2, dims=3, transforms=2),
        ),
        (stn.transforms.control_lattice(of(3)), stn.transforms.control_lattice(3)),
    ):
        assert torch.equal(found, expected)
    module = stn.nn.SpatialTransformer(
        nn.Flatten(), "tps", size, transforms=of(2), lattice=of(3), features=of(90)
    )
    plain = stn.nn.SpatialTransformer(nn.Flatten(), "tps", (3, 4), transforms=2, lattice=3, features=90)
    assert repr(module) == repr(plain)
    assert torch.equal(module(x), plain(x))
    assert stn.nn.SpatialTransformer(nn.Flatten(), dims=of(3)).dims == 3
    net = stn.nn.localisation_cnn((of(2),), (of(3),), kernel_size=of(3), padding=of(1), downsample=of(1))
    assert net(x).shape == (2, 3)
    assert stn.nn.localisation_fcn((of(4),), input_shape=(of(3), of(5), of(6)))(x).shape == (2, 4)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("of", REALS, ids=["float64", "float32", "float16", "Fraction", "division"])
def test_reals(of):
    """Wherever a number is meant."""
    x, p, t = image(), points(2), theta(2)
    half, move = of(0.5), t[:, :, 2]
    for found, expected in (
        (stn.tps_grid(p, (2, 1, 3, 4), None, half), stn.tps_grid(p, (2, 1, 3, 4), None, 0.5)),
        (stn.tps_grid_sample(x, p, regularization=half), stn.tps_grid_sample(x, p, regularization=0.5)),
        (stn.transforms.tps_coefficients(p, None, half), stn.transforms.tps_coefficients(p, None, 0.5)),
        (stn.transforms.attention(half, move), stn.transforms.attention(0.5, move)),
        (stn.transforms.similarity(half, half, move), stn.transforms.similarity(0.5, 0.5, move)),
    ):
        assert torch.equal(found, expected)
    module = stn.nn.SpatialTransformer(nn.Flatten(), "attention", scale=half)
    assert module.scale == 0.5
    assert torch.equal(module.initial, torch.zeros(1, 2))
    module = stn.nn.SpatialTransformer(nn.Flatten(), "tps", regularization=half)
    assert module.regularization == 0.5
    regions = [(of(-1.0), of(-1.0), half, half)]
    module = stn.nn.SpatialTransformer(nn.Flatten(), regions=regions)
    plain = stn.nn.SpatialTransformer(nn.Flatten(), regions=[(-1.0, -1.0, 0.5, 0.5)])
    assert torch.equal(module.initial, plain.initial)
    assert torch.equal(
        stn.nn.SpatialTransformer(nn.Flatten(), regions=np.array(regions, dtype=float)).initial, plain.initial
    )


@pytest.mark.parametrize("value", [True, 3.0, np.float64(3), np.True_, "3", None, 3j, [3]], ids=repr)
def test_no_integers(value):
    x, t = image(), theta(2)
    with pytest.raises(TypeError, match=r"size must be .* a tuple of ints"):
        stn.affine_grid_sample(x, t, (value, 4))
    with pytest.raises(TypeError, match="k must be an int"):
        stn.transforms.control_lattice(value)
    with pytest.raises(TypeError, match="features must be an int"):
        stn.nn.localisation_fcn((value,))


@pytest.mark.parametrize("value", [True, "0.5", None, 1j, [0.5], np.True_], ids=repr)
def test_no_numbers(value):
    with pytest.raises(TypeError, match="regularization must be a number"):
        stn.transforms.tps_coefficients(points(2), regularization=value)
    with pytest.raises(TypeError, match="scale must be a tensor or a number"):
        stn.transforms.attention(value, theta(2)[:, :, 2])


# -------------------------------------------------------------------------------------------- the start
@pytest.mark.parametrize("lazy", [False, True], ids=["features", "lazy"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_start_survives_initialisation(transform, lazy):
    """What initialises every linear layer of a model, by its type or by its name, leaves the start alone."""

    def initialise(module):
        if isinstance(module, nn.Linear) or "Linear" in type(module).__name__:
            nn.init.xavier_normal_(module.weight)
            nn.init.normal_(module.bias)

    localise = nn.Sequential(nn.Flatten(), nn.Linear(90, 8))
    module = stn.nn.SpatialTransformer(localise, transform, features=None if lazy else 8)
    x = image()
    before = localise[1].weight.clone()
    module.apply(initialise)
    assert not torch.equal(localise[1].weight, before)
    torch.testing.assert_close(module(x), x)
    module.apply(initialise)  # a lazy layer is another by now
    torch.testing.assert_close(module(x), x)
