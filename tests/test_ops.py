"""The registered operators: schemas, fakes, and what the fakes promise."""

import contextlib
import itertools

import pytest
import torch
from common import pairwise, random_grid, random_theta
from torch._subclasses import FakeTensorMode

import stn_triton as stn
from stn_triton import autograd, backend, ops
from stn_triton.kernels.modes import Interpolation, Padding, Source

NAMESPACE = torch.ops.stn_triton
SOURCES = [Source.GRID, Source.AFFINE]
FORMATS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(
        memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    ),
    "permuted": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "channels_last_sliced": lambda x: FORMATS["channels_last"](torch.cat([x, x], 1))[:, : x.shape[1]],
    "expanded": lambda x: x[:, :1].expand_as(x),
}


def arguments(source, dims, device, layout="contiguous", transforms=None, dtype=torch.float32):
    """Arguments of ``sample`` after the modes are chosen."""
    in_size, size = ((4, 5), (3, 6)) if dims == 2 else ((3, 4, 5), (2, 3, 4))
    input = FORMATS[layout](torch.randn(2, 3, *in_size, device=device, dtype=dtype))
    if source == Source.GRID:
        params = random_grid(2, size, dtype, device)
    else:
        params = random_theta(2 * (transforms or 1), dims, torch.float32, device)
        params = params.view(2, transforms, dims, dims + 1) if transforms else params
    return (
        input,
        params,
        None,
        int(source),
        list(size),
        int(Interpolation.BILINEAR),
        int(Padding.BORDER),
        True,
    )


def in_place_of_size(sample_arguments):
    """What the operators that make images have where ``sample`` has the output's size, and after it."""
    input, _, _, source, _, *modes = sample_arguments
    return source, list(input.shape), ops.is_channels_last(input), *modes


def derivatives(sample_arguments, grad_output):
    """(operator, arguments) of the derivatives, with and without what may be None."""
    input, params, control_points, source, size, *_ = sample_arguments
    rest, image_rest = sample_arguments[3:], in_place_of_size(sample_arguments)
    places = params, control_points
    transforms = params.shape[1] if source != Source.GRID and params.dim() == 4 else 1
    tangent, dtype = torch.randn_like(input), torch.float32
    moved = torch.randn(2, transforms, *size, len(size), dtype=dtype, device=input.device)
    for wanted in itertools.product([True, False], repeat=2):
        image = input if wanted[1] else None
        yield NAMESPACE.sample_backward.default, (grad_output, image, *places, *image_rest, *wanted, False)
    for image, of_image, shift in (
        (input, tangent, moved),
        (None, tangent, None),
        (input, None, moved[:1].expand_as(moved)),
    ):
        yield NAMESPACE.sample_jvp.default, (image, of_image, *places, shift, *rest)
        wanted = shift is not None, True
        yield (
            NAMESPACE.sample_hvp.default,
            (grad_output, image, of_image, *places, shift, *image_rest, *wanted),
        )


def filled(sample_arguments):
    """Arguments of ``sample_as``: with a fill in the image's type, and in another type."""
    input, params, control_points, *rest = sample_arguments
    for fill, dtype in ((input.new_ones(()).expand(input.shape[:2]), input.dtype), (None, torch.int16)):
        yield NAMESPACE.sample_as.default, (input, params, control_points, fill, *rest, dtype)


def opcheck(operator, its_arguments, thorough):
    """PyTorch's own checks: schema, fake, autograd; if thorough AOT autograd with and without gradients too.

    Permuted tensors stay so: what requires a gradient is a detached view.
    """
    if not thorough:  # what a backend can change
        utilities = "test_schema", "test_faketensor", "test_autograd_registration"
        torch.library.opcheck(operator, its_arguments, test_utils=utilities)
        return
    torch.library.opcheck(operator, its_arguments)
    leaves = [
        argument.detach().requires_grad_() if isinstance(argument, torch.Tensor) else argument
        for argument in its_arguments
    ]
    torch.library.opcheck(operator, tuple(leaves), test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize(("dims", "layout"), [(2, "permuted"), (3, "contiguous")])
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name.lower())
def test_opcheck(either_backend, device, source, dims, layout):
    """Each operator, with dense permuted images and gradients too."""
    if dims == 3 and either_backend == "kernels" and device.type == "cpu":
        pytest.skip("slow, and test_fakes_tell_the_truth has volumes on the kernels")
    sample_arguments = arguments(source, dims, device, layout)
    thorough = dims == 2 and either_backend == "torch" and source == Source.AFFINE
    opcheck(NAMESPACE.sample.default, sample_arguments, thorough)
    grad_output = FORMATS[layout](torch.randn_like(NAMESPACE.sample(*sample_arguments)))
    for operator, its_arguments in (*derivatives(sample_arguments, grad_output), *filled(sample_arguments)):
        opcheck(operator, its_arguments, thorough)


