"""The paper's Table 1, distorted MNIST: ``python -m examples.distorted_mnist``, on a CPU with ``--quick``.

Any of the models on any of the distortions, with any seeds. Each run has a folder of its own; a run that is
done is not run again, one that was stopped goes on, and the table shows what there is.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import stn_triton as stn
from examples import models, pictures
from examples.data import DISTORTIONS, Digits, Distortion, Mnist, load_mnist
from examples.training import (
    Config,
    Replicas,
    ReplicaTask,
    Task,
    add_arguments,
    configure,
    processes,
    rank,
    train,
    write_json,
)

PAPER_STEPS = 150_000
PAPER = {  # % error, the mean of three seeds
    "FCN": {"R": 2.1, "RTS": 5.2, "P": 3.1, "E": 3.2, "TC": 13.2},
    "CNN": {"R": 1.2, "RTS": 0.8, "P": 1.5, "E": 1.4, "TC": 3.5},
    "ST-FCN-Aff": {"R": 1.2, "RTS": 0.8, "P": 1.5, "E": 2.7, "TC": 2.0},
    "ST-FCN-Proj": {"R": 1.3, "RTS": 0.9, "P": 1.4, "E": 2.6},
    "ST-FCN-TPS": {"R": 1.1, "RTS": 0.8, "P": 1.4, "E": 2.4},
    "ST-CNN-Aff": {"R": 0.7, "RTS": 0.5, "P": 0.8, "E": 1.2, "TC": 1.7},
    "ST-CNN-Proj": {"R": 0.8, "RTS": 0.6, "P": 0.8, "E": 1.3},
    "ST-CNN-TPS": {"R": 0.7, "RTS": 0.5, "P": 0.8, "E": 1.1},
}
QUICK = Config(
    steps=2_000,
    batch=64,
    optimiser="adam",
    lr=3e-3,
    schedule="cosine",
    localisation_lr=0.5,
    log_every=50,
    evaluate_every=2_000,
    checkpoint_every=100,
    snapshots=20,
)
QUICK_PARAMETERS = 40_000
QUICK_MODELS = "ST-CNN-TPS", "ST-CNN-Aff", "CNN"
TEST_SEED = 2015  # of the test set's distortions, the same for all
SHOWN = 6  # digits in the pictures


class Job(NamedTuple):
    """One entry of the table, of one seed."""

    model: str
    distortion: str
    seed: int

    def __str__(self) -> str:
        return f"{self.model}-{self.distortion}-{self.seed}"


class Classify(Task):
    """Tell distorted digits apart; figures are the test set's error, in %."""

    def __init__(self, mnist: Mnist, distortion: Distortion, seed: int) -> None:
        super().__init__(seed, mnist.train.images.device)
        self.mnist, self.distortion = mnist, distortion

    def batch(self, count: int, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        return self.distortion.batch(self.mnist.train, count, self.generator, part)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        wrong = 0
        for images, labels in distorted_test_set(self.mnist.test, self.distortion):
            wrong += (model(images).argmax(-1) != labels).sum()
        return {"error": 100 * float(wrong) / len(self.mnist.test.labels)}

    def snapshot(self, model: nn.Module) -> Tensor | None:
        """The transformations of the digits in the animation."""
        if not isinstance(model, models.Transformed):
            return None
        return model.transformer.localise(shown_digits(self.mnist.test, self.distortion)).cpu()


def distorted_test_set(
    digits: Digits, distortion: Distortion, size: int = 1000
) -> Iterator[tuple[Tensor, Tensor]]:
    """The distorted test set, images and labels, the same each time."""
    generator = torch.Generator(digits.images.device).manual_seed(TEST_SEED)
    for index in torch.arange(len(digits.labels), device=digits.images.device).split(size):
        yield distortion.apply(digits, index, distortion.draw(len(index), generator)), digits.labels[index]


def shown_digits(
    digits: Digits, distortion: Distortion, label: int | None = None, count: int = SHOWN
) -> Tensor:
    """Of the test set's first distorted digits ``count``, of one label or of as many as there are."""
    images, labels = next(distorted_test_set(digits, distortion))
    if label is not None:
        return images[labels == label][:count]
    kinds = [images[labels == kind][:1] for kind in range(10)]
    return torch.cat(kinds)[:count]


# ---------------------------------------------------------------------------------------------------- runs
def build(job: Job, parameters: int, device: torch.device) -> nn.Module:
    """The job's model; the global generator is left as it was."""
    distortion = DISTORTIONS[job.distortion]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = models.build_classifier(
            job.model, distortion.size, halved=distortion.halved, parameters=parameters
        )
    return model.to(device)


def run(jobs: Sequence[Job], mnist: Mnist, config: Config, parameters: int, output: Path) -> None:
    """Trains one job, or several of the same shape at once, and writes each one's result."""
    device = mnist.train.images.device
    origin = provenance(device)  # before training: the tree may change meanwhile
    nets = [build(job, parameters, device) for job in jobs]
    tasks: list[Task] = [Classify(mnist, DISTORTIONS[job.distortion], job.seed) for job in jobs]
    together = len(jobs) > 1
    folder = output / "runs" / "+".join(map(str, jobs))
    trained = train(
        Replicas(nets) if together else nets[0],
        ReplicaTask(tasks) if together else tasks[0],
        config,
        folder,
        seed=jobs[0].seed,
    )
    if rank() != 0:
        return
    for index, job in enumerate(jobs):
        net = trained.model.replica(index) if isinstance(trained.model, Replicas) else trained.model
        own = output / "runs" / str(job)
        own.mkdir(parents=True, exist_ok=True)
        grids = [(step, kept[index] if together else kept) for step, kept in trained.snapshots]
        torch.save({"model": net.state_dict(), "snapshots": grids}, own / "model.pt")
        result = {
            "job": job._asdict(),
            "error": trained.figures[f"{index}/error" if together else "error"],
            "parameters": models.count(net),
            "seconds": round(trained.seconds, 1),
            "trained_together": len(jobs),
            "data": mnist.train.source,
            "config": asdict(config),
            **origin,
        }
        write_json(own / "result.json", result)


def provenance(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{_cpu_model()}, {torch.get_num_threads()} threads"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    return {
        "machine": machine,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "stn_triton": stn.__version__,
        "commit": commit or "unknown",
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "CPU")


def pending(jobs: Sequence[Job], output: Path, together: bool) -> list[list[Job]]:
    """The jobs without a result, those of one shape in one group if they are to train together."""
    left = [job for job in jobs if not (output / "runs" / str(job) / "result.json").exists()]
    if not together:
        return [[job] for job in left]
    groups: dict[tuple[str, int, bool], list[Job]] = defaultdict(list)
    for job in left:
        distortion = DISTORTIONS[job.distortion]
        groups[job.model, distortion.size, distortion.halved].append(job)
    return list(groups.values())


# --------------------------------------------------------------------------------------------------- table
def results(output: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(output.glob("runs/*/result.json"))]


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: what was measured, beside the paper's figures."""
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for result in found:
        errors[result["job"]["model"], result["job"]["distortion"]].append(result["error"])
    columns = [name for name in DISTORTIONS if any(distortion == name for _, distortion in errors)]
    lines = [
        "| % error (the paper's) | parameters | " + " | ".join(columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for model in models.NAMES:
        sizes = sorted(result["parameters"] for result in found if result["job"]["model"] == model)
        if not sizes:
            continue
        cells = []
        for name in columns:
            values, its = errors[model, name], PAPER[model].get(name, "-")
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread} ({its})" if values else f"- ({its})")
        size = f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"
        lines.append(f"| {model} | {size} | " + " | ".join(cells) + " |")
    steps = sorted({(result["config"]["steps"], result["config"]["batch"]) for result in found})
    seeds = sorted({result["job"]["seed"] for result in found})
    said = ", ".join(f"{count:,} iterations of {batch}" for count, batch in steps)
    notes = [f"Run: {said}; seeds {', '.join(map(str, seeds))}. Mean ± standard deviation over the seeds."]
    if steps[0][0] < PAPER_STEPS:
        notes.append(
            f"**Run short of the paper's schedule** ({PAPER_STEPS:,} iterations of 256, three seeds)."
        )
    if any(result["data"] != "MNIST" for result in found):
        notes.append("**The digits are a stand-in, not MNIST.**")
    for key in ("machine", "torch", "commit"):
        notes.append(f"{key}: {', '.join(sorted({result[key] for result in found}))}.")
    seconds = sum(result["seconds"] / result["trained_together"] for result in found)
    notes.append(f"Training took {seconds / 60:.1f} minutes in all.")
    return "\n".join([*lines, "", *(f"* {note}" for note in notes), ""])


def write_results(output: Path, mnist: Mnist, parameters: int) -> None:
    """table.md and table.json; of the transformers of one distortion, the first there is, a picture and an
    animation."""
    found = results(output)
    (output / "table.md").write_text(table(found))
    write_json(output / "table.json", found)
    jobs = [Job(**result["job"]) for result in found]
    jobs = [job for job in jobs if job.model.startswith("ST")]
    if not jobs:
        return
    name = next(name for name in DISTORTIONS if any(job.distortion == name for job in jobs))
    first = {job.model: job for job in reversed(jobs) if job.distortion == name}
    shown = [first[model] for model in models.NAMES if model in first]
    distortion, device = DISTORTIONS[name], mnist.test.images.device
    rows, animated = [], []
    for job in shown:
        kept = torch.load(output / "runs" / str(job) / "model.pt", map_location=device, weights_only=True)
        net = build(job, parameters, device).eval()
        net.load_state_dict(kept["model"])
        rows.append((job.model, net.transformer))
        animated.append((job.model, net.transformer, [(step, its.cpu()) for step, its in kept["snapshots"]]))
    one = shown_digits(mnist.test, distortion, label=4)
    several = shown_digits(mnist.test, distortion)
    averaged = shown_digits(mnist.test, distortion, label=4, count=100)
    pictures.draw_transformers(one, several, averaged, rows, output / "picture.png")
    pictures.animate(several, animated, output / "training.gif")


# ------------------------------------------------------------------------------------------- command line
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.distorted_mnist", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("--quick", action="store_true", help="minutes on a CPU: small nets, 2,000 iterations")
    parser.add_argument(
        "--models", nargs="+", choices=models.NAMES, metavar="MODEL", help=f"of {models.NAMES}"
    )
    parser.add_argument("--distortions", nargs="+", choices=DISTORTIONS, help="default: R RTS P E")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2")
    parser.add_argument("--parameters", type=int, help=f"of each model, about; default: {models.PARAMETERS}")
    parser.add_argument("--together", action="store_true", help="train all of one shape at once")
    parser.add_argument("--data", type=Path, help="folder of MNIST's four IDX files; default: download")
    parser.add_argument("--stand-in", action="store_true", help="the folder's digits are others; say so")
    parser.add_argument("--output", type=Path, help="default: build/distorted_mnist, with -quick if it is")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    quick = options.quick
    config = configure(QUICK if quick else Config(), options)
    names = options.models or (QUICK_MODELS if quick else models.NAMES)
    distortions = options.distortions or (["RTS"] if quick else ["R", "RTS", "P", "E"])
    seeds = options.seeds or ([0] if quick else [0, 1, 2])
    parameters = options.parameters or (QUICK_PARAMETERS if quick else models.PARAMETERS)
    output = options.output or Path("build") / ("distorted_mnist-quick" if quick else "distorted_mnist")
    jobs = [Job(*job) for job in ((m, d, s) for s in seeds for d in distortions for m in names)]

    with processes(options.device) as device:
        mnist = load_mnist(options.data, device, stand_in=options.stand_in)
        for group in pending(jobs, output, options.together):
            if rank() == 0:
                sizes = {models.count(build(job, parameters, device)) for job in group}
                print(f"{', '.join(map(str, group))}: {max(sizes):,} parameters", flush=True)
            run(group, mnist, config, parameters, output)
        if rank() == 0:
            write_results(output, mnist, parameters)
            print((output / "table.md").read_text())
            print(f"in {output}: " + ", ".join(sorted(path.name for path in output.iterdir())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
