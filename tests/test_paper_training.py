"""The examples' training loop where it could go wrong unnoticed: checkpoints, logs, precisions.

``test_examples.py`` has the rest.
"""

import csv
import dataclasses
import re
import sys
import types

import pytest
import torch
from test_files import write_result
from torch import nn

from examples import training
from examples.data import DISTORTIONS, Digits, Mnist, Similar
from examples.distorted_mnist import TEST_SEED, Classify, Job, Settings, alignment, pending
from examples.models import Transformed
from examples.training import Config, Replicas, ReplicaTask, Task, train
from stn_triton.nn import SpatialTransformer, localisation_fcn
from stn_triton.transforms import invert

RTS = DISTORTIONS["RTS"]
STEPS = 7
SHORT = Config(
    steps=STEPS,
    batch=8,
    lr=0.1,
    lr_every=3,
    momentum=0.9,
    log_every=2,
    evaluate_every=4,
    checkpoint_every=3,
    snapshots=3,
)


pytestmark = pytest.mark.usefixtures("torch_on_one_thread")


@pytest.fixture(autouse=True)
def _own_generator():
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture(scope="module")
def mnist():
    """Noise in place of digits, brighter from class to class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 10
    images = torch.randint(0, 256, (40, 28, 28), generator=generator) * (labels.view(-1, 1, 1) + 1) // 10
    digits = Digits(images.byte(), labels, "stand-in")
    return Mnist(digits, digits)


def make_model(seed=0):
    """It draws, too: by dropout."""
    torch.manual_seed(seed)
    localisation = localisation_fcn((8,), input_shape=(1, 28, 28))
    layers = nn.Flatten(), nn.Linear(196, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10)
    return Transformed(SpatialTransformer(localisation, size=(14, 14), features=8), nn.Sequential(*layers))


class Doomed(Classify):
    """Rotated digits; with ``killed_at`` the process ends instead of making that batch, counted from 1."""

    def __init__(self, mnist, seed=0, killed_at=None):
        super().__init__(mnist, Similar(degrees=90), seed)
        self.killed_at, self.batches = killed_at, 0

    def batch(self, *arguments):
        self.batches += 1
        if self.batches == self.killed_at:
            raise KeyboardInterrupt
        return super().batch(*arguments)


def run(mnist, config, folder, *, killed_at=None):
    return train(make_model(), Doomed(mnist, 0, killed_at), config, folder, progress=False)


def run_two(mnist, config, folder, *, killed_at=None):
    tasks = ReplicaTask([Doomed(mnist, 0, killed_at), Doomed(mnist, 1)])
    return train(Replicas([make_model(0), make_model(1)]), tasks, config, folder, progress=False)


def assert_same(one, other):
    """To the bit, the clock aside."""
    state, its_state = one.model.state_dict(), other.model.state_dict()
    assert state.keys() == its_state.keys()
    assert [name for name in state if not torch.equal(state[name], its_state[name])] == []
    assert one.history == other.history
    assert [step for step, _ in one.snapshots] == [step for step, _ in other.snapshots]
    torch.testing.assert_close(
        [kept for _, kept in one.snapshots], [kept for _, kept in other.snapshots], rtol=0, atol=0
    )


# ------------------------------------------------------------------------------------------- checkpoints
VARIANTS = {
    "momentum": {},
    "adam-cosine": {"optimiser": "adam", "lr": 0.01, "schedule": "cosine"},
    "bfloat16": {"precision": "bfloat16"},
    "float16": {"precision": "float16"},
}


@pytest.mark.parametrize("trained", [run, run_two], ids=["alone", "replicas"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_is_uninterrupted(mnist, tmp_path, variant, trained):
    config = dataclasses.replace(SHORT, **VARIANTS[variant])
    whole = trained(mnist, config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(mnist, config, tmp_path / "killed", killed_at=6)
    torch.manual_seed(99)  # another process has another past
    assert_same(whole, trained(mnist, config, tmp_path / "killed"))
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("whole", "killed")]
    assert logs[0] == logs[1]


def test_finished_run_is_not_run_again(mnist, tmp_path):
    whole = run(mnist, SHORT, tmp_path)
    again = run(mnist, SHORT, tmp_path, killed_at=1)
    assert_same(whole, again)
    assert again.seconds == whole.seconds


def test_killed_while_saving_leaves_the_last_checkpoint(mnist, tmp_path, monkeypatch):
    whole = run(mnist, SHORT, tmp_path / "whole")
    save, calls = torch.save, []

    def save_half_of_the_second(state, path):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half of a checkpoint")
            raise KeyboardInterrupt
        save(state, path)

    monkeypatch.setattr(torch, "save", save_half_of_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(mnist, SHORT, tmp_path / "killed")
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["checkpoint.pt", "log.csv"]
    assert torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["step"] == 3
    assert_same(whole, run(mnist, SHORT, tmp_path / "killed"))


def test_generator_of_the_caller_is_left_alone(mnist, tmp_path):
    model, task = make_model(), Doomed(mnist)
    state = torch.get_rng_state()
    train(model, task, SHORT, tmp_path, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "name, value",
    [
        ("steps", 0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr_divisor", 0.0),
        ("snapshots", -1),
        ("warm_up", 1.5),
    ],
)
def test_settings_that_make_no_sense_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must .* got {value}"):
        Config(**{name: value})


def test_results_of_other_settings_are_not_taken_for_these(tmp_path):
    job, new, config = Job("CNN", "R", 0), Job("CNN", "P", 0), Config(steps=5)
    path = tmp_path / "runs" / str(job) / "result.json"
    write_result(path, config=dataclasses.asdict(config), budget=1000)

    def left(config=config, budget=1000, data="MNIST"):
        its = Settings(config, budget)
        return pending([job, new], lambda model: its, data, tmp_path, together=True)

    assert left() == [[new]]
    for other in ({"config": Config(steps=6)}, {"budget": 2000}, {"data": "stand-in"}):
        with pytest.raises(ValueError, match="other settings"):
            left(**other)


# -------------------------------------------------------------------------------------------------- logs
def test_log_has_mean_losses_rates_and_errors(mnist, tmp_path):
    trained = run(mnist, SHORT, tmp_path)
    with (tmp_path / "log.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == [2, 4, 6, 7]
    assert [float(line["lr"]) for line in lines] == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert [bool(line["error"]) for line in lines] == [False, True, False, True]
    assert float(lines[-1]["error"]) == trained.figures["error"]

    each = run(mnist, dataclasses.replace(SHORT, log_every=1), tmp_path / "each").history
    losses = [entry["loss"] for entry in each]
    means = [sum(losses[:2]) / 2, sum(losses[2:4]) / 2, sum(losses[4:6]) / 2, losses[6]]
    assert [float(line["loss"]) for line in lines] == pytest.approx(means, rel=1e-5)


def test_tensorboard_gets_the_same(mnist, tmp_path, monkeypatch):
    """One writer a run; a resumed one takes back what came after the checkpoint."""
    made, written = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            made.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((step, name, value))

        def close(self):
            made.append("closed")

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    config = dataclasses.replace(SHORT, tensorboard=True)
    with pytest.raises(KeyboardInterrupt):
        run(mnist, config, tmp_path, killed_at=6)
    assert made == [(str(tmp_path), 1)]
    written.clear()
    history = run(mnist, config, tmp_path).history
    assert made[1:] == [(str(tmp_path), 4), "closed"]
    expected = {(line["step"], name, line[name]) for line in history[1:] for name in line if name != "step"}
    assert set(written) == expected


def test_snapshots_are_of_the_grid_as_it_moves(mnist, tmp_path):
    (first, start), *_, (last, end) = run(mnist, SHORT, tmp_path).snapshots
    assert (first, last) == (0, STEPS)
    torch.testing.assert_close(start, torch.eye(2, 3).expand_as(start))
    assert not torch.equal(start, end)


def test_dropout_is_on_in_training_alone(mnist, tmp_path):
    modes, model = [], make_model()
    model.register_forward_hook(lambda module, inputs, output: modes.append((module.training, len(output))))
    train(model, Doomed(mnist), SHORT, tmp_path, progress=False)
    step, evaluation = (True, 8), (False, 40)
    assert modes == [step] * 4 + [evaluation] + [step] * 3 + [evaluation]
    assert not model.training


def test_alignment_of_nothing_and_of_all(mnist):
    """A transformer that leaves the digits as they are, and one that knows how each was distorted."""
    (theta,) = RTS.draw(1000, torch.Generator().manual_seed(TEST_SEED))
    idle, ideal = torch.eye(2, 3).expand(1000, 2, 3), invert(theta)
    said = [
        alignment(types.SimpleNamespace(localise=lambda images, its=its: its), mnist.test, RTS)
        for its in (idle, ideal)
    ]
    before = re.findall(r"([0-9.]+) to ([0-9.]+)", said[0])
    assert [float(value) for pair in before for value in pair] == pytest.approx(
        [4.7, 4.7, 15, 15, 25, 25], abs=1
    )
    assert re.findall(r"([0-9.]+) to ([0-9.]+)", said[1]) == [
        (value, zero) for (value, _), zero in zip(before, ("0.0", "0", "0"))
    ]
    cluttered = alignment(types.SimpleNamespace(localise=lambda images: idle), mnist.test, DISTORTIONS["TC"])
    (values,) = re.findall(r"place ([0-9.]+) to ([0-9.]+) .* angle 0 to 0", cluttered)
    assert [float(value) for value in values] == pytest.approx([9.2, 9.2], abs=0.3)  # 32 / sqrt(12)


def test_warm_up_raises_the_strength_of_distortions(mnist, tmp_path):
    """Step by step to 1, for replicas too, and as if in one go after a stop."""
    seen = []

    class Warming(Doomed):
        def batch(self, count, part=slice(None)):
            seen.append(round(self.strength.item(), 6))
            return super().batch(count, part)

    config = dataclasses.replace(SHORT, warm_up=4 / 7)
    expected = [0, 0.25, 0.5, 0.75, 1, 1, 1]
    for stop in (3, None):
        train(make_model(), Warming(mnist), config, tmp_path / "one", progress=False, stop_after=stop)
    assert seen == expected
    seen.clear()
    both = ReplicaTask([Warming(mnist), Warming(mnist)])
    train(Replicas([make_model(), make_model()]), both, config, tmp_path / "two", progress=False)
    assert seen == [value for value in expected for _ in range(2)]


# ------------------------------------------------------------------------------------------- precision
class Silent(Task):
    """A task without its evaluation, which is in float32."""

    def __init__(self, task):
        self.generator, self.strength = task.generator, task.strength
        self.batch, self.loss = task.batch, task.loss


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_precision_is_that_of_the_models_layers(mnist, tmp_path, precision):
    """Images, parameters and the transformer's matrix stay float32; the output of linear layers does not."""
    seen, model = {}, make_model()
    model.register_forward_hook(lambda module, inputs, output: seen.update(image=inputs[0], logits=output))
    localise = model.transformer.localise
    model.transformer.localise = lambda images: seen.setdefault("theta", localise(images))
    config = Config(steps=1, batch=8, precision=precision, snapshots=0)
    train(model, Silent(Doomed(mnist)), config, tmp_path, progress=False)
    assert seen["logits"].dtype == getattr(torch, precision)
    assert seen["image"].dtype == seen["theta"].dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_step_that_overflows_is_left_out(mnist, tmp_path):
    """It moves nothing and halves the scale of the loss; the next step is as ever."""

    def overflow(output, target):
        losses.append(loss(output, target))
        return losses[-1] * (1e30 if len(losses) == 2 else 1.0)

    task, losses = Doomed(mnist), []
    loss, task.loss = task.loss, overflow
    config = Config(steps=3, batch=8, lr=0.1, precision="float16", snapshots=3, checkpoint_every=1)
    states = []
    for stop in (1, 2, 3):
        model = make_model()
        train(model, task, config, tmp_path, progress=False, stop_after=stop)
        states.append(model.state_dict())
    one, two, three = ([*state.values()] for state in states)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not all(torch.equal(a, b) for a, b in zip(two, three))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["scaler"]["scale"] == 2.0**15


# --------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "name", ["steps", "batch", "lr_every", "log_every", "evaluate_every", "checkpoint_every"]
)
def test_settings_that_cannot_be_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        Config(**{name: 0})


def test_batch_that_processes_cannot_share_is_refused(mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="divisible by 3 processes, got 8"):
        run(mnist, SHORT, tmp_path)
