"""Whether a padding is right everywhere.

A padding is arithmetic on whole numbers: which pixel of an axis is read in place of pixel i. ``PADDED`` says
so once more, in plain PyTorch, and all else follows from it. ``test_every_kernel`` compares every kernel with
what float64 and autograd make of it, on images of one tile; ``test_tiles_of_the_gather`` has several.
Further tests look closer, at what the kernels count on; of these a lane does a place, and a program an axis
of so many pixels.
"""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from common import MODES, PADDINGS, TAPPED, affine_witness, assert_close, random_theta, witness

import stn_triton as stn
from stn_triton.checks import INTERPOLATIONS, to_padding
from stn_triton.kernels.device import copies, interpolation, padding
from stn_triton.kernels.device.cells import axis_cell, cell_row, row_parts
from stn_triton.kernels.gather import gather_backward
from stn_triton.kernels.host import configs
from stn_triton.kernels.modes import (
    NAMED_PADDINGS,
    Interpolation,
    Padding,
    Source,
    padding_code,
    paddings_of,
)
from stn_triton.kernels.sort import sorted_backward
from stn_triton.kernels.spec import Place, Sizes, Spec
from stn_triton.reference import taps

FAR = 2**30
INFINITY, NAN = float("inf"), float("nan")
SIZES = range(1, 10)
ALIGN = pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])
EVERY = pytest.mark.parametrize("padding_mode", NAMED_PADDINGS, ids=lambda p: p.name.lower())


def reflected(i, size, align_corners):
    period = 2 * max(size - align_corners, 1)
    i = i % period
    return torch.minimum(i, period - 1 + align_corners - i).clamp(0, size - 1)


# The pixel read in place of pixel i of an axis; -1 where nothing is read.
PADDED = {
    "zeros": lambda i, size, align_corners: torch.where((i >= 0) & (i < size), i, -1),
    "border": lambda i, size, align_corners: i.clamp(0, size - 1),
    "reflection": reflected,
    "circular": lambda i, size, align_corners: i % size,
}
assert {name.upper() for name in PADDED} == {padding.name for padding in NAMED_PADDINGS}
# Where infinities and NaN are read, normalised; far outside is nowhere under zeros, and the border else.
INFINITE = {"zeros": -99.0, "reflection": -1.0, "circular": -1.0}


# ------------------------------------------------------------------------------------ in every kernel
def cubic(d):
    near, far = (1.25 * d - 2.25) * d * d + 1, ((-0.75 * d + 3.75) * d - 6.0) * d + 3.0
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))


def expected(input, grid, mode, padding_mode, align_corners):
    """The samples, (N, C, *size), differentiable any number of times."""
    dims, batch = grid.shape[-1], input.shape[0]
    modes = (padding_mode,) * dims if isinstance(padding_mode, str) else padding_mode
    weights = []
    for axis, (size, name) in enumerate(zip(reversed(input.shape[2:]), modes)):
        x = grid[..., axis].flatten(1)
        span, middle = (size - align_corners) / 2, (size - 1) / 2
        x = torch.where(x.isnan(), INFINITE.get(name, -99.0), x)
        x = torch.where(x.isinf(), INFINITE.get(name, x.sign() * 99.0), x) * span + middle
        pixels = torch.arange(size)
        weight = torch.zeros(*x.shape, size, dtype=x.dtype)
        first = x.detach().floor().long()
        for k in {"nearest": (0,), "bilinear": (0, 1), "bicubic": (-1, 0, 1, 2)}[mode]:
            i = x.detach().round().long() if mode == "nearest" else first + k
            distance = (x - i).abs()
            tap = {"nearest": torch.ones_like, "bilinear": lambda d: 1 - d, "bicubic": cubic}[mode](distance)
            read = PADDED[name](i, size, align_corners).unsqueeze(-1) == pixels
            weight = weight + tap.unsqueeze(-1) * read
        weights.append(weight)
    letters = "xyz"[:dims]
    terms = ",".join(f"np{letter}" for letter in letters)
    found = torch.einsum(f"nc{letters[::-1]},{terms}->ncp", input, *weights)
    return found.view(batch, -1, *grid.shape[1:-1])


