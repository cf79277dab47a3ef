"""Transforms in pixels: by what they do to points, and by the libraries whose matrices are in pixels.

Images are float64 and sampled by PyTorch's operators: what is tested is the matrices.
"""

import functools
import math

import numpy as np
import pytest
import torch
from common import import_torchvision
from scipy import ndimage
from torch.autograd import gradcheck
from torch.nn.functional import avg_pool2d, pad

import stn_triton as stn
from stn_triton.transforms import (
    attention,
    compose,
    crop,
    from_pixels,
    identity,
    invert,
    rotation,
    similarity,
    to_pixels,
)

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")

SIZE, OUT = (60, 72), (50, 66)
CENTRE, DEGREES = (30.3, 25.7), 23.0
EXACT = 1e-11


def rand(*shape, grad=False):
    return (torch.rand(shape, dtype=torch.float64) * 2 - 1).requires_grad_(grad)


@functools.cache
def photograph():
    """(3, *SIZE) from 0 to 1: of scikit-image's astronaut; without it waves, and an edge."""
    try:
        from skimage import data
    except ImportError:
        height, width = SIZE
        y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
        waves = [
            (x / 5 + y / 9).sin(),
            (x / 7 - y / 4).cos(),
            ((x - 20) ** 2 / 300 + (y - 15) ** 2 / 200).sin(),
        ]
        disc = (x - 0.6 * width) ** 2 + (y - 0.4 * height) ** 2 < (0.25 * height) ** 2
        return 0.4 + 0.3 * torch.stack(waves) + 0.3 * disc
    pixels = torch.from_numpy(data.astronaut()[: 4 * SIZE[0], 90 : 90 + 4 * SIZE[1]])
    return avg_pool2d(pixels.permute(2, 0, 1).double() / 255, 4)


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def matrices(shape, *leading, grad=False):
    """Maps in pixels: around the identity, moved by some pixels, with horizons far away."""
    matrix = torch.eye(*shape, dtype=torch.float64) + 0.2 * rand(*leading, *shape)
    factor = torch.ones(shape, dtype=torch.float64)
    factor[: shape[1] - 1, -1] = 5
    if shape == (3, 3):
        factor[2, :2] = 0.01
    return (matrix * factor).requires_grad_(grad)


def apply(matrix, points):
    """Points (P, d) through an affine map or a homography."""
    mapped = torch.cat([points, torch.ones_like(points[:, :1])], 1) @ matrix.mT
    return mapped[:, :2] / mapped[:, 2:] if matrix.shape[-2:] == (3, 3) else mapped


def normalised(pixels, size, align_corners):
    """As ``grid_sample`` un-normalises, backwards: written as its documentation has it."""
    sizes = torch.tensor(size[::-1], dtype=torch.float64)
    return 2 * pixels / (sizes - 1) - 1 if align_corners else (2 * pixels + 1) / sizes - 1


def close(actual, expected, tolerance=EXACT):
    torch.testing.assert_close(
        torch.as_tensor(actual), torch.as_tensor(expected), rtol=tolerance, atol=tolerance
    )


CASES = {
    "affine": ((2, 3), (5, 9), (4, 3)),
    "projective": ((3, 3), (5, 9), (4, 3)),
    "volume": ((3, 4), (5, 9, 7), (4, 3, 6)),
}


# ------------------------------------------------------------------------------------------ formulas
@pytest.mark.parametrize("inverse", (False, True), ids=("out-to-in", "in-to-out"))
@pytest.mark.parametrize("align_corners", (False, True), ids=("edges", "centres"))
@pytest.mark.parametrize("name", list(CASES))
def test_the_same_points(name, align_corners, inverse):
    """Normalised and un-normalised by PyTorch's formulas, points go where the matrix takes them; and back."""
    shape, read, made = CASES[name]
    options = read, made, align_corners, inverse
    matrix, points = matrices(shape, 4), 3 * rand(10, len(read))
    theta = from_pixels(matrix, *options)
    assert theta.shape == matrix.shape
    for one, parameters in zip(invert(matrix) if inverse else matrix, theta):
        expected = normalised(apply(one, points), read, align_corners)
        close(apply(parameters, normalised(points, made, align_corners)), expected)
    close(to_pixels(theta, *options), matrix)
    close(from_pixels(matrix[0], *options), theta[0])  # without a batch
    close(from_pixels(matrix.view(2, 2, *shape), *options).flatten(0, 1), theta)
    close(
        from_pixels(matrix, read, None, align_corners, inverse), from_pixels(matrix, read, read, *options[2:])
    )


