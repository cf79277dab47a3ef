"""``stn.patch_kornia()``: kornia's warps as one fused call each, in code that knows nothing of them."""

import inspect
import sys

import pytest
import torch
from common import assert_close

import stn_triton as stn
from stn_triton import functional, kornia_patch

kornia = pytest.importorskip("kornia", minversion="0.9")
from kornia.geometry.transform import warp_affine, warp_perspective  # noqa: E402  by value, as users do

CODES = warp_affine.__code__, warp_perspective.__code__
SIZE = (8, 7)


def in_force():
    return (warp_affine.__code__, warp_perspective.__code__) != CODES


@pytest.fixture(autouse=True)
def _not_left_in_force():
    yield
    assert not in_force(), "the test leaves the patch in force"


@pytest.fixture
def fused(monkeypatch, torch_on_one_thread):
    """The names of the fused functions that were called so far: on PyTorch's operators, which are quick."""
    calls = []

    def spied(name, function):
        def spy(*args):
            calls.append(name)
            return function(*args)

        return spy

    monkeypatch.setattr(kornia_patch, "_runs_kernels", lambda device_type: True)
    for name in ("affine_grid_sample", "projective_grid_sample"):
        monkeypatch.setattr(functional, name, spied(name, getattr(functional, name)))
    return calls


def arguments(device, dtype=torch.float64, batch=2, shared=False):
    """Images and homographies in pixels, from input to output: leaves."""
    matrix = torch.eye(3, dtype=torch.float64) + 0.1 * torch.randn(1 if shared else batch, 3, 3).double()
    matrix[:, 2, :2] *= 0.1
    image = torch.rand(batch, 3, 9, 11, dtype=torch.float64)
    return [t.to(device, dtype).requires_grad_() for t in (image, matrix)]


def affine(image, matrix, *options, **more):
    return warp_affine(image, matrix[:, :2], *options, **more)


WARPS = {"affine": affine, "perspective": warp_perspective}


def derivatives(function, leaves, *options, **more):
    output = function(*leaves, *options, **more)
    weight = torch.linspace(0.5, 1, output.numel(), device=output.device).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, leaves, weight.to(output.dtype))]


def both_ways(function, leaves, *options, **more):
    """kornia's own results, then the patch's."""
    theirs = derivatives(function, leaves, *options, **more)
    with stn.patch_kornia():
        assert in_force()
        return theirs, derivatives(function, leaves, *options, **more)


# -------------------------------------------------------------------------------- values and gradients
@pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "centres"])
@pytest.mark.parametrize(
    "mode, padding", [("bilinear", "zeros"), ("nearest", "border"), ("bicubic", "reflection")]
)
@pytest.mark.parametrize("name", list(WARPS))
def test_values_and_gradients(fused, name, mode, padding, align_corners):
    """kornia's, by one fused call."""
    theirs, ours = both_ways(WARPS[name], arguments("cpu"), SIZE, mode, padding, align_corners)
    assert fused == ["affine_grid_sample" if name == "affine" else "projective_grid_sample"]
    for a, b in zip(ours, theirs):
        assert_close(a, b, scale=1e2)


@pytest.mark.parametrize("name", list(WARPS))
def test_dtypes_and_layouts(device, launched, name):
    """Half images with half matrices, which kornia takes to float32 on the CPU; results are contiguous."""
    for dtype, allowed in ((torch.float32, 1e2), (torch.bfloat16, 8)):
        image, matrix = arguments(device, dtype)
        image = image.detach().contiguous(memory_format=torch.channels_last)
        with stn.patch_kornia():
            found = WARPS[name](image, matrix, SIZE)
        assert found.is_contiguous()
        assert found.dtype == dtype
        assert_close(found, WARPS[name](image.double(), matrix.double(), SIZE), scale=allowed)
    assert len(launched) == 2


def test_one_matrix_for_all_images(fused):
    """And what is not given is kornia's default."""
    theirs, ours = both_ways(affine, arguments("cpu", shared=True), SIZE)
    assert fused
    for a, b in zip(ours, theirs):
        assert_close(a, b, scale=1e2)


@pytest.mark.parametrize("scale", [1e-30, -3.0, 1e30])
def test_the_scale_of_a_homography_means_nothing(device, launched, scale):
    image, matrix = arguments(device, torch.float32)
    with stn.patch_kornia():
        found, expected = warp_perspective(image, scale * matrix, SIZE), warp_perspective(image, matrix, SIZE)
    assert len(launched) == 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


