"""``fill=``: taps outside the image under zeros padding, samples outside it under border padding."""

import math

import pytest
import torch
from common import affine_witness, assert_close, pairwise, pixel_coordinates, random_theta, witness

import stn_triton as stn
from stn_triton import backend

IN_SIZE = {2: (5, 6), 3: (3, 4, 5)}
SIZE = {2: (6, 7), 3: (3, 4, 3)}
FILL = torch.tensor([[3.0, -2.0, 0.5], [40.0, 7.0, -1.0]], dtype=torch.float64)
MARGIN = 6  # pixels of fill: more than a tap is away from a sample that is moved near


def spread(fill, dims):
    return fill.view(*fill.shape, *(1,) * dims)


def filled_taps(image, grid, mode, align_corners, fill):
    """float64: the fill laid around the image as pixels (SciPy's "grid-constant"), and sampled there."""
    in_size = tuple(image.shape[2:])
    sizes = torch.tensor(in_size[::-1], dtype=torch.float64)
    pixels = pixel_coordinates(grid, in_size, align_corners).nan_to_num(-3.0)
    pixels = torch.minimum(pixels.clamp(min=-3), sizes + 2)  # beyond, all taps read fill
    inner = (..., *(slice(MARGIN, -MARGIN) for _ in in_size))
    large = spread(fill, len(in_size)).expand(*image.shape[:2], *(n + 2 * MARGIN for n in in_size)).clone()
    large[inner] = image.double()
    return witness(large, (2 * (pixels + MARGIN) + 1) / (sizes + 2 * MARGIN) - 1, mode, "zeros", False)


def filled_centres(image, grid, mode, align_corners, fill):
    """float64: ITK's rule, a default value for points that are not in the buffer."""
    in_size = tuple(image.shape[2:])
    pixels = pixel_coordinates(grid, in_size, align_corners)
    edge = 0.0 if align_corners else 0.5
    sizes = torch.tensor(in_size[::-1], dtype=torch.float64)
    inside = ((pixels >= -edge) & (pixels <= sizes - 1 + edge)).all(-1).unsqueeze(1)
    samples = witness(image, grid, mode, "border", align_corners)
    return torch.where(inside, samples, spread(fill, len(in_size)))


RULES = {"zeros": filled_taps, "border": filled_centres}


@pairwise
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("padding", RULES)
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, "channels_last"])
def test_values(device, either_backend, dims, padding, mode, align_corners, dtype, layout):
    """In one launch, and in the parts that have derivatives, whose values are the same up to rounding."""
    if layout == "channels_last":
        layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    image = torch.rand(2, 3, *IN_SIZE[dims]).to(device, dtype).contiguous(memory_format=layout)
    theta = random_theta(2, dims, torch.float32, device, zoom=1.3)
    expected = RULES[padding](
        image.cpu(), affine_witness(theta, SIZE[dims], align_corners), mode, align_corners, FILL
    )
    options = {"mode": mode, "padding_mode": padding, "align_corners": align_corners}
    for tracked in (False, True):
        actual = stn.affine_grid_sample(
            image, theta.requires_grad_(tracked), SIZE[dims], fill=FILL.to(device), **options
        )
        assert actual.is_contiguous(memory_format=layout)
        assert actual.requires_grad == tracked
        assert_close(actual.detach(), expected, dtype)
    filled = torch.isclose(expected, spread(FILL, dims))
    assert filled.any()
    assert not filled.all()


