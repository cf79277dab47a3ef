"""The kernels keep to ``bench/budget.json``, and the report that says so sees what it should."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

import triton

from bench import budget as budgets
from bench import counting, launches, report
from bench.assembly import parse_amdgcn, parse_sass, traffic, waits
from bench.executor import wavefronts

ROOT = Path(__file__).resolve().parent.parent
has_tools = (Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm").exists()
needs_tools = pytest.mark.skipif(not has_tools, reason="this Triton carries no disassembler")


def run(*command):
    """Runs Python in a process of its own: here the kernels belong to the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    command = [sys.executable, "-W", "ignore", *command]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@needs_tools
def test_kernels_keep_their_budget():
    """A few telling cases: ``make kernels ARGS=--update-budget`` counts all."""
    result = run("-m", "bench.report", "--check", "--jobs", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 complaints" in result.stdout


BORDER = """
import torch
from bench.counting import CASES, executing

case = CASES["gather-affine-border-bilinear-nchw-c3-f32"]
theta = torch.tensor([[1.0, 0.0, -0.1], [0.0, 1.0, 0.0]])
begin = lambda launch: [launch.arguments["row_tiles"] // 2 * launch.arguments["column_tiles"]]
with executing(sample=begin) as runs:
    case.launch(theta, True)
print(runs[-1].counts.instructions)
"""


@needs_tools
def test_a_tile_at_the_border_is_not_waited_for_long():
    """One to which many outputs are clamped. A GPU waited for programs that did 13 such tiles one by one."""
    result = run("-c", BORDER)
    assert result.returncode == 0, result.stderr
    assert 1000 < int(result.stdout) < 100_000


TURNED = """
from bench import counting

print(counting.count("forward-affine-bilinear-nchw-c3-f32", ("90 degrees",))["90 degrees"].lines)
"""


@needs_tools
def test_lanes_of_turned_maps_lie_in_patches():
    """Cache lines a pixel: 4.0 if 32 lanes lie in a row, whatever the map."""
    result = run("-c", TURNED)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 3


def test_budget_has_every_case():
    budget = budgets.Budget.load()
    assert set(budget.cases) == set(launches.CASES)
    assert set(launches.HOT) | set(launches.TOLD) <= set(launches.CASES)
    for name, row in budget.cases.items():
        executed = dict.fromkeys(counting.BUDGETED_MAPS) if name in launches.HOT else {}
        for number in budgets.EXECUTED:
            assert list(row.get(number, {})) == list(executed), (name, number)
    for exception in budget.exceptions:
        assert exception["rule"] in ("spills", "vectors", *budgets.GROWTH)
        assert len(exception["why"]) > 20
    assert set(counting.PYTORCH["kernels"]) <= set(launches.HOT)


TABLE = {
    "C = 1 planar": "nchw-c1-f32",
    "C = 3 planar": "nchw-c3-f32",
    "C = 64 planar": "nchw-c64-f32",
    "C = 64 channels last, fp32": "nhwc-c64-f32",
    "C = 64 channels last, bf16": "nhwc-c64-bf16+f32",
}


def test_the_table_of_costs_is_the_budget():
    """What ``kernels/README.md`` says of instructions, wavefronts and the bounds that follow from them."""
    lines = (ROOT / "kernels" / "README.md").read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("| kernel | instructions"))
    heads, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[begin : begin + 13])
    picoseconds = 1e12 / counting.CLOCKS_PER_SECOND
    for name, *cells in rows:
        kind = next(kind for kind in ("forward", "gather", "d theta") if name.startswith(kind))
        case = f"{kind.replace('d theta', 'params')}-affine-bilinear-{TABLE[name.removeprefix(kind).strip()]}"
        row = budgets.Budget.load().cases[case]
        instructions, wavefronts = (
            row[number]["6 degrees, zoom 0.9"] for number in ("instructions", "wavefronts")
        )
        told = dict(zip(heads[1:], cells, strict=True))
        bounds = told["issue / L1 / L2 / DRAM, ps"].split(" / ")
        issue = instructions / 32 / counting.SCHEDULERS * picoseconds
        for digits, value in (
            (told["instructions (PTX)"], instructions),
            (told["wavefronts"], wavefronts),
            (bounds[0], issue),
            (bounds[1], wavefronts * picoseconds),
        ):
            unit = 10.0 ** -len(digits.partition(".")[2])
            assert abs(float(digits) - value) <= 0.51 * unit, (name, digits, value)


LANES = np.arange(32)
ROWS_OF_8 = LANES % 8 * 4, LANES // 8


