"""d image by gather: every way to find the outputs that read a pixel, against scatter in float64."""

import itertools
import math
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from common import TAPPED, assert_close, number_of, pairwise, place, random_theta
from conftest import ON_GPU

from stn_triton import reference
from stn_triton.kernels.device import affine, sources
from stn_triton.kernels.device.arithmetic import AFFINE
from stn_triton.kernels.device.bounds import box_in_units, image_bounds, preimage
from stn_triton.kernels.gather import gather_backward
from stn_triton.kernels.host import configs
from stn_triton.kernels.modes import NAMED_PADDINGS, Interpolation, Padding, Source
from stn_triton.kernels.sample import sample_backward
from stn_triton.kernels.spec import Sizes, Spec, Work, kernel

INTERPOLATIONS = pytest.mark.parametrize("interpolation", TAPPED, ids=lambda i: i.name.lower())
PADDINGS = pytest.mark.parametrize("padding", list(Padding), ids=lambda p: p.name.lower())
NAMED = pytest.mark.parametrize("padding", NAMED_PADDINGS, ids=lambda p: p.name.lower())
ALIGN = pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "centres"])
LANES_OF_THEIR_OWN = pytest.mark.skipif(
    ON_GPU, reason="lanes with a map each are no compiled kernel's: the interpreter takes thousands at once"
)
# Outputs get the lanes beyond this many candidates: never, or always.
WAYS = {"by_pixel": 10**9, "by_output": 0}


def gather(grad_output, params, in_shape, modes, source=Source.AFFINE, candidates=None, dtype=None):
    """d image, (N, C, ...), in a tensor that was full of NaN."""
    grad_input = torch.full(
        in_shape, float("nan"), dtype=dtype or grad_output.dtype, device=grad_output.device
    )
    with configs.override(**({} if candidates is None else {"candidates": candidates})):
        gather_backward(grad_output, params, grad_input, source, *modes)
    return grad_input


def scatter(grad_output, params, in_shape, modes, source=Source.AFFINE):
    """The same by plain PyTorch in float64."""
    grad_output, params = grad_output.double().cpu(), params.double().cpu()
    by_transform = grad_output if grad_output.dim() > len(in_shape) else grad_output.unsqueeze(1)
    wanted = True, False
    return reference.sample_backward(
        by_transform, None, params, None, source, torch.Size(in_shape[2:]), *modes, *wanted
    )[0]


def random_homography(batch, device, tilt=0.3):
    matrix = torch.eye(3, dtype=torch.float64) + 0.3 * torch.randn(batch, 3, 3, dtype=torch.float64)
    matrix[:, 2, :2] *= tilt
    matrix[:, 2, 2] = 1
    return matrix.to(device)


@pairwise
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("source", ["affine", "projective"])
@INTERPOLATIONS
@PADDINGS
@ALIGN
def test_planar(device, source, interpolation, padding, align_corners, way):
    """Two images of odd sizes, one zoomed in and one out, against scatter."""
    modes = interpolation, padding, align_corners
    if source == "affine":
        params = random_theta(2, 2, torch.float64, device)
        params *= params.new_tensor([0.6, 1.4]).view(2, 1, 1)
    else:
        params = random_homography(2, device)
    source = Source[source.upper()]
    grad_output = torch.randn(2, 2, 7, 6, dtype=torch.float64, device=device)
    result = gather(grad_output, params, (2, 2, 5, 7), modes, source, WAYS[way])
    assert_close(result, scatter(grad_output, params, (2, 2, 5, 7), modes, source))


def _turned(degrees, zoom=1.0, x=0.0, y=0.0):
    angle = math.radians(degrees)
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    return [[cos, -sin, x], [sin, cos, y]]


# theta -> whether three outputs along each axis hold all that read a pixel of an image of the same size
MILD = {
    "identity": (_turned(0), True),
    "shifted": (_turned(0, x=0.13, y=-0.07), True),
    "turned": (_turned(30, 1.1, 0.03), True),
    "just_mild": (_turned(0, 0.6675), True),  # 2.996 outputs along each axis
    "just_not": (_turned(0, 0.6665), False),  # 3.001
    "zoomed_out": (_turned(20, 3.0), True),
    "too_far_apart": (_turned(20, 9.0), False),  # distances would pass 2^31
    "upside_down": (_turned(180, 0.9, 0.2), True),
    "mirrored": ([[-1.0, 0.0, 0.3], [0.0, 1.0, 0.0]], True),
    "sheared": ([[1.0, 0.3, 0.0], [0.0, 1.0, 0.0]], True),
    "flat": ([[1.0, 1.0, 0.0], [1.0, 1.001, 0.0]], False),
    "outside": (_turned(10, x=5.0, y=-40.0), True),
}