def test_every_function_takes_it(device, either_backend):
    """A number, one for each channel, and one for each image and channel; several transforms of an image."""
    image, everywhere = torch.rand(2, 3, 5, 6, device=device), torch.full((3,), 100.0, device=device)
    far = torch.eye(3, device=device).repeat(2, 2, 1, 1)
    far[:, 1, :2, 2] = 50  # of the second transform nothing is in the image
    splines = stn.transforms.control_lattice(3, device=device) + far[:, :, None, :2, 2]
    flow = torch.zeros(1, 2, 5, 6, device=device)
    flow[:, 0] = 2
    for padding, fill in (
        ("zeros", 100),
        ("border", everywhere.expand(2, 3)),
        (("zeros", "border"), everywhere),
    ):
        options = {"padding_mode": padding, "fill": fill}
        for samples in (
            stn.affine_grid_sample(image, far[:, :, :2], **options),
            stn.projective_grid_sample(image, far, **options),
            stn.tps_grid_sample(image, splines, **options),
        ):
            assert samples.shape == (2, 2, 3, 5, 6)
            torch.testing.assert_close(samples[:, 0], image, rtol=0, atol=2e-4)
            assert (samples[:, 1] == 100).all()
        moved = stn.flow_grid_sample(image, flow, **options)
        torch.testing.assert_close(moved[..., :4], image[..., 2:])
        assert (moved[..., 4:] == 100).all()
    for fill in (everywhere[0], everywhere[None].half()):
        assert torch.equal(stn.flow_grid_sample(image, flow, fill=fill)[..., 4:], moved[..., 4:])
    # beyond the axis with border padding there is no fill, beside one with zeros
    down = torch.zeros(1, 2, 5, 6, device=device)
    down[:, 1] = 50
    moved = stn.flow_grid_sample(image, down, padding_mode=("zeros", "border"), fill=100)
    torch.testing.assert_close(moved, image[..., -1:, :].expand_as(moved))


def test_edges_and_what_is_no_number(device, either_backend):
    """The interval is closed; a fill of NaN comes where it is read and nowhere else; NaN lies outside."""
    eps = 2.0**-10
    moves = {0.5: 0, 0.5 + eps: 1, -0.5: 0, -0.5 - eps: 1, math.nan: 1, math.inf: 1, -1e30: 1}
    image = torch.rand(1, 1, 1, 4, device=device)
    images, flow = image.expand(len(moves), 1, 1, 4), torch.zeros(len(moves), 2, 1, 4, device=device)
    for each, move in zip(flow, moves, strict=True):
        each[0, 0, -1 if move > 0 else 0] = move
    for tracked in (False, True):
        flow.requires_grad_(tracked)
        border = stn.flow_grid_sample(images, flow, padding_mode="border", fill=math.nan)
        assert border.isnan().sum((1, 2, 3)).tolist() == list(moves.values())
        zeros = stn.flow_grid_sample(images, flow, fill=math.nan)
        assert (zeros.isnan().sum((1, 2, 3)) == 1).all()  # of two taps one is outside, or both
    same = torch.eye(2, 3, device=device)[None]
    for padding in ("zeros", "border"):
        for align_corners in (False, True):
            options = {"padding_mode": padding, "align_corners": align_corners, "fill": math.nan}
            torch.testing.assert_close(stn.affine_grid_sample(image, same, **options), image)


