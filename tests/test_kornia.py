"""Affine and projective warps of a real photograph against kornia's, in float64: values and gradients."""

import pytest
import torch
from common import assert_close, pairwise

import stn_triton as stn

kornia = pytest.importorskip("kornia.geometry.transform")
data = pytest.importorskip("skimage.data")

SIZE = (19, 23)


@pytest.fixture(scope="module")
def photograph():
    """(1, 3, 30, 32), from 0 to 1: every sixteenth pixel of an astronaut, no longer square."""
    image = torch.from_numpy(data.astronaut()[::16, ::16]).permute(2, 0, 1).double() / 255
    return image[None, :, :30]


def pixel_units(size):
    """The matrix from normalised coordinates to pixel coordinates, with aligned corners."""
    (height, width) = size
    return torch.tensor(
        [[(width - 1) / 2, 0, (width - 1) / 2], [0, (height - 1) / 2, (height - 1) / 2], [0, 0, 1]],
        dtype=torch.float64,
    )


@pairwise
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("kind", ["affine", "projective"])
def test_photograph_is_warped_as_by_kornia(either_backend, device, photograph, kind, mode, padding_mode):
    """kornia's matrices take input pixels to output pixels: the inverse of ours, in pixels."""
    matrix = torch.tensor([[0.71, -0.32, 0.11], [0.28, 0.83, -0.13], [0.0, 0.0, 1.0]], dtype=torch.float64)
    if kind == "projective":
        matrix[2, :2] = torch.tensor([0.21, -0.17])

    def by_kornia(image, normalised):
        pixels = pixel_units(photograph.shape[2:]) @ normalised @ pixel_units(SIZE).inverse()
        forward = torch.linalg.inv(pixels)[None]
        options = {"mode": mode, "padding_mode": padding_mode, "align_corners": True}
        if kind == "projective":
            return kornia.warp_perspective(image, forward, SIZE, **options)
        return kornia.warp_affine(image, forward[:, :2], SIZE, **options)

    def by_us(image, normalised):
        if kind == "projective":
            return stn.projective_grid_sample(image, normalised[None], SIZE, mode, padding_mode, True)
        return stn.affine_grid_sample(image, normalised[None, :2], SIZE, mode, padding_mode, True)

    results = []
    for warp, place in ((by_us, device), (by_kornia, "cpu")):
        leaves = [t.detach().clone().to(place).requires_grad_() for t in (photograph, matrix)]
        output = warp(*leaves)
        weight = torch.linspace(0, 1, output.numel(), dtype=torch.float64, device=place).view(output.shape)
        gradients = torch.autograd.grad((output * weight).sum(), leaves, allow_unused=True)
        results.append((output, *gradients))
    (ours, ours_image, ours_matrix), (theirs, theirs_image, theirs_matrix) = results
    assert_close(ours, theirs, scale=1e3)  # kornia inverts and normalises the matrix several times over
    assert_close(ours_image, theirs_image, scale=1e3)
    if mode == "bilinear":
        rows = slice(0, 2) if kind == "affine" else slice(None)
        assert_close(ours_matrix[rows], theirs_matrix[rows], scale=1e4 * theirs_matrix.abs().max().item())
