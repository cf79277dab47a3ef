"""The spatial transformer module and the localisation nets."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import stn_triton as stn
from stn_triton import backend
from stn_triton.nn import SpatialTransformer, localisation_cnn, localisation_fcn

# transform -> (parameters that the net regresses, shape of what the sampler takes)
TRANSFORMS = {
    "affine": (6, (2, 3)),
    "attention": (3, (2, 3)),
    "similarity": (4, (2, 3)),
    "projective": (8, (3, 3)),
    "tps": (32, (16, 2)),
}
REGIONS = [(-1.0, -1.0, 0.0, 0.0), (-0.25, -0.5, 0.75, 0.5)]  # of side 1
HALVES = (torch.float16, torch.bfloat16)

every_transform = pytest.mark.parametrize("transform", TRANSFORMS)


@pytest.fixture(autouse=True)
def _operators():
    """Which code samples is not the question here."""
    with backend.use("torch"):
        yield


def make(transform="affine", localisation=None, **options):
    return SpatialTransformer(localisation or nn.Flatten(), transform, **options)


def trained(transform="affine", std=0.05, **options):
    """A transformer of (3, 7, 9) images that is not at the identity any more."""
    module = make(transform, features=3 * 7 * 9, **options)
    nn.init.normal_(module.regression.weight, std=std)
    nn.init.normal_(module.regression.bias, std=std)
    return module


def images(batch=2, dtype=torch.float32):
    return torch.rand(batch, 3, 7, 9, dtype=dtype)


def crop(input, region, size, align_corners=False):
    """The samples of a box, from ``affine_grid_sample``."""
    low, high = torch.tensor(region, dtype=torch.float32).chunk(2)
    theta = torch.cat([((high - low) / 2).diag(), ((low + high) / 2)[:, None]], 1)
    return stn.affine_grid_sample(input, theta[None], size, align_corners=align_corners)


# ---------------------------------------------------------------------------------------------- start
@every_transform
@pytest.mark.parametrize("features", [None, 189], ids=["lazy", "features"])
@pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "centres"])
def test_starts_at_the_identity(transform, features, align_corners):
    x = images()
    module = make(transform, features=features, align_corners=align_corners)
    torch.testing.assert_close(module(x), x, atol=1e-5, rtol=0)
    count, shape = TRANSFORMS[transform]
    assert module.regression.weight.shape == (count, 189)
    assert module.localise(x).shape == (2, *shape)
    module.size = (5, 4)
    expected = crop(x, (-1, -1, 1, 1), (5, 4), align_corners)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=0)


@every_transform
def test_starts_at_regions(transform):
    x = images()
    module = make(transform, transforms=2, regions=REGIONS, size=(6, 5))
    output = module(x)
    assert output.shape == (2, 2, 3, 6, 5)
    assert module.localise(x).shape == (2, 2, *TRANSFORMS[transform][1])
    for index, region in enumerate(REGIONS):
        torch.testing.assert_close(output[:, index], crop(x, region, (6, 5)), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        make(transform, regions=torch.tensor(REGIONS[0]), size=(6, 5))(x), output[:, 0], atol=0, rtol=0
    )


def test_fixed_scale():
    """The paper's birds: windows of half the image's side, two parameters each."""
    x, regions = images(), [(-1, -1, 0, 0), (0, 0, 1, 1)]
    module = make("attention", transforms=2, scale=0.5, regions=regions)
    output = module(x)
    assert module.regression.out_features == 4
    for index, region in enumerate(regions):
        torch.testing.assert_close(output[:, index], crop(x, region, (7, 9)), atol=1e-5, rtol=0)
    centred = make("attention", scale=0.5)
    torch.testing.assert_close(centred(x), crop(x, (-0.5, -0.5, 0.5, 0.5), (7, 9)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("transform, count", [("affine", 12), ("attention", 4)])
def test_volumes(transform, count):
    x = torch.rand(2, 3, 4, 5, 6)
    module = make(transform, dims=3)
    torch.testing.assert_close(module(x), x, atol=1e-5, rtol=0)
    assert module.localise(x).shape == (2, 3, 4)
    assert module.regression.out_features == count
    boxes = [(-1, -1, -1, 0, 0, 0), (0, 0, 0, 1, 1, 1)]
    module = make(transform, dims=3, transforms=2, regions=boxes, size=(2, 3, 4))
    assert module(x).shape == (2, 2, 3, 2, 3, 4)
    expected = crop(x, (0, 0, 0, 1, 1, 1), (2, 3, 4))
    torch.testing.assert_close(module(x)[:, 1], expected, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------- what the parameters mean
@pytest.mark.parametrize(
    "transform, update, expected",
    [
        ("affine", [0, 1, 2, 3, 4, 5], [[1, 1, 2], [3, 5, 5]]),
        ("attention", [1, 3, 4], [[2, 0, 3], [0, 2, 4]]),
        ("projective", [0, 1, 2, 3, 4, 5, 6, 7], [[1, 1, 2], [3, 5, 5], [6, 7, 1]]),
    ],
)
def test_parameters_are_in_the_order_of_the_table(transform, update, expected):
    x = images()
    module = make(transform, features=189)
    module.regression.bias.data = torch.tensor(update, dtype=torch.float32)
    assert module.localise(x)[1].tolist() == expected


def test_similarity_is_that_of_transforms():
    module = make("similarity", features=189)
    module.regression.bias.data = torch.tensor([0.5, 0.3, 0.1, 0.2])
    scale, angle, translation = torch.tensor([1.5]), torch.tensor([0.3]), torch.tensor([[0.1, 0.2]])
    expected = stn.transforms.similarity(scale, angle, translation)
    torch.testing.assert_close(module.localise(images(1)), expected)


def test_points_are_control_points_first():
    module = make("tps", features=189, lattice=3)
    module.regression.bias.data[2:4] = torch.tensor([0.25, 0.5])
    points = module.localise(images(1))[0] - stn.transforms.control_lattice(3)
    assert points.shape == (9, 2)
    assert points[1].tolist() == [0.25, 0.5]
    assert points.count_nonzero() == 2


@every_transform
def test_halves_of_forward(transform):
    """Another tensor by the same parameters; each transformer as if it were alone."""
    x, other = images(), torch.rand(2, 5, 8, 6)
    module = trained(transform, transforms=2, size=(4, 5))
    theta = module.localise(x)
    assert not torch.equal(theta[0], theta[1])
    torch.testing.assert_close(module.sample(x, theta), module(x), atol=0, rtol=0)
    both = module.sample(other, theta)
    assert both.shape == (2, 2, 5, 4, 5)
    for index in range(2):
        torch.testing.assert_close(both[:, index], module.sample(other, theta[:, index]), atol=1e-5, rtol=0)
    torch.testing.assert_close(module.sample(other, theta[:1])[0], both[0], atol=1e-5, rtol=0)


def test_regularization_reaches_the_sampler():
    x = images()
    module = trained("tps", std=0.2, regularization=0.5)
    expected = stn.tps_grid_sample(x, module.localise(x), regularization=0.5)
    torch.testing.assert_close(module(x), expected, atol=0, rtol=0)
    assert not torch.allclose(expected, stn.tps_grid_sample(x, module.localise(x)))


@pytest.mark.parametrize(
    "option",
    [
        {"mode": "nearest"},
        {"padding_mode": "border"},
        {"padding_mode": ("circular", "reflection")},
        {"align_corners": True},
        {"fill": (1.0, -2.0, 3.0), "antialias": True},
    ],
    ids=str,
)
def test_options_reach_the_sampler(option):
    x = images()
    module = trained(std=0.1, size=(5, 6), **option)
    theta = module.localise(x)
    expected = stn.affine_grid_sample(x, theta, (5, 6), **option)
    assert torch.equal(module(x), expected)
    assert not torch.equal(expected, stn.affine_grid_sample(x, theta, (5, 6)))
    labels = (255 * x).to(torch.uint8)  # sampled as the images are
    assert torch.equal(module.sample(labels, theta), stn.affine_grid_sample(labels, theta, (5, 6), **option))


# ------------------------------------------------------------------------------------------- training
@every_transform
def test_net_learns_from_the_second_step(transform):
    """While the regression's weights are zero no gradient reaches the net; the weights get one at once."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(189, 8), nn.Tanh())
    module = make(transform, net, features=8, transforms=2, regions=REGIONS)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    x, target = images(), torch.rand(2, 2, 3, 7, 9)

    def step():
        optimiser.zero_grad()
        (module(x) - target).square().mean().backward()
        optimiser.step()
        return net[1].weight.grad.abs().sum()

    assert step() == 0
    assert (module.regression.weight != 0).any(1).all(), "some parameter got no gradient"
    assert (module.regression.bias != 0).all()
    assert step() > 0


