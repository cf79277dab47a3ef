"""One training loop for all examples.

A :class:`Task` makes batches on the device and says what is lost; :func:`train` does the rest: schedule, log,
checkpoints, mixed precision, ``torch.compile``, CUDA graphs, several processes. A run that was killed goes on
from its last checkpoint, and ends as it would have ended: the generators' states are in there too.

:class:`Replicas` makes one model of many small ones of the same shape, which train at once. For several
processes: ``torchrun --nproc-per-node 2 -m examples.NAME ...``; each makes its part of the batch.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call, stack_module_state

from examples.files import load, reading, replacing

# ---------------------------------------------------------------------------------------------- settings
Optimiser = Literal["sgd", "adam"]
Schedule = Literal["steps", "cosine"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass
class Config:
    """How to train. The defaults are the paper's for MNIST."""

    steps: int = 150_000
    batch: int = 256  # over all processes
    optimiser: Optimiser = "sgd"
    lr: float = 0.01
    momentum: float = 0.0  # of SGD
    weight_decay: float = 0.0
    schedule: Schedule = "steps"  # divided by lr_divisor every lr_every; or to 0 along half a cosine
    lr_every: int = 50_000
    lr_divisor: float = 10.0
    localisation_lr: float = 1.0  # the transformers' learning rate, as a multiple of the others'
    warm_up: float = 0.0  # the share of the steps over which a task's distortions grow from none
    precision: Precision = "float32"
    compile: bool = False
    cuda_graph: bool = False  # the whole step, captured
    deterministic: bool = True  # where PyTorch has an operator that is
    log_every: int = 500
    evaluate_every: int = 10_000
    checkpoint_every: int = 5_000
    snapshots: int = 40  # of the transformer's grids, for the animation; more of them early on
    tensorboard: bool = False  # beside the CSV; needs that package

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "lr_every", "log_every", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("lr", "momentum", "weight_decay", "localisation_lr", "snapshots"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.lr_divisor > 0:
            raise ValueError(f"lr_divisor must be positive, got {self.lr_divisor}")
        if not 0 <= self.warm_up <= 1:
            raise ValueError(f"warm_up must be from 0 to 1, got {self.warm_up}")

    def lr_at(self, step: int) -> float:
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr / self.lr_divisor ** (step // self.lr_every)

    def strength_at(self, step: int) -> float:
        """Of the distortions, from 0 to 1."""
        return min(1.0, step / (self.warm_up * self.steps)) if self.warm_up else 1.0

    def snapshot_steps(self) -> set[int]:
        """From 0 to the end, at the squares of even steps."""
        last = max(self.snapshots - 1, 1)
        return {round(self.steps * (k / last) ** 2) for k in range(self.snapshots)}


def add_arguments(parser: argparse.ArgumentParser, config: type[Config] = Config) -> None:
    """An option for each field; those not given are None, and :func:`configure` leaves them."""
    group = parser.add_argument_group("training (the defaults are the paper's)")
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        name, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        shown = f"default: {field.default}"
        if kind is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, help=shown)
        elif get_args(kind):
            group.add_argument(name, choices=get_args(kind), help=shown)
        else:
            group.add_argument(name, type=kind, metavar=kind.__name__, help=shown)


def configure(config: Config, options: argparse.Namespace) -> Config:
    """The config with the command line's options in place of its own."""
    fields = (field.name for field in dataclasses.fields(config))
    given = {name: getattr(options, name) for name in fields if getattr(options, name, None) is not None}
    return dataclasses.replace(config, **given)


# ------------------------------------------------------------------------------------------------- tasks
class Task:
    """What is to be learned. Whatever is drawn at random for training comes from :attr:`generator`, distorted
    as far as :attr:`strength` says, which the loop raises from 0 to 1 during ``Config.warm_up``."""

    def __init__(self, seed: int, device: torch.device | str) -> None:
        self.generator = Generator(device).manual_seed(seed)
        self.strength = torch.ones((), device=device)  # a tensor, so that a CUDA graph reads its value

    @property
    def generators(self) -> list[Generator]:
        return [self.generator]

    def batch(self, count: int, part: slice = slice(None)) -> tuple[Tensor, Any]:
        """The model's input and the target, both for a part of a batch of ``count``."""
        raise NotImplementedError

    def loss(self, output: Any, target: Any) -> Tensor:
        """A scalar, the mean over the batch."""
        return F.cross_entropy(output.float(), target)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Named figures of a model in evaluation mode; called without gradients. May be slow."""
        return {}

    def snapshot(self, model: nn.Module) -> Any:
        """What the animation needs of a model: None, a tensor on the CPU, or a list of such."""
        return None


class Replicas(nn.Module):
    """R models of the same shape as one, whose parameters have a first dimension R.

    (R, N, ...) -> (R, N, ...). Optimisers that treat entries one by one, as SGD and Adam do, train each as if
    it were alone; in float16, but for the steps that are left out, which are left out by all. Layers that
    write to their buffers, as batch norm does, are not supported.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        parameters, buffers = stack_module_state(list(models))
        self.module = copy.deepcopy(models[0])
        self.count = len(models)
        for name, value in [*parameters.items(), *buffers.items()]:
            path, _, leaf = name.rpartition(".")
            owner = self.module.get_submodule(path)
            if name in parameters:
                value = nn.Parameter(value.detach())
            setattr(owner, leaf, value)

    def forward(self, input: Tensor) -> Any:
        state = dict(self.module.named_parameters()), dict(self.module.named_buffers())
        return torch.vmap(self._one, randomness="different")(*state, input)

    def _one(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], input: Tensor) -> Any:
        return functional_call(self.module, (parameters, buffers), (input,))

    def replica(self, index: int) -> nn.Module:
        """A copy of one of the models."""
        model = copy.deepcopy(self.module)
        for owner in model.modules():
            for values in (owner._parameters, owner._buffers):
                for name, value in values.items():
                    if value is not None:
                        one = value.detach()[index].clone()
                        values[name] = nn.Parameter(one) if isinstance(value, nn.Parameter) else one
        return model


