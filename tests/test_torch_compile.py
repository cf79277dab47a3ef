"""`torch.compile` takes the functions whole: no graph break, forward and backward."""

import pytest
import torch
from common import assert_close, random_grid, random_theta

import stn_triton as stn

FUNCTIONS = {
    "grid_sample": lambda x, p: stn.grid_sample(x, p["grid"], align_corners=False),
    "affine_grid": lambda x, p: x.mean() * stn.affine_grid(p["theta"], (2, 3, 4, 5), False),
    "affine_grid_sample": lambda x, p: stn.affine_grid_sample(x, p["theta"], (4, 5)),
    "projective_grid_sample": lambda x, p: stn.projective_grid_sample(x, p["homography"], (4, 5)),
    "tps_grid_sample": lambda x, p: stn.tps_grid_sample(x, p["points"], (4, 5)),
    "flow_grid_sample": lambda x, p: stn.flow_grid_sample(x, p["flow"]),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_compiled_is_eager(device, name, dynamic):
    """One graph; the values and gradients of eager mode."""
    torch._dynamo.reset()
    options = {"dtype": torch.float32, "device": device}
    leaves = {
        "grid": random_grid(2, (4, 5), **options),
        "theta": random_theta(2, 2, **options),
        "homography": torch.eye(3, device=device) + 0.1 * torch.randn(2, 3, 3, device=device),
        "points": stn.transforms.identity(2, "tps", device=device)
        + 0.1 * torch.randn(2, 16, 2, device=device),
        "flow": torch.randn(2, 2, 4, 5, device=device),
    }
    leaves = {key: value.requires_grad_() for key, value in leaves.items()}
    image = torch.randn(2, 3, 6, 7, device=device, requires_grad=True)
    function = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    output, wanted = compiled(image, leaves), function(image, leaves)
    assert_close(output, wanted.double())
    inputs = [image, *leaves.values()]
    actual = torch.autograd.grad(output.square().sum(), inputs, allow_unused=True)
    for result, reference in zip(
        actual, torch.autograd.grad(wanted.square().sum(), inputs, allow_unused=True)
    ):
        assert (result is None) == (reference is None)
        if result is not None:
            assert_close(result, reference.double())