def test_gradients_agree_with_float64_differences():
    module = trained(transforms=2, size=(3, 4)).double()
    names, values = zip(*((name, p.detach().requires_grad_()) for name, p in module.named_parameters()))

    def run(*parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters)), x)

    x = images(1, torch.float64)
    assert torch.autograd.gradcheck(run, values, fast_mode=True)


def test_weight_decay_pulls_to_the_start():
    module = trained(regions=REGIONS[0])
    for parameter in module.regression.parameters():
        parameter.data.zero_()
    assert torch.equal(module.localise(images(1)).flatten(), module.initial[0])
    assert "initial" not in dict(module.named_parameters())


# ------------------------------------------------------------------------------- living with nn.Module
def test_inside_sequential():
    net = nn.Sequential(
        nn.LazyConv2d(4, 3, padding=1),
        SpatialTransformer(localisation_fcn((8,)), "similarity", size=(6, 6)),
        nn.ReLU(),
        SpatialTransformer(localisation_fcn((8,)), "tps", size=(5, 5), transforms=2),
        nn.Flatten(),
        nn.LazyLinear(10),
    )
    x = images(3)
    assert net(x).shape == (3, 10)
    net(x).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert sum(1 for _ in net[1].children()) == 2


@every_transform
@pytest.mark.parametrize("lazy", [False, True], ids=["into_features", "into_lazy"])
def test_state_dict_carries_the_start(transform, lazy):
    x = images()
    module = trained(transform, transforms=2, regions=REGIONS)
    other = make(transform, transforms=2, features=None if lazy else 189)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    assert set(module.state_dict()) == {"initial", "regression.weight", "regression.bias"}


