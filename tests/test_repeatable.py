"""The same bits each time: always for affine maps and homographies, for all under deterministic mode.

The interpreter runs programs one after the other, so that here these tests only show which way is taken,
and that it works; on a GPU 100 runs are made while another stream keeps the device busy.
"""

import contextlib

import pytest
import torch
from common import MIXED, Watch, random_grid, random_theta

import stn_triton as stn
from bench.specialisations import field_of
from stn_triton import reference
from stn_triton.kernels.host import configs, launch
from stn_triton.kernels.modes import Interpolation, Padding, Source

MODES = ("bilinear", "nearest", "bicubic")
SIZE = (5, 6)


def _calls(device):
    """name -> (function of image and parameters, image, parameters)."""
    image = torch.randn(2, 3, 6, 7, device=device)
    kwargs = {"padding_mode": "border", "align_corners": False}
    wrapped = {"padding_mode": MIXED[2]}
    return {
        "affine": (
            lambda i, p, mode: stn.affine_grid_sample(i, p, SIZE, mode, **kwargs),
            image,
            random_theta(2, 2, torch.float32, device),
        ),
        "projective": (
            lambda i, p, mode: stn.projective_grid_sample(i, p, SIZE, mode, **wrapped),
            image,
            torch.eye(3, device=device) + 0.1 * torch.randn(2, 3, 3, device=device),
        ),
        "affine3d": (
            lambda i, p, mode: stn.affine_grid_sample(i, p, (3, 4, 3), mode, **kwargs),
            torch.randn(1, 2, 4, 3, 4, device=device),
            random_theta(1, 3, torch.float32, device, shift=0.1),
        ),
        "averaged": (  # bilinear, whatever the mode
            lambda i, p, mode: stn.affine_grid_sample(i, p, (2, 3), antialias=True, **wrapped),
            image,
            random_theta(2, 2, torch.float32, device, shift=0.1),
        ),
        "tps": (
            lambda i, p, mode: stn.tps_grid_sample(i, p, SIZE, mode, fill=2.0),
            image,
            stn.transforms.identity(2, "tps", device=device) + 0.1 * torch.randn(2, 16, 2, device=device),
        ),
        "flow": (
            lambda i, p, mode: stn.flow_grid_sample(i, p, mode, **wrapped),
            image,
            torch.randn(2, 2, *SIZE, device=device),
        ),
        "grid": (
            lambda i, p, mode: stn.grid_sample(i, p, mode, **kwargs),
            image,
            random_grid(2, SIZE, torch.float32, device),
        ),
    }


NAMES = list(_calls("cpu"))


@contextlib.contextmanager
def deterministic():
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def gradients(call, image, params, mode, second=False):
    """d image and d parameters, or what comes from differentiating these again."""
    image, params = image.detach().requires_grad_(), params.detach().requires_grad_()
    generator = torch.Generator().manual_seed(3)
    output = call(image, params, mode)
    weights = torch.randn(output.shape, generator=generator).to(image.device)
    first = torch.autograd.grad(output, (image, params), weights, create_graph=second)
    if not second:
        return first
    cotangents = [torch.randn(d.shape, generator=generator).to(image.device) for d in first]
    return torch.autograd.grad(first, (image, params), cotangents, allow_unused=True)


@pytest.fixture
def atomics(monkeypatch):
    """Whether a kernel ran that adds to an image by atomics."""
    seen = []
    run = launch.runner

    def watched(kernel, *args, **kwargs):
        seen.append(field_of(kwargs["SPEC"], "input_grad"))
        run(kernel, *args, **kwargs)

    monkeypatch.setattr(launch, "runner", watched)
    return seen


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("name", NAMES)
def test_no_atomics_where_bits_must_repeat(device, atomics, name, second):
    """Affine maps and homographies never; the others do, but not under deterministic mode."""
    call, image, params = _calls(device)[name]
    usual = gradients(call, image, params, "bilinear", second)
    always = name in ("affine", "projective", "affine3d", "averaged")
    assert any(atomics) != always
    atomics.clear()
    with deterministic():
        repeatable = gradients(call, image, params, "bilinear", second)
    assert atomics
    assert not any(atomics)
    for a, b in zip(usual, repeatable, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_same_bits(device, name, mode):
    """100 runs on a GPU, with other work beside them; another tile may round otherwise, the same may not."""
    call, image, params = _calls(device)[name]
    if device.type == "cpu" and mode != "bilinear":
        pytest.skip("the interpreter has one order only")
    runs = 100 if device.type != "cpu" else 2
    with deterministic():
        expected = gradients(call, image, params, mode), gradients(call, image, params, mode, second=True)
        busy = None
        if device.type == "cuda":
            busy, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device=device)
        for run in range(1, runs):
            if busy is not None:
                with torch.cuda.stream(busy):
                    for _ in range(run % 5):
                        noise = noise @ noise * 1e-3
            again = gradients(call, image, params, mode), gradients(call, image, params, mode, second=True)
            for before, after in zip(expected, again, strict=True):
                for a, b in zip(before, after, strict=True):
                    assert (a is None and b is None) or a.equal(b)


def test_other_tiles_agree(device):
    """To rounding, whichever tiles are chosen."""
    call, image, params = _calls(device)["affine"]
    expected = gradients(call, image, params, "bilinear")
    with configs.override(rows=2, columns=4):
        for a, b in zip(expected, gradients(call, image, params, "bilinear"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_no_error_and_no_warning(either_backend, device, recwarn, name):
    """Where PyTorch's own backward raises on a GPU."""
    call, image, params = _calls(device)[name]
    with deterministic():
        gradients(call, image, params, "bilinear")
    assert not [w for w in recwarn if "determin" in str(w.message)]


@pytest.mark.parametrize("mode", MODES)
def test_without_kernels_pytorchs_backward_sampler_is_left_alone(mode):
    """On a GPU that the kernels do not run on: it would raise there. Meta tensors stand for one."""
    image, grid, grad = (
        torch.empty(*size, device="meta") for size in ((2, 3, 6, 7), (2, *SIZE, 2), (2, 1, 3, *SIZE))
    )
    modes = Interpolation[mode.upper()], Padding.BORDER, False
    for repeatable in (False, True):
        with deterministic() if repeatable else contextlib.nullcontext(), Watch() as seen:
            by_image, by_grid, _ = reference.operators.sample_backward(
                grad, image, grid, None, Source.GRID, (6, 7), *modes, True, True
            )
        assert (by_image.shape, by_grid.shape) == (image.shape, grid.shape)
        assert ("aten::grid_sampler_2d_backward" in seen.names) != repeatable