CALLERS = {
    "rotate": lambda x: kornia.geometry.transform.rotate(x, torch.tensor([10.0, 50], device=x.device)),
    "shear": lambda x: kornia.geometry.transform.shear(x, torch.tensor([[0.1, 0.3]] * 2, device=x.device)),
    "RandomAffine": lambda x: kornia.augmentation.RandomAffine(30.0, (0.1, 0.1), (0.8, 1.2), p=1.0)(x),
    "RandomPerspective": lambda x: kornia.augmentation.RandomPerspective(0.4, p=1.0)(x),
    "RandomResizedCrop": lambda x: kornia.augmentation.RandomResizedCrop(
        (5, 6), p=1.0, cropping_mode="resample"
    )(x),
}


@pytest.mark.parametrize("name", list(CALLERS))
def test_callers(device, launched, name):
    image, results = torch.rand(2, 3, 9, 11, device=device), []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(CALLERS[name](image))
        stn.patch_kornia.enable()
    stn.patch_kornia.disable()
    assert [name for name, _ in launched] == ["sample_forward_kernel"]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------- what is not covered
def test_what_is_left_to_kornia(device, launched):
    image, matrix = (t.detach() for t in arguments(device, torch.float32))
    fill = torch.tensor([0.1, 0.2, 0.3], device=device)
    calls = {
        "fill": lambda: warp_affine(image, matrix[:, :2], SIZE, padding_mode="fill", fill_value=fill),
        "one row": lambda: warp_perspective(image, matrix, (1, 7)),
        "one column": lambda: affine(image[..., :1], matrix, SIZE),
        "empty": lambda: affine(image, matrix, (0, 7)),
        "no images": lambda: affine(image[:0], matrix[:0], SIZE),
        "subclass": lambda: warp_perspective(image.as_subclass(Other), matrix, SIZE).as_subclass(
            torch.Tensor
        ),
    }
    with stn.patch_kornia():
        found = {name: call() for name, call in calls.items()}
        with torch.autocast(device.type, torch.bfloat16):
            found["autocast"] = affine(image, matrix, SIZE)
        traced = torch.jit.trace(
            lambda x, m: warp_perspective(x, m, SIZE), (image, matrix), check_trace=False
        )
        with pytest.raises(RuntimeError):
            affine(image, matrix.double(), SIZE)
        with pytest.raises(ValueError, match="BxCxHxW"):
            affine(image[0], matrix, SIZE)
        with pytest.raises(ValueError, match="mode"):
            affine(image, matrix, SIZE, "linear")
        scripted = torch.jit.script(warp_affine)  # of kornia's source
    assert not launched
    with torch.autocast(device.type, torch.bfloat16):
        torch.testing.assert_close(found.pop("autocast"), affine(image, matrix, SIZE), rtol=0, atol=0)
    for name, value in found.items():
        torch.testing.assert_close(value, calls[name](), rtol=0, atol=0)
    torch.testing.assert_close(traced(image, matrix), warp_perspective(image, matrix, SIZE))
    torch.testing.assert_close(scripted(image, matrix[:, :2], SIZE), affine(image, matrix, SIZE))


class Other(torch.Tensor):
    pass


# ----------------------------------------------------------------------------------------- the patch
def test_blocks_and_switches():
    signature = inspect.signature(warp_affine)
    with stn.patch_kornia(), stn.patch_kornia():
        assert in_force()
        assert inspect.signature(warp_affine) == signature
    assert not in_force()
    stn.patch_kornia().enable()
    with stn.patch_kornia():
        stn.patch_kornia.disable()
        assert in_force()
    assert not in_force()

    @stn.patch_kornia()
    def function():
        return in_force()

    assert function()


def test_compiles_whole(fused):
    image, matrix = (t.detach() for t in arguments("cpu"))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, m: affine(x, m, SIZE), fullgraph=True, backend="aot_eager")
    with stn.patch_kornia():
        found = compiled(image, matrix)
    assert fused == ["affine_grid_sample"]
    assert_close(found, affine(image, matrix, SIZE), scale=1e2)


def test_without_kornia(monkeypatch):
    class patch(kornia_patch.patch_kornia):
        _switch = kornia_patch._Functions()

    monkeypatch.setattr(kornia, "__version__", "0.8.2")
    with pytest.raises(ImportError, match=r"needs kornia 0\.9 or later, and finds kornia 0\.8\.2"):
        patch()
    monkeypatch.undo()
    monkeypatch.setattr(kornia.geometry.transform.imgwarp, "warp_affine", lambda src, M, size: None)
    with pytest.raises(ImportError, match="does not know this warp_affine"):
        patch.enable()
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(ImportError, match="pip install kornia"):
        patch()
