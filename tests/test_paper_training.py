"""The examples' training loop: resumed, repeated, at once, in two processes, it computes the same."""

import csv
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from examples import training
from examples.data import Digits, Mnist, Similar
from examples.distorted_mnist import Classify
from examples.models import Transformed
from examples.training import Config, Replicas, ReplicaTask, train
from stn_triton import backend
from stn_triton.nn import SpatialTransformer, localisation_fcn

ROOT = Path(__file__).resolve().parent.parent
STEPS = 7
SHORT = Config(
    steps=STEPS, batch=8, lr=0.1, lr_every=3, momentum=0.9, log_every=2, evaluate_every=4, checkpoint_every=3,
    snapshots=3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _as_it_was():
    """On PyTorch's operators, one thread, and with PyTorch's generator left as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with backend.use("torch"), torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def mnist():
    """Blobs in place of digits: brighter from class to class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 10
    images = torch.randint(0, 256, (40, 28, 28), generator=generator) * (labels.view(-1, 1, 1) + 1) // 10
    digits = Digits(images.byte(), labels, "stand-in")
    return Mnist(digits, digits)


def make_model(seed=0, dropout=0.5, dtype=torch.float32):
    torch.manual_seed(seed)
    transformer = SpatialTransformer(localisation_fcn((8,), input_shape=(1, 28, 28)), size=(14, 14), features=8)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(196, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 10))
    return Transformed(transformer, classifier).to(dtype)


def make_task(mnist, seed=0, fails_at=None):
    """Tells rotated digits apart. ``fails_at``: the batch, from 1, at which the process "is killed"."""

    class Doomed(Classify):
        batches = 0

        def batch(self, *arguments):
            self.batches += 1
            if self.batches == fails_at:
                raise KeyboardInterrupt
            return super().batch(*arguments)

    return Doomed(mnist, Similar(degrees=90), seed)


def run(mnist, config, folder, *, seed=0, fails_at=None, **options):
    return train(
        make_model(seed), make_task(mnist, seed, fails_at), config, folder, seed=seed, progress=False, **options
    )


def run_two(mnist, config, folder, *, fails_at=None, dropout=0.5):
    tasks = [make_task(mnist, 0, fails_at), make_task(mnist, 1)]
    model = Replicas([make_model(seed, dropout) for seed in (0, 1)])
    return train(model, ReplicaTask(tasks), config, folder, progress=False)


def assert_same(one, other):
    """To the bit, the clock aside."""
    for (name, value), its in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(value, its), name
    assert one.history == other.history
    for (step, kept), (its_step, its_kept) in zip(one.snapshots, other.snapshots, strict=True):
        assert step == its_step
        torch.testing.assert_close(kept, its_kept, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------- settings
def test_rate_is_the_papers_by_default():
    config = Config()
    steps = [0, 49_999, 50_000, 99_999, 100_000, 149_999]
    assert [config.lr_at(step) for step in steps] == pytest.approx([0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4])


def test_cosine_ends_at_zero():
    config = Config(steps=100, lr=1.0, schedule="cosine")
    assert [config.lr_at(step) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])


def test_transformers_learn_at_a_rate_of_their_own(mnist, tmp_path):
    config = Config(steps=2, batch=8, lr=0.1, localisation_lr=0.0, evaluate_every=9, snapshots=0)
    before, after = make_model().state_dict(), run(mnist, config, tmp_path).model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("classifier")}


def test_batch_that_processes_cannot_share_is_refused(mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="divisible by 3"):
        run(mnist, SHORT, tmp_path)