@pytest.mark.parametrize("align_corners", (False, True), ids=("edges", "centres"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.float64), ids=str)
def test_exactness(dtype, align_corners):
    """The identity stays the identity to the bit, for sizes of any kind."""
    for size in ((1, 3), (7, 11), (1079, 1921), (99_999, 100_003)):
        for matrix in (torch.eye(2, 3, dtype=dtype), torch.eye(3, dtype=dtype)):
            for inverse in (False, True):
                assert torch.equal(from_pixels(matrix, size, size, align_corners, inverse), matrix)
                assert torch.equal(to_pixels(matrix, size, size, align_corners, inverse), matrix)


def test_rounded_once():
    """Computed in float64, whatever the dtype: half an image is added and taken away again."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        matrix, boxes = matrices((3, 3), 5).to(dtype), (20 * rand(5, 4)).to(dtype)
        angle, centre = rand(5).to(dtype), (1000 * rand(5, 2)).to(dtype)
        for result, wide in (
            (
                from_pixels(matrix, SIZE, OUT, inverse=True),
                from_pixels(matrix.double(), SIZE, OUT, inverse=True),
            ),
            (to_pixels(matrix, SIZE, OUT), to_pixels(matrix.double(), SIZE, OUT)),
            (crop(boxes, SIZE), crop(boxes.double(), SIZE)),
            (rotation(angle, centre), rotation(angle.double(), centre.double())),
        ):
            assert result.dtype == dtype
            assert torch.equal(result, wide.to(dtype))


def test_axes_of_one_pixel():
    """A column of pixels: its centre is all there is under ``align_corners=True``."""
    matrix = torch.tensor([[1.0, 0, 0], [0, 1, 2]], dtype=torch.float64)  # two pixels down
    image = torch.arange(6.0, dtype=torch.float64).view(1, 1, 6, 1)
    for align_corners in (False, True):
        theta = from_pixels(matrix, (6, 1), (4, 1), align_corners)
        close(to_pixels(theta, (6, 1), (4, 1), align_corners), matrix)
        found = stn.affine_grid_sample(image, theta[None], (4, 1), "bilinear", "zeros", align_corners)
        close(found.flatten(), torch.arange(2.0, 6.0, dtype=torch.float64))
    aside = matrix + torch.tensor([[0.0, 0, 5], [0, 0, 0]])
    for align_corners, column in ((False, 0.0), (True, 1.0)):
        theta = from_pixels(aside, (6, 1), (4, 1), align_corners)
        found = stn.affine_grid_sample(image, theta[None], (4, 1), "bilinear", "zeros", align_corners)
        close(found.flatten(), column * torch.arange(2.0, 6.0, dtype=torch.float64))
    for align_corners in (False, True):  # an empty output
        close(
            to_pixels(from_pixels(matrix, (6, 1), (0, 1), align_corners), (6, 1), (0, 1), align_corners),
            matrix,
        )


def test_rotation():
    centre, angle = 20 * rand(5, 2), 3 * rand(5)
    theta, points = rotation(angle, centre), 9 * rand(7, 2)
    for one, c, a in zip(theta, centre, angle):
        around = torch.view_as_complex(points - c) * torch.polar(torch.ones(()).double(), a)
        close(apply(one, points), c + torch.view_as_real(around))
    assert rotation(angle, centre[0]).shape == rotation(0.3, centre).shape == (5, 2, 3)
    close(rotation(angle[0], CENTRE), rotation(angle[0], torch.tensor(CENTRE, dtype=torch.float64)))
    close(rotation(angle), similarity(1.0, angle, torch.zeros(2, dtype=torch.float64)))
    close(rotation(np.float32(0.5), (np.int64(3), 4)), rotation(0.5, (3, 4)))
    assert rotation(0.5).dtype == torch.get_default_dtype()
    close(compose(rotation(0.4, CENTRE), rotation(-0.4, CENTRE)), identity(1)[0], 1e-5)


def test_rotation_with_a_scale():
    """``cv2.getRotationMatrix2D(centre, degrees, scale)`` by its documented formula, from input to output."""
    (x, y), scale, angle = CENTRE, 1.7, math.radians(DEGREES)
    a, b = scale * math.cos(angle), scale * math.sin(angle)
    expected = torch.tensor([[a, b, (1 - a) * x - b * y], [-b, a, b * x + (1 - a) * y]], dtype=torch.float64)
    centre = torch.tensor(CENTRE, dtype=torch.float64)
    close(invert(rotation(angle, centre, scale)), expected, 1e-9)
    factor = torch.tensor([scale, 1.0], dtype=torch.float64)
    close(invert(rotation(angle, CENTRE, factor))[0], expected, 1e-9)
    close(rotation(factor, centre.expand(2, 2), factor)[1], rotation(factor[1], CENTRE))
    middle = rotation(0.0, scale=2.0)
    close(middle, attention(0.5, (0, 0)))  # twice as large: half of the width is read


def test_crops():
    """Boxes of whole pixels are slices, mirrored ones too; and of volumes."""
    image = photograph()[None]
    box = torch.tensor([[[10, 20, 31, 24], [31, 20, 10, 24], [0, 56, 21, 60]]], dtype=torch.float64)
    crops = stn.affine_grid_sample(image, crop(box, SIZE), (4, 21))
    close(crops[0, 0], image[0, :, 20:24, 10:31])
    close(crops[0, 1], image[0, :, 20:24, 10:31].flip(-1))
    close(crops[0, 2], image[0, :, 56:60, :21])
    close(crop(torch.tensor([0.0, 0, 72, 60]), SIZE), identity(1)[0], 0)
    volume, box = rand(1, 2, 5, 6, 7), torch.tensor([[1.0, 2, 3, 7, 4, 5]], dtype=torch.float64)
    close(stn.affine_grid_sample(volume, crop(box, (5, 6, 7)), (2, 2, 6)), volume[..., 3:5, 2:4, 1:7])


# ------------------------------------------------------------------------- derivatives, who calls
FUNCTIONS = {
    "from": (lambda m: from_pixels(m, (5, 9), (4, 3)), lambda grad: matrices((2, 3), 2, grad=grad)),
    "from-inverse": (
        lambda m: from_pixels(m, (5, 9), None, True, True),
        lambda grad: matrices((3, 3), 2, grad=grad),
    ),
    "from-volume": (
        lambda m: from_pixels(m, (5, 9, 7), (4, 3, 6), inverse=True),
        lambda grad: matrices((3, 4), 2, grad=grad),
    ),
    "to": (lambda m: to_pixels(m, (5, 9), (4, 3), True, True), lambda grad: matrices((2, 3), 2, grad=grad)),
    "rotation": (lambda c: rotation(c[..., 0], c), lambda grad: rand(2, 2, grad=grad)),
    "crop": (lambda b: crop(b, (5, 9)), lambda grad: rand(2, 4, grad=grad)),
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_derivatives(name):
    """Of either mode; vmap; tensors without values."""
    function, make = FUNCTIONS[name]
    argument = make(True)
    assert gradcheck(function, (argument,), check_forward_ad=True, check_batched_grad=True)
    expected = function(argument)
    close(torch.vmap(function)(argument), expected)
    meta = function(argument.detach().to("meta"))
    assert (meta.device.type, meta.shape, meta.dtype) == ("meta", expected.shape, expected.dtype)


def test_compiles_whole():
    """With fixed sizes, and at the second call with a dynamic batch."""

    def everything(*arguments):
        return [function(argument) for (function, _), argument in zip(FUNCTIONS.values(), arguments)]

    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    arguments = [make(False) for _, make in FUNCTIONS.values()]
    for batch in (1, 2):
        given = [argument.repeat(batch, *[1] * (argument.dim() - 1)) for argument in arguments]
        for actual, expected in zip(compiled(*given), everything(*given)):
            close(actual, expected)


def test_sizes_of_the_compiler():
    """Of images whose sizes change, and NumPy's numbers."""

    def sample(image, matrix):
        theta = from_pixels(matrix, image.shape[2:], inverse=True)
        return stn.affine_grid_sample(image, theta + 0 * from_pixels(matrix, (np.int64(3), COLUMNS)))

    torch._dynamo.reset()
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((5, 6), (7, 9)):
        arguments = rand(2, 1, *size), matrices((2, 3), 2)
        close(compiled(*arguments), sample(*arguments))