@pytest.fixture
def took(monkeypatch):
    """An entry for each block of pixels that takes the mild way."""
    if not triton.knobs.runtime.interpret:
        pytest.skip("a device function is replaced: not in compiled code")
    module, noted = sys.modules[gather_backward.__module__], []
    write_mild = module.write_mild
    monkeypatch.setattr(module, "write_mild", lambda *args: (noted.append(1), write_mild(*args))[1])
    return noted


@pytest.mark.parametrize("channels, align_corners", [(2, False), (3, True)])
def test_mild_maps(device, channels, align_corners):
    """Nine outputs for each pixel, none looked for: tiles as on GPUs, on the image's rim and within it."""
    theta = torch.tensor([theta for theta, _ in MILD.values()])
    grad_output = torch.randn(len(MILD), channels, 18, 12)
    shape, modes = tuple(grad_output.shape), (Interpolation.BILINEAR, Padding.ZEROS, align_corners)
    with configs.override(rows=16, columns=8, channels=1, unroll=2):
        result = gather(grad_output.to(device), theta.to(device), shape, modes).cpu()
    for name, ours, exact in zip(MILD, result, scatter(grad_output, theta, shape, modes)):
        assert (ours - exact).abs().max() < 3e-6, name


def test_which_maps_are_mild(took):
    """Those of which three outputs along each axis are enough, and there are three."""
    modes = Interpolation.BILINEAR, Padding.ZEROS, False
    tries = [(name, 15, mild) for name, (_, mild) in MILD.items()]
    for name, size, expected in (*tries, ("identity", 3, True), ("identity", 2, False), ("turned", 1, False)):
        took.clear()
        grad_output, theta = torch.randn(1, 1, size, size), torch.tensor([MILD[name][0]])
        with configs.override(rows=16, columns=8):
            result = gather(grad_output, theta, (1, 1, size, size), modes)
        assert bool(took) == expected, f"{name}, {size}"
        assert_close(result, scatter(grad_output, theta, (1, 1, size, size), modes))


def _turned_volume(degrees, tilt=0.0, zoom=1.0, shift=(0.0, 0.0, 0.0)):
    """Turned about z, then about x."""
    turned = torch.eye(3, dtype=torch.float64)
    turned[:2, :2] = torch.tensor(_turned(degrees))[:, :2]
    tilted = torch.eye(3, dtype=torch.float64)
    tilted[1:, 1:] = torch.tensor(_turned(tilt))[:, :2]
    return torch.cat([zoom * (turned @ tilted), torch.tensor([shift]).mT], 1).tolist()


# the same of volumes, which are cubes: of rotations about two axes three outputs are too few
MILD_VOLUMES = {
    "identity": (_turned_volume(0), True),
    # two outputs along y and z, of which the last ones exist: the volume goes on beyond the output
    "shifted": (_turned_volume(0, shift=(0.13, -0.07, -0.03)), True),
    "shifted_back": (_turned_volume(0, shift=(-0.13, 0.07, 0.03)), True),
    "shrunk": (_turned_volume(0, zoom=1.3), True),
    "turned": (_turned_volume(25, zoom=1.1, shift=(0.03, 0, 0.02)), True),
    "across": (_turned_volume(90, zoom=0.9), True),  # lanes take patches
    "tilted": (_turned_volume(0, 20), True),
    "both": (_turned_volume(12, 10), True),
    "both_far": (_turned_volume(45, 45), False),
    "just_mild": (_turned_volume(0, zoom=0.6675), True),
    "just_not": (_turned_volume(0, zoom=0.6665), False),
    "upside_down": (_turned_volume(180, 180, 0.9, (0.2, 0, 0)), True),
    "flat": ([[1.0, 1.0, 0, 0], [1.0, 1.001, 0, 0], [0, 0, 1, 0]], False),
    "outside": (_turned_volume(10, shift=(5.0, 0, -40.0)), True),
}
# (channels, output, fields of the tile): of a volume of 5 x 6 x 13, with tiles that go on in the next slice,
# or lie in one; planes and channels last
VOLUME_TILES = {
    "rows": (1, (5, 6, 13), {"rows": 4, "columns": 32, "channels": 1, "unroll": 1}),
    "in_slices": (3, (6, 7, 12), {"rows": 2, "columns": 16, "channels": 1, "unroll": 2}),
    "last": (8, (4, 5, 11), {"rows": 4, "columns": 8, "channels": 8, "unroll": 1}),
}


