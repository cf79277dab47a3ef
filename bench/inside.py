"""What the hardware counted inside the kernels of some cases: ``python -m bench.inside --out DIR CASE...``.

Runs ours and one rival on each case under NVIDIA's Nsight Compute, once, and prints a line for each kernel:
device time, share of the memory's bandwidth, share of the cycles in which a scheduler issued, wavefronts of
L1, registers, resident warps and what warps waited for. DIR/counters.csv has all that was counted. Nothing is
timed here: kernels run with cold caches, one after the other, many times over. The clocks stay as they are.

``--tile rows=2,columns=8`` runs ours with these fields of its tiles too (``kernels/host/configs.py``). It may
be given several times.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from stn_triton.kernels.host import configs

from . import machine, rivals, timing
from .cases import CASES, Case, make_inputs

SECTIONS = ("SpeedOfLight", "SchedulerStats", "WarpStateStats", "LaunchStats", "Occupancy")
METRICS = (
    "smsp__inst_executed.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "l1tex__t_sector_hit_rate.pct",
    "lts__t_sector_hit_rate.pct",
    "l1tex__data_pipe_lsu_wavefronts.sum",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sectors.sum",
    "lts__t_requests.sum",
    "l1tex__m_xbar2l1tex_read_sectors.sum",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "smsp__inst_executed_op_global_ld.sum",
    "smsp__inst_executed_op_local_ld.sum",
)
# What is printed of it: a heading and the metric; of a name that this GPU has not, nothing.
PRINTED = (
    ("us", "gpu__time_duration.sum"),
    ("DRAM %", "dram__throughput.avg.pct_of_peak_sustained_elapsed"),
    ("L2 %", "lts__throughput.avg.pct_of_peak_sustained_elapsed"),
    ("L1 %", "l1tex__throughput.avg.pct_of_peak_sustained_active"),
    ("L1 hits %", "l1tex__t_sector_hit_rate.pct"),
    ("L1 wavefronts", "l1tex__data_pipe_lsu_wavefronts.sum"),
    ("of the most %", "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed"),
    ("bank conflicts", "l1tex__data_bank_conflicts_pipe_lsu.sum"),
    ("sectors from L2", "l1tex__m_xbar2l1tex_read_sectors.sum"),
    ("sectors of L2", "lts__t_sectors.sum"),
    ("requests to L2", "lts__t_requests.sum"),
    ("L2 hits %", "lts__t_sector_hit_rate.pct"),
    ("read", "dram__bytes_read.sum"),
    ("written", "dram__bytes_write.sum"),
    ("issue %", "smsp__issue_active.avg.pct_of_peak_sustained_active"),
    ("issue/cycle", "smsp__issue_active.avg.per_cycle_active"),
    ("instructions", "smsp__inst_executed.sum"),
    ("loads", "smsp__inst_executed_op_global_ld.sum"),
    ("loads of spills", "smsp__inst_executed_op_local_ld.sum"),
    ("registers", "launch__registers_per_thread"),
    ("warps %", "sm__warps_active.avg.pct_of_peak_sustained_active"),
    ("programs", "launch__grid_size"),
    ("threads", "launch__block_size"),
)
STALLS = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
MARK = "bitwisexor"  # an operator of PyTorch's that no case runs: its kernel begins a group


Tile = tuple[tuple[str, int], ...]


def tile(text: str) -> Tile:
    """Fields and their values: "rows=2,columns=8"."""
    pairs = [each.partition("=") for each in text.split(",")]
    known = (*configs.Tile._fields, "waves")
    if wrong := [name for name, _, value in pairs if name not in known or not value.isdecimal()]:
        raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: a number for one of {', '.join(known)}")
    return tuple((name, int(value)) for name, _, value in pairs)


def groups(
    cases: Sequence[Case], rival: str, tiles: Sequence[Tile] = ()
) -> list[tuple[Case, rivals.Rival, Tile]]:
    """In the order in which they run: ours, ours with each of the tiles, and the rival on each case."""
    beside = [one for one in rivals.RIVALS if one.name == rival]
    chosen = [(rivals.OURS, fields) for fields in ((), *tiles)] + [(one, ()) for one in beside]
    return [(case, one, fields) for case in cases for one, fields in chosen]


def run(cases: Sequence[Case], rival: str, device: torch.device, tiles: Sequence[Tile] = ()) -> None:
    """In the process that is counted: each call once, after one that compiles, and a mark before each."""
    mark = torch.zeros(1, dtype=torch.int32, device=device)
    torch.autograd.set_multithreading_enabled(False)  # tiles are a thread's own, of backward passes too
    for case, one, fields in groups(cases, rival, tiles):
        with timing.own_stream(device), configs.override(None, **dict(fields)):
            try:
                call = rivals.prepare(case, one, make_inputs(case, device))
                call()
            except rivals.Missing:
                call = None
            timing.synchronize(device)
            torch.cuda.profiler.start()
            mark.bitwise_xor_(mark)
            if call is not None:
                call()
            timing.synchronize(device)
            torch.cuda.profiler.stop()
        del call
        torch.cuda.empty_cache()


def report(lines: Iterable[str], cases: Sequence[Case], rival: str, tiles: Sequence[Tile] = ()) -> list[str]:
    """The table of what ``ncu --csv --page raw`` wrote."""
    rows = list(csv.DictReader(line for line in lines if line.startswith('"')))
    units, rows = (rows[0], rows[1:]) if rows else ({}, [])  # a line of units follows the heads
    waiting, found = iter(groups(cases, rival, tiles)), []
    for row in rows:
        name = row.get("Kernel Name", "")
        if MARK in name.lower().replace("_", ""):
            case, one, fields = next(waiting)
            found.append(f"\n{case.id}: {one.name}" + "".join(f" {name}={n}" for name, n in fields))
            continue
        said = [f"{head} {row[key]} {units.get(key, '')}".strip() for head, key in PRINTED if row.get(key)]
        stalls = {
            key.removeprefix(STALLS[0]).removesuffix(STALLS[1]): float(value.replace(",", ""))
            for key, value in row.items()
            if key.startswith(STALLS[0]) and key.endswith(STALLS[1]) and value
        }
        most = sorted(stalls.items(), key=lambda item: -item[1])[:4]
        said += ["waits: " + ", ".join(f"{what} {value:.1f}" for what, value in most)] if most else []
        found.append(f"  {name[:60]}: " + "; ".join(said))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="+", metavar="CASE", help="the beginning of an id that the sweep lists"
    )
    parser.add_argument("--out", type=Path, default=Path("build/inside"), help="the folder for counters.csv")
    parser.add_argument("--rival", default="eager", help="what runs beside ours")
    parser.add_argument(
        "--tile", action="append", default=[], type=tile, metavar="FIELD=N,...", help="ours with these too"
    )
    parser.add_argument("--counted", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if any(case.id.startswith(text) for text in options.cases)]
    device = machine.accelerator()
    tool = machine.cuda_tool("ncu")
    if device is None or device.type != "cuda":
        print("no NVIDIA GPU: nothing can be counted here", file=sys.stderr)
        return 2
    if options.counted:
        run(cases, options.rival, device, options.tile)
        return 0
    if tool is None:
        print("Nsight Compute (ncu) is not installed", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "counters.csv"
    command = [tool, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    for section in SECTIONS:
        command += ["--section", section]
    command += ["--metrics", ",".join(METRICS), "--log-file", str(file)]
    command += ["--target-processes", "application-only"]
    command += [sys.executable, "-m", "bench.inside", "--counted", "--rival", options.rival]
    command += [f"--tile={','.join(f'{name}={n}' for name, n in fields)}" for fields in options.tile]
    command += options.cases
    code = subprocess.run(command, cwd=machine.ROOT, check=False).returncode
    said = file.read_text(errors="replace").splitlines() if file.exists() else []
    print("\n".join(report(said, cases, options.rival, options.tile)))
    return code


if __name__ == "__main__":
    sys.exit(main())