COLUMNS = np.int32(4)


# -------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "name, kind, call",
    (
        ("matrix", TypeError, lambda m: from_pixels(m.numpy(), SIZE)),
        ("matrix", TypeError, lambda m: from_pixels(m.long(), SIZE)),
        ("matrix", ValueError, lambda m: from_pixels(m[:1], SIZE)),
        ("theta", ValueError, lambda m: to_pixels(m[0], SIZE)),
        ("input_size", TypeError, lambda m: from_pixels(m, 5)),
        ("input_size", ValueError, lambda m: from_pixels(m, (1, 3, 60, 72))),
        ("input_size", ValueError, lambda m: from_pixels(m, (-1, 72))),
        ("input_size", ValueError, lambda m: from_pixels(torch.eye(3, 4), SIZE)),
        ("size", TypeError, lambda m: from_pixels(m, SIZE, (5.0, 6))),
        ("size", ValueError, lambda m: to_pixels(m, SIZE, (-5, 6))),
        ("align_corners", TypeError, lambda m: from_pixels(m, SIZE, None, None)),
        ("inverse", TypeError, lambda m: to_pixels(m, SIZE, inverse=1)),
        ("angle", TypeError, lambda m: rotation("right")),
        ("angle", TypeError, lambda m: rotation("right", m[:, 2])),
        ("angle", TypeError, lambda m: rotation(torch.tensor(1))),
        ("angle", ValueError, lambda m: rotation(m, m[:, :2])),
        ("scale", TypeError, lambda m: rotation(1.0, None, "2")),
        ("scale", ValueError, lambda m: rotation(torch.ones(2), None, torch.ones(3))),
        ("centre", TypeError, lambda m: rotation(1.0, 3.0)),
        ("centre", TypeError, lambda m: rotation(1.0, (3.0, None))),
        ("centre", ValueError, lambda m: rotation(1.0, m)),
        ("boxes", TypeError, lambda m: crop([0, 0, 1, 1], SIZE)),
        ("boxes", ValueError, lambda m: crop(m, SIZE)),
        ("input_size", ValueError, lambda m: crop(torch.zeros(2, 6), SIZE)),
    ),
)
def test_errors_name_the_argument(name, kind, call):
    with pytest.raises(kind, match=f"^{name} must be "):
        call(torch.eye(2, 3))


