"""The parameters of transforms: made, composed and inverted, in pixels too; and the spline's algebra.

Convention: every transform maps output coordinates to input coordinates, both normalised and x first;
x points right and y down. A point is a column, ``theta @ (x, y, 1)``: affine maps are (..., 2, 3), or
(..., 3, 4) in 3-D, homographies (..., 3, 3).

Everything is differentiable, batched, usable under ``torch.func`` and ``torch.compile``, and never makes
the host wait for the device, but for the one read that :func:`tps_coefficients` describes. Computed in
float32 or wider, and rounded once to the dtype the arguments promote to.
"""

from .matrices import attention, compose, identity, invert, similarity
from .pixels import crop, from_pixels, rotation, to_pixels
from .splines import control_lattice, tps_coefficients, tps_evaluate

__all__ = [
    "identity",
    "attention",
    "similarity",
    "compose",
    "invert",
    "from_pixels",
    "to_pixels",
    "rotation",
    "crop",
    "control_lattice",
    "tps_coefficients",
    "tps_evaluate",
]