@pytest.mark.parametrize("padding", [Padding.ZEROS, Padding.BORDER], ids=["zeros", "border"])
@pytest.mark.parametrize("tile", list(VOLUME_TILES))
def test_mild_volumes(device, tile, padding):
    """27 outputs for each voxel at most, none looked for."""
    channels, out_size, fields = VOLUME_TILES[tile]
    near = [name for name in MILD_VOLUMES if padding == Padding.ZEROS or name not in ("flat", "outside")]
    theta = torch.tensor([MILD_VOLUMES[name][0] for name in near])
    grad_output, shape = torch.randn(len(near), channels, *out_size), (len(near), channels, 5, 6, 13)
    ours, modes = grad_output.to(device), (Interpolation.BILINEAR, padding, False)
    if tile == "last":
        ours = ours.to(memory_format=torch.channels_last_3d)
    with configs.override(**fields):
        result = gather(ours, theta.to(device), shape, modes).cpu()
    for name, one, exact in zip(near, result, scatter(grad_output, theta, shape, modes)):
        # borders that many outputs are clamped to have large sums
        assert (one - exact).abs().max() < 3e-6 * exact.abs().max().clamp(min=1), name


@pytest.mark.parametrize(
    "padding, rows, tiles",
    # rows 4 to 7 lie in two slices of 6; with borders voxels 2 and 3, rows 2 and 3, slices 1 to 4
    [(Padding.ZEROS, 4, 18), (Padding.BORDER, 2, 4)],
    ids=["zeros", "border"],
)
def test_which_volumes_are_mild(took, padding, rows, tiles):
    """Tiles that lie in one slice, and with border padding touch no border."""
    modes = Interpolation.BILINEAR, padding, False
    for name, (theta, mild) in MILD_VOLUMES.items():
        if name in ("shifted", "both", "both_far", "just_mild", "just_not"):
            took.clear()
            grad_output, theta = torch.randn(1, 1, 6, 6, 6), torch.tensor([theta])
            with configs.override(rows=rows, columns=2):
                result = gather(grad_output, theta, (1, 1, 6, 6, 6), modes)
            assert len(took) == mild * tiles, name
            assert_close(result, scatter(grad_output, theta, (1, 1, 6, 6, 6), modes))


@pairwise
@pytest.mark.parametrize("way", list(WAYS))
@INTERPOLATIONS
@NAMED
def test_volumes(device, interpolation, padding, way):
    """3-D, with tiles that go over from one slice to the next."""
    modes = interpolation, padding, False
    theta = random_theta(1, 3, torch.float64, device, shift=0.2)
    grad_output = torch.randn(1, 2, 3, 4, 3, dtype=torch.float64, device=device)
    shape = (1, 2, 3, 3, 4)
    with configs.override(rows=4, columns=4):
        result = gather(grad_output, theta, shape, modes, candidates=WAYS[way])
    assert_close(result, scatter(grad_output, theta, shape, modes))


@pytest.mark.parametrize("way", list(WAYS))
@PADDINGS
def test_tiles(device, padding, way):
    """Tiles smaller than the image, blocks smaller than the output, channels in several programs."""
    theta = random_theta(2, 2, torch.float64, device)
    grad_output = torch.randn(2, 3, 5, 6, dtype=torch.float64, device=device)
    modes = Interpolation.BILINEAR, padding, True
    wanted = scatter(grad_output, theta, (2, 3, 6, 9), modes)
    tiles = {"by_pixel": {"rows": 4, "columns": 8, "channels": 2, "unroll": 1}}
    tile = tiles.get(way, {"channels": 1, "unroll": 2, "splits": 2})
    with configs.override(**tile, out_rows=2, out_columns=4):
        assert_close(gather(grad_output, theta, (2, 3, 6, 9), modes, candidates=WAYS[way]), wanted)


@pytest.mark.parametrize("way", list(WAYS))
@PADDINGS
def test_far_beyond_the_border(device, padding, way):
    """Whole blocks of outputs on all sides of the image, and tiles that they pass by."""
    theta = torch.eye(2, 3, dtype=torch.float64, device=device)[None] * 3
    grad_output = torch.randn(1, 1, 6, 8, dtype=torch.float64, device=device)
    for shift in ((0, 0), (2.5, -4.5)):
        theta[0, :, 2] = theta.new_tensor(shift)
        modes = Interpolation.BILINEAR, padding, False
        with configs.override(rows=4, columns=4, out_rows=2, out_columns=2):
            result = gather(grad_output, theta, (1, 1, 6, 7), modes, candidates=WAYS[way])
        assert_close(result, scatter(grad_output, theta, (1, 1, 6, 7), modes))


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_many_transforms(device, shared, way):
    """Transforms of one image are summed, and parameters of one image serve all."""
    theta = random_theta(6, 2, torch.float64, device).view(2, 3, 2, 3)[: 1 if shared else 2]
    grad_output = torch.randn(2, 3, 2, 5, 6, dtype=torch.float64, device=device)
    modes = Interpolation.BILINEAR, Padding.BORDER, False
    wanted = scatter(grad_output, theta, (2, 2, 6, 5), modes)
    for channels in (2, 1):  # in one block, or in two that share what is known of a single transform
        with configs.override(channels=channels):
            result = gather(grad_output, theta, (2, 2, 6, 5), modes, candidates=WAYS[way])
        assert_close(result, wanted)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
