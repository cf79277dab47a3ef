"""Training and DTensor over two processes: results as in one, and no more communication than it takes.

Two gloo processes on the CPU, with PyTorch's operators, serve all of these tests.
"""

import datetime
import functools
import multiprocessing
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stn_triton as stn
from stn_triton import backend, distributed
from stn_triton.kernels.modes import Interpolation, Padding, Source

if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.xdist_group("distributed"),
    pytest.mark.filterwarnings("ignore:::torch"),
]
TRANSFORMS = ["affine", "attention", "similarity", "projective", "tps"]
SECONDS = 60  # until what should take one or two is given up


# --------------------------------------------------------------------------------------- two processes
def serve(rank, rendezvous, pipe):
    """Runs the functions of this module that the parent names, and answers with what went wrong."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=SECONDS)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timeout
    )
    with backend.use("torch"):
        while (request := pipe.recv()) is not None:
            name, arguments = request
            try:
                torch.manual_seed(0)
                globals()[name](*arguments)
                pipe.send(None)
            except BaseException:
                pipe.send(traceback.format_exc())
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the two processes, or finds them at work; ``None`` has them end."""
    context = multiprocessing.get_context("spawn")
    running = []

    def start():
        if not running:
            rendezvous = tmp_path_factory.mktemp("distributed") / "rendezvous"
            for rank in range(2):
                ours, theirs = context.Pipe()
                process = context.Process(target=serve, args=(rank, rendezvous, theirs), daemon=True)
                process.start()
                theirs.close()
                running.append((process, ours))
        return running

    yield start
    for process, pipe in running:
        if process.is_alive():
            pipe.send(None)
        process.join(SECONDS)
        process.kill()


@pytest.fixture
def both(start):
    """Runs a function of this module in both processes."""

    def run(function, *arguments):
        running = start()
        for _, pipe in running:
            pipe.send((function.__name__, arguments))
        failures = []
        for rank, (_, pipe) in enumerate(running):
            try:
                failure = pipe.recv() if pipe.poll(SECONDS) else f"no answer in {SECONDS} seconds"
            except EOFError:
                failure = "it died"
            if failure:
                failures.append(f"process {rank}: {failure}")
        if failures:  # they may be out of step
            for process, _ in running:
                process.kill()
            running.clear()
            pytest.fail("\n".join(failures))

    return run


