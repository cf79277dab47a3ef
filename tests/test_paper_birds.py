"""CUB's folder, the stand-in, trunks, and transformers that look at parts."""

import pytest
import torch
from common import import_torchvision
from torch import nn

pytest.importorskip("skimage")
numpy = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from examples.birds_data import SPARE, load_cub, make_single, make_stand_in  # noqa: E402
from examples.birds_models import REGIONS, BuiltInTrunk, PartsNet, make_trunk  # noqa: E402
from examples.data import Digits  # noqa: E402
from examples.files import DataError  # noqa: E402
from stn_triton import backend  # noqa: E402


@pytest.fixture(autouse=True)
def _torch():
    """Whole photographs are too much for an interpreter."""
    with backend.use("torch"):
        yield


@pytest.fixture(scope="module")
def digits():
    images = torch.zeros(40, 28, 28, dtype=torch.uint8)
    images[:, 6:22, 8:20] = 255
    return Digits(images, torch.arange(40) % 10, "synthetic")


@pytest.fixture
def cub(tmp_path):
    """Four pictures of two species: red ones of 60 x 40 pixels, and green ones."""
    names = ["001.A/a1.jpg", "001.A/a2.jpg", "002.B/b1.jpg", "002.B/b2.jpg"]
    for index, name in enumerate(names):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = numpy.zeros((40, 60, 3), numpy.uint8)
        pixels[..., index // 2] = 200 if index % 2 == 0 else 100  # brighter for training
        pixels[:, :10] = pixels[:, 50:] = 255  # beside the middle square
        Image.fromarray(pixels).save(path, quality=95)

    def write(name, rows):
        (tmp_path / name).write_text("".join(f"{key} {value}\n" for key, value in rows))

    write("images.txt", enumerate(names, 1))
    write("image_class_labels.txt", [(1, 1), (2, 1), (3, 2), (4, 2)])
    write("classes.txt", [(1, "001.A"), (2, "002.B")])
    write("train_test_split.txt", [(1, 1), (2, 0), (3, 1), (4, 0)])
    return tmp_path


def test_official_folder(cub):
    birds = load_cub(cub, 28)
    assert birds.train.classes == ["001.A", "002.B"]
    for half, bright in zip(birds, (200, 100)):
        assert half.source.startswith("CUB")
        assert half.images.shape == (2, 3, 32, 32)  # room for crops of 28
        assert half.labels.tolist() == [0, 1]
        red, green = half.images.float()[:, :, :, 2:-2].mean((2, 3))
        assert red.tolist() == pytest.approx([bright, 0, 0], abs=4)
        assert green.tolist() == pytest.approx([0, bright, 0], abs=4)
    (cub / "images" / "001.A" / "a1.jpg").unlink()
    assert torch.equal(load_cub(cub, 28).train.images, birds.train.images)  # from what it kept


def test_other_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not CUB-200-2011: it has no images\.txt"):
        load_cub(tmp_path, 28)


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "missing"])
def test_damaged_photograph_is_named(cub, how):
    path = cub / "images" / "002.B" / "b1.jpg"
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": path.read_bytes()[:300], "empty": b"", "text": b"<html>"}[how])
    with pytest.raises(DataError, match=r"b1\.jpg cannot be used: .*Get CUB-200-2011 anew from"):
        load_cub(cub, 28)
    assert not list(cub.glob("*.pt"))


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("images.txt", "", "it is empty"),
        ("images.txt", "1\n2\n", "ValueError"),
        ("images.txt", "\xff", "UnicodeDecodeError"),
        ("image_class_labels.txt", "1 1\n2 1\n3 2\n", "KeyError: '4'"),
        ("image_class_labels.txt", "1 1\n2 1\n3 2\n4 3\n", "it has 1 to 3, not 1 to 2"),
        ("image_class_labels.txt", "1 0\n2 1\n3 2\n4 2\n", "it has 0 to 2, not 1 to 2"),
        ("image_class_labels.txt", "1 1\n2 1\n3 two\n4 2\n", "invalid literal"),
        ("train_test_split.txt", "1 1\n2 0\n3 7\n4 0\n", "it has 0 to 7, not 0 to 1"),
        ("classes.txt", "1 001.A\n3 002.B\n", "KeyError: '2'"),
    ],
)
def test_damaged_tables_are_named(cub, name, content, says):
    (cub / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=rf"{name} cannot be used: .*{says}.*Get CUB-200-2011 anew from"):
        load_cub(cub, 28)


def test_damaged_squares_are_named(cub):
    load_cub(cub, 28)
    path = cub / "squares-32.pt"
    torch.save(torch.load(path)[:3], path)
    with pytest.raises(DataError, match=r"squares-32\.pt cannot be used: .*Delete it, and it is made again"):
        load_cub(cub, 28)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"squares-32\.pt cannot be used: .*Delete it"):
        load_cub(cub, 28)


