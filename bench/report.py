"""What the compiler made of the kernels, for GPUs that need not be there: ``python -m bench.report``.

    python -m bench.report [PATTERN ...] [--target sm_90] [--json FILE] [--lines] [--list] [--all]
    python -m bench.report --check | --update-budget

Each case is one launch at a realistic size, with the tiles that ``configs.choose`` gives an H100 or H200. The
launcher itself is called, with tensors that have no memory; what it would run is compiled and read.

**Code.** Registers, spills, and widths of loads and stores are read from machine code. **Execution.** What
the hot cases issue and touch for each pixel, and what an H200 takes for it: ``bench.counting``.

``budget.json`` holds what was counted for sm_90, by Triton's version. ``--check`` holds some telling cases to
it (``launches.TOLD``, or those that are named): no spills, no fences, no compare-and-swap, 16 bytes a lane in
channels-last cases; registers and code no more than a tenth larger, instructions, lines and wavefronts that
are executed no more than a hundredth. Under another Triton only the rules hold. Exceptions to any of them
stand in the file, each with its reason.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import functools
import json
import linecache
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from torch import Tensor

from bench import counting, executor, specialisations
from bench.assembly import Instruction, Line, parse_amdgcn, parse_sass, traffic, waits
from bench.budget import BUDGET, HELP, Budget, broken_rules, complaints, update
from bench.launches import CASES, HOT, TOLD
from bench.specialisations import TARGETS, Launch, field_of
from stn_triton.kernels import sample
from stn_triton.kernels.host.files import replacing

KERNELS = Path(sample.__file__).parent
Work = tuple[str, str, tuple[str, ...]]


def kernel_file(file: str) -> Path | None:
    """The source of the kernels that a name in the code's line table means; None for any other file."""
    parts = Path(file).parts
    if "kernels" not in parts:
        return None
    path = KERNELS.joinpath(*parts[len(parts) - parts[::-1].index("kernels") :])
    return path if path.exists() else None


@functools.cache
def _functions(file: str) -> list[tuple[range, str]]:
    """(lines, name) of the functions in a source file of the kernels; of any other, nothing."""
    path = kernel_file(file)
    nodes = ast.walk(ast.parse(path.read_text())) if path else ()
    return [
        (range(node.lineno, (node.end_lineno or node.lineno) + 1), node.name)
        for node in nodes
        if isinstance(node, ast.FunctionDef)
    ]


def function_of(line: Line | None) -> str:
    """The function of the kernels in which a line stands."""
    if line is None:
        return "?"
    names = [name for lines, name in _functions(line[0]) if line[1] in lines]
    return names[-1] if names else Path(line[0]).name


def reads_image(instruction: Instruction) -> bool:
    """Whether a load is one of pixels: not of parameters, and not of the sorted backward's lists."""
    path = kernel_file(instruction.line[0]) if instruction.line else None
    if instruction.line is None or path is None:
        return False
    return path.name != "sources.py" and not re.search(
        r"\b(order|indices|fractions|starts?)\w*", linecache.getline(str(path), instruction.line[1])
    )


def logarithms(instructions: Iterable[Instruction]) -> int:
    """Those of splines: in each an exponent becomes a float."""
    converted = (each for each in instructions if re.match(r"I2FP?\b|v_cvt_f32_i32", each.op))
    return sum(function_of(each.line) == "tps_log" for each in converted)


