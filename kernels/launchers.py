"""The launchers: what the operators call, and ``autotune()`` tunes."""

from . import backward, derivatives, grid, sample
from .tuning import tunable

__all__ = ["first", "grid_backward", "grid_forward", "sample_forward", "sample_jvp", "second"]

first = tunable(backward.first)
second = tunable(backward.second)
sample_forward = tunable(sample.sample_forward)
sample_jvp = tunable(derivatives.sample_jvp)
grid_forward = tunable(grid.grid_forward)
grid_backward = tunable(grid.grid_backward)