class ReplicaTask(Task):
    """A task for each of :class:`Replicas`; each draws from its own generator what it would draw alone."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = list(tasks)
        self.strength = self.tasks[0].strength
        for task in self.tasks:
            task.strength = self.strength

    @property
    def generators(self) -> list[Generator]:
        return [generator for task in self.tasks for generator in task.generators]

    def batch(self, count: int, part: slice = slice(None)) -> tuple[Tensor, list[Any]]:
        inputs, targets = zip(*(task.batch(count, part) for task in self.tasks))
        return torch.stack(inputs), list(targets)

    def loss(self, output: Any, target: list[Any]) -> Tensor:
        """The sum, so that each replica's gradient is its own."""
        losses = [task.loss(one, its) for task, one, its in zip(self.tasks, output, target)]
        return torch.stack(losses).sum()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The figures of replica i as i/NAME."""
        assert isinstance(model, Replicas)
        return {
            f"{index}/{name}": value
            for index, task in enumerate(self.tasks)
            for name, value in task.evaluate(model.replica(index).eval()).items()
        }

    def snapshot(self, model: nn.Module) -> list[Any]:
        assert isinstance(model, Replicas)
        return [task.snapshot(model.replica(index).eval()) for index, task in enumerate(self.tasks)]


# ----------------------------------------------------------------------------------------------- processes
def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def processes(device: str | None = None) -> Iterator[torch.device]:
    """The device of this process; under torchrun its process group is open inside.

    Args:
        device: default: the accelerator if there is one, else the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products need on CUDA
    if "RANK" not in os.environ:
        yield chosen
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ training
class Trained(NamedTuple):
    model: nn.Module
    history: list[dict[str, float]]  # step, loss, lr, and what the task evaluates, where it did
    snapshots: list[tuple[int, Any]]  # step, and what the task kept
    seconds: float  # of training, over all resumptions

    @property
    def figures(self) -> dict[str, float]:
        """The last evaluation's."""
        return {name: value for name, value in self.history[-1].items() if name not in _OWN}


