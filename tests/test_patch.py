"""``stn.patch_torch()``: PyTorch's own ``grid_sample`` on our kernels, in code that knows nothing of them."""

import contextlib
import functools
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from common import PADDINGS, assert_close, away_from_kinks, import_torchvision, random_grid
from test_backend import python

import stn_triton as stn
from bench.specialisations import field_of
from stn_triton import backend
from stn_triton.versions import TRICUBIC

try:
    from torch.testing._internal import common_methods_invocations as database
except ImportError:  # it needs expecttest
    database = None

FORWARD, BACKWARD = "sample_forward_kernel", "sample_backward_kernel"
SIZES = {2: ((4, 5), (3, 6)), 3: ((3, 4, 2), (2, 3, 3))}
NAMES = ["grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler"]
ATEN = torch.ops.aten


@pytest.fixture(autouse=True)
def _not_left_in_force():
    yield
    assert not in_force(), "the test leaves the patch in force"


def wanted(spec):
    """Which gradients a backward kernel was asked for: the image's and the coordinates'."""
    return field_of(spec, "input_grad"), field_of(spec, "source_grad")


def names(launches):
    return [name for name, _ in launches]


def tables():
    """Which code PyTorch would run, for every operator and device."""
    operators = [f"aten::{name}{suffix}" for name in NAMES for suffix in ("", "_backward")]
    return {operator: torch._C._dispatch_dump_table(operator) for operator in operators}


def in_force():
    return any("patch.py" in table for table in tables().values())


def arguments(dims, device, dtype=torch.float32, batch=2, channels=3):
    """An image and a grid, leaves; the grid keeps clear of kinks, so that both sides agree on slopes."""
    in_size, size = SIZES[dims]
    image = torch.randn(batch, channels, *in_size, dtype=torch.float64)
    grid = random_grid(batch, size, torch.float64, "cpu", reach=1.3)
    for mode in ("bilinear", "nearest"):
        for align_corners in (False, True):
            while not (clear := is_clear(grid, in_size, mode, align_corners)).all():
                grid = torch.where(clear.unsqueeze(-1), grid, torch.rand_like(grid))
    return [t.to(device, dtype).requires_grad_() for t in (image, grid)]


def is_clear(grid, in_size, mode, align_corners):
    with contextlib.suppress(AssertionError):
        return away_from_kinks(grid, in_size, mode, align_corners, band=1e-2)
    return torch.zeros(grid.shape[:-1], dtype=torch.bool)


def derivatives(function, leaves, *args):
    """The output, and the gradients of what needs one."""
    output = function(*leaves, *args)
    weight = torch.linspace(0.5, 1, output.numel(), device=output.device).view(output.shape)
    needed = [leaf for leaf in leaves if leaf.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, needed, weight.to(output.dtype))]


# --------------------------------------------------------------------------------- values and gradients
@pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "centres"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    "dims, mode",
    [(2, "bilinear"), (2, "nearest"), (2, "bicubic"), (3, "bilinear"), *[(3, "bicubic")] * TRICUBIC],
)
def test_values_and_gradients(device, launched, dims, mode, padding, align_corners):
    """Those of PyTorch in float64; one launch each way."""
    leaves = arguments(dims, device)
    options = mode, padding, align_corners
    with stn.patch_torch():
        actual = derivatives(F.grid_sample, leaves, *options)
    assert names(launched) == [FORWARD, BACKWARD]
    assert field_of(launched[1][1]["SPEC"], "source_grad") == (mode != "nearest")  # steps have no slope
    wide = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    for a, b in zip(actual, derivatives(F.grid_sample, wide, *options)):
        assert a.is_contiguous()
        assert_close(a, b)
    assert len(launched) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=lambda t: str(t)[6:])
def test_dtypes(device, launched, dtype):
    """Half images are sampled and summed in float32."""
    leaves = arguments(2, device, dtype)
    with stn.patch_torch():
        actual = derivatives(F.grid_sample, leaves, "bilinear", "zeros", False)
    assert names(launched) == [FORWARD, BACKWARD]
    assert field_of(launched[0][1]["SPEC"], "compute").name == ("fp64" if dtype == torch.float64 else "fp32")
    wide = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    for a, b in zip(actual, derivatives(F.grid_sample, wide, "bilinear", "zeros", False)):
        assert_close(a, b, dtype, scale=4)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded", "permuted"])