def witness_of(padding_mode):
    """PyTorch's samples, or ``expected`` of a padding that PyTorch has not; both of float64 on the CPU."""
    return witness if padding_mode in PADDINGS else expected


def derivatives(sample, input, source, cotangent, more):
    """Samples, both gradients, and what a sum of these has for gradients."""
    leaves = [t.clone().requires_grad_() for t in (input, source, cotangent)]
    output = sample(*leaves[:2])
    options = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad((output * leaves[2]).sum(), leaves[:2], **options)
    total = sum((gradient * direction).sum() for gradient, direction in zip(first, more))
    return output, *first, *torch.autograd.grad(total, leaves, **options)


def name_of(value):
    return "+".join(value) if isinstance(value, tuple) else None


CASES = [
    *itertools.product((2,), ["bilinear"], PADDED, (False, True)),
    *itertools.product((2,), ["nearest"], PADDED, (True,)),
    *itertools.product((2,), ["bicubic"], PADDED, (False,)),
    *itertools.product((2,), MODES, [("circular", "border"), ("reflection", "circular")], (True,)),
    *itertools.product((3,), ("bilinear", "bicubic"), [("zeros", "circular", "reflection")], (False,)),
]


@pytest.mark.parametrize("dims, mode, padding_mode, align_corners", CASES, ids=name_of)
def test_every_kernel(device, either_backend, dims, mode, padding_mode, align_corners):
    """Forward; d image by scatter, sort and gather; d parameters; second derivatives; forward mode.

    Axes are shorter than a cubic's taps, and places several images away.
    """
    in_size, size = ((2, 5), (3, 4)) if dims == 2 else ((1, 2, 5), (2, 1, 4))
    modes = mode, padding_mode, align_corners
    input, cotangent = torch.randn(1, 1, *in_size).double(), torch.randn(1, 1, *size).double()
    grid = (torch.rand(1, *size, dims).double() - 0.5) * 9
    more = torch.randn(input.shape), torch.randn(grid.shape)

    def witness(x, g):
        return expected(x, g, *modes)

    def sample(x, g):
        return stn.grid_sample(x, g, *modes)

    leaves = [t.to(device) for t in (input, grid, cotangent)]
    directions = [m.to(device, torch.float64) for m in more]
    wanted = derivatives(witness, input, grid, cotangent, more)
    for ours, theirs in zip(derivatives(sample, *leaves, directions), wanted, strict=True):
        assert_close(ours, theirs)
    _, along = torch.func.jvp(sample, tuple(leaves[:2]), tuple(directions))
    by_tangents = sum((g * m).sum() for g, m in zip(wanted[1:3], more))
    assert_close((along.cpu() * cotangent).sum(), by_tangents.detach(), scale=10.0)

    # coordinates that are far away, or none
    grid = grid.clone()
    grid[0].view(-1, dims)[:4] = torch.tensor([12345.678, NAN, INFINITY, -INFINITY]).double()[:, None]
    assert_close(sample(leaves[0], grid.to(device)), witness(input, grid))

    if either_backend == "kernels":
        codes = int(Source.GRID), int(INTERPOLATIONS[mode]), to_padding(padding_mode, dims), align_corners
        by_sort = torch.full_like(leaves[0], NAN)
        sorted_backward(leaves[2], leaves[1], None, by_sort, *codes)
        assert_close(by_sort, wanted[1])
    # fixed-point coordinates; bicubic so far that outputs get the lanes
    theta = random_theta(1, dims, torch.float32, device, 12.0 if mode == "bicubic" else 1.0, 0.4)
    leaf = input.to(device, torch.float32).requires_grad_()
    output = stn.affine_grid_sample(leaf, theta, size, *modes)
    (by_gather,) = torch.autograd.grad(output, leaf, cotangent.to(device, torch.float32))
    exact = input.clone().requires_grad_()
    samples = witness(exact, affine_witness(theta, size, align_corners))
    samples.backward(cotangent)
    assert_close(output, samples)
    assert_close(by_gather, exact.grad, scale=3.0)


