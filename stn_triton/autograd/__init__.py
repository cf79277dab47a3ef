"""The operators, differentiable: an ``autograd.Function`` around each of ``ops``.

Its derivatives, forward and reverse, are the Functions of the others. With L = <g, sample(I, P(theta))>, P
the coordinates of a source,

* the derivative of the samples in the direction (I', theta') is sample_jvp with ``coord_tangent``, the
  derivative of P in the direction theta';
* the derivatives of L by I and theta, in the same direction, are the two results of sample_hvp, the second
  carried from the coordinates to theta, and what P's own curvature adds to it;

and everything else of second order is made of these. Only sample_hvp is differentiated in plain PyTorch.
"""

from .coordinates import grid
from .filling import sample_as
from .samples import sample
from .splines import spline_product

__all__ = ["grid", "sample", "sample_as", "spline_product"]