def save_and_load(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, save_and_load])
@pytest.mark.parametrize("seen", [True, False], ids=["seen", "lazy"])
def test_copies(duplicate, seen):
    x = images()
    module = make("tps", localisation_fcn((6,)), transforms=2, regions=REGIONS)
    if seen:
        module(x)
        nn.init.normal_(module.regression.weight, std=0.05)
    copied = duplicate(module)
    if seen:
        assert torch.equal(copied(x), module(x))
    assert copied(x).shape == (2, 2, 3, 7, 9)
    with torch.no_grad():
        copied.regression.bias += 1
    assert module(x).shape == (2, 2, 3, 7, 9)
    assert (module.regression.bias == 0).all()


def test_lazy_becomes_as_with_features():
    x = images()
    lazy, explicit = make(), make(features=189)
    lazy.half().float()(x)
    assert type(lazy.regression) is type(explicit.regression)
    assert lazy.regression.in_features == 189
    assert (lazy.regression.weight == 0).all()
    assert (lazy.regression.bias == 0).all()


def test_any_shape_of_features():
    x = images()
    for net in (nn.Identity(), nn.Conv2d(3, 2, 3, stride=2), nn.AdaptiveAvgPool2d(1)):
        torch.testing.assert_close(make("affine", net)(x), x, atol=1e-5, rtol=0)


@every_transform
def test_empty_batch(transform):
    module = trained(transform, transforms=2, size=(4, 5))
    assert module(images(0)).shape == (0, 2, 3, 4, 5)


@every_transform
def test_localising_compiles_whole(transform):
    torch.compiler.reset()
    module = trained(transform, transforms=2, size=(4, 5))
    compiled = torch.compile(module.localise, fullgraph=True, backend="eager")
    x = images()
    assert torch.equal(compiled(x), module.localise(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), module.localise(x))


def test_repr_shows_what_differs():
    text = repr(make("attention", transforms=2, scale=0.5, size=(4, 4)))
    assert "transform='attention', size=(4, 4)" in text
    assert "transforms=2, scale=0.5" in text
    assert "lattice" not in text


