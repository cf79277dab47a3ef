"""Mixed precision: autocast changes no fused function, and a scaled training step is a plain one."""

import pytest
import torch
import torch.nn.functional as F
from common import MIXED
from torch import nn

import stn_triton as stn

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def half(device):
    """What autocast casts to by default."""
    return torch.bfloat16 if device.type == "cpu" else torch.float16


def bent(points):
    return points + 0.1 * torch.randn_like(points)


def with_options(function, **options):
    return lambda image, params: function(image, params, **options)


PARAMETERS = {
    "affine": (
        with_options(stn.affine_grid_sample, padding_mode=MIXED[2]),
        lambda: torch.eye(2, 3) + 0.2 * torch.randn(2, 2, 3),
    ),
    "affine-several": (stn.affine_grid_sample, lambda: torch.eye(2, 3) + 0.2 * torch.randn(1, 3, 2, 3)),
    "projective": (
        with_options(stn.projective_grid_sample, antialias=True, size=(3, 3)),
        lambda: torch.eye(3) + 0.1 * torch.randn(2, 3, 3),
    ),
    "tps": (stn.tps_grid_sample, lambda: bent(stn.transforms.identity(2, "tps"))),
    "flow": (with_options(stn.flow_grid_sample, fill=2.5), lambda: torch.randn(2, 2, 6, 5)),
}


def gradients(function, image, params, cotangent, autocast):
    """The result and gradients, computed with autocast or without it in the forward pass."""
    leaves = image.clone().requires_grad_(), params.clone().requires_grad_()
    with torch.autocast(image.device.type, enabled=autocast):
        output = function(*leaves)
    return output, *torch.autograd.grad(output, leaves, cotangent)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", list(PARAMETERS))
def test_autocast_changes_no_fused_function(either_backend, device, name, dtype):
    """The image keeps its dtype, the parameters are float32 or wider, and the results the same to the bit."""
    function, make = PARAMETERS[name]
    image, params = torch.randn(2, 3, 6, 5).to(device, dtype), make().to(device)
    cotangent = torch.randn_like(function(image, params))
    plain = gradients(function, image, params, cotangent, autocast=False)
    cast = gradients(function, image, params, cotangent, autocast=True)
    assert plain[0].dtype == cast[0].dtype == dtype
    assert [g.dtype for g in cast[1:]] == [dtype, torch.float32]
    for expected, actual in zip(plain, cast, strict=True):
        exact = device.type == "cpu"  # a GPU adds up the image's gradient in any order
        torch.testing.assert_close(actual, expected, **({"atol": 0, "rtol": 0} if exact else {}))


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_backward_may_run_under_autocast(either_backend, device, half, name):
    function, make = PARAMETERS[name]
    image, params = torch.randn(2, 3, 6, 5).to(device, half), make().to(device)
    cotangent = torch.randn_like(function(image, params))
    expected = gradients(function, image, params, cotangent, autocast=False)
    with torch.autocast(device.type, half):
        actual = gradients(function, image, params, cotangent, autocast=True)
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_grids_keep_their_dtype(either_backend, device, dtype):
    theta, homography = torch.eye(2, 3).expand(2, 2, 3), torch.eye(3).expand(2, 3, 3)
    points = stn.transforms.identity(2, "tps")
    for function, params in (
        (stn.projective_grid, homography),
        (stn.tps_grid, points),
        (lambda p, size: stn.affine_grid(p, size, False), theta),
    ):
        params = params.to(device, dtype)
        with torch.autocast(device.type):
            grid = function(params, (2, 1, 4, 5))
        assert grid.dtype == dtype
        torch.testing.assert_close(grid, function(params, (2, 1, 4, 5)), atol=0, rtol=0)


# ------------------------------------------------------------------------------------------ GradScaler
def make_net(device, transform):
    torch.manual_seed(1)
    localisation = stn.nn.localisation_fcn((12,), input_shape=(2, 8, 9))
    transformer = stn.nn.SpatialTransformer(localisation, transform, (6, 5), features=12)
    nn.init.normal_(transformer.regression.weight, std=0.05)
    return nn.Sequential(transformer, nn.Flatten(), nn.Linear(60, 3)).to(device)


def train(device, transform, half, scale, spoiled=()):
    """Four steps with autocast; losses and parameters. The batches ``spoiled`` have infinite gradients."""
    net = make_net(device, transform)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=scale)
    generator = torch.Generator().manual_seed(2)
    losses, scales = [], []
    for step in range(4):
        images = torch.randn(4, 2, 8, 9, generator=generator).to(device)
        labels = torch.randint(3, (4,), generator=generator).to(device)
        with torch.autocast(device.type, half):
            loss = F.cross_entropy(net(images), labels)
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        if step in spoiled:
            net[0].regression.weight.grad[0, 0] = float("inf")
        assert all(p.grad.dtype == torch.float32 for p in net.parameters())
        scaler.step(optimiser)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    return losses, [p.detach() for p in net.parameters()], scales


@pytest.mark.parametrize("transform", ["affine", "projective", "tps"])
def test_scaled_training_is_training(device, half, transform):
    """A scale is a power of two: it changes no bit of a gradient that neither overflows nor underflows."""
    losses, parameters, scales = train(device, transform, half, scale=True)
    expected, wanted, _ = train(device, transform, half, scale=False)
    assert scales == [2.0**10] * 4
    torch.testing.assert_close(losses, expected)
    start = make_net(device, transform).parameters()
    for parameter, reference, before in zip(parameters, wanted, start, strict=True):
        torch.testing.assert_close(parameter, reference, atol=1e-6, rtol=1e-4)
        assert not torch.equal(parameter, before)


def test_overflow_skips_the_step(device, half):
    losses, parameters, scales = train(device, "affine", half, scale=True, spoiled=(1,))
    assert scales == [2.0**10, 2.0**9, 2.0**9, 2.0**9]
    assert all(parameter.isfinite().all() for parameter in parameters)
    assert losses[0] == train(device, "affine", half, scale=True)[0][0]
