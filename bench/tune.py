"""Tunes the kernels for this GPU, into kernels/tuned/: ``python -m bench.tune`` (``make tune``).

1. ``--workers`` processes run the registry's cases and compile for each all that the search will try first,
   into Triton's cache on disk; nothing is timed.
2. Alone on the GPU, every case runs inside ``stn_triton.autotune()`` until ``--budget-seconds`` are over;
   what is found is kept in ``--work``, where a second call goes on.
3. Every case is checked against float64 with the table in use. Only then is the table written: of each
   entry what differs from the rules, where it was faster.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import stn_triton as stn
from stn_triton.kernels.host import tables, tuning

from . import machine, rivals, timing
from .cases import CASES, QUICK, Case, make_inputs


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Inside, the search compiles what it would time and finds nothing faster."""
    from stn_triton.kernels.host import launch

    def compile_only(kernel: Any, programs: int, device: torch.device, *args: Any, **kwargs: Any) -> None:
        kernel.warmup(*args, grid=(programs,), **kwargs)

    def clock(run: Any, device: torch.device) -> float:
        before, launch.runner = launch.runner, compile_only
        try:
            run()
        finally:
            launch.runner = before
        return 1.0

    before, tuning.clock = tuning.clock, clock
    try:
        yield
    finally:
        tuning.clock = before


def run(case: Case, device: torch.device) -> None:
    """Ours, once."""
    with timing.own_stream(device):
        inputs = make_inputs(case, device)
        rivals.prepare(case, rivals.OURS, inputs)()
    timing.synchronize(device)
    gc.collect()


def tune(cases: Sequence[Case], device: torch.device, budget: float) -> list[Case]:
    """Tunes for one case after the other; returns those it did not come to."""
    deadline = time.monotonic() + budget
    table = tables.user_table(device)
    for place, case in enumerate(cases):
        if time.monotonic() > deadline:
            return list(cases[place:])
        start, known = time.monotonic(), len(table.entries)
        with stn.autotune():
            run(case, device)
        found = len(table.entries) - known
        spent = time.monotonic() - start
        print(f"[{place + 1}/{len(cases)}] {case.id}: {found} entries, {spent:.1f} s", flush=True)
    return []


def check(cases: Sequence[Case], device: torch.device) -> list[str]:
    """What is wrong with the results, with the user's table in use."""
    wrong = []
    for case in cases:
        inputs = make_inputs(case, device)
        expected = rivals.exact(case, inputs)
        try:
            with timing.own_stream(device), stn.autotune():
                errors = rivals.errors(rivals.prepare(case, rivals.OURS, inputs)(), expected)
            rivals.check(case, rivals.OURS, errors)
        except rivals.Mismatch as error:
            wrong.append(f"{case.id}: {error}")
        del inputs, expected
        gc.collect()
    return wrong


def shipped(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries to ship: of a user's, where the rules were slower, what is to be instead of theirs."""
    entries = {}
    for key, entry in sorted(content["entries"].items()):
        rules = entry["rules"]
        fields = {name: value for name, value in entry["fields"].items() if rules.get(name) != value}
        if fields:
            times = {name: round(entry[name], 5) for name in ("milliseconds", "milliseconds_by_the_rules")}
            entries[key] = {"fields": fields, **times}
    return entries


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=tables.SHIPPED, help="the folder for the table")
    parser.add_argument(
        "--work", type=Path, default=machine.ROOT / "build/tuned", help="what was found so far"
    )
    parser.add_argument("--quick", action="store_true", help="each row's first case only")
    parser.add_argument("--select", action="append", help="only cases whose id has this in it; repeatable")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="begin no case after so long")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--compile", metavar="I/N", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def compile_ahead(arguments: Sequence[str], workers: int, budget: float) -> int:
    """Starts the processes that compile; returns how many of them failed."""
    command = [sys.executable, "-m", "bench.tune", *arguments, "--budget-seconds", f"{budget}"]
    started = [
        subprocess.Popen([*command, "--compile", f"{i}/{workers}"], cwd=machine.ROOT) for i in range(workers)
    ]
    return sum(process.wait() != 0 for process in started)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = machine.accelerator()
    if device is None:
        print("no GPU: nothing can be tuned here", file=sys.stderr)
        return 2
    device = torch.device(device.type, torch.get_device_module(device).current_device())
    cases = [case for case in (QUICK if options.quick else CASES) if not case.deterministic]
    if options.select:
        cases = [case for case in cases if any(text in case.id for text in options.select)]
    if options.compile:
        index, count = map(int, options.compile.split("/"))
        with tempfile.TemporaryDirectory() as nowhere, compiling(), tables.ignore_shipped():
            os.environ["STN_TRITON_CACHE"] = nowhere
            tune(cases[index::count], device, options.budget_seconds)
        return 0

    start = time.monotonic()
    if options.workers > 1 and compile_ahead(
        sys.argv[1:] if arguments is None else arguments, options.workers, options.budget_seconds / 2
    ):
        print("some kernels were not compiled ahead: they are when their turn comes", flush=True)
    os.environ["STN_TRITON_CACHE"] = str(options.work)
    with tables.ignore_shipped():  # a new table says what differs from the rules, not from an older one
        left = tune(cases, device, options.budget_seconds - (time.monotonic() - start))
        done = [case for case in cases if case not in left]
        wrong = check(done, device)
    found = tables.user_table(device).path
    if found is None:
        print(f"{options.work} cannot be used", file=sys.stderr)
        return 1
    content = tables.read(found) or {"entries": {}}
    target = options.out / f"{tables.architecture(device)}.json"
    if wrong:
        print(f"wrong results, {target} is left as it is:", *wrong, sep="\n    ")
        return 1
    facts = machine.facts(device, options.commit)
    about = {name: facts[name] for name in ("device", "driver", "torch", "triton", "commit", "date")}
    about["architecture"] = tables.architecture(device)
    entries = shipped(content)
    # what was not searched now stays
    only = {"architecture": about["architecture"]}
    tables.update(target, about, entries, only, without=content["entries"])
    print(f"{target}: {len(entries)} of {len(content['entries'])} problems faster than by the rules")
    for key, entry in entries.items():
        print(
            f"    {key}: {entry['milliseconds_by_the_rules']} -> {entry['milliseconds']} ms {entry['fields']}"
        )
    if left:
        print(f"not reached: {len(left)} of {len(cases)} cases; a second call goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
