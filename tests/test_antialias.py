"""``antialias=True``: averages over the footprints of output pixels, against their definition in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from common import MIXED, NAN, assert_close, place, random_theta
from test_fill import filled_centres
from test_padding import witness_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stn_triton as stn
from bench.interpreter import checked_addresses
from stn_triton import backend
from stn_triton.kernels.host import configs

SAMPLERS = {"affine": stn.affine_grid_sample, "projective": stn.projective_grid_sample}
CELL = 16


def numbers(step):
    """The samples along an axis whose step is so many input pixels long."""
    return int(min(max(math.ceil(step - 1e-3), 1), 16))


def positions(k, n, count, align_corners):
    """Normalised, of sub-sample k of n of each of ``count`` pixels in a row."""
    o = torch.arange(count, dtype=torch.float64) + (k + 0.5) / n - 0.5
    if align_corners:
        return 2 * o / (count - 1) - 1 if count > 1 else 2 * o
    return (2 * o + 1) / count - 1


def sampled(image, grid, padding, align_corners, fill):
    """One image, and (C,) in place of its samples outside."""
    if fill is None:
        return witness_of(padding)(image[None], grid, "bilinear", padding, align_corners)[0]
    return filled_centres(image[None], grid, "bilinear", align_corners, fill[None])[0]


def averages(image, matrix, size, padding, align_corners, fill=None):
    """One image by one affine map, (dims, dims + 1), sample by sample as the documentation says."""
    dims = len(size)
    steps = [max(n - align_corners, 1) for n in reversed(size)]
    scale = torch.tensor([n - align_corners for n in reversed(image.shape[1:])], dtype=torch.float64)
    lengths = [(matrix[:, k].detach() * scale / steps[k]).norm().item() for k in range(dims)]
    n = [numbers(length) for length in lengths]
    total = 0
    for which in itertools.product(*map(range, n)):
        axes = [positions(j, m, s, align_corners) for j, m, s in zip(which, n, reversed(size), strict=True)]
        mesh = torch.meshgrid(*reversed(axes), indexing="ij")
        points = torch.stack([*reversed(mesh), torch.ones(size, dtype=torch.float64)], -1)
        grid = (points @ matrix.mT)[None]
        total = total + sampled(image, grid, padding, align_corners, fill)
    return total / math.prod(n)


def cell_averages(image, homography, size, padding, align_corners, fill=None):
    """One image by one homography, with the numbers of each cell's corners; nothing near a horizon."""
    height, width = size
    scale = torch.tensor([n - align_corners for n in reversed(image.shape[1:])], dtype=torch.float64)
    steps = [max(n - align_corners, 1) for n in reversed(size)]
    columns, rows = (positions(0, 1, n, align_corners) for n in (width, height))

    def lengths(row, column):
        x, y, w = homography.detach() @ torch.tensor([columns[column], rows[row], 1.0], dtype=torch.float64)
        slope = homography.detach()[:2, :2] - torch.stack([x, y])[:, None] / w * homography.detach()[2, :2]
        return [((slope[:, k] / w) * scale / steps[k]).norm().item() for k in range(2)]

    output = torch.zeros(len(image), height, width, dtype=torch.float64)
    for top, left in itertools.product(range(0, height, CELL), range(0, width, CELL)):
        below, right = min(top + CELL, height), min(left + CELL, width)
        corners = [lengths(*at) for at in itertools.product((top, below - 1), (left, right - 1))]
        n = [numbers(max(length)) for length in zip(*corners, strict=True)]
        total = 0
        for i, j in itertools.product(range(n[1]), range(n[0])):
            y = positions(i, n[1], height, align_corners)[top:below]
            x = positions(j, n[0], width, align_corners)[left:right]
            points = torch.stack([*torch.meshgrid(x, y, indexing="xy"), torch.ones(len(y), len(x))], -1)
            places = points @ homography.mT
            grid = (places[..., :2] / places[..., 2:])[None]
            total = total + sampled(image, grid, padding, align_corners, fill)
        cell = F.pad(total / math.prod(n), (left, width - right, top, height - below))
        output = output + cell
    return output