def test_dtypes(device, dtype):
    """Summed in float32 and rounded once to the image's type."""
    theta = random_theta(2, 2, torch.float32, device)
    grad_output = torch.randn(2, 9, 8, 11, device=device).to(dtype)
    modes = Interpolation.BILINEAR, Padding.ZEROS, False
    result = gather(grad_output, theta, (2, 9, 9, 10), modes)
    assert_close(result, scatter(grad_output, theta, (2, 9, 9, 10), modes), dtype)


LAYOUTS = (
    "contiguous",
    "channels_last",
    "sliced",
    "gaps",
    "offset",
    "reversed",
    "expanded_space",
    "expanded_all",
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", list(WAYS))
def test_strides(device, layout, way):
    """A gradient of any strides, with NaN around it and between, into images of any strides."""
    theta = random_theta(2, 2, torch.float32, device)
    grad_output = place(torch.randn(2, 9, 6, 7), layout, device=device)
    modes = Interpolation.BILINEAR, Padding.REFLECTION, False
    wanted = scatter(grad_output, theta, (2, 9, 7, 5), modes)
    for target in ("contiguous", "channels_last", "gaps"):
        grad_input = place(torch.zeros(2, 9, 7, 5), target, device=device)
        with configs.override(candidates=WAYS[way]):
            gather_backward(grad_output, theta, grad_input, Source.AFFINE, *modes)
        assert_close(grad_input, wanted)


# -------------------------------------------------------------------------- maps without an inverse
def _irregular():
    """name -> theta (2, 3) or homography (3, 3)."""
    nan, inf = float("nan"), float("inf")
    flat = torch.tensor([[0.7, 0.7, 0.1], [0.7, 0.7, -0.2]])
    return {
        "point": torch.tensor([[0.0, 0, 0.3], [0, 0, -0.2]]),
        "line": flat,
        "nearly_a_line": flat + torch.tensor([[1e-6, 0, 0], [0, 0, 0]]),
        "nearly_a_point": torch.tensor([[1e-7, 2e-7, 0.3], [-2e-7, 1e-7, -0.2]]),
        "mirror": torch.tensor([[-1.0, 0.1, 0], [0, -1, 0]]),
        "zoom_in": torch.tensor([[0.02, 0.01, 0.1], [-0.01, 0.02, 0]]),
        "zoom_out": torch.tensor([[50.0, 3, 0.1], [-2, 50, 0]]),
        "outside": torch.tensor([[1.0, 0, 40], [0, 1, -3]]),
        "far_out": torch.tensor([[1.0, 0, 1e30], [0, 1, 0]]),
        "huge": torch.tensor([[1e30, 0, 0], [0, 1e30, 0]]),
        "overflow": torch.tensor([[3e38, 3e38, 0], [0, 1, 0]]),
        "nan": torch.full((2, 3), nan),
        "nan_in_x": torch.tensor([[1, nan, 0], [0, 1, 0]]),
        "infinite": torch.tensor([[1, 0, inf], [0, 1, 0]]),
        "infinite_slope": torch.tensor([[inf, 0, 0], [0, 1, 0]]),
        "horizon": torch.tensor([[1.0, 0, 0], [0, 1, 0], [1.3, 0.4, 0.2]]),
        "horizon_at_the_edge": torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 1.0]]),
        "nearly_a_horizon": torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 1.001]]),
        "homography_to_a_line": torch.tensor([[1.0, 0.5, 0], [1, 0.5, 0.1], [0.1, 0.05, 1]]),
        "negative": -torch.tensor([[1.0, 0.1, 0], [0, 1, 0.2], [0.1, 0.2, 1]]),
        "tiny": torch.tensor([[1.0, 0.1, 0], [0, 1, 0.2], [0.1, 0.2, 1]]) * 1e-20,
        "zero": torch.zeros(3, 3),
    }


@pytest.mark.parametrize("name", list(_irregular()))
@NAMED
def test_maps_without_an_inverse(device, padding, name):
    """As shipped: every output counts once, and nothing but the truth is written."""
    params = _irregular()[name][None].to(device)
    source = Source.PROJECTIVE if params.shape[1] == 3 else Source.AFFINE
    grad_output = torch.randn(1, 2, 7, 9, device=device)
    for interpolation, align_corners in ((Interpolation.BILINEAR, False), (Interpolation.NEAREST, True)):
        modes = interpolation, padding, align_corners
        result = gather(grad_output, params, (1, 2, 6, 5), modes, source)
        assert result.isfinite().all()
        # scatter in float32 has the same coordinates; float64 would place pixels elsewhere
        wanted = torch.zeros(1, 2, 6, 5, device=device)
        sample_backward(grad_output, wanted, params, None, wanted, source, *modes, params_grad=False)
        assert_close(result, wanted.double())


