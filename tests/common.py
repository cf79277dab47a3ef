"""What the tests share: cases, the float64 witness, tolerances, and the band around kinks."""

import importlib
import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from stn_triton.kernels.modes import Interpolation

MODES = ("bilinear", "nearest", "bicubic")
PADDINGS = ("zeros", "border", "reflection")  # PyTorch's
ALL_PADDINGS = (*PADDINGS, "circular")
# Of each axis another padding, x first: what repeats the image, beside what does not.
MIXED = {2: ("reflection", "circular"), 3: ("circular", "zeros", "reflection")}
# Of one place; averages over footprints are made of bilinear samples, and have tests of their own.
TAPPED = [code for code in Interpolation if code != Interpolation.AVERAGED]

# How far a result may be from float64, relative to the largest entry: a few roundings of the result's
# dtype, and for the sums (over up to about 10^4 products, in float32 or wider) their square root more.
# float32 coordinates are off by about 1e-7 of the image's width, which times the slope between two random
# pixels is an error of the same order as 1e-5 at the widths of these tests. Half results are rounded once.
# The same holds on GPUs: a spline's logarithm is not the hardware's, but a polynomial, interpreted too.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 3e-5,
    torch.float16: 1.0e-3,  # 2^-11 by rounding to nearest, twice that for what float32 did before
    torch.bfloat16: 8.0e-3,  # 2^-8, and the interpreter truncates where GPUs round: 2^-7
}


def padding_of(name, dims):
    """The ``padding_mode`` that a parametrisation's "mixed" stands for; any other name is one."""
    return MIXED[dims] if name == "mixed" else name


def number_of(variable, default):
    """What an environment variable says, a whole number; the default where it says nothing."""
    said = os.environ.get(variable, "")
    if not said:
        return default
    if not said.isdecimal():
        raise ValueError(f"{variable} must be a whole number, 0 or more, got {said!r}")
    return int(said)


def import_torchvision(module):
    """torchvision, with its ``module``; a skip where it is not installed, or does not load.

    Most of it is plain Python; but at import it names operators that are compiled. A wheel has them for one
    build of PyTorch; under another one (a CPU build) their names must do.
    """
    try:
        importlib.import_module(f"torchvision.{module}")
    except ImportError:
        pytest.skip("needs torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            pytest.skip(f"torchvision does not load: {error}")
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float threshold) -> Tensor")
        importlib.import_module(f"torchvision.{module}")
    return importlib.import_module("torchvision")


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
    """``F.grid_sample`` in float64 on the CPU, tricubic too, which PyTorch lacks before 2.15."""
    input, grid = input.double().cpu(), grid.double().cpu()
    if mode == "bicubic" and input.dim() == 5:
        return tricubic_witness(input, grid, padding, align_corners)
    return F.grid_sample(input, grid, mode, padding, align_corners)


def tricubic_witness(input, grid, padding, align_corners):
    """Tricubic samples from PyTorch's bicubic ones: the weights of each axis are samples of unit vectors."""
    batch, size = input.shape[0], grid.shape[1:-1]
    points = grid.reshape(batch, 1, -1, 3)
    weights = []
    for axis, n in enumerate(reversed(input.shape[2:])):
        units = torch.eye(n, dtype=input.dtype).view(1, n, 1, n).expand(batch, n, 1, n)
        line = torch.stack([points[..., axis], torch.zeros_like(points[..., axis])], -1)
        weights.append(F.grid_sample(units, line, "bicubic", padding, align_corners).squeeze(2))
    x, y, z = weights
    return torch.einsum("ncdhw,ndp,nhp,nwp->ncp", input, z, y, x).unflatten(2, size)


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


# ------------------------------------------------------------------------------------- guard bands
# Tensors of every layout inside a storage that is longer at both ends and, where steps leave gaps, in
# between. What surrounds an input is NaN, which no sum survives; what surrounds a result is CANARY.
NAN = float("nan")
CANARY = -8192.0  # exact in every dtype


