"""The PTX that Triton compiles for a GPU computes what float64 does, and touches nothing but its tensors.

``bench.executor`` runs it on the CPU: no GPU is needed. The cases cover every kernel, source, interpolation,
padding, dtype and layout, in 2-D and 3-D; sizes end inside tiles, and coordinates are NaN, infinite and huge
among others. ``make test`` runs the first cases under the oldest Triton too.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Case(NamedTuple):
    """One problem.

    ``task``: of the sampler, "first" derivatives, the same "sorted", or "second" ones and forward mode; or
    its samples alone, with a "fill"; or the "grid" of coordinates alone. ``mode``: "averaged" is
    ``antialias``. ``bad``: some coordinates are no numbers, or huge.
    """

    task: str
    source: str
    mode: str = "bilinear"
    padding: str = "zeros"
    dims: int = 2
    channels: int = 3
    layout: str = "contiguous"
    dtype: str = "float32"
    params_dtype: str = "float32"
    bad: bool = False
    mild: bool = False  # the image and its warp of one size, turned a little


OLDEST = (
    Case("first", "affine", "bilinear", "zeros", 2, 8, "channels_last", "float16"),
    Case("first", "grid", "bilinear", "zeros", 2, 5, "sliced", bad=True),
    Case("sorted", "flow", "nearest", "border", 2, 3, "offset", "bfloat16"),
)
CASES = (
    *OLDEST,
    Case("first", "affine", "bilinear", "zeros", 3, 1, "contiguous", "float64", "float64"),
    Case("first", "affine", "bilinear", "zeros", 3, 2, "sliced", mild=True),
    Case("first", "affine", "bilinear", "border", 3, 8, "channels_last", "float16", mild=True),
    Case("first", "affine", "bilinear", "reflection", 2, 1, "contiguous"),
    Case("first", "affine", "bilinear", "circular", 2, 3, "offset"),
    Case("sorted", "flow", "bicubic", "circular", 2, 1, "contiguous"),
    Case("first", "projective", "bilinear", "zeros", 2, 3, "offset", bad=True),
    Case("first", "tps", "bicubic", "border", 2, 5, "contiguous"),
    Case("first", "flow", "bilinear", "reflection", 3, 8, "channels_last", bad=True),
    Case("first", "grid", "nearest", "border", 3, 1, "contiguous", "bfloat16", "bfloat16"),
    Case("sorted", "grid", "bilinear", "reflection", 2, 8, "channels_last", "float64", "float64", bad=True),
    Case("second", "grid", "bilinear", "border", 2, 8, "channels_last"),
    Case("fill", "flow", "bilinear", "zeros", 2, 16, "channels_last", "uint8", bad=True),
    Case("fill", "affine", "bicubic", "border", 3, 3, "offset", "int16"),
    Case("fill", "projective", "bilinear", "border", 2, 3, "sliced", "float16", bad=True),
    Case("first", "affine", "averaged", "zeros", 2, 3, "offset"),
    Case("first", "projective", "averaged", "border", 2, 8, "channels_last", "float16", bad=True),
    Case("grid", "affine", dims=3),
    Case("grid", "tps"),
)


def describe(case):
    return "-".join(str(value) for value in case if value is not False)


def python(script, *arguments):
    """Runs a script in a process of its own: here the kernels belong to the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    command = [sys.executable, "-W", "ignore", str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("cases", [OLDEST, CASES[len(OLDEST) :]], ids=["every_triton", "newest"])
def test_compiled_code_is_right_and_stays_in_its_tensors(cases):
    pytest.importorskip("triton")
    result = python(__file__, *map(CASES.index, cases))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(": right") == len(cases)


STRAY = """
import torch, triton, triton.language as tl
from bench import execution, executor, specialisations
from stn_triton.kernels.host.launch import Plan

@triton.jit
def shift(source, target, n, by, N: tl.constexpr, TOGETHER: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(source + i + by, i < n)
    tl.store(target + i, x + tl.sum(x, 0) if TOGETHER else x, i < n)

def launch(kernel, programs, device, source, target, *args, **kwargs):
    Plan(kernel, programs, device, source, target, *args, **kwargs)(source, target)

x, y = torch.randn(1024), torch.zeros(1024)
with execution.executing() as runs:
    launch(shift, 4, x.device, x, y, 1024, 0, N=256, TOGETHER=False)
    assert torch.equal(x, y)
    loads = runs[0].counts.traffic["load"]
    assert (loads.sectors, loads.lines, loads.wavefronts) == (128, 32, 32), vars(loads)
    assert (runs[0].counts.fetched, runs[0].counts.exchanges, loads.idle) == (128, 0, 0)
    launch(shift, 1, x.device, x[:9], y[:9], 9, 0, N=256, TOGETHER=True)
    torch.testing.assert_close(y[:9], x[:9] + x[:9].sum())
    loads = runs[1].counts.traffic["load"]  # of one warp; the others' lanes are masked, and they ask too
    assert loads.requests >= 1 and loads.idle >= 3 and loads.wavefronts == loads.requests + loads.idle
    assert runs[1].counts.fetched == 2 and runs[1].counts.exchanges > 4, vars(runs[1].counts)
    for source, n, by in ((x, 1024, 1), (x, 1024, -1), (x[:9], 9, 1), (x[::2], 512, 0)):
        try:
            launch(shift, 4, x.device, source, y, n, by, N=256, TOGETHER=False)
        except executor.Fault as fault:
            assert "of source" in str(fault), fault
        else:
            raise AssertionError((n, by))

# what is executed has no machine code: whoever wants to launch it compiles it anew
with specialisations.compiling("sm_90") as compiled:
    launch(shift, 4, x.device, x, y, 1024, 0, N=256, TOGETHER=False)
assert compiled[-1].asm["cubin"].startswith(b"\x7fELF")
"""


def test_stray_accesses_are_seen_and_traffic_is_counted(tmp_path):
    """Of the executor itself: sums over warps, neighbours of a view, gaps of a slice, both ends."""
    script = tmp_path / "stray_kernels.py"  # Triton reads a kernel's source from its file
    script.write_text(STRAY)
    result = python(script)
    assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------------------------ in the other process
IN_SIZE = {2: (33, 17), 3: (4, 5, 6)}
SIZE = {2: (21, 45), 3: (3, 4, 35)}


def sizes_of(case):
    """The image's and the output's."""
    return ((5, 6, 34),) * 2 if case.mild else (IN_SIZE[case.dims], SIZE[case.dims])


def problem(case):
    """The sampler or grid as a function of (image, parameters), and both."""
    import torch
    from common import place, random_grid, random_theta

    import stn_triton as stn

    dims, (in_size, size) = case.dims, sizes_of(case)
    image, fill = torch.randn(2, case.channels, *in_size), None
    if case.task == "fill":
        image, fill = 60 * image.abs(), 300 * torch.rand(2, case.channels) - 50
    image = image.to(getattr(torch, case.dtype))
    image = place(image, case.layout, 77 if case.task == "fill" else float("nan"))
    dtype = getattr(torch, case.params_dtype)
    if case.source == "grid":
        params = random_grid(2, size, image.dtype, "cpu")
    elif case.source == "flow":
        params = (1.5 * torch.randn(2, dims, *size)).to(dtype)
    elif case.mild:  # two outputs along z of the first image, three of the second
        params = torch.eye(3, 4).repeat(2, 1, 1)
        params[:, 0, 1], params[:, 1, 0], params[1] = 0.03, -0.5, params[1] * 0.8
        params[:, :, 3] = torch.tensor([0.02, -0.07, 0.03])
        params = params.to(dtype)
    elif case.source == "affine":
        params = random_theta(2, dims, dtype, "cpu")
    elif case.source == "projective":
        params = (torch.eye(3) + 0.1 * torch.randn(2, 3, 3)).to(dtype)
    else:
        params = (stn.transforms.control_lattice(3) + 0.2 * torch.randn(2, 9, 2)).to(dtype)
    if case.bad:
        bad = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -(2.0**31), 1e-40])
        if case.source in ("grid", "flow"):
            params.view(-1)[: len(bad)] = bad.to(params.dtype)
        else:  # in the first image's matrix
            params[0, 0, :2] = bad[:2].to(params.dtype)
    if case.task == "grid":
        make = getattr(stn, f"{case.source}_grid")
        return (lambda _, params: make(params, (2, 1, *size), align_corners=False)), image, params
    options = {"mode": case.mode, "padding_mode": case.padding, "align_corners": False}
    if fill is not None:
        options["fill"] = fill
    if case.mode == "averaged":
        options |= {"mode": "bilinear", "antialias": True}
    name = "grid_sample" if case.source == "grid" else f"{case.source}_grid_sample"
    rest = () if case.source in ("grid", "flow") else (size,)
    function = getattr(stn, name)
    return (lambda image, params: function(image, params, *rest, **options)), image, params


