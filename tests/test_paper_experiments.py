"""The paper's smaller experiments on drawn digits, and that every script runs and leaves what it shall."""

import importlib
import json
import math
import re
from unittest import mock

import pytest
import torch

from examples import extruded_digits, mnist_addition
from examples.data import SIDE, load_mnist
from examples.extruded_digits import Extruded, Flatten
from examples.mnist_addition import KINDS
from examples.models import count
from examples.outputs import looks
from stn_triton.transforms import attention, compose, control_lattice, invert

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")


def write_idx(path, values):
    header = bytes([0, 0, 8, values.dim()]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(header + bytes(values.flatten().tolist()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """IDX files of 200 and 50 images: for each label a bar at an angle of its own."""
    path = tmp_path_factory.mktemp("digits")
    y, x = torch.meshgrid(torch.arange(SIDE) - 13.5, torch.arange(SIDE) - 13.5, indexing="ij")
    for half, number in (("train", 200), ("t10k", 50)):
        labels = torch.arange(number) % 10
        angle = (labels * math.pi / 10).view(-1, 1, 1)
        across, along = x * angle.sin() - y * angle.cos(), x * angle.cos() + y * angle.sin()
        bars = 255 * ((across.abs() < 2.5) & (along.abs() < 9) & (along > -5))
        write_idx(path / f"{half}-images-idx3-ubyte", bars)
        write_idx(path / f"{half}-labels-idx1-ubyte", labels)
    return path


@pytest.fixture
def mnist(folder):
    return load_mnist(folder, stand_in=True)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------------------- addition
class TestAddition:
    def test_labels_are_sums_and_channels_are_independent(self, mnist):
        images, sums = mnist_addition.pairs(mnist.train, 300, generator())
        assert images.shape == (300, 2, 42, 42)
        assert sums.min() >= 0
        assert sums.max() <= 18
        assert sums.unique().numel() > 12
        assert (images.amax((2, 3)) > 0.5).all()
        assert not torch.equal(images[:, 0], images[:, 1])
        half = mnist_addition.pairs(mnist.train, 300, generator(), slice(150, None))
        torch.testing.assert_close(half[0], images[150:])
        assert torch.equal(half[1], sums[150:])

    def test_strength(self, mnist):
        """Without distortions there are as many images as digits: of each label all are the same."""
        kinds = [
            len(mnist_addition.pairs(mnist.train, 40, generator(), strength=by)[0][:, 0].unique(dim=0))
            for by in (0.0, 1.0)
        ]
        assert kinds[0] <= 10
        assert kinds[1] == 40

    @pytest.mark.parametrize("name", KINDS)
    def test_models_are_of_equal_size(self, name):
        model = mnist_addition.make_model(KINDS[name])
        assert count(model) == pytest.approx(mnist_addition.PARAMETERS, rel=0.03)
        assert model(torch.rand(3, 2, 42, 42)).shape == (3, 19)

    def test_each_transformer_gets_and_transforms_both_channels(self):
        model = mnist_addition.make_model(KINDS["2xST-FCN affine"])
        first, second = model[0].transformers
        with torch.no_grad():
            second.regression.bias[0] = 1.0  # twice as wide a window
        images = torch.rand(2, 2, 42, 42)
        output = model[0](images)
        assert output.shape == (2, 4, 42, 42)
        torch.testing.assert_close(output[:, :2], images)
        torch.testing.assert_close(output[:, 2:], second(images))
        assert (output[:, 2:] - images).abs().max() > 0.1
        assert first.localisation is not second.localisation

    def test_held(self, mnist):
        """A transformer that undoes the first digit's map holds it, and no other."""
        model = mnist_addition.make_model(KINDS["2xST-FCN affine"])
        knowing = model[0].transformers[0]
        distortion = mnist_addition.DISTORTIONS["RTS"]
        draw, maps = distortion.draw, []

        def noted(*arguments):
            maps.append(draw(*arguments))
            return maps[-1]

        with mock.patch.object(type(distortion), "draw", lambda self, *arguments: noted(*arguments)):
            knowing.localise = lambda images: invert(maps[0][0])
            said = mnist_addition.held(model, mnist.test)
        found = re.findall(r"([0-9.]+) pixels, ([0-9]+) degrees", said)
        before, first, second = ([tuple(map(float, one)) for one in found[k : k + 2]] for k in (0, 2, 4))
        assert before == second == [pytest.approx((4.7, 26), abs=1)] * 2
        assert first[0] == (0, 0)
        assert min(first[1]) > 5

    def test_nearest_affine(self):
        theta = torch.eye(2, 3) + 0.2 * torch.randn(3, 2, 3)
        points = control_lattice(4) @ theta[..., :2].mT + theta[..., 2].unsqueeze(1)
        homography = torch.cat([theta, torch.tensor([[[0.0, 0.0, 1.0]]]).expand(3, 1, 3)], 1)
        for transform, its in (("affine", theta), ("projective", homography), ("tps", points)):
            torch.testing.assert_close(mnist_addition.nearest_affine(transform, its), theta)


# ------------------------------------------------------------------------------------------------- 3-D
class TestExtruded:
    def test_upright_solid(self, mnist):
        """With no turn the front is the digit, and each of the solid's slices is."""
        distortion = Extruded(size=SIDE, degrees=0.0, depth=SIDE)
        index = torch.arange(4)
        volumes = distortion.apply(mnist.train, index, distortion.draw(4, generator()))
        expected = mnist.train.take(index)
        torch.testing.assert_close(Flatten()(volumes), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(volumes[:, :, 14], expected, atol=1e-4, rtol=0)

    def test_solids_are_turned_moved_and_whole(self, mnist):
        distortion = Extruded(size=40, scale=0.7)
        volumes, labels = distortion.batch(mnist.train, 12, generator())
        assert volumes.shape == (12, 1, 40, 40, 40)
        mass = volumes.sum((1, 2, 3, 4))
        ink = (mnist.train.images.float() / 255).sum((1, 2))[:10][labels]
        expected = ink * 0.7**3 * distortion.depth
        torch.testing.assert_close(mass, expected, rtol=0.15, atol=0)  # none is cut off
        profile = volumes.sum((1, 3, 4))
        centre = (profile * torch.arange(40)).sum(1) / profile.sum(1)
        assert centre.std() > 2

    def test_strength(self):
        (none,), (all_,) = (Extruded().draw(9, generator(), by) for by in (0.0, 1.0))
        torch.testing.assert_close(none, none[:1].expand_as(none))
        assert (all_.std(0)[:, [0, 3]] > 0.05).all()

    def test_rotation(self):
        matrix = extruded_digits.rotation(torch.randn(7, 3, generator=generator()))
        torch.testing.assert_close(matrix @ matrix.mT, torch.eye(3).expand(7, 3, 3))
        torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(7))
        quarter = extruded_digits.rotation(torch.tensor([[0.0, 0.0, math.pi / 2]]))
        torch.testing.assert_close(quarter[0] @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]))

    def test_transformer_reads_the_solid_unturned_at_first(self, mnist):
        """What it returns is its window around the solid, wherever that is."""
        model = extruded_digits.make_model(30, True, 100_000)
        volumes = Extruded(size=30, scale=0.5).batch(mnist.train, 4, generator())[0]
        (look,) = looks(lambda: model(volumes), model)
        place = extruded_digits.centre_of_mass(volumes)
        torch.testing.assert_close(look.parameters, attention(extruded_digits.WINDOW, place))
        centred = extruded_digits.centre_of_mass(look.output)
        torch.testing.assert_close(centred, torch.zeros(4, 3), atol=0.02, rtol=0)
        assert model(volumes).shape == (4, 10)

    def test_whatever_the_net_says_is_a_rotation(self):
        transformer = extruded_digits.SolidTransformer(30)
        torch.nn.init.normal_(transformer.regression.weight, std=0.3, generator=generator())
        theta = transformer.localise(torch.rand(5, 1, 30, 30, 30, generator=generator()))
        turn = theta[:, :, :3] / extruded_digits.WINDOW
        torch.testing.assert_close(turn @ turn.mT, torch.eye(3).expand(5, 3, 3))
        torch.testing.assert_close(torch.linalg.det(turn), torch.ones(5))
        assert turn.std(0).max() > 0.01

    def test_each_solid_turns_the_net_as_much(self):
        """Also one whose own gradient is tiny; one without any stays so."""
        input = torch.randn(4, 3, 2, generator=generator(), requires_grad=True)
        weights = torch.tensor([1.0, 1e-6, 3.0, 0.0]).view(4, 1, 1)
        output = extruded_digits._EqualPulls.apply(input)
        torch.testing.assert_close(output, input)
        (gradient,) = torch.autograd.grad((weights * output).sum(), input)
        mean = 6**0.5 * (1 + 1e-6 + 3) / 4  # each has 6 entries
        expected = torch.tensor([mean, mean, mean, 0.0])
        torch.testing.assert_close(gradient.flatten(1).norm(dim=1), expected)
        assert (gradient[:3] > 0).all()

    def test_centre_of_mass(self):
        volumes = torch.zeros(2, 1, 10, 20, 40)
        volumes[0, 0, 9, 0, 30] = 2.0
        expected = torch.tensor([[0.525, -0.95, 0.9], [0, 0, 0]])
        torch.testing.assert_close(extruded_digits.centre_of_mass(volumes), expected)

    @pytest.mark.parametrize(("size", "parameters"), [(30, 100_000), (60, 400_000)])
    def test_models_are_of_equal_size(self, size, parameters):
        with torch.device("meta"):
            for transformed in (False, True):
                model = extruded_digits.make_model(size, transformed, parameters)
                assert count(model) == pytest.approx(parameters, rel=0.05)

    def test_pose(self, mnist):
        """Of solids as they were turned, of those turned back, and of some turned on the image alone."""
        distortion = Extruded(size=30, scale=0.5, degrees=40.0)
        (drawn,) = distortion.draw(50, generator())
        tilt, angle = extruded_digits.pose(drawn)
        sight = drawn[:, :, 2] * torch.tensor([28.0, 28, 14])
        cosine = sight[:, 2] / sight.norm(dim=1)
        torch.testing.assert_close(tilt.deg2rad().cos(), cosine.double(), atol=1e-5, rtol=0)
        assert tilt.max() > 30
        assert angle.std() > 15
        front = extruded_digits.pose(compose(drawn, invert(drawn)))
        for value in front:
            torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-2, rtol=0)
        about_z = rotation_about_z(25.0).expand(3, 3, 4)
        tilt, angle = extruded_digits.pose(about_z / torch.tensor([28.0, 28, 14])[:, None])
        torch.testing.assert_close(tilt, torch.zeros(3).double(), atol=1e-3, rtol=0)
        torch.testing.assert_close(angle, torch.full((3,), 25.0).double(), atol=1e-3, rtol=0)

    def test_faces(self):
        """Where the front and the back of the box are read, seen from the front."""
        theta = torch.tensor([[1.0, 0, 0.5, 0.1], [0, 1, 0, 0.2], [0, 0, 1, 0.3]])
        front = extruded_digits.face(theta, -1.0)
        torch.testing.assert_close(front, torch.tensor([[1, 0, -0.4], [0, 1, 0.2]]))


