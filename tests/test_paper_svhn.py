"""SVHN: the official files' formats, the stand-in, and the three models."""

import shutil
import tarfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("skimage")
numpy = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

import stn_triton as stn  # noqa: E402
from examples.data import Digits  # noqa: E402
from examples.files import DataError  # noqa: E402
from examples.outputs import looks  # noqa: E402
from examples.svhn import Reading, following, frame  # noqa: E402
from examples.svhn_cost import cost_table, layer_cost, sampling_cost, step_costs, summed  # noqa: E402
from examples.svhn_data import (  # noqa: E402
    MARGIN,
    NONE,
    Sequences,
    load_cropped_digits,
    load_full_numbers,
    make_stand_in,
    read_structure,
)
from examples.svhn_models import (  # noqa: E402
    KINDS,
    TorchTransformer,
    sequence_errors,
    sequence_loss,
    svhn_net,
)
from stn_triton import backend  # noqa: E402
from stn_triton.nn import SpatialTransformer  # noqa: E402
from stn_triton.transforms import attention  # noqa: E402


@pytest.fixture(autouse=True)
def _torch():
    """Whole photographs are too much for an interpreter; the kernels have tests of their own."""
    with backend.use("torch"):
        yield


@pytest.fixture(scope="module")
def digits():
    """Blobs in place of digits; what they look like does not matter here."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(50, 28, 28, dtype=torch.uint8)
    images[:, 6:22, 8:20] = torch.randint(64, 256, (50, 16, 12), generator=generator, dtype=torch.uint8)
    return Digits(images, torch.arange(50) % 10, "synthetic")


# ------------------------------------------------------------------------------------- full numbers
PICTURES = {
    "1.png": ([(20, 10, 12, 20), (34, 12, 12, 20)], [1, 10]),  # left, top, width, height; 10 is a zero
    "2.png": ([(5, 5, 20, 30)], [7]),
    "3.png": ([(4 + 6 * i, 8, 5, 9) for i in range(6)], [1, 2, 3, 4, 5, 6]),  # too long
}


def picture(name, boxes):
    """Grey, with red digits."""
    pixels = numpy.full((40, 60, 3), 90, numpy.uint8)
    for left, top, width, height in boxes:
        pixels[top : top + height, left : left + width] = 220, 10, 10
    return Image.fromarray(pixels)


def write_structure(path):
    """As MATLAB writes it (-v7.3): columns; of several values references, a single one in its place."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        hidden = file.create_group("#refs#")
        count = iter(range(10**6))

        def reference(values):
            data = numpy.asarray(values)
            return hidden.create_dataset(f"a{next(count)}", data=data).ref

        names, boxes = [], []
        for name, (digits, labels) in PICTURES.items():
            names.append(reference([[ord(letter)] for letter in name]))
            group = hidden.create_group(f"a{next(count)}")
            columns = dict(zip(("left", "top", "width", "height"), zip(*digits)), label=labels)
            for key, values in columns.items():
                if len(values) == 1:
                    group.create_dataset(key, data=[[float(values[0])]])
                else:
                    column = [[reference([[float(value)]])] for value in values]
                    group.create_dataset(key, data=numpy.array(column, dtype=h5py.ref_dtype))
            boxes.append(group.ref)
        structure = file.create_group("digitStruct")
        for key, column in (("name", names), ("bbox", boxes)):
            structure.create_dataset(key, data=numpy.array([[one] for one in column], dtype=h5py.ref_dtype))