@pytest.mark.parametrize(
    "source", [Source.AFFINE, Source.PROJECTIVE, Source.TPS], ids=lambda s: s.name.lower()
)
def test_opcheck_of_grids(either_backend, device, source):
    params, control_points = torch.eye(3, device=device).repeat(2, 1, 1), None
    if source == Source.AFFINE:
        params = params[:, :2]
    elif source == Source.TPS:
        params, control_points = torch.randn(2, 7, 2, device=device), torch.randn(4, 2, device=device)
    place = params.mT.contiguous().mT, control_points, int(source)  # dense and permuted
    grid = NAMESPACE.grid(*place, (3, 4), True)
    thorough = either_backend == "torch"
    opcheck(NAMESPACE.grid.default, (*place, (3, 4), True), thorough)
    for control_grad in {False, control_points is not None}:
        rest = True, control_grad
        opcheck(NAMESPACE.grid_backward.default, (torch.randn_like(grid), *place, *rest), thorough)


@pairwise
@pytest.mark.parametrize("layout", list(FORMATS))
@pytest.mark.parametrize(
    ("source", "transforms"),
    [(Source.GRID, None), (Source.AFFINE, None), (Source.AFFINE, 2)],
    ids=["grid", "affine", "affine-transforms"],
)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_fakes_tell_the_truth(either_backend, device, dims, source, transforms, layout, dtype):
    """Shape, strides, dtype and device of every result, from arguments of any layout."""
    real = arguments(source, dims, device, layout, transforms, dtype)
    outputs, promises = [], []
    calls = [(NAMESPACE.sample.default, real), *derivatives(real, NAMESPACE.sample(*real)), *filled(real)]
    for operator, its_arguments in calls:
        results = operator(*its_arguments)
        outputs += [results] if isinstance(results, torch.Tensor) else results
    with FakeTensorMode() as mode:
        for operator, its_arguments in calls:
            fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in its_arguments]
            results = operator(*fake)
            promises += [results] if isinstance(results, torch.Tensor) else results
    for result, promise in zip(outputs, promises, strict=True):
        assert result.shape == promise.shape
        assert result.stride() == promise.stride()
        assert result.dtype == promise.dtype
        assert result.device == promise.device


@pytest.mark.parametrize("layout", ["channels_last", "channels_last_sliced"])
def test_memory_format_is_kept(device, layout):
    """The fused functions keep the image's format, forward and in d input; grid_sample's output is NCHW."""
    input, theta, *_ = arguments(Source.AFFINE, 2, device, layout)
    input.requires_grad_()
    output = stn.affine_grid_sample(input, theta)
    assert output.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(output.sum(), input)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    grid = random_grid(2, (3, 6), torch.float32, device)
    assert stn.grid_sample(input, grid, align_corners=False).is_contiguous()


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 4, 5)], ids=["batch", "channels", "output"]
)
def test_empty(either_backend, device, shape):
    """Nothing in, nothing out, and gradients of zero."""
    size = (0, 3) if shape == (2, 3, 4, 5) else (2, 3)
    input = torch.randn(shape, device=device, requires_grad=True)
    theta = torch.randn(shape[0], 2, 3, device=device, requires_grad=True)
    grid = torch.randn(shape[0], *size, 2, device=device, requires_grad=True)
    for params, output in (
        (theta, stn.affine_grid_sample(input, theta, size)),
        (grid, stn.grid_sample(input, grid, align_corners=False)),
    ):
        assert output.shape == (*shape[:2], *size)
        for leaf, grad in zip((input, params), torch.autograd.grad(output.sum(), (input, params))):
            assert grad.shape == leaf.shape
            assert grad.count_nonzero() == 0


def test_no_transforms(either_backend, device):
    """T = 0 is empty too."""
    input = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    theta = torch.randn(2, 0, 2, 3, device=device, requires_grad=True)
    output = stn.affine_grid_sample(input, theta)
    assert output.shape == (2, 0, 3, 4, 5)
    output.sum().backward()
    assert input.grad.count_nonzero() == 0
    assert theta.grad.shape == theta.shape


@pairwise
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name.lower())
def test_second_derivatives(device, source, dims, mode):
    """gradgradcheck for both arguments, and what a gradient penalty needs: a graph behind d params."""
    input, params, *_ = arguments(source, dims, device, dtype=torch.float64)
    input = input[:1, :1].clone().requires_grad_()
    params = params[:1].double()
    if source == Source.GRID:
        params = params[:, :2, :2].contiguous() if dims == 2 else params[:, :1, :2, :2].contiguous()
    params.requires_grad_()

    def function(image, p):
        if source == Source.GRID:
            return stn.grid_sample(image, p, mode, "zeros", False)
        return stn.affine_grid_sample(image, p, (2,) * dims, mode)

    # the interpreter's first derivatives, thousands of them, would only take longer
    with backend.use("torch") if device.type == "cpu" else contextlib.nullcontext():
        assert torch.autograd.gradgradcheck(function, (input, params), eps=1e-5, atol=1e-5, nondet_tol=1e-9)
    (grad,) = torch.autograd.grad(function(input, params).sum(), params, create_graph=True)
    assert grad.requires_grad
    (second,) = torch.autograd.grad(grad.square().sum(), params)
    assert second.count_nonzero() > 0


def test_second_derivatives_of_a_grid(device):
    theta = torch.randn(1, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: stn.affine_grid(t, (1, 1, 2, 3), False).square(), theta)


def test_operators_need_no_autograd(device):
    """The differentiable functions wrap one operator call each."""
    input, theta, *_ = arguments(Source.AFFINE, 2, device)
    codes = int(Source.AFFINE), (2, 2), int(Interpolation.NEAREST), int(Padding.ZEROS), False
    assert not autograd.sample(input, theta, None, *codes).requires_grad
