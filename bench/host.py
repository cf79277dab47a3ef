"""Host time of a call, by layers: ``python -m bench.host [--json FILE] [--quick]``.

How long the host is busy with a call of each public function, in microseconds, where the kernels are shorter
than their launches: a small image, and nothing waits for the device. By layers, each of which contains the
next:

* the function, without gradients, recorded for them, and together with its backward pass;
* the registered operators that such a call dispatches, called as it calls them;
* the launches of these, of plans that are kept (``kernels/host/launch.py``);
* the same launches by Triton alone, ``kernel[grid](...)``, with every argument there;

and beside them the function with every launch replaced by nothing, and PyTorch's own functions.

Without a GPU the driver is one whose launch does nothing: kernels are compiled for sm_90, and Triton's own
code runs up to the call of the driver. Tensors are then the CPU's, and PyTorch's own functions include what
they compute, of 4 x 4 pixels. With a GPU everything is real.

A figure is the median of several repeats, each the fastest of some batches, as other work only adds.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

import stn_triton as stn
from stn_triton import backend
from stn_triton.kernels.host import configs, launch
from stn_triton.kernels.host.files import replacing

from . import machine

GPU = next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), None)
DEVICE = torch.device("cpu" if GPU is None else GPU)
SHAPE = (2, 3, 4, 4)
# The tile that a GPU gets for a small image of three channels; the host's work is the same for each.
TILE = configs.Tile(rows=8, columns=32, channels=1, unroll=3, warps=4, splits=1, group=1)


# ---------------------------------------------------------------------------------- launching nowhere
class _Utilities:
    """What Triton asks of a driver to load a kernel."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[Any, int, int, int, int]:
        return object(), 1, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: Any) -> None:
        pass


class _Launcher:
    """A launch that does nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class _Driver:
    """Triton's driver of an H100 that is not there."""

    launcher_cls = _Launcher
    utils = _Utilities()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 2000  # Triton keeps kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def launching_nowhere() -> Iterator[None]:
    """Inside, CPU tensors go to compiled kernels, whose launches end where the driver would be called."""
    active = triton.runtime.driver
    before, rule = active._active, configs._interpreter_tile
    launch.forget()
    active.set_active(_Driver())
    try:
        # a rule, not configs.override, which each call would ask for
        configs._interpreter_tile = lambda *problem: TILE
        with backend.use("triton"):
            yield
    finally:
        configs._interpreter_tile = rule
        active.set_active(before)
        launch.forget()


@contextmanager
def without_launches() -> Iterator[None]:
    """Inside, plans do nothing when they are called."""
    call = launch.Plan.__call__
    launch.Plan.__call__ = lambda plan, *tensors: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        launch.Plan.__call__ = call  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------- the cases
class Case(NamedTuple):
    """A call, the tensors it differentiates, and PyTorch's counterpart, where it has one."""

    call: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    rival: Callable[..., Tensor] | None = None


def cases(device: torch.device = DEVICE) -> dict[str, Case]:
    """The public functions by name; gradients are taken by all their tensors."""
    generator = torch.Generator().manual_seed(0)

    def parameter(values: Tensor) -> Tensor:
        return values.to(device).contiguous().requires_grad_()

    n, _, h, w = SHAPE
    image = parameter(torch.randn(SHAPE, generator=generator))
    theta = parameter(torch.eye(2, 3).expand(n, 2, 3))
    homography = parameter(torch.eye(3).expand(n, 3, 3))
    points = parameter(stn.transforms.control_lattice(4).expand(n, 16, 2))
    flow = parameter(torch.zeros(n, 2, h, w))
    grid = parameter(torch.rand(n, h, w, 2, generator=generator) * 2 - 1)
    return {
        "affine_grid_sample": Case(
            stn.affine_grid_sample,
            (image, theta),
            lambda image, theta: F.grid_sample(
                image, F.affine_grid(theta, image.shape, align_corners=False), align_corners=False
            ),
        ),
        "projective_grid_sample": Case(stn.projective_grid_sample, (image, homography)),
        "tps_grid_sample": Case(stn.tps_grid_sample, (image, points)),
        "flow_grid_sample": Case(stn.flow_grid_sample, (image, flow)),
        "grid_sample": Case(
            lambda image, grid: stn.grid_sample(image, grid, align_corners=False),
            (image, grid),
            lambda image, grid: F.grid_sample(image, grid, align_corners=False),
        ),
        "affine_grid": Case(
            lambda theta: stn.affine_grid(theta, SHAPE, align_corners=False),
            (theta,),
            lambda theta: F.affine_grid(theta, SHAPE, align_corners=False),
        ),
        "projective_grid": Case(lambda homography: stn.projective_grid(homography, SHAPE), (homography,)),
        "tps_grid": Case(lambda points: stn.tps_grid(points, SHAPE), (points,)),
    }


# ------------------------------------------------------------------------------------------- measuring
class Effort(NamedTuple):
    repeats: int = 9
    batches: int = 12
    calls: int = 40


