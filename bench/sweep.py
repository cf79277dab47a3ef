"""Times ours and every rival on the registry's cases: ``python -m bench.sweep --out DIR``.

Each case is checked against float64 before it is timed. DIR/results.json is written after every case, and a
second call goes on where the first one ended. The last lines are a table of the rows' targets and what was
reached. The exit status is 1 if a result was wrong or something failed, 0 if cases were merely not reached.

On a GPU the times are the device's (``bench.timing`` says how). ``--cpu``: few pixels, the wall's clock, to
see that it works; such times say nothing about a GPU's.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import machine, rivals, timing
from .cases import CASES, QUICK, ROWS, Case, Inputs, bytes_moved, bytes_of_floats, dtype_name, make_inputs
from .results import SAME, Entry, Measurement, Results, load, problems, table

ATTEMPTS = 2  # at a case in which the process ended
WORDS = 300  # of a failure's message
CLOCK = {
    "cuda": "device time of graph replays, L2 flushed before each",
    "cpu": "CPU wall clock, few pixels: no measure of speed",
}


class DeviceLost(Exception):
    """The device answers no more: the process has to be started again."""


def method(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "clock": CLOCK.get(device.type, "device time between events, L2 flushed before each run"),
        "seconds_each": options.seconds_each,
        "quantiles": [0.2, 0.8],
        "small": device.type == "cpu",
    }


# ------------------------------------------------------------------------------------------------ one case
def describe(case: Case) -> dict[str, Any]:
    return dataclasses.asdict(case) | {"dtype": dtype_name(case.dtype)}


def finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def message(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:WORDS]


class Bench:
    """A case's tensors and what their results are to be; those of the cases that rivals run instead too."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.made: dict[Case, tuple[Inputs, tuple[torch.Tensor, ...]]] = {}

    def __call__(self, case: Case) -> tuple[Inputs, tuple[torch.Tensor, ...]]:
        if case not in self.made:
            inputs = make_inputs(case, self.device)
            self.made[case] = inputs, rivals.exact(case, inputs)
        return self.made[case]


def measure(case: Case, rival: rivals.Rival, bench: Bench, seconds: float | None) -> Measurement:
    """Checks a rival's results and times it; without ``seconds`` it is only checked.

    Raises DeviceLost; whatever else goes wrong stands in the measurement.
    """
    found = Measurement(rival.name, "failed", rival.eager)
    try:
        run = rival.instead(case)
        inputs, expected = bench(run)
        call = rivals.prepare(run, rival, inputs)
        errors = rivals.errors(call(), expected)
        found.errors = finite(errors)
        rivals.check(run, rival, errors)
        if seconds is not None:
            found.peak = timing.peak_bytes(call, bench.device)
            timed = timing.time_device(call, bench.device, seconds)
            found.median, found.low, found.high, found.runs, found.how = timed
            found.call = timing.time_calls(call, bench.device, seconds / 4)
        found.status = "timed"
    except rivals.Missing as error:
        found.status, found.why = "missing", str(error)[:WORDS]
    except rivals.Mismatch as error:
        found.status, found.why = "mismatch", str(error)[:WORDS]
    except Exception as error:
        found.why = message(error)
        assert_alive(bench.device, found.why)
    return found


def assert_alive(device: torch.device, why: str) -> None:
    """Raises DeviceLost with ``why`` if the device answers no more."""
    try:
        timing.synchronize(device)
    except Exception as error:
        raise DeviceLost(why) from error


def run_case(
    entry: Entry, case: Case, chosen: Sequence[rivals.Rival], device: torch.device, seconds: float
) -> None:
    """Fills the entry. If ours is wrong or fails, no rival is timed. Raises DeviceLost."""
    with timing.own_stream(device):
        bench = Bench(device)
        inputs, _ = bench(case)
        entry.share_read = rivals.share_read(case, inputs)
        entry.bytes = bytes_moved(case, entry.share_read)
        if not case.dtype.is_floating_point:
            entry.bytes_of_floats = bytes_of_floats(case, entry.share_read)
        for rival in chosen:
            found = measure(case, rival, bench, seconds)
            entry.measurements.append(found)
            if rival is rivals.OURS and found.status != "timed":
                break
    wrong = any(found.status in ("mismatch", "failed") for found in entry.measurements)
    entry.status = "failed" if wrong else "done"


# ----------------------------------------------------------------------------------------------- all cases
def open_results(path: Path, device: torch.device, options: argparse.Namespace) -> Results:
    """A new run's, or those of the run that this one continues; ValueError if they are of another one."""
    fresh = Results(
        machine=machine.facts(device, options.commit),
        method=method(device, options),
        rows={
            name: {"title": row.title, "targets": row.targets, "roof": row.roof} for name, row in ROWS.items()
        },
    )
    if not path.exists():
        return fresh
    old = load(path)
    differing = [name for name in SAME if old.machine.get(name) != fresh.machine[name]]
    differing += [] if old.method == fresh.method else ["method"]
    if differing and options.anew:
        path.replace(path.with_name("older-results.json"))
        return fresh
    if differing:
        raise ValueError(
            f"{path} is of another run (it differs in {', '.join(differing)}): name another --out"
        )
    old.rows = fresh.rows
    return old


