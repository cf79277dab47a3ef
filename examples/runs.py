"""What small experiments share beside the training loop: options, seeds, a model's line in a table."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from examples.models import count
from examples.outputs import Line, origin
from examples.training import Config, Task, Trained, add_arguments, configure, train


class Runs(NamedTuple):
    """One model's, with one seed after the other."""

    line: Line
    models: list[nn.Module]  # in evaluation mode
    kept: list[list[tuple[int, Any]]]  # steps and snapshots

    @property
    def model(self) -> nn.Module:
        """The last one."""
        return self.models[-1]

    @property
    def snapshots(self) -> list[tuple[int, Any]]:
        """The last one's."""
        return self.kept[-1]


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """With the options that all experiments have, and the training loop's."""
    first = (description or "").partition(":")[0]
    parser = argparse.ArgumentParser(prog=f"python -m examples.{name}", description=first)
    parser.add_argument("--quick", action="store_true", help="settings for minutes on a CPU")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--data", help="a folder of MNIST's four IDX files; default: fetched, and kept")
    parser.add_argument("--stand-in", action="store_true", help="--data are other digits, and results say so")
    parser.add_argument("--output", type=Path, help=f"default: build/{name}, with -quick if it is")
    parser.add_argument("--seeds", type=positive, default=1, help="how many models of each kind")
    add_arguments(parser)
    parser.set_defaults(experiment=name)
    return parser


def positive(text: str) -> int:
    """An option's type: an int, 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def config_of(options: argparse.Namespace, paper: Config, quick: Config) -> Config:
    """How to train; fills in the folder of the output if none is named."""
    if options.output is None:
        options.output = Path("build") / (options.experiment + ("-quick" if options.quick else ""))
    return configure(quick if options.quick else paper, options)


def run_seeds(
    name: str,
    build: Callable[[], nn.Module],
    make_task: Callable[[int], Task],
    config: Config,
    options: argparse.Namespace,
    device: torch.device,
    settings: Mapping[str, Any],
    *,
    figure: str = "error",
    paper: str = "-",
) -> Runs:
    """Trains a model for each seed, in a folder of its own under the output, from where it was left there.

    Args:
        name: of the model, in the table and of the folder.
        build: a model in its initial state, on the CPU; drawn from PyTorch's generator.
        make_task: a seed's task.
        config, options: see :func:`config_of` and :func:`parser_of`.
        settings: what else decides the numbers, the data's source among it; see :func:`training.train`.
        figure: which of the task's figures goes to the table.
        paper: the paper's.
    """
    origin(device)
    found: list[Trained] = []
    for seed in range(options.seeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build().to(device)
        folder = options.output / "runs" / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{seed}"
        found.append(train(model, make_task(seed), config, folder, seed=seed, settings=settings))
    values = [trained.figures[figure] for trained in found]
    seconds = sum(trained.seconds for trained in found) / len(found)
    figures = [trained.figures for trained in found]
    line = Line(name, values, paper, count(model), seconds, figures, config.warm_up)
    return Runs(line, [trained.model for trained in found], [trained.snapshots for trained in found])


def wrong_class(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(-1) != labels


def error(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    wrong: Callable[[Tensor, Tensor], Tensor] = wrong_class,
) -> float:
    """% wrong over batches of inputs and targets, of a model in evaluation mode."""
    found = torch.cat([wrong(model(inputs), targets) for inputs, targets in batches])
    return 100 * found.double().mean().item()


def sizes(total: int, at_most: int) -> Sequence[int]:
    """Parts of a test set."""
    return [min(at_most, total - start) for start in range(0, total, at_most)]