@pytest.fixture(params=["unpacked", "archive"])
def official(request, tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    write_structure(folder / "digitStruct.mat")
    for name, (boxes, _) in PICTURES.items():
        picture(name, boxes).save(folder / name)
    if request.param == "archive":
        with tarfile.open(tmp_path / "train.tar.gz", "w:gz") as files:
            files.add(folder, "train")
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    return tmp_path


def test_structure_is_read(tmp_path):
    write_structure(tmp_path / "digitStruct.mat")
    found = read_structure((tmp_path / "digitStruct.mat").read_bytes())
    assert [number.name for number in found] == list(PICTURES)
    for number, (boxes, labels) in zip(found, PICTURES.values()):
        assert number.boxes.tolist() == [list(map(float, box)) for box in boxes]
        assert number.digits == [label % 10 for label in labels]


@pytest.mark.parametrize("size", [64, 128])
def test_full_numbers_are_cropped_around_the_sequence(official, size):
    found = load_full_numbers(official, "train", size)
    assert "SVHN" in found.source
    order = found.labels[:, 0].argsort()  # an archive has its own order
    assert found.labels[order].tolist() == [[1, 0, NONE, NONE, NONE], [7, NONE, NONE, NONE, NONE]]
    images = found.images[order]
    assert images.shape == (2, 3, size, size)
    # The box around all digits fills 1 / margin of the crop, in the middle.
    red = (images[:, 0] > 150) & (images[:, 1] < 60)
    for mask in red:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        for where in (rows, columns):
            assert len(where) == pytest.approx(size / MARGIN[size], rel=0.08)
            assert where.float().mean() == pytest.approx((size - 1) / 2, abs=2)
    again = load_full_numbers(official, "train", size)  # from the file it left
    assert torch.equal(again.images, found.images)
    assert [path.name for path in official.glob("*.pt")] == [f"train-{size}.pt"]


def test_killed_while_reading_leaves_nothing(official, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    before = sorted(path.name for path in official.iterdir())
    with pytest.raises(KeyboardInterrupt):
        load_full_numbers(official, "train", 64)
    assert sorted(path.name for path in official.iterdir()) == before


def packed(folder, change=lambda member: [member]):
    """The unpacked half as an archive; ``change``: what comes in place of a member."""
    with tarfile.open(folder / "train.tar.gz", "w:gz") as files:
        for path in sorted((folder / "train").iterdir()):
            for member in change(path):
                files.add(member, f"train/{member.name}")
    shutil.rmtree(folder / "train")
    return folder / "train.tar.gz"


@pytest.fixture
def unpacked(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    write_structure(folder / "digitStruct.mat")
    for name, (boxes, _) in PICTURES.items():
        picture(name, boxes).save(folder / name)
    return tmp_path


@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
@pytest.mark.parametrize("name", ["digitStruct.mat", "2.png"])
def test_damaged_full_numbers(unpacked, name, how):
    path = unpacked / "train" / name
    path.write_bytes({"truncated": path.read_bytes()[:-90], "empty": b"", "text": b"<html>"}[how])
    with pytest.raises(DataError, match=rf"{name} cannot be used: .*Get SVHN's files anew"):
        load_full_numbers(unpacked, "train", 64)
    archive = packed(unpacked)
    with pytest.raises(
        DataError, match=rf"{name} in .*{archive.name} cannot be used: .*Get SVHN's files anew"
    ):
        load_full_numbers(unpacked, "train", 64)
    assert [path.name for path in unpacked.iterdir()] == ["train.tar.gz"]


@pytest.mark.parametrize(
    "how, says",
    [
        ("truncated", "EOFError|ReadError"),
        ("empty", "ReadError|EOFError"),
        ("no structure", "it has no digitStruct.mat"),
        ("no picture", "it lacks 1 photographs, 2.png among them"),
    ],
)
def test_damaged_archive(unpacked, how, says):
    left_out = {"no structure": "digitStruct.mat", "no picture": "2.png"}.get(how)
    archive = packed(unpacked, lambda path: [] if path.name == left_out else [path])
    if how in ("truncated", "empty"):
        archive.write_bytes(archive.read_bytes()[: 400 if how == "truncated" else 0])
    with pytest.raises(DataError, match=rf"train\.tar\.gz cannot be used: .*({says})"):
        load_full_numbers(unpacked, "train", 64)


def test_missing_picture_is_named(unpacked):
    (unpacked / "train" / "2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png cannot be used: it is missing"):
        load_full_numbers(unpacked, "train", 64)


def test_what_macos_adds_to_archives_is_passed_over(unpacked):
    """AppleDouble files beside each file, and folders whose names end like those of files."""
    expected = load_full_numbers(unpacked, "train", 64)
    (unpacked / "train-64.pt").unlink()
    more = unpacked / "more"
    (more / "5.png").mkdir(parents=True)
    (more / "digitStruct.mat").mkdir()

    def change(path):
        double = more / f"._{path.name}"
        double.write_bytes(b"Mac OS X")
        return [double, path]

    (unpacked / "train.tar.gz").unlink(missing_ok=True)
    archive = packed(unpacked, change)
    whole = archive.with_name("whole.tar.gz")
    with tarfile.open(archive) as old, tarfile.open(whole, "w:gz") as new:
        for name in ("5.png", "digitStruct.mat"):
            new.add(more / name, f"train/{name}", recursive=False)
        for member in old:
            new.addfile(member, old.extractfile(member))
    whole.rename(archive)
    found = load_full_numbers(unpacked, "train", 64)
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize("label", [0, 11, -1, 2.5, float("nan")])
def test_labels_of_full_numbers_are_1_to_10(unpacked, monkeypatch, label):
    monkeypatch.setitem(PICTURES, "2.png", ([(5, 5, 20, 30)], [label]))
    write_structure(unpacked / "train" / "digitStruct.mat")
    with pytest.raises(DataError, match=r"digitStruct\.mat cannot be used: .*2\.png has the labels"):
        load_full_numbers(unpacked, "train", 64)


@pytest.mark.parametrize(
    "box",
    [
        *((5, 5, width, 30) for width in (1e4, 1e30, -20, 0, float("nan"), float("inf"))),
        *((5, 5, 20, height) for height in (1e4, 1e30, -30, 0, float("nan"))),
        *((left, 5, 20, 30) for left in (1e4, -1e4, 1e30, float("nan"))),
    ],
    ids=str,
)
def test_boxes_that_cannot_be(unpacked, monkeypatch, box):
    monkeypatch.setitem(PICTURES, "2.png", ([box], [7]))
    write_structure(unpacked / "train" / "digitStruct.mat")
    with pytest.raises(DataError, match=r"digitStruct\.mat cannot be used: .*2\.png"):
        load_full_numbers(unpacked, "train", 64)
    archive = packed(unpacked)
    with pytest.raises(DataError, match=rf"digitStruct\.mat in .*{archive.name} cannot be used: .*2\.png"):
        load_full_numbers(unpacked, "train", 64)


def test_boxes_may_reach_over_the_edge(unpacked, monkeypatch):
    monkeypatch.setitem(PICTURES, "2.png", ([(-3, -2, 20, 45)], [7]))
    write_structure(unpacked / "train" / "digitStruct.mat")
    assert len(load_full_numbers(unpacked, "train", 64).labels) == 2


def test_long_numbers_alone_are_refused(unpacked, monkeypatch):
    for name in ("1.png", "2.png"):
        monkeypatch.delitem(PICTURES, name)
    write_structure(unpacked / "train" / "digitStruct.mat")
    with pytest.raises(DataError, match=r"digitStruct\.mat cannot be used: .*no number of up to 5 digits"):
        load_full_numbers(unpacked, "train", 64)


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/hosts", "a/b.png", ""])
def test_names_that_lead_elsewhere_are_refused(unpacked, monkeypatch, name):
    monkeypatch.setitem(PICTURES, name, PICTURES["2.png"])
    write_structure(unpacked / "train" / "digitStruct.mat")
    with pytest.raises(DataError, match=r"digitStruct\.mat cannot be used"):
        load_full_numbers(unpacked, "train", 64)


@pytest.mark.parametrize("how", ["truncated", "labels", "shapes"])
def test_damaged_crops_are_named(unpacked, how):
    load_full_numbers(unpacked, "train", 64)
    path = unpacked / "train-64.pt"
    images, labels = torch.load(path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "labels":
        torch.save((images, labels + 8), path)
    else:
        torch.save((images[:1], labels), path)
    with pytest.raises(DataError, match=r"train-64\.pt cannot be used: .*Delete it, and it is made again"):
        load_full_numbers(unpacked, "train", 64)


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "no labels", "labels", "counts"])
def test_damaged_cropped_digits(tmp_path, how):
    matlab = pytest.importorskip("scipy.io")
    path = tmp_path / "test_32x32.mat"
    content = {"X": numpy.zeros((32, 32, 3, 4), numpy.uint8), "y": numpy.array([[10], [3], [5], [9]])}
    if how == "no labels":
        del content["y"]
    elif how == "labels":
        content["y"][0] = 11
    elif how == "counts":
        content["y"] = content["y"][:3]
    matlab.savemat(path, content)
    if how in ("truncated", "empty", "text"):
        path.write_bytes({"truncated": path.read_bytes()[:-200], "empty": b"", "text": b"<html>"}[how])
    with pytest.raises(DataError, match=r"test_32x32\.mat cannot be used: .*Get SVHN's files anew"):
        load_cropped_digits(tmp_path, "test", 64)


@pytest.mark.parametrize("place, value", [(145, 8), (160, 200)])
def test_damage_that_can_end_the_reader(tmp_path, place, value):
    """Flags and sizes of an array that is not compressed: SciPy looks for what is not there."""
    matlab = pytest.importorskip("scipy.io")
    path = tmp_path / "test_32x32.mat"
    matlab.savemat(path, {"X": numpy.zeros((32, 32, 3, 4), numpy.uint8), "y": numpy.zeros((4, 1))})
    damaged = bytearray(path.read_bytes())
    damaged[place] = value
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"test_32x32\.mat cannot be used: "):
        load_cropped_digits(tmp_path, "test", 64)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"test\.tar\.gz.*housenumbers"):
        load_full_numbers(tmp_path, "test", 64)
    with pytest.raises(FileNotFoundError, match=r"test_32x32\.mat.*housenumbers"):
        load_cropped_digits(tmp_path, "test", 64)