# ------------------------------------------------------------------------------------------------ resume
VARIANTS = {
    "sgd": {},
    "adam, cosine": {"optimiser": "adam", "lr": 0.01, "schedule": "cosine"},
    "bfloat16": {"precision": "bfloat16"},
    "float16": {"precision": "float16"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_is_uninterrupted(mnist, tmp_path, variant):
    config = training.dataclasses.replace(SHORT, **VARIANTS[variant])
    whole = run(mnist, config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(mnist, config, tmp_path / "killed", fails_at=6)
    torch.manual_seed(99)  # another process has another history
    resumed = run(mnist, config, tmp_path / "killed")
    assert_same(whole, resumed)
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("whole", "killed")]
    assert logs[0] == logs[1]


def test_killed_replicas_resume_too(mnist, tmp_path):
    whole = run_two(mnist, SHORT, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_two(mnist, SHORT, tmp_path / "killed", fails_at=6)
    assert_same(whole, run_two(mnist, SHORT, tmp_path / "killed"))


def test_run_in_pieces(mnist, tmp_path):
    whole = run(mnist, SHORT, tmp_path / "whole")
    for stop in (2, 5):
        piece = run(mnist, SHORT, tmp_path / "pieces", stop_after=stop)
        assert len(piece.snapshots) < len(whole.snapshots)
    assert_same(whole, run(mnist, SHORT, tmp_path / "pieces"))


def test_finished_run_is_not_run_again(mnist, tmp_path):
    whole = run(mnist, SHORT, tmp_path)
    again = run(mnist, SHORT, tmp_path, fails_at=1)
    assert_same(whole, again)
    assert again.seconds == whole.seconds


def test_killed_while_saving_leaves_the_last_checkpoint(mnist, tmp_path, monkeypatch):
    whole = run(mnist, SHORT, tmp_path / "whole")
    save, calls = torch.save, []

    def half(state, path):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half of a checkpoint")
            raise KeyboardInterrupt
        save(state, path)

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        run(mnist, SHORT, tmp_path / "killed")
    monkeypatch.undo()
    assert torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["step"] == 3
    assert_same(whole, run(mnist, SHORT, tmp_path / "killed"))
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["checkpoint.pt", "log.csv"]


def test_checkpoint_of_other_settings_is_refused(mnist, tmp_path):
    run(mnist, SHORT, tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        run(mnist, training.dataclasses.replace(SHORT, lr=0.2), tmp_path)


# ------------------------------------------------------------------------------------------- determinism
def test_same_seed_same_numbers(mnist, tmp_path):
    one = run(mnist, SHORT, tmp_path / "one")
    assert_same(one, run(mnist, SHORT, tmp_path / "two"))
    other = run(mnist, SHORT, tmp_path / "three", seed=1)
    assert one.history[0]["loss"] != other.history[0]["loss"]


def test_generator_of_the_caller_is_left_alone(mnist, tmp_path):
    model, task = make_model(), make_task(mnist)
    state = torch.get_rng_state()
    train(model, task, SHORT, tmp_path, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------------------- log
def test_log_has_losses_rates_and_errors(mnist, tmp_path):
    trained = run(mnist, SHORT, tmp_path)
    with (tmp_path / "log.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == [2, 4, 6, 7]
    assert [float(line["lr"]) for line in lines] == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert [bool(line["error"]) for line in lines] == [False, True, False, True]
    assert float(lines[-1]["error"]) == trained.figures["error"]

    single = training.dataclasses.replace(SHORT, log_every=1)
    losses = [entry["loss"] for entry in run(mnist, single, tmp_path / "single").history]
    means = [sum(losses[:2]) / 2, sum(losses[2:4]) / 2, sum(losses[4:6]) / 2, losses[6]]
    assert [float(line["loss"]) for line in lines] == pytest.approx(means, rel=1e-5)


def test_snapshots_are_of_the_grid_as_it_moves(mnist, tmp_path):
    (first, start), *_, (last, end) = run(mnist, SHORT, tmp_path).snapshots
    assert (first, last) == (0, STEPS)
    torch.testing.assert_close(start, torch.eye(2, 3).expand_as(start))
    assert not torch.equal(start, end)


# --------------------------------------------------------------------------------------- mixed precision
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_precision_is_the_models_alone(mnist, tmp_path, precision):
    """Batches, losses, parameters and the transformer's matrix stay float32; linear layers do not."""
    seen = {}
    model, task = make_model(), make_task(mnist)
    model.register_forward_hook(lambda module, inputs, output: seen.update(image=inputs[0], logits=output))
    localise = model.transformer.localise
    model.transformer.localise = lambda images: seen.setdefault("theta", localise(images))
    config = Config(steps=1, batch=8, precision=precision, snapshots=0, evaluate_every=9)
    trained = train(model, Silent(task), config, tmp_path, progress=False)
    assert seen["logits"].dtype == getattr(torch, precision)
    assert seen["image"].dtype == seen["theta"].dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    whole = run(mnist, training.dataclasses.replace(config, precision="float32"), tmp_path / "float32")
    assert trained.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], rel=0.05)


class Silent(training.Task):
    """Without evaluation, which is in float32."""

    def __init__(self, task):
        self.generator, self.batch = task.generator, task.batch


def test_step_that_overflows_is_left_out(mnist, tmp_path):
    """A loss scale too large for float16 is halved until gradients are finite."""
    config = Config(steps=3, batch=8, precision="float16", snapshots=0)
    task = make_task(mnist)
    loss = task.loss
    task.loss = lambda output, target: loss(output, target) * (1e30 if task.batches == 1 else 1.0)
    trained = train(make_model(), task, config, tmp_path, progress=False)
    assert all(parameter.isfinite().all() for parameter in trained.model.parameters())
    scale = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["scaler"]["scale"]
    assert scale == 2.0**15


# ----------------------------------------------------------------------------------------------- compile
def test_compiled_model_is_the_same(mnist, tmp_path, monkeypatch):
    """Without a compiler behind it, which has tests of its own: the model is traced, and trains as it was."""
    traced = []

    def note(graph, inputs):
        traced.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=note))
    eager = run(mnist, SHORT, tmp_path / "eager")
    compiled = run(mnist, training.dataclasses.replace(SHORT, compile=True), tmp_path / "compiled")
    assert len(traced) == 1, "one graph, no break"
    torch.testing.assert_close(compiled.model.state_dict(), eager.model.state_dict())


# ------------------------------------------------------------------------------------------- CUDA graphs
def test_graphs_are_refused_without_a_gpu(mnist, tmp_path):
    with pytest.raises(ValueError, match="CUDA"):
        run(mnist, training.dataclasses.replace(SHORT, cuda_graph=True), tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_captured_steps_are_those_of_the_loop(mnist, tmp_path, optimiser):
    """Batches drawn in a graph go on with the generator's numbers, and rates change in between."""
    there = Mnist(*(digits.to("cuda") for digits in mnist))
    config = Config(
        steps=12, batch=8, lr=0.01, lr_every=6, optimiser=optimiser, log_every=1, evaluate_every=99, snapshots=0
    )
    trained = []
    with backend.use("auto"):
        for captured in (False, True):
            changed = training.dataclasses.replace(config, cuda_graph=captured)
            model, task = make_model(dropout=0.0).cuda(), make_task(there)
            trained.append(train(model, task, changed, tmp_path / str(captured), progress=False))
    for one, other in zip(*(each.history for each in trained)):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


# ---------------------------------------------------------------------------------------------- replicas
@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_replicas_train_as_if_alone(mnist, tmp_path, optimiser):
    """Up to the order of sums, which in vmap is another."""
    config = training.dataclasses.replace(SHORT, optimiser=optimiser, lr=0.01)
    together = run_two(mnist, config, tmp_path / "together", dropout=0.0)
    for seed in (0, 1):
        alone = train(make_model(seed, 0.0), make_task(mnist, seed), config, tmp_path / str(seed), progress=False)
        state = together.model.replica(seed).state_dict()
        torch.testing.assert_close(state, alone.model.state_dict(), rtol=1e-3, atol=1e-4)
        assert together.figures[f"{seed}/error"] == pytest.approx(alone.figures["error"], abs=2.6)  # one digit
    assert not torch.equal(*together.model.state_dict()["module.classifier.1.weight"])


def test_replica_is_the_model_it_was_made_of():
    models = [make_model(seed) for seed in range(3)]
    replicas = Replicas(models)
    for index, model in enumerate(models):
        copy = replicas.replica(index)
        torch.testing.assert_close(copy.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert len(list(copy.parameters())) == len(list(model.parameters()))


# --------------------------------------------------------------------------------------------- processes
PROGRAM = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
import test_paper_training as tests
from examples.training import processes, rank, train
torch.set_num_threads(1)
with processes("cpu"):
    mnist = tests.mnist.__wrapped__()
    trained = train(tests.make_model(0, 0.0), tests.make_task(mnist), tests.SHORT, tests.Path({folder!r}), progress=False)
    if rank() == 0:
        torch.save([trained.model.state_dict(), trained.history], {folder!r} + "/trained.pt")
"""


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
def test_two_processes_are_as_one(mnist, tmp_path):
    """torchrun, gloo: halves of the same batches, averaged, and one log. Sums are in another order."""
    alone = train(make_model(0, 0.0), make_task(mnist), SHORT, tmp_path / "alone", progress=False)
    program, folder = tmp_path / "program.py", tmp_path / "two"
    program.write_text(PROGRAM.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(folder)))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run(
        command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    state, history = torch.load(folder / "trained.pt", weights_only=True)
    torch.testing.assert_close(state, alone.model.state_dict(), rtol=1e-4, atol=1e-5)
    for one, other in zip(history, alone.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert (folder / "log.csv").exists()
