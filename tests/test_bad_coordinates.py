"""Coordinates that mean nothing: NaN, infinities, and what no int32 and no float32 can place.

``grid_sample``'s docstring says what they read. With zeros padding: nothing. With border padding: NaN the
first pixel, all else the border it is beyond. With reflection and circular padding: NaN and infinities the
place of coordinate -1; finite ones some pixel of the image. What they read has no slope, but with circular
padding, where it is the place's, for the image has no edge.
"""

import itertools
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from common import MODES, NAN, PADDINGS, affine_witness, assert_close, padding_of, pairwise
from test_padding import witness_of

import stn_triton as stn

pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid"),
]

INF = float("inf")
LARGEST = torch.finfo(torch.float32).max
NONFINITE = (NAN, INF, -INF)
HUGE = (1e30, -1e30, 2.0**31, -(2.0**31), 2.0**24, -(2.0**24), LARGEST, -LARGEST)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# A plain size, and sizes of one pixel, on which aligned corners make every coordinate mean that pixel.
SIZES = {2: ((5, 7), (1, 4), (1, 1)), 3: ((3, 5, 4), (4, 1, 3), (1, 1, 1))}
PLACED = 0.31  # the other components of a coordinate: inside, and at no kink


def bad_grid(values, dims, dtype, device):
    """(1, ..., dims), each value in one component and in all of them; and which components are bad."""
    rows, bad = [], []
    for value in values:
        for components in (*[(k,) for k in range(dims)], tuple(range(dims))):
            rows.append([value if k in components else PLACED for k in range(dims)])
            bad.append([k in components for k in range(dims)])
    shape = (1, *[1] * (dims - 1), len(rows), dims)
    return torch.tensor(rows, dtype=dtype, device=device).view(shape), torch.tensor(bad).view(shape)


def sample(input, grid, *modes):
    """The samples and both gradients; the gradient of each sample is 1 or more."""
    input, grid = input.detach().requires_grad_(), grid.detach().requires_grad_()
    output = stn.grid_sample(input, grid, *modes)
    weights = torch.linspace(1, 2, output.numel(), device=output.device).view(output.shape).to(output.dtype)
    return output.detach(), weights, *torch.autograd.grad(output, (input, grid), weights)


def paddings_of(padding, dims):
    return (padding,) * dims if isinstance(padding, str) else padding


def values_for(padding):
    """Those whose place is told: huge ones are, where padding repeats the image, somewhere in it."""
    repeats = {"reflection", "circular"}.intersection(paddings_of(padding, 1))
    return NONFINITE if repeats else (*NONFINITE, *HUGE)


def sense(grid, in_size, padding, align_corners):
    """Finite coordinates, by the documented rules, that read the same; and which components are still there.

    Written out by cases, and not as either backend computes it.
    """
    sane, free = grid.double().cpu().clone(), torch.ones_like(grid, dtype=torch.bool, device="cpu")
    for k, (size, rule) in enumerate(zip(reversed(in_size), paddings_of(padding, len(in_size)))):
        x = sane[..., k].clone()
        extent = size - int(align_corners)
        if extent == 0:  # a finite number of zero extents is the one pixel; NaN and infinities are no number
            sane[..., k] = torch.where(x.isfinite(), 0.0, -9.0 if rule == "zeros" else 0.0)
            if rule == "zeros":
                free[..., k] = x.isfinite()
            continue
        far = ~(x.abs() < 2.0**20)
        if rule == "zeros":  # nothing is read 9 image widths off
            sane[..., k] = torch.where(far, -9.0, x)
        elif rule == "border":
            sane[..., k] = x.nan_to_num(nan=-9.0).clamp(-9.0, 9.0)
        else:
            sane[..., k] = torch.where(far, -1.0, x)
        free[..., k] = ~far
    return sane, free


def expected(input, grid, weights, mode, padding, align_corners):
    """As ``sample``, in float64, from finite coordinates."""
    sane, free = sense(grid, input.shape[2:], padding, align_corners)
    input, sane = input.double().cpu().requires_grad_(), sane.requires_grad_()
    # PyTorch has no coordinate beside an axis of one pixel
    sizes = zip(reversed(input.shape[2:]), paddings_of(padding, grid.shape[-1]))
    single = torch.tensor([align_corners and size == 1 and each == "zeros" for size, each in sizes])
    nothing = (~free & single).any(-1)
    output = witness_of(padding)(input, sane, mode, padding, align_corners)
    output = torch.where(nothing.unsqueeze(1), 0.0, output)
    by_input, by_grid = torch.autograd.grad(
        output, (input, sane), weights.double().cpu(), allow_unused=True, materialize_grads=True
    )
    return output.detach(), by_input, by_grid * free


