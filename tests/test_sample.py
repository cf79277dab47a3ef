"""The samplers against float64: values and every gradient, over sources, modes, layouts and dtypes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from common import (
    MODES,
    PADDINGS,
    affine_witness,
    assert_close,
    away_from_kinks,
    padding_of,
    pairwise,
    random_grid,
    random_theta,
    witness,
)
from test_padding import witness_of

import stn_triton as stn
from stn_triton.kernels.device.tiles import patch_by_patch
from stn_triton.kernels.host import configs

align = pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])
padding = pytest.mark.parametrize("padding_mode", PADDINGS)
mode2 = pytest.mark.parametrize("mode", MODES)
dims_and_mode = pytest.mark.parametrize(
    ("dims", "mode"), [(2, mode) for mode in MODES] + [(3, "bilinear"), (3, "nearest")]
)

IN_SIZE = {2: (7, 10), 3: (5, 6, 7)}
OUT_SIZE = {2: (9, 6), 3: (4, 7, 5)}


def grads(output, inputs, grad_output):
    return torch.autograd.grad(output, inputs, grad_output)


def case(source, dims, dtype, device, batch=2, channels=3, reach=1.5):
    """An image and a grid or theta, both leaves."""
    input = torch.randn(batch, channels, *IN_SIZE[dims], dtype=dtype, device=device)
    if source == "grid":
        params = random_grid(batch, OUT_SIZE[dims], dtype, device, reach)
    else:
        params = random_theta(batch, dims, dtype, device)
    return input.requires_grad_(), params.requires_grad_()


def ours(source, input, params, dims, mode, padding_mode, align_corners):
    if source == "grid":
        return stn.grid_sample(input, params, mode, padding_mode, align_corners)
    return stn.affine_grid_sample(input, params, OUT_SIZE[dims], mode, padding_mode, align_corners)


def expected(source, input, params, dims, mode, padding_mode, align_corners):
    """Output, grid, and the leaves it can be differentiated by, in float64."""
    input, params = (tensor.detach().double().cpu().requires_grad_() for tensor in (input, params))
    grid = params if source == "grid" else affine_witness(params, OUT_SIZE[dims], align_corners)
    return witness(input, grid, mode, padding_mode, align_corners), grid.detach(), (input, params)


@pairwise
@pytest.mark.parametrize("source", ["grid", "affine"])
@dims_and_mode
@padding
@align
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_values_and_gradients(either_backend, device, source, dims, mode, padding_mode, align_corners, dtype):
    """Forward, d image and d parameters. Pixels at kinks get no gradient, and for nearest no comparison."""
    input, params = case(source, dims, dtype, device)
    options = dims, mode, padding_mode, align_corners
    output = ours(source, input, params, *options)
    reference, grid, leaves = expected(source, input, params, *options)
    smooth = away_from_kinks(grid, IN_SIZE[dims], mode, align_corners).unsqueeze(1)
    if mode == "nearest":
        assert_close(torch.where(smooth.to(device), output, 0), torch.where(smooth, reference, 0), dtype)
    else:
        assert_close(output, reference, dtype)
    grad_output = torch.randn(reference.shape, dtype=torch.float64) * smooth
    actual = grads(output, (input, params), grad_output.to(device, dtype))
    wanted = grads(reference, leaves, grad_output.to(dtype).double())
    assert_close(actual[0], wanted[0], dtype)
    assert_close(actual[1], wanted[1], dtype)
    if mode == "nearest":
        assert actual[1].count_nonzero() == 0


@padding
@align
def test_tricubic(either_backend, device, padding_mode, align_corners):
    """Tricubic is bicubic in every plane, then cubic across the planes; its gradients pass gradcheck."""
    input = torch.randn(1, 2, 4, 5, 6, dtype=torch.float64, device=device)
    grid = random_grid(1, (1, 2, 4), torch.float64, device, reach=1.3)
    output = stn.grid_sample(input, grid, "bicubic", padding_mode, align_corners)
    # the cubic weights of z, read off a bicubic sample of unit impulses along an image's height
    impulses = torch.eye(4, dtype=torch.float64).view(1, 4, 4, 1).expand(1, 4, 4, 5)
    flat = grid.cpu().view(1, 2, 4, 3)
    across = torch.stack([torch.zeros_like(flat[..., 2]), flat[..., 2]], -1)
    weights = F.grid_sample(impulses, across, "bicubic", padding_mode, align_corners)
    if padding_mode == "zeros":  # the constant along x must not be cut off there
        weights = F.grid_sample(impulses, across, "bicubic", "zeros", align_corners)
    planes = [
        F.grid_sample(input.cpu()[:, :, k], flat[..., :2], "bicubic", padding_mode, align_corners)
        for k in range(4)
    ]
    wanted = sum(weights[:, k : k + 1] * plane for k, plane in enumerate(planes))
    assert_close(output, wanted.view(output.shape))


@pairwise
@pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior")  # on unit sizes
@pytest.mark.parametrize("source", ["grid", "affine"])
@pytest.mark.parametrize(("dims", "mode"), [(2, "bilinear"), (2, "bicubic"), (3, "bilinear"), (3, "bicubic")])
@padding
@align
def test_gradcheck(either_backend, device, source, dims, mode, padding_mode, align_corners):
    """fp64 gradcheck, with coordinates that keep clear of kinks."""
    size = (2, 3) if dims == 2 else (1, 2, 2)
    in_size = (3, 4) if dims == 2 else (2, 3, 2)
    input = torch.randn(1, 1, *in_size, dtype=torch.float64, device=device, requires_grad=True)
    for seed in range(100):
        torch.manual_seed(seed)
        theta = random_theta(1, dims, torch.float64, device)
        grid = F.affine_grid(theta, [1, 1, *size], align_corners)
        if source == "grid":
            grid = random_grid(1, size, torch.float64, device)
        try:
            if away_from_kinks(grid.cpu(), in_size, mode, align_corners, band=1e-2).all():
                break
        except AssertionError:
            continue
    else:
        pytest.fail("no coordinates without kinks found")
    params = (grid if source == "grid" else theta).requires_grad_()

    def function(image, p):
        if source == "grid":
            return stn.grid_sample(image, p, mode, padding_mode, align_corners)
        return stn.affine_grid_sample(image, p, size, mode, padding_mode, align_corners)

    fast = dims == 3  # many operations each: one random direction instead of all
    assert torch.autograd.gradcheck(
        function, (input, params), eps=1e-5, atol=1e-6, fast_mode=fast, nondet_tol=1e-9
    )


# --------------------------------------------------------------------------------------------- shapes
@pytest.mark.parametrize("channels", [1, 3, 5, 8, 64])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_channels(device, channels, memory_format):
    """Every number of channels, in both layouts; the result has the image's layout."""
    input, theta = case("affine", 2, torch.float32, device, channels=channels)
    image = input
    if memory_format == "channels_last":
        image = input.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    output = ours("affine", image, theta, 2, "bilinear", "zeros", False)
    if channels > 1:
        assert output.is_contiguous(
            memory_format=torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
        )
    reference, grid, leaves = expected("affine", input, theta, 2, "bilinear", "zeros", False)
    smooth = away_from_kinks(grid, IN_SIZE[2], "bilinear", False).unsqueeze(1)
    grad_output = (torch.randn(reference.shape, dtype=torch.float64) * smooth).float()
    assert_close(output, reference)
    actual = grads(output, (image, theta), grad_output.to(device))
    wanted = grads(reference, leaves, grad_output.double())
    assert actual[0].stride() == image.stride()
    assert_close(actual[0], wanted[0])
    assert_close(actual[1], wanted[1], scale=channels**0.5 * 10)