@functools.cache
def mesh_of(*shape):
    """One of each shape: DTensor's caches take equal meshes for one, and the compiler does not."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape)


# -------------------------------------------------------------------------------------------- training
def make_net(transform):
    torch.manual_seed(1)
    localisation = stn.nn.localisation_fcn((12,), input_shape=(2, 8, 9))
    transformer = stn.nn.SpatialTransformer(localisation, transform, (6, 5), features=12)
    nn.init.normal_(transformer.regression.weight, std=0.05)
    return nn.Sequential(transformer, nn.Flatten(), nn.Linear(60, 3))


def train(net, images, labels):
    """Three steps; the losses."""
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(net(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def check_training(transform, parallel):
    """Halves of a batch in two processes train a net as the whole does in one."""

    images, labels = torch.randn(8, 2, 8, 9), torch.randint(3, (8,))
    alone, net = make_net(transform), make_net(transform)
    start = [parameter.detach().clone() for parameter in alone.parameters()]
    losses = train(alone, images, labels)
    if parallel == "DDP":
        wrapped = nn.parallel.DistributedDataParallel(net)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = mesh_of(2)
        fully_shard(net[0], mesh=mesh)
        wrapped = fully_shard(net, mesh=mesh)
    rank = torch.distributed.get_rank()
    found = torch.tensor(train(wrapped, images[4 * rank :][:4], labels[4 * rank :][:4]))
    torch.distributed.all_reduce(found)
    torch.testing.assert_close(found / 2, torch.tensor(losses))
    for before, expected, parameter in zip(start, alone.parameters(), net.parameters(), strict=True):
        assert not torch.allclose(before, expected, rtol=1e-4)
        torch.testing.assert_close(distributed.whole(parameter.detach()), expected.detach())


@pytest.mark.parametrize("parallel", ["DDP", "FSDP2"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_training_is_that_of_one_process(both, transform, parallel):
    both(check_training, transform, parallel)


# --------------------------------------------------------------------------------------------- DTensor
SIZE = (5, 7)
MATRICES = {"affine": torch.eye(2, 3), "projective": torch.eye(3)}


def affine(x, theta):
    return stn.affine_grid_sample(x, theta, SIZE)


def projective(x, homography):
    return stn.projective_grid_sample(x, homography, SIZE, "bicubic", ("circular", "reflection"))


def averages(x, matrix):
    sampler = stn.affine_grid_sample if matrix.shape[-2] == 2 else stn.projective_grid_sample
    return sampler(x, matrix, (3, 4), padding_mode="circular", antialias=True)


def filled(x, theta, fill=2.5):
    return stn.affine_grid_sample(x, theta, SIZE, padding_mode="border", fill=fill)


def filled_taps(x, theta, fill):
    return stn.affine_grid_sample(x, theta, SIZE, fill=fill, antialias=True)


def of_integers(x, theta):
    whole = (99 * x).to(torch.int16)
    rounded = stn.affine_grid_sample(whole, theta, SIZE, fill=7)
    return rounded.float() + stn.affine_grid_sample(whole, theta, SIZE, dtype=torch.float32)


def spline(x, points, control_points=None):
    return stn.tps_grid_sample(x, points, SIZE, "bilinear", "border", control_points=control_points)


def sampled_grid(x, theta):
    return stn.grid_sample(x, stn.affine_grid(theta, (*x.shape[:2], *SIZE), False), align_corners=False)


def make(kind, *leading):
    if kind == "image":
        return torch.randn(*leading, 6, 8, 9)
    if kind == "volume":
        return torch.randn(*leading, 6, 5, 4, 3)
    if kind == "flow":
        return torch.randn(*leading, 2, *SIZE)
    if kind == "fill":
        return torch.randn(*leading, 6)
    if kind == "grid":
        return torch.rand(*leading, *SIZE, 2) * 2.4 - 1.2
    if kind == "control":
        return torch.rand(9, 2) * 2 - 1
    if kind == "points":
        return torch.rand(*leading, 9, 2) * 2 - 1
    return MATRICES[kind] + 0.2 * torch.randn(*leading, *MATRICES[kind].shape)


# The function; of each argument what it is made by and how it is sharded; how the result and the gradients
# are to be. S0 is Shard(0), R Replicate and P Partial.
DTENSORS = {
    "affine-batch": (affine, ("image 4 S0", "affine 4 S0"), "S0", "S0 S0"),
    "affine-uneven-batch": (affine, ("image 3 S0", "affine 3 S0"), "S0", "S0 S0"),
    "affine-batch-of-whole-theta": (affine, ("image 4 S0", "affine 4 R"), "S0", "S0 S0"),
    "affine-broadcast": (affine, ("image 4 S0", "affine 1 R"), "S0", "S0 P"),
    "affine-broadcast-several": (affine, ("image 4 S0", "affine 1 3 R"), "S0", "S0 P"),
    "affine-channels": (affine, ("image 4 S1", "affine 4 R"), "S1", "S1 P"),
    "affine-channels-of-several": (affine, ("image 4 S1", "affine 4 2 R"), "S2", "S1 P"),
    "affine-transforms": (affine, ("image 4 R", "affine 4 2 S1"), "S1", "P S1"),
    "affine-terms": (affine, ("image 4 P", "affine 4 R"), "P", "R P"),
    "affine-whole": (affine, ("image 4 R", "affine 4 R"), "R", "R R"),
    "projective-batch": (projective, ("image 4 S0", "projective 4 S0"), "S0", "S0 S0"),
    "projective-channels": (projective, ("image 4 S1", "projective 1 R"), "S1", "S1 P"),
    "spline-batch": (spline, ("image 4 S0", "points 4 S0"), "S0", "S0 S0"),
    "spline-channels": (spline, ("image 4 S1", "points 4 2 R"), "S2", "S1 P"),
    "spline-control-points": (spline, ("image 4 S0", "points 4 S0", "control R"), "S0", "S0 S0 P"),
    "grid-batch": (stn.grid_sample, ("image 4 S0", "grid 4 S0"), "S0", "S0 S0"),
    "grid-channels": (stn.grid_sample, ("image 4 S1", "grid 4 R"), "S1", "S1 P"),
    "flow-batch": (stn.flow_grid_sample, ("image 4 S0", "flow 4 S0"), "S0", "S0 S0"),
    "flow-channels": (stn.flow_grid_sample, ("image 4 S1", "flow 1 R"), "S1", "S1 P"),
    "averages-batch": (averages, ("image 4 S0", "affine 4 S0"), "S0", "S0 S0"),
    "averages-channels": (averages, ("image 4 S1", "projective 1 R"), "S1", "S1 P"),
    "averages-terms": (averages, ("image 4 P", "affine 4 R"), "P", "R P"),
    "filled-batch": (filled, ("image 4 S0", "affine 4 S0"), "S0", "S0 S0"),
    "filled-channels-of-several": (filled, ("image 4 S1", "affine 4 2 R", "fill S0"), "S2", "S1 P S0"),
    "filled_taps-batch": (filled_taps, ("image 4 S0", "affine 4 S0", "fill 4 S0"), "S0", "S0 S0 S0"),
    "filled_taps-channels": (filled_taps, ("image 4 S1", "affine 4 R", "fill 4 S1"), "S1", "S1 P S1"),
    "integers-batch": (of_integers, ("image 4 S0", "affine 4 S0"), "S0", "S0 S0"),
    "affine_grid-batch": (sampled_grid, ("image 4 S0", "affine 4 S0"), "S0", "S0 S0"),
}


# What is small and summed on the way: the gradient of a spline's system, and of the share of each sample's
# taps that lies in the image, which all channels have in common.
SUMMED = ("spline-control-points", "filled_taps-channels")


def check_dtensor(name):
    """The values and gradients of plain tensors, sharded as expected, and no tensor is gathered."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    placements = {"R": Replicate(), "P": Partial()} | {f"S{dim}": Shard(dim) for dim in range(3)}
    mesh = mesh_of(2)
    function, arguments, of_result, of_gradients = DTENSORS[name]
    summed = int(name in SUMMED)
    one = torch.ones(())
    terms = distribute_tensor(one, mesh, [Replicate()]) + DTensor.from_local(one, mesh, [Partial()])
    if name == "filled_taps-channels" and terms.placements[0].is_replicate():
        # d theta is such a sum, for which PyTorch 2.11 asks the other processes
        of_gradients, summed = "S1 R S1", 2
    plain, sharded = [], []
    for argument in arguments:
        kind, *leading, placement = argument.split()
        tensor = make(kind, *map(int, leading))
        if placement == "P":
            share = (0.3, 0.7)[torch.distributed.get_rank()]
            dtensor = DTensor.from_local(share * tensor, mesh, [Partial()])
        else:
            dtensor = distribute_tensor(tensor, mesh, [placements[placement]])
        plain.append(tensor.requires_grad_())
        sharded.append(dtensor.detach().requires_grad_())
    expected = function(*plain)
    weights = torch.randn(expected.shape)
    weighted = "R" if of_result == "P" else of_result
    of_output = distribute_tensor(weights, mesh, [placements[weighted]])
    with CommDebugMode() as communication:
        output = function(*sharded)
        found = torch.autograd.grad(output, sharded, of_output, materialize_grads=True)
    assert communication.get_total_counts() == summed
    assert not [op for op in communication.get_comm_counts() if "gather" in str(op)]
    assert output.placements == (placements[of_result],)
    assert [g.placements for g in found] == [(placements[p],) for p in of_gradients.split()]
    wanted = [expected, *torch.autograd.grad(expected, plain, weights, materialize_grads=True)]
    for actual, reference in zip([output, *found], wanted, strict=True):
        assert actual.stride() == reference.stride()
        torch.testing.assert_close(actual.full_tensor(), reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", list(DTENSORS))
def test_dtensor(both, name):
    both(check_dtensor, name)


def check_mesh():
    """Images over one dimension of a mesh and channels over the other; here each has one process."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for shape in (1, 2), (2, 1):
        mesh = mesh_of(*shape)
        image, theta = make("image", 4).requires_grad_(), make("affine", 1).requires_grad_()
        images = distribute_tensor(image.detach(), mesh, [Shard(0), Shard(1)]).requires_grad_()
        thetas = distribute_tensor(theta.detach(), mesh, [Replicate(), Replicate()]).requires_grad_()
        output = affine(images, thetas)
        assert output.placements == (Shard(0), Shard(1))
        by_images, by_thetas = torch.autograd.grad(output.square().sum().full_tensor(), [images, thetas])
        by_image, by_theta = torch.autograd.grad(affine(image, theta).square().sum(), [image, theta])
        assert by_images.placements == (Shard(0), Shard(1))
        torch.testing.assert_close(by_images.full_tensor(), by_image)
        torch.testing.assert_close(by_thetas.full_tensor(), by_theta, atol=1e-4, rtol=1e-4)


def test_mesh_of_two_dimensions(both):
    both(check_mesh)


def check_second_derivatives(function, of_image, of_params):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def second(image, params):
        output = globals()[function](image, params)
        first = torch.autograd.grad(output.square().sum(), [image, params], create_graph=True)
        return torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), [image, params])

    mesh = mesh_of(2)
    image, params = make("image", 4), make("points" if function == "spline" else "affine", 4)
    placements = [Replicate() if dim is None else Shard(dim) for dim in (of_image, of_params)]
    sharded = [distribute_tensor(t, mesh, [p]) for t, p in zip((image, params), placements, strict=True)]
    found = second(*(t.requires_grad_() for t in sharded))
    assert found[0].placements == (placements[0],)
    for actual, expected in zip(found, second(image.requires_grad_(), params.requires_grad_()), strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(actual.full_tensor() / scale, expected / scale, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("function", ["affine", "spline", "filled"])
@pytest.mark.parametrize("of_image, of_params", [(0, 0), (1, None)], ids=["batch", "channels"])
def test_second_derivatives_of_dtensors(both, function, of_image, of_params):
    both(check_second_derivatives, function, of_image, of_params)


def check_compiled(function, kind):
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.compiler.reset()
    mesh = mesh_of(2)
    tensors = [make("image", 4), make(kind, 4)]
    compiled = torch.compile(globals()[function], fullgraph=True, backend="aot_eager")
    sharded = [distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in tensors]
    output = compiled(*sharded)
    assert output.placements == (Shard(0),)
    found = torch.autograd.grad(output.square().sum().full_tensor(), sharded)
    expected = globals()[function](*(t.requires_grad_() for t in tensors))
    torch.testing.assert_close(output.full_tensor(), expected)
    for actual, reference in zip(found, torch.autograd.grad(expected.square().sum(), tensors), strict=True):
        assert actual.placements == (Shard(0),)
        torch.testing.assert_close(actual.full_tensor(), reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "function, kind",
    [("affine", "affine"), ("spline", "points"), ("averages", "affine"), ("filled", "affine")],
)
def test_dtensors_compile(both, function, kind):
    both(check_compiled, function, kind)


def check_module(transform):
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    mesh = mesh_of(2)
    images = torch.randn(8, 2, 8, 9)
    alone, net = make_net(transform)[0], make_net(transform)[0]
    distribute_module(net, mesh)
    output = net(distribute_tensor(images, mesh, [Shard(0)]))
    assert output.placements == (Shard(0),)
    torch.testing.assert_close(output.full_tensor(), alone(images), atol=1e-5, rtol=1e-5)
    output.square().sum().backward()
    alone(images).square().sum().backward()
    for parameter, expected in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_distributed_module(both, transform):
    """``distribute_module`` takes a ``SpatialTransformer``: its input's batch stays sharded."""
    both(check_module, transform)


def test_first_dtensor_registers():
    """``register`` is called for the user, who may import PyTorch's module before or after the package."""
    program = """
import os, sys
import torch, stn_triton as stn
from stn_triton import distributed
assert "torch.distributed.tensor" not in sys.modules, "import stn_triton imported it"
stn.affine_grid_sample(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 3))
assert "torch.distributed.tensor" not in sys.modules, "a plain tensor imported it"
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mesh = DeviceMesh("cpu", [0])
image, theta = (distribute_tensor(torch.zeros(2, *shape), mesh, [Shard(0)]) for shape in ((1, 2, 2), (2, 3)))
assert not distributed._registered
assert stn.affine_grid_sample(image, theta).placements == (Shard(0),)
torch.distributed.destroy_process_group()
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=SECONDS)


# ----------------------------------------------------------------------------------------- strategies
def operands(source, transforms):
    """What the operators take, by kind, in float64; N = 4, C = 6, T = 2."""
    several = (2,) if transforms else ()
    params = {
        Source.GRID: lambda: make("grid", 4),
        Source.AFFINE: lambda: make("affine", 4, *several),
        Source.PROJECTIVE: lambda: make("projective", 4, *several),
        Source.TPS: lambda: 0.1 * torch.randn(4, *several, 12, 2),
        Source.FLOW: lambda: make("flow", 4),
    }[source]()
    kinds = {
        "image": lambda: make("image", 4),
        "fill": lambda: torch.randn(4, 6),
        "samples": lambda: torch.randn(4, *several, 6, *SIZE),
        "params": lambda: params,
        "control": lambda: make("control") if source == Source.TPS else None,
        "coordinates": lambda: torch.randn(4, 2 if transforms else 1, *SIZE, 2),
    }
    return lambda kind: None if (tensor := kinds[kind]()) is None else tensor.double()


def arguments_of(name, source, transforms):
    """Lists of arguments for an operator: all tensors given, and each that may be left out left out."""
    make_one = operands(source, transforms)
    tensors = [make_one(kind) for kind in distributed._OPERATORS[name].arguments]
    modes = int(Interpolation.BICUBIC), int(Padding.BORDER), False
    shape = [4, 6, 8, 9]
    if name == "sample":
        return [(*tensors, int(source), SIZE, *modes)]
    if name == "sample_as":
        rest = int(source), SIZE, *modes, torch.float64
        return [(*tensors, *rest), (*tensors[:3], None, *rest)]
    if name == "sample_backward":
        splined = source == Source.TPS
        place = int(source), shape, False, *modes
        image_alone = [tensors[0], None, *tensors[2:]]
        return [(*tensors, *place, True, True, splined), (*image_alone, *place, True, False, False)]
    if name == "sample_jvp":
        rest = int(source), SIZE, *modes
        still = [None, *tensors[1:4], None]
        moving = [tensors[0], None, *tensors[2:]]
        return [(*tensors, *rest), (*still, *rest), (*moving, *rest)]
    if name == "sample_hvp":
        rest = int(source), shape, False, *modes
        still = [tensors[0], None, *tensors[2:5], None]
        moving = [*tensors[:2], None, *tensors[3:]]
        image_alone = [tensors[0], None, None, *tensors[3:]]
        return [
            (*tensors, *rest, True, True),
            (*still, *rest, False, True),
            (*moving, *rest, True, True),
            (*image_alone, *rest, True, False),
        ]
    if name == "grid":
        return [(*tensors, int(source), SIZE, False)]
    tensors[0] = tensors[0].squeeze(1)
    return [(*tensors, int(source), False, source == Source.TPS)]


def shares_of(tensor, placement):
    """What each of two processes has of a tensor."""
    if not isinstance(tensor, torch.Tensor) or placement.is_replicate():
        return [tensor, tensor]
    if placement.is_shard():
        return tensor.chunk(2, placement.dim)
    first = torch.randn_like(tensor)
    return [first, (2 * tensor if placement.reduce_op == "avg" else tensor) - first]


def combined(shares, placement):
    if placement.is_replicate():
        torch.testing.assert_close(*shares)
        return shares[0]
    if placement.is_shard():
        return torch.cat(list(shares), placement.dim)
    return sum(shares) / (2 if placement.reduce_op == "avg" else 1)


STRATEGIES = [
    pytest.param(
        name, source, transforms, id=f"{name}-{source.name.lower()}{'-several' if transforms else ''}"
    )
    for name in distributed._OPERATORS
    for source in Source
    for transforms in (False, True)
    if not (transforms and (source in (Source.GRID, Source.FLOW) or name.startswith("grid")))
    if not (source in (Source.GRID, Source.FLOW) and name.startswith("grid"))
]


@pytest.mark.parametrize("name, source, transforms", STRATEGIES)
def test_every_strategy_adds_up(name, source, transforms):
    """What two processes compute of their shares makes up the whole."""
    from torch.distributed.tensor import Replicate

    operator = getattr(torch.ops.stn_triton, name)
    described = distributed._OPERATORS[name]
    with backend.use("torch"):
        for arguments in arguments_of(name, source, transforms):
            whole = operator(*arguments)
            whole = whole if isinstance(whole, tuple) else (whole,)
            strategies = distributed._strategies(described, *arguments)
            assert len(strategies) >= 2 + (not name.startswith("grid"))
            for of_results, of_arguments in strategies:
                given = iter(of_arguments)
                rest = arguments[len(described.arguments) :]
                tensors = arguments[: len(described.arguments)]
                shares = [shares_of(t, Replicate() if t is None else next(given)) for t in tensors]
                first, second = (operator(*(share[rank] for share in shares), *rest) for rank in (0, 1))
                if isinstance(first, torch.Tensor):
                    first, second = (first,), (second,)
                for one, other, placement, expected in zip(first, second, of_results, whole, strict=True):
                    torch.testing.assert_close(combined((one, other), placement), expected)