def expected(source, image, params, *modes, fill=()):
    """The averages of (N, C, ...) by (N, T, ...) and a function of a cotangent: the gradients of all.

    fill: none, or one (C,) in a tuple.
    """
    image, params, *fill = (leaf.detach().double().requires_grad_() for leaf in (image, params, *fill))
    one = averages if source == "affine" else cell_averages
    value = torch.stack([torch.stack([one(i, p, *modes, *fill) for p in ps]) for i, ps in zip(image, params)])
    return value, lambda g: torch.autograd.grad(value, (image, params, *fill), g.double())


def maps(source, dims, dtype):
    """(1, 2, ...): of an image a map that shrinks to half, and one that enlarges."""
    theta = random_theta(2, dims, torch.float64, "cpu", shift=0.1)
    if source == "projective":
        theta = torch.cat([theta, torch.tensor([[[0.1, 0.15, 1.0]]]).expand(2, 1, 3)], 1)
    theta[1, :dims, :dims] *= 0.3
    return theta.unsqueeze(0).to(dtype)


@pytest.mark.parametrize(
    "source, in_size, size, padding, align_corners, dtype, layout, candidates",
    [
        ("affine", (4, 6), (2, 3), "zeros", False, torch.float32, "gaps", None),
        ("affine", (3, 4), (2, 2), "reflection", True, torch.float64, "contiguous", None),
        ("affine", (3, 4), (2, 2), ("circular", "border"), False, torch.float32, "channels_last", 0),
        ("affine", (2, 2, 2), (1, 1, 1), "border", False, torch.float32, "offset", 0),
        ("affine", (2, 3, 2), (1, 2, 1), MIXED[3], True, torch.float32, "contiguous", None),
        ("projective", (2, 34), (1, 17), "zeros", False, torch.float32, "contiguous", None),  # two cells
        ("projective", (3, 3), (1, 2), "circular", True, torch.float64, "contiguous", 0),
    ],
)
def test_definition(source, in_size, size, padding, align_corners, dtype, layout, candidates):
    """Values and both gradients of maps of an image; no address but those of the tensors.

    ``candidates``: 0 makes outputs look for the pixels that they read, one by one.
    """
    torch.manual_seed(1)
    image = place(torch.randn(1, 2, *in_size, dtype=dtype), layout, NAN).requires_grad_()
    several = source == "affine" and candidates is None
    params = maps(source, len(size), dtype)[:, : 2 if several else 1].requires_grad_()
    value, gradients = expected(source, image, params, size, padding, align_corners)
    g = torch.randn(value.shape).to(dtype)
    gradients = gradients(g)
    forced = {} if candidates is None else {"candidates": candidates}
    for name in dict.fromkeys((backend.select("cpu").name, "torch")):
        with backend.use(name), configs.override(**forced), checked_addresses():
            output = SAMPLERS[source](
                image, params, size, padding_mode=padding, align_corners=align_corners, antialias=True
            )
            found = torch.autograd.grad(output, (image, params), g)
        assert_close(output, value)
        for one, other in zip(found, gradients, strict=True):
            assert_close(one, other)