# ------------------------------------------------------------------------------------ dtypes and layout
@every_transform
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_module_keeps_float32_parameters(transform, dtype):
    region = (-0.7003, -0.7003, 0.1001, 0.1001)  # representable in neither
    module = make(transform, features=189, regions=region)
    expected = module.localise(images())
    module = module.to(dtype)
    assert module.initial.dtype == torch.float32
    assert module.regression.weight.dtype == dtype
    x = images(dtype=dtype)
    theta = module.localise(x)
    assert theta.dtype == torch.float32
    assert torch.equal(theta, expected), "the start was rounded"
    assert module(x).dtype == dtype
    nn.init.normal_(module.regression.weight, std=0.05)
    weight, features = module.regression.weight, x.flatten(1)
    torch.testing.assert_close(module.regression(features), features.float() @ weight.float().T)
    assert module.float().initial.dtype == torch.float32
    assert module.double().initial.dtype == torch.float64
    assert module(x.double()).dtype == torch.float64
    assert module.to(dtype).initial.dtype == torch.float32, "the half of a float64 module samples in float64"


@every_transform
def test_autocast_leaves_parameters_alone(transform):
    """The localisation net runs in bfloat16, what follows as it does without autocast."""
    x = images()
    module = trained(transform, transforms=2, size=(5, 6))
    theta, expected = module.localise(x), module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.localise(x), theta)
        output = module(x)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)

    net = make(transform, localisation_fcn((8,)))
    with torch.autocast("cpu", torch.bfloat16):
        assert net.localisation(x).dtype == torch.bfloat16
        assert net.localise(x).dtype == torch.float32
        torch.testing.assert_close(net(x), x, atol=1e-5, rtol=0)
        net(x).sum().backward()
    assert net.regression.weight.grad.dtype == torch.float32


@every_transform
def test_channels_last_stays(transform):
    x = images().contiguous(memory_format=torch.channels_last)
    module = make(transform, nn.Conv2d(3, 4, 3), features=4 * 5 * 7).to(memory_format=torch.channels_last)
    output = module(x)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert not output.is_contiguous()
    torch.testing.assert_close(output, x, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"localisation": "cnn"}, TypeError, "localisation must be a torch.nn.Module, got str"),
        ({"transform": "afine"}, ValueError, "transform must be one of 'affine', .*, got 'afine'"),
        ({"transform": "tps", "dims": 3}, ValueError, "dims must be 2, or 3 for 'affine' and 'attention'"),
        ({"transform": "homography"}, ValueError, "got 'homography'; did you mean 'projective'"),
        (
            {"fill": torch.ones(3)},
            TypeError,
            "fill must be a number, or a tuple of one for each channel, got",
        ),
        ({"fill": 1, "padding_mode": "circular"}, ValueError, "fill must be None unless padding_mode is"),
        ({"dims": 4}, ValueError, "dims must be"),
        ({"mode": "linear"}, ValueError, "mode must be one of"),
        ({"padding_mode": "wrap"}, ValueError, "padding_mode must be one of"),
        ({"align_corners": None}, TypeError, "align_corners must be a bool"),
        ({"size": 28}, TypeError, r"size must be \(H, W\), a tuple of ints, got 28"),
        ({"size": (28, 28, 28)}, ValueError, r"size must be \(H, W\)"),
        ({"size": (28, -1)}, ValueError, "none of them negative"),
        ({"transforms": 0}, ValueError, "transforms must be 1 or more, got 0"),
        ({"transforms": 2.0}, TypeError, "transforms must be an int"),
        ({"features": "all"}, TypeError, "features must be an int"),
        ({"scale": 0.5}, ValueError, "scale must be left out unless transform='attention'"),
        ({"transform": "attention", "scale": 0.0}, ValueError, "scale must be finite and positive"),
        ({"transform": "attention", "scale": "half"}, TypeError, "scale must be a number"),
        ({"lattice": 5}, ValueError, "lattice must be left out unless transform='tps'"),
        ({"transform": "tps", "lattice": 1}, ValueError, "lattice must be 2 or more"),
        ({"transform": "tps", "regularization": -1.0}, ValueError, "regularization must be finite"),
        ({"transform": "tps", "regularization": math.nan}, ValueError, "regularization must be finite"),
        ({"regions": "left"}, TypeError, "regions must be a tensor or nested sequences"),
        (
            {"regions": [REGIONS[0]] * 3},
            ValueError,
            r"regions must be \(1, 4\) or \(4,\), got shape \(3, 4\)",
        ),
        ({"regions": (0, 0, -1, 1)}, ValueError, "regions must be .* with x0 < x1"),
        ({"regions": (0, 0, math.inf, 1)}, ValueError, "regions must be"),
        ({"transform": "similarity", "regions": (0, 0, 1, 0.5)}, ValueError, "regions must be square"),
        (
            {"transform": "attention", "scale": 0.5, "regions": (-1, -1, 1, 1)},
            ValueError,
            "regions must be squares of side 1 ",
        ),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_errors_name_the_argument(options, kind, message):
    with pytest.raises(kind, match=message):
        SpatialTransformer(**({"localisation": nn.Flatten()} | options))