_OWN = ("step", "loss", "lr")


def train(
    model: nn.Module,
    task: Task,
    config: Config,
    folder: Path,
    *,
    seed: int = 0,
    progress: bool = True,
    stop_after: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Trained:
    """Trains a model, in place, from the folder's checkpoint if it has one.

    Args:
        model: on the device it is to be trained on, with no lazy layers.
        task: what it learns.
        config: how.
        folder: for ``checkpoint.pt`` and ``log.csv``; one for each run.
        seed: of what the model draws itself (dropout). PyTorch's own generators are left as they were.
        progress: shows a bar.
        stop_after: leave after this step, with a checkpoint: a run in pieces.
        settings: what else decides the numbers, of the model and the task: numbers and words, by name. A
            checkpoint is gone on from if it is of the same.

    Raises:
        ValueError: the settings do not go together, or the checkpoint is of other settings.
        DataError: the checkpoint is damaged; the model is left as it was.
    """
    if config.batch % world_size():
        raise ValueError(f"batch must be divisible by {world_size()} processes, got {config.batch}")
    device = next(model.parameters()).device
    if config.cuda_graph and (
        device.type != "cuda"
        or config.schedule != "steps"
        or config.precision == "float16"
        or world_size() > 1
    ):
        raise ValueError(
            "cuda_graph needs one CUDA device, schedule 'steps', and a precision without loss scaling"
        )
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _determinism(config.deterministic):
        torch.manual_seed(seed + 1_000_003 * rank())
        return _Run(model, task, config, folder, device, settings or {}).run(progress, stop_after)


class _Run:
    """The state of a run, which is what a checkpoint holds, and the loop."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: Config,
        folder: Path,
        device: torch.device,
        settings: Mapping[str, Any],
    ) -> None:
        self.settings = dataclasses.asdict(config) | {"processes": world_size()} | dict(settings)
        self.model, self.task, self.config, self.folder, self.device = model, task, config, folder, device
        self.optimiser = _make_optimiser(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.step = 0
        self.seconds = 0.0
        self.running = torch.zeros((), device=device)  # the sum of the losses since the last line of the log
        self.history: list[dict[str, float]] = []
        self.snapshots: list[tuple[int, Any]] = []
        self.board: Any = None
        share = config.batch // world_size()
        self.part = slice(rank() * share, (rank() + 1) * share)
        self._resume()
        called: Any = model
        if world_size() > 1:
            ids = [device] if device.type == "cuda" else None
            called = nn.parallel.DistributedDataParallel(model, device_ids=ids)
        self.called: Callable[[Tensor], Any] = torch.compile(called) if config.compile else called

    def run(self, progress: bool, stop_after: int | None) -> Trained:
        config, marks = self.config, self.config.snapshot_steps()
        last = config.steps if stop_after is None else min(stop_after, config.steps)
        bar = _progress_bar(progress, self.step, last)
        if config.tensorboard and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        advance = _Captured(self) if config.cuda_graph else self.update
        started = time.perf_counter() - self.seconds
        if self.step == 0 and 0 in marks:
            self._snapshot()
        self.model.train()
        while self.step < last:
            lr = config.lr_at(self.step)
            for group in self.optimiser.param_groups:
                group["lr"] = lr * group["factor"]
            self.task.strength.fill_(config.strength_at(self.step))
            self.running += advance()
            self.step += 1
            ended = self.step == config.steps
            evaluating = ended or self.step % config.evaluate_every == 0
            if evaluating or self.step % config.log_every == 0:
                self._log(lr, evaluating)
                bar.set_postfix(loss=f"{self.history[-1]['loss']:.3f}")
            if self.step in marks:
                self._snapshot()
            bar.update()
            if ended or self.step == last or self.step % config.checkpoint_every == 0:
                self.seconds = time.perf_counter() - started
                self._save()
        bar.close()
        if self.board is not None:
            self.board.close()
        self.model.eval()
        return Trained(self.model, self.history, self.snapshots, self.seconds)

    def update(self) -> Tensor:
        """One step; the loss."""
        self.optimiser.zero_grad(set_to_none=True)
        input, target = self.task.batch(self.config.batch, self.part)
        precision = getattr(torch, self.config.precision)
        with torch.autocast(self.device.type, precision, enabled=precision != torch.float32):
            output = self.called(input)
        loss = self.task.loss(output, target)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return loss.detach()

    def _log(self, lr: float, evaluating: bool) -> None:
        since = self.step - (self.history[-1]["step"] if self.history else 0)
        if world_size() > 1:
            dist.all_reduce(self.running)
        line = {"step": self.step, "loss": self.running.item() / since / world_size(), "lr": lr}
        self.running.zero_()
        if evaluating:
            self.model.eval()
            with torch.no_grad():
                line.update(self.task.evaluate(self.model))
            self.model.train()
        self.history.append(line)
        if rank() == 0:
            names = list(dict.fromkeys(name for entry in self.history for name in entry))
            with replacing(self.folder / "log.csv") as path, path.open("w", newline="") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(self.history)
        if self.board is not None:
            for name in line.keys() - {"step"}:
                self.board.add_scalar(name, line[name], self.step)

    def _snapshot(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.snapshots.append((self.step, self.task.snapshot(self.model)))
        self.model.train()

    # ----------------------------------------------------------------------------------------- checkpoints
    def _save(self) -> None:
        own = {
            "task": [generator.get_state() for generator in self.task.generators],
            "cpu": torch.get_rng_state(),
            "device": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        states = [own]
        if world_size() > 1:
            states = [{} for _ in range(world_size())]
            dist.all_gather_object(states, own)
        if rank() == 0:
            state = {
                "settings": self.settings,
                "step": self.step,
                "seconds": self.seconds,
                "running": self.running,
                "history": self.history,
                "snapshots": self.snapshots,
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "scaler": self.scaler.state_dict(),
                "generators": states,
            }
            with replacing(self.folder / "checkpoint.pt") as path:
                torch.save(state, path)
        if world_size() > 1:
            dist.barrier()

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        remedy = "Delete it to begin anew, or name another --output"
        state = load(path, remedy, map_location=self.device)
        with reading(path, remedy):
            theirs, ours = state["settings"], self.settings
            other = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
        if other:
            said = ", ".join(f"{name} {theirs.get(name)}, now {ours.get(name)}" for name in other)
            raise ValueError(
                f"{path} is of a run with other settings ({said}): name another --output, or delete it"
            )
        with reading(path, remedy):
            self._take(state)

    def _take(self, state: dict[str, Any]) -> None:
        _need_types(state, self.config)
        own = state["generators"][rank()]
        snapshots = [(step, _to_cpu(kept)) for step, kept in state["snapshots"]]
        before = copy.deepcopy(self.model.state_dict())
        try:
            self.model.load_state_dict(state["model"])
            _load_optimiser(self.optimiser, state["optimiser"])
            self.scaler.load_state_dict(state["scaler"])
            self.running.copy_(state["running"])
            for generator, its in zip(self.task.generators, own["task"], strict=True):
                generator.set_state(its.cpu())
            torch.set_rng_state(own["cpu"].cpu())
            if own["device"] is not None:
                torch.cuda.set_rng_state(own["device"].cpu(), self.device)
            self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
            self.snapshots = snapshots
        except BaseException:
            self.model.load_state_dict(before)  # the caller's, who may go on without the file
            raise


def _need_types(state: dict[str, Any], config: Config) -> None:
    """
    Raises:
        TypeError, ValueError: the loop would stumble over what a checkpoint says.
    """
    step, history = state["step"], state["history"]
    if type(step) is not int or not 0 <= step <= config.steps:
        raise ValueError(f"its step is {step!r}, of {config.steps}")
    if type(state["seconds"]) not in (int, float):
        raise TypeError(f"its seconds are {state['seconds']!r}")
    for line in history if isinstance(history, list) else [history]:
        values = line.values() if isinstance(line, dict) and line.keys() >= set(_OWN) else [None]
        if not all(type(value) in (int, float) for value in values):
            raise TypeError(f"its history has the line {line!r}")
    for at, _ in state["snapshots"]:
        if type(at) is not int:
            raise TypeError(f"it has a snapshot of step {at!r}")


def _load_optimiser(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """
    Raises:
        Exception: the state is of another optimiser, or damaged.
    """
    before = [dict(group) for group in optimiser.param_groups]
    optimiser.load_state_dict(state)
    for ours, theirs in zip(before, optimiser.param_groups):
        for name in ours.keys() & theirs.keys():
            if type(ours[name]) is not type(theirs[name]):
                raise TypeError(f"its optimiser's {name} is {theirs[name]!r}")
    for parameter, its in optimiser.state.items():
        for name, value in its.items():
            if value is not None and not (
                isinstance(value, Tensor) and (not value.dim() or value.shape == parameter.shape)
            ):
                raise TypeError(f"its optimiser's {name} do not fit the parameters")


class _Captured:
    """:meth:`_Run.update` as a CUDA graph, batch and optimiser included; captured anew when the learning rate
    changes, which is a constant to the graph. The first steps warm up, outside of it."""

    WARM_UP = 3

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.graph: torch.cuda.CUDAGraph | None = None
        self.steps, self.lr = 0, float("nan")
        self.loss = run.running

    def __call__(self) -> Tensor:
        lr = self.run.optimiser.param_groups[0]["lr"]
        self.steps += 1
        if self.steps <= self.WARM_UP:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                loss = self.run.update()
            torch.cuda.current_stream().wait_stream(stream)
            return loss
        if lr != self.lr:
            self.lr = lr
            self.run.optimiser.zero_grad(set_to_none=True)
            self.graph = torch.cuda.CUDAGraph()
            for generator in self.run.task.generators:
                self.graph.register_generator_state(generator)
            with torch.cuda.graph(self.graph):
                self.loss = self.run.update()
        assert self.graph is not None
        self.graph.replay()
        return self.loss


def _make_optimiser(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    localisation, others = [], []
    for name, parameter in model.named_parameters():
        inside = {"localisation", "regression"} & set(name.split("."))
        (localisation if inside else others).append(parameter)
    groups = [
        {"params": others, "factor": 1.0},
        {"params": localisation, "factor": config.localisation_lr},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimiser == "adam":
        capturable = config.cuda_graph
        return torch.optim.Adam(groups, config.lr, weight_decay=config.weight_decay, capturable=capturable)
    return torch.optim.SGD(groups, config.lr, config.momentum, weight_decay=config.weight_decay)


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _to_cpu(kept: Any) -> Any:
    if isinstance(kept, Tensor):
        return kept.cpu()
    return [_to_cpu(one) for one in kept] if isinstance(kept, list) else kept


class _NoBar:
    def update(self) -> None: ...
    def close(self) -> None: ...
    def set_postfix(self, **values: str) -> None: ...


def _progress_bar(wanted: bool, start: int, total: int) -> Any:
    if not wanted or rank() != 0:
        return _NoBar()
    try:
        from tqdm import tqdm
    except ImportError:  # an extra
        return _NoBar()
    return tqdm(total=total, initial=start, unit="step", mininterval=1.0)
