"""Counting a training step: the two samplers agree, and what is counted is what there is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stn_triton as stn
from examples import samplers
from examples.samplers import count, sampled_by_torch, torch_samplers

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")


@pytest.mark.parametrize(
    "shape, theta, size",
    [
        ((2, 3, 5, 6), (2, 2, 3), (4, 7)),
        ((2, 3, 5, 6), (2, 4, 2, 3), None),
        ((2, 1, 3, 4, 5), (2, 3, 4), None),
    ],
    ids=["2-D", "several", "3-D"],
)
def test_both_samplers_agree(shape, theta, size):
    image, theta = torch.rand(shape), 0.5 * torch.randn(theta)
    expected = stn.affine_grid_sample(image, theta, size)
    torch.testing.assert_close(sampled_by_torch(image, theta, size), expected)
    transformer = stn.nn.SpatialTransformer(nn.Flatten(), features=4)
    with torch_samplers():
        assert stn.affine_grid_sample is sampled_by_torch
        here = transformer(torch.ones(1, 1, 2, 2))
    assert stn.affine_grid_sample is not sampled_by_torch
    torch.testing.assert_close(here, transformer(torch.ones(1, 1, 2, 2)))


def test_samplers_alone():
    """Of 4 images of 3 x 10 x 10 pixels to 8 x 8: a grid is 2048 bytes, the output 3072, the image's gradient
    4800, theta's 96. A loss and its gradient have 4, and expanded the gradient has no bytes of its own."""
    image = torch.empty(4, 3, 10, 10, device="meta").requires_grad_()
    theta = torch.empty(4, 2, 3, device="meta").requires_grad_()
    ours = count(lambda: stn.affine_grid_sample(image, theta, (8, 8)).sum())
    assert ours.kept == 0
    assert ours.peak == pytest.approx(4800 + 96, abs=16)
    assert ours.operators == 4  # sample, sum, the loss's gradient, sample_backward
    theirs = count(lambda: sampled_by_torch(image, theta, (8, 8)).sum())
    assert theirs.kept == 2048
    assert theirs.peak == pytest.approx(2048 + 4800 + 2048, abs=16)  # grid, both gradients
    assert theirs.operators >= 6


def test_kept_tensors_are_those_of_a_real_step():
    """What autograd holds, in a net with a transformer, counted by addresses on the CPU."""
    transformer = stn.nn.SpatialTransformer(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU()), features=4
    )
    model = nn.Sequential(transformer, nn.Flatten(), nn.Linear(64, 5), nn.ReLU())
    images = torch.rand(6, 1, 8, 8)
    alive = {one.untyped_storage().data_ptr() for one in (images, *model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in alive:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch_samplers():
        model(images).square().mean().backward()
    model, images = model.to("meta"), images.to("meta")
    with torch_samplers():
        same = count(lambda: model(images).square().mean())
    assert same.kept == sum(size for size, _ in kept.values()) > 0


@pytest.mark.parametrize("experiment", samplers.experiments(), ids=lambda one: one.name)
def test_no_experiment_takes_more(experiment):
    theirs, ours = samplers.compare(experiment._replace(batch=32))
    assert ours.operators < theirs.operators
    assert ours.kept < theirs.kept
    assert ours.peak < theirs.peak


def test_table_and_figure(tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("matplotlib.image")

    def two(batch):
        images = torch.empty(batch, 1, 8, 8, device="meta")
        net = stn.nn.SpatialTransformer(nn.Flatten(), features=64)
        return net, lambda model: F.mse_loss(model(images), images)

    monkeypatch.setattr(samplers, "experiments", lambda: [samplers.Experiment("a", 2, two)] * 2)
    assert samplers.main(["--output", str(tmp_path)]) == 0
    rows = [line for line in (tmp_path / "samplers.md").read_text().splitlines() if line.startswith("| a |")]
    assert len(rows) == 2
    assert rows[0].count("→") == 3
    assert capsys.readouterr().out.count("| a |") == 2
    assert (tmp_path / "samplers.json").stat().st_size > 100
    assert image.imread(tmp_path / "samplers.png")[..., :3].std() > 0.05