@pytest.mark.parametrize(
    "addresses, size, expected",
    [
        pytest.param(4 * LANES, 4, 1, id="a row"),
        pytest.param(4 * LANES + 4, 4, 2, id="a row that begins inside a sector"),
        pytest.param(2 * LANES, 2, 1, id="a row of halves"),
        pytest.param(0 * LANES, 4, 1, id="one word for all"),
        pytest.param(128 * LANES, 4, 32, id="a column, 128 bytes apart"),
        pytest.param(32 * LANES, 4, 8, id="a sector each"),
        # 32 different banks of four bytes: shared memory would give all at once
        pytest.param(129 * 4 * LANES, 4, 8, id="a diagonal"),
        pytest.param(ROWS_OF_8[0] + 1920 * 4 * ROWS_OF_8[1], 4, 4, id="rows of 8, whole lines apart"),
        pytest.param(ROWS_OF_8[0] + 56 * 4 * ROWS_OF_8[1], 4, 1, id="rows of 8, 7 sectors apart"),
        pytest.param(8 * LANES, 8, 2, id="8 bytes a lane"),
        pytest.param(16 * LANES, 16, 4, id="16 bytes a lane"),
        pytest.param(0 * LANES, 16, 4, id="the same 16 bytes for all"),
        pytest.param(LANES // 4 * 1024 + LANES % 4 * 16, 16, 8, id="64 bytes of each of 8 pixels"),
    ],
)
def test_lanes_that_meet_in_a_bank_are_served_in_turn(addresses, size, expected):
    """Beside another request; a bank of L1 has 32 bytes, and gives one place of it in a clock."""
    assert wavefronts(np.stack([addresses, 0 * addresses]), size).tolist() == [expected, max(size // 4, 1)]


def test_banks_of_shared_memory_are_words():
    def shared(addresses):
        return wavefronts(addresses[None], 4, bank=4).item()

    assert shared(129 * 4 * LANES) == shared(4 * LANES + 4) == shared(0 * LANES) == 1
    assert shared(8 * LANES) == 2
    assert shared(128 * LANES) == 32


WORK = counting.Work(
    instructions=320,
    lines=1.0,
    sectors=8.0,
    wavefronts=2.0,
    l2_bytes=8.6,
    loads=0.25,
    lines_per_load=4,
    sectors_per_load=8,
)


def test_the_longest_bound_binds():
    """Of a pixel: 132 x 4 warps issue an instruction a clock, and L1 of 132 processors gives a wavefront."""
    limits = counting.bounds(WORK, bytes_per_pixel=4.3)
    assert limits.issue / limits.l1 == pytest.approx(320 / 32 / 4 / 2)
    assert limits.l2 == pytest.approx(2)
    assert limits.dram == pytest.approx(1)
    assert limits.binding == ("issue", limits.issue)


@pytest.mark.parametrize(
    "registers, warps, shared, programs, resident",
    [
        (168, 1, 0, 10**6, 12),  # as an H200 had them, within a tenth: 10.5
        (128, 1, 0, 10**6, 16),
        (46, 4, 0, 10**6, 10),
        (96, 4, 0, 10**6, 5),
        (32, 1, 0, 10**6, 32),
        (32, 8, 0, 10**6, 8),
        (32, 4, 100 * 1024, 10**6, 2),
        (168, 1, 0, 1280, 10),
    ],
)
def test_programs_that_fit_a_processor(registers, warps, shared, programs, resident):
    assert counting.Code(programs, warps, registers, shared, 1.0).resident == resident


def test_few_warps_wait_and_many_do_not():
    """A warp alone takes its latency and all that it does; as many as fit hardly more than the bound."""
    limits = counting.bounds(WORK, 4.3)
    alone = counting.Code(132, 1, 255, 0, 4.0)
    clocks = 0.25 / 4 * counting.CLOCKS_PER_WAIT + 10 * (counting.CLOCKS_PER_INSTRUCTION - 1 / 4)
    own = clocks * 1e12 / counting.CLOCKS_PER_SECOND
    assert counting.predicted(WORK, 4.3, alone) == pytest.approx(limits.issue + limits.l1 + limits.l2 + own)
    times = [
        counting.predicted(WORK, 4.3, counting.Code(132 * 64, 1, registers, 0, 4.0))
        for registers in (255, 168, 128, 64, 32)
    ]
    assert times == sorted(times, reverse=True)
    assert limits.binding[1] < times[-1] < 1.2 * limits.binding[1]
    # half of a second turn is as long as a whole one
    turns = [counting.predicted(WORK, 4.3, counting.Code(132 * n, 1, 255, 0, 4.0)) for n in (12, 16)]
    assert turns == pytest.approx([turns[1] * 4 / 3, turns[1]])


def test_a_training_step_is_its_launches():
    """At C = 3 and 4.3 TB/s: PyTorch's kernels 328 and 507 instructions, and 76 bytes besides."""
    names = [f"{each}-affine-bilinear-nchw-c3-f32" for each in ("forward", "gather", "params")]
    step = counting.training_step(3, dict.fromkeys(names, 5.0))
    assert step.ours == 15
    assert step.kernels == pytest.approx((328 + 507) / 128 / 132 / 1.93e-3)
    assert step.eager - step.kernels == pytest.approx(76 / 4.3)
    assert counting.training_step(3, {names[0]: 5.0}) is None


def test_lines_are_found_whichever_way_the_kernels_are_imported():
    """Line tables name files as they were imported: through the link, in place or installed."""
    source = report.KERNELS / "device" / "padding.py"
    line = 1 + next(
        i for i, text in enumerate(source.read_text().splitlines()) if text.startswith("def pad_index")
    )
    for root in (str(report.KERNELS), "/x/kernels", "/x/site-packages/stn_triton/kernels"):
        assert report.function_of((f"{root}/device/padding.py", line)) == "pad_index"
    assert report.function_of(("/x/triton/language/standard.py", line)) == "standard.py"


# ------------------------------------------------------------------------------------------ machine code
# An entry of two nested loops, two arms, everything that breaks a rule, and a subroutine.
SASS = """
	.section	.text.kernel,"ax",@progbits
kernel:
.text.kernel:
	//## File "/x/kernels/sample.py", line 10
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 EXIT ;
.L_x_1:
	//## File "/x/kernels/sample.py", line 20
        /*0030*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0040*/                   MUFU.LG2 R5, R5 ;
        /*0050*/                   LDL R6, [R1+0x4] ;
	//## File "/x/kernels/sample.py", line 30
        /*0060*/               @P1 BRA `(.L_x_2) ;
        /*0070*/              @!P4 BRA !P3, `(.L_x_3) ;
        /*0080*/                   REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R4 ;
        /*0090*/                   REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R4 ;
        /*00a0*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*00b0*/                   MEMBAR.ALL.GPU ;
.L_x_4:
	//## File "/x/kernels/sample.py", line 40
        /*00c0*/                   BRA.U UP0, `(.L_x_1) ;
        /*00d0*/                   CALL.REL.NOINC `($__internal_0_$__slow) ;
        /*00e0*/                   ATOMG.E.CAS.STRONG.GPU PT, R4, [R2], R4, R5 ;
        /*00f0*/                   CCTL.IVALL ;
        /*0100*/                   STL [R1], R5 ;
        /*0110*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0120*/                   EXIT ;
        .weak           $__internal_0_$__slow
$__internal_0_$__slow:
        /*0130*/                   STL [R1], R5 ;
        /*0140*/                   RET.REL.NODEC R4 `(kernel) ;
.L_x_5:
        /*0150*/                   BRA `(.L_x_5);
"""
AMDGCN = """
	.text
kernel:
	.file	1 "/x/kernels" "sample.py"
	.loc	1 10 0                          ; sample.py:10:0
	s_load_dwordx2 s[0:1], s[2:3], 0x0
	buffer_load_dwordx4 v[0:3], v4, s[4:7], 0 offen
	s_cbranch_scc1 .LBB0_3
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	.loc	1 20 0
	global_load_short_d16_hi v1, v2, s[0:1]
	v_log_f32_e32 v1, v1
	global_atomic_add_f32 v0, v1, s[0:1]
	global_atomic_cmpswap v0, v1, v[2:3], s[0:1] sc0
	scratch_store_dword off, v1, s32
	s_cbranch_vccnz .LBB0_2
.LBB0_3:
	buffer_wbl2 sc1
	scratch_load_dword v1, off, s32
	buffer_store_dwordx2 v[0:1], v4, s[4:7], 0 offen
	s_endpgm
	scratch_store_dword off, v1, s32
"""


def test_sass_is_read():
    counted = traffic(parse_sass(SASS))
    assert counted.loads == {16: 1, 2: 1}
    assert counted.stores == {8: 1}
    assert counted.adds == {"f32x4": 1, "f32": 1}
    assert counted.swaps == 1
    assert counted.fences.total() == 2
    assert (counted.spill_stores, counted.spill_loads) == (1, 1)  # the subroutine's is not followed into
    assert counted.special == {"lg2": 1}
    assert counted.calls == 1


WAITING = """
        /*0000*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10] ;
        /*0020*/                   IADD3 R3, R2, R12, RZ ;
        /*0030*/                   FADD R5, R3, R11 ;
        /*0040*/                   FADD R5, R4, R8 ;
        /*0050*/                   LDG.E.64 R6, desc[UR4][R4.64] ;
        /*0060*/                   LDG.E R8, desc[UR4][R6.64] ;
        /*0070*/                   STG.E desc[UR4][R2.64], R8 ;
        /*0080*/                   EXIT ;
"""


def test_waits_for_loads_are_found():
    """The first two are waited for together, by R11 of the second; the third by the last one's address."""
    assert waits(parse_sass(WAITING)) == (4, 3)
    assert waits(parse_amdgcn(AMDGCN)) == (0, 0)


def test_amdgcn_is_read():
    counted = traffic(parse_amdgcn(AMDGCN))
    assert counted.loads == {16: 1, 2: 1}
    assert counted.stores == {8: 1}
    assert counted.adds == {"f32": 1}
    assert counted.swaps == 1
    assert counted.fences.total() == 1
    assert (counted.spill_stores, counted.spill_loads) == (1, 1)
    assert counted.special == {"lg2": 1}


@pytest.mark.parametrize(
    "op, width",
    [
        ("LDG.E", 4),
        ("LDG.E.64.STRONG.GPU", 8),
        ("LDG.E.U8", 1),
        ("LDG.E.ENL2.256", 32),
        ("global_load_dword", 4),
        ("buffer_load_dwordx4", 16),
        ("global_load_ushort", 2),
        ("global_load_dwordx3", 12),
    ],
)
def test_widths_of_loads(op, width):
    parse = parse_sass if op[0] == "L" else parse_amdgcn
    text = f"        /*0000*/                   {op} R4, [R2] ;" if op[0] == "L" else f"\t{op} v0, v1, s[0:1]"
    assert traffic(parse(text)).loads == {width: 1}


# ------------------------------------------------------------------------------------------------- rules
NAME = "forward-affine-bilinear-nhwc-c64-f32"
GOOD = {
    **{"registers": 40, "spills": 0, "code": 100, "loads": {4: 6, 16: 8}, "image_loads": {16: 8}},
    **{"stores": {16: 2}, "adds": {}, "swaps": 0, "fences": 0},
    **{"instructions": {"6 degrees": 100.0, "45 degrees": 100.0}, "lines": {"6 degrees": 100.0}},
    **{"wavefronts": {"6 degrees": 100.0}},
}


def complaints(name=NAME, version=triton.__version__, exceptions=(), allowed=GOOD, **changed):
    budget = budgets.Budget(version, list(exceptions), {name: allowed} if allowed else {})
    return budgets.complaints({("sm_90", name): {**GOOD, **changed}}, budget)


def test_a_kernel_as_budgeted_is_fine():
    assert complaints() == []


@pytest.mark.parametrize(
    "rule, changed",
    [
        ("spills", {"spills": 3}),
        ("fences", {"fences": 1}),
        ("swaps", {"swaps": 1}),
        ("vectors", {"image_loads": {16: 7, 4: 4}}),
        ("vectors", {"image_loads": {}}),
        ("vectors", {"stores": {4: 8}}),
        ("vectors", {"adds": {"f32": 4}}),
    ],
)
def test_broken_rules_are_seen(rule, changed):
    """Under any Triton; an exception excuses its own rule, case and target alone."""
    for version in (triton.__version__, "0.1.0"):
        (found,) = complaints(version=version, **changed)
        assert found.startswith(f"{NAME} on sm_90: ")
    fitting = {"case": "forward-*-nhwc-*", "target": "sm_*", "rule": rule, "why": "a test"}
    assert complaints(exceptions=[fitting], **changed) == []
    for other in ({"case": "gather-*"}, {"target": "gfx942"}, {"rule": "another"}, {"triton": "0.1.*"}):
        assert len(complaints(exceptions=[fitting | other], **changed)) == 1


def test_layouts_without_vectors_need_none():
    name = "forward-affine-bilinear-nchw-c3-f32"
    assert complaints(name, image_loads={4: 12}, stores={4: 3}) == []


@pytest.mark.parametrize("number", ["registers", "code"])
def test_larger_code_is_seen(number):
    """A tenth more is kept, beyond is not; numbers of another Triton are no measure."""
    budget = {**GOOD, number: 100}
    assert complaints(allowed=budget, **{number: 110}) == []
    (found,) = complaints(allowed=budget, **{number: 111})
    assert f"{number} 111, budget 100" in found
    assert complaints(allowed=budget, version="0.1.0", **{number: 111}) == []


@pytest.mark.parametrize("number", budgets.EXECUTED)
def test_more_work_is_seen(number):
    """A hundredth more at any map, unless a reason stands in the budget."""
    assert complaints(**{number: {"6 degrees": 101.0}}) == []
    (found,) = complaints(**{number: {"6 degrees": 101.1}})
    assert f"{number} at 6 degrees 101.1, budget 100 and 1 %" in found
    excused = {"case": "forward-*", "target": "sm_90", "rule": number, "why": "a test"}
    assert complaints(exceptions=[excused], **{number: {"6 degrees": 101.1}}) == []


def test_a_case_that_is_not_in_the_budget_is_a_complaint():
    assert complaints(allowed=None) == [f"{NAME} on sm_90: not in the budget"]


def test_update_keeps_what_was_not_run_and_drops_what_is_idle():
    spills = {"case": NAME, "target": "*", "rule": "spills", "why": "a test"}
    wider = {"case": "forward-*", "target": "*", "rule": "spills", "why": "of cases that were not run too"}
    kept = {"case": "gather-*", "target": "*", "rule": "spills", "why": "a test"}
    other = "gather-affine-bilinear-nchw-c3-f32"
    grown = {"case": "forward-*", "target": "*", "rule": "lines", "why": "a test"}  # the budget says it now
    cases = {other: {"code": 7}, "gone": {"code": 7}}
    new = budgets.update(
        budgets.Budget("0.1.0", [spills, wider, kept, grown], cases), {("sm_90", NAME): GOOD}
    )
    assert new.triton == triton.__version__
    assert new.cases == {other: {"code": 7}, NAME: budgets.budgeted(GOOD)}
    assert new.exceptions == [wider, kept]
    broken = {("sm_90", NAME): {**GOOD, "spills": 1}}
    assert budgets.update(budgets.Budget("0.1.0", [spills, kept], cases), broken).exceptions == [spills, kept]


# -------------------------------------------------------------------------------------- from end to end
BAD_KERNELS = """
import torch, triton
import triton.language as tl
from bench import report
from bench.assembly import traffic
from bench import specialisations
from stn_triton.kernels.host import launch

@triton.jit
def copy(source, target, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(target + i, tl.load(source + i))

@triton.jit
def add(source, target, N: tl.constexpr, SEM: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_add(target + i, tl.load(source + i), sem=SEM)

@triton.jit
def exchange(source, target, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_cas(target + i, tl.load(source + i), tl.load(source + i) + 1)

@triton.jit
def many(source, target, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(source + i)
    tl.store(target + i, tl.cumsum(x, 0) * tl.sum(x, 0) + tl.flip(x, 0) * x)

def count(target, kernel, dtype, *args, **options):
    tensors = [torch.empty(8192, dtype=dtype, device="meta") for _ in range(2)]
    launches = []
    with specialisations.compiling(target, launches):
        launch.Plan(kernel, 1, tensors[0].device, *tensors, *args, **options)(*tensors)
    return traffic(report._read(launches[0].compiled)[0])

F32, I32 = torch.float32, torch.int32
for target in ("sm_90", "gfx942"):
    good = count(target, copy, F32, 1024)
    assert set(good.loads) == set(good.stores) == {16}, (target, good)
    assert not good.fences and not good.swaps and not good.spill_stores, (target, good)
    relaxed, ordered = (count(target, add, F32, 1024, sem) for sem in ("relaxed", "acq_rel"))
    assert relaxed.adds and not relaxed.fences, (target, relaxed)
    assert ordered.fences, (target, ordered)
    assert count(target, exchange, I32, 1024).swaps, target
spilling = count("sm_90", many, F32, 2048, num_warps=1, maxnreg=32)
assert spilling.spill_stores and spilling.spill_loads, spilling
assert count("sm_90", add, torch.bfloat16, 1024, "relaxed").adds == {"bf16x8": 1}
print("seen")
"""


@needs_tools
def test_bad_kernels_are_seen(tmp_path):
    """Kernels that spill, order memory, or compare and swap, compiled and counted."""
    script = tmp_path / "bad_kernels.py"
    script.write_text(BAD_KERNELS)
    result = run(str(script))
    assert result.stdout == "seen\n", result.stderr
