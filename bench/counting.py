"""What the hot launches cost, counted by executing their PTX; what an H200 takes for it; PyTorch beside them.

Programs in the middle of an image are executed, at the launch's full size and with its own tiles, for several
maps (``MAPS``). Counted for each pixel (of the output; of the gather: of the input)

    instructions = issued by warps x 32 / pixels
    lines, sectors = 128- and 32-byte pieces of memory that the warps' loads, stores and additions touch
    wavefronts = how often L1 turns to them, to shared memory and to shuffles (``executor.wavefronts``)
    L2 bytes = sectors that a program loads, each once, and those that it stores or adds to

**Bounds**: what a pixel must take on an H200 by issue, by L1, by L2 and by DRAM, to which every tensor goes
once. **Prediction** (``predicted``): what it takes when the few warps that fit share all that and wait.

**Fitted** to what one H200 counted and took (``results/h200-2026-11-27``; ``NOTES.md``, "Banks of L1, and
warps that wait"): wavefronts are 0.88 to 1.13 of the counter's in 12 kernels, and the times of 22 launches
are 0.78 to 1.48 of those predicted; a volume's is 1.58. Nothing else has been timed.

**PyTorch**: ``pytorch_counts.json`` has the instructions of its kernels. Their time is taken as the longer of
issue and bytes: its lines are not known, so that the predicted ratio is, if anything, too small.

**PTX is not machine code.** ptxas drops moves and loads of parameters, fuses some products and sums, folds
shifts into addresses, and splits 64-bit arithmetic. ``ratio`` is machine instructions for each of PTX as they
stand in the code. Accesses to memory are the same ones.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.execution import Run, executing
from bench.executor import SECTOR
from bench.launches import CASES
from bench.specialisations import Launch, field_of

# An H200 (SXM). A copy of tensors moved 4.27 TB/s, of the data sheet's 4.8; that is taken for DRAM, and for
# L2, through which it went. 132 processors have four schedulers, which issue an instruction of 32 lanes a
# clock each, and an L1 that gives a wavefront a clock; by the counters of some kernels at 1.91 to 1.98 GHz.
BYTES_PER_SECOND = 4.3e12
PROCESSORS, SCHEDULERS = 132, 4
CLOCKS_PER_SECOND = PROCESSORS * 1.93e9  # of all processors
# A warp alone issues every other clock (counted: 1 clock to issue, 0.8 to 1.4 for the instruction before),
# and has what it loads after so many clocks: times fit about as well with 500 to 900.
CLOCKS_PER_INSTRUCTION, CLOCKS_PER_WAIT = 2, 700
# A scheduler's registers, which warps have in pieces; a processor's programs, warps, bytes of shared memory.
REGISTERS, PIECE, MOST_PROGRAMS, MOST_WARPS, SHARED = 16384, 256, 32, 64, 227 * 1024

PYTORCH = json.loads(Path(__file__).with_name("pytorch_counts.json").read_text())


def _matrix(degrees: float, zoom: float = 1.0, x: float = 0.013, y: float = 0.021) -> Tensor:
    """Turned about the middle; a little off, so that no pixel is read at a whole place."""
    cos, sin = zoom * math.cos(math.radians(degrees)), zoom * math.sin(math.radians(degrees))
    return torch.tensor([[cos, -sin, x], [sin, cos, y]])


MAPS = {
    "6 degrees, zoom 0.9": _matrix(6, 0.9),  # at which PyTorch's kernels were counted
    "0 degrees": _matrix(0, 1, 0, 0),
    "45 degrees": _matrix(45),
    "90 degrees": _matrix(90),
    "zoom 1/2": _matrix(0, 0.5),
    "zoom 2": _matrix(0, 2),
    "shift": _matrix(0),
    "rim": _matrix(6, 0.9, 0, 1),  # the image's edge lies in the middle of the output
}
BUDGETED_MAPS = ("6 degrees, zoom 0.9", "45 degrees", "rim")


class Work(NamedTuple):
    """Of one case and one map, for each pixel. ``loads`` are requests of warps, ``*_per_load`` for each."""

    instructions: float
    lines: float
    sectors: float
    wavefronts: float
    l2_bytes: float
    loads: float
    lines_per_load: float
    sectors_per_load: float


class Code(NamedTuple):
    """What decides how many warps a processor holds, and how many loads a warp has sent when it waits."""

    programs: int
    warps: int
    registers: int
    shared: int
    loads_per_wait: float

    @property
    def resident(self) -> int:
        """Programs that a processor holds at once."""
        pieces = -(-self.registers * 32 // PIECE)
        room = SCHEDULERS * (REGISTERS // (pieces * PIECE)) // self.warps
        room = min(room, MOST_PROGRAMS, MOST_WARPS // self.warps)
        return max(1, min(room, SHARED // (self.shared + 1024), -(-self.programs // PROCESSORS)))


class Bounds(NamedTuple):
    """Picoseconds for each pixel."""

    issue: float
    l1: float
    l2: float
    dram: float

    @property
    def binding(self) -> tuple[str, float]:
        """The resource that takes longest, and how long."""
        times = {"issue": self.issue, "L1": self.l1, "L2": self.l2, "DRAM": self.dram}
        return max(times.items(), key=lambda item: item[1])


def _middle(launch: Launch) -> list[int]:
    """Programs of whole tiles beside each other in the middle of an image, all that share their channels."""
    arguments = launch.arguments
    columns, rows = arguments["column_tiles"], arguments["row_tiles"]
    splits = arguments.get("splits", 1)
    tiles = columns * rows
    image = launch.programs // (tiles * splits) // 2
    first = min(columns // 2, max(columns - 4, 0))
    return [
        ((image * splits + split) * rows + (rows - 1) // 2) * columns + column
        for split in range(splits)
        for column in range(first, min(first + 4, columns))
    ]


def _pixels(launch: Launch) -> int:
    """Pixels of a tile in the middle."""
    arguments, spec = launch.arguments, launch.arguments["SPEC"]
    side = "in" if launch.compiled.name == "gather_backward_kernel" else "out"
    rows = field_of(spec, "rows") * arguments.get("steps", 1)
    before = (arguments["row_tiles"] - 1) // 2 * rows
    rows = min(rows, arguments[f"{side}_height"] * max(arguments[f"{side}_depth"], 1) - before)
    return rows * min(field_of(spec, "columns"), arguments[f"{side}_width"]) * field_of(spec, "group")


def work_of(run: Run) -> Work:
    """What was counted of ``_middle``, for each pixel."""
    counts, launch = run.counts, run.launch
    pixels = _pixels(launch) * counts.programs / launch.arguments.get("splits", 1)
    loads, all_of = counts.traffic["load"], counts.traffic.values()
    written = sum(each.sectors for what, each in counts.traffic.items() if what != "load")
    return Work(
        counts.instructions * 32 / pixels,
        sum(each.lines for each in all_of) / pixels,
        sum(each.sectors for each in all_of) / pixels,
        (sum(each.wavefronts for each in all_of) + counts.exchanges) / pixels,
        (counts.fetched + written) * SECTOR / pixels,
        (loads.requests + loads.idle) / pixels,
        loads.lines / max(loads.requests, 1),
        loads.sectors / max(loads.requests, 1),
    )


def count(name: str, maps: tuple[str, ...] = tuple(MAPS)) -> dict[str, Work]:
    """The work of a hot case, by map. In a process in which kernels are not interpreted."""
    case, found = CASES[name], {}
    for map in maps:
        with executing(sample=_middle, machine_code=True) as runs:  # of which the report reads it
            case.launch(MAPS[map], True)
        found[map] = work_of(next(run for run in runs if run.launch.compiled.name == case.kernel))
    return found


def bounds(work: Work, bytes_per_pixel: float) -> Bounds:
    """The least that a pixel can take."""
    picoseconds = 1e12 / CLOCKS_PER_SECOND
    return Bounds(
        work.instructions / 32 / SCHEDULERS * picoseconds,
        work.wavefronts * picoseconds,
        work.l2_bytes / BYTES_PER_SECOND * 1e12,
        bytes_per_pixel / BYTES_PER_SECOND * 1e12,
    )


def predicted(work: Work, bytes_per_pixel: float, code: Code) -> float:
    """Picoseconds for each pixel with the warps that a processor holds.

    A closed queueing network (mean value analysis): from one wait to the next a warp takes its share of
    issue, of L1 and of memory, each of which serves one warp at a time, and time of its own, the latency.
    With many warps the longest of the bounds comes out, with one warp their sum and the latency. The last
    programs of a launch leave places empty.
    """
    rounds = work.loads / code.loads_per_wait
    limits = bounds(work, bytes_per_pixel)
    processor = PROCESSORS / rounds  # of one processor and one round
    shares = [each * processor for each in (limits.issue, limits.l1, max(limits.l2, limits.dram))]
    own = CLOCKS_PER_WAIT + work.instructions / 32 / rounds * (CLOCKS_PER_INSTRUCTION - 1 / SCHEDULERS)
    own *= 1e12 * PROCESSORS / CLOCKS_PER_SECOND
    queues, time = [0.0] * len(shares), 0.0
    for warps in range(1, code.resident * code.warps + 1):
        times = [share * (1 + queue) for share, queue in zip(shares, queues)]
        time = (own + sum(times)) / warps
        queues = [each / time for each in times]
    turns = code.programs / PROCESSORS / code.resident
    return time / processor * math.ceil(turns) / turns


def pytorch_time(name: str) -> float | None:
    """Picoseconds for each pixel that PyTorch's kernel takes at least; None where nobody counted it."""
    entry = PYTORCH["kernels"].get(name)
    if entry is None:
        return None
    issue = entry["instructions"] / 32 / SCHEDULERS * 1e12 / CLOCKS_PER_SECOND
    return max(issue, entry["bytes"] / BYTES_PER_SECOND * 1e12)


