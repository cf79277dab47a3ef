"""CUB's folder, the stand-in, trunks, and transformers that look at parts."""

import pytest
import torch
from common import import_torchvision
from torch import nn

pytest.importorskip("skimage")
numpy = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from examples import birds  # noqa: E402
from examples.birds import settled, whole  # noqa: E402
from examples.birds_data import PARTS, SPARE, load_cub, make_single, make_stand_in  # noqa: E402
from examples.birds_models import REGIONS, BuiltInTrunk, PartsNet, make_trunk  # noqa: E402
from examples.data import Digits  # noqa: E402
from examples.files import DataError  # noqa: E402
from stn_triton import backend  # noqa: E402
from stn_triton.transforms import attention  # noqa: E402


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


def boxes(parts, side):
    """Masks, (N, K, side, side): the squares that hold the digits, a pixel larger."""
    at = (2 * torch.arange(side) + 1) / side - 1
    x0, y0 = (parts[..., axis, None] - parts[..., 2, None] - 2 / side for axis in (0, 1))
    x1, y1 = (parts[..., axis, None] + parts[..., 2, None] + 2 / side for axis in (0, 1))
    return ((at > y0) & (at < y1)).unsqueeze(-1) & ((at > x0) & (at < x1)).unsqueeze(-2)


@pytest.mark.parametrize("make, k", [(make_stand_in, 2), (make_single, 1)])
def test_stand_in(digits, make, k):
    first, second = (make(digits, 16, 56, kinds=2, seed=4) for _ in range(2))
    assert "stand-in, synthetic digits" in first.source
    assert torch.equal(first.images, second.images)
    side = round(SPARE * 56)
    assert first.images.shape == (16, 3, side, side)
    assert first.classes == (["0 and 2", "0 and 3", "1 and 2", "1 and 3"] if k == 2 else ["0", "1", "2", "3"])
    assert first.labels.unique().numel() == 4
    # The digits are where the parts say, and nothing else differs from the same scenes without ink.
    blank = digits._replace(images=torch.zeros_like(digits.images))
    changed = (make(blank, 16, 56, 2, 4).images.int() - first.images.int()).abs().amax(1) > 8
    masks = boxes(first.parts, side)
    assert masks.shape == (16, k, side, side)
    assert not (changed & ~masks.any(1)).any()
    assert ((changed.unsqueeze(1) & masks).sum((2, 3)) > 0.2 * masks.sum((2, 3))).all()
    if k == 2:
        assert (first.parts[:, 0, 1] < first.parts[:, 1, 1]).all()


def test_label_is_the_pair():
    """Of bars, each as high as the digit says, from a fifth of the ink's side to four."""
    images = torch.zeros(4, 28, 28, dtype=torch.uint8)
    for value in range(4):
        images[value, 4 : 4 + 4 * (1 + value), 4:24] = 255
    digits = Digits(images, torch.arange(4), "bars")
    scenes = make_stand_in(digits, 30, 224, kinds=2, seed=0, contrast=0.0)
    ground = scenes.images[:, :, :1, :1]  # without contrast there is one colour and the ink
    ink = (scenes.images.int() - ground.int()).abs().amax(1) > 60
    heights = (ink.unsqueeze(1) & boxes(scenes.parts, 256)).any(3).sum(2) / (256 * scenes.parts[..., 2])
    values = (5 * heights - 1).round().long()
    assert torch.equal(values[:, 0] * 2 + values[:, 1] - 2, scenes.labels)


@pytest.mark.parametrize("make", [make_stand_in, make_single])
def test_contrast(digits, make):
    blank = digits._replace(images=torch.zeros_like(digits.images))
    full, faded, none = (
        make(blank, 8, 56, 2, 0, contrast=contrast).images.float().std((2, 3)).mean()
        for contrast in (1.0, 0.5, 0.0)
    )
    assert full > 10
    assert faded == pytest.approx(0.5 * full.item(), rel=0.05)
    assert none == 0