def test_cropped_digits(tmp_path):
    matlab = pytest.importorskip("scipy.io")
    pixels = numpy.zeros((32, 32, 3, 4), numpy.uint8)
    for index in range(4):
        pixels[..., index] = 40 * index
    pixels[:16, :, 0] += 100  # the upper half, redder
    matlab.savemat(tmp_path / "test_32x32.mat", {"X": pixels, "y": numpy.array([[10], [3], [5], [9]])})
    found = load_cropped_digits(tmp_path, "test", 64)
    assert found.labels.tolist() == [[digit] + [NONE] * 4 for digit in (0, 3, 5, 9)]
    assert found.images.shape == (4, 3, 64, 64)
    assert found.images[2, :, 50, 10].tolist() == [80, 80, 80]
    assert found.images[2, :, 10, 50].tolist() == [180, 80, 80]


# ------------------------------------------------------------------------------------------ stand-in
def test_stand_in_is_labelled_and_repeatable(digits):
    first, second, other = (make_stand_in(digits, 16, 64, seed) for seed in (1, 1, 2))
    assert "stand-in" in first.source
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.images, other.images)
    present = first.labels != NONE
    assert present[:, 0].all()  # no empty sequence,
    assert not (present[:, 1:] & ~present[:, :-1]).any()  # nor one with a hole
    assert present.sum(1).unique().numel() >= 3
    assert first.take(torch.arange(5)).mean((1, 2, 3)).abs().max() < 1e-5