MAPS = {  # how large the output's grid is in the image, and where its middle lies
    "around the image": [[2.9, 0.3, 0.2], [-0.2, 2.7, 0.1]],  # whole blocks beyond every edge
    "enlarged": [[0.3, 0.1, 0.8], [-0.1, 0.2, -0.9]],  # many outputs a pixel
}


@pytest.mark.parametrize("padding_mode", PADDED)
def test_tiles_of_the_gather(device, padding_mode):
    """d image of several tiles, with a lane for each output: what ``may_touch`` leaves out adds nothing."""
    theta = torch.tensor(list(MAPS.values()), dtype=torch.float64)
    cotangent = torch.randn(len(MAPS), 1, 6, 8).double()
    image = torch.zeros(len(MAPS), 1, 7, 8, dtype=torch.float64).requires_grad_()
    samples = expected(image, affine_witness(theta, (6, 8), False), "bilinear", padding_mode, False)
    (wanted,) = torch.autograd.grad(samples, image, cotangent)
    found = torch.full(image.shape, NAN, dtype=torch.float64, device=device)
    codes = Interpolation.BILINEAR, to_padding(padding_mode, 2), False
    with configs.override(rows=4, columns=4, out_rows=2, out_columns=4, candidates=0):
        gather_backward(cotangent.to(device), theta.to(device), found, Source.AFFINE, *codes)
    for name, ours, exact in zip(MAPS, found.cpu(), wanted):
        assert (ours - exact).abs().max() < 1e-8, name


# ------------------------------------------------------------------------------ what kernels count on
def spec_of(padding_mode, align_corners, interpolation=Interpolation.BILINEAR):
    return Spec(
        source=int(Source.GRID),
        interpolation=int(interpolation),
        padding=(int(padding_mode),) * 2,
        align_corners=int(align_corners),
        dims=2,
        compute=tl.float32,
        index=tl.int32,
    )


def value_of(answer):
    """What a constexpr_function returns, to the host."""
    return getattr(answer, "value", answer)


