"""What the compiler made of the kernels, for GPUs that need not be there: ``python -m bench.report``.

    python -m bench.report [PATTERN ...] [--target sm_90] [--json FILE] [--lines] [--list] [--all]
    python -m bench.report --check | --update-budget

Each case is one launch at a realistic size, with the tiles that ``configs.choose`` gives an H100 or H200. The
launcher itself is called, with tensors that have no memory; what it would run is compiled and read.

**Instructions.** ``code`` is how many there are, subroutines not counted. ``issued`` is how many a warp
issues: the longest path through the code, each loop as often as ``TRIPS`` says. (Both arms of a divergent
branch are one after the other on no path: where a warp takes both, it issues more.) Over all warps of the
launch, and 32 (64) lanes each,

    per pixel              = issued x lanes x warps x programs / pixels of all outputs
    set-up                 = the same without what is inside the loop over blocks of channels
    per pixel and channel  = (per pixel - set-up) / channels

so that idle lanes count. Where one block holds all channels there is no such loop, and no set-up is told: per
pixel and channel is then per pixel / channels. **Bounds** (H200, from sm_90's code): the bytes that must move
over the bandwidth of a copy, and the instructions issued over the rate at which schedulers issue. No run can
be faster than the larger; none has been timed here.

``budget.json`` holds what was counted, by Triton's version, for ``--check``: rules (no spills, no fences, no
compare-and-swap, 16 bytes a lane in channels-last cases), and none of ``GROWING`` more than a tenth larger.
Under another Triton only the rules hold. Exceptions to rules stand there, each with its reason.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import functools
import json
import linecache
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from bench import specialisations
from bench.assembly import Code, Instruction, Line, Loop, parse_amdgcn, parse_sass, traffic
from bench.specialisations import TARGETS, Launch, field_of
from stn_triton.kernels import derivatives, gather, grid, sample, sort
from stn_triton.kernels.host.files import replacing
from stn_triton.kernels.modes import Interpolation, Padding, Source

BUDGET = Path(__file__).with_name("budget.json")
KERNELS = Path(sample.__file__).parent

# An H200 (SXM), as assumed: of the data sheet's 4.8 TB/s a copy is taken to reach 4.3 (`make sweep` measures
# it), of 132 processors with four schedulers, one instruction of 32 lanes a clock each, the clock to be 1.755
# GHz.
BYTES_PER_SECOND = 4.3e12
WARP_INSTRUCTIONS_PER_SECOND = 132 * 4 * 1.755e9

GROWTH = 1.1
GROWING = ("registers", "code", "per_pixel", "spills")

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPE_NAMES = {F16: "f16", BF16: "bf16", F32: "f32"}
CONTROLS = 16


# -------------------------------------------------------------------------------------------- cases
class Case(NamedTuple):
    """One launch. ``vectors``: the image has channels innermost, to be read 16 bytes at a time."""

    name: str
    kernel: str
    launch: Callable[[], object]
    pixels: int
    channels: int
    interpolation: Interpolation
    vectors: bool


def _image(n: int, c: int, size: tuple[int, ...], dtype: torch.dtype, last: bool) -> Tensor:
    tensor = torch.empty((n, c, *size), dtype=dtype, device="meta")
    if not last:
        return tensor
    return tensor.to(memory_format=torch.channels_last if len(size) == 2 else torch.channels_last_3d)


def _shape(direction: str, channels: int, dims: int) -> tuple[int, tuple[int, ...]]:
    """Images and their size: more than the L2 cache holds."""
    if dims == 3:
        return 2, (160, 160, 160)
    if direction.startswith("sorted"):
        return (2, (1080, 1920)) if channels <= 4 else (16, (128, 128))
    if channels <= 4:
        return 8, (1080, 1920)
    return (8, (540, 960)) if channels == 8 else (16, (128, 128))


KERNEL_OF = {
    "forward": "sample_forward_kernel",
    "gather": "gather_backward_kernel",
    "scatter": "sample_backward_kernel",
    "params": "sample_backward_kernel",
    "both": "sample_backward_kernel",
    "sorted-keys": "sort_keys_kernel",
    "sorted-sums": "sort_sums_kernel",
    "grid": "grid_kernel",
    "grid-backward": "grid_kernel",
    "jvp": "sample_jvp_kernel",
    "hvp": "sample_hvp_kernel",
}


def _case(
    direction: str,
    source: str = "affine",
    interpolation: str = "bilinear",
    layout: str = "nchw",
    channels: int = 3,
    dtype: torch.dtype = F32,
    params_dtype: torch.dtype | None = None,
    padding: str = "zeros",
    dims: int = 2,
) -> Case:
    """A same-size warp. ``direction``: a key of ``KERNEL_OF``."""
    kinds = Source[source.upper()], Interpolation[interpolation.upper()], Padding[padding.upper()], False
    params_dtype, last = params_dtype or dtype, layout == "nhwc"
    n, size = _shape(direction, channels, dims)
    names = [direction, source, *([] if padding == "zeros" else [padding])]
    if not direction.startswith("grid"):
        names += [interpolation, layout if dims == 2 else layout.replace("hw", "dhw"), f"c{channels}"]
    elif dims == 3:
        names.append("3d")
    types = [DTYPE_NAMES[dtype]] + ([DTYPE_NAMES[params_dtype]] if params_dtype != dtype else [])

    def launch() -> None:
        shapes = {
            Source.GRID: (n, *size, dims),
            Source.AFFINE: (n, dims, dims + 1),
            Source.PROJECTIVE: (n, 3, 3),
            Source.TPS: (n, CONTROLS + 3, 2),
            Source.FLOW: (n, dims, *size),
        }
        params = torch.empty(shapes[kinds[0]], dtype=params_dtype, device="meta")
        controls = torch.empty((CONTROLS, 2), dtype=params_dtype, device="meta") if source == "tps" else None
        image = _image(n, channels, size, dtype, last)
        output = torch.empty_like(image)
        total = image if dtype == F32 else torch.empty_like(image, dtype=F32)
        coord_tangent = torch.empty((n, 1, *size, dims), device="meta")
        if direction == "forward":
            sample.sample_forward(image, params, controls, output, *kinds)
        elif direction == "gather":
            gather.gather_backward(output, params, image, *kinds)
        elif direction == "scatter":
            sample.sample_backward(output, image, params, controls, total, *kinds, False)
        elif direction == "params":
            sample.sample_backward(output, image, params, controls, None, *kinds, True)
        elif direction == "both":
            total = torch.empty_like(image, dtype=F32)
            sample.sample_backward(output, image, params, controls, total, *kinds, True)
        elif direction.startswith("sorted"):
            sort.sorted_backward(output, params, controls, image, *kinds)
        elif direction == "grid":
            points = torch.empty((n, *size, dims), dtype=dtype, device="meta")
            grid.grid_forward(params, controls, points, kinds[0], False)
        elif direction == "grid-backward":
            points = torch.empty((n, *size, dims), dtype=dtype, device="meta")
            grid.grid_backward(points, params, controls, kinds[0], False)
        elif direction == "jvp":
            tangents = torch.empty_like(image), params, controls, coord_tangent
            derivatives.sample_jvp(image, *tangents, output, *kinds)
        else:
            tangents = torch.empty_like(image), params, controls, coord_tangent
            total = torch.empty_like(image, dtype=F32)
            derivatives.sample_hvp(output, image, *tangents, total, *kinds, True)

    return Case(
        "-".join([*names, "+".join(types)]),
        KERNEL_OF[direction],
        launch,
        n * math.prod(size),
        1 if direction.startswith("grid") or direction == "sorted-keys" else channels,
        kinds[1],
        last and channels * dtype.itemsize % 16 == 0,
    )


def _cases() -> Iterator[Case]:
    for channels in (1, 3, 4, 64):
        yield _case("forward", channels=channels)
        yield _case("forward", channels=channels, dtype=BF16, params_dtype=F32)
    yield _case("forward", dtype=F16, params_dtype=F32)
    yield _case("forward", padding="border")
    yield _case("forward", padding="reflection")
    for channels in (3, 8, 64, 256):
        yield _case("forward", layout="nhwc", channels=channels)
    for channels in (64, 256):
        yield _case("forward", layout="nhwc", channels=channels, dtype=BF16, params_dtype=F32)
    for interpolation in ("nearest", "bicubic"):
        yield _case("forward", interpolation=interpolation)
        yield _case("forward", interpolation=interpolation, dtype=BF16, params_dtype=F32)
        yield _case("forward", interpolation=interpolation, layout="nhwc", channels=64)
    for source in ("projective", "tps", "flow", "grid"):
        yield _case("forward", source)
        yield _case("forward", source, layout="nhwc", channels=64)
    yield _case("forward", "tps", channels=1)
    yield _case("forward", "grid", channels=1)
    yield _case("forward", "grid", channels=64)
    yield _case("forward", "grid", dtype=BF16)
    yield _case("forward", "grid", "bicubic")
    for source in ("affine", "grid"):
        yield _case("forward", source, channels=1, dims=3)
    yield _case("forward", channels=16, layout="nhwc", dims=3)
    yield _case("forward", interpolation="bicubic", channels=1, dims=3)

    for channels in (1, 3, 4, 64):
        yield _case("gather", channels=channels)
    yield _case("gather", dtype=BF16, params_dtype=F32)
    for channels in (8, 64, 256):
        yield _case("gather", layout="nhwc", channels=channels)
    yield _case("gather", layout="nhwc", channels=64, dtype=BF16, params_dtype=F32)
    yield _case("gather", interpolation="nearest")
    yield _case("gather", interpolation="bicubic")
    yield _case("gather", padding="border")
    yield _case("gather", "projective")
    yield _case("gather", "projective", layout="nhwc", channels=64)
    yield _case("gather", channels=1, dims=3)

    for source in ("grid", "flow", "tps"):
        yield _case("scatter", source)
        yield _case("both", source)
    for source in ("grid", "flow"):
        yield _case("scatter", source, layout="nhwc", channels=64)
        yield _case("both", source, layout="nhwc", channels=64)
    yield _case("scatter", "grid", channels=64)
    yield _case("scatter", "grid", layout="nhwc", channels=64, dtype=BF16)
    yield _case("scatter", "grid", channels=1, dims=3)
    yield _case("both", "grid", "bicubic")

    for channels in (1, 3, 64):
        yield _case("params", channels=channels)
    yield _case("params", dtype=BF16, params_dtype=F32)
    yield _case("params", layout="nhwc", channels=64)
    yield _case("params", interpolation="bicubic")
    yield _case("params", channels=1, dims=3)
    for source in ("projective", "tps", "flow", "grid"):
        yield _case("params", source)

    yield _case("sorted-keys", "grid")
    yield _case("sorted-sums", "grid")
    yield _case("sorted-sums", "grid", channels=64)
    yield _case("sorted-sums", "grid", layout="nhwc", channels=64)
    for source in ("affine", "projective", "tps"):
        yield _case("grid", source)
        yield _case("grid-backward", source)
    yield _case("grid", dims=3)
    yield _case("jvp")
    yield _case("jvp", layout="nhwc", channels=64)
    yield _case("jvp", "grid")
    yield _case("hvp", "grid")
    yield _case("hvp", "grid", layout="nhwc", channels=64)


CASES = {case.name: case for case in _cases()}
# Checked for every target; the others for sm_90 alone.
EVERYWHERE = (
    "forward-affine-bilinear-nchw-c3-f32",
    "forward-affine-bilinear-nhwc-c64-bf16+f32",
    "forward-tps-bilinear-nchw-c3-f32",
    "gather-affine-bilinear-nchw-c3-f32",
    "gather-affine-bilinear-nhwc-c64-f32",
    "scatter-grid-bilinear-nhwc-c64-f32",
    "params-affine-bilinear-nchw-c3-f32",
    "sorted-sums-grid-bilinear-nhwc-c64-f32",
)

# ----------------------------------------------------------------------------------- loops and trips
# Outputs along x, y and z that read one input pixel of a same-size image turned by 45 degrees in the plane:
# ceil(support x (cos + sin)), and the support along z.
READERS = {
    Interpolation.NEAREST: (2, 2, 1),
    Interpolation.BILINEAR: (3, 3, 2),
    Interpolation.BICUBIC: (6, 6, 4),
}
Trips = Callable[[dict[str, Any], Case], float]


def _readers(axis: int) -> Trips:
    return lambda arguments, case: READERS[case.interpolation][axis]


def _always(count: int) -> Trips:
    return lambda arguments, case: count


# How often each loop of the kernels is taken, by the function it stands in and the variable it counts with.
# Zero: the way for maps that fold or magnify strongly, or (in sorted sums) for long lists of outputs.
TRIPS: dict[tuple[str, str], Trips] = {
    ("*", "block"): lambda arguments, case: arguments["split_blocks"],
    # of the two ways, the dearer one: blocks of which not all pixels are read inside the image
    ("*", "step"): lambda arguments, case: arguments["steps"],
    ("tps_coordinates", "k"): lambda arguments, case: arguments["num_controls"],
    ("tps_backward", "k0"): lambda arguments, case: -(-arguments["num_controls"] // 16),
    ("gather_backward_kernel", "t"): lambda arguments, case: arguments["transforms"],
    ("find_candidates", "i"): _always(1),
    ("add_transform", "i"): _always(1),
    **{("add_by_pixel", axis): _readers(number) for number, axis in enumerate("xyz")},
    ("add_by_output", "start"): _always(0),
    ("add_by_output", "_"): _always(0),
    **{("add_block", axis): _always(0) for axis in "xyz"},
    ("sort_sums_kernel", "number"): lambda arguments, case: arguments["lists"],
    ("sort_sums_kernel", "cell"): lambda arguments, case: len(READERS[case.interpolation][:2]),
    ("add_row", "i"): _readers(0),
    ("add_row", "while"): _always(0),
    ("add_row", "start"): _always(0),
}


def kernel_file(file: str) -> Path | None:
    """The source of the kernels that a name in the code's line table means; None for any other file."""
    parts = Path(file).parts
    if "kernels" not in parts:
        return None
    path = KERNELS.joinpath(*parts[len(parts) - parts[::-1].index("kernels") :])
    return path if path.exists() else None