def test_stand_in_is_as_asked(digits):
    found = make_stand_in(digits, 60, 32, 4, longest=2, spread=0.4)
    assert set((found.labels != NONE).sum(1).tolist()) == {1, 2}
    assert found.labels.shape == (60, 5)
    assert 0.38 < found.places.abs().amax() <= 0.4
    blank = digits._replace(images=torch.zeros_like(digits.images))
    plain, faded = (make_stand_in(blank, 10, 32, 4, contrast=value).images.float() for value in (1.0, 0.25))
    torch.testing.assert_close(faded.std((2, 3)), 0.25 * plain.std((2, 3)), atol=0.5, rtol=0)


def test_strength_moves_sequences_off_the_middle():
    """Of 0 they are in it, of 1 where the scene has them, of a half halfway."""
    images = torch.full((2, 3, 32, 32), 20, dtype=torch.uint8)
    images[0, :, 4:8, 20:24], images[1, :, 22:26, 8:12] = 220, 220
    places = torch.tensor([[0.375, -0.625], [-0.375, 0.5]])  # of the squares' middles
    labels = torch.zeros(2, 5, dtype=torch.long)
    scenes, index = Sequences(images, labels, "squares", places), torch.arange(2)
    pixels = (2 * torch.arange(32) + 1) / 32 - 1
    for strength in (0.0, torch.tensor(0.5), 1.0):
        light = scenes.take(index, strength).mean(1)
        light = light - light.amin((1, 2), keepdim=True)
        across, down = (light.sum(dim) @ pixels / light.sum((1, 2)) for dim in (1, 2))
        torch.testing.assert_close(torch.stack([across, down], -1), strength * places)
    assert scenes._replace(places=None).take(index, 0.0).equal(scenes._replace(places=None).take(index))


