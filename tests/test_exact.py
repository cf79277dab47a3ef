"""Coordinates that are exact where the mathematics is, and within 2^-30 of a pixel elsewhere.

First the kernels' coordinates themselves, against rational arithmetic on the given float32 parameters. Then
what follows from them: identity, whole-pixel shifts and flips between equal sizes, and whole- and half-pixel
flows, read, weigh and slope exactly, whatever the size. (The CPU path, PyTorch's operators, has their
rounding and is not tested here.)
"""

import math
from fractions import Fraction
from typing import NamedTuple

import pytest
import torch
import triton.language as tl
from common import assert_close, random_theta

import stn_triton as stn
from stn_triton.kernels.device import affine, sources, tiles
from stn_triton.kernels.host import parameters
from stn_triton.kernels.modes import MOST_STEPS, Interpolation, Padding, Source
from stn_triton.kernels.spec import Block, Params, Sizes, Spec, Work, kernel

BOUND = Fraction(1, 2**30)
ALIGN = pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])


# ------------------------------------------------------------------------------------------ coordinates
@kernel()
def places_kernel(
    source_ptr, blocks_ptr, out_ptr, index_ptr, fraction_ptr, single_index_ptr, single_fraction_ptr, fits_ptr,
    stride_source_0, stride_source_1, stride_source_2, stride_source_3, stride_source_4,
    in_width, in_height, in_depth, out_width, out_height, out_depth, batch, blocks, steps,
    SPEC: tl.constexpr, READING: tl.constexpr,
):  # fmt: skip
    """Where a program's pixels are read, as the samplers find it: step by step, and (single) each by itself.

    A program for each output and each block (column, row) of blocks_ptr. Written, for (program, step, lane,
    axis): the output pixel, and its places in the type of ``READING``: of the same ``SPEC`` or, for all bits
    of a fixed-point fraction, with float64.
    """
    sizes = Sizes((in_width, in_height, in_depth), (out_width, out_height, out_depth), batch, 1, 1, (1, 1, 1))
    stride_source = (stride_source_0, stride_source_1, stride_source_2, stride_source_3, stride_source_4)
    params = Params(source_ptr, stride_source, source_ptr, 0)
    program = tl.program_id(0)
    b = program // blocks
    column = tl.load(blocks_ptr + 2 * (program % blocks))
    row = tl.load(blocks_ptr + 2 * (program % blocks) + 1)
    outputs = sources.outputs_of(b, sizes, SPEC)
    map = sources.map_of(params, outputs[0][0], outputs[0][1], sizes, SPEC)
    numbers = tiles.row_by_row(SPEC.rows * SPEC.columns)
    starts = affine.starts_of(map, column, row, numbers, sizes, SPEC)
    work = Work(params, b, outputs, map, column, row, steps, numbers, starts, (0, 1), False, 0, 0, 1)
    tl.store(fits_ptr + program, tl.cast(map.fits, tl.int32))
    LANES: tl.constexpr = SPEC.rows * SPEC.columns
    for step in range(steps):
        row_of_step = row + step * SPEC.rows
        out, mask = tiles.pixels_from(column, row_of_step, sizes.output, numbers, SPEC.columns, SPEC)
        places = sources.places_of(work, Block(step, out, mask), sizes, READING)[0]
        single = sources.places_at(work, out, mask, sizes, READING)[0]
        at = ((program * steps + step) * LANES + tl.arange(0, LANES)[:, None]) * SPEC.dims
        for axis in tl.static_range(SPEC.dims):
            tl.store(out_ptr + at + axis, out[axis])
            tl.store(index_ptr + at + axis, places[axis].index, mask)
            tl.store(fraction_ptr + at + axis, places[axis].fraction, mask)
            tl.store(single_index_ptr + at + axis, single[axis].index, mask)
            tl.store(single_fraction_ptr + at + axis, single[axis].fraction, mask)


class Found(NamedTuple):
    """What ``places_kernel`` writes, on the CPU: output pixels, and their coordinates in units of 2^-32.

    Each (output, pixel, axis), x first, of the pixels that exist.
    """

    out: torch.Tensor
    words: torch.Tensor
    single: torch.Tensor
    fits: torch.Tensor