@functools.cache
def _scopes(file: str) -> list[tuple[range, str, str | None]]:
    """Functions, (lines, name, None), and loops, (lines, function, variable), inner after outer ones.

    Of a source file of the kernels; of any other, nothing.
    """
    path = kernel_file(file)
    if path is None:
        return []
    found: list[tuple[range, str, str | None]] = []

    def visit(node: ast.AST, function: str) -> None:
        for child in ast.iter_child_nodes(node):
            inside = function
            if isinstance(child, ast.FunctionDef):
                inside = child.name
                found.append((range(child.lineno, (child.end_lineno or child.lineno) + 1), inside, None))
            elif isinstance(child, ast.For | ast.While):
                lines = range(child.lineno, (child.end_lineno or child.lineno) + 1)
                static = isinstance(child, ast.For) and "static_range" in ast.unparse(child.iter)
                if not static:
                    variable = ast.unparse(child.target) if isinstance(child, ast.For) else "while"
                    found.append((lines, inside, variable))
            visit(child, inside)

    visit(ast.parse(path.read_text()), "")
    return found


def function_of(line: Line | None) -> str:
    """The function of the kernels in which a line stands."""
    if line is None:
        return "?"
    names = [name for lines, name, variable in _scopes(line[0]) if variable is None and line[1] in lines]
    return names[-1] if names else Path(line[0]).name