# -------------------------------------------------------------------------------------- measuring
def _tool(name: str, *arguments: str, binary: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read(compiled: Any) -> tuple[list[Instruction], int, int]:
    """Instructions, registers of a lane, and those spilled as far as the compiler's own notes tell.

    AMD's scalar registers spill into lanes of vector registers, not into memory, and are not counted.
    """
    if "cubin" in compiled.asm:
        binary = compiled.asm["cubin"]
        usage = re.search(r"REG:(\d+)", _tool("cuobjdump", "-res-usage", binary=binary))
        assert usage is not None
        return parse_sass(_tool("nvdisasm", "-c", "-g", binary=binary)), int(usage[1]), 0
    text = compiled.asm["amdgcn"]

    def note(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(match[1]) if match else 0

    return parse_amdgcn(text), note("vgpr_count"), note("vgpr_spill_count")


def moved_bytes(launch: Launch) -> int:
    """Bytes of the launch's tensors, each once; of one that is added to, twice."""
    arguments = launch.arguments
    into_input = field_of(arguments["SPEC"], "input_grad")
    unused = set()
    if launch.compiled.name == "sample_backward_kernel":
        if not field_of(arguments["SPEC"], "source_grad"):
            unused |= {"input_ptr", "partial_ptr"}
        if not into_input:
            unused |= {"grad_input_ptr"}
    total, seen = 0, set()
    for name, value in arguments.items():
        if isinstance(value, Tensor) and name not in unused and id(value) not in seen:
            seen.add(id(value))
            added = name == "grad_input_ptr" and into_input
            total += value.numel() * value.element_size() * (2 if added else 1)
    return total


def measure(launch: Launch) -> dict[str, Any]:
    """What is told of the code of one launch."""
    compiled = launch.compiled
    instructions, registers, noted_spills = _read(compiled)
    counted = traffic(instructions)
    result: dict[str, Any] = {
        "registers": registers,
        "shared": compiled.metadata.shared,
        "spills": counted.spill_stores + counted.spill_loads or noted_spills,
        "loads": dict(sorted(counted.loads.items())),
        "stores": dict(sorted(counted.stores.items())),
        "adds": dict(sorted(counted.adds.items())),
        "atomics": dict(sorted(counted.atomics.items())),
        "swaps": counted.swaps,
        "fences": counted.fences.total(),
        "logarithms": logarithms(instructions),
        "special": dict(sorted(counted.special.items())),
        "image_loads": dict(sorted(traffic(filter(reads_image, instructions)).loads.items())),
        "code": len(instructions),
        "waits": waits(instructions),
        "by_function": dict(Counter(function_of(each.line) for each in instructions).most_common()),
    }
    return result


def run(target: str, name: str, maps: tuple[str, ...] = ()) -> dict[str, Any]:
    """Compiles and measures one case, and executes a hot one's code for sm_90 for ``maps``."""
    case, launches = CASES[name], list[Launch]()
    with specialisations.compiling(target, launches):
        case.launch()
    launch = next(each for each in launches if each.compiled.name == case.kernel)
    row = measure(launch)
    if target == "sm_90" and name in HOT and maps:
        row["bytes"] = moved_bytes(launch) / case.pixels
        kernel = executor.Kernel(launch.compiled.asm["ptx"], launch.compiled.metadata.shared)
        row["machine_per_ptx"] = row["code"] / sum(map(len, kernel.blocks))
        loads, found = row["waits"]
        facts = launch.programs, launch.compiled.metadata.num_warps, row["registers"], row["shared"]
        row["launch"] = counting.Code(*facts, loads / max(found, 1))._asdict()
        works = counting.count(name, maps)
        row["work"] = {map: work._asdict() for map, work in works.items()}
        budgeted = {map: work for map, work in works.items() if map in counting.BUDGETED_MAPS}
        row["instructions"] = {map: round(work.instructions, 2) for map, work in budgeted.items()}
        for number in ("lines", "wavefronts"):
            row[number] = {map: round(getattr(work, number), 3) for map, work in budgeted.items()}
    return row


def _run(work: Work) -> dict[str, Any]:
    return run(*work)


def run_all(work: list[Work], jobs: int) -> Iterator[dict[str, Any]]:
    """``run`` of every (target, case, maps), in that order, in ``jobs`` processes."""
    if jobs <= 1 or len(work) < 4:
        yield from map(_run, work)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_run, work, chunksize=4)


# ------------------------------------------------------------------------------------------ output
def _counts(counts: dict[Any, int]) -> str:
    return " ".join(f"{key}:{number}" for key, number in counts.items()) or "-"


def markdown(results: dict[tuple[str, str], dict[str, Any]]) -> Iterator[str]:
    """A table of the code for each target, and one of what was executed."""
    for target in TARGETS:
        rows = {name: row for (where, name), row in results.items() if where == target}
        if not rows:
            continue
        yield f"\n## {target}, Triton {triton.__version__}\n"
        heads = ["case", "registers", "spills", "shared", "loads", "stores", "adds", "fences", "CAS"]
        yield from _head([*heads, "logs", "code"])
        for name, row in rows.items():
            cells = [name, row["registers"], row["spills"], row["shared"]]
            cells += [_counts(row[key]) for key in ("loads", "stores", "adds")]
            cells += [row[key] for key in ("fences", "swaps", "logarithms", "code")]
            yield "| " + " | ".join(map(str, cells)) + " |"
    yield "\nLoads and stores: bytes a lane : how many."
    hot = {name: row for (target, name), row in results.items() if "work" in row}
    if not hot:
        return
    yield f"\n## Executed, for each pixel: sm_90, Triton {triton.__version__}\n"
    yield from _head(counting.HEADS)
    for name, row in hot.items():
        works = {map: counting.Work(**work) for map, work in row["work"].items()}
        code = counting.Code(**row["launch"])
        yield from counting.table(name, works, row["bytes"], row["machine_per_ptx"], code)
    yield from _training_steps(hot)
    yield (
        "\nBounds, predictions and ratios are for an H200 of "
        f"{counting.BYTES_PER_SECOND / 1e12:g} TB/s; nothing was timed here."
    )


def _training_steps(hot: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Beside PyTorch's, for the map at which its kernels were counted."""
    least = {}
    for name, row in hot.items():
        if work := row["work"].get(counting.BUDGETED_MAPS[0]):
            least[name] = counting.bounds(counting.Work(**work), row["bytes"]).binding[1]
    steps = {channels: counting.training_step(channels, least) for channels in (1, 3, 64)}
    if not any(steps.values()):
        return
    yield "\n## A training step (forward, d image, d theta), least picoseconds for each pixel\n"
    heads = ["channels", "ours", "PyTorch's two sampling kernels", "all of eager PyTorch"]
    yield from _head([*heads, "predicted, kernels : ours", "predicted, eager : ours"])
    for channels, step in steps.items():
        if step:
            cells = [f"{time:.1f}" for time in step]
            cells += [f"{time / step.ours:.1f}" for time in (step.kernels, step.eager)]
            yield "| " + " | ".join([str(channels), *cells]) + " |"


def _head(names: Iterable[str]) -> Iterator[str]:
    names = list(names)
    yield "| " + " | ".join(names) + " |"
    yield "|---|" + "---:|" * (len(names) - 1)


def details(results: dict[tuple[str, str], dict[str, Any]]) -> Iterator[str]:
    """Instructions by the function that they come from."""
    for (target, name), row in results.items():
        yield f"\n{name} on {target}: {row['code']} instructions"
        yield "    " + ", ".join(f"{function} {number}" for function, number in row["by_function"].items())


def specialisation_rows(targets: list[str], shard: tuple[int, int]) -> Iterator[str]:
    """One line for each kernel of the pairwise subset of ``specialisations``."""
    for i, options in enumerate(specialisations.pairwise_cases()):
        if i % shard[1] != shard[0] - 1:
            continue
        target, launches = targets[i % len(targets)], list[Launch]()
        with specialisations.compiling(target, launches):
            specialisations.compile_case(options)
        name = specialisations.describe(options)
        for each in launches:
            row = measure(each)
            rules = ", ".join(text for _, text in broken_rules(None, target, row)) or "ok"
            yield (
                f"{target} {each.compiled.name} {name}: registers {row['registers']}, loads "
                f"{_counts(row['loads'])}, stores {_counts(row['stores'])}, adds {_counts(row['adds'])}, "
                f"code {row['code']}: {rules}"
            )


def chosen(patterns: Iterable[str]) -> list[str]:
    """Names of cases that match any pattern, or contain it; all, if there is none."""
    patterns = list(patterns)
    return [
        name
        for name in CASES
        if not patterns or any(fnmatch.fnmatch(name, f"*{pattern}*") for pattern in patterns)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("patterns", nargs="*", metavar="PATTERN", help="cases whose names contain it; * and ? are wildcards")
    add("--target", action="append", choices=list(TARGETS), help="default: all; sm_90 for the budget")
    add("--check", action="store_true", help="compare with the budget; exit code 1 if a rule is broken")
    add("--update-budget", action="store_true", help="write what is counted now into the budget")
    add("--json", metavar="FILE", help="write everything that was counted")
    add("--lines", action="store_true", help="instructions by function instead of tables")
    add("--all", action="store_true", help="the pairwise subset of all specialisations, a line each")
    add("--list", action="store_true", help="print the cases and compile nothing")
    add("--shard", default="1/1", metavar="I/N", help="every Nth case, from the Ith on")
    add("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: as many as cores")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    index, count = map(int, options.shard.split("/"))
    if not 1 <= index <= count:
        parser.error(f"--shard: 1 <= I <= N must hold, got {options.shard}")
    budget = Budget.load()
    if options.check:
        options.patterns = options.patterns or TOLD
    if options.update_budget and budget.triton != triton.__version__ and (options.patterns or options.target):
        parser.error(
            f"a budget is of one Triton: this is {triton.__version__}, update all of {budget.triton}'s"
        )
    budgeted = options.check or options.update_budget
    targets = options.target or (["sm_90"] if budgeted else list(TARGETS))
    if options.all:
        for line in specialisation_rows(targets, (index, count)):
            print(line, flush=True)
        return 0

    names = chosen(options.patterns)
    if not names:
        parser.error(f"no case matches {' '.join(options.patterns)}")
    maps = counting.BUDGETED_MAPS if options.check else tuple(counting.MAPS)
    work = [(target, name, maps) for target in targets for name in names][index - 1 :: count]
    if options.list:
        print(*names, sep="\n")
        return 0
    results = {(target, name): row for (target, name, _), row in zip(work, run_all(work, options.jobs))}
    if options.json:
        data = [{"target": target, "case": name, **row} for (target, name), row in results.items()]
        with replacing(Path(options.json)) as part:
            part.write_text(json.dumps({"triton": triton.__version__, "cases": data}, indent=1))
    if options.check:
        found = complaints(results, budget)
        for line in [*found, HELP] if found else []:
            print(line)
        print(f"{len(results)} kernels checked, {len(found)} complaints")
        return 1 if found else 0
    print(*(details(results) if options.lines else markdown(results)), sep="\n")
    if options.update_budget:
        update(budget, results).save()
        print(f"\nwrote {BUDGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
