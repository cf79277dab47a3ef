"""What the tests share: cases, the float64 witness, tolerances, and the band around kinks."""

import torch
import torch.nn.functional as F

MODES = ("bilinear", "nearest", "bicubic")
PADDINGS = ("zeros", "border", "reflection")

# How far a result may be from float64, relative to the largest entry: a few roundings of the result's
# dtype, and for the sums (over up to about 10^4 products, in float32 or wider) their square root more.
# float32 coordinates are off by about 1e-7 of the image's width, which times the slope between two random
# pixels is an error of the same order as 1e-5 at the widths of these tests. Half results are rounded once.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 3e-5,
    torch.float16: 1.0e-3,  # 2^-11 by rounding to nearest, twice that for what float32 did before
    torch.bfloat16: 8.0e-3,  # 2^-8, and the interpreter truncates where GPUs round: 2^-7
}


def assert_close(actual, expected, dtype=None, scale=None):
    """``actual`` is within TOLERANCE of the float64 ``expected``, relative to its largest entry."""
    assert actual.shape == expected.shape
    assert actual.dtype == (dtype or actual.dtype)
    if expected.numel() == 0:
        return
    difference = (actual.double().cpu() - expected.double().cpu()).abs().max().item()
    bound = TOLERANCE[actual.dtype] * max(1.0, expected.abs().max().item(), scale or 0.0)
    assert difference <= bound, f"off by {difference:.3g}, allowed {bound:.3g}"


def pixel_coordinates(grid, in_size, align_corners):
    """The float64 pixel coordinates of a normalised grid, x first."""
    sizes = torch.tensor(in_size[::-1], dtype=torch.float64, device=grid.device)
    scale = (sizes - 1) / 2 if align_corners else sizes / 2
    return grid.double() * scale + (sizes - 1) / 2


def away_from_kinks(grid, in_size, mode, align_corners, band=1e-3):
    """Pixels, (N, *size), at which neither a value (nearest) nor a slope jumps within ``band`` pixels.

    Slopes of bilinear samples jump at whole coordinates and nearest values at halves; borders and mirrors
    lie at one or the other. Cubic samples have no kinks. The share of pixels left out must stay small: a
    test of nothing is no test.
    """
    coordinates = pixel_coordinates(grid, in_size, align_corners)
    if mode == "bicubic":
        return torch.ones_like(coordinates[..., 0], dtype=torch.bool)
    distance = (coordinates - coordinates.round()).abs()
    if mode == "nearest":
        distance = 0.5 - distance
    mask = (distance > band).all(-1)
    assert mask.double().mean() > 0.9, "too many pixels lie at kinks"
    return mask


def witness(input, grid, mode, padding, align_corners):
    """``F.grid_sample`` in float64 on the CPU."""
    return F.grid_sample(input.double().cpu(), grid.double().cpu(), mode, padding, align_corners)


def affine_witness(theta, size, align_corners):
    """``F.affine_grid`` in float64 on the CPU, for theta (N, dims, dims + 1)."""
    return F.affine_grid(theta.double().cpu(), [theta.shape[0], 1, *size], align_corners)


def random_theta(batch, dims, dtype, device, zoom=1.0, shift=0.3):
    """Rotations, shears and mirrors of all kinds around the identity."""
    theta = torch.eye(dims, dims + 1, dtype=torch.float64).expand(batch, dims, dims + 1) * zoom
    return (theta + shift * torch.randn(batch, dims, dims + 1, dtype=torch.float64)).to(device, dtype)


def random_grid(batch, size, dtype, device, reach=1.5):
    """Coordinates inside and outside the image."""
    grid = (torch.rand(batch, *size, len(size), dtype=torch.float64) * 2 - 1) * reach
    return grid.to(device, dtype)