@pairwise
@pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior")  # on unit sizes
@pytest.mark.parametrize("in_size", [(1, 1), (1, 6), (6, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("out_size", [(1, 1), (1, 5), (5, 1), (3, 4)], ids=str)
@pytest.mark.parametrize("padding_mode", [*PADDINGS, "mixed"])
@align
@mode2
def test_small_sizes(either_backend, device, in_size, out_size, padding_mode, align_corners, mode):
    """Axes of one pixel: aligned corners map all of them to the middle."""
    padding_mode = padding_of(padding_mode, 2)
    input = torch.randn(2, 2, *in_size, dtype=torch.float64, device=device)
    theta = random_theta(2, 2, torch.float64, device)
    output = stn.affine_grid_sample(input, theta, out_size, mode, padding_mode, align_corners)
    grid = affine_witness(theta, out_size, align_corners)
    expected = witness_of(padding_mode)(input.cpu(), grid, mode, padding_mode, align_corners)
    assert_close(output, expected)
    direct = stn.grid_sample(input, grid.to(device), mode, padding_mode, align_corners)
    assert_close(direct, expected)


@pytest.mark.parametrize("dims", [2, 3])
def test_tile_seams(device, dims):
    """Images of several tiles in every direction, channels split over programs: no result depends on it."""
    in_size, size = ((9, 13), (11, 19)) if dims == 2 else ((4, 5, 6), (3, 4, 7))
    input = torch.randn(1, 7, *in_size, dtype=torch.float64, device=device, requires_grad=True)
    theta = random_theta(1, dims, torch.float64, device).requires_grad_()
    grad_output = torch.randn(1, 7, *size, dtype=torch.float64, device=device)
    grid = affine_witness(theta.detach(), size, False).to(device).requires_grad_()

    def run(**tile):
        with configs.override(**tile):
            fused = stn.affine_grid_sample(input, theta, size)
            dense = stn.grid_sample(input, grid, align_corners=False)
            return (
                fused,
                *grads(fused, (input, theta), grad_output),
                dense,
                *grads(dense, (input, grid), grad_output),
            )

    plain = run()
    leaves = [tensor.detach().cpu().requires_grad_() for tensor in (input, theta)]
    wanted = witness(leaves[0], affine_witness(leaves[1], size, False), "bilinear", "zeros", False)
    for actual, reference in zip(plain, (wanted, *grads(wanted, leaves, grad_output.cpu()))):
        assert_close(actual, reference)
    tiles = [
        {"rows": 8, "columns": 8, "channels": 1, "unroll": 4, "splits": 1},
        {"rows": 8, "columns": 4, "channels": 2, "unroll": 2, "splits": 2},
    ]
    for tile in tiles:
        for actual, reference in zip(run(**tile), plain):
            assert_close(actual, reference)


def strided(tensor, kind):
    """The same values with other strides."""
    if kind == "permuted":
        order = (0, *range(tensor.dim() - 1, 0, -1))
        return tensor.permute(order).contiguous().permute(order)
    if kind == "sliced":
        wide = torch.full(
            [2 * n + 1 for n in tensor.shape], float("nan"), dtype=tensor.dtype, device=tensor.device
        )
        view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    if kind == "expanded":
        return tensor[:1, :1].expand_as(tensor)
    if kind == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return tensor.contiguous(memory_format=formats[tensor.dim()])
    return tensor.contiguous()


STRIDES = ["contiguous", "channels_last", "permuted", "sliced", "expanded"]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("kind", "grad_kind"), list(zip(STRIDES, STRIDES[2:] + STRIDES[:2])))
def test_strides(device, dims, kind, grad_kind):
    """Any strides of the image, the parameters and the gradient, with the same results."""
    input, theta = (tensor.detach() for tensor in case("affine", dims, torch.float64, device))
    grid = affine_witness(theta, OUT_SIZE[dims], False).to(device)
    grad_output = torch.randn(2, 3, *OUT_SIZE[dims], dtype=torch.float64, device=device)
    image = strided(input, kind).requires_grad_()
    params = strided(theta, kind if kind in ("permuted", "sliced") else "contiguous").requires_grad_()
    points = strided(grid, kind if kind in ("permuted", "sliced") else "contiguous").requires_grad_()
    g = strided(grad_output, grad_kind)
    leaves = [tensor.detach().cpu().requires_grad_() for tensor in (image, params)]
    wanted = witness(leaves[0], affine_witness(leaves[1], OUT_SIZE[dims], False), "bilinear", "zeros", False)
    wanted = (wanted, *grads(wanted, leaves, g.cpu()))
    fused = stn.affine_grid_sample(image, params, OUT_SIZE[dims])
    for actual, reference in zip((fused, *grads(fused, (image, params), g)), wanted):
        assert_close(actual, reference)
    dense = stn.grid_sample(image, points, align_corners=False)
    assert dense.is_contiguous()
    for actual, reference in zip((dense, *grads(dense, (image,), g)), wanted):
        assert_close(actual, reference)


@pytest.mark.parametrize("dims", [2, 3])
def test_gradient_of_a_sum(device, dims):
    """``.sum().backward()`` sends a gradient whose strides are all 0."""
    for source in ("grid", "affine"):
        input, params = case(source, dims, torch.float64, device)
        ours(source, input, params, dims, "bilinear", "border", False).sum().backward()
        reference, _, leaves = expected(source, input, params, dims, "bilinear", "border", False)
        reference.sum().backward()
        assert_close(input.grad, leaves[0].grad)
        assert_close(params.grad, leaves[1].grad)


@pairwise
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("transforms", [1, 3])
@pytest.mark.parametrize("batch", ["own", "shared"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_many_transforms(either_backend, device, dims, transforms, batch, memory_format):
    """theta (N, T, ...) gives (N, T, C, ...); a batch of 1 is broadcast, and its gradient summed."""
    n = 2
    input = strided(torch.randn(n, 4, *IN_SIZE[dims], dtype=torch.float64, device=device), memory_format)
    input.requires_grad_()
    theta = random_theta((1 if batch == "shared" else n) * transforms, dims, torch.float64, device)
    theta = theta.view(-1, transforms, dims, dims + 1).requires_grad_()
    output = stn.affine_grid_sample(input, theta, OUT_SIZE[dims])
    assert output.shape == (n, transforms, 4, *OUT_SIZE[dims])
    grad_output = torch.randn(output.shape, dtype=torch.float64)
    leaves = [tensor.detach().cpu().requires_grad_() for tensor in (input, theta)]
    each = leaves[1].expand(n, -1, -1, -1).reshape(-1, dims, dims + 1)
    repeated = leaves[0].repeat_interleave(transforms, 0)
    wanted = witness(repeated, affine_witness(each, OUT_SIZE[dims], False), "bilinear", "zeros", False)
    wanted = wanted.view(output.shape)
    assert_close(output, wanted)
    actual = grads(output, (input, theta), grad_output.to(device))
    for result, reference in zip(actual, grads(wanted, leaves, grad_output)):
        assert_close(result, reference)
    assert actual[0].stride() == input.stride()
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    last = formats[dims] if memory_format == "channels_last" else torch.contiguous_format
    assert output.flatten(0, 1).is_contiguous(memory_format=last)


def test_shared_theta_without_transforms(either_backend, device):
    """theta (1, 2, 3) over a batch of images."""
    input, _ = case("affine", 2, torch.float64, device, batch=3)
    theta = random_theta(1, 2, torch.float64, device).requires_grad_()
    output = stn.affine_grid_sample(input, theta)
    leaves = [tensor.detach().cpu().requires_grad_() for tensor in (input, theta)]
    grid = affine_witness(leaves[1].expand(3, 2, 3), IN_SIZE[2], False)
    wanted = witness(leaves[0], grid, "bilinear", "zeros", False)
    assert_close(output, wanted)
    grad_output = torch.randn(wanted.shape, dtype=torch.float64)
    for result, reference in zip(
        grads(output, (input, theta), grad_output.to(device)), grads(wanted, leaves, grad_output)
    ):
        assert_close(result, reference)


# --------------------------------------------------------------------------------------------- dtypes
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@pytest.mark.parametrize(
    ("image", "parameter"),
    [pair for pair in itertools.product(DTYPES, DTYPES) if pair not in (("fp32", "fp32"), ("fp64", "fp64"))],
)
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_mixed_dtypes(either_backend, device, image, parameter, mode):
    """Image and parameters of any two dtypes: the output has the image's, each gradient its argument's."""
    input, theta = case("affine", 2, DTYPES[image], device)
    theta = theta.detach().to(DTYPES[parameter]).requires_grad_()
    output = ours("affine", input, theta, 2, mode, "zeros", False)
    reference, grid, leaves = expected("affine", input, theta, 2, mode, "zeros", False)
    assert_close(output, reference, DTYPES[image])
    smooth = away_from_kinks(grid, IN_SIZE[2], mode, False).unsqueeze(1)
    grad_output = (torch.randn(reference.shape, dtype=torch.float64) * smooth).to(DTYPES[image])
    actual = grads(output, (input, theta), grad_output.to(device))
    wanted = grads(reference, leaves, grad_output.double())
    assert_close(actual[0], wanted[0], DTYPES[image])
    assert_close(actual[1], wanted[1], DTYPES[parameter])


@pairwise
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("dims", [2, 3])
@padding
def test_half_grid_sample(either_backend, device, dtype, dims, padding_mode):
    """Half images and grids: computed in float32, rounded once."""
    input, grid = case("grid", dims, dtype, device)
    output = ours("grid", input, grid, dims, "bilinear", padding_mode, False)
    reference, _, leaves = expected("grid", input, grid, dims, "bilinear", padding_mode, False)
    assert_close(output, reference, dtype)
    smooth = away_from_kinks(leaves[1].detach(), IN_SIZE[dims], "bilinear", False, band=1e-4).unsqueeze(1)
    grad_output = (torch.randn(reference.shape, dtype=torch.float64) * smooth).to(dtype)
    actual = grads(output, (input, grid), grad_output.to(device))
    for result, wanted in zip(actual, grads(reference, leaves, grad_output.double())):
        assert_close(result, wanted, dtype)


@pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_float32_error_is_no_larger_than_pytorchs(device, mode, align_corners):
    """Root mean square error against float64 of the value and of all gradients, beside PyTorch's own."""
    n, size = 4, (45, 53)
    input = torch.randn(n, 3, 41, 57, device=device, requires_grad=True)
    theta = random_theta(n, 2, torch.float32, device, shift=0.2).requires_grad_()
    leaves = [tensor.detach().double().cpu().requires_grad_() for tensor in (input, theta)]
    grid = affine_witness(leaves[1], size, align_corners)
    exact = witness(leaves[0], grid, mode, "zeros", align_corners)
    smooth = away_from_kinks(grid.detach(), (41, 57), mode, align_corners).unsqueeze(1)
    grad_output = (torch.randn(exact.shape, dtype=torch.float64) * smooth).float()
    wanted = (exact, *grads(exact, leaves, grad_output.double()))

    def errors(output):
        results = (output, *grads(output, (input, theta), grad_output.to(device)))
        return [(a.double().cpu() - b).square().mean().sqrt().item() for a, b in zip(results, wanted)]

    fused = errors(stn.affine_grid_sample(input, theta, size, mode, "zeros", align_corners))
    theirs = errors(
        F.grid_sample(input, F.affine_grid(theta, [n, 3, *size], align_corners), mode, "zeros", align_corners)
    )
    for name, own, other in zip(("output", "d input", "d theta"), fused, theirs):
        # d theta is 24 numbers: the mean of so few varies
        assert own <= other * (2.0 if name == "d theta" else 1.1), f"{name}: {own:.3g} against {other:.3g}"


def test_identity(either_backend, device):
    """The identity moves no pixel: exactly so for nearest and for half images, else to rounding."""
    theta = torch.eye(2, 3, device=device)[None]
    for size, align_corners in itertools.product([(7, 9), (49, 31), (1, 3)], (False, True)):
        input = torch.randn(1, 2, *size, device=device)
        options = {"padding_mode": "border", "align_corners": align_corners}
        assert torch.equal(stn.affine_grid_sample(input, theta, mode="nearest", **options), input)
        assert_close(stn.affine_grid_sample(input, theta, **options), input.double())


# ---------------------------------------------------------------------------------------- affine_grid
@pairwise
@pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior")  # on unit sizes
@pytest.mark.parametrize("dims", [2, 3])
@align
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_affine_grid(either_backend, device, dims, align_corners, dtype):
    """The grid and d theta, in every dtype; sizes of one pixel included."""
    for size in (OUT_SIZE[dims], (1,) * dims, (3,) * (dims - 1) + (1,)):
        theta = random_theta(2, dims, dtype, device).requires_grad_()
        leaf = theta.detach().double().cpu().requires_grad_()
        wanted = affine_witness(leaf, size, align_corners)
        output = stn.affine_grid(theta, [2, 5, *size], align_corners)
        assert_close(output, wanted, dtype)
        grad_output = torch.randn(wanted.shape, dtype=torch.float64).to(dtype)
        (actual,) = grads(output, theta, grad_output.to(device))
        (reference,) = grads(wanted, leaf, grad_output.double())
        assert_close(actual, reference, dtype)
        (strided_grad,) = grads(stn.affine_grid(theta, [2, 5, *size], align_corners).sum(), theta, None)
        assert torch.isfinite(strided_grad).all()


# ----------------------------------------------------------------------------- what the contract adds
def test_theta_gradient_is_repeatable(device):
    """Bit for bit, with several programs for each image and many channels."""
    input = torch.randn(2, 6, 13, 17, device=device)
    theta = random_theta(2, 2, torch.float32, device).requires_grad_()
    grad_output = torch.randn(2, 6, 20, 30, device=device)
    with configs.override(rows=8, columns=16, channels=4, splits=2):
        first = grads(stn.affine_grid_sample(input, theta, (20, 30)), theta, grad_output)[0]
        for _ in range(3):
            again = grads(stn.affine_grid_sample(input, theta, (20, 30)), theta, grad_output)[0]
            assert torch.equal(first, again)


def test_only_what_is_needed(device):
    """An argument that needs no gradient gets none."""
    for source, which in itertools.product(("grid", "affine"), (0, 1)):
        tensors = list(case(source, 2, torch.float32, device))
        tensors[1 - which].requires_grad_(False)
        output = ours(source, *tensors, 2, "bilinear", "zeros", False)
        output.square().sum().backward()
        assert tensors[which].grad is not None
        assert tensors[1 - which].grad is None


def test_no_grid_is_held(device):
    """Forward and backward of the fused sampler allocate nothing of a grid's size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.largest = max(self.largest, tensor.numel())
            return result

    input = torch.randn(2, 1, 8, 9, device=device, requires_grad=True)
    theta = random_theta(2, 2, torch.float32, device).requires_grad_()
    size = (60, 70)
    with Sizes() as sizes:
        output = stn.affine_grid_sample(input, theta, size)
        output.backward(torch.ones_like(output))
    assert sizes.largest == output.numel()  # one channel: half a grid


def test_saved_tensors_hold_no_grid(device):
    """What the graph keeps for the backward pass is the arguments."""
    kept = []
    input, theta = case("affine", 2, torch.float32, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stn.affine_grid_sample(input, theta)
    assert {id(t) for t in kept} <= {id(input), id(theta)} or all(
        t.data_ptr() in (input.data_ptr(), theta.data_ptr()) for t in kept
    )


@triton.jit
def numbers_kernel(result_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    lanes = tl.arange(0, ROWS * COLUMNS)[:, None]
    tl.store(result_ptr + lanes, patch_by_patch(ROWS, COLUMNS))


@pytest.mark.parametrize(("rows", "columns"), [(8, 16), (4, 32), (16, 64)])
def test_lanes_in_patches(rows, columns, device):
    """Each pixel of a block has one lane, and 32 lanes side by side a patch of 8 x 4."""
    numbers = torch.full((rows * columns,), -1, dtype=torch.int32, device=device)
    numbers_kernel[(1,)](numbers, rows, columns)
    assert sorted(numbers.tolist()) == list(range(rows * columns))
    x, y = numbers.view(-1, 32) % columns, numbers.view(-1, 32) // columns
    assert set((x.amax(1) - x.amin(1) + 1).tolist()) == {8}
    assert set((y.amax(1) - y.amin(1) + 1).tolist()) == {4}


@pytest.mark.parametrize("source", ["affine", "projective"])
@pytest.mark.parametrize(("degrees", "antialias"), [(0, False), (88, False), (-100, False), (135, True)])
def test_lanes_that_follow_the_map(degrees, antialias, source, device):
    """Turned maps change which lane has which pixel, and nothing else."""
    turn = math.radians(degrees)
    theta = torch.tensor([[math.cos(turn), -math.sin(turn), 0.1], [math.sin(turn), math.cos(turn), -0.2]])
    sample = stn.affine_grid_sample
    if source == "projective":
        theta = torch.cat([theta, torch.tensor([[0.1, -0.2, 1.0]])])
        sample = stn.projective_grid_sample
    image = torch.randn(1, 1, 20, 27, device=device)
    grad_output = torch.randn(1, 1, 11, 21, device=device)

    def run(dtype, **tile):
        leaves = [tensor.to(device, dtype).requires_grad_() for tensor in (image, theta[None])]
        with configs.override(**tile):
            output = sample(*leaves, (11, 21), align_corners=False, antialias=antialias)
            return output, *grads(output, leaves[1:], grad_output.to(dtype))

    for found, exact in zip(run(torch.float32, rows=8, columns=16), run(torch.float64, columns=8)):
        assert_close(found, exact)
