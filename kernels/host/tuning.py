"""Searching for configurations, where it is asked for: inside ``stn_triton.autotune()``.

The first call of a launcher with a problem in a new bucket (``configs.Problem.key``) then tries other
configurations on the call's own tensors and keeps the fastest in the user's table (``tables``). ``make
tune`` does so for the benchmarks' cases, and writes the table that the package ships.

The search goes along one field at a time from what the rules say and takes what is faster by more than the
noise, until nothing is: fields are nearly independent, and a kernel takes seconds to compile. A time is the
median of some runs on the device alone: they wait in the stream behind a kernel that only passes time.
"""

from __future__ import annotations

import functools
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from ..modes import Source
from . import configs, tables
from .blocks import Block, LocalBlocks, lock
from .configs import Problem, Tile
from .tables import MOST_LANES as MOST_LANES
from .tables import lanes

_Launcher = TypeVar("_Launcher", bound=Callable[..., Any])
Fields = Mapping[str, int]

_log = logging.getLogger("stn_triton")

MARGIN = 0.97  # what counts as faster
MOST_CALLS = 4096  # kept of each launcher


def autotune() -> Block[None]:
    """Inside, kernels whose configuration has not been tuned yet are tuned when they are first called.

    The first call for each bucket of sizes then takes long, many kernels being compiled and timed, and
    synchronises; later ones, in this process and in others that ask for it, use what was found. It is kept in
    the directory that the environment variable ``STN_TRITON_CACHE`` names, by default ``stn_triton`` in the
    user's cache directory; where nothing can be written, in memory, after a warning. Several processes may
    write to one table at once. All threads are concerned. Nothing is tuned while a CUDA graph is captured, or
    where deterministic algorithms are asked for: the last bits of sums over tiles, those of the parameters'
    gradients, depend on the tile. On the CPU the block does nothing. A context manager and decorator.

    Outside such blocks nothing is tuned, and only the tables shipped with the package are used.

    Example:
        >>> image, theta = torch.rand(8, 3, 48, 64), torch.eye(2, 3).repeat(8, 1, 1)
        >>> with stn.autotune():
        ...     warped = stn.affine_grid_sample(image, theta)
    """
    return Block(tables.live, None)


def tunable(launcher: _Launcher) -> _Launcher:
    """Marks what can be run again on the same arguments, whose results are overwritten."""
    tuned: set[tuple] = set()  # calls like these have nothing left to tune

    @functools.wraps(launcher)
    def launch(*args: Any) -> Any:
        if tables.live.open:
            device = next(argument.device for argument in args if isinstance(argument, torch.Tensor))
            call = device, *map(_layout, args)
            if (configs.state(), call) not in tuned and _can_tune(device):
                _tune(functools.partial(launcher, *args), device)
                if len(tuned) >= MOST_CALLS:
                    tuned.clear()
                tuned.add((configs.state(), call))
        return launcher(*args)

    return launch  # type: ignore[return-value]


def _layout(argument: Any) -> Any:
    """What a choice can depend on of an argument."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.shape, argument.stride()
    return argument


def _can_tune(device: torch.device) -> bool:
    if device.type in ("cpu", "meta") or _searching.values():
        return False
    if torch.are_deterministic_algorithms_enabled():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


_searching: LocalBlocks[None] = LocalBlocks("searching")
_one_at_a_time = lock()  # kernels of another thread would be in the times


def _tune(run: Callable[[], Any], device: torch.device) -> None:
    """Tunes all that ``run`` chooses and the user's table does not have."""
    table = tables.user_table(device)
    with _one_at_a_time, Block(_searching, None):
        while True:  # another way to sum brings other kernels
            with configs.observe() as seen:
                run()
            new = [(problem, chosen) for problem, chosen in seen if problem.key not in table.entries]
            if not new:
                break
            for problem, chosen in new:
                if problem.key not in table.entries:
                    _tune_one(run, device, table, problem, chosen)


