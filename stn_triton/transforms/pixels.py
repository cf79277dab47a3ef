"""Transforms in pixels, as OpenCV, kornia, scikit-image and torchvision take them.

Convention: pixel coordinates are x first, and pixel centres lie at whole numbers: the first pixel of an
axis of n spans -1/2 to 1/2, the last one ends at n - 1/2. The normalised coordinate u is at the pixel ::

    p = (n u + n - 1) / 2          align_corners=False: -1 and 1 are the outer edges
    p = ((n - 1) u + n - 1) / 2    align_corners=True: -1 and 1 are the centres of the outermost pixels

Let S be the matrix from homogeneous normalised coordinates to pixels. A map theta between normalised
coordinates and a map M between pixels, both from output to input, are the same map if
S_input theta = M S_output.

All is computed in float64 and rounded once: offsets of half an image are added and taken away again, which in
float32 would cost as many bits as the image's width has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import distributed
from ..calls import at_least, public
from ..checks import (
    check_bool,
    check_device,
    check_spatial_size,
    check_tensor,
    refuse_numbers,
    refuse_type,
    to_number,
)
from .arguments import (
    check_factor,
    check_leading,
    check_theta,
    check_vector,
    dtypes,
    stacked,
    to_numbers,
    to_tensor,
)
from .matrices import augment, diagonal, homogeneous, invert, turning

__all__ = ["from_pixels", "to_pixels", "rotation", "crop"]


# ------------------------------------------------------------------------------ to and from pixels
@public
def from_pixels(
    matrix: Tensor,
    input_size: Sequence[int],
    size: Sequence[int] | None = None,
    align_corners: bool = False,
    inverse: bool = False,
) -> Tensor:
    """The parameters, for the samplers here, of a map that is given in pixels.

    Convention: x first, pixel centres at whole numbers. ``matrix`` takes pixels of the output to pixels of
    the input; with ``inverse=True`` it takes pixels of the input to pixels of the output. The result is
    S_input^-1 M S_output: M is the matrix from output to input, and S takes normalised u to pixels p, along
    an axis of W by, according to ``align_corners`` ::

        False:  p = ((u + 1) W - 1) / 2
        True:   p = (u + 1) (W - 1) / 2

    Args:
        matrix: affine maps (..., 2, 3), or (..., 3, 4) in 3-D, or homographies (..., 3, 3).
        input_size: (H, W) or (D, H, W) of the image that is read.
        size: that of the output, as the sampler is given it. Default: ``input_size``.
        align_corners: what the sampler is given. Either gives the same samples inside the image.
        inverse: whether ``matrix`` maps from input to output, as ``cv2.warpAffine``,
            ``cv2.warpPerspective`` and kornia's ``warp_affine`` and ``warp_perspective`` take it.
            (``skimage.transform.warp`` does not, nor does OpenCV under ``WARP_INVERSE_MAP``.)

    Returns:
        Of the matrix' shape and dtype. The inverse of a singular map has infinite and NaN entries, as that of
        :func:`invert`.

    An axis of one pixel has but one coordinate under ``align_corners=True``: samplers read that pixel
    wherever the map leads. There u = 2 p. (``align_corners=False`` has no such exception.)

    ``cv2.warpAffine(image, M, (width, height))`` is ::

        theta = from_pixels(M, image.shape[-2:], (height, width), inverse=True)
        affine_grid_sample(image, theta, (height, width))

    and OpenCV's ``BORDER_REPLICATE`` is the padding "border", ``BORDER_REFLECT`` "reflection", and
    ``BORDER_REFLECT_101`` "reflection" under ``align_corners=True``.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> turn = torch.tensor([[[0.0, -1.0, 47.0], [1.0, 0.0, 0.0]]])  # by 90 degrees
        >>> stn.transforms.from_pixels(turn, (48, 48))
        tensor([[[ 0., -1.,  0.],
                 [ 1.,  0.,  0.]]])
    """
    matrix, read, made = _checked("matrix", matrix, input_size, size, align_corners, inverse)
    rows = matrix.shape[-2]
    wide = matrix.double()
    if inverse:
        wide = invert(wide)
    theta = _before(_after(homogeneous(wide), made), [axis.inverse() for axis in read])
    return theta[..., :rows, :].to(matrix.dtype)


@public
def to_pixels(
    theta: Tensor,
    input_size: Sequence[int],
    size: Sequence[int] | None = None,
    align_corners: bool = False,
    inverse: bool = False,
) -> Tensor:
    """The map between pixels that samplers make of parameters: the inverse of :func:`from_pixels`.

    Convention: as there. The result is S_input theta S_output^-1, from pixels of the output to pixels of the
    input, or its inverse where ``inverse`` is True.

    Args:
        theta: affine maps (..., 2, 3), or (..., 3, 4) in 3-D, or homographies (..., 3, 3), from normalised
            output coordinates to normalised input coordinates.
        input_size, size, align_corners: as the sampler is given them; as in :func:`from_pixels`.
        inverse: whether the result is to map from input to output, as OpenCV and kornia take it.

    Returns:
        Of theta's shape and dtype.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> half = stn.transforms.attention(0.5, torch.zeros(2))
        >>> stn.transforms.to_pixels(half, (48, 64))
        tensor([[ 0.5000,  0.0000, 15.7500],
                [ 0.0000,  0.5000, 11.7500]])
    """
    theta, read, made = _checked("theta", theta, input_size, size, align_corners, inverse)
    rows = theta.shape[-2]
    matrix = _before(_after(homogeneous(theta.double()), [axis.inverse() for axis in made]), read)
    matrix = matrix[..., :rows, :]
    if inverse:
        matrix = invert(matrix)
    return matrix.to(theta.dtype)


class _Axis(NamedTuple):
    """What takes the coordinate u along an axis to ``(scale * u + offset) / divisor``.

    In whole numbers: products with them and the identity map are exact in float64.
    """

    scale: int
    offset: int
    divisor: int

    def inverse(self) -> _Axis:
        return _Axis(self.divisor, -self.offset, self.scale)


def _to_pixels(n: int, align_corners: bool) -> _Axis:
    """Along an axis of n pixels, from normalised coordinates to pixels; invertible for any n.

    (Without a question about n, which the compiler may not know.)
    """
    return _Axis(at_least(n - 1 if align_corners else n, 1), n - 1, 2)


def _checked(
    name: str, matrix: Tensor, input_size: Any, size: Any, align_corners: bool, inverse: bool
) -> tuple[Tensor, list[_Axis], list[_Axis]]:
    """The matrix, and the axes of the input and the output, x first."""
    check_theta(name, matrix)
    dims = matrix.shape[-1] - 1
    read = check_spatial_size(input_size, dims, "input_size")
    made = read if size is None else check_spatial_size(size, dims)
    check_bool("align_corners", align_corners)
    check_bool("inverse", inverse)
    axes = [[_to_pixels(n, align_corners) for n in reversed(sizes)] for sizes in (read, made)]
    return matrix, axes[0], axes[1]


def _before(matrix: Tensor, axes: Sequence[_Axis]) -> Tensor:
    """``S @ matrix``, S being the diagonal map of the axes."""
    *rows, last = matrix.unbind(-2)
    rows = [(axis.scale * row + axis.offset * last) / axis.divisor for row, axis in zip(rows, axes)]
    return distributed.stack([*rows, last], -2)


def _after(matrix: Tensor, axes: Sequence[_Axis]) -> Tensor:
    """``matrix @ S``, S being the diagonal map of the axes."""
    *columns, last = matrix.unbind(-1)
    for column, axis in zip(columns, axes):
        last = last + column * axis.offset / axis.divisor
    columns = [column * axis.scale / axis.divisor for column, axis in zip(columns, axes)]
    return distributed.stack([*columns, last], -1)


# ------------------------------------------------------------------------------- making them
@public
def rotation(
    angle: float | Tensor, centre: Tensor | Sequence[float] | None = None, scale: float | Tensor = 1.0
) -> Tensor:
    """Turn and zoom about a point: ``c + R (p - c) / s``, R being ``[[cos a, -sin a], [sin a, cos a]]``.

    Convention: radians, from output to input, of the sense of :func:`similarity`: a positive angle turns
    the window that is read clockwise, and so the picture that comes out counter-clockwise. A scale of 2
    makes the picture twice as large, as in OpenCV (:func:`similarity` takes the inverse). The rotation
    is one of the coordinates in which the centre is given. About a point in pixels it is a matrix in pixels,
    for :func:`from_pixels`; normalised, it is a rotation of the picture only where the image is square.

    Args:
        angle: (...,), or a number.
        centre: (..., 2), x first, or two numbers. Its leading dimensions broadcast with the angle's,
            which has no more of them; only a single centre serves any angle. Default: the origin, which
            in normalised coordinates is the image's middle.
        scale: (...,), or a number, not 0: as the angle.

    Returns:
        (..., 2, 3), of the dtype that the tensors promote to, or of PyTorch's default dtype if there are
        none.

    ``cv2.getRotationMatrix2D(centre, degrees, scale)``, from input to output, is
    ``invert(rotation(math.radians(degrees), centre, scale))``: OpenCV's rotation of an image (..., H, W) is
    ``from_pixels(rotation(math.radians(degrees), centre, scale), (H, W))``.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> image = torch.rand(1, 3, 48, 64)
        >>> turn = stn.transforms.rotation(0.3, (31.5, 23.5))  # about the middle, in pixels
        >>> theta = stn.transforms.from_pixels(turn[None], (48, 64))
        >>> turned = stn.affine_grid_sample(image, theta)
    """
    x: float | Tensor
    y: float | Tensor
    centre = stacked(centre)
    if isinstance(centre, Tensor):
        check_vector("centre", centre, (2,))
        angle = check_factor("angle", angle, "centre", centre)
        scale = check_factor("scale", scale, "centre", centre)
        x, y = centre.double().unbind(-1)
    else:
        x, y = _to_pair(centre)
        angle, scale = _check_number("angle", angle), _check_number("scale", scale)
    if isinstance(angle, Tensor) and isinstance(scale, Tensor):
        check_device("scale", scale, "angle", angle)
        check_leading("scale", scale.shape, "angle", angle.shape)
    given = [value for value in (angle, centre, scale) if isinstance(value, Tensor)]
    result = dtypes(*given)[1] if given else torch.get_default_dtype()
    turned, larger = (to_tensor(v, given[0] if given else None, torch.float64) for v in (angle, scale))
    cos, sin = turned.cos() / larger, turned.sin() / larger
    translation = distributed.stack([x - cos * x + sin * y, y - sin * x - cos * y], -1)
    return augment(turning(cos, sin), translation).to(result)


def _check_number(name: str, value: float | Tensor) -> float | Tensor:
    if isinstance(value, Tensor):
        check_tensor(name, value)
        return value
    number = to_number(value)
    if number is None:
        refuse_type(name, value, "a tensor or a number")
    return number


def _to_pair(centre: object) -> tuple[float, float]:
    """The origin for None."""
    if centre is None:
        return 0.0, 0.0
    numbers = to_numbers(centre)
    if numbers is None or len(numbers) != 2:
        refuse_numbers("centre", centre, "a tensor, two numbers or None")
    return numbers[0], numbers[1]


@public
def crop(boxes: Tensor, input_size: Sequence[int]) -> Tensor:
    """The parameters that read boxes of an image, for samplers under ``align_corners=False``.

    Convention: boxes are in pixel edges, x first, as NumPy's slices are: the first pixel spans 0 to 1, and
    (0, 0, W, H) is the whole image. An output as large as a box of whole pixels is ``image[y0:y1, x0:x1]``,
    of another size that slice resized, with the box' surroundings where samples at its rim read beyond it.

    Args:
        boxes: (..., 4) as x0, y0, x1, y1; or (..., 6) as x0, y0, z0, x1, y1, z1 in 3-D. They may reach
            beyond the image, and be empty; where x1 < x0 the picture is mirrored. (N, T, 4) makes the
            parameters of T crops of each image.
        input_size: (H, W) or (D, H, W) of the image.

    Returns:
        (..., 2, 3) or (..., 3, 4), of the boxes' dtype: ``[[(x1 - x0) / W, 0, (x0 + x1) / W - 1], ...]``.

    ``torchvision.ops.roi_align(image[None], [boxes], size, sampling_ratio=1, aligned=True)`` is ::

        affine_grid_sample(image[None], crop(boxes, image.shape[-2:])[None], size, padding_mode="border")[0]

    for boxes in the image, whose parameters and image get gradients here. Without ``sampling_ratio`` it is
    the same with ``antialias=True`` (16 samples an axis at most), without ``aligned`` with ``boxes + 0.5``.
    (``spatial_scale`` is a factor of the boxes. Samples more than one pixel beyond the outermost centres
    roi_align takes for 0. Its larger ratios average several samples a pixel, as the mean over a crop of so
    many times the size does.)

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> image, boxes = torch.rand(1, 3, 48, 64), torch.tensor([[[8.0, 4.0, 24.0, 20.0]]])
        >>> theta = stn.transforms.crop(boxes, (48, 64))
        >>> crops = stn.affine_grid_sample(image, theta, (16, 16))
        >>> torch.allclose(crops[:, 0], image[:, :, 4:20, 8:24], atol=1e-5)
        True
    """
    five = isinstance(boxes, Tensor) and boxes.dim() > 0 and boxes.shape[-1] == 5
    hint = "without a score, which is last, boxes[..., :4]; without roi_align's image number boxes[..., 1:]"
    dims = check_vector("boxes", boxes, (4, 6), hint if five else "") // 2
    sizes = check_spatial_size(input_size, dims, "input_size")
    edges = boxes.double().unbind(-1)
    axes = list(zip(edges[:dims], edges[dims:], reversed(sizes)))
    linear = diagonal([(high - low) / n for low, high, n in axes])
    translation = distributed.stack([(low + high - n) / n for low, high, n in axes], -1)
    return augment(linear, translation).to(boxes.dtype)
