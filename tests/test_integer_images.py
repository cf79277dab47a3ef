"""uint8 and int16 images: sampled in float32, rounded half to even, saturated; no copy of them in floats."""

import pytest
import torch
from common import affine_witness, assert_close, pairwise, random_theta, witness
from torch.utils._python_dispatch import TorchDispatchMode

import stn_triton as stn
from bench.specialisations import field_of
from stn_triton.kernels.host import launch

RANGES = {torch.uint8: (0, 256), torch.int16: (-32768, 32768)}


def random_image(dtype, shape, device="cpu"):
    return torch.randint(*RANGES[dtype], shape).to(device, dtype)


def assert_rounded(actual, exact, off=3e-4):
    """``actual`` is the float64 ``exact``, rounded and saturated, but for halves that are a rounding away."""
    info = torch.iinfo(actual.dtype)
    exact = exact.clamp(info.min, info.max)
    away = (actual.double().cpu() - exact).abs().max().item()
    assert away <= 0.5 + off * max(info.max / 255, 1), away


@pairwise
@pytest.mark.parametrize("dtype", RANGES)
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("last", [False, True])
def test_values(device, either_backend, dtype, mode, padding, dims, channels, last):
    """And what is not rounded, in float32 or half, with its gradient by the parameters."""
    in_size, size = ((5, 6), (6, 7)) if dims == 2 else ((3, 4, 5), (3, 4, 3))
    layout = (torch.channels_last, torch.channels_last_3d)[dims - 2] if last else torch.contiguous_format
    image = random_image(dtype, (2, channels, *in_size), device).contiguous(memory_format=layout)
    theta = random_theta(2, dims, torch.float32, device).requires_grad_()
    grid = affine_witness(theta, size, False)
    exact = witness(image, grid, mode, padding, False)
    info, options = torch.iinfo(dtype), {"mode": mode, "padding_mode": padding}
    samples = stn.affine_grid_sample(image, theta, size, **options)
    assert samples.dtype == dtype
    assert not samples.requires_grad
    assert samples.is_contiguous(memory_format=layout)
    assert_rounded(samples, exact.detach())
    unrounded = stn.affine_grid_sample(image, theta, size, dtype=torch.float32, **options)
    assert_close(unrounded.detach(), exact.detach(), torch.float32, scale=info.max)
    half = stn.affine_grid_sample(image, theta, size, dtype=torch.bfloat16, **options)
    torch.testing.assert_close(half.detach(), unrounded.detach().bfloat16(), rtol=2.0**-7, atol=1e-2)
    if mode != "nearest":
        wide = stn.affine_grid_sample(image.float(), theta, size, **options)
        cotangent = torch.randn(unrounded.shape, device=device)
        actual, expected = (
            torch.autograd.grad((each * cotangent).sum(), theta)[0] for each in (unrounded, wide)
        )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", RANGES)
