"""The compiler takes every specialisation that the interpreter ran, for GPUs that need not be there."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARDS = 12  # each of one target: CI divides them among versions of Triton


def compile_specialisations(*arguments):
    """Runs the module in a process of its own: here the kernels belong to the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "bench.specialisations", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)


@pytest.mark.parametrize("shard", range(1, SHARDS + 1))
def test_specialisations_compile(shard):
    """Every pair of options, for each GPU in turn; `make compile` is the full product."""
    result = compile_specialisations("--shard", f"{shard}/{SHARDS}")
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failed" in result.stdout


def test_every_pair_of_options_is_compiled():
    """The subset really holds each possible pair, and each case is a possible one."""
    pytest.importorskip("triton", reason="bench.specialisations calls the launchers, which are Triton's")
    from bench import specialisations

    cases, possible = list(specialisations.pairwise_cases()), specialisations.possible
    assert all(map(possible, cases))
    for kernel, axes in specialisations.SUBSET_AXES.items():
        of_kernel = [case for case in cases if case["kernel"] == kernel]
        for a, b in itertools.combinations(axes, 2):
            pairs = set(itertools.product(axes[a], axes[b]))
            for x, y in pairs - {(case[a], case[b]) for case in of_kernel}:
                assert not possible({a: x, b: y}), (kernel, a, x, b, y)


SPLINE = """
import itertools, torch
from bench import assembly, report, specialisations
from stn_triton.kernels import sample
from stn_triton.kernels.modes import Interpolation, Padding, Source
for (controls, batch), backward in itertools.product(((16, 1), (64, 4)), (False, True)):
    image = torch.empty(batch, 3, 256, 256, device="meta")
    spline = torch.empty(batch, controls + 3, 2, device="meta"), torch.empty(controls, 2, device="meta")
    modes = Source.TPS, Interpolation.BILINEAR, Padding.ZEROS, False
    with specialisations.compiling("sm_90") as compiled:
        if backward:
            sample.sample_backward(image, image, *spline, torch.empty_like(image), *modes, True)
        else:
            sample.sample_forward(image, *spline, torch.empty_like(image), *modes)
        kernel = compiled[-1]
    instructions = report._read(kernel)[0]
    counted = assembly.traffic(instructions)
    assert counted.spill_stores == counted.spill_loads == 0, ("spills", controls, batch, backward)
    assert not counted.special["lg2"], "the hardware's logarithm is not exact enough"
    logs = report.logarithms(instructions)
    if not backward and batch == 4:  # the loop over control points, not unrolled: four pixels a lane
        assert logs == 4, logs
    assert logs > 0
    print(controls, batch, backward, logs)
"""


def test_splines_share_logarithms_and_do_not_spill():
    """On sm_90: one logarithm for each (pixel, control point), shared by four images; registers suffice."""
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists():
        pytest.skip("this Triton carries no disassembler")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", SPLINE]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 4