def results(function, case, image, params, cotangent, directions):
    """The value, both gradients, and what else a case asks for."""
    import torch

    if case.task == "fill":
        return [function(image, params)]
    leaves = [tensor.detach().requires_grad_() for tensor in (image, params)]
    value = function(*leaves)
    wanted = leaves[1:] if case.task == "grid" else leaves[:1] if case.mode == "nearest" else leaves
    second = case.task == "second"
    found = torch.autograd.grad(value, wanted, cotangent.to(value.dtype), create_graph=second)
    if second:
        inner = sum((one * other.to(one.dtype)).sum() for one, other in zip(found, directions))
        along = torch.func.jvp(function, (image, params), tuple(directions))[1]
        found = (*found, *torch.autograd.grad(inner, leaves), along)
    return [tensor.detach() for tensor in (value, *found)]


def check(case):
    import torch
    from common import assert_close, away_from_kinks

    from bench.execution import executing
    from stn_triton import backend

    torch.manual_seed(0)
    function, image, params = problem(case)
    _, size = sizes_of(case)
    wide = image.double(), params.double()
    with backend.use("torch"):
        kept = torch.ones(2, 1, *size, dtype=torch.bool)
        # kinks: float32 coordinates may be on their other side (of sub-samples few are, and count little)
        if case.task != "grid" and case.mode != "averaged":
            kept = smooth_pixels(case, wide, size, away_from_kinks)
        shape = (2, *size, case.dims) if case.task == "grid" else (2, case.channels, *size)
        cotangent = torch.randn(shape).to(image.dtype).double()
        cotangent = cotangent if case.task == "grid" else cotangent * kept
        directions = torch.randn(image.shape).to(image), 0.1 * torch.randn(params.shape).to(params)
        expected = results(function, case, *wide, cotangent, [each.double() for each in directions])
    torch.use_deterministic_algorithms(case.task == "sorted")
    with executing() as runs:
        actual = results(function, case, image, params, cotangent, directions)
    torch.use_deterministic_algorithms(False)
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        if case.task != "grid" and one.shape == cotangent.shape:
            one, other = (torch.where(kept, each, 0) for each in (one, other))
        if case.bad and number > 1:  # by parameters that are no numbers
            finite = one.isfinite() & other.isfinite()
            one, other = (torch.where(finite, each, 0) for each in (one, other))
        assert torch.equal(one.isnan(), other.isnan()), number
        if not one.is_floating_point():
            info = torch.iinfo(one.dtype)
            assert (one - other.clamp(info.min, info.max)).abs().max() <= 0.5 + 3e-3
            continue
        try:
            assert_close(one.nan_to_num(), other.nan_to_num(), scale=10.0 if case.task == "second" else None)
        except AssertionError as error:
            where = (one - other).abs().nan_to_num().argmax()
            raise AssertionError(f"result {number}, element {where}: {error}") from None
    return runs


