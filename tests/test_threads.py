"""Threads, processes, streams and devices: the results are those of one thread on the first device.

Triton's interpreter is not made for threads, so that on the CPU these tests run on PyTorch's operators.
"""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from common import MIXED, random_grid, random_theta

import stn_triton as stn
from stn_triton import backend
from stn_triton.transforms import splines

ROOT = Path(__file__).resolve().parent.parent
THREADS = 4
SECONDS = 60


@pytest.fixture
def in_threads(device):
    """Runs ``function(index)`` in several threads at once, on kernels that bear it; the results in order."""
    barrier = threading.Barrier(THREADS)

    def run(function):
        def start(index):
            barrier.wait(SECONDS)
            return function(index)

        with ThreadPoolExecutor(THREADS) as pool:
            return [future.result(SECONDS) for future in [pool.submit(start, k) for k in range(THREADS)]]

    if device.type == "cpu":
        with backend.use("torch"):
            yield run
    else:
        yield run


def tensors(index, device):
    """An image and parameters of every kind, of sizes that differ from thread to thread."""
    generator = torch.Generator().manual_seed(index)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(index)
        height, width = 9 + index, 12 - index
        return {
            "image": torch.randn(2, 3, height, width, generator=generator).to(device),
            "grid": random_grid(2, (5, 6), torch.float32, device),
            "theta": random_theta(2, 2, torch.float32, device),
            "homography": (torch.eye(3) + 0.1 * torch.randn(2, 3, 3)).to(device),
            "points": (torch.rand(2, (3 + index) ** 2, 2) * 2 - 1).to(device),
            "flow": torch.randn(2, 2, 5, 6).to(device),
        }


def everything(leaves):
    """Results and gradients of every function."""
    image, *params = (leaf.clone().requires_grad_() for leaf in leaves.values())
    grid, theta, homography, points, flow = params
    outputs = [
        stn.grid_sample(image, grid, align_corners=False),
        stn.affine_grid_sample(image, theta, (5, 6), "bicubic", MIXED[2]),
        stn.projective_grid_sample(image, homography, (5, 6), "bilinear", "border", antialias=True),
        stn.tps_grid_sample(image, points, (5, 6), fill=(1.0, 2.0, 3.0)),
        stn.flow_grid_sample((99 * image).to(torch.int16), flow, fill=7, dtype=torch.float32),
    ]
    loss = sum(output.square().sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, [image, *params])]


def forget():
    """What is remembered from call to call."""
    splines._lattices.clear()
    splines._places.clear()
    splines._system_matrix.cache_clear()
    backend._select.cache_clear()


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------- threads
def test_threads_get_what_one_gets(in_threads, device):
    inputs = [tensors(index, device) for index in range(THREADS)]
    expected = [everything(leaves) for leaves in inputs]
    forget()
    found = in_threads(lambda index: [everything(inputs[index]) for _ in range(5)])
    for rounds, wanted in zip(found, expected, strict=True):
        for one in rounds:
            assert_same(one, wanted)


def test_threads_share_one_module(in_threads, device):
    """As ``DataParallel`` has it: the gradients of all threads add up in the same parameters."""
    localisation = stn.nn.localisation_fcn((12,), input_shape=(2, 8, 9))
    net = stn.nn.SpatialTransformer(localisation, "tps", (6, 5), features=12).to(device)
    torch.nn.init.normal_(net.regression.weight, std=0.05)
    images = torch.randn(THREADS, 2, 2, 8, 9, device=device)
    net(images.flatten(0, 1)).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    forget()
    in_threads(lambda index: net(images[index]).square().sum().backward())
    assert_same([parameter.grad for parameter in net.parameters()], expected)


def test_a_lattice_is_kept_once(in_threads, device, monkeypatch):
    """All threads get the same points and the same matrix: graphs refer to them by their addresses."""
    solve, lattice = splines._solve, splines.control_lattice

    def slowly(function):
        def slow(*arguments, **keywords):
            time.sleep(0.1)
            return function(*arguments, **keywords)

        return slow

    forget()
    monkeypatch.setattr(splines, "_solve", slowly(solve))
    monkeypatch.setattr(splines, "control_lattice", slowly(lattice))
    found = in_threads(lambda index: splines._lattice_matrix(4, 0.0, device))
    assert all(matrix is splines._lattices[4, device] for matrix in found)
    found = in_threads(lambda index: splines.kept_lattice(4, device, torch.float32))
    assert all(points is splines._places[4, device, torch.float32] for points in found)
    torch.testing.assert_close(found[0], lattice(4, device=device), rtol=0, atol=0)


def test_backends_of_threads_are_undone(device):
    """Blocks that overlap, neither within the other: what is left is what was."""
    before = backend.select(device.type)
    first, second = backend.use("torch"), backend.use("interpreter")
    first.__enter__()
    second.__enter__()
    assert backend.select(device.type).name == "interpreter"
    first.__exit__(None, None, None)
    assert backend.select(device.type).name == "interpreter"
    second.__exit__(None, None, None)
    assert backend.select(device.type) == before


# ------------------------------------------------------------------------------------------- processes
def python(program, **environment):
    """Runs a program on PyTorch's operators, with a module of its own: spawned processes import it."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def test_first_use_in_several_threads():
    """Even the import."""
    program = """