def microseconds(function: Callable[[], Any], effort: Effort) -> float:
    """Host time of one call."""
    synchronize = (lambda: None) if DEVICE.type == "cpu" else torch.get_device_module(DEVICE).synchronize
    function()
    found = []
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(effort.repeats):
            fastest = float("inf")
            for _ in range(effort.batches):
                synchronize()
                start = time.perf_counter()
                for _ in range(effort.calls):
                    function()
                fastest = min(fastest, time.perf_counter() - start)
            found.append(fastest / effort.calls * 1e6)
            gc.collect()
    finally:
        if collects:
            gc.enable()
    return statistics.median(found)


class Recorded(NamedTuple):
    """What a call dispatches, and what it launches as plans and as Triton has them."""

    operators: list[tuple[Any, tuple[Any, ...]]]
    plans: list[tuple[launch.Plan, tuple[Tensor, ...]]]
    kernels: list[tuple[Any, int, tuple[Any, ...], dict[str, Any]]]

    def dispatch(self) -> None:
        with torch.no_grad(), torch._C._AutoDispatchBelowADInplaceOrView():
            for operator, arguments in self.operators:
                operator(*arguments)

    def launch(self) -> None:
        for plan, tensors in self.plans:
            plan(*tensors)

    def launch_bare(self) -> None:
        for kernel, programs, arguments, keywords in self.kernels:
            kernel[(programs,)](*arguments, **keywords)


class _Operators(TorchDispatchMode):
    """Notes the package's own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...]]] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name())
        if function.namespace == "stn_triton":
            self.found.append((function, args))
        return function(*args, **(kwargs or {}))


def operators(function: Callable[[], Any]) -> list[str]:
    """The names of all operators that a call dispatches."""
    with _Operators() as mode:
        function()
    return mode.names


def record(function: Callable[[], Any]) -> Recorded:
    plans: list[Any] = []
    kernels: list[Any] = []
    call, runner = launch.Plan.__call__, launch.runner

    def note_plan(plan: launch.Plan, *tensors: Tensor) -> None:
        plans.append((plan, tensors))
        call(plan, *tensors)

    def note_kernel(kernel: Any, programs: int, device: torch.device, *args: Any, **kwargs: Any) -> None:
        kernels.append((kernel, programs, args, kwargs))
        runner(kernel, programs, device, *args, **kwargs)

    launch.Plan.__call__, launch.runner = note_plan, note_kernel  # type: ignore[method-assign, assignment]
    try:
        with _Operators() as mode:
            function()
    finally:
        launch.Plan.__call__, launch.runner = call, runner  # type: ignore[method-assign]
    return Recorded(mode.found, plans, kernels)


def passes(case: Case) -> dict[str, Callable[[], Any]]:
    """A call without gradients, one that is recorded, and one with its backward pass."""
    output = case.call(*case.tensors)
    weights = torch.ones_like(output)
    return {
        "forward, no grad": torch.no_grad()(lambda: case.call(*case.tensors)),
        "forward": lambda: case.call(*case.tensors),
        "forward + backward": lambda: torch.autograd.grad(case.call(*case.tensors), case.tensors, weights),
    }


def measure(case: Case, effort: Effort) -> dict[str, dict[str, float]]:
    """Microseconds by pass and layer."""
    found = {}
    rivals = passes(case._replace(call=case.rival)) if case.rival is not None else {}
    for name, function in passes(case).items():
        function()
        recorded = record(function)
        layers = {
            "function": function,
            "operators": recorded.dispatch,
            "launches": recorded.launch,
            "bare launches": recorded.launch_bare,
        }
        found[name] = {layer: microseconds(call, effort) for layer, call in layers.items()}
        with without_launches():
            found[name]["without launches"] = microseconds(function, effort)
        if name in rivals:
            found[name]["PyTorch"] = microseconds(rivals[name], effort)
    return found


LAYERS = ("function", "operators", "launches", "bare launches", "without launches", "PyTorch")


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [f"{'us per call':24} {'pass':20}" + "".join(f"{layer:>18}" for layer in LAYERS)]
    for function, by_pass in found.items():
        for name, layers in by_pass.items():
            cells = "".join(f"{layers[layer]:18.1f}" if layer in layers else f"{'-':>18}" for layer in LAYERS)
            lines.append(f"{function:24} {name:20}{cells}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ conditions
def conditions() -> dict[str, Any]:
    found = machine.facts(DEVICE)
    if GPU is None:
        found |= {"device": "none", "driver": "launches nothing, sm_90"}
    return found | {
        "processor": _processor(),
        "shape": SHAPE,
        "unit": "microseconds of host time per call",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures and their conditions there"
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="this function alone (may be repeated)"
    )
    options = parser.parse_args()
    if backend.interpreting():
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    effort = Effort(5, 8, 20) if options.quick else Effort()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"conditions": conditions() | effort._asdict(), "results": {}}
    print(", ".join(f"{name} {value}" for name, value in results["conditions"].items()))
    with launching_nowhere() if GPU is None else nullcontext():
        for name, case in cases().items():
            if not options.only or name in options.only:
                results["results"][name] = measure(case, effort)
                print(table({name: results["results"][name]}), flush=True)
                if options.json is not None:  # now: what was measured is kept if the rest is cut off
                    with replacing(options.json) as part:
                        part.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