@pairwise
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [*PADDINGS, "mixed"])
@pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_documented_values(either_backend, device, dims, mode, padding, align_corners, dtype):
    """Values and gradients are what the docstring says, on either backend, also on axes of one pixel."""
    padding = padding_of(padding, dims)
    values = values_for(padding)
    for in_size in SIZES[dims][: 1 if dims == 3 and mode == "bicubic" else None]:
        grid, bad = bad_grid(values, dims, dtype, device)
        input = (torch.rand(1, 2, *in_size) + 1).to(device, dtype)
        output, weights, by_input, by_grid = sample(input, grid, mode, padding, align_corners)
        value, into_input, into_grid = expected(input, grid, weights, mode, padding, align_corners)
        if mode == "nearest":
            into_grid = torch.zeros_like(into_grid)
        assert by_grid.isfinite().all()
        wrapped = torch.tensor([each == "circular" for each in paddings_of(padding, dims)])
        by_grid = torch.where(bad & wrapped, 0.0, by_grid.cpu())
        assert_close(output, value)
        assert_close(by_input, into_input)
        assert_close(by_grid, into_grid)
        if padding == "zeros" and 1 not in in_size:
            assert (output == 0).all()
            assert (by_input == 0).all()
            assert (by_grid == 0).all()
        # a slope along a coordinate that is not there: 0 up to the rounding of weights that cancel
        assert by_grid[bad].abs().max() < 1e-2


@pairwise
@pytest.mark.parametrize("padding", ["reflection", "circular"])
@pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dims, dtype", [(2, dtype) for dtype in DTYPES] + [(3, torch.float32)])
def test_repetitions_of_huge_coordinates(either_backend, device, dims, mode, align_corners, padding, dtype):
    """Where float32 cannot tell which pixel is meant, it is one of the image: nothing is lost."""
    for in_size in SIZES[dims][: 1 if dims == 3 and mode == "bicubic" else None]:
        grid, _ = bad_grid(HUGE, dims, dtype, device)
        input = (torch.rand(1, 2, *in_size) + 1).to(device, dtype)
        output, weights, by_input, by_grid = sample(input, grid, mode, padding, align_corners)
        # cubic weights sum to 1, their absolute values to 1.375 at most
        overshoot = 1.375**dims if mode == "bicubic" else 1.0
        slack = 1e-2
        assert output.isfinite().all()
        assert output.abs().max() <= 2 * overshoot + slack
        if mode != "bicubic":
            assert output.min() >= 1 - slack
        assert by_grid.isfinite().all()
        assert by_input.isfinite().all()
        # the weights of every sample sum to 1
        total, given = by_input.double().sum(), weights.double().sum()
        assert abs(total - given) <= 1e-2 * given


@pairwise
@pytest.mark.parametrize("padding", ["reflection", "mixed"])
@pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])
@pytest.mark.parametrize("mode", MODES)
def test_float64_repeats_what_it_can_place(either_backend, device, mode, align_corners, padding):
    """2^31 is an exact float64, and so is where it is in the image: here it is read there."""
    padding = padding_of(padding, 2)
    input = torch.rand(1, 2, 4, 8, dtype=torch.float64, device=device)
    reach = torch.tensor([2.0**24, 2.0**24 + 0.3, -(2.0**31) + 0.3, 2.0**31 + 0.7], dtype=torch.float64)
    grid = torch.stack([reach, reach.flip(0) + 0.21], -1).view(1, 1, -1, 2).to(device)
    output = stn.grid_sample(input, grid, mode, padding, align_corners)
    difference = output.cpu() - witness_of(padding)(input.cpu(), grid.cpu(), mode, padding, align_corners)
    assert difference.abs().max() < 1e-5  # 2^31 pixels at a resolution of 2^-20