def test_minors_that_underflow(device):
    """A volume's matrix with rows of 1e-20 and 1e4, whose determinant is an ordinary number."""
    theta = torch.tensor(
        [
            [
                [3e-22, -2.6e-20, -2.6e-21, 0.58],
                [-9e-23, -1.6e-24, 4.4e-24, 0.06],
                [8e-25, 2e-22, 29278.0, 7319.5],
            ]
        ]
    )
    grad_output = torch.ones(1, 1, 2, 8, 8, device=device)
    modes = Interpolation.NEAREST, Padding.BORDER, False
    result = gather(grad_output, theta.to(device), (1, 1, 2, 2, 2), modes)
    assert_close(result, scatter(grad_output, theta, (1, 1, 2, 2, 2), modes))


@pairwise
@pytest.mark.parametrize("way", list(WAYS))
@ALIGN
@PADDINGS
def test_single_pixels(device, padding, align_corners, way):
    """Axes of one pixel, in the input and in the output."""
    for in_size, size in itertools.product([(1, 1), (1, 4), (5, 1)], [(1, 1), (1, 3), (4, 1)]):
        theta = random_theta(1, 2, torch.float64, device)
        grad_output = torch.randn(1, 1, *size, dtype=torch.float64, device=device)
        modes = Interpolation.BILINEAR, padding, align_corners
        result = gather(grad_output, theta, (1, 1, *in_size), modes, candidates=WAYS[way])
        assert_close(result, scatter(grad_output, theta, (1, 1, *in_size), modes))


@pytest.mark.parametrize("padding", [Padding.ZEROS, Padding.BORDER], ids=["zeros", "border"])
def test_outputs_far_apart(device, padding):
    """Outputs many images apart."""
    theta = torch.tensor([[[1e5, 3e4, 0.2], [-3e4, 1e5, -0.3]]], device=device)
    grad_output = torch.randn(1, 1, 9, 11, device=device)
    modes = Interpolation.BILINEAR, padding, False
    result = gather(grad_output, theta, (1, 1, 7, 5), modes)
    assert_close(result, scatter(grad_output, theta, (1, 1, 7, 5), modes))


@pytest.mark.parametrize("padding", [Padding.ZEROS, Padding.BORDER], ids=["zeros", "border"])
def test_accuracy_of_turned_maps(device, padding):
    """Of turned maps, nine candidates to a pixel, the error is below PyTorch's, in small images too."""
    generator = torch.Generator().manual_seed(3)
    batch, size = 256, (5, 6)
    angle = 6.28 * torch.rand(batch, generator=generator)
    zoom = 0.7 + 0.6 * torch.rand(batch, generator=generator)
    cos, sin, shift = zoom * angle.cos(), zoom * angle.sin(), 0.2 * torch.randn(batch, 2, generator=generator)
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], -1).view(batch, 2, 3)
    grad_output = torch.randn(batch, 1, *size, generator=generator)
    shape, modes = (batch, 1, *size), (Interpolation.BILINEAR, padding, False)
    result = gather(grad_output.to(device), theta.to(device), shape, modes).cpu()
    exact = scatter(grad_output, theta, shape, modes)
    image = torch.zeros(shape, requires_grad=True)
    grid = plain_grid(Source.AFFINE, theta, size, False)
    F.grid_sample(image, grid, "bilinear", padding.name.lower(), False).backward(grad_output)
    assert (result - exact).norm() < (image.grad - exact).norm()


def test_what_is_not_read_adds_nothing(device):
    """A NaN or an infinity in d output stays with the pixels that its output read."""
    theta = torch.tensor([[[1.0, 0, 0.01], [0, 1, 0.01]]], device=device)
    grad_output = torch.ones(1, 1, 6, 6, device=device)
    grad_output[0, 0, 2, 3] = float("nan")
    for candidates in (10**9, 0):
        result = gather(
            grad_output,
            theta,
            (1, 1, 6, 6),
            (Interpolation.BILINEAR, Padding.ZEROS, False),
            candidates=candidates,
        )
        touched = torch.zeros(6, 6, dtype=torch.bool, device=device)
        touched[2:4, 3:5] = True
        assert result.isnan()[0, 0].equal(touched)


def test_candidates_that_are_not_read_add_nothing(device):
    """A NaN among the nine candidates of a turned map stays with the pixels that its output reads."""
    theta = torch.tensor([[[0.8, -0.6, 0.01], [0.6, 0.8, 0.02]]], device=device)
    grad_output = torch.zeros(1, 1, 8, 8, device=device)
    grad_output[0, 0, 3, 4] = 1
    for padding in Padding:
        modes = Interpolation.BILINEAR, padding, False
        touched = scatter(grad_output, theta, (1, 1, 8, 8), modes) != 0
        assert touched.sum() == 4
        poisoned = torch.where(grad_output == 1, float("nan"), grad_output)
        assert gather(poisoned, theta, (1, 1, 8, 8), modes).isnan().cpu().equal(touched)