import threading, torch
barrier, found = threading.Barrier(4), []

def use():
    barrier.wait()
    import stn_triton as stn
    image, points = torch.ones(1, 1, 4, 4, requires_grad=True), torch.zeros(1, 9, 2, requires_grad=True)
    stn.tps_grid_sample(image, points, padding_mode="border").sum().backward()
    found.append(image.grad.sum().item())

threads = [threading.Thread(target=use) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert found == [16.0] * 4, found
"""
    python(program)


WORK = """
import multiprocessing, torch
import stn_triton as stn

def work(device="cpu", queue=None):
    torch.manual_seed(0)
    image, points = torch.randn(2, 3, 8, 9), stn.transforms.identity(2, "tps") + 0.1 * torch.randn(2, 16, 2)
    image, points = (t.to(device).requires_grad_() for t in (image, points))
    output = stn.tps_grid_sample(image, points, (5, 6))
    theta = torch.tensor([[[0.9, 0.2, 0.1], [-0.1, 1.1, 0.0]]], device=device)
    output = output + stn.affine_grid_sample(image, theta, (5, 6), "bicubic")
    output.square().sum().backward()
    found = [t.detach().cpu().tolist() for t in (output, image.grad, points.grad)]
    queue.put(found) if queue else None
    return found

def elsewhere(method, device="cpu"):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=work, args=(device, queue))
    process.start()
    found = queue.get(timeout=50)
    process.join()
    assert process.exitcode == 0
    return found

class Warped(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        image = torch.arange(12.0).view(1, 1, 3, 4) + index
        return stn.affine_grid_sample(image, torch.eye(2, 3)[None] * (1 - index / 10))[0]
"""


def run_module(tmp_path, program, **environment):
    (tmp_path / "work.py").write_text(WORK)
    guarded = "".join(f"    {line}\n" for line in program.strip().splitlines())
    (tmp_path / "main.py").write_text(
        f"import torch\nfrom work import *\nif __name__ == '__main__':\n{guarded}"
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    return python(
        f"import runpy; runpy.run_path({str(tmp_path / 'main.py')!r}, run_name='__main__')",
        PYTHONPATH=path,
        **environment,
    )


def test_processes(tmp_path):
    """What has been used in the parent works in its children, forwards and backwards."""
    program = """
expected = work()
for method in multiprocessing.get_all_start_methods():
    assert elsewhere(method) == expected, method
    assert work() == expected, method
"""
    # a forked child has lost OpenMP's threads, and PyTorch's own operators wait for them
    run_module(tmp_path, program, OMP_NUM_THREADS="1")


def test_workers_of_a_data_loader(tmp_path):
    """Forked ones, and one that is spawned."""
    program = """
expected = torch.stack([image for image in map(Warped().__getitem__, range(6))])
for method, workers in ("fork", 2), ("spawn", 1):
    if method not in multiprocessing.get_all_start_methods():
        continue
    loader = torch.utils.data.DataLoader(
        Warped(), 3, num_workers=workers, multiprocessing_context=method, timeout=50)
    assert torch.equal(torch.cat(list(loader)), expected), method
"""
    run_module(tmp_path, program)


# ------------------------------------------------------------------------------------ streams, devices
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@needs_cuda
@pytest.mark.gpu
def test_another_stream(device):
    """The work is queued where the user's is: behind what makes its inputs, before what reads its results."""
    leaves = tensors(0, device)
    expected = everything(leaves)
    forget()
    torch.cuda.synchronize()
    late = {name: torch.zeros_like(tensor) for name, tensor in leaves.items()}
    late["points"].copy_(leaves["points"])  # whose spline is solved by the host
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for name, tensor in late.items():
            tensor.copy_(leaves[name])
        found = everything(late)
    stream.synchronize()
    assert_same(found, expected)


@needs_cuda
@pytest.mark.gpu
def test_streams_of_threads(in_threads, device):
    inputs = [tensors(index, device) for index in range(THREADS)]
    expected = [everything(leaves) for leaves in inputs]
    forget()
    torch.cuda.synchronize()

    def on_own_stream(index):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = everything(inputs[index])
        stream.synchronize()
        return found

    for found, wanted in zip(in_threads(on_own_stream), expected, strict=True):
        assert_same(found, wanted)


@needs_two
@pytest.mark.gpu
def test_second_device_while_the_first_is_current():
    leaves = tensors(0, "cuda:0")
    expected = everything(leaves)
    with torch.cuda.device(0):
        found = everything({name: tensor.to("cuda:1") for name, tensor in leaves.items()})
        assert torch.cuda.current_device() == 0
    assert all(tensor.device.index == 1 for tensor in found)
    assert_same([tensor.to("cuda:0") for tensor in found], expected)


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_use_cuda_first(tmp_path, method):
    """A parent that has used the package on the CPU alone leaves CUDA to its children."""
    program = f"""
expected = work()
assert not torch.cuda.is_initialized()
for one, other in zip(elsewhere({method!r}, "cuda"), expected, strict=True):
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=1e-4, rtol=1e-4)
assert not torch.cuda.is_initialized()
"""
    run_module(tmp_path, program)
