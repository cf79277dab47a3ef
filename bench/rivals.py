"""What runs on a case: ours, every rival's way to the same result, and the float64 that judges them all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import stn_triton as stn

from .cases import Case, Inputs, bytes_moved, lattice

Sampler = Callable[[Tensor, Tensor], Tensor]  # of the image and the parameters

# ||result - exact|| / ||exact||. Wrong code is off by the order of 1, so that these need not be tight (the
# tests' are): a rounding of the type, for float32 also coordinates that are off by 2^-24 of 4000 pixels.
LIMIT = {torch.float64: 1e-10, torch.float32: 2e-3, torch.float16: 3e-3, torch.bfloat16: 1e-2}
LIMIT |= {torch.uint8: 5e-3, torch.int16: 2e-3}
# Where a coordinate is rounded across a kink, a nearest sample is another pixel and a slope another cell's.
# At 2000 pixels these are some of 10^4 outputs, which of noise makes the root of their share: a few percent.
KINK_LIMIT = 0.1


class Missing(Exception):
    """A rival that is not installed, or has no way to do this case; the message says which."""


class Mismatch(Exception):
    """A result that is not the reference's: it is not timed."""


@dataclasses.dataclass(frozen=True)
class Rival:
    """``build`` makes the sampler of a case, for inputs that are there already.

    ``eager``: counts as PyTorch's eager way. ``judged``: whether its results are held against the limits;
    otherwise they have only to be finite, and the error is reported. ``instead``: the case that it runs.
    """

    name: str
    build: Callable[[Case, Inputs], Sampler]
    eager: bool = False
    judged: bool = True
    instead: Callable[[Case], Case] = lambda case: case


# ------------------------------------------------------------------------------------- grids, by PyTorch
def base_grid(case: Case, like: Tensor) -> Tensor:
    """(*size, dims): the identity."""
    axes = []
    for n in case.size:
        edge = 1.0 if case.align_corners else 1 - 1 / n
        axes.append(torch.linspace(-edge, edge, n, dtype=like.dtype, device=like.device))
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)


def spline_kernel(a: Tensor, b: Tensor) -> Tensor:
    """r^2 log r^2 between (P, 2) and (K, 2)."""
    squared = (a[:, None] - b[None]).square().sum(-1)
    return squared * squared.clamp(min=1e-300 if a.dtype == torch.float64 else 1e-38).log()


def spline_rows(points: Tensor) -> Tensor:
    """(P, K + 3): what coefficients are multiplied with at a point, the kernel's, then x, y and 1."""
    return torch.cat([spline_kernel(points, lattice()), points, torch.ones_like(points[:, :1])], 1)


@functools.cache
def spline_solution() -> Tensor:
    """(K + 3, K) float64: coefficients are this times the points at which the lattice is read."""
    controls, count = lattice(), len(lattice())
    system = torch.zeros(count + 3, count + 3, dtype=torch.float64)
    system[:count] = spline_rows(controls)
    system[count:, :count] = system[:count, count:].T
    return torch.linalg.inv(system)[:, :count]


def spline_matrix(case: Case, like: Tensor) -> Tensor:
    """(P, K): the grid is this times the points. Constant, as implementations in PyTorch keep it."""
    base = base_grid(case, lattice()).view(-1, 2)
    return (spline_rows(base) @ spline_solution()).to(like)


def grid_maker(case: Case, like: Tensor) -> Callable[[Tensor], Tensor]:
    """From parameters to (N, *size, dims) in the parameters' dtype, constants of which are made here."""
    unlike = (
        case.mode != "bilinear" or case.align_corners or not {"circular", "border"}.issuperset(paddings(case))
    )
    if "circular" in paddings(case) and unlike:
        raise Missing("circular padding beside border padding is made of PyTorch's for bilinear samples")
    if case.source == "grid":
        return lambda grid: grid
    if case.source == "affine":
        finer = [n * samples for n, samples in zip(case.size, case.samples, strict=True)]
        shape = [(1 if case.shared else case.shape[0]) * max(case.boxes, 1), 1, *finer]
        grid_of = functools.partial(F.affine_grid, size=shape, align_corners=case.align_corners)
        return (lambda theta: grid_of(theta.flatten(0, 1))) if case.boxes else grid_of
    if case.antialias:
        size = tuple(n * samples for n, samples in zip(case.size, case.samples, strict=True))
        case = dataclasses.replace(case, size=size, antialias=False)
    base = base_grid(case, like)
    if case.source == "flow":
        sizes = torch.tensor(case.shape[:1:-1], dtype=like.dtype, device=like.device)
        scale = 2 / (sizes - int(case.align_corners))
        return lambda flow: base + flow.movedim(1, -1) * scale
    if case.source == "tps":
        matrix = spline_matrix(case, like)
        return lambda points: (matrix @ points).unflatten(1, case.size)
    ones = torch.cat([base, torch.ones_like(base[..., :1])], -1).view(-1, 3)

    def projective(homography: Tensor) -> Tensor:
        mapped = ones @ homography.mT
        return (mapped[..., :2] / mapped[..., 2:]).unflatten(1, case.size)

    return projective