def loop_of(line: Line | None) -> tuple[str, str] | None:
    """The innermost loop of the source around a line, the line of its ``for`` included."""
    scopes = _scopes(line[0]) if line else []
    loops = [(name, variable) for lines, name, variable in scopes if variable and line and line[1] in lines]
    return loops[-1] if loops else None


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


def source_loops(loop: Loop, code: Code) -> list[tuple[str, str]]:
    """The loops of the source that a loop of the code is: as its branches back say, or else its lines."""
    found = list(dict.fromkeys(filter(None, map(loop_of, loop.lines))))
    if found:
        return found
    inner = {block for other in code.loops if other.blocks < loop.blocks for block in other.blocks}
    own = Loop(loop.header, loop.blocks - inner, ())
    votes = Counter(filter(None, (loop_of(each.line) for each in code.inside(own))))
    return [key for key, _ in votes.most_common(1)]


def unrolled(loop: Loop, code: Code, pixels: float) -> tuple[int, int]:
    """How many trips of the source a trip of this loop makes, and one of the widest loop beside it.

    The compiler may unroll: then a second loop does the rest, with fewer memory operations. In the loop over
    control points the logarithms tell, one for each point and each of a lane's ``pixels``.
    """
    keys = source_loops(loop, code)

    def parents(other: Loop) -> list[Loop]:
        return [outer for outer in code.loops if other.blocks < outer.blocks]

    alike = [o for o in code.loops if source_loops(o, code) == keys and parents(o) == parents(loop)]
    counted = {id(other): traffic(code.inside(other)) for other in alike}
    if keys == [("tps_coordinates", "k")] and logarithms(code.inside(loop)):
        sizes = {id(other): logarithms(code.inside(other)) / max(pixels, 1) for other in alike}
        least = 1.0
    else:
        sizes = {key: counts.loads.total() + counts.adds.total() for key, counts in counted.items()}
        least = max(min(sizes.values()), 1)
    return max(int(sizes[id(loop)] / least), 1), max(int(max(sizes.values()) / least), 1)