@pytest.mark.parametrize("padding, antialias", [("zeros", False), ("border", False), ("border", True)])
def test_derivatives(padding, antialias):
    """Of the image, the parameters and the fill, first, second and in forward mode, against differences."""
    options = {"padding_mode": padding, "antialias": antialias}

    def function(image, theta, fill):
        return stn.affine_grid_sample(image, theta, (3, 4), fill=fill, **options)

    image, fill = torch.rand(2, 2, 4, 5, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    theta = random_theta(2, 2, torch.float64, "cpu", 1.2)
    leaves = [tensor.requires_grad_() for tensor in (image, theta, fill)]
    with backend.use("torch"):
        assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_gradients_of_the_kernels(device, padding):
    """Those of the padding that is spelled out in float64."""
    image, fill = torch.rand(2, 3, 5, 6, dtype=torch.float64), FILL.clone()
    theta = random_theta(2, 2, torch.float64, "cpu", zoom=1.3)
    leaves = [tensor.requires_grad_() for tensor in (image, theta, fill)]
    grid = affine_witness(theta, (6, 7), False)
    cotangent = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    expected = torch.autograd.grad(RULES[padding](image, grid, "bilinear", False, fill), leaves, cotangent)
    ours = [tensor.detach().to(device).requires_grad_() for tensor in leaves]
    samples = stn.affine_grid_sample(ours[0], ours[1], (6, 7), padding_mode=padding, fill=ours[2])
    actual = torch.autograd.grad(samples, ours, cotangent.to(device))
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, scale=100.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("padding, antialias", [("zeros", False), ("border", True)])
def test_half_samples_are_rounded_once(device, either_backend, dtype, padding, antialias):
    """With gradients as without, also where image and fill cancel; d image has the image's dtype."""
    image = torch.full((1, 1, 4, 5), -100.7, dtype=dtype, device=device)
    theta = torch.tensor([[[1.37, 0.21, 0.113], [-0.17, 1.29, 0.057]]], device=device)
    options = {"padding_mode": padding, "antialias": antialias, "fill": 103.3}
    untracked = stn.affine_grid_sample(image, theta, (4, 5), **options)
    leaves = image.requires_grad_(), theta.requires_grad_()
    tracked = stn.affine_grid_sample(*leaves, (4, 5), **options)
    assert tracked.dtype == untracked.dtype == dtype
    assert (untracked.abs() < 60).any()
    torch.testing.assert_close(tracked.detach(), untracked, rtol=torch.finfo(dtype).eps, atol=1e-4)
    gradients = torch.autograd.grad(tracked.sum(), leaves)
    assert [gradient.dtype for gradient in gradients] == [dtype, torch.float32]


@pytest.mark.parametrize("mapped", [(None, 0, None), (None, None, 0), (0, 0, 0)])
def test_vmap(device, mapped):
    """Over each argument, rounded or not."""
    image, theta, fill = torch.rand(2, 2, 3, 4, 5), torch.eye(2, 3).repeat(2, 2, 1, 1), torch.rand(2, 2, 3)
    theta[..., 2] = torch.rand(2, 2, 2)
    arguments = [
        tensor.to(device) if dim == 0 else tensor[0].to(device)
        for tensor, dim in zip((image, theta, fill), mapped, strict=True)
    ]

    def in_floats(image, theta, fill):
        return stn.affine_grid_sample(image, theta, padding_mode="border", fill=fill)

    def in_integers(image, theta, fill):
        return stn.affine_grid_sample((255 * image).to(torch.uint8), theta, fill=255 * fill)

    for function in (in_floats, in_integers):
        alone = [
            function(*(t[k] if dim == 0 else t for t, dim in zip(arguments, mapped, strict=True)))
            for k in range(2)
        ]
        torch.testing.assert_close(torch.func.vmap(function, mapped)(*arguments), torch.stack(alone))


def test_compiled_whole(device, torch_on_one_thread):
    """One graph, with gradients and without: there it is the one operator."""
    seen = []

    def watch(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes])
        return graph

    def function(image, theta, fill):
        return stn.affine_grid_sample(image, theta, (4, 4), padding_mode="border", fill=fill)

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    compiler = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(watch(graph, inputs)))
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    image, theta = torch.rand(2, 3, 4, 5, device=device), torch.eye(2, 3, device=device).repeat(2, 1, 1) * 1.3
    fill = torch.rand(3, device=device)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image, theta, fill), function(image, theta, fill))
    assert sum("stn_triton" in target for target in seen[-1]) == 1
    leaves = [tensor.requires_grad_() for tensor in (image, theta, fill)]
    actual, expected = (torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (compiled, function))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_numbers_for_the_channels(device, either_backend, torch_on_one_thread):
    """A tuple or a list is as the tensor of it, in compiled functions and in the module too."""
    image, theta = torch.rand(2, 3, 4, 5, device=device), 2 * torch.eye(2, 3, device=device)[None]

    def function(image, fill):
        return stn.affine_grid_sample(image, theta, padding_mode="border", fill=fill)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for fill in ((1, 2.5, -3), [0.25, 7, 100]):
        for each in (image, (255 * image).to(torch.uint8)):
            expected = function(each, torch.tensor(fill, device=device))
            assert torch.equal(function(each, fill), expected)
            assert torch.equal(compiled(each, fill), expected)
    for transform, parameters in (
        ("affine", theta),
        ("projective", torch.eye(3, device=device)[None] * torch.tensor([2.0, 2, 1], device=device)),
        ("tps", 2 * stn.transforms.identity(1, "tps", device=device)),
    ):
        net = stn.nn.SpatialTransformer(
            torch.nn.Flatten(), transform, features=60, padding_mode="border", fill=[1, 2.5, -3]
        )
        torch.testing.assert_close(net.sample(image, parameters), function(image, (1, 2.5, -3)))
    assert "fill=(1, 2.5, -3)" in repr(net)