@pytest.mark.parametrize("in_size, size", [((6, 4), (2, 2)), ((2, 4, 2), (2, 2, 1))], ids=["2d", "3d"])
def test_whole_shrinking_is_pooling(in_size, size, either_backend):
    """By 3 and 2, and by 1, 2 and 2: values and the image's gradient."""
    image = torch.randn(1, 3, *in_size, requires_grad=True)
    theta = torch.eye(len(size), len(size) + 1)[None]
    output = stn.affine_grid_sample(image, theta, size, antialias=True)
    pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[len(size)]
    pooled = pool(image, [n // m for n, m in zip(in_size, size, strict=True)])
    torch.testing.assert_close(output, pooled, atol=1e-6, rtol=0)
    g = torch.randn_like(output)
    one, other = (torch.autograd.grad(each, image, g)[0] for each in (output, pooled))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("source", SAMPLERS)
def test_a_map_that_does_not_shrink_gives_what_it_gave(source, either_backend):
    """To the bit: values and gradients."""
    image = torch.randn(1, 2, 5, 6, requires_grad=True)
    matrix = torch.tensor([[[0.6, 0.2, 0.1], [-0.1, 0.7, 0.2], [0.05, 0.1, 1.0]]])
    matrix = matrix[:, : 3 if source == "projective" else 2].clone().requires_grad_()
    found = []
    for antialias in (False, True):
        output = SAMPLERS[source](image, matrix, (5, 7), antialias=antialias)
        found.append((output, *torch.autograd.grad(output.square().sum(), (image, matrix))))
    assert all(map(torch.equal, *found))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by).*encountered:RuntimeWarning")
def test_bad_maps(either_backend):
    """One that is no number reads as without averaging; a huge one reads 0 and touches nothing else."""
    image = torch.randn(1, 1, 2, 2).requires_grad_()
    theta = torch.eye(2, 3).repeat(1, 2, 1, 1)
    theta[0, 0, 0, 0], theta[0, 1, 0, 0] = NAN, 1e30
    theta.requires_grad_()
    with checked_addresses():
        output = stn.affine_grid_sample(image, theta, (1, 1), antialias=True)
        by_image, by_theta = torch.autograd.grad(output.sum(), (image, theta))
    assert (output == 0).all()
    assert (by_image == 0).all()
    assert by_theta.shape == theta.shape
    homography = torch.full((1, 3, 3), NAN)
    assert (stn.projective_grid_sample(image, homography, (2, 2), antialias=True) == 0).all()


def test_near_the_horizon_there_are_sixteen():
    from stn_triton.kernels.modes import Source
    from stn_triton.reference.footprints import sub_samples

    homography = torch.eye(3).repeat(1, 4, 1, 1)
    homography[0, 0, 2] = torch.tensor([1.0, 0.0, 0.1])  # w = x + 0.1: both signs in the first cell
    homography[0, 1] = NAN
    homography[0, 2] = 0
    first = next(sub_samples(Source.PROJECTIVE, homography, (2, 20), (2, 20), False, torch.float32))
    counts = first.share.reciprocal()[0]
    assert (counts[0, :, :16] == 256).all()
    assert (counts[0, :, 16:] < 256).all()
    assert (counts[1:] == 1).all()


@pytest.mark.parametrize("source", SAMPLERS)
def test_derivatives(source, torch_on_one_thread):
    """First and second ones in both modes, and what function transforms make of them."""
    image = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    params = maps(source, 2, torch.float64)[:, :1].requires_grad_()

    def function(image, params):
        return SAMPLERS[source](image, params, (1, 2), padding_mode="border", antialias=True)

    assert torch.autograd.gradcheck(function, (image, params), fast_mode=True, check_forward_ad=True)
    if source == "projective":  # the same code for both, and no small one
        assert torch.autograd.gradgradcheck(function, (image, params), fast_mode=True)
    several = torch.stack([params, 0.7 * params]).detach()
    mapped = torch.func.vmap(lambda params: torch.func.jacfwd(function, 1)(image.detach(), params))(several)
    for one, other in zip(mapped, several, strict=True):
        torch.testing.assert_close(one, torch.func.jacrev(function, 1)(image.detach(), other))


@pytest.mark.parametrize("source", SAMPLERS)
@pytest.mark.parametrize("empty", ["batch", "transforms", "channels", "size"])
def test_derivatives_of_nothing(device, either_backend, source, empty):
    """First and second ones, and forward mode: nothing, and zeros."""
    sizes = {"batch": 2, "transforms": 2, "channels": 3, "size": 4} | {empty: 0}
    image = torch.randn(sizes["batch"], sizes["channels"], 6, 5, device=device, requires_grad=True)
    matrix = 2 * torch.eye(2 if source == "affine" else 3, 3, device=device)
    params = matrix.repeat(sizes["batch"], sizes["transforms"], 1, 1).requires_grad_()

    def function(image, params):
        return SAMPLERS[source](image, params, (5, sizes["size"]), antialias=True)

    output = function(image, params)
    assert output.numel() == 0
    first = torch.autograd.grad(output.square().sum(), (image, params), create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), (image, params))
    for gradient, leaf in zip((*first, *second), 2 * (image, params), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))
    leaves = image.detach(), params.detach()
    assert [each.shape for each in torch.func.jvp(function, leaves, leaves)] == 2 * [output.shape]