# ----------------------------------------------------------------------------------------- the bound
@kernel()
def bound_kernel(
    source_ptr, pixel_ptr, out_ptr, first_ptr, last_ptr, index_ptr, fraction_ptr,
    in_width, in_height, in_depth, out_width, out_height, out_depth,
    SPEC: tl.constexpr, BLOCK: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """A lane for each (matrix, pixel): the device functions work on any shape.

    Writes the first and last candidate, and the forward's places of the outputs at out_ptr.
    """
    lane = tl.arange(0, BLOCK)[:, None]
    sizes = Sizes((in_width, in_height, in_depth), (out_width, out_height, out_depth), 1, 1, 1, (1, 1, 1))
    ROWS: tl.constexpr = sources.matrix_rows(SPEC)
    rows = ()
    for r in tl.static_range(ROWS):
        row = ()
        for k in tl.static_range(SPEC.dims + 1):
            row += (tl.load(source_ptr + (lane * ROWS + r) * (SPEC.dims + 1) + k),)
        rows += (row,)
    map = rows
    if SPEC.source == AFFINE:
        map = affine.affine_map(rows, sizes, SPEC)
    first = ()
    last = ()
    for axis in tl.static_range(SPEC.dims):
        first += (lane * 0,)
        last += (lane * 0 + (sizes.output[axis] - 1),)
    low, high = box_in_units(first, last, sizes, SPEC)
    bounds = image_bounds(map, low, high, sizes, SPEC)
    center = ()
    radius = ()
    for axis in tl.static_range(SPEC.dims):
        center += (tl.load(pixel_ptr + SPEC.dims * lane + axis).to(tl.float32),)
        radius += (1.0 + bounds[axis][2],)
    ranges = preimage(map, center, radius, sizes, SPEC)
    at = (lane * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]) * SPEC.dims
    out = ()
    for axis in tl.static_range(SPEC.dims):
        tl.store(first_ptr + SPEC.dims * lane + axis, ranges[axis][0])
        tl.store(last_ptr + SPEC.dims * lane + axis, ranges[axis][1])
        out += (tl.load(out_ptr + at + axis),)
    if SPEC.fixed_point:  # the lanes' maps differ in whether they fit
        fixed = affine.fixed_places(map, out, sizes, SPEC)
        places = affine.float_places(map, out, sizes, SPEC)
        for axis in tl.static_range(SPEC.dims):
            tl.store(index_ptr + at + axis, tl.where(map.fits, fixed[axis].index, places[axis].index))
            tl.store(
                fraction_ptr + at + axis, tl.where(map.fits, fixed[axis].fraction, places[axis].fraction)
            )
    else:
        work = Work((), 0, (), map, 0, 0, 1, (), (), (0, 1), False, 0, 0, 1)
        places = sources.places_at(work, out, True, sizes, SPEC)[0]
        for axis in tl.static_range(SPEC.dims):
            tl.store(index_ptr + at + axis, places[axis].index)
            tl.store(fraction_ptr + at + axis, places[axis].fraction)


def bounds_of(device, source, matrices, pixels, outputs, in_size, size, align_corners, fixed_point):
    """Which ``outputs``, (matrices or 1, outputs, dims), read each matrix's pixel, and which are candidates.

    Then how many are along each axis.
    """
    block, dims = pixels.shape
    count = triton.next_power_of_2(outputs.shape[1])
    padded = torch.cat([outputs, outputs[:, :1].expand(-1, count - outputs.shape[1], -1)], 1)
    padded = padded.expand(block, -1, -1).int().contiguous().to(device)
    first = torch.zeros(block, dims, dtype=torch.int32, device=device)
    index = torch.zeros(block, count, dims, dtype=torch.int32, device=device)
    last, fraction = torch.zeros_like(first), torch.zeros(block, count, dims, device=device)
    sizes = (*in_size[::-1], 1)[:3], (*size[::-1], 1)[:3]
    spec = Spec(
        source=int(source),
        interpolation=int(Interpolation.BILINEAR),
        padding=(int(Padding.ZEROS),) * dims,
        align_corners=int(align_corners),
        dims=dims,
        compute=tl.float32,
        index=tl.int32,
        fixed_point=fixed_point,
    )
    bound_kernel[(1,)](
        matrices.contiguous().to(device), pixels.int().contiguous().to(device), padded, first, last,
        index, fraction, *sizes[0], *sizes[1], spec, block, count,
    )  # fmt: skip
    at = index[:, : outputs.shape[1]].cpu().double() + fraction[:, : outputs.shape[1]].cpu().double()
    first, last = first.cpu()[:, None], last.cpu()[:, None]
    reads = ((at - pixels[:, None]).abs() < 1).all(-1)
    return reads, ((outputs >= first) & (outputs <= last)).all(-1), (last - first + 1).clamp(min=0)[:, 0]


