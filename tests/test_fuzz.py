"""Random sampling problems against float64, in tensors of every layout with NaNs around them.

By default some 200 cases: the interpreter takes a tenth of a second for each, and on a GPU nearly every one
compiles a kernel of its own. ``STN_FUZZ=3000`` takes minutes.

    STN_FUZZ=N          N cases instead
    STN_FUZZ_SEED=S     the cases of an earlier run; a failure prints its S
    STN_FUZZ_CASE=...   one case alone, as a failure prints it: "Case(dims=2, ...)"
"""

import contextlib
import dataclasses
import math
import os
import random
from typing import NamedTuple

import pytest
import torch
from common import (
    ALL_PADDINGS,
    CANARY,
    DENSE_LAYOUTS,
    LAYOUTS,
    MODES,
    NAN,
    PADDINGS,
    TOLERANCE,
    affine_witness,
    assert_band,
    number_of,
    pixel_coordinates,
    place,
)
from test_antialias import averages
from test_fill import spread
from test_padding import witness_of

import stn_triton as stn
from bench.interpreter import quick_interpreter
from stn_triton.checks import to_padding
from stn_triton.kernels.host import configs
from stn_triton.kernels.modes import Interpolation, Source
from stn_triton.reference import sample_taps

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid"),
]

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}
INTEGERS = {"uint8": torch.uint8, "int16": torch.int16}  # of images
INF = float("inf")
# What a coordinate must not be, with coordinates that are fine among them.
SPECIALS = (NAN, INF, -INF, 1e30, -1e30, 2.0**31, -(2.0**31), 1e-40, -0.0, 0.3, -0.7)
REGIMES = ("inside", "border", "around", "far", "exact", "bad")
BAND = 2e-3  # pixels around a kink at which float32 may be on its other side
REFLECTABLE = 512.0  # pixels beyond which float32 reflects too roughly to be compared with float64


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: its ``repr`` is all that is needed to repeat it."""

    source: str
    dims: int
    mode: str
    padding: str | tuple  # of each axis, x first
    align_corners: bool
    batch: int
    channels: int
    in_size: tuple
    out_size: tuple
    transforms: int  # 0: none
    shared: bool  # one theta for all images
    dtype: str
    params_dtype: str
    input_layout: str
    params_layout: str
    grad_layout: str
    result_layout: str  # of what the launchers are given to fill
    regime: str
    antialias: bool
    fill: float | None
    input_grad: bool
    params_grad: bool
    public: bool  # through the public function, else through the launchers
    tile: tuple
    overflow_checks: bool
    seed: int


# ------------------------------------------------------------------------------------------- drawing
# ``pick`` takes one of a sequence: by chance, or as Hypothesis will have it. What is named twice is taken
# twice as often.
def draw_size(pick, dims):
    """Mostly a few pixels, and one axis that is sometimes much longer."""
    kind = pick(("small", "small", "small", "square", "long"))
    if kind == "square":
        return (pick((1, 2, 3, 4, 5, 8) if dims == 2 else (1, 2, 3, 4)),) * dims
    size = [pick(range(1, 10 if dims == 2 else 6)) for _ in range(dims)]
    if kind == "long":
        size[pick(range(dims))] = pick(range(10, 41))
    return tuple(size)


def draw_tile(pick, rows, columns, channels, outputs):
    """Fields to override, such that few programs are needed: the interpreter's time goes by programs."""
    tile = {
        "rows": pick((1, 2, 4, 8)),
        "columns": pick((1, 2, 4, 8, 16)),
        "channels": pick((1, 2, 4, 8, 16)),
        "unroll": pick((1, 1, 2, 3)),
        "splits": pick((1, 1, 2, 3)),
    }
    if tile["rows"] * tile["columns"] * tile["channels"] == 1:  # which no compiler takes: a lane alone
        tile["columns"] = 2
    while True:
        blocks = -(-channels // (tile["channels"] * tile["unroll"]))
        splits = min(tile["splits"], blocks)
        pixel_tiles = -(-rows // tile["rows"]) * -(-columns // tile["columns"])
        if outputs * pixel_tiles * splits <= max(3, outputs) and blocks * tile["unroll"] <= 3:
            return tuple(tile.items())
        if blocks * tile["unroll"] > 3:
            tile["channels"] *= 2
            tile["unroll"] = 1
        elif pixel_tiles > 1:
            tile["rows" if rows / tile["rows"] > columns / tile["columns"] else "columns"] *= 2
        else:
            tile["splits"] = 1


def draw_padding(pick, dims):
    padding = pick((*ALL_PADDINGS, "tuple"))
    return tuple(pick(ALL_PADDINGS) for _ in range(dims)) if padding == "tuple" else padding


def draw_case(pick, source, dims, modes):
    mode = pick(modes)
    expensive = dims == 3 and mode == "bicubic"
    batch = 1 if expensive else pick((1, 1, 2))
    transforms = pick((0, 0, 0, 1, 2)) if source == "affine" and not expensive else 0
    channels = pick((1, 2, 3, 5, 8, 17))
    in_size, out_size = draw_size(pick, dims), draw_size(pick, dims)
    integer = source == "affine" and pick((False, False, False, True)) and pick(tuple(INTEGERS))
    dtype = integer or pick(("float32", "float32", "float64", "float16", "bfloat16"))
    input_grad, params_grad = pick(((True, True), (True, False), (False, True), (False, False)))
    # gradients of an image of integers are beyond what float16 holds
    params_dtypes = ("float32", "float64", "bfloat16") if integer else (dtype, *DTYPES)
    outputs, tile = batch * max(transforms, 1), ()
    regime = pick(REGIMES)
    padding = pick(ALL_PADDINGS) if regime == "exact" else draw_padding(pick, dims)
    # a gather meets every repetition of a volume's pixel: the interpreter takes half a minute for a long axis
    if source == "affine" and dims == 3 and {"reflection", "circular"} & {*paddings_of(padding, dims)}:
        in_size = tuple(min(n, 6) for n in in_size)
    # huge entries that are all alike cancel, to what their rounding leaves
    layouts = [name for name in LAYOUTS if regime != "bad" or not name.startswith("expanded")]
    # of coordinates that are far or bad test_antialias has cases: up to 256 sub-samples are slow here
    averaged = source == "affine" and dims == 2 and mode == "bilinear" and regime not in ("far", "bad")
    antialias = averaged and pick((False, False, True))
    fillable = source == "affine" and {"zeros", "border"}.issuperset(paddings_of(padding, dims))
    fillable = fillable and regime != "bad" and not antialias
    fill = pick((None, -0.75, 3.0)) if fillable else None
    if not expensive and pick((True, True, False)):
        tile = draw_tile(pick, math.prod(out_size[:-1]), out_size[-1], channels, outputs)
    return Case(
        source=source,
        dims=dims,
        mode=mode,
        padding=padding,
        align_corners=pick((False, True)),
        batch=batch,
        channels=channels,
        in_size=in_size,
        out_size=out_size,
        transforms=transforms,
        shared=source == "affine" and pick((False, True)),
        dtype=dtype,
        params_dtype=dtype if source == "grid" else pick(params_dtypes),
        input_layout=pick(LAYOUTS),
        params_layout=pick(layouts),
        grad_layout=pick(LAYOUTS),
        result_layout=pick(DENSE_LAYOUTS),
        regime=regime,
        antialias=antialias,
        fill=fill,
        input_grad=input_grad and not integer,
        params_grad=params_grad,
        public=antialias or bool(integer) or fill is not None or pick((False, True)),
        tile=tile,
        overflow_checks=pick((False,) * 9 + (True,)),
        seed=pick(range(2**16)),
    )


@st.composite
def cases(draw, source, dims, modes):
    return draw_case(lambda options: draw(st.sampled_from(options)), source, dims, modes)


# --------------------------------------------------------------------------------------- the problem
def paddings_of(padding, dims):
    """Of each axis, x first."""
    return (padding,) * dims if isinstance(padding, str) else padding


def axes_with(case, *paddings):
    """(dims,): whether an axis has one of the paddings."""
    return torch.tensor([padding in paddings for padding in paddings_of(case.padding, case.dims)])


def by_centres(case):
    """Whether samples outside the image are filled, and not taps."""
    return case.fill is not None and bool(axes_with(case, "border").all())


def is_rounded(case):
    """Of integers: samples that need no derivative are integers too."""
    return case.dtype in INTEGERS and not case.params_grad


def sample_dtype(case):
    """The dtype of the samples."""
    return DTYPES.get(case.dtype, INTEGERS[case.dtype] if is_rounded(case) else torch.float32)


def extents(size, align_corners):
    """Pixels per two normalised units, x first."""
    return [n - int(align_corners) for n in reversed(size)]


def draw_grid(case, generator):
    """Normalised coordinates, from pixel coordinates of the regime."""
    shape = (case.batch, *case.out_size)
    axes = []
    for n, extent in zip(reversed(case.in_size), extents(case.in_size, case.align_corners)):
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        if case.regime == "inside":
            pixel = uniform * (n - 1)
        elif case.regime == "border":
            ends = torch.randint(2, shape, generator=generator) * (n - 1)
            pixel = ends + uniform * 4 - 2
        elif case.regime == "far":
            pixel = (uniform - 0.5) * 200
        elif case.regime == "exact":  # pixel centres, edges, and quarters between them
            pixel = torch.randint(-12, 4 * n + 8, shape, generator=generator) / 4
        else:
            pixel = uniform * 2 * n - n / 2
        axes.append((pixel - (n - 1) / 2) * 2 / max(extent, 1))
    grid = torch.stack(axes, -1)
    return spoil(grid, generator, 0.3) if case.regime == "bad" else grid


def spoil(values, generator, share):
    """Some of the entries replaced by special ones."""
    special = torch.tensor(SPECIALS, dtype=values.dtype)
    special = special[torch.randint(len(SPECIALS), values.shape, generator=generator)]
    return torch.where(torch.rand(values.shape, generator=generator) < share, special, values)


def draw_theta(case, generator):
    """Maps of the regime around the identity: shears, mirrors, shifts; halves and whole numbers; bad rows."""
    shape = (1 if case.shared else case.batch, *[case.transforms] * (case.transforms > 0))
    identity = torch.eye(case.dims, case.dims + 1, dtype=torch.float64).expand(*shape, -1, -1)
    noise = torch.randn(identity.shape, generator=generator, dtype=torch.float64)
    if case.regime == "exact":
        return identity + (noise > 1.5) * 0.5 - (noise < -1.5) * 1.0
    zoom = {"inside": 0.6, "border": 1.0, "around": 1.0, "far": 6.0, "bad": 1.0}[case.regime]
    theta = (identity + noise * (0.3 if case.regime != "inside" else 0.05)) * zoom
    if case.regime == "bad":  # one entry of each row at most, that no two of them cancel
        row = torch.randint(case.dims + 1, theta.shape[:-1], generator=generator).unsqueeze(-1)
        chosen = torch.arange(case.dims + 1) == row
        theta = torch.where(chosen, spoil(theta, generator, 0.5), theta)
    return theta


class Tensors(NamedTuple):
    input: torch.Tensor
    params: torch.Tensor
    grad_output: torch.Tensor


def source_grid(case, params):
    """The float64 grid (N, T, *size, dims) of the parameters."""
    if case.source == "grid":
        return params.unsqueeze(1)
    theta = params if params.dim() == 4 else params.unsqueeze(1)
    if case.regime == "bad":
        grid = exact_affine_grid(theta.flatten(0, 1), case)
    else:
        grid = affine_witness(theta.flatten(0, 1), case.out_size, case.align_corners)
    return grid.unflatten(0, theta.shape[:2]).expand(case.batch, *[-1] * (case.dims + 2))


def exact_affine_grid(theta, case):
    """The middle of the output is 0 exactly, also times 1e30: in PyTorch's grids it is 1e-17 or so."""
    axes = [
        (2 * torch.arange(n, dtype=torch.float64) - (n - 1)) / max(extent, 1)
        for n, extent in zip(case.out_size, reversed(extents(case.out_size, case.align_corners)))
    ]
    z_y_x = torch.meshgrid(*axes, indexing="ij")
    base = torch.stack([*reversed(z_y_x), torch.ones(case.out_size, dtype=torch.float64)], -1)
    theta = theta.view(theta.shape[0], *[1] * case.dims, *theta.shape[1:])
    return (theta * base.unsqueeze(-2)).sum(-1)


def is_exact(case, params):
    """Whether every coordinate is computed without rounding, by whatever formula: all is dyadic."""

    def dyadic(n):
        return n & (n - 1) == 0  # 0 too

    units = extents(case.in_size, case.align_corners)
    if case.source == "affine":
        units += [max(extent, 1) for extent in extents(case.out_size, case.align_corners)]
        return all(map(dyadic, units)) and bool(((params * 2).frac() == 0).all())
    return all(map(dyadic, units)) and bool(((params * 2**12).frac() == 0).all())


class Steady(NamedTuple):
    """Output pixels (N, T, *size) at which a float32 computation must agree with float64."""

    value: torch.Tensor
    slope: torch.Tensor


def steady(case, grid, exact):
    pixel = pixel_coordinates(grid, case.in_size, case.align_corners)
    fixed = torch.tensor([e == 0 for e in extents(case.in_size, case.align_corners)])
    whole = (pixel - pixel.round()).abs()
    # the other witness takes neither side's slope at a kink, and a fill has none where no tap reads it
    if exact and case.padding in PADDINGS and case.fill is None:
        whole = torch.full_like(whole, 0.25)
    # where float32 cannot tell, for a whole pixel is lost in it, nothing is inside the image
    lost = ~(pixel.abs() < REFLECTABLE)
    known = ~axes_with(case, "reflection", "circular") | ~lost | fixed | pixel.isnan()
    if by_centres(case):  # values jump at the image's edges
        sizes, edge = torch.tensor(case.in_size[::-1]), 0.0 if case.align_corners else 0.5
        known &= (((pixel - (sizes - 1) / 2).abs() - (sizes - 1) / 2 - edge).abs() > BAND) | fixed
    off_halves = ((0.5 - whole) > BAND) | lost | fixed
    off_wholes = (whole > BAND) | lost | fixed
    value = known & off_halves if case.mode == "nearest" else known
    # where a tap outside has the weight 0, the fill has no part in the slope, not even in a bicubic one
    kinks = case.mode == "bilinear" or (case.mode == "bicubic" and case.fill is not None)
    slope = value & off_wholes if kinks and not case.antialias else value
    # a NaN is read at a place that its slope does not tell
    slope = slope & ~(axes_with(case, "circular") & pixel.isnan())
    return Steady(value.all(-1), slope.all(-1))


def around(case):
    """What surrounds the image."""
    return 77 if case.dtype in INTEGERS else NAN


def make(case, device):
    generator = torch.Generator().manual_seed(case.seed)
    params_dtype = DTYPES[case.params_dtype]
    shape = case.batch, case.channels, *case.in_size
    if case.dtype in INTEGERS:
        dtype, info = INTEGERS[case.dtype], torch.iinfo(INTEGERS[case.dtype])
        input = torch.randint(info.min, info.max + 1, shape, generator=generator)
    else:
        dtype, input = DTYPES[case.dtype], torch.randn(shape, generator=generator, dtype=torch.float64)
    params = draw_grid(case, generator) if case.source == "grid" else draw_theta(case, generator)
    shape = (case.batch, *[case.transforms] * (case.transforms > 0), case.channels, *case.out_size)
    grad_output = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (
        place(input.to(dtype), case.input_layout, around(case), device),
        place(params.to(params_dtype), case.params_layout, device=device),
        grad_output.to(torch.float32 if case.dtype in INTEGERS else dtype),
    )


def solve(case, input, params, grad_output):
    """The output (N, T, C, *size) and the gradients, all in float64."""
    input, params = input.requires_grad_(), params.requires_grad_()
    grid = source_grid(case, params)
    transforms = grid.shape[1]
    images, grids = input.repeat_interleave(transforms, 0), grid.flatten(0, 1)
    if case.regime == "bad":  # PyTorch's own crashes
        modes = Interpolation[case.mode.upper()], to_padding(case.padding, case.dims)
        output = sample_taps(images, grids, *modes, case.align_corners)
    elif case.antialias:
        theta = params if params.dim() == 4 else params.unsqueeze(1)
        matrices = theta.expand(case.batch, *[-1] * 3).flatten(0, 1)
        modes = case.out_size, case.padding, case.align_corners
        output = torch.stack([averages(*each, *modes) for each in zip(images, matrices)])
    else:
        modes = case.mode, case.padding, case.align_corners
        output = witness_of(case.padding)(images, grids, *modes)
        if case.fill is not None:
            output = filled(case, output, grids, witness_of(case.padding), modes)
    output = output.unflatten(0, (case.batch, transforms))
    gradients = torch.autograd.grad(output, (input, params), grad_output, allow_unused=True)
    return output.detach(), *gradients


def fill_of(case):
    """(C,) float64: another number of each channel."""
    scale = 100.0 if case.dtype in INTEGERS else 1.0
    return scale * case.fill * torch.linspace(1, 2, case.channels, dtype=torch.float64)


def filled(case, output, grids, witness, modes):
    """The samples with the fill: of centres that lie outside, or of the weight of the taps outside."""
    fill = spread(fill_of(case)[None], case.dims)
    if not by_centres(case):
        ones = torch.ones(len(grids), 1, *case.in_size, dtype=torch.float64)
        return output + (1 - witness(ones, grids, *modes)) * fill
    sizes, edge = torch.tensor(case.in_size[::-1]), 0.0 if case.align_corners else 0.5
    pixel = pixel_coordinates(grids.detach(), case.in_size, case.align_corners)
    inside = ((pixel - (sizes - 1) / 2).abs() <= (sizes - 1) / 2 + edge).all(-1)
    return torch.where(inside.unsqueeze(1), output, fill)


# ------------------------------------------------------------------------------------------ checking
def compare(name, actual, expected, dtype, scale, mask=None):
    """Within the tolerance of ``dtype``, relative to ``scale``; unmasked entries are finite at least.

    Integers are float32 that is rounded and saturated.
    """
    assert actual.dtype == dtype, f"{name} is {actual.dtype}"
    assert actual.shape == expected.shape, f"{name} is {tuple(actual.shape)}"
    if actual.numel() == 0:
        return
    actual = actual.detach().double().cpu()
    assert actual.isfinite().all(), f"{name} is not finite"
    if not dtype.is_floating_point:
        expected = expected.clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    difference = (actual - expected).abs()
    if mask is not None:
        difference = difference * mask
    bound = TOLERANCE.get(dtype, TOLERANCE[torch.float32]) * max(scale, 1e-3)
    if not dtype.is_floating_point:
        bound += 0.5
    assert difference.max() <= bound, f"{name} is off by {difference.max():.3g}, allowed {bound:.3g}"


def assert_format(name, result, like, case):
    """Dense; channels_last if ``like`` was that, contiguous if it was that."""
    images = result.reshape(-1, *result.shape[-case.dims - 1 :]) if result.dim() > case.dims + 2 else result
    channels_last = torch.channels_last if case.dims == 2 else torch.channels_last_3d
    last, first = images.is_contiguous(memory_format=channels_last), images.is_contiguous()
    assert last or first, f"{name} is not dense: {result.stride()}"
    if like.is_contiguous(memory_format=channels_last) and not like.is_contiguous():
        assert last, f"{name} is not channels_last: {result.stride()}"
    if like.is_contiguous() and not like.is_contiguous(memory_format=channels_last):
        assert first, f"{name} is not contiguous: {result.stride()}"


def run_public(case, tensors):
    input, params = tensors.input.detach(), tensors.params.detach()
    input.requires_grad_(case.input_grad)
    params.requires_grad_(case.params_grad)
    modes = case.mode, case.padding, case.align_corners
    if case.source == "grid":
        output = stn.grid_sample(input, params, *modes)
        assert output.is_contiguous(), f"output: {output.stride()}"
    else:
        output = stn.affine_grid_sample(
            input,
            params,
            case.out_size,
            *modes,
            fill=None if case.fill is None else fill_of(case).to(params.device),
            dtype=sample_dtype(case) if case.dtype in INTEGERS else None,
            antialias=case.antialias,
        )
        assert_format("output", output, input, case)
    wanted = [tensor for tensor in (input, params) if tensor.requires_grad]
    assert output.requires_grad == bool(wanted)
    gradients = iter(torch.autograd.grad(output, wanted, tensors.grad_output) if wanted else ())
    by_input = next(gradients) if case.input_grad else None
    by_params = next(gradients) if case.params_grad else None
    if by_input is not None:
        assert_format("grad_input", by_input, input, case)
    return output, by_input, by_params


def run_launchers(case, tensors):
    """The forward launcher, or the backward one if a gradient is wanted."""
    from stn_triton.kernels.sample import sample_backward, sample_forward

    device = tensors.input.device
    modes = Interpolation[case.mode.upper()], to_padding(case.padding, case.dims), case.align_corners
    source = Source[case.source.upper()]
    if not (case.input_grad or case.params_grad):
        output = torch.full(tensors.grad_output.shape, CANARY, dtype=tensors.input.dtype)
        output = place(output, case.result_layout, CANARY, device)
        sample_forward(tensors.input, tensors.params, None, output, source, *modes)
        assert_band(output, CANARY)
        return output, None, None
    by_input = None
    if case.input_grad:
        zeros = torch.zeros(tensors.input.shape, dtype=computed_in(case))
        by_input = place(zeros, case.result_layout, CANARY, device)
    by_params, _ = sample_backward(
        tensors.grad_output, tensors.input, tensors.params, None, by_input, source, *modes, case.params_grad
    )
    if by_input is not None:
        assert_band(by_input, CANARY)
    return None, by_input, by_params


def computed_in(case):
    return torch.float64 if "float64" in (case.dtype, case.params_dtype) else torch.float32


class Counts:
    """How many output pixels were compared with float64, and how many lay at kinks."""

    pixels = compared = cases = 0


def check(case, device, counts=Counts):
    """One case, whole."""
    input, params, grad_output = make(case, device)
    before = input.clone(), params.clone()
    values = input.detach().double().cpu().contiguous(), params.detach().double().cpu().contiguous()
    safe = steady(case, source_grid(case, values[1]), is_exact(case, values[1]))
    # The gradient of a pixel at a kink is 0, which all must agree on. A stride of 0 gives the same to all.
    keep = safe.slope if case.params_grad else safe.value
    counts.cases += 1
    counts.pixels += keep.numel()
    counts.compared += int(keep.sum())
    keep = keep.unsqueeze(2).expand(-1, -1, case.channels, *[-1] * case.dims).reshape(grad_output.shape)
    if case.grad_layout.startswith("expanded") and not keep.all():
        grad_output = place(grad_output, "contiguous")
        keep = keep.all()
    grad_output = place(torch.where(keep, grad_output, 0.0), case.grad_layout, device=device)
    g = grad_output.double().cpu().contiguous()
    transforms = max(case.transforms, 1)
    split = (case.batch, transforms, case.channels, *case.out_size)
    output, by_input, by_params = solve(case, *values, g.view(split))
    if by_params is None or case.mode == "nearest":
        by_params = torch.zeros_like(values[1])

    tensors = Tensors(input, params, grad_output)
    with quick_interpreter(case.overflow_checks), configs.override(**dict(case.tile)):
        results = run_public(case, tensors) if case.public else run_launchers(case, tensors)

    for tensor, copy, fill in zip(tensors, (*before, None), (around(case), NAN, NAN)):
        assert_band(tensor, fill)
        assert copy is None or torch.equal(tensor.nan_to_num(7), copy.nan_to_num(7)), (
            "an argument was changed"
        )
    dtype, params_dtype = sample_dtype(case), DTYPES[case.params_dtype]
    largest = values[0].abs().max().item()
    if case.fill is not None:
        largest = max(largest, fill_of(case).abs().max().item())
    if results[0] is not None:
        scale = max(1.0, largest, output.abs().max().item())
        mask = safe.value.unsqueeze(2).expand(split).reshape(grad_output.shape)
        compare("output", results[0], output.view(grad_output.shape), dtype, scale, mask)
    if results[1] is not None:
        summed = dtype if case.public else computed_in(case)
        compare("grad_input", results[1], by_input, summed, max(1.0, by_input.abs().max().item()))
    if case.params_grad and case.antialias:  # sub-samples lie at kinks of their own
        assert results[2].isfinite().all()
        assert (results[2].shape, results[2].dtype) == (params.shape, params_dtype)
    elif case.params_grad:
        # a sum of terms that may cancel: its rounding errors are those of its terms
        pixels_per_unit = max([1.0, *(extent / 2 for extent in extents(case.in_size, case.align_corners))])
        terms = g.norm().item() * largest * pixels_per_unit
        compare("grad_params", results[2], by_params, params_dtype, max(by_params.abs().max().item(), terms))
    else:
        assert results[2] is None


# --------------------------------------------------------------------------------------------- tests
LINEAR_MODES = ("bilinear", "bilinear", "nearest")
KINDS = {  # name: (source, dims, modes, share of the cases)
    "grid-2d": ("grid", 2, (*LINEAR_MODES, *MODES), 0.4),
    "affine-2d": ("affine", 2, (*LINEAR_MODES, *MODES), 0.4),
    "grid-3d": ("grid", 3, LINEAR_MODES, 0.1),
    "affine-3d": ("affine", 3, LINEAR_MODES, 0.1),
    "grid-tricubic": ("grid", 3, ("bicubic",), 0.006),
    "affine-tricubic": ("affine", 3, ("bicubic",), 0.006),
}


def budget():
    return number_of("STN_FUZZ", 200)


@pytest.fixture(scope="module")
def base_seed():
    return number_of("STN_FUZZ_SEED", random.SystemRandom().randrange(2**32))


@contextlib.contextmanager
def told(*lines):
    """What repeats a run, on a failure."""
    try:
        yield
    except BaseException as error:
        for line in lines:
            print(f"To repeat it: {line}")
            if hasattr(error, "add_note"):
                error.add_note(f"To repeat it: {line}")
        raise


def search(strategy, examine, examples, seed):
    """Hypothesis's search for a failure, which it shrinks; the case is printed with it."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=max(examples, 1),
        deadline=None,
        database=None,
        print_blob=True,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def property_holds(case):
        examine(case)

    property_holds()


@pytest.mark.skipif(bool(os.environ.get("STN_FUZZ_CASE")), reason="STN_FUZZ_CASE names one case")
@pytest.mark.parametrize("kind", KINDS)
def test_samplers(device, base_seed, kind):
    """Values, both gradients, dtypes, shapes and formats are right, and no NaN and no canary is met."""
    source, dims, modes, share = KINDS[kind]

    class counts(Counts):
        pass

    examples = math.ceil(budget() * share)
    with told(f"STN_FUZZ={budget()} STN_FUZZ_SEED={base_seed}"):
        # by chance, which is even-handed; then as Hypothesis finds it worth while, which dwells on corners
        generator = random.Random(f"{base_seed} {kind}")
        for _ in range(math.ceil(examples * 0.7)):
            case = draw_case(generator.choice, source, dims, modes)
            with told(f'STN_FUZZ_CASE="{case}"'):
                check(case, device, counts)
        search(
            cases(source, dims, modes),
            lambda case: check(case, device, counts),
            math.ceil(examples * 0.3),
            base_seed,
        )
    assert counts.cases >= examples
    if examples >= 30:  # one of three cases may well lie on the pixels
        assert counts.compared > 0.7 * counts.pixels, "too many pixels lie at kinks: a test of nothing"


def case_of(said):
    """What STN_FUZZ_CASE says."""
    try:
        case = eval(said, {"Case": Case})
    except Exception as error:
        case = error
    if not isinstance(case, Case):
        raise ValueError(
            f"STN_FUZZ_CASE must be a case as a failure prints it, Case(...), got {said!r}: {case!r}"
        )
    return case


@pytest.mark.parametrize("said", ["nonsense", "3", "Case(", "Case(dims=2)"])
def test_nonsense_for_a_case_names_its_variable(said):
    with pytest.raises(ValueError, match=r"STN_FUZZ_CASE must be a case .*, got"):
        case_of(said)


@pytest.mark.skipif(not os.environ.get("STN_FUZZ_CASE"), reason="for STN_FUZZ_CASE='Case(...)'")
def test_one_case(device):
    """The case of STN_FUZZ_CASE."""
    check(case_of(os.environ["STN_FUZZ_CASE"]), device)