def test_single_digits_are_as_large_as_in_windows(digits):
    parts = make_stand_in(digits, 100, 56, 2, 0).parts, make_single(digits, 100, 28, 2, 0).parts
    pixels = [half[..., 2] * side for half, side in zip(parts, (64, 32))]
    assert pixels[0].mean() == pytest.approx(pixels[1].mean().item(), rel=0.03)


@pytest.mark.parametrize("mirrored", [True, False])
def test_windows_are_inside_and_birds_mirrored(digits, mirrored):
    scenes = make_stand_in(digits, 4, 56, kinds=2, seed=0)
    assert not scenes.mirrored  # digits are none when mirrored
    scenes = scenes._replace(mirrored=mirrored)
    theta = scenes.windows(200, 56, torch.Generator().manual_seed(0))
    corners = theta[:, :, :2].abs().sum(-1) + theta[:, :, 2].abs()
    assert corners.max() <= 1 + 1e-6
    flipped = (theta[:, 0, 0] < 0).sum()
    assert 60 < flipped < 140 if mirrored else flipped == 0
    assert (theta[:, 1, 1] > 0).all()
    middle = scenes.take(torch.tensor([2]), 56)
    assert torch.equal((middle[0] * 255).round().byte(), scenes.images[2, :, 4:-4, 4:-4])


def test_whole():
    """A square of half side 0.2 in windows of half side 0.5: up to 0.3 off their middles."""
    theta = attention(0.5, torch.tensor([[[-0.5, -0.5], [0.5, 0.5]]]))
    places = [(-0.5, -0.5), (-0.21, -0.79), (-0.19, -0.5), (-0.5, -0.19), (0.79, 0.21), (0.5, -0.5)]
    parts = torch.tensor([[(*place, 0.2) for place in places]])
    expected = [(1, 0), (1, 0), (0, 0), (0, 0), (0, 1), (0, 0)]
    assert whole(theta, parts)[0].int().tolist() == [list(row) for row in expected]


@pytest.mark.parametrize("follows", [True, False])
def test_where_windows_settle(digits, follows, monkeypatch):
    """One window on each digit, in the other's order; or both where they are on average."""
    scenes = make_stand_in(digits, 100, 64, 2, seed=0)
    places = scenes.parts[..., :2].flip(1) * scenes.images.shape[-1] / 64
    if not follows:
        places = places.mean(0).expand_as(places)
    model = PartsNet(BuiltInTrunk(16), 4, 2, size=64, crop=32, dropout=0.0).eval()
    batches = iter(attention(0.5, places).split(25))
    monkeypatch.setattr(model, "look", lambda images: (next(batches), None))
    monkeypatch.setattr(birds, "_batches", lambda photographs: torch.arange(100).split(25))
    figures = settled(model, scenes, 64)
    moved = "mean", "deviation"
    for k in (0, 1):
        for at, axis in enumerate(("across", "down")):
            window, part = (
                [figures[f"{what} {k} {axis}, {name}"] for name in moved] for what in ("window", "part")
            )
            assert part[0] == pytest.approx(PARTS[k][at] * SPARE, abs=0.1)
            assert window == pytest.approx(part if follows else [part[0], 0], abs=1e-5)
            assert figures[f"{k} {axis}, correlation"] == pytest.approx(float(follows), abs=1e-3)
    assert figures["whole"] == pytest.approx(100 if follows else figures["whole if held"])
    assert 20 < figures["whole if held"] < 95
    assert figures["whole at first"] < 30
    held = attention(0.5, places.mean(0))
    with torch.no_grad():
        right = (
            model(scenes.take(torch.arange(100), 64), held.expand(100, -1, -1, -1)).argmax(1) == scenes.labels
        )
    assert figures["accuracy if held"] == pytest.approx(100 * right.double().mean().item())


def test_told_windows_can_be_put_elsewhere():
    model = PartsNet(BuiltInTrunk(16), 5, 2, size=64, crop=32).eval()
    images = torch.rand(2, 3, 64, 64)
    theta, _ = model.look(images)
    torch.testing.assert_close(model(images, theta), model(images))
    assert not torch.allclose(model(images, theta.flip(1)), model(images))


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