def _hard_matrices(entries, count, generator):
    """Matrices of every kind: random, near-singular, mirrored, much zoomed, far away."""
    n = entries // 3
    matrix = torch.randn(count, n, 3, generator=generator, dtype=torch.float64)
    kind = torch.arange(count) % 6
    rank_one = torch.randn(count, n, 1, generator=generator, dtype=torch.float64) * torch.randn(
        count, 1, 3, generator=generator, dtype=torch.float64
    )
    distance = 10.0 ** (-7 * torch.rand(count, 1, 1, generator=generator, dtype=torch.float64))
    matrix = torch.where((kind == 0)[:, None, None], rank_one + distance * matrix, matrix)
    zoom = 50.0 ** (2 * torch.rand(count, 1, 1, generator=generator, dtype=torch.float64) - 1)
    matrix[..., :2] = torch.where((kind == 1)[:, None, None], matrix[..., :2] * zoom, matrix[..., :2])
    matrix[..., 2:] = torch.where((kind == 2)[:, None, None], matrix[..., 2:] * 30, matrix[..., 2:])
    near = torch.eye(n, 3, dtype=torch.float64) + 0.1 * matrix
    matrix = torch.where((kind >= 3)[:, None, None], near, matrix)
    matrix[:, 0] *= torch.where(kind == 4, -1, 1)[:, None]
    return matrix.float()


def _aimed(matrices, in_size, size, align_corners, generator):
    """The matrices moved so that an output reads just inside the image, and a pixel that it reads.

    Some are scaled up first: the errors of their coordinates then are a part of a pixel.
    """
    count = len(matrices)

    def choose(n):
        return torch.tensor([torch.randint(m, (), generator=generator) for m in n for _ in range(count)])

    exact = matrices.double()
    scale = 10.0 ** (4 * torch.rand(count, 1, 1, generator=generator, dtype=torch.float64))
    exact[:, :2, :2] *= torch.where(torch.arange(count)[:, None, None] % 4 == 0, scale, 1.0)
    sizes = torch.tensor(size[::-1])
    o = choose(size[::-1]).view(2, count).T
    u = (2 * o - (sizes - 1)) / (sizes - int(align_corners)).clamp(min=1)
    pixels = choose(in_size[::-1]).view(2, count).T
    sizes = torch.tensor(in_size[::-1])
    # so far that the output just reads the pixel, or just not
    aim = pixels + (torch.randint(2, (count, 2), generator=generator) * 2 - 1) * (
        1 - 1e-6 * torch.rand(count, 2, generator=generator)
    )
    aim = (aim - (sizes - 1) / 2) / ((sizes - int(align_corners)) / 2)
    w = exact[:, 2, :2].mul(u).sum(-1, keepdim=True) + exact[:, 2, 2:] if exact.shape[1] == 3 else 1.0
    exact[:, :2, 2] = aim * w - (exact[:, :2, :2] @ u[..., None].double()).squeeze(-1)
    return exact.float(), pixels


