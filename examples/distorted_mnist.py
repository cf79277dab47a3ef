"""The paper's Table 1, distorted MNIST: ``python -m examples.distorted_mnist``, on a CPU with ``--quick``.

Any of the models on any of the distortions, with any seeds. Each run has a folder of its own; a run that is
done is not run again, one that was stopped goes on, and the table shows what there is.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.machine import facts
from examples import models
from examples.data import DISTORTIONS, Digits, Distortion, Mnist, Similar, load_mnist
from examples.files import load, read_json, reading, replacing, write_json, write_text
from examples.outputs import Panel, save_animation, save_picture, warmed_up
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
)
from stn_triton.nn import SpatialTransformer
from stn_triton.transforms import compose

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
QUICK_MODELS = "ST-CNN-TPS", "ST-CNN-Aff", "CNN"
FACTS = {
    "Device": "device",
    "Cores": "host_cores",
    "PyTorch": "torch",
    "Triton": "triton",
    "Commit": "commit",
}
RESULT: dict[str, Any] = {  # what a result tells
    "job": dict,
    "error": (int, float),
    "parameters": int,
    "budget": int,
    "seconds": (int, float),
    "trained_together": int,
    "data": str,
    "config": dict,
    "facts": dict,
}
REMEDY = "Delete its folder, and the model is trained again"
TEST_SEED = 2015  # of the test set's distortions, the same for all
SHOWN = 6  # digits in the pictures
SHOWN_LABEL = 3  # of some of them


class Job(NamedTuple):
    """One entry of the table, of one seed."""

    model: str
    distortion: str
    seed: int

    def __str__(self) -> str:
        return f"{self.model}-{self.distortion}-{self.seed}"


class Settings(NamedTuple):
    """How one model is built and trained."""

    config: Config
    parameters: int  # about


def paper_settings(model: str) -> Settings:
    return Settings(Config(), models.PARAMETERS)


def quick_settings(model: str) -> Settings:
    """For minutes on a CPU. Convolutions cost the most there, so nets that have them are small.

    For a transformer the distortions grow from none: while digits are nearly upright the classifier comes to
    want them so, and then has the transformer follow. Seeing all angles from the start it never does. Plain
    nets gain nothing by it.
    """
    connected, plain = "FCN" in model, not model.startswith("ST")
    config = Config(
        steps=6_000,
        batch=64,
        optimiser="adam",
        lr=1e-3 if connected else 3e-3,
        schedule="cosine",
        warm_up=0.0 if plain else 0.2,
        log_every=50,
        evaluate_every=1_000,
        checkpoint_every=100,
        snapshots=20,
    )
    return Settings(config, models.PARAMETERS if connected else models.PARAMETERS // 10)


class Classify(Task):
    """Tell distorted digits apart; figures are the test set's error, in %."""

    def __init__(self, mnist: Mnist, distortion: Distortion, seed: int) -> None:
        super().__init__(seed, mnist.train.images.device)
        self.mnist, self.distortion = mnist, distortion

    def batch(self, count: int, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        return self.distortion.batch(self.mnist.train, count, self.generator, part, self.strength)

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


def run(jobs: Sequence[Job], mnist: Mnist, settings: Settings, output: Path) -> None:
    """Trains one job, or several of one model and one size of canvas at once, and writes their results."""
    config, parameters = settings
    device = mnist.train.images.device
    origin = facts(device)  # before training: the tree may change meanwhile
    nets = [build(job, parameters, device) for job in jobs]
    tasks: list[Task] = [Classify(mnist, DISTORTIONS[job.distortion], job.seed) for job in jobs]
    together = len(jobs) > 1
    folder = output / "runs" / (_group_name(jobs) if together else str(jobs[0]))
    trained = train(
        Replicas(nets) if together else nets[0],
        ReplicaTask(tasks) if together else tasks[0],
        config,
        folder,
        seed=jobs[0].seed,
        settings={"parameters": parameters, "data": mnist.train.source},
    )
    if rank() != 0:
        return
    for index, job in enumerate(jobs):
        net = trained.model.replica(index) if isinstance(trained.model, Replicas) else trained.model
        own = output / "runs" / str(job)
        grids = [(step, kept[index] if together else kept) for step, kept in trained.snapshots]
        with replacing(own / "model.pt") as part:
            torch.save({"model": net.state_dict(), "snapshots": grids}, part)
        result = {
            "job": job._asdict(),
            "error": trained.figures[f"{index}/error" if together else "error"],
            "parameters": models.count(net),
            "budget": parameters,
            "seconds": round(trained.seconds, 1),
            "trained_together": len(jobs),
            "data": mnist.train.source,
            "config": asdict(config),
            "facts": origin,
        }
        write_json(own / "result.json", result)


def _group_name(jobs: Sequence[Job]) -> str:
    """Such as "CNN-R0+R1+P0+P1": all of a group are of one model."""
    return f"{jobs[0].model}-" + "+".join(f"{job.distortion}{job.seed}" for job in jobs)


def pending(
    jobs: Sequence[Job], settings: Callable[[str], Settings], source: str, output: Path, together: bool
) -> list[list[Job]]:
    """The jobs without a result, those of one model and one size of canvas in one group if they are to train
    together. ``settings`` are by model.

    Raises:
        ValueError: a result there is of other settings.
        DataError: a result there is damaged.
    """
    left = []
    for job in jobs:
        path = output / "runs" / str(job) / "result.json"
        if not path.exists():
            left.append(job)
            continue
        done = _read_result(path)
        config, parameters = settings(job.model)
        if (done["config"], done["budget"], done["data"]) != (asdict(config), parameters, source):
            raise ValueError(f"{path} is of other settings: name another --output, or delete it")
    if not together:
        return [[job] for job in left]
    groups: dict[tuple[str, int, bool], list[Job]] = defaultdict(list)
    for job in left:
        distortion = DISTORTIONS[job.distortion]
        groups[job.model, distortion.size, distortion.halved].append(job)
    return list(groups.values())


# --------------------------------------------------------------------------------------------------- table
def results(output: Path) -> list[dict[str, Any]]:
    """What was written so far.

    Raises:
        DataError: one of the files is damaged.
    """
    return [_read_result(path) for path in sorted(output.glob("runs/*/result.json"))]


def _read_result(path: Path) -> dict[str, Any]:
    result = read_json(path, REMEDY)
    with reading(path, REMEDY):
        for name, kind in RESULT.items():
            if name not in result:
                raise ValueError(f"it lacks {name}")
            if not isinstance(result[name], kind):
                raise TypeError(f"its {name} is {result[name]!r}")
        job = Job(**result["job"])
        if job.model not in models.NAMES or job.distortion not in DISTORTIONS or type(job.seed) is not int:
            raise ValueError(f"it is of {job}")
        config = result["config"]
        if type(config["steps"]) is not int or type(config["batch"]) is not int:
            raise TypeError(f"its steps are {config['steps']!r}, its batch {config['batch']!r}")
        if not isinstance(config["warm_up"], (int, float)) or result["trained_together"] < 1:
            raise ValueError(
                f"its warm_up is {config['warm_up']!r}, trained_together {result['trained_together']}"
            )
        for key in FACTS.values():
            result["facts"][key]
    return result


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
    if any(count < PAPER_STEPS or batch < Config.batch for count, batch in steps):
        notes.append(
            f"**Run short of the paper's schedule** ({PAPER_STEPS:,} iterations of 256, three seeds)."
        )
    notes += warmed_up(sorted((result["job"]["model"], result["config"]["warm_up"]) for result in found))
    if any(result["data"] != "MNIST" for result in found):
        notes.append("**The digits are a stand-in, not MNIST.**")
    for said, key in FACTS.items():
        values = sorted({str(result["facts"][key]) for result in found})
        notes.append(f"{said}: {', '.join(values)}.")
    seconds = sum(result["seconds"] / result["trained_together"] for result in found)
    notes.append(f"Training took {seconds / 60:.1f} minutes in all, whatever else the machine did.")
    return "\n".join([*lines, "", *(f"* {note}" for note in notes), ""])


def write_results(output: Path, mnist: Mnist) -> None:
    """table.md and table.json; for each distortion a picture and an animation of the first transformers there
    are."""
    found = results(output)
    budgets = {Job(**result["job"]): result["budget"] for result in found}
    notes = []
    for name in DISTORTIONS:
        jobs = [job for job in budgets if job.distortion == name and job.model.startswith("ST")]
        if jobs:
            notes += draw_results(output, jobs, budgets, mnist)
    write_text(output / "table.md", table(found) + "".join(f"* {note}\n" for note in notes))
    write_json(output / "table.json", found)


def draw_results(output: Path, jobs: Sequence[Job], budgets: dict[Job, int], mnist: Mnist) -> list[str]:
    """One distortion's picture and animation; what there is to say about the transformers in them."""
    notes = []
    name = jobs[0].distortion
    first = {job.model: job for job in reversed(jobs)}
    shown = [first[model] for model in models.NAMES if model in first]
    distortion, device = DISTORTIONS[name], mnist.test.images.device
    one = shown_digits(mnist.test, distortion, label=SHOWN_LABEL)
    several = shown_digits(mnist.test, distortion)
    averaged = shown_digits(mnist.test, distortion, label=SHOWN_LABEL, count=100)
    panels: list[Panel] = []
    frames: dict[int, list[Panel]] = defaultdict(list)
    for job in shown:
        path = output / "runs" / str(job) / "model.pt"
        kept = load(path, REMEDY, map_location=device)
        net = build(job, budgets[job], device).eval()
        with reading(path, REMEDY):
            net.load_state_dict(kept["model"])
            for step, theta in kept["snapshots"]:
                if type(step) is not int or not isinstance(theta, Tensor):
                    raise TypeError(f"it has a snapshot of step {step!r} that is {type(theta).__name__}")
        transformer, images = net.transformer, torch.cat([one, several])
        with torch.no_grad():
            panels += _panels(job.model, transformer, images, transformer.localise(images))
            if isinstance(distortion, Similar) and transformer.transform == "affine":
                notes.append(f"{job}, {alignment(transformer, mnist.test, distortion)}.")
            mean = transformer(averaged).mean(0)
            panels.append(Panel(averaged.mean(0), None, [mean], title=f"mean of {len(averaged)}"))
            for step, theta in kept["snapshots"]:
                frames[step] += _panels(job.model, transformer, several, theta)
    title = f"{name}: inputs with the transformer's grid, and below what it returns"
    save_picture(output / f"picture-{name}.png", panels, title, len(one) + len(several) + 1)
    titled = [(f"{name}, step {step:,}", frames[step]) for step in sorted(frames)]
    if titled:
        save_animation(output / f"training-{name}.gif", titled, len(several))
    return notes


def alignment(transformer: SpatialTransformer, digits: Digits, distortion: Similar) -> str:
    """How much test digits differ in place, size and angle, before and after an affine transformer."""
    drawn = distortion.draw(1000, torch.Generator(digits.images.device).manual_seed(TEST_SEED))
    index = torch.arange(1000, device=digits.images.device) % len(digits.labels)
    theta, chosen = drawn[0], transformer.localise(distortion.apply(digits, index, drawn))
    said = []
    for maps in (theta, compose(theta, chosen)):  # from the canvas, or the output, to the digit
        place, scale, angle = distortion.spread(maps)
        said.append((f"{place:.1f}", f"{scale:.0f}", f"{angle:.0f}"))
    place, scale, angle = (f"{before} to {after}" for before, after in zip(*said))
    return (
        f"standard deviations over {len(index)} test digits, before to after: of the place {place} pixels, "
        f"of the size {scale} %, of the angle {angle} degrees"
    )


def _panels(name: str, transformer: SpatialTransformer, images: Tensor, theta: Tensor) -> list[Panel]:
    outputs = transformer.sample(images, theta)
    titles = [name] + [""] * (len(images) - 1)
    return [
        Panel(image, one, [output], transformer.transform, title)
        for image, one, output, title in zip(images, theta, outputs, titles)
    ]


# ------------------------------------------------------------------------------------------- command line
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.distorted_mnist", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("--quick", action="store_true", help="minutes on a CPU: small nets, 6,000 iterations")
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

    def settings(model: str) -> Settings:
        config, parameters = (quick_settings if quick else paper_settings)(model)
        return Settings(configure(config, options), options.parameters or parameters)

    names = options.models or (QUICK_MODELS if quick else models.NAMES)
    distortions = options.distortions or (["RTS"] if quick else ["R", "RTS", "P", "E"])
    seeds = options.seeds or ([0] if quick else [0, 1, 2])
    output = options.output or Path("build") / ("distorted_mnist-quick" if quick else "distorted_mnist")
    jobs = [Job(*job) for job in ((m, d, s) for s in seeds for d in distortions for m in names)]

    with processes(options.device) as device:
        mnist = load_mnist(options.data, device, stand_in=options.stand_in)
        source = mnist.train.source
        groups = pending(jobs, settings, source, output, options.together)
        # those too small for their transformers complain before any has run
        counts = {
            job: models.count(build(job, settings(job.model).parameters, device))
            for group in groups
            for job in group
        }
        for group in groups:
            if rank() == 0:
                print(f"{', '.join(map(str, group))}: {counts[group[0]]:,} parameters", flush=True)
            run(group, mnist, settings(group[0].model), output)
        if rank() == 0:
            write_results(output, mnist)
            print((output / "table.md").read_text())
            print(f"in {output}: " + ", ".join(sorted(path.name for path in output.iterdir())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
