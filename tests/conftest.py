"""Where the tests run: on a GPU if there is one, else the same tests through Triton's interpreter."""

import gc
import os

import pytest
import torch

ON_GPU = torch.accelerator.is_available() and torch.accelerator.current_accelerator().type in ("cuda", "xpu")
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
# A pool's processes import PyTorch, which takes longer than what there is to compile.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from bench.interpreter import quick_interpreter  # noqa: E402
from stn_triton import backend  # noqa: E402


def pytest_collection_finish(session):
    """What is imported by now stays: no search for garbage goes through all of that again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    gc.unfreeze()


@pytest.fixture(scope="session")
def device():
    return torch.accelerator.current_accelerator() if ON_GPU else torch.device("cpu")


@pytest.fixture(params=["kernels", "torch"])
def either_backend(request):
    """The test runs on the Triton kernels, then on the operators that stand in for them."""
    if request.param == "torch":
        with backend.use("torch"):
            yield "torch"
    else:
        yield "kernels"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _quick():
    """Tests of memory and of overflow ask for the interpreter's checks themselves."""
    with quick_interpreter(overflow_checks=False):
        yield


@pytest.fixture
def torch_on_one_thread():
    """PyTorch's operators on one thread: quick for what is small, and sums in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with backend.use("torch"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def launched(monkeypatch):
    """The kernels that were launched so far: (name, its keyword arguments)."""
    from stn_triton.kernels.host import launch

    launches = []

    def spy(kernel, *args, **kwargs):
        launches.append((kernel.fn.__name__, kwargs))
        launch.run(kernel, *args, **kwargs)

    monkeypatch.setattr(launch, "runner", spy)
    return launches