def test_strides(device, launched, layout):
    """Images and gradients of any strides; results as ATen lays them out."""
    image, grid = (leaf.detach() for leaf in arguments(2, device, torch.float64))
    image = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "sliced": lambda x: torch.cat([x, x], 1)[:, ::2],
        "expanded": lambda x: x[:, :1].expand_as(x),
        "permuted": lambda x: x.mT.contiguous().mT,
    }[layout](image)
    grid = grid.movedim(-1, 0).contiguous().movedim(0, -1)
    leaves = [image.requires_grad_(), grid.requires_grad_()]

    def gradients():
        output = F.grid_sample(*leaves, align_corners=False)
        return [output.detach(), *torch.autograd.grad(output.sum(), leaves)]  # its strides are 0

    with stn.patch_torch():
        actual = gradients()
    assert names(launched) == [FORWARD, BACKWARD]
    for a, b in zip(actual, gradients()):
        assert a.stride() == b.stride()
        assert_close(a, b.double())


@pytest.mark.parametrize("shape", ["batch", "channels", "output"])
def test_empty(device, shape):
    """Nothing to sample: nothing, and zeros for gradients."""
    image = torch.ones(0 if shape == "batch" else 2, 0 if shape == "channels" else 3, 4, 5, device=device)
    grid = torch.zeros(len(image), 0 if shape == "output" else 3, 6, 2, device=device)
    leaves = [image.requires_grad_(), grid.requires_grad_()]
    expected = derivatives(F.grid_sample, leaves, "bilinear", "zeros", False)
    with stn.patch_torch():
        actual = derivatives(F.grid_sample, leaves, "bilinear", "zeros", False)
    for a, b in zip(actual, expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mask", [(True, False), (False, True), (True, True), (False, False)], ids=str)
@pytest.mark.parametrize("dims", [2, 3])
def test_only_what_is_asked_for(device, launched, dims, mask):
    """The mask reaches the kernel; what comes back is what the compiler was told, strides included."""
    image, grid = (leaf.detach() for leaf in arguments(dims, device))
    grad_output = torch.randn(2, 3, *SIZES[dims][1], device=device)
    operator = getattr(ATEN, f"grid_sampler_{dims}d_backward")
    call = grad_output, image, grid, 0, 0, False, list(mask)
    with stn.patch_torch():
        actual = operator(*call)
    assert [wanted(kw["SPEC"]) for _, kw in launched] == ([mask] if any(mask) else [])
    promised = operator(*(arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in call))
    for a, b in zip(actual, promised):
        assert (a is None) == (b is None)
        assert a is None or (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    for a, b, asked in zip(actual, operator(*call), mask):
        if asked:
            assert_close(a, b.double())


def test_needs_of_autograd(device, launched):
    """A leaf that needs no gradient gets none computed."""
    image, grid = arguments(2, device)
    with stn.patch_torch():
        derivatives(F.grid_sample, [image.detach(), grid], "bilinear", "zeros", False)
        derivatives(F.grid_sample, [image, grid.detach()], "bilinear", "zeros", False)
    backward = [wanted(kw["SPEC"]) for name, kw in launched if name == BACKWARD]
    assert backward == [(False, True), (True, False)]


# --------------------------------------------------------------------------- what the kernels do not take
@pytest.mark.parametrize(
    "case",
    ["integers", "two dtypes", *["tricubic"] * (not TRICUBIC), "sizes", "no pixels", "shape of the gradient"],
)
def test_others_go_where_they_went(device, launched, case):
    """PyTorch's kernels and errors for what ours do not take."""
    image, grid = (leaf.detach() for leaf in arguments(3 if case == "tricubic" else 2, device))
    function, call = ATEN.grid_sampler, (image, grid, 0, 0, False)
    if case == "integers":
        call = (image.long(), grid.long(), *call[2:])
    elif case == "two dtypes":
        call = (image, grid.double(), *call[2:])
    elif case == "tricubic":
        call = (image, grid, 2, 0, False)
    elif case == "sizes":
        call = (image, grid[:1], *call[2:])
    elif case == "no pixels":
        call = (image[:, :, :0], *call[1:])
    else:
        function = ATEN.grid_sampler_2d_backward
        call = (torch.randn(2, 3, 3, 6, device=device, dtype=torch.float64), *call, [True, True])

    def outcome():
        try:
            return function(*call)
        except Exception as error:
            return type(error), str(error).splitlines()[0]

    expected = outcome()
    assert isinstance(expected[0], type), "PyTorch takes it by now: find another case"
    with stn.patch_torch():
        assert outcome() == expected
    assert not launched


def test_without_kernels_it_is_pytorch(device, launched):
    """Inside ``backend.use("torch")`` PyTorch's kernels run, also those that our functions call then."""
    leaves = arguments(2, device)
    options = "bilinear", "border", False
    expected = derivatives(F.grid_sample, leaves, *options)
    with stn.patch_torch(), backend.use("torch"):
        theirs = derivatives(F.grid_sample, leaves, *options)
        ours = derivatives(stn.grid_sample, leaves, *options)
    assert not launched
    for a, b, c in zip(expected, theirs, ours):
        assert torch.equal(a, b)
        assert_close(c, b.double())


def test_our_functions_under_the_patch(device, launched):
    """They call none of the operators that were replaced."""
    leaves = arguments(2, device)
    expected = derivatives(stn.grid_sample, leaves, "bilinear", "zeros", False)
    with stn.patch_torch():
        actual = derivatives(stn.grid_sample, leaves, "bilinear", "zeros", False)
    assert len(launched) == 4
    for a, b in zip(actual, expected):
        assert_close(a, b.double())


# ------------------------------------------------------------------------------------------- cuDNN
@pytest.fixture
def cudnn(device):
    """cuDNN's operators: on the CPU, which has none, stand-ins. Holds the names of those that ran."""
    ran = []
    if device.type == "cuda":
        if not torch.backends.cudnn.is_available():
            pytest.skip("this PyTorch has no cuDNN")
        yield ran
        return
    if device.type != "cpu":
        pytest.skip("cuDNN is CUDA's")
    modes = 0, 0, True

    def forward(image, grid):
        ran.append("cudnn_grid_sampler")
        return ATEN.grid_sampler_2d(image, grid, *modes)

    def backward(image, grid, grad_output):
        ran.append("cudnn_grid_sampler_backward")
        return ATEN.grid_sampler_2d_backward(grad_output, image, grid, *modes, [True, True])

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("cudnn_grid_sampler", forward, "CPU")
        library.impl("cudnn_grid_sampler_backward", backward, "CPU")
        yield ran


def test_cudnn(device, launched, cudnn):
    """The operators that ``grid_sample`` prefers where cuDNN can serve: ours, with the gradients needed."""
    image, grid = arguments(2, device)
    expected = derivatives(torch.cudnn_grid_sampler, [image, grid])
    del cudnn[:]
    with stn.patch_torch():
        actual = derivatives(torch.cudnn_grid_sampler, [image, grid])
        derivatives(torch.cudnn_grid_sampler, [image.detach(), grid])
    assert names(launched) == [FORWARD, BACKWARD] * 2
    assert not field_of(launched[3][1]["SPEC"], "input_grad")
    for a, b in zip(actual, expected):
        assert_close(a, b.double())
    with stn.patch_torch(), torch.inference_mode():  # past autograd
        assert_close(torch.cudnn_grid_sampler(image, grid), expected[0].double())
    assert names(launched[4:]) == [FORWARD]
    assert not cudnn


def test_graph_made_with_cudnn_before(device, launched, cudnn):
    """The backward pass of such a graph is ours as well, if the patch is in force by then."""
    leaves = arguments(2, device)
    output = torch.cudnn_grid_sampler(*leaves)
    expected = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    del cudnn[:]
    with stn.patch_torch():
        actual = torch.autograd.grad(output.sum(), leaves)
    assert names(launched) == [BACKWARD]
    assert not cudnn
    for a, b in zip(actual, expected):
        assert_close(a, b.double())


def test_cudnn_for_what_is_not_taken(device, launched, cudnn):
    leaves = arguments(2, device)
    with stn.patch_torch(), backend.use("torch"):
        derivatives(torch.cudnn_grid_sampler, leaves)
        with torch.inference_mode():
            torch.cudnn_grid_sampler(*leaves)
    assert not launched
    if device.type == "cpu":
        assert cudnn == ["cudnn_grid_sampler", "cudnn_grid_sampler_backward", "cudnn_grid_sampler"]


@pytest.mark.gpu
def test_grid_sample_takes_cudnns_way(device, launched):
    """Aligned corners, bilinear, zeros: what PyTorch gives to cuDNN."""
    if device.type != "cuda" or not torch.backends.cudnn.is_available():
        pytest.skip("needs cuDNN")
    leaves = arguments(2, device)
    assert "Cudnn" in F.grid_sample(*leaves, align_corners=True).grad_fn.name()
    with stn.patch_torch():
        derivatives(F.grid_sample, leaves, "bilinear", "zeros", True)
    assert names(launched) == [FORWARD, BACKWARD]


# ---------------------------------------------------------------------------------- on and off
def sampled_by_us(device, launched):
    del launched[:]
    image, grid = (leaf.detach() for leaf in arguments(2, device, batch=1, channels=1))
    F.grid_sample(image, grid, align_corners=False)
    return names(launched) == [FORWARD]


def test_blocks(device, launched):
    """Nested, and after an exception."""
    before = tables()
    assert not sampled_by_us(device, launched)
    with stn.patch_torch() as patch:
        inside = tables()
        assert sampled_by_us(device, launched)
        with stn.patch_torch(), patch:
            assert tables() == inside
        assert sampled_by_us(device, launched)

        def fail():
            with stn.patch_torch():
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert sampled_by_us(device, launched)
    assert tables() == before
    assert not sampled_by_us(device, launched)
    with pytest.raises(KeyError):
        fail()
    assert tables() == before


def test_on_and_off(device, launched):
    """``enable`` and ``disable`` hold for the process, and twice is once."""
    before = tables()
    stn.patch_torch().enable()
    try:
        stn.patch_torch().enable()
        with stn.patch_torch():
            pass
        assert sampled_by_us(device, launched)
        stn.patch_torch().disable()
        assert tables() == before
        stn.patch_torch().disable()
        assert not sampled_by_us(device, launched)
        with stn.patch_torch():
            stn.patch_torch().enable()
            stn.patch_torch().disable()
            assert sampled_by_us(device, launched)
        assert tables() == before
    finally:
        stn.patch_torch().disable()


def test_decorator(device, launched):
    @stn.patch_torch()
    def function():
        return sampled_by_us(device, launched)

    assert function()
    assert function()
    assert not sampled_by_us(device, launched)


def test_threads(monkeypatch):
    """Blocks that overlap in threads: the patch is in force inside each, and the last one ends it."""
    register = stn.patch._Registered.turn_on

    def slow(self):
        time.sleep(1e-3)  # where another thread would come in
        return register(self)

    monkeypatch.setattr(stn.patch._Registered, "turn_on", slow)
    failures = []
    start = threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(20):
            with stn.patch_torch():
                time.sleep(1e-3)
                if not in_force():
                    failures.append("not in force")

    before = tables()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert tables() == before


def test_is_in_force_in_other_threads(device, launched):
    seen = []
    with stn.patch_torch():
        thread = threading.Thread(target=lambda: seen.append(sampled_by_us(device, launched)))
        thread.start()
        thread.join()
    assert seen == [True]


def test_calls_while_it_goes_on_and_off():
    """Other threads that sample meanwhile run on some kernels, ours or PyTorch's, and nothing crashes."""
    code = """
import threading, time, torch, stn_triton as stn
stn.patch._fits = lambda *arguments: False  # the interpreter runs in one thread only
image, grid, done = torch.ones(1, 1, 4, 4), torch.zeros(1, 2, 2, 2), threading.Event()
def work():
    while not done.is_set():
        assert (torch.nn.functional.grid_sample(image, grid, align_corners=False) == 1).all()
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
end = time.monotonic() + 1
while time.monotonic() < end:
    with stn.patch_torch():
        pass
done.set()
for thread in threads:
    thread.join()
print("fine")
"""
    assert python("-c", code, TRITON_INTERPRET="1").strip() == "fine"


def test_what_fails_leaves_nothing(monkeypatch):
    """A registration that fails half-way is undone, and the next one works."""
    before, replacements = tables(), stn.patch._replacements

    def failing():
        yield next(replacements())
        yield "grid_sampler_3d", "CPU", None

    monkeypatch.setattr(stn.patch, "_replacements", failing)
    for turn_on in (stn.patch_torch().__enter__, stn.patch_torch.enable):
        with pytest.raises(TypeError, match="callable"):
            turn_on()
        assert tables() == before
    monkeypatch.undo()
    with stn.patch_torch():
        assert in_force()
    assert tables() == before


def test_over_the_kernels_of_others(device, launched):
    """A kernel that someone else registered is the one gone back to."""
    ran = []

    def theirs(image, grid, *modes):
        ran.append("theirs")
        return torch.zeros(image.shape[0], image.shape[1], *grid.shape[1:3], device=image.device)

    key = "CPU" if device.type == "cpu" else device.type.upper()
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("grid_sampler_2d", theirs, key)
        assert not sampled_by_us(device, launched)
        with stn.patch_torch():
            assert sampled_by_us(device, launched)
            assert ran == ["theirs"]
            with backend.use("torch"):
                assert not sampled_by_us(device, launched)
        assert not sampled_by_us(device, launched)
    assert ran == ["theirs"] * 3


def test_in_a_process_of_its_own():
    """No warning, and on a plain CPU nothing is replaced nor loaded."""
    code = """
import sys, torch, stn_triton as stn
grid = torch.zeros(1, 3, 4, 2)
table = lambda: torch._C._dispatch_dump_table("aten::grid_sampler_2d")
before = table()
with stn.patch_torch():
    print([line for line in table().splitlines() if line.startswith("CPU:")] ==
          [line for line in before.splitlines() if line.startswith("CPU:")])
    torch.nn.functional.grid_sample(torch.ones(1, 2, 4, 5), grid, align_corners=False)
assert table() == before
print("triton" in sys.modules, torch.cuda.is_initialized())
"""
    assert python("-W", "error::UserWarning", "-c", code).split() == ["True", "False", "False"]
    assert python("-W", "error::UserWarning", "-c", code, TRITON_INTERPRET="1").split()[0] == "False"


# --------------------------------------------------------------- what PyTorch does above the kernels
def test_autocast(device, launched):
    """PyTorch's promotion, to float32 on the CPU and to the widest elsewhere."""
    image, grid = (leaf.detach() for leaf in arguments(2, device))
    call = image.bfloat16(), grid
    with torch.autocast(device.type, torch.bfloat16):
        expected = F.grid_sample(*call, align_corners=False)
        with stn.patch_torch():
            actual = F.grid_sample(*call, align_corners=False)
    assert names(launched) == [FORWARD]
    assert actual.dtype == expected.dtype == torch.float32
    assert_close(actual, expected.double())


@pytest.mark.parametrize("dims", [2, 3])
def test_vmap(device, launched, dims):
    """One launch for all, forward and backward, whichever argument has the extra dimension."""
    image, grid = (leaf.detach() for leaf in arguments(dims, device))
    images, grids = torch.stack([image, image + 1]), torch.stack([grid, grid / 2])

    def sample(image, grid):
        return F.grid_sample(image, grid, align_corners=False)

    def run():
        both = torch.vmap(sample)(images, grids)
        one = torch.vmap(sample, (0, None))(images, grid)
        loss = torch.func.grad(lambda *leaves: sample(*leaves).square().sum(), (0, 1))
        return both, one, *torch.vmap(loss)(images, grids)

    expected = run()
    with stn.patch_torch():
        actual = run()
    assert names(launched) == [FORWARD, FORWARD, FORWARD, BACKWARD]
    for a, b in zip(actual, expected):
        assert_close(a, b.double())


@pytest.mark.parametrize("dims, mode", [(2, "bilinear"), (2, "bicubic"), (3, "bilinear")])
def test_second_derivatives(device, dims, mode):
    """Right where PyTorch has them, else PyTorch's error."""
    leaves = arguments(dims, device, torch.float64, batch=1, channels=2)

    def second():
        output = F.grid_sample(*leaves, mode, align_corners=False)
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        try:
            return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        except RuntimeError as error:
            return str(error)

    expected = second()
    with stn.patch_torch():
        actual = second()
    if isinstance(expected, str):
        assert actual == expected
        return
    for a, b in zip(actual, expected):
        assert_close(a, b)


def inductor_works():
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except Exception:
        return False
    return True


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dims", [2, 3])
def test_compiled(device, launched, dims, compiler):
    """What the compiler leaves to operators runs on our kernels: all but Inductor's own 2-D forward pass."""
    if compiler == "inductor" and not inductor_works():
        pytest.skip("Inductor has no compiler here")
    torch._dynamo.reset()
    leaves = arguments(dims, device)

    def function(image, grid):
        return F.grid_sample(image, grid, align_corners=False).square()

    expected = derivatives(function, leaves)
    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    with stn.patch_torch():
        actual = derivatives(compiled, leaves)
    assert names(launched) == ([BACKWARD] if (dims, compiler) == (2, "inductor") else [FORWARD, BACKWARD])
    for a, b in zip(actual, expected):
        assert_close(a, b.double())
    count = len(launched)
    derivatives(compiled, leaves)  # the same code, without the patch
    assert len(launched) == count


@pytest.mark.parametrize("dims", [2, 3])
def test_operators_keep_their_promises(device, dims):
    """The schema, the strides that the compiler is told, autograd and functionalisation."""
    image, grid = arguments(dims, device, batch=1)
    last = torch.channels_last if dims == 2 else torch.channels_last_3d
    image = image.detach().contiguous(memory_format=last).requires_grad_()
    grad_output = torch.randn(1, 3, *SIZES[dims][1], device=device)
    forward, backward = (
        getattr(ATEN, f"grid_sampler_{dims}d"),
        getattr(ATEN, f"grid_sampler_{dims}d_backward"),
    )
    with stn.patch_torch():
        torch.library.opcheck(forward.default, (image, grid, 0, 0, False))
        utilities = ["test_schema", "test_faketensor"]
        call = grad_output, image.detach(), grid.detach(), 0, 0, False, [True, True]
        torch.library.opcheck(backward.default, call, test_utils=utilities)


def test_deterministic(device, launched):
    """No alert: it is in the kernels that are replaced."""
    leaves = arguments(2, device)
    torch.use_deterministic_algorithms(True)
    try:
        with stn.patch_torch():
            derivatives(F.grid_sample, leaves, "bilinear", "zeros", False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert FORWARD in names(launched)
    assert "sort_sums_kernel" in names(launched)


OPERATOR_SAMPLES = ["grid_sampler_2d", "grid_sampler_3d", "nn.functional.grid_sample"]


@pytest.mark.parametrize("name", OPERATOR_SAMPLES)
def test_samples_of_pytorchs_database(device, launched, name):
    """PyTorch's own samples for its operators: values and gradients with the patch are those without."""
    if database is None:
        pytest.skip("torch.testing's operator database needs expecttest")
    (info,) = [info for info in database.op_db if info.name == name]
    count = 0
    for sample in info.sample_inputs(device, torch.float64, requires_grad=True):
        image, grid, *args = [sample.input, *sample.args]
        if image.numel() > 10**5 and device.type == "cpu":
            continue
        call = [image, grid]

        def function(image, grid, args=args, sample=sample):
            return info.op(image, grid, *args, **sample.kwargs)

        expected = derivatives(function, call)
        with stn.patch_torch():
            actual = derivatives(function, call)
        for a, b in zip(actual, expected):
            assert_close(a, b)
        count += 1
    assert count >= 12
    assert names(launched).count(FORWARD) == names(launched).count(BACKWARD) == count


# ------------------------------------------------------------------------------- code of other people
PHOTOGRAPH = 1, 3, 11, 13


def leaf(*shape, device, scale=1.0):
    return (torch.rand(*shape, dtype=torch.float64) * scale).to(device).requires_grad_()


def same_with_and_without(function, leaves, launched):
    """Values and gradients are the same; how often our kernels ran, forward and backward."""
    expected = derivatives(function, leaves)
    assert not launched
    with stn.patch_torch():
        actual = derivatives(function, leaves)
    for a, b in zip(actual, expected):
        assert_close(a, b)
    assert torch.isfinite(expected[0]).all()
    assert expected[0].any()
    count = names(launched).count(FORWARD), names(launched).count(BACKWARD)
    derivatives(function, leaves)
    assert len(launched) == sum(count), "the patch is still in force"
    return count


@pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "centres"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("function", ["warp_affine", "warp_perspective"])
def test_kornia_warps(device, launched, function, mode, align_corners):
    transform = pytest.importorskip("kornia.geometry.transform")
    matrix = torch.tensor([[0.83, -0.31, 2.1], [0.27, 0.94, -1.3], [0.003, -0.007, 1.0]], dtype=torch.float64)
    rows = 2 if function == "warp_affine" else 3
    leaves = [leaf(*PHOTOGRAPH, device=device), matrix[None, :rows].to(device).requires_grad_()]

    def warp(image, matrix):
        return getattr(transform, function)(image, matrix, (9, 12), mode=mode, align_corners=align_corners)

    assert same_with_and_without(warp, leaves, launched) == (1, 1)


def test_kornia_elastic_transform(device, launched):
    transform = pytest.importorskip("kornia.geometry.transform")
    image = leaf(*PHOTOGRAPH, device=device)
    noise = (torch.rand(1, 2, *PHOTOGRAPH[2:], dtype=torch.float64) * 2 - 1).to(device).requires_grad_()

    def warp(image, noise):
        return transform.elastic_transform2d(image, noise, (5, 5), (2.0, 2.0), (0.3, 0.3))

    assert same_with_and_without(warp, [image, noise], launched) == (1, 1)


@pytest.fixture(scope="module")
def torchvision():
    return import_torchvision("transforms.v2")


@pytest.mark.parametrize("name", ["affine", "perspective", "elastic", "rotate"])
def test_torchvision_transforms(device, launched, torchvision, name):
    v2 = torchvision.transforms.v2
    options = {"interpolation": torchvision.transforms.InterpolationMode.BILINEAR}
    make = {
        "affine": functools.partial(v2.RandomAffine, 40, (0.1, 0.2), (0.8, 1.3), 20),
        "perspective": functools.partial(v2.RandomPerspective, 0.4, p=1),
        "elastic": functools.partial(v2.ElasticTransform, 30.0, 1.0),
        "rotate": functools.partial(v2.RandomRotation, (20, 70)),
    }[name]

    def warp(image, fill=None):
        torch.manual_seed(3)
        return make(fill=fill, **options)(image)

    image = leaf(*PHOTOGRAPH, device=device)
    assert same_with_and_without(warp, [image], launched) == (1, 1)
    # filled, torchvision works in place and has no gradient
    expected = warp(image.detach(), fill=0.25)
    with stn.patch_torch():
        assert_close(warp(image.detach(), fill=0.25), expected)
    assert names(launched) == [FORWARD, BACKWARD, FORWARD]


def test_torchvision_displacement(device, launched, torchvision):
    """A gradient by torchvision's elastic displacement."""
    elastic = torchvision.transforms.v2.functional.elastic
    mode = torchvision.transforms.InterpolationMode.BILINEAR
    leaves = [
        leaf(*PHOTOGRAPH, device=device),
        leaf(1, *PHOTOGRAPH[2:], 2, device=device, scale=0.3),
    ]
    assert same_with_and_without(lambda *args: elastic(*args, interpolation=mode), leaves, launched) == (1, 1)