def find(source, params, in_size, size, align_corners, mode=Interpolation.BILINEAR, tile=(4, 8, MOST_STEPS)):
    """The places where an output begins and ends. ``tile``: rows and columns of a block, and blocks."""
    dims, (rows, columns, steps) = len(size), tile
    last = max(size[-1] - columns, 0), max(math.prod(size[:-1]) - rows * steps, 0)
    blocks = torch.tensor(sorted({(0, 0), last}), dtype=torch.int32, device=params.device)
    shape = (len(params), len(blocks) * steps * rows * columns, dims)
    out, index, single_index = (torch.zeros(shape, dtype=torch.int32, device=params.device) for _ in range(3))
    fraction, single_fraction = (
        torch.zeros(shape, dtype=torch.float64, device=params.device) for _ in range(2)
    )
    fits = torch.zeros(len(params) * len(blocks), dtype=torch.int32, device=params.device)
    spec, wide = (
        Spec(
            source=int(source),
            interpolation=int(mode),
            padding=(int(Padding.ZEROS),) * dims,
            align_corners=int(align_corners),
            dims=dims,
            compute=compute,
            index=tl.int32,
            fixed_point=True,
            rows=rows,
            columns=columns,
        )
        for compute in (tl.float32, tl.float64)
    )
    places_kernel[(fits.numel(),)](
        params, blocks, out, index, fraction, single_index, single_fraction, fits,
        *parameters.source_strides(source, params), *(*reversed(in_size), 1)[:3], *(*reversed(size), 1)[:3],
        len(params), len(blocks), steps, spec, wide if source == Source.AFFINE else spec,
    )  # fmt: skip
    exists = (out[0].cpu() < torch.tensor(size[::-1])).all(-1)

    def words(index, fraction):
        return (index.cpu().long() * 2**32 + (fraction.cpu() * 2**32).long())[:, exists]

    return Found(
        out.cpu()[0, exists], words(index, fraction), words(single_index, single_fraction), fits.bool().cpu()
    )


def exact_rows(theta, in_size, size, align_corners):
    """The rows (A_x, A_y[, A_z], C) of a matrix, fractions: x_r = sum over k of A_rk u_k + C_r."""
    n = [width - align_corners for width in reversed(in_size)]
    e = [max(width - align_corners, 1) for width in reversed(size)]
    rows = []
    for r, row in enumerate(theta.tolist()):
        *linear, shift = map(Fraction, row)
        slopes = [entry * n[r] / (2 * e[k]) for k, entry in enumerate(linear)]
        rows.append((*slopes, shift * n[r] / 2 + Fraction(in_size[-1 - r] - 1, 2)))
    return rows


def errors_of(words, out, theta, in_size, size, align_corners, every=13):
    """How far, in pixels, a matrix's coordinates (pixels, dims) are off at most, of ``every`` so many."""
    worst = []
    chosen = [*range(0, len(out), every), len(out) - 1]
    for r, row in enumerate(exact_rows(theta, in_size, size, align_corners)):
        common = math.lcm(*(entry.denominator for entry in row))
        *slopes, shift = (int(entry * common) for entry in row)
        differences = []
        for i in chosen:
            exact = shift
            for slope, o, width in zip(slopes, out[i].tolist(), reversed(size)):
                exact += slope * (2 * o - (width - 1))
            differences.append(abs(words[i, r].item() * common - exact * 2**32))
        worst.append(Fraction(max(differences), common * 2**32))
    return max(worst)


# Of random matrices: factors of the linear part and of the shift.
MAPS = {"ordinary": (1, 1), "crop": (2**-7, 2), "zoom": (100, 3), "far": (1, 2**17)}
SIZES = [
    pytest.param(*sizes, id="-".join("x".join(map(str, size)) for size in sizes))
    for sizes in (
        ((28, 28), (28, 28)),
        ((33, 40), (71, 37)),
        ((600, 1000), (224, 224)),
        ((1, 5), (35, 1)),
        ((5, 6, 7), (6, 7, 9)),
        ((160, 100, 33), (10, 12, 8)),
    )
]