def sweep(
    results: Results, path: Path, cases: Sequence[Case], device: torch.device, options: argparse.Namespace
) -> None:
    """Measures what has not been measured yet, until the time is up."""
    chosen = chosen_rivals(options)
    deadline = time.monotonic() + options.budget_seconds
    results.complete, results.not_reached = False, {}
    if results.roof is None:
        with timing.own_stream(device):
            results.roof = timing.copy_roof(device).bandwidth
            results.floor = timing.floor(device).median
        results.save(path)
    for place, case in enumerate(cases):
        entry = results.find(case.id)
        if entry is not None and (entry.status != "running" or entry.attempts >= ATTEMPTS):
            if entry.status == "running":
                entry.status, entry.why = "failed", "the process ended in it"
            continue
        if time.monotonic() >= deadline:
            results.not_reached[case.id] = case.row
            continue
        begun = Entry(case.id, case.row, describe(case), attempts=1 if entry is None else entry.attempts + 1)
        if entry is not None:
            results.entries.remove(entry)
        results.entries.append(begun)
        results.save(path)
        start = time.monotonic()
        small = case.small() if results.method["small"] else case
        try:
            try:
                run_case(begun, small, chosen, device, options.seconds_each)
            except DeviceLost:
                raise
            except Exception as error:
                begun.status, begun.why = "failed", message(error)
                assert_alive(device, begun.why)
        except DeviceLost as error:
            begun.status, begun.why = "failed", f"the device was lost: {error}"
            results.save(path)
            raise
        except KeyboardInterrupt:
            results.entries.remove(begun)  # it goes first when the run goes on
            results.save(path)
            raise
        release(device)
        results.save(path)
        print(progress(begun, place, len(cases), time.monotonic() - start), flush=True)
    if device.type != "cpu" and not results.not_reached:
        with timing.own_stream(device):
            results.roof_after = timing.copy_roof(device).bandwidth
        results.machine["clocks_after"] = machine.clocks()
    results.complete = not results.not_reached
    results.save(path)


def progress(entry: Entry, place: int, count: int, seconds: float) -> str:
    times = ", ".join(f"{name} {time:.4g} ms" for name, time in entry.times().items())
    lines = [f"[{place + 1}/{count}] {entry.id} ({seconds:.1f} s): {times}"]
    return "\n".join(lines + [f"    ! {problem}" for problem in problems(entry)])


def warm(cases: Sequence[Case], device: torch.device, options: argparse.Namespace) -> int:
    """Runs each case of the part I/N once: caches on disk then hold what is compiled. How many went wrong."""
    index, count = map(int, options.warm.split("/"))
    wrong = 0
    for case in cases[index::count]:
        case = case.small() if device.type == "cpu" else case
        bench = Bench(device)
        for rival in chosen_rivals(options):
            found = measure(case, rival, bench, None)
            if found.status in ("mismatch", "failed"):
                wrong += 1
                print(f"{case.id}: {found.name} {found.status}: {found.why}", flush=True)
        del bench
        release(device)
    return wrong


def release(device: torch.device) -> None:
    """Gives back the memory that one case's stream has kept, which the next one's could not use."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


# --------------------------------------------------------------------------------------------- command line
def select(options: argparse.Namespace) -> list[Case]:
    cases = QUICK if options.quick else CASES
    if options.select:
        cases = [case for case in cases if any(text in case.id for text in options.select)]
    return cases


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the folder for results.json")
    parser.add_argument("--quick", action="store_true", help="each row's first case, half the time for each")
    parser.add_argument("--select", action="append", help="only cases whose id has this in it; repeatable")
    parser.add_argument("--rival", action="append", help="only this rival, beside ours; repeatable")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="begin no case after so long")
    parser.add_argument("--seconds-each", type=float, help="how long each is timed, 0.1 or with --quick 0.05")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--cpu", action="store_true", help="few pixels, on the CPU: to see that it works")
    parser.add_argument("--warm", metavar="I/N", help="time nothing: compile and check each N-th case")
    parser.add_argument("--anew", action="store_true", help="set results of another run aside")
    parser.add_argument("--list", action="store_true", help="print the cases' ids, in their order")
    options = parser.parse_args(arguments)
    if options.seconds_each is None:
        options.seconds_each = 0.001 if options.cpu else 0.05 if options.quick else 0.1
    if not (options.out or options.warm or options.list):
        parser.error("--out DIR is needed")
    return options


def chosen_rivals(options: argparse.Namespace) -> list[rivals.Rival]:
    """Ours first: where it is wrong nothing else is timed."""
    return [r for r in rivals.RIVALS if r is rivals.OURS or not options.rival or r.name in options.rival]


def restart() -> None:
    """This command in a new process, which takes this one's place: a lost device is lost for the old one."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "bench.sweep", *sys.argv[1:]])


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None, restart: Callable[[], None] = restart) -> int:
    options = parse(arguments)
    cases = select(options)
    if options.list:
        print("\n".join(case.id for case in cases))
        return 0
    device = torch.device("cpu") if options.cpu else machine.accelerator()
    if device is None:
        print("no GPU: --cpu runs small cases on the CPU", file=sys.stderr)
        return 2
    if options.warm:
        return 1 if warm(cases, device, options) else 0
    signal.signal(signal.SIGTERM, stop)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    try:
        results = open_results(path, device, options)
        sweep(results, path, cases, device, options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except DeviceLost as error:
        print(f"the device was lost: {error}", flush=True)
        restart()
    except KeyboardInterrupt:
        print("interrupted: a second call goes on from here", flush=True)
        return 130
    print(table(results))
    return 1 if any(entry.status != "done" for entry in results.entries) else 0


if __name__ == "__main__":
    sys.exit(main())