def test_numbers_move_by_the_cube_in_training_alone(digits):
    scenes = make_stand_in(digits, 20, 32, 0)
    task = Reading(scenes, scenes, seed=3)
    task.strength.fill_(0.5)
    images, labels = task.batch(6, slice(2, 5))
    index = torch.randint(20, (6,), generator=torch.Generator().manual_seed(3))[2:5]
    torch.testing.assert_close(images, scenes.take(index, 0.125))
    assert torch.equal(labels, scenes.labels[index])
    seen = []
    net = nn.Conv2d(3, 1, 1)
    net.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    task.snapshot(net)
    torch.testing.assert_close(seen[0], scenes.take(torch.arange(8)))


def test_stand_in_shows_its_digits(digits):
    """Scenes of the same seed without ink differ where, and only where, the sequence is."""
    blank = digits._replace(images=torch.zeros_like(digits.images))
    with_ink, without = (make_stand_in(one, 12, 128, 3).images.int() for one in (digits, blank))
    changed = ((with_ink - without).abs().amax(1) > 8).float()
    assert changed.mean((1, 2)).min() > 0.01
    assert changed[:, :16].sum() == 0
    assert changed[:, -16:].sum() == 0


# -------------------------------------------------------------------------------------------- models
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("kind, transformers", list(zip(KINDS, [0, 1, 4])))
def test_models(kind, transformers, size):
    model = svhn_net(kind, size, width=0.1)
    images = torch.rand(2, 3, size, size)
    found = looks(lambda: model(images), model)
    assert len(found) == transformers
    channels = [look.input.shape[1] for look in found]
    assert channels == [3, 5, 6, 13][:transformers]  # three of four on feature maps
    for _, seen, theta, output in found:  # at the start all look at everything
        torch.testing.assert_close(theta, torch.eye(2, 3).expand_as(theta))
        torch.testing.assert_close(output, seen, atol=1e-4, rtol=1e-4)
    assert model(torch.rand(2, 3, size, size)).shape == (2, 5, 11)


def test_frame_shows_where_the_last_output_comes_from():
    """Transformers in a row read what the product of their matrices reads."""
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    half = torch.tensor([[0.5, 0, 0.25], [0, 0.5, -0.25]]).expand(2, 2, 3)
    panel = frame(images, [half, half])[0]
    torch.testing.assert_close(panel.parameters[0], half[0])
    torch.testing.assert_close(panel.parameters[1], torch.tensor([[0.25, 0, 0.375], [0, 0.25, -0.375]]))
    expected = stn.affine_grid_sample(images[:1], panel.parameters[1:], (16, 16))[0]
    torch.testing.assert_close(panel.outputs[0], expected)


def test_following(digits):
    """A transformer that reads where the number is follows it; put to the identity it has the plain error."""

    class Knows(SpatialTransformer):
        def localise(self, input):
            return attention(1.0, 0.5 * scenes.places[: len(input)])

    scenes = make_stand_in(digits, 30, 32, 0)
    net = svhn_net("ST-CNN Multi", 32, width=0.1, transformer=Knows).eval()
    plain = nn.Sequential(*(layer for layer in net if not isinstance(layer, Knows)))
    index = torch.arange(30)
    with torch.no_grad():
        labels = plain(scenes.take(index)).argmax(-1)
        assert sequence_errors(net(scenes.take(index)), labels).any()
    found = following(net, scenes._replace(labels=labels))
    assert found["error_at_identity"] == 0
    for axis in "xy":
        assert found[f"correlation_{axis}"] == pytest.approx(1)
        assert found[f"seen_{axis}"] == pytest.approx(4 * 0.5 * found[f"places_{axis}"])
    assert not net[0]._forward_hooks


