"""What a kernel is compiled for (``Spec``), and the tuples that its run-time values travel in.

Every kernel has one constexpr argument, its ``Spec``. All branches on it are resolved by the compiler, and
device functions hand it on whole. Run-time values that belong together are named tuples. Tuples over axes are
x first: (x, y) or (x, y, z). Tuples over a group hold one entry for each output of the group.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import triton
import triton.language as tl


def constant(value: Any) -> Any:
    """A number that device code may use: a constexpr to the compiler, itself to the interpreter.

    The interpreter wraps nothing else, and Triton 3.7's and 3.8's refuse a constexpr beside a block.
    """
    return value if triton.knobs.runtime.interpret else tl.constexpr(value)


@triton.constexpr_function
def plain(value: Any) -> Any:
    """What ``constant`` was given: Triton unwraps the arguments of such functions, but not their fields."""
    return value


@dataclass(frozen=True)
class Spec:
    """One specialisation of the kernels. A kernel reads the fields that concern it; the others keep defaults.

    Every field is a ``constant``.
    """

    # the mathematics
    source: int  # a code of modes.Source
    interpolation: int  # a code of modes.Interpolation
    padding: tuple[int, ...]  # codes of modes.Padding, one for each axis, x first
    align_corners: int
    dims: int
    compute: tl.dtype  # of weights and sums, and of coordinates that are not whole numbers
    index: tl.dtype  # of offsets within one image
    antialias: bool = False  # samples are averages over the footprints of output pixels
    fixed_point: bool = False  # affine coordinates, and a flow's identity, are fixed-point numbers
    # the tile: rows x columns pixels, ``unroll`` blocks of ``channels`` at a time, the same of ``group``
    # outputs
    rows: int = 1
    columns: int = 1
    channels: int = 1
    unroll: int = 1
    group: int = 1
    even_channels: bool = False  # channels fill their blocks
    one_block: bool = False  # and there is one block of them
    patches: bool = False  # lanes take patches of pixels where the map turns (``device.programs``)
    # memory: the offset of every pixel is a multiple of so many elements
    vector_input: int = 1
    vector_output: int = 1
    vector_grad: int = 1
    vector_tangent: int = 1
    # forward: whether something is taken in place of what lies outside (``device.filling``)
    fill: bool = False
    # what is wanted
    input_grad: bool = False
    source_grad: bool = False
    control_grad: bool = False
    coord_grad: bool = False
    # which parts of a direction there are (derivatives, sort): tangents of the image and of the coordinates
    tangent: bool = False
    coord_tangent: bool = False
    # gather: blocks of outputs, and the most outputs that a lane visits on its own
    block_rows: int = 1
    block_columns: int = 1
    most_candidates: int = 1
    one_transform: bool = False  # of each image
    # sort: axes along which an image's output pixels lie in memory
    pixel_axes: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, constant(getattr(self, field.name)))

    @property
    def axes(self) -> Any:
        """0 for x, 1 for y and in 3-D 2 for z: comprehensions over them make the tuples over axes."""
        axes = [constant(axis) for axis in range(plain(self.dims))]
        return axes if triton.knobs.runtime.interpret else tl.tuple(axes)


class Strides(NamedTuple):
    """Strides of (N, [T,] C, ...): by image, transform and channel, and by pixel in x, y[, z]."""

    n: Any
    t: Any
    c: Any
    pixel: Any


class Image(NamedTuple):
    """A tensor of images."""

    pointer: Any
    strides: Strides


class Images(NamedTuple):
    """The tensors that a kernel of the sampler works on, by the names that a ``Spec`` has for them.

    output: the samples, or their gradient. grad: d input. tangent, coord: the tangents of the input and of
    the coordinates. fill: (N, C).
    """

    input: Any = None
    output: Any = None
    grad: Any = None
    tangent: Any = None
    coord: Any = None
    fill: Any = None


class Plane(NamedTuple):
    """A block of channels of one image.

    pointer: to the first pixel of each, [1, channels]. strides: by pixel. exists: which channels do.
    """

    pointer: Any
    strides: Any
    exists: Any


class Params(NamedTuple):
    """A source's parameters: their pointer and five strides; a spline's control points and their number.

    Strides of matrices and coefficients: by image, transform, row and column. Of a grid, a flow and a tangent
    of coordinates: by image, component, x, y and z.
    """

    pointer: Any
    strides: Any
    control: Any
    num_controls: Any


class Sizes(NamedTuple):
    """Pixels of the input and of the output along each axis; outputs in all and for each image; channels.

    samples: where ``output`` is a grid of sub-samples, how many of them an output pixel has along each axis
    (``device.footprints``); else 1.
    """

    input: Any
    output: Any
    batch: Any
    transforms: Any
    channels: Any
    samples: Any


class Tiling(NamedTuple):
    """How programs share the work.

    A program does ``steps`` blocks of pixels, one below the other, of a tile; there are ``columns`` x
    ``rows`` tiles. ``splits`` programs share the channels of a tile, and each does ``split_blocks`` blocks of
    them.
    """

    columns: Any
    rows: Any
    splits: Any
    split_blocks: Any
    steps: Any


class Block(NamedTuple):
    """A block of output pixels: the program's step, the pixels, [pixels, 1], and whether they exist."""

    step: Any
    out: Any
    mask: Any