def _tune_one(
    run: Callable[[], Any],
    device: torch.device,
    table: tables.UserTable,
    problem: Problem,
    chosen: Any,
) -> None:
    def cost(fields: Fields) -> float:
        with configs.override(problem.kernel, **fields):
            try:
                return clock(run, device)
            except Exception as error:  # too many registers, programs or bytes: this one is not to be had
                _log.debug("%s: %s: %s", problem.key, fields, error)
                return math.inf

    start = chosen._asdict()
    if isinstance(chosen, Tile):  # these two follow from how many programs are wanted
        del start["splits"], start["steps"]
        start["waves"] = configs.waves(problem)
    fields, best, first = search(problem, start, cost)
    _log.info("%s: %s, %.4f ms for %.4f ms by the rules", problem.key, fields, best, first)
    entry = {"fields": fields, "rules": start, "milliseconds": best, "milliseconds_by_the_rules": first}
    if math.isfinite(best):
        table.add(problem.key, entry, tables.about(device))
    else:  # the call will fail as well, and say why
        table.remember(problem.key, fields)


def search(
    problem: Problem, start: Fields, cost: Callable[[Fields], float]
) -> tuple[dict[str, int], float, float]:
    """The fields found, what they cost and what ``start`` does."""
    current = dict(start)
    first = best = cost(current)
    tried = {tuple(current.items())}
    improved = True
    while improved:
        improved = False
        for neighbours in NEIGHBOURS:
            for candidate in neighbours(problem, current):
                if tuple(candidate.items()) in tried:
                    continue
                tried.add(tuple(candidate.items()))
                if lanes(candidate) > MOST_LANES:
                    continue
                spent = cost(candidate)
                if spent < MARGIN * best:
                    current, best, improved = candidate, spent, True
    return current, best, first


def _scaled(problem: Problem, fields: Fields, name: str, low: int, high: int) -> Iterator[dict[str, int]]:
    """Twice and half as much of a field, if it is there."""
    if name in fields:
        for value in (fields[name] * 2, fields[name] // 2):
            if low <= value <= high:
                yield {**fields, name: value}


def _shape(problem: Problem, fields: Fields) -> Iterator[dict[str, int]]:
    """As many pixels in longer or shorter rows."""
    if "columns" in fields:
        rows, columns = fields["rows"], fields["columns"]
        if rows > 1:
            yield {**fields, "rows": rows // 2, "columns": columns * 2}
        if columns > 1:
            yield {**fields, "rows": rows * 2, "columns": columns // 2}


def _channels(problem: Problem, fields: Fields) -> Iterator[dict[str, int]]:
    if problem.channels_last:
        yield from _scaled(problem, fields, "channels", 1, min(configs.power_of_2(problem.channels), 256))


def _unroll(problem: Problem, fields: Fields) -> Iterator[dict[str, int]]:
    for unroll in (1, 2, problem.channels, 4, 8):
        if "unroll" in fields and unroll <= min(problem.channels, 8):
            yield {**fields, "unroll": unroll}


def _group(problem: Problem, fields: Fields) -> Iterator[dict[str, int]]:
    if problem.source == Source.TPS and not problem.kernel.startswith("grid"):
        yield from _scaled(problem, fields, "group", 1, 8)


def _sum(problem: Problem, fields: Fields) -> Iterator[dict[str, int]]:
    if "sorted" in fields:
        yield {**fields, "sorted": 1 - fields["sorted"]}


_warps = functools.partial(_scaled, name="warps", low=1, high=16)
_rows = functools.partial(_scaled, name="rows", low=1, high=64)
_waves = functools.partial(_scaled, name="waves", low=2, high=64)
_candidates = functools.partial(_scaled, name="candidates", low=16, high=4096)
NEIGHBOURS = (_warps, _rows, _shape, _channels, _unroll, _waves, _group, _candidates, _sum)


def device_time(run: Callable[[], Any], device: torch.device, repeats: int = 9) -> float:
    """Milliseconds of a run on the device: the median of ``repeats``."""
    from .launch import on_device  # not before: it imports triton

    module: Any = torch.get_device_module(device)
    with on_device(device):  # whose streams the events are recorded on
        run()  # compiles
        module.synchronize(device)
        begin = time.perf_counter()
        run()
        module.synchronize(device)
        # as long as the host takes to send a run: the device must not wait for it
        wait = int(min(time.perf_counter() - begin, 0.01) * 2e9)
        pairs = []
        for _ in range(repeats):
            pair = module.Event(enable_timing=True), module.Event(enable_timing=True)
            if hasattr(module, "_sleep"):
                module._sleep(wait)
            pair[0].record()
            run()
            pair[1].record()
            pairs.append(pair)
        module.synchronize(device)
        return statistics.median(start.elapsed_time(end) for start, end in pairs)


# What tells how long a run takes. ``bench.tune`` compiles here first, in many processes, and times nothing.
clock: Callable[[Callable[[], Any], torch.device], float] = device_time
