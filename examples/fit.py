"""The steps of the smaller experiments: one loop on one device, seeded, with the paper's kind of schedule."""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from stn_triton.nn import SpatialTransformer


@dataclass(frozen=True)
class Schedule:
    """SGD or Adam at a rate that is divided by ten every so many iterations."""

    iterations: int
    batch: int
    rate: float
    divide_every: int  # iterations
    optimiser: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.0  # of SGD
    weight_decay: float = 0.0
    localisation_rate: float = 1.0  # of what transformers learn by, times the rate

    def rate_at(self, iteration: int) -> float:
        return self.rate * 0.1 ** (iteration // self.divide_every)


class Progress(NamedTuple):
    losses: Tensor  # (iterations,)
    seconds: float


def fit(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    schedule: Schedule,
    name: str,
    watch: Callable[[int], None] | None = None,
) -> Progress:
    """Trains in place.

    Args:
        model: whose parameters are trained, if they require gradients. Their rate is the schedule's, but for those
            of spatial transformers.
        loss_of: makes the batch of an iteration, runs the model, returns the mean loss.
        schedule: of the optimiser.
        name: of the progress bar, which is there if tqdm is.
        watch: called before each iteration.
    """
    looking = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, SpatialTransformer)
        for parameter in module.parameters()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in looking], "times": 1.0},
        {"params": [p for p in trained if id(p) in looking], "times": schedule.localisation_rate},
    ]
    groups = [group for group in groups if group["params"]]
    optimiser: torch.optim.Optimizer
    if schedule.optimiser == "sgd":
        optimiser = torch.optim.SGD(
            groups, schedule.rate, momentum=schedule.momentum, weight_decay=schedule.weight_decay
        )
    else:
        optimiser = torch.optim.Adam(groups, schedule.rate, weight_decay=schedule.weight_decay)
    losses = torch.full((schedule.iterations,), math.nan, device=trained[0].device)
    start = time.perf_counter()
    for iteration in progress_bar(range(schedule.iterations), name):
        if watch is not None:
            watch(iteration)
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate_at(iteration) * group["times"]
        loss = loss_of(iteration)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses[iteration] = loss.detach()
    return Progress(losses.cpu(), time.perf_counter() - start)


def progress_bar(iterations: range, name: str) -> Iterator[int]:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return iter(iterations)
    return iter(tqdm(iterations, desc=name, mininterval=1.0, leave=False, disable=None))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """Weights and dropout from ``seed``, PyTorch's own generators left as they were; a generator for the rest."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield torch.Generator(device).manual_seed(seed)


@torch.no_grad()
def share_wrong(
    model: nn.Module,
    parts: Iterator[tuple[Tensor, Tensor]],
    wrong: Callable[[Tensor, Tensor], Tensor] = lambda logits, labels: logits.argmax(-1) != labels,
) -> float:
    """In %, in evaluation mode, over batches of inputs and targets."""
    training = model.training
    model.eval()
    found = torch.cat([wrong(model(inputs), targets) for inputs, targets in parts])
    model.train(training)
    return 100 * found.double().mean().item()


def device_of(name: str | None) -> torch.device:
    """As named, else the GPU if there is one."""
    if name:
        return torch.device(name)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found if found is not None and found.type in ("cuda", "xpu") else torch.device("cpu")


def arguments_of(parser: argparse.ArgumentParser, schedule: Schedule) -> None:
    """Adds the schedule's fields, and what all examples take."""
    for field in dataclasses.fields(Schedule):
        default = getattr(schedule, field.name)
        choices = ["sgd", "adam"] if field.name == "optimiser" else None
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(default),
            choices=choices,
            help=f"default: {default}",
        )
    parser.add_argument("--quick", action="store_true", help="minutes on a CPU: settings of its own")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--data", help="a folder of MNIST's four IDX files; default: had for you, and kept")
    parser.add_argument("--stand-in", action="store_true", help="--data are other digits, and results say so")
    parser.add_argument("--output", default="build/examples", help="folder of the table and the picture")
    parser.add_argument("--seeds", type=int, default=1, help="how many models of each kind")


def schedule_of(options: argparse.Namespace, paper: Schedule, quick: Schedule) -> Schedule:
    """The paper's or the quick one, with what the command line names in its place."""
    named = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(Schedule)
        if getattr(options, field.name) is not None
    }
    return dataclasses.replace(quick if options.quick else paper, **named)
