"""The launchers: what the operators call."""

from .backward import first, second
from .derivatives import sample_jvp
from .grid import grid_backward, grid_forward
from .sample import sample_forward

__all__ = ["first", "grid_backward", "grid_forward", "sample_forward", "sample_jvp", "second"]