@pytest.mark.parametrize(
    "source, fixed_point",
    [(Source.AFFINE, True), (Source.AFFINE, False), (Source.PROJECTIVE, False)],
    ids=["affine", "affine-floats", "projective"],
)
@ALIGN
@LANES_OF_THEIR_OWN
def test_no_reader_is_left_out(device, source, fixed_point, align_corners):
    """Thousands of matrices: every output whose coordinates lie within a pixel of q is a candidate of q."""
    generator = torch.Generator().manual_seed(1)
    entries = 9 if source == Source.PROJECTIVE else 6
    block, readers, visited = 1024, 0, 0
    for in_size, size in itertools.product([(5, 7), (2, 300), (64, 9)], [(6, 10), (3, 21)]):
        matrices = _hard_matrices(entries, block, generator)
        matrices, pixels = _aimed(matrices, in_size, size, align_corners, generator)
        o = torch.arange(size[0] * size[1])
        outputs = torch.stack([o % size[1], o // size[1]], -1)[None]
        reads, candidate, _ = bounds_of(
            device, source, matrices, pixels, outputs, in_size, size, align_corners, fixed_point
        )
        assert not (reads & ~candidate).any()
        readers, visited = readers + reads.sum().item(), visited + candidate.sum().item()
    assert readers > 5000, "a test of nothing is no test"
    assert visited < 40 * readers, "bounds so wide are no bounds"


@pairwise
@pytest.mark.parametrize("flatness", [1e-2, 1e-3, 4e-4])
@pytest.mark.parametrize("zoom", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("fixed_point", [True, False], ids=["fixed-point", "floats"])
@LANES_OF_THEIR_OWN
def test_minors_that_cancel(device, fixed_point, zoom, flatness):
    """Volumes flattened along z: along x their inverse is harmless, and made of minors that cancel.

    Each is moved so that an output reads a pixel from the very corner of its box, where the bounds are tight,
    in a row so long that an error of 2^-19 of it is an output or two.
    """
    generator = torch.Generator().manual_seed(0)
    block, in_size, size = 2048, (5, 6, 7), (1, 1, 2**20)

    def rotations(n):
        return torch.linalg.qr(torch.randn(block, n, n, generator=generator, dtype=torch.float64))[0]

    right = torch.eye(3, dtype=torch.float64).expand(block, 3, 3).clone()
    right[:, 1:, 1:] = rotations(2)
    matrix = zoom * rotations(3) * right.new_tensor([1.0, 1.0, flatness]) @ right.mT
    matrix = matrix.float().double()
    o = torch.randint(size[2], (block, 1), generator=generator)
    u = (2 * o - (size[2] - 1)).double() / size[2]
    in_xyz = torch.tensor(in_size[::-1])
    pixels = (torch.rand(block, 3, generator=generator) * in_xyz).long()
    side = (torch.randint(2, (block, 1), generator=generator) * 2 - 1) * torch.linalg.inv(matrix)[:, 0].sign()
    corner = pixels + side * (1 - 2e-6 * torch.rand(block, 3, generator=generator))
    shift = (corner - (in_xyz - 1) / 2) / (in_xyz / 2) - matrix[:, :, 0] * u
    theta = torch.cat([matrix, shift[:, :, None]], -1).float()
    outputs = F.pad(o, (0, 2))[:, None]
    reads, candidate, extent = bounds_of(
        device, Source.AFFINE, theta, pixels, outputs, in_size, size, False, fixed_point
    )
    # floats are off by more than the aim: an axis misses half of the pixels
    assert reads.sum() > block // (5 if fixed_point else 16), "a test of nothing is no test"
    assert not (reads & ~candidate).any()
    if zoom == 100:
        assert extent[:, 0].double().median() < size[2] / 20, "bounds so wide are no bounds"


# ------------------------------------------------------------------------------------------ accuracy
FUZZ = number_of("STN_FUZZ", 0) or (2000 if torch.accelerator.is_available() else 64)


@pytest.mark.parametrize("source", [Source.AFFINE, Source.PROJECTIVE], ids=["affine", "projective"])
def test_accuracy_over_hard_matrices(device, source):
    """float32 against float64 over STN_FUZZ matrices: together no worse than PyTorch's own."""
    generator = torch.Generator().manual_seed(2)
    shares = []
    batch = 8
    for _ in range(FUZZ // batch):
        in_size, size = ([int(torch.randint(1, 14, (), generator=generator)) for _ in range(2)] for _ in "io")
        long = int(torch.randint(8, (), generator=generator))
        if long == 0:
            in_size[1] = int(torch.randint(100, 300, (), generator=generator))
        elif long == 1:
            size[0] = int(torch.randint(100, 300, (), generator=generator))
        matrices = _hard_matrices(9 if source == Source.PROJECTIVE else 6, batch, generator)
        padding = list(Padding)[int(torch.randint(3, (), generator=generator))]
        modes = Interpolation.BILINEAR, padding, bool(torch.randint(2, (), generator=generator))
        grad_output = torch.randn(batch, 1, *size, generator=generator)
        shape = (batch, 1, *in_size)
        result = gather(grad_output.to(device), matrices.to(device), shape, modes, source).cpu()
        exact = scatter(grad_output, matrices, shape, modes, source)
        image = torch.zeros(shape, requires_grad=True)
        grid = plain_grid(source, matrices, size, modes[2])
        F.grid_sample(image, grid, "bilinear", padding.name.lower(), modes[2]).backward(grad_output)
        errors = [(d - exact).flatten(1).norm(dim=1) for d in (result, image.grad)]
        shares.append((errors[0] / (errors[0] + errors[1]))[errors[0] + errors[1] > 0])
    share = torch.cat(shares)
    share = share[share.isfinite()]
    # of two equally good ones each has half of the error; of few matrices the mean is uncertain
    assert share.mean() < 0.5 + 1 / len(share) ** 0.5, f"{share.mean():.3f} of {len(share)}"


def plain_grid(source, matrices, size, align_corners):
    """Coordinates in float32 from PyTorch's operators alone."""
    if source == Source.AFFINE:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of axes of one pixel
            return F.affine_grid(matrices, [len(matrices), 1, *size], align_corners)
    base = F.affine_grid(torch.eye(2, 3)[None], [1, 1, *size], align_corners)
    place = torch.cat([base, torch.ones_like(base[..., :1])], -1).flatten(1, 2) @ matrices.mT
    return (place[..., :2] / place[..., 2:]).nan_to_num(nan=-1e4).clamp(-1e4, 1e4).unflatten(1, size)