def trips_of(loop: Loop, code: Code, launch: Launch, case: Case, pixels: float) -> tuple[float, list[str]]:
    """How often a loop is taken, and its names; one that ``TRIPS`` does not know is taken once.

    ``pixels``: those of a lane.
    """
    keys = source_loops(loop, code)
    total, names = 1.0, [] if keys else ["unknown"]
    for key in keys:
        trips = TRIPS.get(key) or TRIPS.get(("*", key[1]))
        names.append(f"{key[0]}:{key[1]}" + ("" if trips else " unknown"))
        total *= trips(launch.arguments, case) if trips else 1
    own, most = unrolled(loop, code, pixels)
    if own > 1:
        return total // own, [*names, f"({own} at once)"]
    return (total % most, [*names, "(the rest)"]) if most > 1 else (total, names)


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


def measure(launch: Launch, case: Case, target: str) -> dict[str, Any]:
    """Everything that is told of one case on one target."""
    compiled = launch.compiled
    instructions, registers, noted_spills = _read(compiled)
    code, counted = Code(instructions), traffic(instructions)
    lanes, warps = TARGETS[target].warp_size, compiled.metadata.num_warps
    spec = launch.arguments["SPEC"]
    pixels = field_of(spec, "rows") * field_of(spec, "columns") / (lanes * warps)
    trips = {id(loop): trips_of(loop, code, launch, case, pixels) for loop in code.loops}

    def once(loop: Loop) -> float:
        return trips[id(loop)][0]

    def set_up(loop: Loop) -> float:
        names = trips[id(loop)][1]
        return 0.0 if any(name.endswith(":block") for name in names) else once(loop)

    issued, fixed = code.issued(once), code.issued(set_up)
    by_pixel = lanes * warps * launch.programs / case.pixels
    spilled = 0.0  # times each block is taken
    for number, block in enumerate(code.blocks):
        here = traffic(instructions[i] for i in block)
        times = math.prod(once(loop) for loop in code.loops if number in loop.blocks)
        spilled += times * (here.spill_stores + here.spill_loads)
    spills = counted.spill_stores + counted.spill_loads
    result: dict[str, Any] = {
        "registers": registers,
        "shared": compiled.metadata.shared,
        "spills": spills or noted_spills,
        "spills_issued": round(spilled, 1),
        "loads": dict(sorted(counted.loads.items())),
        "stores": dict(sorted(counted.stores.items())),
        "adds": dict(sorted(counted.adds.items())),
        "atomics": dict(sorted(counted.atomics.items())),
        "swaps": counted.swaps,
        "fences": counted.fences.total(),
        "logarithms": logarithms(code.instructions),
        "special": dict(sorted(counted.special.items())),
        "image_loads": dict(sorted(traffic(filter(reads_image, instructions)).loads.items())),
        "code": len(instructions),
        "issued": round(issued, 1),
        "per_pixel": round(issued * by_pixel, 2),
        "set_up": round(fixed * by_pixel, 2) if fixed < issued else None,
        "per_channel": round((issued - fixed if fixed < issued else issued) * by_pixel / case.channels, 3),
        "loops": [
            f"{' / '.join(names)} x {count:g}: {len(code.inside(loop))}"
            for loop, (count, names) in ((loop, trips[id(loop)]) for loop in code.loops)
        ],
        "by_function": dict(Counter(function_of(each.line) for each in instructions).most_common()),
    }
    if target == "sm_90":
        data = moved_bytes(launch)
        result["bytes"] = data
        result["bytes_us"] = round(data / BYTES_PER_SECOND * 1e6, 1)
        result["issue_us"] = round(launch.programs * warps * issued / WARP_INSTRUCTIONS_PER_SECOND * 1e6, 1)
    return result


