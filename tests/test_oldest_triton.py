"""A short run of every kernel against float64. `make test` runs it under the oldest supported Triton too."""

import itertools

import pytest
import torch
from common import MODES, PADDINGS, affine_witness, assert_close, random_grid, random_theta, witness

import stn_triton as stn
from stn_triton import reference
from stn_triton.kernels.modes import Interpolation, Padding


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", ["grid", "affine"])
def test_every_kernel(device, dims, mode, source):
    """Forward and backward, all paddings, both conventions, in float64."""
    in_size, size = ((5, 6), (4, 7)) if dims == 2 else ((3, 4, 5), (2, 3, 4))
    for padding, align_corners in itertools.product(PADDINGS, (False, True)):
        input = torch.randn(2, 3, *in_size, dtype=torch.float64, device=device, requires_grad=True)
        if source == "grid":
            params = random_grid(2, size, torch.float64, device).requires_grad_()
            output = stn.grid_sample(input, params, mode, padding, align_corners)
        else:
            params = random_theta(2, dims, torch.float64, device).requires_grad_()
            output = stn.affine_grid_sample(input, params, size, mode, padding, align_corners)
        leaves = [tensor.detach().cpu().requires_grad_() for tensor in (input, params)]
        grid = leaves[1] if source == "grid" else affine_witness(leaves[1], size, align_corners)
        if (dims, mode) == (3, "bicubic"):  # PyTorch has none
            modes = Interpolation.BICUBIC, Padding[padding.upper()], align_corners
            wanted = reference.sample_taps(leaves[0], grid, *modes)
        else:
            wanted = witness(leaves[0], grid, mode, padding, align_corners)
        assert_close(output, wanted)
        grad_output = torch.randn_like(wanted)
        actual = torch.autograd.grad(output, (input, params), grad_output.to(device))
        for result, expected in zip(
            actual, torch.autograd.grad(wanted, leaves, grad_output, allow_unused=True)
        ):
            assert_close(result, torch.zeros_like(result).cpu() if expected is None else expected)


@pytest.mark.parametrize("dims", [2, 3])
def test_affine_grid(device, dims):
    """The grid kernel, forward and backward."""
    size = (4, 7) if dims == 2 else (2, 3, 4)
    theta = random_theta(2, dims, torch.float64, device).requires_grad_()
    leaf = theta.detach().cpu().requires_grad_()
    output, wanted = stn.affine_grid(theta, [2, 1, *size], False), affine_witness(leaf, size, False)
    assert_close(output, wanted)
    grad = torch.randn_like(wanted)
    assert_close(
        torch.autograd.grad(output, theta, grad.to(device))[0], torch.autograd.grad(wanted, leaf, grad)[0]
    )
