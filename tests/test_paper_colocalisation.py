"""Co-localisation: the loss, which crop the net learns from, the encoder, and that digits are found."""

import math
from dataclasses import replace

import pytest
import torch

from examples import colocalisation
from examples.colocalisation import Boxes, Finding, most_alike, overlap, triplet_hinge
from examples.data import SIDE, Digits
from examples.training import train
from stn_triton import affine_grid_sample

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")


@pytest.fixture(scope="module")
def digits():
    """For each of ten labels twenty bars at an angle of its own."""
    y, x = torch.meshgrid(torch.arange(SIDE) - 13.5, torch.arange(SIDE) - 13.5, indexing="ij")
    labels = torch.arange(200) % 10
    angle = (labels * math.pi / 10).view(-1, 1, 1)
    across, along = x * angle.sin() - y * angle.cos(), x * angle.cos() + y * angle.sin()
    bars = 255 * ((across.abs() < 2.5) & (along.abs() < 9) & (along > -5))
    return Digits(bars.byte(), labels, "stand-in")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ring(crops):
    """(N, 1, 28, 28) -> (N, 2): ink where a blot in its frame has it, and where it has none."""
    y, x = torch.meshgrid(torch.arange(SIDE) - 13.5, torch.arange(SIDE) - 13.5, indexing="ij")
    inside = ((x.square() + y.square()) < 8**2).float()
    return torch.stack([(crops[:, 0] * one).sum((1, 2)) / inside.sum() for one in (inside, 1 - inside)], 1)


@pytest.mark.parametrize("kind", ["T", "TC"])
def test_boxes_hold_the_digits(digits, kind):
    found = colocalisation.collect(digits, 3, kind, generator(), 12)
    assert found.images.shape == (12, 1, 84, 84)
    torch.testing.assert_close(found.boxes.half, torch.full((12,), 28 / 84))
    assert (found.boxes.centre.abs() <= 1 - 28 / 84 + 1e-5).all()
    assert found.boxes.centre.std(0).min() > 0.1
    # What an attention to the box reads is the digit itself, upright and in the middle.
    crops = affine_grid_sample(found.images, found.boxes.theta(), (28, 28))
    digit = digits.images[digits.labels == 3][0] / 255
    apart = (crops[:, 0] - digit).abs().mean((1, 2))
    inked = (found.images > 0.5).float().mean((1, 2, 3))
    if kind == "T":
        assert apart.max() < 0.05
        assert inked.max() < 1.5 * (digit > 0.5).float().sum() / 84**2
    else:
        assert apart.median() < 0.2
        assert inked.mean() > 1.5 * (digit > 0.5).float().sum() / 84**2  # clutter


def test_overlap():
    unit = Boxes(torch.zeros(4, 2), torch.ones(4))
    other = Boxes(torch.tensor([[0.0, 0], [1, 0], [2, 0], [0, 0]]), torch.tensor([1.0, 1, 1, 2**-0.5]))
    torch.testing.assert_close(overlap(unit, other), torch.tensor([1, 1 / 3, 0, 0.5]))


def test_hinge():
    crops = torch.tensor([[0.0, 0], [0, 0], [2, 0]])
    far = torch.tensor([[9.0, 0], [9, 0], [9, 9]])
    assert triplet_hinge(crops, far) == 0
    near = crops + torch.tensor([0.0, 0.5])
    # (0, 1) and (1, 0) have 0 - 0.25 + 1, the other four 4 - 0.25 + 1; no image goes with itself.
    assert triplet_hinge(crops, near) == pytest.approx((2 * 0.75 + 4 * 4.75) / 6)
    # Of the two others half is one: of the first two images each other, of the third the first.
    assert triplet_hinge(crops, near, 0.5) == pytest.approx((2 * 0.75 + 4.75) / 3)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_most_alike(share):
    """By its definition, pair for pair."""
    images, tries = 6, 4
    tried, others = (
        torch.randn(images, tries, 3, generator=generator()),
        torch.randn(6, 3, generator=generator(1)),
    )
    expected = []
    for n in range(images):
        hinges = []
        for crop in tried[n]:
            apart = sorted((tried[m] - crop).square().sum(-1).min() for m in range(images) if m != n)
            kept = apart[: max(1, math.ceil(share * (images - 1)))]
            margin = 1 - (crop - others[n]).square().sum()
            hinges.append(sum((one + margin).clamp_min(0) for one in kept) / len(kept))
        expected.append(hinges.index(min(hinges)))
    assert len(set(expected)) > 1
    assert most_alike(tried, others, share).tolist() == expected
    assert most_alike(tried, others, torch.tensor(share)).tolist() == expected


