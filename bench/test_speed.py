"""Ours on the registry's cases, for pytest-benchmark: ``make bench``. Two runs are compared by
``make bench ARGS=--benchmark-compare``, which fails with ``--benchmark-compare-fail=median:10%``.

A call is a graph's replay and the wait for its end, without the flush of ``bench.sweep``: for regressions,
not for publication. Without a GPU the same cases run on few pixels.
"""

import pytest
import torch

from bench import machine, rivals, timing
from bench.cases import CASES, make_inputs


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_speed(benchmark, case):
    device = machine.accelerator() or torch.device("cpu")
    run = case if device.type != "cpu" else case.small()
    with timing.own_stream(device):
        inputs = make_inputs(run, device)
        call = rivals.prepare(run, rivals.OURS, inputs)
        rivals.check(run, rivals.OURS, rivals.errors(call(), rivals.exact(run, inputs)))
        benchmark.group = case.row
        benchmark.extra_info["bytes"] = rivals.fewest_bytes(run, inputs)
        benchmark(timing.finished(call, device))