def smooth_pixels(case, wide, size, away_from_kinks):
    """(N, 1, *size): pixels that are read away from kinks, and at numbers."""
    import torch.nn.functional as F
    from test_sources import exact_grid

    params = wide[1]
    in_size, _ = sizes_of(case)
    if case.source == "grid":
        grid = params
    elif case.source == "affine":
        grid = F.affine_grid(params, [2, 1, *size], False)
    else:
        grid = exact_grid(case.source, params, size, in_size, False)
    numbers = grid.nan_to_num(0.01, 0.01, 0.01).clamp(-1e4, 1e4)
    band = 5e-4 if case.dtype == "float32" or case.params_dtype == "float32" else 1e-6
    smooth = away_from_kinks(numbers, in_size, case.mode, False, band)
    huge = (grid.isfinite() & (grid.abs() > 1e4)).any(-1)  # which only zeros tell from others exactly
    return ((smooth | ~grid.isfinite().all(-1)) & ~huge).unsqueeze(1)


def main(numbers):
    sys.path.insert(0, str(ROOT / "tests"))
    import time

    for number in numbers:
        start = time.process_time()
        try:
            runs = check(CASES[number])
        except Exception as error:
            print(f"{describe(CASES[number])}: {type(error).__name__}: {error}", flush=True)
            if len(numbers) == 1:
                raise
            continue
        instructions = sum(run.counts.instructions for run in runs)
        seconds = time.process_time() - start
        print(
            f"{describe(CASES[number])}: right; {len(runs)} launches, {instructions} instructions, "
            f"{seconds:.1f} s of one core",
            flush=True,
        )


if __name__ == "__main__":
    main(list(map(int, sys.argv[1:])))
