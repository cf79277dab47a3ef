"""Co-localisation: the loss, the search, what the net is led by, the encoder, and that digits are found."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from examples import colocalisation
from examples.colocalisation import Boxes, Finding, candidates, in_common, overlap, triplet_hinge
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


def test_candidates_leave_no_gap():
    """Whatever the box, half and more of it is one of the candidates'."""
    tried = candidates()
    assert (tried.centre.abs() + tried.half.unsqueeze(-1) <= 1 + 1e-5).all()
    half = torch.rand(200, generator=generator()) * 0.3 + 0.25
    place = (1 - half).unsqueeze(-1) * (2 * torch.rand(200, 2, generator=generator(1)) - 1)
    boxes = Boxes(place, half)
    each = Boxes(boxes.centre.repeat_interleave(len(tried.half), 0), half.repeat_interleave(len(tried.half)))
    all_of_them = Boxes(tried.centre.repeat(200, 1), tried.half.repeat(200))
    assert overlap(each, all_of_them).view(200, -1).amax(1).min() > 0.5


@pytest.fixture
def discs():
    """Images with a disc each and a bar across, and where the discs are; how crops of them are encoded."""
    y, x = torch.meshgrid(torch.arange(SIDE) - 13.5, torch.arange(SIDE) - 13.5, indexing="ij")
    disc = x.square() + y.square() < 9**2
    digits = Digits(255 * disc.byte().expand(48, -1, -1), torch.zeros(48, dtype=torch.long), "stand-in")
    kernel = 1.4 * torch.where(disc, 1 / disc.sum(), -1 / (~disc).sum())
    scene = colocalisation.collect(digits, 0, "T", generator(), 48)
    images = scene.images.clone()
    for image, at in zip(images, torch.randint(80, (48,), generator=generator(2)).tolist()):
        image[0, at : at + 4] = 1.0
    return scene._replace(images=images), lambda crops: (crops * kernel).sum((2, 3))


def test_search_finds_what_is_common(discs):
    scene, encode = discs
    found = in_common(scene.images, encode, generator())
    ratio = overlap(found, scene.boxes)
    assert (ratio > 0.5).float().mean() > 0.9
    again = in_common(scene.images, encode, generator())
    assert torch.equal(found.centre, again.centre)
    assert torch.equal(found.half, again.half)


def test_search_takes_the_least_hinge(discs):
    """Of three boxes for each image, the digit's, half as large and beside it, the digit's."""
    scene, encode = discs
    for among in (scene.boxes, Boxes(scene.boxes.centre, 0.5 * scene.boxes.half)):
        one = Boxes(among.centre[:1], among.half[:1])
        chosen = in_common(scene.images, encode, generator(), one)
        torch.testing.assert_close(chosen.centre, one.centre.expand(48, -1))
        torch.testing.assert_close(chosen.half, one.half.expand(48))
    image, true = scene.images[:1].expand(6, -1, -1, -1), Boxes(scene.boxes.centre[:1], scene.boxes.half[:1])
    among = Boxes(
        torch.cat([true.centre, true.centre, true.centre + 0.3]), true.half * torch.tensor([0.5, 1.0, 1.0])
    )
    chosen = in_common(image, encode, generator(), among)
    torch.testing.assert_close(chosen.centre, true.centre.expand(6, -1))
    torch.testing.assert_close(chosen.half, true.half.expand(6))


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


def test_the_loss_is_led_first_and_the_papers_at_full_strength(digits):
    scene = colocalisation.collect(digits, 3, "T", generator(), 12)
    task = Finding(scene, lambda: Boxes(scene.boxes.centre + 0.1, scene.boxes.half), ring, 0)
    images, target = task.batch(12)
    theta = scene.boxes.theta()
    crops = ring(affine_grid_sample(images, theta, (28, 28)))
    papers = triplet_hinge(crops, ring(target[1]))
    led = torch.tensor(colocalisation.LEAD * 2 * 0.1**2)
    torch.testing.assert_close(task.loss(theta, target), papers)
    task.strength.fill_(0)
    torch.testing.assert_close(task.loss(theta, target), led)
    task.strength.fill_(0.25)
    torch.testing.assert_close(task.loss(theta, target), 0.75 * led + 0.25 * papers)


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


def test_digits_are_found(discs, tmp_path):
    """By the search, and then by the net, which is left with the paper's loss."""
    scene, encode = discs
    task = Finding(scene, partial(in_common, scene.images, encode, generator()), encode, 0)
    torch.manual_seed(0)
    config = replace(colocalisation.QUICK, steps=180, batch=48, lr=1e-2, snapshots=0)
    found = train(colocalisation.make_model(), task, config, tmp_path, progress=False)
    assert found.figures["searched"] > 90
    assert found.figures["found"] > 80
    assert found.figures["IoU"] > 0.6
