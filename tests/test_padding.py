"""What a padding promises to the rest of the kernels.

The whole of a padding is arithmetic on one axis (``device/padding.py``): ``pad_index`` says which pixel is
read in place of another, and everything else must agree with it. So a padding that is added is right in all
kernels if these tests pass. A lane for each (index, fraction), a program for each size.
"""

import pytest
import torch
import triton
import triton.language as tl

from stn_triton.kernels.device import copies, interpolation, padding
from stn_triton.kernels.modes import Interpolation, Padding, Source
from stn_triton.kernels.sort import axis_cell
from stn_triton.kernels.spec import Place, Spec

SIZES = range(1, 10)
FAR = 2**30
PADDINGS = pytest.mark.parametrize("padding_mode", list(Padding), ids=lambda p: p.name.lower())
# How far from a place the pixels are that it reads.
RADIUS = {Interpolation.NEAREST: 0.5, Interpolation.BILINEAR: 1.0, Interpolation.BICUBIC: 2.0}
ALIGN = pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])


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
    index_ptr, fraction_ptr, whole_ptr, place_index_ptr, place_fraction_ptr, tap_ptr, cell_ptr,
    count, SPEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of places (index, fraction) on an axis of program_id + 1 pixels, for each program:

    whole_ptr: ``pad_index`` of the index, of that again, and of the index above.
    place_index_ptr, place_fraction_ptr: ``pad_place``'s place; its slope after the fraction.
    tap_ptr: pixels and whether they are read, of each tap.
    cell_ptr: the sorted backward's cell, and whether anything is read from there.
    """
    TAPS: tl.constexpr = interpolation.tap_count(SPEC)
    size = tl.program_id(0) + 1
    lane = tl.arange(0, BLOCK)[:, None]
    mask = lane < count
    place = Place(tl.load(index_ptr + lane, mask, other=0), tl.load(fraction_ptr + lane, mask, other=0.0))
    at = tl.program_id(0) * count + lane
    once = padding.pad_index(place[0], size, 0, SPEC)
    tl.store(whole_ptr + 3 * at, once, mask)
    tl.store(whole_ptr + 3 * at + 1, padding.pad_index(once, size, 0, SPEC), mask)
    tl.store(whole_ptr + 3 * at + 2, padding.pad_index(place[0] + 1, size, 0, SPEC), mask)
    padded, slope = padding.pad_place(place, size, 0, SPEC)
    tl.store(place_index_ptr + at, padded.index, mask)
    tl.store(place_fraction_ptr + 2 * at, padded.fraction, mask)
    tl.store(place_fraction_ptr + 2 * at + 1, slope, mask)
    taps = interpolation.axis_taps(place, size, 0, SPEC)
    for k in tl.static_range(TAPS):
        inside = tl.zeros(place[0].shape, tl.int1) | taps.inside[k]
        tl.store(tap_ptr + 2 * (TAPS * at + k), taps.index[k], mask)
        tl.store(tap_ptr + 2 * (TAPS * at + k) + 1, inside.to(tl.int32), mask)
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

        results = (
            buffer(3),
            buffer(),
            buffer(2, dtype=torch.float32),
            buffer(taps, 2),
            buffer(2),
        )
        padding_kernel[(sizes,)](
            index.to(device), fraction.to(device), *results, count, spec, triton.next_power_of_2(count)
        )
        self.whole, self.index, place, self.taps, self.cell = (result.cpu() for result in results)
        self.fraction, self.slope = place.double().unbind(-1)


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


@PADDINGS
@ALIGN
def test_padding(device, padding_mode, align_corners):
    index, fraction = random_places()
    spec = spec_of(padding_mode, align_corners)
    found = Padded(device, spec, index, fraction)
    for k, size in enumerate(SIZES):
        once, twice, above = found.whole[k].unbind(-1)
        inside = (index >= 0) & (index < size)
        assert once[inside].equal(index[inside]), "pixels of the image stand for themselves"
        assert twice.equal(once), "pad_index is idempotent"
        if padding_mode != Padding.ZEROS:
            assert ((once >= 0) & (once < size)).all(), "pad_index stays in the image"

        # the linear interpolation of padded pixels is that of pad_place's two, of which one may not exist
        image = torch.cat([torch.randn(size, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])

        def read(i, image=image, size=size):
            return image[torch.where((i >= 0) & (i < size), i, size).long()]

        t = fraction.double()
        wanted = (1 - t) * read(once) + t * read(above)
        i, t_padded = found.index[k], found.fraction[k]
        sample = (1 - t_padded) * read(i) + t_padded * read(i + 1)
        assert (sample - wanted).abs().max() < 1e-6, "pad_place agrees with pad_index"
        assert ((t_padded >= 0) & (t_padded <= 1)).all()

        # taps are pad_place's; those that are not read have no weight, or show what is not there
        taps, read_of = found.taps[k].unbind(-1)
        assert taps[:, 0].equal(i)
        assert taps[:, 1].equal(i + 1)
        first, second = (torch.where(r != 0, read(tap), 0.0) for tap, r in zip(taps.T, read_of.T))
        assert ((1 - t_padded) * first + t_padded * second - wanted).abs().max() < 1e-6
        touched = taps[read_of != 0]
        assert ((touched >= 0) & (touched < size)).all(), "taps that are read lie in the image"

        # between pixels the slope is that of the padded pixels
        between = (fraction > 0) & (fraction < 1)
        slope = found.slope[k] * (read(i + 1) - read(i))
        assert (slope - (read(above) - read(once)))[between].abs().max() < 1e-6, "slopes agree"


@PADDINGS
@ALIGN
@pytest.mark.parametrize("mode", list(Interpolation), ids=lambda m: m.name.lower())
def test_cells(device, padding_mode, align_corners, mode):
    """Of n taps, pixel q is read from cells q - n // 2 to q - n // 2 + n - 1, where the sorted sum looks."""
    index, fraction = random_places()
    found = Padded(device, spec_of(padding_mode, align_corners, mode), index, fraction)
    taps, read = found.taps.unbind(-1)
    cell, any_read = found.cell[..., None, :].unbind(-1)
    n = taps.shape[-1]
    assert (any_read != 0).equal((read != 0).any(-1, keepdim=True))
    distance = cell - (taps - n // 2)
    assert ((distance >= 0) & (distance < n))[read != 0].all()
    for k, size in enumerate(SIZES):
        assert ((cell[k] >= 0) & (cell[k] < size)).all()


@triton.jit
def copies_kernel(shown_ptr, of_ptr, SPEC: tl.constexpr, COPIES: tl.constexpr):
    """For each pixel of program_id + 1, and each copy from -COPIES // 2 on, where the pixel appears there:

    shown_ptr: which pixel is read in place of that, or -1 if it is no whole place.
    of_ptr: the copy in which that lies.
    """
    size = tl.program_id(0) + 1
    q = tl.arange(0, 16)[:, None]
    number = tl.arange(0, COPIES)[None, :] - COPIES // 2
    place = padding.place_of(
        copies.appearance(q.to(tl.float32), number.to(tl.float32), size, SPEC), size, 0, SPEC
    )
    at = (tl.program_id(0) * 16 + q) * COPIES + tl.arange(0, COPIES)[None, :]
    shown = padding.pad_index(place[0], size, 0, SPEC)
    tl.store(shown_ptr + at, tl.where(place[1] == 0.0, shown, -1))
    tl.store(of_ptr + at, copies.copy_of(place, size, SPEC))


@triton.jit
def readers_kernel(
    index_ptr, fraction_ptr, distance_ptr, weight_ptr, count, SPEC: tl.constexpr, BLOCK: tl.constexpr
):
    """Of places and pixels, [places, 16]: how far the place's copy shows the pixel from it, and weights."""
    size = tl.program_id(0) + 1
    lane = tl.arange(0, BLOCK)[:, None]
    mask = lane < count
    place = Place(tl.load(index_ptr + lane, mask, other=0), tl.load(fraction_ptr + lane, mask, other=0.0))
    q = tl.arange(0, 16)[None, :]
    number = copies.copy_of(place, size, SPEC)
    at = (tl.program_id(0) * count + lane) * 16 + q
    distance = place[0].to(tl.float32) - copies.appearance(
        q.to(tl.float32), number.to(tl.float32), size, SPEC
    )
    tl.store(distance_ptr + at, distance + place[1], mask)
    tl.store(weight_ptr + at, interpolation.pixel_weight(place, q, size, 0, SPEC), mask & (q < size))


@PADDINGS
@ALIGN
def test_copies(device, padding_mode, align_corners):
    """Where padding shows pixels again, each appears once in each copy, and copies are told apart.

    A place then reads only what its own copy shows within a radius: the gather looks for it there and nowhere
    else. Where padding does not, nothing but pixels at the border stands for others.
    """
    spec = spec_of(padding_mode, align_corners)
    index, fraction = random_places()
    if not value_of(copies.has_copies(spec)):
        found = Padded(device, spec, index, fraction)
        for k, size in enumerate(SIZES):
            outside = found.whole[k, (index < 0) | (index >= size), 0]
            assert not ((outside > 0) & (outside < size - 1)).any()
        return
    shown, of = (torch.zeros(len(SIZES), 16, 32, dtype=torch.int32, device=device) for _ in range(2))
    copies_kernel[(len(SIZES),)](shown, of, spec, 32)
    for k, size in enumerate(SIZES):
        q = torch.arange(size, dtype=torch.int32)[:, None]
        assert shown[k, :size].cpu().equal(q.expand(-1, 32))
        number = (torch.arange(32, dtype=torch.int32) - 16).expand(size, -1)
        # with corners aligned the outermost pixels lie between two copies, and belong to one of them
        alone = slice(1, -1) if align_corners else slice(None)
        assert of[k, :size].cpu()[alone].equal(number[alone])

    near = index.abs() < 2**15  # whose float32 coordinates are good to a small part of a pixel
    index, fraction = index[near], fraction[near]
    distance, weight = (torch.zeros(len(SIZES), len(index), 16, device=device) for _ in range(2))
    block = triton.next_power_of_2(len(index))
    for mode, radius in RADIUS.items():
        readers_kernel[(len(SIZES),)](
            index.to(device),
            fraction.to(device),
            distance,
            weight,
            len(index),
            spec_of(padding_mode, align_corners, mode),
            block,
        )
        assert (weight.sum(-1) > 0.99).all()
        far = (distance.abs() > radius + 1e-4) & (weight != 0)
        # of one pixel with aligned corners, whose copies have no length, every map reads the middle
        assert not far[1 if align_corners else 0 :].any(), mode.name