def maps_of_every_kind(dims, device):
    """``MAPS`` in turn."""
    theta = random_theta(len(MAPS), dims, torch.float32, device)
    factors = torch.tensor(list(MAPS.values()), device=device)
    theta[:, :, :dims] *= factors[:, :1, None]
    theta[:, :, dims] *= factors[:, 1:]
    return theta


@pytest.mark.parametrize("in_size, size", SIZES)
@ALIGN
def test_affine_coordinates_are_within_their_bound(device, in_size, size, align_corners):
    """Of every kind of map, at the ends of the output, from the first to the last step of a program."""
    theta = maps_of_every_kind(len(size), device)
    found = find(Source.AFFINE, theta, in_size, size, align_corners)
    assert found.fits.all()
    for i, kind in enumerate(MAPS):
        for words in (found.words[i], found.single[i]):
            error = errors_of(words, found.out, theta[i].cpu(), in_size, size, align_corners)
            assert error <= BOUND, f"{kind}: off by 2^{math.log2(error):.2f} pixels"


@ALIGN
def test_the_bound_grows_with_far_reaching_zooms(device, align_corners):
    """The linear part is known to 48 bits: what it carries beyond 2^17 pixels is off by 2^-48 of that.

    However far a map shifts costs nothing.
    """
    theta = random_theta(6, 2, torch.float32, device)
    theta[:, :, :2] *= torch.tensor([1e3, 1e4, 1e5], device=device).repeat(2)[:, None, None]
    in_size, size = (400, 600), (65, 100)
    found = find(Source.AFFINE, theta, in_size, size, align_corners)
    assert found.fits.all()
    reach = [found.words[i].abs().max().item() / 2**32 for i in range(6)]
    assert max(reach) > 2**24, "a test of nothing is no test"
    for i in range(6):
        error = errors_of(found.words[i], found.out, theta[i].cpu(), in_size, size, align_corners)
        assert error <= max(BOUND, Fraction(reach[i]) / 2**48), f"off by 2^{math.log2(error):.2f} pixels"


@ALIGN
def test_steps_of_nearest_samples_are_exact(device, align_corners):
    """Nearest samples jump: the gather, and forward, which goes by steps, share each bit of coordinates."""
    for in_size, size in (((33, 40), (71, 37)), ((600, 1000), (224, 224))):
        theta = maps_of_every_kind(2, device)
        found = find(Source.AFFINE, theta, in_size, size, align_corners, Interpolation.NEAREST)
        assert found.words.equal(found.single)


