"""Crops of large images, where coordinates have few digits left: gradients against float64, beside PyTorch's.

Near pixel 1000 a coordinate is off by some 1e-5 pixels. Where many outputs read one pixel, or a gradient sums
over all of them, errors of each one's own cancel, and an error that they share does not.
"""

import pytest
import torch
import torch.nn.functional as F

import stn_triton as stn
from stn_triton.kernels.host import configs

CROPS = 4
# Ours and PyTorch's have as many roundings, and differ by luck. One that outputs share doubles the error.
ALLOWED = 1.2


def gradients(sampler, image, theta, cotangent, wanted):
    tensors = {"image": image.detach().clone(), "theta": theta.detach().clone()}
    tensors[wanted].requires_grad_()
    output = sampler(tensors["image"], tensors["theta"], cotangent.shape)
    return torch.autograd.grad(output, tensors[wanted], cotangent)[0]


def pytorchs(image, theta, shape):
    return F.grid_sample(image, F.affine_grid(theta, shape, align_corners=False), align_corners=False)


def ours(image, theta, shape):
    return stn.affine_grid_sample(image, theta, tuple(shape[2:]))


@pytest.mark.parametrize(
    ("wanted", "width", "half", "size"), [("image", 8, 3, 24), ("theta", 1024, 6, 32)], ids=["image", "theta"]
)
def test_gradients_of_crops(either_backend, device, wanted, width, half, size):
    """Squares of 2 ``half`` pixels, turned by up to half a radian, enlarged four or three times."""
    height = 1024
    generator = torch.Generator().manual_seed(0)
    image_size = torch.tensor([width, height])
    centres = 1.3 * half + torch.rand(CROPS, 2, generator=generator) * (image_size - 2.6 * half)
    angle = torch.rand(CROPS, generator=generator) - 0.5
    cos, sin = half * angle.cos(), half * angle.sin()
    theta = torch.stack([cos, -sin, centres[:, 0], sin, cos, centres[:, 1]], -1).view(CROPS, 2, 3)
    theta = theta * (2 / image_size).unsqueeze(-1) - torch.tensor([0.0, 0.0, 1.0])
    # products of the distances from whole pixels: exact in float32, and their slopes jump nowhere
    x, y = centres.round().T.view(2, CROPS, 1, 1, 1)
    image = (torch.arange(width) - x) * (torch.arange(height).view(-1, 1) - y)
    noise = torch.randn(CROPS, 1, size + 6, size + 6, generator=generator)
    cotangent = F.avg_pool2d(noise, 7, stride=1)  # so smooth that what outputs share adds up

    exact = gradients(pytorchs, image.double(), theta.double(), cotangent.double(), wanted)
    plain = gradients(pytorchs, image, theta, cotangent, wanted)
    arguments = (tensor.to(device) for tensor in (image, theta, cotangent))
    with configs.override("gather search", candidates=512):  # as on GPUs
        result = gradients(ours, *arguments, wanted).cpu()
    scale = exact.flatten(1).norm(dim=1)
    our_error, its_error = (((g - exact).flatten(1).norm(dim=1) / scale).norm() for g in (result, plain))
    assert our_error <= ALLOWED * its_error, f"{our_error:.2e}, PyTorch {its_error:.2e}"