def run(target: str, name: str) -> dict[str, Any]:
    """Compiles and measures one case."""
    case, launches = CASES[name], list[Launch]()
    with specialisations.compiling(target, launches):
        case.launch()
    return measure(next(each for each in launches if each.compiled.name == case.kernel), case, target)


def _run(work: tuple[str, str]) -> dict[str, Any]:
    return run(*work)


def run_all(work: list[tuple[str, str]], jobs: int) -> Iterator[dict[str, Any]]:
    """``run`` of every (target, case), in that order, in ``jobs`` processes."""
    if jobs <= 1 or len(work) < 4:
        yield from map(_run, work)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_run, work, chunksize=4)


# ------------------------------------------------------------------------------------------ budget
class Budget(NamedTuple):
    """``exceptions``: {"case", "target", "rule", "why"}, the first two with wildcards.

    One with "triton", with wildcards too, holds under those versions alone.
    """

    triton: str
    exceptions: list[dict[str, str]]
    cases: dict[str, dict[str, dict[str, Any]]]

    @classmethod
    def load(cls) -> Budget:
        return cls(**json.loads(BUDGET.read_text())) if BUDGET.exists() else cls(triton.__version__, [], {})

    def save(self) -> None:
        """One case and target a line, that differences can be read."""
        lines = []
        for name in (name for name in CASES if name in self.cases):
            rows = [f"{json.dumps(target)}: {json.dumps(row)}" for target, row in self.cases[name].items()]
            lines.append(f"    {json.dumps(name)}: {{\n      " + ",\n      ".join(rows) + "\n    }")
        rest = ",\n".join(f"    {json.dumps(exception)}" for exception in self.exceptions)
        head = f'{{\n  "triton": {json.dumps(self.triton)},\n  "exceptions": [\n{rest}\n  ],\n  "cases": {{\n'
        with replacing(BUDGET) as part:
            part.write_text(head + ",\n".join(lines) + "\n  }\n}\n")

    def excused(self, rule: str, name: str, target: str) -> bool:
        return any(
            rule == each["rule"]
            and fnmatch.fnmatch(triton.__version__, each.get("triton", "*"))
            and fnmatch.fnmatch(name, each["case"])
            and fnmatch.fnmatch(target, each["target"])
            for each in self.exceptions
        )