# ----------------------------------------------------------------------------------------- libraries
def channels_last(image):
    return image.permute(1, 2, 0).contiguous().numpy()


def channels_first(image):
    return torch.from_numpy(image).permute(2, 0, 1).double()


def forward_matrix(kind):
    """From input to output, in pixels: a rotation about a point and some enlargement, and a perspective."""
    matrix = torch.eye(3, dtype=torch.float64)
    turned = invert(rotation(math.radians(DEGREES), torch.tensor(CENTRE, dtype=torch.float64)))
    matrix[:2] = compose(attention(1.2, torch.tensor([-9.3, -4.1], dtype=torch.float64)), turned)
    if kind == "projective":
        matrix[2, :2] = torch.tensor([4e-4, -7e-4])
        return matrix
    return matrix[:2]


def warp(image, theta, size, *options):
    """Of one image; by homographies where theta is one."""
    sampler = stn.projective_grid_sample if theta.shape[-2:] == (3, 3) else stn.affine_grid_sample
    return sampler(image[None], theta[None], size, *options)[0]


BORDERS = {  # ours -> OpenCV's, scikit-image's, SciPy's
    ("zeros", False): ("BORDER_CONSTANT", "constant", "grid-constant"),
    ("border", False): ("BORDER_REPLICATE", "edge", "nearest"),
    ("reflection", False): ("BORDER_REFLECT", "symmetric", "reflect"),
    ("reflection", True): ("BORDER_REFLECT_101", "reflect", "mirror"),
}
every_border = pytest.mark.parametrize("border", list(BORDERS), ids=lambda b: f"{b[0]}-{b[1]}")
every_kind = pytest.mark.parametrize("kind", ("affine", "projective"))


@every_border
@pytest.mark.parametrize("mode", ("bilinear", "nearest"))
@pytest.mark.parametrize("dims", (2, 3))
def test_scipy(dims, mode, border):
    """``ndimage.affine_transform``, from output to input, whose axes are the array's: x last."""
    shape, read, made = CASES["affine" if dims == 2 else "volume"]
    image, matrix = rand(*read), matrices(shape)
    theirs = ndimage.affine_transform(
        image.numpy(),
        matrix[:, :-1].flip(0, 1).numpy(),
        matrix[:, -1].flip(0).numpy(),
        made,
        order=int(mode == "bilinear"),
        mode=BORDERS[border][2],
    )
    close(warp(image[None], from_pixels(matrix, read, made, border[1]), made, mode, *border)[0], theirs)