# ------------------------------------------------------------------------------------------- affine
@pairwise
@pytest.mark.parametrize("padding", ["zeros", "border", "mixed"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dims", [2, 3])
def test_bad_theta(either_backend, device, dims, mode, padding):
    """An entry of theta that is NaN or infinite: nothing but its own row's coordinates is bad."""
    padding = padding_of(padding, dims)
    entries = list(itertools.product(range(dims), range(dims + 1)))
    if dims == 3 and mode == "bicubic":
        entries = entries[::4]
    values = itertools.cycle(NONFINITE)
    theta = torch.eye(dims, dims + 1).mul(0.7).repeat(1, len(entries), 1, 1)
    theta[..., -1] = 0.123
    for t, (row, column) in enumerate(entries):
        theta[0, t, row, column] = next(values)
    in_size, out_size = SIZES[dims][0], (2, 3, 4)[-dims:]
    input = torch.rand(1, 2, *in_size)
    image, params = input.to(device).requires_grad_(), theta.to(device).requires_grad_()
    output = stn.affine_grid_sample(image, params, out_size, mode, padding, False)
    by_input, by_theta = torch.autograd.grad(output, (image, params), torch.ones_like(output))
    for result in (output, by_input, by_theta):
        assert result.isfinite().all()

    grid = affine_witness(theta[0], out_size, False)
    values = input.expand(len(entries), *input.shape[1:]).double()
    weights = torch.ones(len(entries), 2, *out_size)
    value, into_input, _ = expected(values, grid, weights, mode, padding, False)
    assert_close(output.detach(), value.unsqueeze(0))
    assert_close(by_input, into_input.sum(0, keepdim=True))
    if padding == "zeros":  # each row is bad at all pixels but those whose coordinate is 0 times infinity
        for t, (row, _) in enumerate(entries):
            assert by_theta[0, t, row].abs().max() == 0


@pairwise
@pytest.mark.parametrize("padding", ["zeros", "border", "mixed"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])
def test_huge_theta(either_backend, device, mode, padding, align_corners):
    """Entries up to the largest float32, whose products are infinite: finite results of a finite image."""
    padding = padding_of(padding, 2)
    for in_size in SIZES[2]:
        theta = torch.eye(2, 3).repeat(1, 4, 1, 1)
        theta[0, 0, 0, 0], theta[0, 1, 1, 2], theta[0, 2, 0] = 1e30, -LARGEST, 2.0**31
        theta[0, 3] = LARGEST
        image = (torch.rand(1, 2, *in_size) + 1).to(device).requires_grad_()
        params = theta.to(device).requires_grad_()
        output = stn.affine_grid_sample(image, params, (3, 5), mode, padding, align_corners)
        by_input, by_theta = torch.autograd.grad(output, (image, params), torch.ones_like(output))
        for result in (output, by_input, by_theta):
            assert result.isfinite().all()
        assert output.abs().max() <= 2 * (1.375**2 if mode == "bicubic" else 1) + 1e-3
        if padding != "zeros":
            assert abs(by_input.sum().item() - output.numel()) < 1e-2


def test_huge_entry_of_the_middle(either_backend, device):
    """On an axis of one output pixel an entry is multiplied by 0: as good as any other, if it is finite."""
    image = torch.rand(1, 2, 6, 9).to(device)
    theta = torch.tensor([[[0.7, -0.2, -0.2], [0.3, 1.1, -0.2]]])
    expected = stn.affine_grid_sample(image, theta.to(device), (7, 1))
    theta[0, :, 0] = 1e30
    assert_close(stn.affine_grid_sample(image, theta.to(device), (7, 1)), expected)


# ------------------------------------------------------------------------------------ in a process
def run_alone(script, **environment):
    import os

    environment = {**os.environ, "PYTHONPATH": str(Path(stn.__file__).parent.parent), **environment}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_cpu_survives_infinite_coordinates():
    """PyTorch's CPU backward writes outside the image there, and often ends the process; ours must not."""
    result = run_alone(
        """
        import itertools, torch
        import stn_triton as stn
        from stn_triton import backend

        assert backend.select("cpu").name == "torch"
        torch.manual_seed(0)
        inf, nan = float("inf"), float("nan")
        cases = itertools.product(
            (2, 3), ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection"), (False, True),
            (inf, -inf, nan, 1e30, -1e30, 2.0**31, 3.4e38),
        )
        dtypes = itertools.cycle((torch.float32, torch.float64, torch.float16))  # each meets each value
        for (dims, mode, padding, align_corners, value), dtype in zip(cases, dtypes):
            input = torch.rand(2, 3, *(4, 3, 2)[-dims:]).to(dtype).requires_grad_()
            grid = torch.rand(2, *(4, 3, 5)[-dims:], dims).to(dtype) * 2 - 1
            value = torch.tensor(value, dtype=torch.float64).to(dtype)  # a number would have to fit
            grid[0, ..., 0] = value
            grid[1] = value
            grid.requires_grad_()
            output = stn.grid_sample(input, grid, mode, padding, align_corners)
            output.sum().backward()
            assert output.isfinite().all() and input.grad.isfinite().all() and grid.grad.isfinite().all()
            theta = torch.eye(dims, dims + 1, dtype=dtype).repeat(2, 1, 1)
            theta[0, 0, 0] = theta[1, -1, -1] = value
            theta.requires_grad_()
            output = stn.affine_grid_sample(input, theta, None, mode, padding, align_corners)
            output.sum().backward()
            assert output.isfinite().all() and theta.grad.isfinite().all()
        print("survived")
        """,
        TRITON_INTERPRET="0",
        CUDA_VISIBLE_DEVICES="",
    )
    assert result.returncode == 0, f"exit status {result.returncode}:\n{result.stderr[-3000:]}"
    assert result.stdout.strip() == "survived"