BUDGETED = (
    *("registers", "shared", "spills", "code", "issued", "per_pixel", "set_up", "per_channel"),
    *("loads", "stores", "adds", "logarithms"),
)


def broken_rules(case: Case | None, target: str, row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(rule, what broke it) of one case; without one, of any kernel."""
    if row["spills"]:
        yield "spills", f"{row['spills']} spills ({row['spills_issued']:g} issued), none allowed"
    if row["fences"]:
        yield "fences", f"{row['fences']} fences, none allowed"
    if row["swaps"]:
        yield "swaps", f"{row['swaps']} compare-and-swaps, none allowed"
    if unknown := [loop for loop in row["loops"] if "unknown" in loop]:
        yield "loops", f"TRIPS in bench/report.py does not say how often these loops are taken: {unknown}"
    if case is None or not case.vectors:
        return
    if set(row["image_loads"]) != {16}:
        yield "vectors", f"loads of images by bytes a lane are {row['image_loads']}: all must be 16"
    writes = case.kernel in ("sample_forward_kernel", "gather_backward_kernel", "sort_sums_kernel")
    if writes and set(row["stores"]) != {16}:
        yield "vectors", f"stores by bytes a lane are {row['stores']}: all must be 16"
    if target in ("sm_90", "sm_100") and set(row["adds"]) - {"f32x4"}:
        yield "vectors", f"additions to memory are {row['adds']}: all must be f32x4"


def complaints(results: dict[tuple[str, str], dict[str, Any]], budget: Budget) -> list[str]:
    """What ``--check`` has against the results: broken rules, and growth since the budget was written."""
    found = []
    same = budget.triton.split(".")[:2] == triton.__version__.split(".")[:2]
    for (target, name), row in results.items():
        where = f"{name} on {target}"
        for rule, text in broken_rules(CASES.get(name), target, row):
            if not budget.excused(rule, name, target):
                found.append(f"{where}: {text}")
        if not same:
            continue
        allowed = budget.cases.get(name, {}).get(target)
        if allowed is None:
            found.append(f"{where}: not in the budget")
            continue
        for number in GROWING:
            if row[number] > GROWTH * allowed[number]:
                found.append(f"{where}: {number} {row[number]:g}, budget {allowed[number]:g} and a tenth")
    return found


HELP = (
    "See one case: python -m bench.report CASE --target TARGET --lines. "
    "After a change that is meant: python -m bench.report --update-budget"
)


def update(budget: Budget, results: dict[tuple[str, str], dict[str, Any]]) -> Budget:
    """The budget with the results in the place of what it said.

    It forgets cases that are gone, and exceptions for cases among the results that break no rule any more.
    """
    cases = {name: dict(rows) for name, rows in budget.cases.items() if name in CASES}
    for (target, name), row in results.items():
        cases.setdefault(name, {})[target] = {key: row[key] for key in BUDGETED}
    ordered = {
        name: {target: rows[target] for target in TARGETS if target in rows} for name, rows in cases.items()
    }

    def needed(exception: dict[str, str]) -> bool:
        alone = budget._replace(exceptions=[exception])
        rule = exception["rule"]
        met = [key for key in results if alone.excused(rule, key[1], key[0])]
        broken = (rule in dict(broken_rules(CASES[key[1]], key[0], results[key])) for key in met)
        return not met or any(broken)

    return Budget(triton.__version__, list(filter(needed, budget.exceptions)), ordered)


# ------------------------------------------------------------------------------------------ output
def _counts(counts: dict[Any, int]) -> str:
    return " ".join(f"{key}:{number}" for key, number in counts.items()) or "-"


def markdown(results: dict[tuple[str, str], dict[str, Any]]) -> Iterator[str]:
    """A table for each target."""
    for target in TARGETS:
        rows = {name: row for (where, name), row in results.items() if where == target}
        if not rows:
            continue
        bound = target == "sm_90"
        yield f"\n## {target}, Triton {triton.__version__}\n"
        heads = ["case", "registers", "spills (issued)", "shared", "loads", "stores", "adds", "fences"]
        heads += ["CAS", "logs", "code", "issued", "per pixel", "set-up", "per pixel and channel"]
        if bound:
            heads += ["bound by bytes, us", "by issue, us", "binds"]
        yield "| " + " | ".join(heads) + " |"
        yield "|---|" + "---:|" * (len(heads) - 1)
        for name, row in rows.items():
            spills = f"{row['spills']} ({row['spills_issued']:g})" if row["spills"] else "0"
            cells = [name, row["registers"], spills, row["shared"]]
            cells += [_counts(row[key]) for key in ("loads", "stores", "adds")]
            cells += [row["fences"], row["swaps"], row["logarithms"], row["code"], f"{row['issued']:g}"]
            numbers = [row[key] for key in ("per_pixel", "set_up", "per_channel")]
            cells += ["-" if number is None else f"{number:.1f}" for number in numbers]
            if bound:
                cells += [row["bytes_us"], row["issue_us"]]
                cells.append("bytes" if row["bytes_us"] >= row["issue_us"] else "issue")
            yield "| " + " | ".join(map(str, cells)) + " |"
    yield (
        "\nLoads and stores: bytes a lane : how many. Bounds: of an H200, "
        f"{BYTES_PER_SECOND / 1e12:g} TB/s and {WARP_INSTRUCTIONS_PER_SECOND / 1e12:.3f}e12 instructions "
        "of a warp a second; nothing was timed."
    )


def details(results: dict[tuple[str, str], dict[str, Any]]) -> Iterator[str]:
    """Loops, and instructions by the function that they come from."""
    for (target, name), row in results.items():
        yield f"\n{name} on {target}: {row['code']} instructions, {row['issued']:g} issued"
        yield from (f"    loop {loop}" for loop in row["loops"])
        yield "    " + ", ".join(f"{function} {number}" for function, number in row["by_function"].items())


def specialisation_rows(targets: list[str], shard: tuple[int, int]) -> Iterator[str]:
    """One line for each kernel of the pairwise subset of ``specialisations``."""
    for i, options in enumerate(specialisations.pairwise_cases()):
        if i % shard[1] != shard[0] - 1:
            continue
        target, launches = targets[i % len(targets)], list[Launch]()
        with specialisations.compiling(target, launches):
            specialisations.compile_case(options)
        interpolation = options.get("interpolation", Interpolation.NEAREST)
        name = specialisations.describe(options)
        for each in launches:
            case = Case(name, each.compiled.name, lambda: None, 1, 1, interpolation, False)
            row = measure(each, case, target)
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
    add("--target", action="append", choices=list(TARGETS), help="default: all")
    add("--check", action="store_true", help="compare with the budget; exit code 1 if a rule is broken")
    add("--update-budget", action="store_true", help="write what is counted now into the budget")
    add("--json", metavar="FILE", help="write everything that was counted")
    add("--lines", action="store_true", help="loops, and instructions by function, instead of tables")
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
    if options.update_budget and budget.triton != triton.__version__ and (options.patterns or options.target):
        parser.error(
            f"a budget is of one Triton: this is {triton.__version__}, update all of {budget.triton}'s"
        )
    targets = options.target or list(TARGETS)
    if options.all:
        for line in specialisation_rows(targets, (index, count)):
            print(line, flush=True)
        return 0

    names = chosen(options.patterns)
    if not names:
        parser.error(f"no case matches {' '.join(options.patterns)}")
    work = [(target, name) for target in targets for name in names]
    if options.check:
        work = [(target, name) for target, name in work if target == "sm_90" or name in EVERYWHERE]
    work = work[index - 1 :: count]
    if options.list:
        print(*names, sep="\n")
        return 0
    results = dict(zip(work, run_all(work, options.jobs)))
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