@every_kind
@every_border
@pytest.mark.parametrize("mode", ("bilinear", "nearest", "bicubic"))
def test_opencv(kind, mode, border):
    """``warpAffine`` and ``warpPerspective``, of float32 images.

    OpenCV 5 computes in float32. OpenCV 4 rounds coordinates to 1/32 of a pixel, and takes weights from a
    table: samples are off by up to 1/64 of a pixel along each axis, times the slope; and where one lies so
    near the middle between two pixels, the nearest is another.
    """
    cv2 = pytest.importorskip("cv2")
    image, matrix, (height, width) = photograph(), forward_matrix(kind), OUT
    function = cv2.warpPerspective if kind == "projective" else cv2.warpAffine
    flags = {"bilinear": cv2.INTER_LINEAR, "nearest": cv2.INTER_NEAREST, "bicubic": cv2.INTER_CUBIC}[mode]
    options = {"flags": flags, "borderMode": getattr(cv2, BORDERS[border][0])}
    theirs = function(channels_last(image.float()), matrix.numpy(), (width, height), **options)
    theta = from_pixels(matrix, SIZE, OUT, border[1], inverse=True)
    difference = (warp(image, theta, OUT, mode, *border) - channels_first(theirs)).abs()
    if int(cv2.__version__.partition(".")[0]) >= 5:
        assert difference.max() <= 1e-5
    else:
        assert difference.median() <= 1 / 64
        assert (difference > 2 * (1 / 64)).double().mean() <= 0.03


def test_opencv_rotation():
    cv2 = pytest.importorskip("cv2")
    centre = torch.tensor(CENTRE, dtype=torch.float64)
    for scale in (1, 0.6):
        theirs = torch.from_numpy(cv2.getRotationMatrix2D(CENTRE, DEGREES, scale))
        close(invert(rotation(math.radians(DEGREES), centre, scale)), theirs, 1e-6)


@every_kind
@pytest.mark.parametrize("align_corners", (False, True), ids=("edges", "centres"))
def test_kornia(kind, align_corners):
    """``warp_affine`` and ``warp_perspective``: OpenCV's matrices.

    tests/test_kornia.py has modes and gradients. Before kornia 0.9 ``align_corners=False`` shifted the
    picture: its matrices were those for True.
    """
    kornia = pytest.importorskip("kornia", minversion="0.9")
    image, matrix = photograph(), forward_matrix(kind)
    transform = kornia.geometry.transform
    function = transform.warp_perspective if kind == "projective" else transform.warp_affine
    theirs = function(image[None], matrix[None], OUT, align_corners=align_corners)[0]
    theta = from_pixels(matrix, SIZE, OUT, align_corners, inverse=True)
    close(warp(image, theta, OUT, "bilinear", "zeros", align_corners), theirs)


@every_border
@pytest.mark.parametrize("mode", ("bilinear", "nearest"))
def test_scikit_image(mode, border):
    """``skimage.transform.warp``, from output to input. (Its bicubic kernel is another, A = -1/2.)"""
    skimage = pytest.importorskip("skimage.transform")
    image, matrix = photograph(), torch.linalg.inv(forward_matrix("projective"))
    options = {"order": int(mode == "bilinear"), "mode": BORDERS[border][1], "clip": False}
    theirs = skimage.warp(channels_last(image), matrix.numpy(), output_shape=OUT, **options)
    ours = warp(image, from_pixels(matrix, SIZE, OUT, border[1]), OUT, mode, *border)
    close(ours, channels_first(theirs))


def test_scikit_image_rotation():
    skimage = pytest.importorskip("skimage.transform")
    image, middle = photograph(), ((SIZE[1] - 1) / 2, (SIZE[0] - 1) / 2)
    turn = rotation(torch.tensor(math.radians(DEGREES), dtype=torch.float64), doubles(middle))
    theirs = skimage.rotate(channels_last(image), DEGREES, clip=False)
    close(warp(image, from_pixels(turn, SIZE), SIZE), channels_first(theirs))


