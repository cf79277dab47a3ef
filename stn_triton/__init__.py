"""Spatial Transformer Networks as Triton kernels: fused, differentiable image warps for PyTorch.

Importing the package needs no GPU and starts nothing: Triton is imported at the first launch, and
matplotlib at the first drawing.
"""

from . import versions as versions  # first: what is too old fails in other ways further on

# isort: split
from . import export, nn, transforms, viz
from .functional import (
    affine_grid,
    affine_grid_sample,
    flow_grid_sample,
    grid_sample,
    projective_grid,
    projective_grid_sample,
    tps_grid,
    tps_grid_sample,
)
from .kernels.host.tuning import autotune
from .kornia_patch import patch_kornia
from .patch import patch_torch

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "affine_grid",
    "affine_grid_sample",
    "autotune",
    "export",
    "flow_grid_sample",
    "grid_sample",
    "nn",
    "patch_kornia",
    "patch_torch",
    "projective_grid",
    "projective_grid_sample",
    "tps_grid",
    "tps_grid_sample",
    "transforms",
    "viz",
]