def test_the_kernels_have_the_same_derivatives():
    """A tangent, which is plain PyTorch's, beside the gradient."""
    image = torch.randn(1, 4, 6)
    theta = torch.tensor([[[1.0, 0.1, 0.05], [0.0, 1.0, 0.03]]])

    def function(theta):
        return stn.affine_grid_sample(image[None], theta, (2, 3), antialias=True)

    step = torch.tensor([[[0.2, 0.1, 0.3], [-0.1, 0.2, 0.1]]])
    value, along = torch.func.jvp(function, (theta,), (step,))
    torch.testing.assert_close(value, function(theta))
    by_theta = torch.autograd.functional.vjp(function, theta, torch.ones_like(value))[1]
    torch.testing.assert_close(along.sum(), (by_theta * step).sum())


def test_compiled_whole():
    image, theta = torch.randn(1, 1, 4, 6, requires_grad=True), torch.eye(2, 3)[None].requires_grad_()

    def loss(image, theta):
        return stn.affine_grid_sample(image, theta, (2, 3), antialias=True).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = (torch.autograd.grad(each(image, theta), (image, theta)) for each in (loss, compiled))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "options, kind, words",
    [
        ({"antialias": 1}, TypeError, "antialias must be a bool, got 1"),
        ({"antialias": True, "mode": "nearest"}, ValueError, "antialias must be False unless mode="),
        ({"antialias": True, "size": (1, 2**27)}, ValueError, "size must be 67108863 at most"),
    ],
)
def test_errors(options, kind, words):
    image = torch.randn(1, 1, 4, 6)
    with pytest.raises(kind, match=words):
        stn.affine_grid_sample(image, torch.eye(2, 3)[None], **options)
    with pytest.raises(kind, match=words):
        stn.projective_grid_sample(image, torch.eye(3)[None], **options)


def test_spatial_transformer():
    """At its start, the identity: what pooling gives."""
    options = {"size": (2, 2), "features": 16, "antialias": True}
    images = torch.randn(2, 1, 4, 4)
    for transform in ("affine", "projective"):
        net = stn.nn.SpatialTransformer(torch.nn.Flatten(), transform, **options)
        assert "antialias=True" in repr(net)
        with backend.use("torch"):
            torch.testing.assert_close(net(images), F.avg_pool2d(images, 2))
    with pytest.raises(ValueError, match="antialias must be False for transform='tps'"):
        stn.nn.SpatialTransformer(torch.nn.Flatten(), "tps", **options)


def test_tracing_says_what_is_wrong():
    image, theta = torch.randn(1, 1, 4, 6), torch.eye(2, 3)[None]
    with pytest.raises(NotImplementedError, match="antialias=True cannot be exported"):
        torch.jit.trace(lambda image: stn.affine_grid_sample(image, theta, (2, 3), antialias=True), image)