class Work(NamedTuple):
    """What one program does.

    params: what coordinates are made of. b, outputs: the group's first output, and (image, transform) of each
    output.
    map: of a matrix, how it takes pixels to pixels (``device.sources.map_of``).
    column, row, steps: the first block of pixels, and how many there are.
    numbers: which pixel of a block each lane has, counted row by row.
    starts: of a fixed-point map, the coordinates of the first block (``device.affine.starts_of``).
    blocks: the first block of channels, and the one after the last.
    interior: whether all of it is known to be read inside the image.
    split, program, programs: where the program's share of a gradient goes.
    """

    params: Params
    b: Any
    outputs: Any
    map: Any
    column: Any
    row: Any
    steps: Any
    numbers: Any
    starts: Any
    blocks: Any
    interior: Any
    split: Any
    program: Any
    programs: Any


class Place(NamedTuple):
    """A pixel coordinate along one axis, index + fraction.

    index: int32, within [-2^30, 2^30] for pixels of the output. fraction: in [0, 1], in the compute type; 1
    only by rounding. Device code takes its parts by number: Triton 3.6 drops the names where a tuple of
    places grows.
    """

    index: Any
    fraction: Any


class Taps(NamedTuple):
    """What a place reads along one axis, one of each for a tap: pixel, whether it may be read, weight."""

    index: Any
    inside: Any
    weight: Any


# --------------------------------------------------------------------------------------- specialisation
# Sizes, strides and counts never make a new kernel. Triton compiles for the alignment of these pointers, and
# for whether these strides are 1, which decides which addresses are neighbours.
IMAGES = "input", "output", "tangent", "grad_output", "grad_input"
ALIGNED = *IMAGES, "grid", "matrix", "keys", "order", "starts"
NEIGHBOURS = "input_c", "output_c", "grad_c", "tangent_c", "input_x", "grad_x", "tangent_x"


def kernel(*neighbours: str) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit`` of a kernel: compiled anew for ``ALIGNED``, ``NEIGHBOURS`` and its ``Spec`` alone.

    neighbours: further strides of which it matters whether they are 1.
    """
    strides = {f"stride_{name}" for name in NEIGHBOURS + neighbours}
    told = strides | {f"{name}_ptr" for name in ALIGNED} | {"SPEC"}

    def compiled(function: Callable[..., Any]) -> Any:
        names = list(inspect.signature(function).parameters)
        return triton.jit(
            do_not_specialize=[name for name in names if name not in told],
            do_not_specialize_on_alignment=[name for name in names if name in strides],
        )(function)

    return compiled