def modes(case: Case) -> dict[str, Any]:
    return {"mode": case.mode, "padding_mode": case.padding, "align_corners": case.align_corners}


def sample(case: Case, image: Tensor, grid: Tensor, samples: tuple[int, ...] = ()) -> Tensor:
    """By ``F.grid_sample``, as torchvision does it: integers by way of floats, and a fill by way of one more
    channel, which tells how much of a sample was inside. ``samples``: the case's, where they are known."""
    if case.shared:
        grid = grid.expand(image.shape[0], *grid.shape[1:])
    wide = image if image.is_floating_point() else image.to(grid.dtype)
    if case.boxes:  # PyTorch has one output of an image: each gets a view of it, in a batch of copies
        wide = wide.repeat_interleave(case.boxes, 0)
    if case.fill is None and "circular" in paddings(case):
        output = F.grid_sample(*unrolled(case, wide, grid), **modes(case) | {"padding_mode": "border"})
    elif case.fill is None:
        output = F.grid_sample(wide, grid, **modes(case))
    else:
        output = F.grid_sample(torch.cat([wide, torch.ones_like(wide[:, :1])], 1), grid, **modes(case))
        output = output[:, :-1] + (1 - output[:, -1:]) * case.fill
    if case.antialias:  # PyTorch has nothing of the kind: the grid is the finer one of ``grid_maker``
        output = (F.avg_pool2d if case.dims == 2 else F.avg_pool3d)(output, samples or case.samples)
    if case.boxes:
        output = output.unflatten(0, (-1, case.boxes))
    return output if image.is_floating_point() else output.round().to(image.dtype)


def paddings(case: Case) -> tuple[str, ...]:
    """Of each axis, x first."""
    return (case.padding,) * case.dims if isinstance(case.padding, str) else case.padding