def test_rounding(device, either_backend, dtype):
    """Halves to even, both ends saturated, a fill that is no number 0, and every label kept."""
    low, high = RANGES[dtype]
    steps = torch.arange(-8 if low else 0, 8).to(device, dtype).view(1, 1, 1, -1)
    halves = torch.zeros(1, 2, 1, steps.numel(), device=device)
    halves[:, 0, :, :-1] = 0.5
    samples = stn.flow_grid_sample(steps, halves)
    expected = (steps.double() + halves[:, :1].double()).round()
    torch.testing.assert_close(samples.double(), expected)  # torch.round goes to even
    # a cubic sample beside a step passes both ends
    ends = torch.tensor([low, low, high - 1, high - 1]).to(device, dtype).view(1, 1, 1, 4)
    flow = torch.tensor([0.25, 0.0], device=device).view(1, 2, 1, 1).repeat(1, 1, 1, 4)
    exact = stn.flow_grid_sample(ends.double(), flow, mode="bicubic", padding_mode="border")
    assert exact.min() < low
    assert exact.max() > high - 1
    assert_rounded(stn.flow_grid_sample(ends, flow, mode="bicubic", padding_mode="border"), exact.cpu())
    away = torch.full_like(flow, 99.0)
    for fill, filled in ((float("nan"), 0), (1e9, high - 1), (-1e9, low), (2.5, 2), (3.5, 4)):
        for padding in ("zeros", "border"):
            assert (stn.flow_grid_sample(ends, away, padding_mode=padding, fill=fill) == filled).all()
    labels = torch.arange(low, high).to(device, dtype).view(1, 1, 256, -1)
    theta = torch.tensor([[[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]], device=device)
    turned = stn.affine_grid_sample(labels, theta, labels.shape[:1:-1], mode="nearest")
    torch.testing.assert_close(turned, labels.rot90(-1, (2, 3)))


class _Watch(TorchDispatchMode):
    """Notes the floating-point tensors that operators make, by their memory."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.is_floating_point():
            self.largest = max(self.largest, made.untyped_storage().nbytes())
        return made


def test_no_copy_in_floats(device, monkeypatch):
    """The kernel reads the image itself and writes the samples; channels are vectors of 16 bytes."""
    seen = []

    def spy(kernel, programs, on, *args, **kwargs):
        seen.append((args, kwargs["SPEC"]))
        launch.run(kernel, programs, on, *args, **kwargs)

    monkeypatch.setattr(launch, "runner", spy)
    for dtype, channels in ((torch.uint8, 16), (torch.int16, 8)):
        image = random_image(dtype, (2, channels, 9, 8), device).contiguous(memory_format=torch.channels_last)
        for fill in (None, 7):
            with _Watch() as watch:
                samples = stn.affine_grid_sample(image, torch.eye(2, 3, device=device)[None], fill=fill)
            assert watch.largest <= 64  # theta, and the fill
            assert torch.equal(samples, image)
            args, spec = seen.pop()
            assert not seen
            assert args[0] is image
            assert args[1].data_ptr() == samples.data_ptr()
            assert [field_of(spec, f"vector_{way}") for way in ("input", "output")] == [channels, channels]


def test_what_is_taken(device):
    """Other integers are refused, and so are integers elsewhere."""
    theta, image = torch.eye(2, 3)[None], torch.zeros(1, 1, 4, 5)
    for dtype in (torch.bool, torch.int8, torch.int32, torch.int64, torch.complex64):
        with pytest.raises(TypeError, match=r"^input must be a floating-point tensor .*int16 or uint8, got"):
            stn.affine_grid_sample(image.to(dtype), theta)
    with pytest.raises(TypeError, match=r"^theta must be a floating-point tensor"):
        stn.affine_grid_sample(image, theta.to(torch.uint8))
    with pytest.raises(ValueError, match=r"^dtype must be None or torch\.uint8 or torch\.float32 or"):
        stn.affine_grid_sample(image.byte(), theta, dtype=torch.int16)
    with pytest.raises(RuntimeError):
        stn.grid_sample(image.byte(), torch.zeros(1, 2, 2, 2), align_corners=False)
    fill = torch.tensor([300], dtype=torch.int64)
    assert (stn.affine_grid_sample(image.byte(), theta + 9, fill=fill) == 255).all()


def test_second_derivatives(device, torch_on_one_thread):
    """By the parameters, in every mixture of modes, as those of the same image in floats."""
    image, theta = random_image(torch.int16, (1, 2, 4, 5)), random_theta(1, 2, torch.float32, "cpu")

    def loss(image):
        return lambda theta: (
            stn.affine_grid_sample(image, theta, dtype=torch.float32).mul(1e-4).square().sum()
        )

    expected = torch.func.hessian(loss(image.float()))(theta)
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        for inner in (torch.func.jacfwd, torch.func.jacrev):
            torch.testing.assert_close(outer(inner(loss(image)))(theta), expected, rtol=1e-3, atol=1e-2)