class Step(NamedTuple):
    """Picoseconds for each pixel of a training step's launches, one after the other."""

    ours: float
    kernels: float
    """PyTorch's two sampling kernels alone."""
    eager: float
    """All that eager PyTorch launches."""


def training_step(channels: int, ours: dict[str, float]) -> Step | None:
    """Forward, d image and d theta of an affine map, planar float32; ``ours``: the least of each hot case.

    None where a case was not counted.
    """
    cases = [
        f"{direction}-affine-bilinear-nchw-c{channels}-f32" for direction in ("forward", "gather", "params")
    ]
    theirs = [pytorch_time(name) for name in cases[:2]]  # its backward kernel makes both gradients
    if any(name not in ours for name in cases) or None in theirs:
        return None
    kernels = sum(time for time in theirs if time)
    besides = [each for each in PYTORCH["besides"].values() if isinstance(each, list)]
    moved = sum(fixed + each * channels for fixed, each in besides)
    return Step(sum(ours[name] for name in cases), kernels, kernels + moved / BYTES_PER_SECOND * 1e12)


def table(name: str, works: dict[str, Work], moved: float, ratio: float, code: Code) -> list[str]:
    """Rows of Markdown. ``moved``: bytes for each pixel."""
    rows = []
    for map, work in works.items():
        times = bounds(work, moved)
        resource, least = times.binding
        theirs = pytorch_time(name) if map == BUDGETED_MAPS[0] else None
        cells = [
            name,
            map,
            f"{work.instructions:.0f}",
            f"{work.lines_per_load:.1f}",
            f"{work.sectors_per_load:.1f}",
        ]
        cells += [f"{work.lines:.2f}", f"{work.sectors:.2f}", f"{work.wavefronts:.2f}"]
        cells += [f"{work.l2_bytes:.0f}", f"{moved:.0f}", f"{ratio:.2f}"]
        cells += [str(code.resident * code.warps), f"{code.loads_per_wait:.1f}"]
        cells += [f"{time:.2f}" for time in times]
        cells += [resource, f"{predicted(work, moved, code):.2f}", f"{theirs / least:.1f}" if theirs else "-"]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


HEADS = (
    *("case", "map", "instructions (PTX)", "lines a load", "sectors a load", "lines", "sectors"),
    *("wavefronts", "L2 bytes", "bytes", "machine : PTX", "resident warps", "loads a wait"),
    *("issue, ps", "L1, ps", "L2, ps", "DRAM, ps", "binds", "predicted, ps", "least, PyTorch : ours"),
)
