"""Time on the device, peak memory, and the bandwidth of a copy.

On CUDA a call is captured as a graph, and the graph's replays are timed one by one between two events, each
after a write to a buffer larger than L2. Events around an eager call would count the host's gaps between
launches, which for small images is all they would see; a replay has one launch. The write makes every run
read its inputs from memory, and it keeps the device busy until the host has queued the events and the
replay. What cannot be captured (it waits for the device, or allocates behind PyTorch's back) is timed
eagerly, after as many writes as its host time takes; the result says so in ``how``. On a CPU the clock is
the wall's.

A call that runs the backward pass of a forward done before is captured only on the stream of that forward:
make both inside ``own_stream``.
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .machine import l2_bytes

Call = Callable[[], Any]

WARM_UPS = 3
MIN_RUNS, MAX_RUNS = 10, 200
COPY_BYTES = 1 << 32


class Timing(NamedTuple):
    """Milliseconds: median, 20 % and 80 % quantile; of how many runs; how: "graph", "events" or "wall"."""

    median: float
    low: float
    high: float
    runs: int
    how: str


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A stream that can be captured, which CUDA's default one cannot; on other devices nothing."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def capture(call: Call, device: torch.device) -> Call:
    """The call as a graph's replay. Raises what the call raises when it cannot be captured."""
    with own_stream(device) if _on_default_stream(device) else _nothing():
        stream = torch.cuda.current_stream(device)
        for _ in range(WARM_UPS):
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = call()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def finished(call: Call, device: torch.device) -> Call:
    """The call, as a replay where it can be captured, that returns when the device is done with it."""
    run = _captured(call, device)[0]

    def wait() -> None:
        run()
        synchronize(device)

    return wait


def time_device(call: Call, device: torch.device, budget: float = 0.1, flush: bool = True) -> Timing:
    """Times ``call`` for about ``budget`` seconds, with at least 10 and at most 200 runs.

    ``flush``: every run finds L2 full of something else. Whatever ``call`` returns is dropped.
    """
    if device.type == "cpu":
        return _time_wall(call, budget)
    timed, how = _captured(call, device)
    for _ in range(WARM_UPS):
        timed()
    synchronize(device)
    host = _host_seconds(timed, device)
    wipe = _wiper(device, l2_bytes(device)) if flush else None
    wipes = 1 if how == "graph" else min(64, 1 + math.ceil(host / _seconds_of_wipe(device)))
    first = [_one(timed, device, wipe, wipes) for _ in range(WARM_UPS)]
    each = statistics.median(first) / 1e3 + (wipes * _seconds_of_wipe(device) if wipe else 0.0)
    runs = _runs(budget, each)
    return _timing([_one(timed, device, wipe, wipes) for _ in range(runs)], how)


def time_calls(call: Call, device: torch.device, budget: float = 0.1) -> float:
    """Milliseconds per eager call of many queued back to back: the longer of host and device time.

    Unlike ``time_device`` this counts Python, dispatch and launches, and L2 is as the last call left it.
    """
    for _ in range(WARM_UPS):
        call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    runs = _runs(budget, time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(runs):
        call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3 / runs


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """The most memory the call holds beyond what is allocated before it, results included; None on a CPU."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    gc.collect()
    synchronize(device)
    before = module.memory_allocated(device)
    module.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return module.max_memory_allocated(device) - before


class Copy(NamedTuple):
    """A device-to-device copy: bytes read and written in a second, and its timing."""

    bandwidth: float
    timing: Timing


def copy_roof(device: torch.device) -> Copy:
    """The roof: the bandwidth of the faster of PyTorch's copies between two buffers far above L2.

    One is the driver's, one a kernel that negates: in a graph the driver's copy can be the slower.
    """
    size, budget = (COPY_BYTES, 0.2) if device.type != "cpu" else (1 << 24, 0.02)
    # A generator of its own: a capture that failed leaves the default one unusable.
    generator = torch.Generator(device).manual_seed(0)
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_(generator=generator)
    target = torch.empty_like(source)
    copies = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    timing = min((time_device(copy, device, budget) for copy in copies), key=lambda found: found.median)
    return Copy(2 * size / (timing.median * 1e-3), timing)


def floor(device: torch.device) -> Timing:
    """What an addition to one number takes: no device time reported here can be shorter."""
    number = torch.zeros(1, device=device)
    return time_device(lambda: number.add_(1), device)


# -------------------------------------------------------------------------------------------- its parts
@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _captured(call: Call, device: torch.device) -> tuple[Call, str]:
    """The call as a graph if that is possible, and what the device's time is then taken of."""
    if device.type != "cuda":
        return call, "events"
    try:
        return capture(call, device), "graph"
    except Exception:
        # A failed capture leaves the stream usable; a lost device raises here, and is not hidden.
        synchronize(device)
        return call, "events"


def _on_default_stream(device: torch.device) -> bool:
    return torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


@functools.cache
def _buffer(device: torch.device, size: int) -> torch.Tensor:
    return torch.empty(size // 4, dtype=torch.int32, device=device)


def _wiper(device: torch.device, l2: int) -> Call:
    """Writes four times the cache, at least 256 MiB: longer than a host takes to queue a replay."""
    return _buffer(device, max(4 * l2, 256 << 20)).zero_


@functools.cache
def _seconds_of_wipe(device: torch.device) -> float:
    wipe = _wiper(device, l2_bytes(device))
    wipe()
    return statistics.median(_one(wipe, device, None, 0) for _ in range(5)) / 1e3


def _host_seconds(call: Call, device: torch.device) -> float:
    """Until a call has been queued, or has run if it waits for the device."""
    found = []
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    synchronize(device)
    return statistics.median(found)


def _one(call: Call, device: torch.device, wipe: Call | None, wipes: int) -> float:
    """Milliseconds of one run."""
    event = torch.get_device_module(device).Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    if wipe is not None:
        for _ in range(wipes):
            wipe()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _time_wall(call: Call, budget: float) -> Timing:
    def one() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    one()
    return _timing([one() for _ in range(_runs(budget, one() / 1e3, at_least=3))], "wall")


def _runs(budget: float, seconds: float, at_least: int = MIN_RUNS) -> int:
    return max(at_least, min(MAX_RUNS, int(budget / max(seconds, 1e-9))))


def _timing(milliseconds: Sequence[float], how: str) -> Timing:
    ordered = sorted(milliseconds)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
    return Timing(statistics.median(ordered), low, high, len(ordered), how)
