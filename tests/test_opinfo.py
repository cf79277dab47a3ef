"""PyTorch's own samples for its samplers, run on ours: ``torch.testing``'s operator database."""

import pytest
import torch
import torch.nn.functional as F
from common import MODES, PADDINGS, assert_close, pixel_coordinates

import stn_triton as stn

pytest.importorskip("expecttest", reason="torch.testing's operator database imports it")
database = pytest.importorskip("torch.testing._internal.common_methods_invocations")

OPERATORS = {
    info.name: info
    for info in database.op_db
    if info.name
    in ("nn.functional.grid_sample", "grid_sampler_2d", "grid_sampler_3d", "nn.functional.affine_grid")
}


def as_call(name, sample):
    """The sample as the arguments of ``grid_sample`` (or ``affine_grid``)."""
    args = [sample.input, *sample.args, *sample.kwargs.values()]
    if name.startswith("grid_sampler"):
        args[2:4] = MODES[args[2]], PADDINGS[args[3]]
    return args


def steady(name, args):
    """Output pixels at which float32 must agree with float64: values and slopes jump in no coordinate."""
    if "affine" in name or "bicubic" in args:
        return torch.ones(())
    input, grid, mode, _, align_corners = args
    pixel = pixel_coordinates(grid, input.shape[2:], align_corners)
    distance = (pixel - pixel.round()).abs()
    distance = 0.5 - distance if mode == "nearest" else distance
    return (distance > 1e-3).all(-1).unsqueeze(1).double()


def differentiable(function, args, mask):
    """The output and the gradients of all tensors, which become leaves; at masked pixels all is 0."""
    leaves = [arg.detach().clone().requires_grad_() if isinstance(arg, torch.Tensor) else arg for arg in args]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    g = (torch.rand(output.shape, generator=generator, dtype=torch.float64) + 0.5) * mask
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    gradients = torch.autograd.grad(output, tensors, g.to(output), allow_unused=True, materialize_grads=True)
    return [output.detach() * mask.to(output), *gradients]


def run(device, name, dtype, samples, most=None):
    """Runs ours on the samples, on those of at most ``most`` elements; how many there were."""
    ours, theirs = (stn.affine_grid, F.affine_grid) if "affine" in name else (stn.grid_sample, F.grid_sample)
    count = 0
    for sample in samples:
        args = as_call(name, sample)
        if most is not None and args[0].numel() > most:
            continue
        mask = steady(name, args)
        moved = [arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args]
        wide = [arg.double() if isinstance(arg, torch.Tensor) else arg for arg in args]
        for a, b in zip(differentiable(ours, moved, mask), differentiable(theirs, wide, mask)):
            assert_close(a, b, dtype)
        count += 1
    return count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("name", OPERATORS)
def test_samples(either_backend, device, name, dtype):
    """Every sample input of the operator: outputs and gradients are PyTorch's in float64."""
    samples = OPERATORS[name].sample_inputs("cpu", dtype, requires_grad=True)
    # Processors leave out large batches, which differ in nothing else; the interpreter leaves out more.
    most = {"kernels": 10**4, "torch": 10**5}[either_backend] if device.type == "cpu" else None
    assert run(device, name, dtype, samples, most) >= (6 if most == 10**4 else 12)


def test_reference_samples(either_backend, device):
    """The more thorough list: larger images."""
    info = OPERATORS["nn.functional.grid_sample"]
    if info.reference_inputs_func is None:
        pytest.skip("this PyTorch has no reference inputs for grid_sample")
    samples = list(info.reference_inputs("cpu", torch.float64))
    if device.type == "cpu":  # 345 x 456 pixels each: a few of them, of different modes
        samples = samples[:: 25 if either_backend == "kernels" else 5]
    assert run(device, info.name, torch.float64, samples) == len(samples) > 0


def test_error_inputs(device):
    """Calls that PyTorch lists as wrong: ours fail likewise, and say so likewise."""
    listed = [(name, info) for name, info in OPERATORS.items() if info.error_inputs_func is not None]
    if not listed:
        pytest.skip("this PyTorch lists no error inputs for its samplers (tests/test_errors.py has its own)")
    for name, info in listed:
        for error in info.error_inputs(torch.device("cpu")):
            args = as_call(name, error.sample_input)
            function = stn.affine_grid if "affine" in name else stn.grid_sample
            with pytest.raises(error.error_type, match=error.error_regex):
                function(*args)


def test_database_has_the_samplers():
    """If PyTorch renames them, this file must not fall silent."""
    assert "nn.functional.grid_sample" in OPERATORS