# ---------------------------------------------------------------------------------- where they are exact
def exact_maps(size, align_corners):
    """name -> theta, and where it reads between equal sizes: each axis' (slope, shift) in pixels, x first."""
    dims = len(size)
    n = [width - align_corners for width in reversed(size)]
    # the least shift by whole pixels that float32 holds: 2 k / n with a power of two for a denominator
    odd = [max(n_of_axis // (n_of_axis & -n_of_axis or 1), 1) for n_of_axis in n]
    shifts = [k if n_of_axis else 0 for k, n_of_axis in zip(odd, n)]
    maps = {
        "identity": [(1, 0)] * dims,
        "flip": [(-1, 0), *[(1, 0)] * (dims - 2), (-1, 0)],
        "shift": [(1, shift) for shift in shifts],
        "shift back and flip": [(-1, 0), *[(1, -shift) for shift in shifts[1:]]],
    }
    result = {}
    for name, rows in maps.items():
        theta = torch.zeros(dims, dims + 1, dtype=torch.float64)
        for axis, (slope, shift) in enumerate(rows):
            theta[axis, axis] = slope
            theta[axis, dims] = 2 * shift / max(n[axis], 1)
        assert theta.float().double().equal(theta)
        result[name] = theta.float(), rows
    return result


EXACT_SIZES = [
    *((width, width % 11 + 1) for width in (*range(1, 18), 28, 31, 49, 64, 97, 100, 127, 200, 255, 299, 300)),
    (1, 2**24),
    (2**24 - 1, 1),
    (2**20 + 1, 2**20 + 7),
    (4097, 16383),
    (46341, 65535),
    (5, 6, 7),
    (1, 2, 300),
    (255, 100, 31),
]


@ALIGN
def test_whole_pixel_maps_are_exact(device, align_corners):
    """Coordinates of identity, shifts and flips are whole numbers, whatever the size."""
    for size in EXACT_SIZES:
        maps = exact_maps(size, align_corners)
        theta = torch.stack([theta for theta, _ in maps.values()]).to(device)
        found = find(Source.AFFINE, theta, size, size, align_corners, tile=(4, 8, 2))
        for i, (name, (_, rows)) in enumerate(maps.items()):
            for axis, (slope, shift) in enumerate(rows):
                o = found.out[:, axis].long()
                place = (o if slope > 0 else size[-1 - axis] - 1 - o) + shift
                assert found.words[i, :, axis].equal(place << 32), (size, name)
                assert found.single[i, :, axis].equal(place << 32), (size, name)


@ALIGN
def test_whole_and_half_pixel_flows_are_exact(device, align_corners):
    """Of equal sizes, a flow by whole or half pixels reads at whole or half pixels."""
    for size in EXACT_SIZES:
        if math.prod(size) > 2**24:
            continue
        dims = len(size)
        values = torch.tensor([0.0, 1.0, -3.0, 0.5, -0.5, 2.5, 2.0**20])
        flow = values.view(-1, 1, *[1] * dims).expand(-1, dims, *size).to(device)
        found = find(Source.FLOW, flow, size, size, align_corners, tile=(4, 8, 2))
        for i, value in enumerate(values.tolist()):
            wanted = (found.out.long() << 32) + int(value * 2**32)
            assert found.words[i].equal(wanted), (size, value)
            assert found.single[i].equal(wanted), (size, value)


# ------------------------------------------------------------------------------- what follows from them
def pixels(image, x, y, padding):
    """The pixels of (N, C, H, W) at whole places x, (W',), and y, (H',), under a padding."""
    height, width = image.shape[2:]
    found = image[:, :, y.clamp(0, height - 1)][..., x.clamp(0, width - 1)]
    if padding == "zeros":
        inside = ((y >= 0) & (y < height))[:, None] & (x >= 0) & (x < width)
        found = found * inside
    return found


def slopes(image, x, y, padding):
    """Values, and derivatives by x and y, at whole places: to the next pixel; 0 on a border that pads."""
    value = pixels(image, x, y, padding)
    by_x = pixels(image, x + 1, y, padding) - value
    by_y = pixels(image, x, y + 1, padding) - value
    if padding == "border":
        by_x, by_y = by_x * (x > 0), by_y * (y > 0)[:, None]
    return value, by_x, by_y


def theta_gradient(g, by_x, by_y, size, align_corners):
    """d theta, (N, 2, 3), from d output and the slopes, by the chain rule."""
    n = [width - align_corners for width in reversed(size)]
    base = [(2 * torch.arange(width).double() - (width - 1)) / max(k, 1) for width, k in zip(size[::-1], n)]
    rows = []
    for slope, k in zip((by_x, by_y), n):
        by_place = (g * slope).sum(1) * k / 2
        columns = by_place * base[0], by_place * base[1][:, None], by_place
        rows.append(torch.stack([column.sum((1, 2)) for column in columns], -1))
    return torch.stack(rows, 1)


WHOLE_SIZES = [(1, 7), (6, 1), (9, 8), (17, 70)]


@pytest.mark.parametrize("padding", ["zeros", "border"])
@ALIGN
def test_whole_pixel_maps_read_and_slope_as_in_float64(device, align_corners, padding):
    """Samples and d image are pixels, to the bit; slopes in d theta are all of the same side of kinks."""
    for size in WHOLE_SIZES:
        maps = exact_maps(size, align_corners)
        thetas = torch.stack([theta for theta, _ in maps.values()]).to(device).requires_grad_()
        images = torch.randn(len(maps), 2, *size).to(device).requires_grad_()
        g = torch.randn(len(maps), 2, *size)
        for mode in ("bilinear", "nearest", "bicubic") if size == WHOLE_SIZES[-1] else ("bilinear",):
            output = stn.affine_grid_sample(images, thetas, size, mode, padding, align_corners)
            by_image, by_theta = torch.autograd.grad(output, (images, thetas), g.to(device))
            for i, (name, (_, rows)) in enumerate(maps.items()):
                x, y = (
                    (torch.arange(width) if slope > 0 else width - 1 - torch.arange(width)) + shift
                    for (slope, shift), width in zip(rows, reversed(size))
                )
                image = images[i : i + 1].detach().cpu().double().requires_grad_()
                value, *by_place = slopes(image, x, y, padding)
                assert output[i].detach().cpu().double().equal(value[0].detach()), (size, mode, name)
                (wanted,) = torch.autograd.grad(value, image, g[i : i + 1].double())
                if padding == "zeros":  # each pixel is read once: no sum that rounds
                    assert by_image[i].cpu().double().equal(wanted[0]), (size, mode, name)
                else:
                    assert_close(by_image[i], wanted[0])
                if mode == "bilinear":
                    exact = theta_gradient(
                        g[i : i + 1].double(), *(slope.detach() for slope in by_place), size, align_corners
                    )
                    assert_close(by_theta[i], exact[0], scale=max(size) * g[i].norm().item())


def test_theta_gradient_of_noise_at_the_identity(device):
    """Where spatial transformers begin: 784 samples that all lie on kinks, of which each side has a slope."""
    image = torch.randn(1, 1, 28, 28)
    g = torch.randn(1, 1, 28, 28)
    theta = torch.eye(2, 3, device=device)[None].requires_grad_()
    output = stn.affine_grid_sample(image.to(device), theta)
    (found,) = torch.autograd.grad(output, theta, g.to(device))
    o = torch.arange(28)
    _, by_x, by_y = slopes(image.double(), o, o, "zeros")
    exact = theta_gradient(g.double(), by_x, by_y, (28, 28), False)
    assert (found.cpu() - exact).abs().max() < 1e-6 * g.norm() * 28
    # a slope from the other side at one place alone would be seen
    other = theta_gradient(g.double(), by_x.roll(1, -1), by_y, (28, 28), False)
    assert (other - exact).abs().max() > 1


@pytest.mark.parametrize("padding", ["zeros", "border"])
@ALIGN
def test_whole_and_half_pixel_flows_read_as_in_float64(device, align_corners, padding):
    """Whole flows give pixels, half ones means of two or, nearest, the even one; the gradients likewise."""
    for size in [(1, 1), (3, 1), (4, 100), (9, 37)]:
        shifts = torch.tensor([[0, 0], [1, -2], [-1, 3], [0.5, 0.5], [-1.5, 2.5], [0.5, 0]])
        flow = shifts[:, :, None, None].expand(-1, -1, *size).contiguous().to(device).requires_grad_()
        image = torch.randn(1, 2, *size)
        batch = image.expand(len(shifts), -1, -1, -1).to(device)
        g = torch.randn(len(shifts), 2, *size)
        output = stn.flow_grid_sample(batch, flow, "bilinear", padding, align_corners)
        (by_flow,) = torch.autograd.grad(output, flow, g.to(device))
        nearest = stn.flow_grid_sample(batch, flow, "nearest", padding, align_corners)
        for i, (shift_x, shift_y) in enumerate(shifts.tolist()):
            x, y = (torch.arange(width) for width in reversed(size))
            even_x, even_y = ((o + shift).round().long() for o, shift in ((x, shift_x), (y, shift_y)))
            picked = pixels(image, even_x, even_y, padding)
            assert nearest[i].detach().cpu().equal(picked[0]), (size, shift_x, shift_y)
            x, y = x + math.floor(shift_x), y + math.floor(shift_y)
            value, *by_place = slopes(image.double(), x, y, padding)
            if shift_x % 1 == 0 == shift_y % 1:
                assert output[i].detach().cpu().double().equal(value[0]), (size, shift_x, shift_y)
                wanted = torch.stack([(g[i].double() * slope[0]).sum(0) for slope in by_place])
                assert_close(by_flow[i], wanted)
            else:
                t_x, t_y = shift_x % 1, shift_y % 1
                rows = [
                    (1 - t_x) * pixels(image.double(), x, y + k, padding)
                    + t_x * pixels(image.double(), x + 1, y + k, padding)
                    for k in (0, 1)
                ]
                assert_close(output[i].detach(), ((1 - t_y) * rows[0] + t_y * rows[1])[0])
