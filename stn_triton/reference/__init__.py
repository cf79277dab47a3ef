"""The operators in plain PyTorch: what runs where there is no Triton device, and the tests' oracle.

The values, the derivatives and the treatment of bad coordinates are those of the kernels. ATen's own grid
samplers do the work wherever they give those values; what they lack (second derivatives; tricubic before
2.15) or do otherwise is done tap by tap. Everything that is done tap by tap autograd can differentiate
again, which is how third derivatives are made.

Shapes: input (N, C, *in_size); grid (N, T, *size, dims), normalised, x first; size is ([D,] H, W).
"""

from ..kernels.host.dtypes import compute_dtype, sample_dtype
from .filling import fill_centres, fill_taps, fills_centres, rounded
from .operators import sample, sample_as, sample_averages, sample_backward, sample_hvp, sample_jvp
from .sources import coordinates, coordinates_backward, projective_jvp, spline_control_jvp
from .taps import sample_taps

__all__ = [
    "compute_dtype",
    "coordinates",
    "coordinates_backward",
    "fill_centres",
    "fill_taps",
    "fills_centres",
    "projective_jvp",
    "rounded",
    "sample",
    "sample_as",
    "sample_averages",
    "sample_backward",
    "sample_dtype",
    "sample_hvp",
    "sample_jvp",
    "sample_taps",
    "spline_control_jvp",
]