@triton.jit
def padding_kernel(
    index_ptr, fraction_ptr, whole_ptr, tap_ptr, weight_ptr, cell_ptr, count,
    SPEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of places (index, fraction) on an axis of program_id + 1 pixels, for each program:

    whole_ptr: ``pad_index`` of the index. tap_ptr: pixels and whether they are read, of each tap.
    weight_ptr: weights and slopes, of each tap. cell_ptr: the sorted backward's cell, and whether anything
    is read from there.
    """
    TAPS: tl.constexpr = interpolation.tap_count(SPEC)
    size = tl.program_id(0) + 1
    lane = tl.arange(0, BLOCK)[:, None]
    mask = lane < count
    place = Place(tl.load(index_ptr + lane, mask, other=0), tl.load(fraction_ptr + lane, mask, other=0.0))
    at = tl.program_id(0) * count + lane
    tl.store(whole_ptr + at, padding.pad_index(place[0], size, 0, SPEC), mask)
    taps = interpolation.axis_taps(place, size, 0, SPEC)
    slopes = interpolation.axis_slopes(place, size, 0, SPEC)
    zero = tl.zeros(place[1].shape, tl.float32)
    for k in tl.static_range(TAPS):
        tl.store(tap_ptr + 2 * (TAPS * at + k), taps.index[k], mask)
        tl.store(tap_ptr + 2 * (TAPS * at + k) + 1, (zero == 0) & taps.inside[k], mask)
        tl.store(weight_ptr + 2 * (TAPS * at + k), zero + taps.weight[k], mask)
        tl.store(weight_ptr + 2 * (TAPS * at + k) + 1, zero + slopes[k], mask)
    cell, read = axis_cell(place, size, 0, SPEC)
    tl.store(cell_ptr + 2 * at, cell, mask)
    tl.store(cell_ptr + 2 * at + 1, read.to(tl.int32), mask)


class Padded:
    """What ``padding_kernel`` writes, each (size, place, ...), on the CPU."""

    def __init__(self, device, spec, index, fraction):
        taps = value_of(interpolation.tap_count(spec))
        count, sizes = len(index), len(SIZES)

        def buffer(*shape, dtype=torch.int32):
            return torch.full((sizes, count, *shape), -7, dtype=dtype, device=device)

        results = buffer(), buffer(taps, 2), buffer(taps, 2, dtype=torch.float32), buffer(2)
        padding_kernel[(sizes,)](
            index.to(device), fraction.to(device), *results, count, spec, triton.next_power_of_2(count)
        )
        self.whole, self.taps, weights, self.cell = (result.cpu() for result in results)
        self.weight, self.slope = weights.double().unbind(-1)


def random_places():
    """Indices near, far and at both ends, with fractions of every kind: 0 and 1 too."""
    near = torch.arange(-40, 41)
    far = torch.randint(-FAR, FAR + 1, (100,))
    ends = torch.tensor([-FAR, -FAR + 1, FAR - 1, FAR, -(2**24) - 1, 2**24 + 1])
    index = torch.cat([near, near, near, far, ends])
    fraction = torch.rand(len(index))
    fraction[len(near) : 2 * len(near)] = 0.0
    fraction[2 * len(near) : 3 * len(near)] = 1.0
    return index.int(), fraction


@EVERY
@ALIGN
def test_taps(device, padding_mode, align_corners):
    """``pad_index`` is as it should be, near and far, and linear taps agree with it."""
    index, fraction = random_places()
    found = Padded(device, spec_of(padding_mode, align_corners), index, fraction)
    pad = PADDED[padding_mode.name.lower()]
    for k, size in enumerate(SIZES):
        once, above = (pad(i.long(), size, align_corners) for i in (index, index + 1))
        inside = (index >= 0) & (index < size)
        assert once[inside].equal(index[inside].long()), "pixels of the image stand for themselves"
        if padding_mode != Padding.ZEROS:
            assert found.whole[k].equal(once.int())

        image = torch.cat([torch.randn(size, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
        taps, read = found.taps[k].unbind(-1)
        assert ((taps >= 0) & (taps < size))[read != 0].all(), "taps that are read lie in the image"
        values = torch.where(read != 0, image[taps.clamp(0, size - 1).long()], 0.0)
        t = fraction.double()
        wanted = (1 - t) * image[once] + t * image[above]
        assert ((found.weight[k] * values).sum(-1) - wanted).abs().max() < 1e-6
        between = (fraction > 0) & (fraction < 1)
        slope = (found.slope[k] * values).sum(-1)
        assert (slope - (image[above] - image[once]))[between].abs().max() < 1e-6, "slopes agree"


@EVERY
@ALIGN
@pytest.mark.parametrize("mode", TAPPED, ids=lambda m: m.name.lower())
def test_cells(device, padding_mode, align_corners, mode):
    """Of n taps, pixel q is read from cells q - n // 2 to q - n // 2 + n - 1, where the sorted sum looks.

    Where padding wraps, these are counted on around the ends.
    """
    index, fraction = random_places()
    spec = spec_of(padding_mode, align_corners, mode)
    found = Padded(device, spec, index, fraction)
    taps, read = found.taps.unbind(-1)
    cell, any_read = found.cell[..., None, :].unbind(-1)
    n = taps.shape[-1]
    assert (any_read != 0).equal((read != 0).any(-1, keepdim=True))
    distance = cell - (taps - n // 2)
    if value_of(padding.wraps(spec, 0)):
        distance = distance % torch.tensor(SIZES)[:, None, None]
    assert ((distance >= 0) & (distance < n))[read != 0].all()
    for k, size in enumerate(SIZES):
        assert ((cell[k] >= 0) & (cell[k] < size)).all()


@triton.jit
def copies_kernel(shown_ptr, own_ptr, SPEC: tl.constexpr, COPIES: tl.constexpr):
    """Where copies from -COPIES // 2 on show each pixel of program_id + 1, and whether it belongs to them."""
    size = tl.program_id(0) + 1
    q = tl.arange(0, 16)[:, None]
    number = tl.arange(0, COPIES)[None, :] - COPIES // 2
    shown, own = copies.appearance(q, number, size, 0, SPEC)
    at = (tl.program_id(0) * 16 + q) * COPIES + tl.arange(0, COPIES)[None, :]
    tl.store(shown_ptr + at, shown)
    tl.store(own_ptr + at, own.to(tl.int32) * (q < size))


@triton.jit
def weights_kernel(
    index_ptr, fraction_ptr, weight_ptr, sum_ptr, count,
    SPEC: tl.constexpr, BLOCK: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Of places and pixels, [places, 16]: the weight, and the sum of the weights in all copies."""
    size = tl.program_id(0) + 1
    lane = tl.arange(0, BLOCK)[:, None]
    mask = lane < count
    place = Place(tl.load(index_ptr + lane, mask, other=0), tl.load(fraction_ptr + lane, mask, other=0.0))
    q = tl.arange(0, 16)[None, :]
    at = (tl.program_id(0) * count + lane) * 16 + q
    tl.store(weight_ptr + at, interpolation.pixel_weight(place, q, size, 0, SPEC), mask & (q < size))
    total = tl.zeros([BLOCK, 16], tl.float32)
    for k in range(COPIES):
        shown, own = copies.appearance(q, k - COPIES // 2, size, 0, SPEC)
        total += tl.where(own, interpolation.pixel_weight(place, shown, size, 0, SPEC, True), 0.0)
    tl.store(sum_ptr + at, total, mask & (q < size))


@EVERY
@ALIGN
def test_copies(device, padding_mode, align_corners):
    """What the gather counts on, where padding repeats and where it does not.

    Copies share out all whole numbers, each showing the pixel that is read there; and a pixel's weight is the
    sum of what is read of it in each copy. Without copies only pixels at the border stand for others.
    """
    spec = spec_of(padding_mode, align_corners)
    pad = PADDED[padding_mode.name.lower()]
    if not value_of(copies.has_copies(spec)):
        i = torch.arange(-20, 30)
        for size in SIZES:
            outside = pad(i, size, align_corners)[(i < 0) | (i >= size)]
            assert not ((outside > 0) & (outside < size - 1)).any()
        return
    shown, own = (torch.zeros(len(SIZES), 16, 32, dtype=torch.int32, device=device) for _ in range(2))
    copies_kernel[(len(SIZES),)](shown, own, spec, 32)
    # of one pixel with aligned corners all coordinates are 0: it need not be shown anywhere else
    first = int(align_corners and value_of(padding.mirrors(spec, 0)))
    for k, size in list(enumerate(SIZES))[first:]:
        at, owned = shown[k].cpu(), own[k].cpu() != 0
        q = torch.arange(16)[:, None].expand(16, 32)
        assert pad(at[owned].long(), size, align_corners).equal(q[owned])
        assert at[owned].sort().values.equal(torch.arange(int(owned.sum())) + at[owned].min()), "each once"

    near = (index := random_places()[0]).abs() <= 4
    index, fraction = index[near], random_places()[1][near]
    for mode in TAPPED:
        weight, total = (torch.zeros(len(SIZES), len(index), 16, device=device) for _ in range(2))
        spec = spec_of(padding_mode, align_corners, mode)
        arguments = index.to(device), fraction.to(device), weight, total, len(index), spec
        weights_kernel[(5,)](*arguments, triton.next_power_of_2(len(index)), 14)
        assert (weight[:5].sum(-1) > 0.99).all()
        assert (weight - total)[first:].abs().max() < 1e-5


@triton.jit
def rows_kernel(starts_ptr, begin_ptr, end_ptr, SPEC: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Of an image WIDTH wide and program_id + 1 high: the cells of each row around each pixel."""
    sizes = Sizes((WIDTH, tl.program_id(0) + 1), (1, 1), 1, 1, 1, (1, 1, 1))
    lane = tl.arange(0, 64)[:, None]
    q = (lane % WIDTH, lane // WIDTH)
    for row in range(ROWS):
        begin, end = cell_row(starts_ptr, q, row, sizes, q[1] < sizes.input[1], SPEC)
        at = (tl.program_id(0) * 64 + lane) * ROWS + row
        tl.store(begin_ptr + at, begin)
        tl.store(end_ptr + at, end)


@pytest.mark.parametrize("mode", TAPPED, ids=lambda m: m.name.lower())
def test_wrapping_rows_of_cells(device, mode):
    """Each cell around a pixel is visited once, also where there are fewer than taps."""
    spec = spec_of(Padding.CIRCULAR, False, mode)
    n = value_of(interpolation.tap_count(spec))
    rows = n * value_of(row_parts(spec))
    starts = torch.arange(128, dtype=torch.int32, device=device)
    for width in (1, 2, 3, 4, 7):
        begin, end = (torch.zeros(5, 64, rows, dtype=torch.int32, device=device) for _ in range(2))
        rows_kernel[(5,)](starts, begin, end, spec, width, rows)
        for height, q in itertools.product(range(1, 6), range(width)):
            pieces = zip(begin[height - 1, q].tolist(), end[height - 1, q].tolist())
            visited = sorted(cell for piece in pieces for cell in range(*piece))
            around = itertools.product(range(-(n // 2), n - n // 2), repeat=2)
            assert visited == sorted({y % height * width + (q + x) % width for y, x in around})


def test_codes():
    """One integer stands for the paddings of all axes; codes that mean nothing are refused by name."""
    for dims in (2, 3):
        codes = {padding_code(p): p for p in itertools.product(Padding, repeat=dims)}
        assert len(codes) == len(Padding) ** dims
        for code in range(-2, 1 << 3 * dims + 1):
            if code in codes:
                assert paddings_of(code, dims) == codes[code]
            elif code < 0 or code >> 3 * dims or len(set(f"{code:o}")) > 1:
                with pytest.raises(ValueError, match="padding_mode"):
                    paddings_of(code, dims)


def test_refusals(device, either_backend):
    image, theta, grid = torch.ones(1, 1, 2, 3), torch.eye(2, 3)[None], torch.zeros(1, 2, 2, 2)
    image, theta, grid = (t.to(device) for t in (image, theta, grid))
    for wrong, error in (
        ("wrap", ValueError),
        ("framed", ValueError),  # the kernels' own
        (("zeros", "framed"), ValueError),
        (("zeros",), ValueError),
        (("zeros", 3), ValueError),
        (3, TypeError),
    ):
        with pytest.raises(error, match="padding_mode"):
            stn.affine_grid_sample(image, theta, padding_mode=wrong)
        with pytest.raises(ValueError, match="padding_mode"):
            stn.grid_sample(image, grid, "bilinear", wrong, False)
    with pytest.raises(RuntimeError, match="Double"):
        stn.grid_sample(image, grid.double(), "bilinear", "circular", False)
    for mode in Interpolation.BILINEAR, Interpolation.BICUBIC:  # of a padding that plain PyTorch lacks
        with pytest.raises(NotImplementedError):
            taps._axis_taps(torch.zeros(3), 3, 7, (mode, 7, False), 0)
    for code in (7, -1, 8):
        with pytest.raises(ValueError, match="padding_mode"):
            torch.ops.stn_triton.sample(image, theta, None, int(Source.AFFINE), [2, 3], 0, code, False)