def _layout(name, ndim):
    """(dims from the outermost to the innermost, step of each dim, dims of stride 0, storage offset)."""
    order, steps, expanded, offset = list(range(ndim)), [1] * ndim, (), 64
    if name == "channels_last":  # for a grid: its components outermost
        order.append(order.pop(1))
    elif name == "reversed":
        order.reverse()
    elif name == "swapped":
        order[-2:] = order[:-3:-1]
    elif name == "sliced":
        steps = [1] + [2] * (ndim - 1)
    elif name == "gaps":
        order.append(order.pop(1))
        steps = [2, 3, *[1] * (ndim - 3), 2]
    elif name == "offset":
        offset = 67  # no vector load is aligned there
    elif name.startswith("expanded"):
        expanded = {
            "expanded_batch": (0,),
            "expanded_channels": (1,),
            "expanded_space": tuple(range(2, ndim)),
            "expanded_all": tuple(range(ndim)),
        }[name]
    else:
        assert name == "contiguous", name
    return order, steps, expanded, offset


DENSE_LAYOUTS = ("contiguous", "channels_last", "reversed", "swapped", "sliced", "gaps", "offset")
LAYOUTS = (*DENSE_LAYOUTS, "expanded_batch", "expanded_channels", "expanded_space", "expanded_all")


def place(tensor, layout="contiguous", fill=NAN, device=None):
    """A copy of ``tensor`` in a layout, with ``fill`` around it and in its gaps.

    Along a dimension of stride 0 the first entry stands for all.
    """
    order, steps, expanded, offset = _layout(layout, tensor.dim())
    strides, run = [0] * tensor.dim(), 1
    for dim in reversed(order):
        if dim not in expanded:
            strides[dim] = run * steps[dim]
            run = strides[dim] * max(tensor.shape[dim], 1)
    span = 1 + sum(max(size - 1, 0) * stride for size, stride in zip(tensor.shape, strides))
    storage = torch.full((offset + span + 64,), fill, dtype=tensor.dtype, device=device or tensor.device)
    view = storage.as_strided(tensor.shape, strides, offset)
    first = tuple(slice(0, 1) if dim in expanded else slice(None) for dim in range(tensor.dim()))
    view[first].copy_(tensor[first])
    return view


def assert_band(view, fill=NAN):
    """Nothing was written around a tensor made by ``place``, nor into its gaps."""
    storage = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    outside = torch.ones(storage.shape, dtype=torch.bool, device=view.device)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    band = storage[outside]
    intact = band.isnan() if fill != fill else band == fill
    assert intact.all(), f"{(~intact).sum()} of {band.numel()} entries around a tensor were written"


# ------------------------------------------------------------------------------------ combinations
def pairwise(test):
    """As few combinations of the parametrisations below it as let every two values meet: all are too many.

    Faults that three options have to meet for are the fuzzer's.
    """
    marks = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    axes = [list(_values(mark)) for mark in reversed(marks)]
    names = [name for mark in reversed(marks) for name in _names(mark)]
    sizes = [range(len(axis)) for axis in axes]
    pairs = itertools.combinations(range(len(axes)), 2)
    missing = {(a, i, b, j) for a, b in pairs for i in sizes[a] for j in sizes[b]}

    def met(case):
        return {(a, case[a], b, case[b]) for a, b in itertools.combinations(sorted(case), 2)}

    cases = []
    while missing:
        a, i, b, j = min(missing)
        case = {a: i, b: j}
        for axis in sorted(set(range(len(axes))) - {a, b}, key=lambda axis: -len(axes[axis])):
            # of values that are as good the next in turn, that none is left to the end
            turn = [(k + len(cases)) % len(axes[axis]) for k in sizes[axis]]
            case[axis] = max(turn, key=lambda k: len(met(case | {axis: k}) & missing))
        missing -= met(case)
        cases.append([axes[axis][case[axis]] for axis in range(len(axes))])
    parameters = [
        pytest.param(*itertools.chain(*(values for values, _ in case)), id="-".join(name for _, name in case))
        for case in cases
    ]
    test.pytestmark = [mark for mark in test.pytestmark if mark.name != "parametrize"]
    return pytest.mark.parametrize(names, parameters)(test)


def _names(mark):
    names = mark.args[0]
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)


def _values(mark):
    """The values of a parametrisation, each a tuple, and its name."""
    several, ids = len(_names(mark)) > 1, mark.kwargs.get("ids")
    for i, values in enumerate(mark.args[1]):
        if hasattr(values, "marks"):  # pytest.param
            values, name = values.values, values.id
            yield values, name or "-".join(map(str, values))
            continue
        values = tuple(values) if several else (values,)
        if callable(ids):
            name = "-".join(str(ids(value) or value) for value in values)
        elif ids is not None:
            name = list(ids)[i]
        else:
            name = "-".join(str(value) for value in values)
        yield values, name


class Watch(TorchDispatchMode):
    """Names of the operators seen."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))