def test_export(device):
    """A program of ATen's operators has it; so has TorchScript."""

    class Warp(torch.nn.Module):
        def forward(self, image, theta):
            labels = stn.affine_grid_sample((9 * image).to(torch.uint8), theta, mode="nearest", fill=255)
            return labels, stn.affine_grid_sample(image, theta, padding_mode="border", fill=2.0)

    image, theta = torch.rand(2, 3, 4, 5), torch.eye(2, 3).repeat(2, 1, 1) * 1.3
    with backend.use("torch"):
        expected = Warp()(image, theta)
        program = torch.export.export(Warp(), (image, theta)).run_decompositions(stn.export.decompositions())
        assert not any("stn_triton" in str(node.target) for node in program.graph.nodes)
        traced = torch.jit.trace(Warp(), (image, theta))
        for actual in (program.module()(image, theta), traced(image, theta)):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (ValueError, {"padding_mode": "reflection", "fill": 1.0}, "fill must be None unless padding_mode is"),
        (ValueError, {"padding_mode": ("circular", "zeros"), "fill": 0}, "fill must be None unless padding_"),
        (TypeError, {"fill": "white"}, "a tuple of one for each channel, or a tensor, got 'white'"),
        (
            TypeError,
            {"fill": True},
            "fill must be a number, a tuple of one for each channel, or a tensor, got T",
        ),
        (TypeError, {"fill": [1, 2, None]}, "or a tensor, got [1, 2, None]"),
        (ValueError, {"fill": [1, 2]}, "fill must be a number, or 3 numbers for this input, got 2 of them"),
        (ValueError, {"fill": (0,) * 5}, "the input has 3 channels: channels first is input.movedim(-1, 1)"),
        (ValueError, {"fill": torch.ones(5)}, "has 3 channels: channels first is input.movedim(-1, 1)"),
        (ValueError, {"fill": 10**400}, "fill must be a number that a float can hold"),
        (ValueError, {"fill": -1e39}, "within 3.4e+38 for an input of torch.float32, got -1e+39"),
        (ValueError, {"fill": (1.0, 10**40, 2.0)}, "fill must be within 3.4e+38"),
        (TypeError, {"fill": torch.ones(3, dtype=torch.int64)}, "fill must be a floating-point tensor"),
        (ValueError, {"fill": torch.ones(2)}, "fill must be a number, (3,) or (2 or 1, 3) for this input"),
        (ValueError, {"fill": torch.ones(3, 3)}, "got shape (3, 3)"),
        (ValueError, {"fill": torch.ones(2, 3, 1)}, "got shape (2, 3, 1)"),
        (ValueError, {"fill": torch.ones(3, device="meta")}, "fill must be on the device of input"),
        (TypeError, {"dtype": "float32"}, "dtype must be a torch.dtype, got 'float32'"),
        (
            ValueError,
            {"dtype": torch.float16},
            "dtype must be None or torch.float32 for this input",
        ),
    ],
)
def test_errors_name_the_argument(kind, options, said):
    with pytest.raises(kind) as error:
        stn.affine_grid_sample(torch.rand(2, 3, 4, 5), torch.eye(2, 3)[None], **options)
    assert said in str(error.value)


def test_nothing_comes_of_nothing(device):
    """Empty batches, channels and outputs."""
    for shape, size in (((0, 3, 4, 5), (4, 5)), ((2, 0, 4, 5), (4, 5)), ((2, 3, 4, 5), (0, 5))):
        image = torch.rand(shape, device=device)
        theta = torch.eye(2, 3, device=device).repeat(shape[0] or 1, 1, 1).requires_grad_()
        for padding in ("zeros", "border"):
            for tracked in (image, image.to(torch.uint8)):
                samples = stn.affine_grid_sample(tracked, theta, size, padding_mode=padding, fill=1.0)
                assert samples.shape == (*shape[:2], *size)
                assert samples.dtype == tracked.dtype


@pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float32).min, -math.inf, math.nan])
def test_what_no_tap_reads_changes_nothing(device, either_backend, fill):
    """Inside the image neither samples nor gradients have a part of the fill, however large it is."""
    assert (
        stn.affine_grid_sample(torch.ones(1, 1, 2, 2), torch.full((1, 2, 3), 9.0), fill=10**30).max() > 1e29
    )
    image = torch.rand(1, 2, 9, 9, device=device)
    results = []
    for options in ({}, {"fill": fill}):
        theta = torch.tensor([[[0.5, 0.1, 0.03], [-0.1, 0.5, 0.02]]], device=device).requires_grad_()
        samples = stn.affine_grid_sample(image, theta, (6, 6), **options)
        results.append((samples.detach(), *torch.autograd.grad(samples.square().sum(), theta)))
    for with_fill, without in zip(*results):
        assert torch.equal(with_fill, without)