def test_paper_widths():
    model = svhn_net("CNN", 64)
    shapes = [tuple(layer.weight.shape[:2]) for layer in model if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert [shape[0] for shape in shapes] == [48, 64, 128, 160, 192, 192, 192, 192, 3072, 3072, 55]
    assert shapes[8] == (3072, 192 * 4 * 4)
    dropped = [type(model[i + 2]) for i in range(0, 4, 3) if isinstance(model[i], nn.Conv2d)]
    assert nn.Dropout not in dropped[:1]  # none after the first convolution
    assert sum(isinstance(layer, nn.Dropout) for layer in model) == 9


def test_samplers_agree():
    """Both train the same model: what differs is who samples."""
    gradients = []
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[1, 2, NONE, NONE, NONE]] * 3)
    for transformer in (SpatialTransformer, TorchTransformer):
        torch.manual_seed(0)
        model = svhn_net("ST-CNN Multi", 64, width=0.1, dropout=0.0, transformer=transformer)
        for layer in model:
            if isinstance(layer, SpatialTransformer):
                nn.init.normal_(layer.regression.weight, std=0.1)
        sequence_loss(model(images), labels).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_a_sequence_is_wrong_if_a_place_is():
    labels = torch.tensor([[1, 2, NONE, NONE, NONE], [3, NONE, NONE, NONE, NONE]])
    logits = 20.0 * F.one_hot(labels, NONE + 1)
    assert sequence_errors(logits, labels).tolist() == [False, False]
    assert sequence_loss(logits, labels) < 1e-4
    logits[1, 4] = logits[1, 4].roll(1)
    assert sequence_errors(logits, labels).tolist() == [False, True]
    assert sequence_loss(logits, labels) == pytest.approx(10, rel=1e-3)  # one place of one of two


# ------------------------------------------------------------------------------------------ what a step costs
class Absent(SpatialTransformer):
    """Samples nothing, but its gradients go the same ways."""

    def sample(self, input, theta):
        return input + 0 * theta.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic_is_what_pytorch_counts(kind):
    """Forward and backward; images need no gradient, but what a transformer before a layer gives does."""
    net = svhn_net(kind, 32, width=0.1, transformer=Absent)
    with FlopCounterMode(display=False) as counter:
        net(torch.rand(2, 3, 32, 32)).sum().backward()
    costs = step_costs(net, 32, 2)
    assert summed(costs.layers + costs.localisation).flops == counter.get_total_flops()
    assert len(costs.sampling) == [0, 1, 4][KINDS.index(kind)]


class Traffic(TorchDispatchMode):
    """Bytes of all tensors that operators read and write, views aside."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        if not function.is_view:
            tensors = (one for one in tree_leaves((arguments, output)) if isinstance(one, torch.Tensor))
            self.bytes += sum(one.nbytes for one in tensors)
        return output


@pytest.mark.parametrize("module", [nn.ReLU(), nn.MaxPool2d(2)], ids=["relu", "pool"])
def test_traffic_is_what_operators_read_and_write(module):
    """Of the map it pooled, the backward pass takes the shape alone."""
    map = torch.rand(2, 3, 8, 8, requires_grad=True)
    gradient = torch.ones_like(module(map))
    with Traffic() as traffic:
        torch.autograd.grad(module(map), map, gradient)
    unread = map.nbytes if isinstance(module, nn.MaxPool2d) else 0
    assert layer_cost(module, map.numel(), gradient.numel(), True).bytes == traffic.bytes - unread


def test_traffic_of_products_and_samplers():
    convolution = nn.Conv2d(3, 5, 3)  # 135 weights
    assert layer_cost(convolution, 100, 70, False).bytes == 4 * 2 * (100 + 135 + 70)
    assert layer_cost(convolution, 100, 70, True).bytes == 4 * 3 * (100 + 135 + 70)
    # Of ten pixels of three channels: maps of 120 bytes, grids of 80.
    assert sampling_cost(10, 3, False, True).bytes == 4 * 120
    assert sampling_cost(10, 3, True, True).bytes == 6 * 120
    assert sampling_cost(10, 3, True, False).bytes == 7 * 120 + 5 * 80


def test_cost_table():
    lines = cost_table(32, 4, 0.1).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| CNN",
        *(f"| {kind}, {sampler}" for kind in KINDS[1:] for sampler in ("PyTorch", "stn_triton")),
    ]
    theirs, ours = (float(line.split(" | ")[2]) for line in lines[-2:])
    assert ours <= theirs