def test_encoder_tells_digits_in_their_frame(digits):
    encode = colocalisation.make_encoder(digits, steps=60)
    scene = colocalisation.collect(digits, 3, "T", generator(), 16)
    theta = scene.boxes.theta().requires_grad_()
    encoded = encode(affine_grid_sample(scene.images, theta, (28, 28)))
    assert encoded.shape == (16, 64)
    (gradient,) = torch.autograd.grad(encoded.sum(), theta)  # through it, into where is cropped
    assert gradient.abs().sum() > 0
    assert not encode(scene.images[..., :28, :28]).requires_grad  # nothing in it is trained
    others = encode(colocalisation.random_crops(scene.images, generator()))

    def hinge(boxes):
        return triplet_hinge(encode(affine_grid_sample(scene.images, boxes.theta(), (28, 28))), others)

    right = hinge(scene.boxes)
    for wrong in (2.0, 3.0):
        assert right < 0.7 * hinge(Boxes(scene.boxes.centre, wrong * scene.boxes.half))
    aside = torch.tensor([0.3, 0.0])
    assert right < 0.7 * hinge(Boxes(scene.boxes.centre * 0.5 + aside, scene.boxes.half))


def test_crops_are_tried_around_the_models_less_and_less(digits):
    scene = colocalisation.collect(digits, 3, "T", generator(), 12)
    task = Finding(scene, ring, 0, tries=40)
    around = task.around(scene.boxes)
    task.strength.fill_(0)
    wide = task.around(scene.boxes)
    torch.testing.assert_close(around.centre, scene.boxes.centre.unsqueeze(1).expand(-1, 40, -1))
    torch.testing.assert_close(around.half, scene.boxes.half.unsqueeze(1).expand(-1, 40))
    assert (wide.centre - around.centre).std() == pytest.approx(colocalisation.SHIFT, rel=0.1)
    assert (wide.half / around.half).log().std() == pytest.approx(colocalisation.ZOOM, rel=0.1)


def test_at_full_strength_the_loss_is_the_papers(digits):
    scene = colocalisation.collect(digits, 3, "T", generator(), 12)
    task = Finding(scene, ring, 0)
    images, target = task.batch(12)
    theta = scene.boxes.theta()
    crops = ring(affine_grid_sample(images, theta, (28, 28)))
    torch.testing.assert_close(task.loss(theta, target), triplet_hinge(crops, ring(target[1])))


def test_paper_localisation_net():
    model = colocalisation.make_model()
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")]
    assert shapes == [(8, 1, 9, 9), (8, 648), (8, 8), (3, 8)]
    theta = model(torch.rand(2, 1, 84, 84))
    torch.testing.assert_close(theta, torch.tensor([[0.5, 0, 0], [0, 0.5, 0]]).expand(2, 2, 3))


def test_several_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(colocalisation, "world_size", lambda: 2)
    with pytest.raises(SystemExit):
        colocalisation.main(["--device", "cpu"])
    assert "so it takes one process" in capsys.readouterr().err


def test_digits_are_found(tmp_path):
    """Discs, compared by their ink inside of the frame's disc without that outside of it."""
    y, x = torch.meshgrid(torch.arange(SIDE) - 13.5, torch.arange(SIDE) - 13.5, indexing="ij")
    disc = x.square() + y.square() < 9**2
    discs = Digits(255 * disc.byte().expand(48, -1, -1), torch.zeros(48, dtype=torch.long), "stand-in")
    kernel = 1.4 * torch.where(disc, 1 / disc.sum(), -1 / (~disc).sum())
    scene = colocalisation.collect(discs, 0, "T", generator(), 48)
    task = Finding(scene, lambda crops: (crops * kernel).sum((2, 3)), 0, tries=16)
    torch.manual_seed(0)
    config = replace(colocalisation.QUICK, steps=180, batch=48, lr=1e-2, snapshots=0)
    found = train(colocalisation.make_model(), task, config, tmp_path, progress=False)
    assert found.figures["found"] > 80
    assert found.figures["IoU"] > 0.6