def unrolled(case: Case, image: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Circular padding in PyTorch's terms: coordinates are brought into the image, which gets a pixel more at
    either end of such an axis. The other axes have border padding. Bilinear, edges at -1 and 1."""
    ends: list[int] = []
    axes: list[Tensor] = []
    for size, padding, x in zip(image.shape[:1:-1], paddings(case), grid.unbind(-1), strict=True):
        wraps = padding == "circular"
        ends += [int(wraps)] * 2
        pixel = ((x + 1) * size - 1) / 2
        axes.append((2 * pixel.remainder(size) + 3) / (size + 2) - 1 if wraps else x)
    return F.pad(image, ends, mode="circular"), torch.stack(axes, -1)


# ------------------------------------------------------------------------------------------- the samplers
def ours(case: Case, inputs: Inputs) -> Sampler:
    if case.source == "grid":
        return functools.partial(stn.grid_sample, **modes(case))
    options: dict[str, Any] = modes(case)
    if case.fill is not None:
        options["fill"] = case.fill
    if case.source != "flow":
        options["size"] = case.size
    if case.antialias:
        options["antialias"] = True
    return functools.partial(getattr(stn, f"{case.source}_grid_sample"), **options)


def as_affine(case: Case) -> Case:
    """An affine map of the same image: what a spline's time is held against."""
    if case.source != "tps":
        raise Missing("for splines")
    return dataclasses.replace(case, source="affine")


def _same_dtypes(case: Case) -> bool:
    """Whether PyTorch takes image and grid as they are."""
    return case.dtype not in (torch.float16, torch.bfloat16) or case.source == "grid"


def eager(case: Case, inputs: Inputs, cudnn: bool = False) -> Sampler:
    """PyTorch's own kernels, or cuDNN's where PyTorch hands over to it."""
    if not _same_dtypes(case):
        raise Missing("image and grid differ in dtype: see autocast and half grid")
    if cudnn:
        half = case.dtype == torch.bfloat16
        fits = case.mode == "bilinear" and case.padding == "zeros" and case.align_corners
        fits = fits and not case.boxes
        if inputs.image.device.type != "cuda" or not fits or case.dims != 2 or half or case.shape[1] > 1024:
            raise Missing("cuDNN samples 4-D, bilinear, zeros, align_corners=True, no bfloat16, on CUDA")
    make = grid_maker(case, inputs.params)

    def sampler(image: Tensor, params: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=cudnn):
            return sample(case, image, make(params))

    return sampler


def autocast(case: Case, inputs: Inputs) -> Sampler:
    """A half image under autocast: PyTorch samples it in float32, to a float32 output.

    The grid is made outside, where autocast does not round it to half.
    """
    if _same_dtypes(case):
        raise Missing("for half images")
    make = grid_maker(case, inputs.params)
    device = inputs.image.device.type

    def sampler(image: Tensor, params: Tensor) -> Tensor:
        if device == "cpu":  # whose autocast leaves grid_sample alone
            return sample(case, image.float(), make(params))
        grid = make(params)
        with torch.autocast(device, case.dtype), torch.backends.cudnn.flags(enabled=False):
            return sample(case, image, grid)

    return sampler


def half_grid(case: Case, inputs: Inputs) -> Sampler:
    """A half image and its grid rounded to half: less memory than autocast, and wrong by pixels."""
    if _same_dtypes(case):
        raise Missing("for half images")
    make = grid_maker(case, inputs.params)
    return lambda image, params: sample(case, image, make(params).to(image.dtype))


def compiled(case: Case, inputs: Inputs) -> Sampler:
    """torch.compile of grid and sampling; half images are widened inside, which the compiler fuses."""
    make = grid_maker(case, inputs.params)
    half, samples = not _same_dtypes(case), case.samples  # made of tensors, which cannot be traced

    def function(image: Tensor, params: Tensor) -> Tensor:
        return sample(case, image.float() if half else image, make(params), samples).to(image.dtype)

    from torch._functorch import config

    # A backward pass that is timed alone runs many times on the same buffers: they cannot be given away.
    donated = case.work in ("forward", "step")
    torch._dynamo.reset()  # one case's graphs are no limit for the next
    fused = torch.compile(function, fullgraph=True, dynamic=False)

    def sampler(image: Tensor, params: Tensor) -> Tensor:
        # cuDNN's sampler is one that Inductor has no way to fuse
        with torch.backends.cudnn.flags(enabled=False), config.patch(donated_buffer=donated):
            return fused(image, params)

    return sampler


def alone(case: Case, inputs: Inputs) -> Sampler:
    """``F.grid_sample`` on a grid that is there already."""
    if case.row != "small" or case.work != "forward":
        raise Missing("for small images, forward")
    grid = grid_maker(case, inputs.params)(inputs.params)
    return lambda image, params: sample(case, image, grid)


def pixel_units(size: tuple[int, ...], like: Tensor) -> Tensor:
    """From normalised coordinates with aligned corners to pixels."""
    height, width = ((n - 1) / 2 for n in size)
    return torch.tensor([[width, 0, width], [0, height, height], [0, 0, 1]]).to(like)


def kornia(case: Case, inputs: Inputs) -> Sampler:
    """kornia takes the matrix from input to output pixels.

    With aligned corners alone, as what it does without has changed between releases. For splines its function
    that solves for the weights has the control points' places in the input as centres, which makes another
    spline than everybody's: its sampler gets the usual weights instead, by a product in place of the solving.
    """
    if case.antialias or case.boxes or "circular" in paddings(case):
        raise Missing("kornia's warps do not average, do not wrap, and have one map for each image")
    if case.dims != 2 or case.source not in ("affine", "projective", "tps") or case.shared:
        raise Missing("kornia warps 2-D images by affine maps, homographies and splines, one for each image")
    if not case.align_corners:
        raise Missing("kornia is compared with aligned corners alone")
    if case.fill is not None or not case.dtype.is_floating_point:
        raise Missing("kornia takes no integers")
    if not _same_dtypes(case) or case.mode == "bicubic":
        raise Missing("kornia takes matrices of the image's dtype, and no bicubic for all of these")
    if case.source == "tps" and (case.mode, case.padding, case.size) != ("bilinear", "zeros", case.shape[2:]):
        raise Missing("kornia's spline keeps the size, bilinear, zeros")
    module = optional("kornia.geometry.transform")
    if case.source == "tps":
        centres, solution = (t.to(inputs.params) for t in (lattice(), spline_solution()))
        centres = centres.expand_as(inputs.params)
        # Its kernel is r^2 log r, half of r^2 log r^2; its affine part is in the order 1, x, y.
        weights, affine = 2 * solution[:-3], solution[[-1, -3, -2]]

        def spline(image: Tensor, points: Tensor) -> Tensor:
            return module.warp_image_tps(
                image, centres, weights @ points, affine @ points, align_corners=True
            )

        return spline
    to_in, to_out = (pixel_units(size, inputs.params) for size in (case.shape[2:], case.size))
    from_out = torch.linalg.inv(to_out)
    last = torch.tensor([0.0, 0.0, 1.0]).to(inputs.params).expand(len(inputs.params), 1, 3)

    def warp(image: Tensor, params: Tensor) -> Tensor:
        square = params if case.source == "projective" else torch.cat([params, last], 1)
        forward = torch.linalg.inv_ex(to_in @ square @ from_out).inverse
        if case.source == "projective":
            return module.warp_perspective(image, forward, case.size, **modes(case))
        return module.warp_affine(image, forward[:, :2], case.size, **modes(case))

    return warp


def torchvision(case: Case, inputs: Inputs) -> Sampler:
    """torchvision takes one map for the whole batch, whose numbers are on the host: forward alone."""
    if not case.shared or case.source not in ("affine", "projective", "flow") or case.align_corners:
        raise Missing("torchvision has one map for a batch, without aligned corners")
    if case.dims != 2 or case.size != case.shape[2:] or (case.mode, case.padding) != ("bilinear", "zeros"):
        raise Missing("torchvision's maps keep the size, 2-D, bilinear, zeros")
    if case.work != "forward" or case.fill is not None:
        raise Missing("torchvision's maps have no gradient, and another rule for a fill")
    v2 = optional("torchvision.transforms.v2.functional")
    bilinear = optional("torchvision.transforms").InterpolationMode.BILINEAR
    height, width = case.size
    if case.source == "flow":
        scale = 2 / torch.tensor([width, height]).to(inputs.params)
        return lambda image, flow: v2.elastic(image, flow.movedim(1, -1) * scale, interpolation=bilinear)
    # In pixels from the outer edge, as torchvision has them.
    edges = torch.tensor(
        [[width / 2, 0, width / 2], [0, height / 2, height / 2], [0, 0, 1]], dtype=torch.float64
    )
    normalised = torch.eye(3, dtype=torch.float64)
    normalised[: inputs.params.shape[1]] = inputs.params[0].double().cpu()
    pixels = edges @ normalised @ torch.linalg.inv(edges)
    numbers = (pixels / pixels[2, 2]).flatten().tolist()[:8]
    return lambda image, params: v2.perspective(image, None, None, bilinear, coefficients=numbers)


def roi_align(case: Case, inputs: Inputs) -> Sampler:
    """torchvision's crops of boxes: with one sample of a bin they are bilinear samples at its middle."""
    plain = case.mode == "bilinear" and case.padding == "border" and not case.align_corners
    if not case.boxes or case.dims != 2 or not plain:
        raise Missing("for boxes of an image, bilinear, 2-D, border padding, without aligned corners")
    operators = optional("torchvision.ops")
    height, width = case.shape[2:]
    sides = torch.tensor([width, height]).to(inputs.params)

    def sampler(image: Tensor, theta: Tensor) -> Tensor:
        half, centre = theta[..., :2].diagonal(dim1=-2, dim2=-1), theta[..., 2]
        corners = torch.cat([centre - half, centre + half], -1)
        boxes = ((corners + 1) / 2 * torch.cat([sides, sides])).to(image.dtype)
        found = operators.roi_align(image, list(boxes), case.size, sampling_ratio=1, aligned=True)
        return found.unflatten(0, (-1, case.boxes))

    return sampler


def flag_gems(case: Case, inputs: Inputs) -> Sampler:
    """FlagGems' kernels in the place of PyTorch's."""
    module = optional("flag_gems")
    plain = eager(case, inputs)

    def sampler(image: Tensor, params: Tensor) -> Tensor:
        with module.use_gems():
            return plain(image, params)

    return sampler


@functools.cache
def optional(name: str) -> Any:
    """A module, or Missing with what its import said: an installation can be broken in any way."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise Missing(f"{name.split('.')[0]} cannot be imported: {error}") from error


OURS = Rival("ours", ours)
RIVALS = (
    OURS,
    Rival("eager", eager, eager=True),
    Rival("cudnn", functools.partial(eager, cudnn=True), eager=True),
    Rival("autocast", autocast, eager=True),
    Rival("compiled", compiled),
    Rival("grid_sample alone", alone),
    Rival("ours affine", ours, instead=as_affine),
    Rival("kornia", kornia),
    Rival("torchvision", torchvision),
    Rival("roi_align", roi_align),
    Rival("flag_gems", flag_gems),
    Rival("half grid", half_grid, judged=False),
)


# ---------------------------------------------------------------------------------------- what is called
@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def bind(case: Case, sampler: Sampler, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """The case's work, as a call: the output or the gradients, for a step both."""
    wanted = case.gradients
    leaves = [tensor.detach().requires_grad_(on) for tensor, on in zip(inputs, wanted)]
    by = [leaf for leaf, on in zip(leaves, wanted) if on]
    if case.work == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (sampler(*leaves),)

        return forward

    def gradients(output: Tensor, again: bool) -> tuple[Tensor, ...]:
        grad_output = inputs.grad_output.to(output.dtype)  # an output of autocast is float32
        return torch.autograd.grad(output, by, grad_output, retain_graph=again)

    if case.work == "step":

        def step() -> tuple[Tensor, ...]:
            output = sampler(*leaves)
            return (output.detach(), *gradients(output, False))

        return step
    output = sampler(*leaves)
    return lambda: gradients(output, True)


def prepare(case: Case, rival: Rival, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """The rival's call. Raises Missing where it has none."""
    call = bind(case, rival.build(case, inputs), inputs)
    if not case.deterministic or rival is not OURS:
        return call

    def repeatable() -> tuple[Tensor, ...]:
        with deterministic(True):
            return call()

    return repeatable


# --------------------------------------------------------------------------------------------- the judge
def exact(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """The results in float64, of the inputs as they are, by PyTorch's own formulas."""
    wide = Inputs(*(tensor.double() for tensor in inputs))
    make = grid_maker(case, wide.params)
    with torch.backends.cudnn.flags(enabled=False):
        return bind(case, lambda image, params: sample(case, image, make(params)), wide)()


def share_read(case: Case, inputs: Inputs) -> float:
    """The share of the image's pixels that some output reads: those with a gradient if all outputs have 1."""
    image = torch.zeros((case.shape[0], 1, *case.shape[2:]), device=inputs.image.device, requires_grad=True)
    params = inputs.params.float()
    plain = dataclasses.replace(case, mode="nearest" if case.mode == "nearest" else "bilinear")
    with torch.backends.cudnn.flags(enabled=False):
        output = sample(plain, image, grid_maker(case, params)(params))
        (touched,) = torch.autograd.grad(output.sum(), image)
    return torch.count_nonzero(touched).item() / touched.numel()


def fewest_bytes(case: Case, inputs: Inputs) -> int:
    """What the case must move at least."""
    return bytes_moved(case, share_read(case, inputs))


def errors(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    """||result - exact|| / ||exact|| of each."""
    if [tuple(a.shape) for a in results] != [tuple(b.shape) for b in expected]:
        raise Mismatch(f"shapes {[tuple(a.shape) for a in results]}")
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, expected)]


def limits(case: Case) -> list[float]:
    """For each of the results."""
    value = KINK_LIMIT if case.mode == "nearest" else LIMIT[case.dtype]
    by_image, by_params = case.gradients
    found = [value] * (case.work in ("forward", "step")) + [value] * by_image
    return found + [max(value, KINK_LIMIT)] * by_params


def is_judged(case: Case, rival: Rival) -> bool:
    """PyTorch computes the coordinates of a half grid in half, which for noise is as good as other ones."""
    return rival.judged and (rival is OURS or case.dtype == torch.float32 or case.source != "grid")


def check(case: Case, rival: Rival, found: list[float]) -> None:
    """Raises Mismatch, which says how far off a result is."""
    allowed = limits(case) if is_judged(case, rival) else [float("inf")] * len(found)
    if all(error <= limit and error < float("inf") for error, limit in zip(found, allowed)):
        return
    errors, most = ([f"{number:.2g}" for number in numbers] for numbers in (found, allowed))
    raise Mismatch(f"errors {', '.join(errors)}, allowed {', '.join(most)}")