@pytest.mark.parametrize("exported", [False, True], ids=["model", "program"])
def test_onnx_says_what_is_wrong(exported):
    """Of a model, where the exporter's further ways fail too, and of a program that is not decomposed."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")

    class Smaller(torch.nn.Module):
        def forward(self, image):
            theta = torch.eye(2, 3)[None]
            return stn.affine_grid_sample(image, theta, (2, 3), antialias=True, fill=0.5 * exported)

    model, image = Smaller().eval(), torch.randn(1, 1, 4, 6)
    if exported:
        model = torch.export.export(model, (image,))
    with pytest.raises(Exception, match="antialias=True cannot be exported"):
        torch.onnx.export(model, (image,), dynamo=True, opset_version=20, verbose=False)


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_each_sub_sample_takes_the_fill(device, either_backend, padding):
    """Averages of samples that are filled, with gradients or without, and of bytes."""
    image = torch.rand(1, 2, 13, 15, dtype=torch.float64, device=device)
    theta = torch.tensor([[[1.43, 0.21, 0.3], [-0.13, 1.57, 0.1]]], dtype=torch.float64, device=device)
    fill = torch.tensor([5.0, -6.0], dtype=torch.float64, device=device)
    options = {"padding_mode": padding, "antialias": True}
    filled = stn.affine_grid_sample(image, theta, (4, 5), fill=fill, **options)
    steps = (theta[0, :, :2] * torch.tensor([[15.0], [13.0]], device=device)).norm(dim=0)
    across, down = numbers(steps[0] / 5), numbers(steps[1] / 4)
    fine = stn.affine_grid_sample(image, theta, (4 * down, 5 * across), fill=fill, padding_mode=padding)
    torch.testing.assert_close(filled, torch.nn.functional.avg_pool2d(fine, (down, across)))
    leaves = [tensor.clone().requires_grad_() for tensor in (image, theta, fill)]
    tracked = stn.affine_grid_sample(*leaves[:2], (4, 5), fill=leaves[2], **options)
    torch.testing.assert_close(tracked.detach(), filled)
    last = leaves[0].contiguous(memory_format=torch.channels_last)
    last = stn.affine_grid_sample(last, leaves[1], (4, 5), fill=leaves[2], **options)
    assert last.is_contiguous(memory_format=torch.channels_last)
    fine = stn.affine_grid_sample(*leaves[:2], (4 * down, 5 * across), fill=leaves[2], padding_mode=padding)
    pooled = torch.nn.functional.avg_pool2d(fine, (down, across))
    weights = torch.randn_like(pooled)
    for one, other in zip(*(torch.autograd.grad((y * weights).sum(), leaves) for y in (tracked, pooled))):
        torch.testing.assert_close(one, other)
    whole = stn.affine_grid_sample((255 * image).byte(), theta, (4, 5), fill=300, **options)
    floats = stn.affine_grid_sample((255 * image).floor(), theta, (4, 5), fill=300, **options)
    assert (whole - floats.clamp(max=255)).abs().max() <= 0.5 + 1e-4


class Made(TorchDispatchMode):
    """Notes the operators that run, and the shapes of what they make."""

    def __init__(self):
        super().__init__()
        self.names, self.shapes = set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.names.add(function.name())
        self.shapes += [tuple(each.shape) for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
        return made


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("source", SAMPLERS)
def test_gradients_with_border_and_a_fill(device, either_backend, source, align_corners):
    """Those of samples that are filled one by one in float64, without a grid or a look at the device."""
    size = 3, 4
    image, fill = torch.randn(1, 2, 5, 6, device=device), torch.tensor([3.0, -2.0], device=device)
    params = maps(source, 2, torch.float32)[:, :1]
    params[:, :, :2] *= 1.3
    params = params.to(device)
    value, gradients = expected(
        source, image.cpu(), params.cpu(), size, "border", align_corners, fill=(fill.cpu(),)
    )
    leaves = [tensor.requires_grad_() for tensor in (image, params, fill)]
    g = torch.randn(value.shape)
    with Made() as made:
        output = SAMPLERS[source](
            image, params, size, padding_mode="border", align_corners=align_corners, fill=fill, antialias=True
        )
        found = torch.autograd.grad(output, leaves, g.to(device))
    assert_close(output, value)
    for one, other in zip(found, gradients(g), strict=True):
        assert other.abs().max() > 0.1
        assert_close(one, other, scale=3.0)
    assert not any("_local_scalar_dense" in name for name in made.names)
    assert not any(shape[-3:] == (*size, 2) for shape in made.shapes)


def test_gradients_with_border_and_a_fill_compiled_whole(torch_on_one_thread):
    """One graph, of which bytes are read as they are."""
    theta, fill = torch.tensor([[[1.37, 0.21, 0.1], [-0.17, 1.29, 0.1]]]), torch.tensor([3.0, -2.0])

    def loss(image, theta, fill):
        options = {"padding_mode": "border", "fill": fill, "dtype": torch.float32, "antialias": True}
        return stn.affine_grid_sample(image, theta, (2, 3), **options).square().sum()

    leaves = [tensor.requires_grad_() for tensor in (theta, fill)]
    image = torch.randint(256, (1, 2, 7, 8), dtype=torch.uint8)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with Made() as made:
        wanted = torch.autograd.grad(loss(image, *leaves), leaves)
        with torch.no_grad():
            loss(image, *leaves)
    assert max(math.prod(shape) for shape in made.shapes) < image.numel()
    for one, other in zip(torch.autograd.grad(compiled(image, *leaves), leaves), wanted, strict=True):
        assert torch.equal(one, other)