def test_stand_in(digits):
    first, second = (make_stand_in(digits, 16, 56, kinds=3, seed=4) for _ in range(2))
    assert "stand-in, synthetic digits" in first.source
    assert torch.equal(first.images, second.images)
    assert first.images.shape == (16, 3, round(SPARE * 56), round(SPARE * 56))
    assert len(first.classes) == 9
    assert first.labels.unique().numel() > 5
    # One digit above and one below, wherever the scenes differ from those of the same seed without ink.
    blank = digits._replace(images=torch.zeros_like(digits.images))
    changed = (make_stand_in(blank, 16, 56, 3, 4).images.int() - first.images.int()).abs().amax(1) > 8
    assert changed[:, :32].flatten(1).any(1).all()
    assert changed[:, 32:].flatten(1).any(1).all()


def test_single_digits(digits):
    """As large as in windows of half the stand-in: twice as large in the image."""
    found = make_single(digits, 16, 56, kinds=3, seed=4)
    assert found.classes == ["0", "1", "2"]
    assert set(found.labels.tolist()) == {0, 1, 2}
    blank = digits._replace(images=torch.zeros_like(digits.images))
    changed = (make_single(blank, 16, 56, 3, 4).images.int() - found.images.int()).abs().amax(1) > 8
    pairs = make_stand_in(blank, 16, 56, 3, 4).images.int() - make_stand_in(digits, 16, 56, 3, 4).images.int()
    both = (pairs.abs().amax(1) > 8).float().mean()
    assert changed.float().mean() == pytest.approx(2 * both.item(), rel=0.25)  # one of four times the area


def test_windows_are_inside_and_mirrored(digits):
    scenes = make_stand_in(digits, 4, 56, kinds=2, seed=0)
    theta = scenes.windows(200, 56, torch.Generator().manual_seed(0))
    corners = theta[:, :, :2].abs().sum(-1) + theta[:, :, 2].abs()
    assert corners.max() <= 1 + 1e-6
    mirrored = theta[:, 0, 0] < 0
    assert 60 < mirrored.sum() < 140
    assert (theta[:, 1, 1] > 0).all()
    middle = scenes.take(torch.tensor([2]), 56)
    assert torch.equal((middle[0] * 255).round().byte(), scenes.images[2, :, 4:-4, 4:-4])


@pytest.mark.parametrize("transformers", [2, 4])
def test_transformers_start_apart(transformers):
    """Each at its region, half of the image's side; crops are pixel for pixel the image's."""
    model = PartsNet(BuiltInTrunk(16), 5, transformers, size=64, crop=32)
    images = torch.rand(2, 3, 64, 64)
    theta, crops = model.look(images)
    assert theta.shape == (2, transformers, 2, 3)
    for index, (x0, y0, _, _) in enumerate(REGIONS[transformers]):
        left, top = round(32 * (x0 + 1)), round(32 * (y0 + 1))
        torch.testing.assert_close(crops[:, index], images[:, :, top : top + 32, left : left + 32])
    assert model(images).shape == (2, 5)
    assert model.transformer.regression.out_features == 2 * transformers  # 50 % is fixed


def test_no_transformer_sees_all_in_as_many_pixels():
    model = PartsNet(BuiltInTrunk(16), 5, 0, size=64, crop=32).eval()
    images = torch.rand(2, 3, 64, 64)
    averaged = images.unflatten(3, (32, 2)).unflatten(2, (32, 2)).mean((3, 5))
    normal = (averaged - model.mean) / model.deviation
    torch.testing.assert_close(model(images), model.classifier(model.trunk(normal).mean((2, 3))))


def test_trunk_is_shared_and_the_localisations_is_not():
    model = PartsNet(BuiltInTrunk(16), 5, 2, size=64, crop=32)
    looking = model.transformer.localisation[0]
    assert isinstance(looking, BuiltInTrunk)
    assert looking is not model.trunk
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.trunk.parameters())
    for parameter, copied in zip(model.trunk.parameters(), looking.parameters()):
        assert torch.equal(parameter, copied)
        assert parameter.data_ptr() != copied.data_ptr()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"transformers": 3}, "transformers must be 0, 2 or 4"),
        ({"size": 100, "crop": 64}, "size must be a multiple"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PartsNet(nn.Identity(), 5, **arguments)


@pytest.fixture
def torchvision():
    return import_torchvision("models")


@pytest.mark.parametrize("name, features", [("googlenet", 1024), ("resnet18", 512), ("mobilenet_v2", 1280)])
def test_torchvision_trunks(torchvision, name, features):
    trunk = make_trunk(name).eval()
    with torch.no_grad():
        assert trunk(torch.rand(1, 3, 64, 64)).shape == (1, features, 2, 2)


def test_unknown_trunk(torchvision):
    with pytest.raises(ValueError, match="no classifier 'nothing'"):
        make_trunk("nothing")


def test_timm_trunk():
    pytest.importorskip("timm")
    with torch.no_grad():
        assert make_trunk("timm:resnet18").eval()(torch.rand(1, 3, 64, 64)).shape == (1, 512, 2, 2)