@pytest.mark.parametrize("mode", ("bilinear", "nearest"))
def test_torchvision(mode):
    """The one-line equivalents of docs/how/pixels.md: clockwise about the middle, and pixel edges."""
    functional = import_torchvision("transforms.functional").transforms.functional
    image, (height, width) = photograph(), SIZE
    interpolation = functional.InterpolationMode(mode)
    middle = doubles(((width - 1) / 2, (height - 1) / 2))
    turn = compose(rotation(-math.radians(DEGREES), middle, 1.2), attention(doubles(1.0), (-5, 3)))
    for degrees in (0, 15):
        slope = math.tan(math.radians(degrees))
        shear = doubles([[1, slope, -slope * middle[1]], [0, 1, 0]])
        theirs = functional.affine(image, DEGREES, [5, -3], 1.2, [degrees, 0.0], interpolation)
        close(warp(image, from_pixels(compose(shear, turn), SIZE), SIZE, mode), theirs)
    theirs = functional.rotate(image, DEGREES, interpolation)
    close(warp(image, from_pixels(rotation(math.radians(DEGREES), middle), SIZE), SIZE, mode), theirs)

    start, end = [[0, 0], [71, 0], [71, 59], [0, 59]], [[4, 6], [60, 2], [66, 50], [2, 55]]
    matrix = from_square(doubles(start) - 0.5) @ from_square(doubles(end) - 0.5).inverse()
    theirs = functional.perspective(image, start, end, interpolation)
    close(warp(image, from_pixels(matrix, SIZE), SIZE, mode), theirs, 1e-5)  # coefficients of float32


def from_square(corners):
    """(..., 3, 3) from one frame of four points to the ``corners``, (..., 4, 2)."""
    columns = pad(corners, (0, 1), value=1.0).mT
    return columns[..., :3] * torch.linalg.solve(columns[..., :3], columns[..., 3:]).mT


BOXES = torch.tensor([[3.2, 4.1, 40.7, 30.9], [0, 0, 72, 60], [60, 50, 72, 60]], dtype=torch.float64)


def roi_align_witness(image, box, size, ratio):
    """The formula of ``roi_align(aligned=True)``: bins, samples evenly spaced in them, their mean."""
    (x0, y0, x1, y1), (height, width) = box.tolist(), size

    def places(low, high, bins, limit):
        step = (high - low) / (bins * ratio)
        places = low - 0.5 + step * (torch.arange(bins * ratio).double() + 0.5)
        return places.clamp(0, limit - 1)

    y, x = places(y0, y1, height, image.shape[1]), places(x0, x1, width, image.shape[2])
    for axis, where in ((1, y), (2, x)):
        lower = where.floor().long()
        upper = (lower + 1).clamp(max=image.shape[axis] - 1)
        weight = (where - lower).view((-1, 1) if axis == 1 else (-1,))
        image = image.index_select(axis, lower) * (1 - weight) + image.index_select(axis, upper) * weight
    return image.unflatten(2, (width, ratio)).unflatten(1, (height, ratio)).mean((2, 4))


def roi_align(*args, **kwargs):
    """torchvision's. Where its operator does not load it has one in Python, which it would compile."""
    operators = import_torchvision("ops").ops
    with torch.compiler.set_stance("force_eager"):
        return operators.roi_align(*args, **kwargs)


@pytest.mark.parametrize("ratio", (1, 2))
def test_roi_align(ratio):
    """Many boxes of one image. (Of boxes that reach beyond it roi_align reads 0 from a pixel outside on.)"""
    image, size = photograph(), (7, 9)
    finer = tuple(ratio * n for n in size)
    theta = crop(BOXES, SIZE)[None]
    crops = stn.affine_grid_sample(image[None], theta, finer, padding_mode="border")[0]
    ours = avg_pool2d(crops, ratio) if ratio > 1 else crops
    close(ours, torch.stack([roi_align_witness(image, box, size, ratio) for box in BOXES]))
    close(ours, roi_align(image[None], [BOXES], size, sampling_ratio=ratio, aligned=True))


def test_roi_align_by_footprints():
    """Its default number of samples is that of ``antialias=True``; unaligned, its boxes are of centres."""
    image, size = photograph(), (7, 9)
    theta = crop(torch.cat([BOXES, BOXES + 0.5]), SIZE)[None]
    options = {"padding_mode": "border", "antialias": True}
    aligned, centred = stn.affine_grid_sample(image[None], theta, size, **options)[0].chunk(2)
    close(aligned, roi_align(image[None], [BOXES], size, aligned=True))
    close(centred, roi_align(image[None], [BOXES], size))