@pytest.mark.parametrize(
    "net, kind, message",
    [
        (nn.Flatten(0), ValueError, r"localisation must be a module that returns \(2, ...\)"),
        (nn.Flatten(0, 1), ValueError, r"got shape \(6, 7, 9\)"),
        (nn.AdaptiveMaxPool2d(1, return_indices=True), TypeError, "returns a tensor, got tuple"),
    ],
    ids=["vector", "batch", "tuple"],
)
def test_errors_about_the_net_name_it(net, kind, message):
    with pytest.raises(kind, match=message):
        make(localisation=net)(images())


def test_errors_about_the_input_name_it():
    with pytest.raises(ValueError, match=r"input must be \(N, C, H, W\), got shape \(3, 7, 9\)"):
        make()(images()[0])
    with pytest.raises(ValueError, match=r"input must be \(N, C, D, H, W\)"):
        make(dims=3)(images())
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        make()([1.0])


# ---------------------------------------------------------------------------------- localisation nets
@pytest.mark.parametrize("size", [(28, 28), (42, 42), (29, 61)], ids=str)
def test_localisation_cnn_is_the_papers(size):
    net = localisation_cnn(input_shape=(1, *size))
    convolutions = [layer for layer in net if isinstance(layer, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size) for c in convolutions] == [(20, (5, 5))] * 2
    assert [type(layer).__name__ for layer in net] == (
        ["AvgPool2d", "Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU", "Flatten", "Linear", "ReLU"]
    )
    x = torch.rand(2, 1, *size)
    assert net(x).shape == (2, 20)
    lazy = localisation_cnn()
    assert lazy(x).shape == (2, 20)
    lazy.load_state_dict(net.state_dict())
    assert torch.equal(lazy(x), net(x))


def test_localisation_cnn_of_the_house_numbers():
    net = localisation_cnn((32, 32), (32, 32), padding=2, downsample=1, input_shape=(3, 64, 64))
    assert net(torch.rand(2, 3, 64, 64)).shape == (2, 32)
    assert [layer.weight.shape[0] for layer in net if hasattr(layer, "weight")] == [32] * 4
    assert net[-4].in_features == 32 * 32 * 32


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 7, 9), (2, 4, 5, 6)], ids=str)
def test_localisation_fcn_is_the_papers(shape):
    net = localisation_fcn(input_shape=shape)
    assert [layer.out_features for layer in net if isinstance(layer, nn.Linear)] == [32] * 3
    x = torch.rand(2, *shape)
    assert net(x).shape == (2, 32)
    assert localisation_fcn((32, 32))(x).shape == (2, 32)


@every_transform
def test_papers_nets_together(transform):
    """As the README has it: lazy all the way, first batch, train."""
    x = torch.rand(4, 1, 29, 31)
    for net in (localisation_cnn(), localisation_fcn()):
        module = SpatialTransformer(net, transform, size=(28, 28))
        output = module(x)
        assert output.shape == (4, 1, 28, 28)
        output.square().sum().backward()
        assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("options", [{}, {"padding": 2, "downsample": 1}, {"channels": (4, 4, 4)}], ids=str)
def test_localisation_cnn_knows_its_least_image(options):
    """One pixel less is refused, with words; exactly that many go through."""
    net = localisation_cnn(**options)
    least = net.least_size
    assert net(torch.rand(1, 1, least, least)).shape == (1, 20)
    with pytest.raises(ValueError, match=f"H and W of {least} or more"):
        net(torch.rand(1, 1, least, least - 1))