def rotation_about_z(degrees):
    turn = extruded_digits.rotation(torch.tensor([[0.0, 0.0, math.radians(degrees)]]))
    return torch.cat([turn, torch.zeros(1, 3, 1)], -1)


# --------------------------------------------------------------------------------------------- scripts
SCRIPTS = {
    "mnist_addition": ["--test", "20", "--models", "CNN", "2xST-FCN TPS"],
    "colocalisation": ["--digits", "3", "--kinds", "TC", "--encoder-steps", "5", "--seeds", "2"],
    "extruded_digits": ["--test", "20", "--size", "28"],
    "svhn": ["--scenes", "40", "--width", "0.05"],
    "birds": [
        "--scenes",
        "30",
        "--pretraining",
        "2",
        "--size",
        "64",
        "--crop",
        "32",
        "--transformers",
        "0",
        "2",
        "--still",
    ],
}
OTHER = {  # a setting of the model or the data, and other values of its option
    "mnist_addition": ("test pairs", ["--test", "10"]),
    "colocalisation": ("start", ["--start", "0.4"]),
    "extruded_digits": ("degrees", ["--degrees", "5"]),
    "svhn": ("spread", ["--spread", "0.1"]),
    "birds": ("dropout", ["--dropout", "0.5"]),
}
PICTURES = {
    "mnist_addition": ["mnist_addition"],
    "colocalisation": ["colocalisation_TC"],
    "extruded_digits": ["extruded_digits"],
    "svhn": ["svhn_single", "svhn_multi"],
    "birds": ["birds_2"],
}
WARMED_UP = "mnist_addition", "extruded_digits"


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_leaves_a_table_and_pictures(name, folder, tmp_path, capsys):
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    from matplotlib import image
    from PIL import Image

    script = importlib.import_module(f"examples.{name}")
    arguments = ["--quick", "--data", str(folder), "--stand-in", "--output", str(tmp_path), "--device", "cpu"]
    arguments += ["--steps", "2", "--batch", "6", *SCRIPTS[name]]
    assert script.main(arguments) == 0
    table = (tmp_path / f"{name}.md").read_text()
    assert table.strip() in capsys.readouterr().out
    said = "the paper gives no schedule" if name == "colocalisation" else "run short of the paper's schedule"
    assert said in table
    assert "a stand-in" in table.splitlines()[0]
    assert "2 iterations of 6" in table
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert content["facts"]["torch"] == torch.__version__
    assert "stand-in" in content["data"]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(content["lines"]) >= 1
    for picture in PICTURES[name]:
        assert image.imread(tmp_path / f"{picture}.png")[..., :3].std() > 0.05
        with Image.open(tmp_path / f"{picture}.gif") as animation:
            assert animation.n_frames == 3  # at first and after each step
    if name in WARMED_UP:
        assert all(line["warm_up"] > 0 for line in content["lines"])
        assert table.count("Distortions grow from none over the first") == 1
    if name == "colocalisation":  # its warm-up is the lead of the search
        assert "Distortions grow" not in table
    if name == "birds":  # of its windows those of the control stay
        moved = {
            line["name"]: line["figures"][0].get("window 0 across, deviation") for line in content["lines"]
        }
        assert moved["CNN"] is None
        assert moved["2xST-CNN"] > 0 == moved["2xST-CNN, windows still"]
        assert "2xST-CNN: windows hold both digits whole in" in table
        assert table.count("windows hold both") == 1
    # Run again it is finished already: the same table from the checkpoints.
    before = [line["values"] for line in content["lines"]]
    assert script.main(arguments) == 0
    again = json.loads((tmp_path / f"{name}.json").read_text())
    assert [line["values"] for line in again["lines"]] == before
    # What a run was trained with is not taken for something else.
    with pytest.raises(ValueError, match=f"{OTHER[name][0]} .*, now .*: name another --output"):
        script.main([*arguments, *OTHER[name][1]])


def test_step_time(tmp_path, capsys):
    from examples import svhn

    arguments = ["--quick", "--step-time", "--width", "0.05", "--batch", "2", "--output", str(tmp_path)]
    assert svhn.main([*arguments, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "Times of a CPU" in printed
    steps = json.loads((tmp_path / "svhn_step.json").read_text())["steps"]
    assert list(steps) == ["CNN", "ST-CNN Multi, PyTorch", "ST-CNN Multi, stn_triton"]
    assert steps["ST-CNN Multi, PyTorch"]["parameters"] == steps["ST-CNN Multi, stn_triton"]["parameters"]
