"""``bench``: the registry, the judge, the sweep's file, the pictures, and the command for a GPU."""

import argparse
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from common import assert_close
from test_patch import torchvision  # noqa: F401 (a fixture)
from test_pixels import roi_align_witness

import stn_triton as stn
from bench import cases, gpu, inside, machine, results, rivals, sweep, timing
from stn_triton import backend

CPU = torch.device("cpu")
EVERY = [pytest.param(case.small(), id=case.id) for case in cases.CASES]


# -------------------------------------------------------------------------------------------- the registry
def test_ids_are_unique_and_rows_are_filled():
    ids = [case.id for case in cases.CASES]
    assert len(set(ids)) == len(ids)
    assert {case.row for case in cases.CASES} == set(cases.ROWS)
    # A run that is cut off has measured something of each row.
    assert {case.row for case in cases.QUICK} == set(cases.ROWS)


def test_rivals_of_the_targets_exist():
    names = {rival.name for rival in rivals.RIVALS}
    assert len(names) == len(rivals.RIVALS)
    for row in cases.ROWS.values():
        assert set(row.targets) <= names


def test_bandwidth_rows_are_larger_than_a_cache():
    """Where a share of the copy's bandwidth is the target, 60 MB of L2 (an H200's) must not hold a case."""
    for case in cases.CASES:
        if cases.ROWS[case.row].roof is not None:
            assert cases.bytes_moved(case, 1.0) > 100e6, case.id


def test_uint8_moves_a_quarter_of_the_bytes():
    """Beside whoever samples a copy in float32, whatever share of the image is read."""
    case = next(case for case in cases.CASES if case.dtype == torch.uint8)
    for share in (0.2, 1.0):
        assert 3.99 < cases.bytes_of_floats(case, share) / cases.bytes_moved(case, share) <= 4
        moved = {
            "bytes": cases.bytes_moved(case, share),
            "bytes_of_floats": cases.bytes_of_floats(case, share),
        }
        entry = results.Entry(case.id, case.row, {}, **moved)
        (told,) = results.traffic(results.Results({}, {}, {}, entries=[entry]))
        assert told.endswith("(4.00x)")


def test_averages_are_of_as_many_samples_everywhere():
    """What the rivals of ``antialias`` rely on, who take one finer grid."""
    for case in cases.CASES:
        if case.antialias:
            numbers = (cases.step_lengths(case) - 1e-3).ceil()
            assert (numbers == torch.tensor(case.samples[::-1])).all(), case.id


@pytest.mark.parametrize("case", EVERY)
def test_every_case_is_right(case):
    """Ours, PyTorch's ways and libraries' against float64, on few pixels. The kernels are interpreted."""
    bench = sweep.Bench(CPU)
    for rival in rivals.RIVALS:
        if rival.name in ("compiled", "flag_gems"):
            continue
        found = sweep.measure(case, rival, bench, None)
        assert found.status in ("timed", "missing"), (rival.name, found.why)
        if rival is rivals.OURS:
            assert found.status == "timed"


def test_compiled_rival_is_right():
    """A backward pass that is taken many times included, after a step of the same shapes."""
    case = next(case for case in cases.CASES if case.row == "step").small()
    for work in ("step", "both"):
        case = dataclasses.replace(case, work=work)
        found = sweep.measure(case, rival("compiled"), sweep.Bench(CPU), 0.001)
        assert found.status == "timed", found.why


@pytest.mark.parametrize("source", ["flow", "projective"])
def test_torchvision_rival_is_right(torchvision, source):  # noqa: F811
    rivals.optional.cache_clear()
    case = cases.case("other", source, "forward", 2, 3, 12, 17, shared=True)
    found = sweep.measure(case, rival("torchvision"), sweep.Bench(CPU), None)
    assert found.status == "timed", found.why


def test_roi_align_rival_is_right(monkeypatch):
    """By its formula, where torchvision is not installed."""

    def roi_align(image, boxes, size, sampling_ratio, aligned):
        pairs = zip(image, boxes, strict=True)
        return torch.stack(
            [roi_align_witness(x, box, size, sampling_ratio) for x, each in pairs for box in each]
        )

    monkeypatch.setattr(rivals, "optional", lambda name: types.SimpleNamespace(roi_align=roi_align))
    case = next(case for case in cases.CASES if case.boxes).small()
    found = sweep.measure(case, rival("roi_align"), sweep.Bench(CPU), None)
    assert found.status == "timed", found.why


def rival(name):
    return next(rival for rival in rivals.RIVALS if rival.name == name)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("source", ["projective", "tps", "flow"])
def test_reference_grids_are_those_of_the_package(source, align_corners):
    """The judge has formulas of its own; in float64 they agree with the package's."""
    case = cases.case("other", source, "forward", 2, 1, 9, 13, align_corners=align_corners)
    params, image = cases.make_params(case), torch.randn(2, 1, 9, 13, dtype=torch.float64)
    grid = rivals.grid_maker(case, params)(params)
    with backend.use("torch"):
        ours = getattr(stn, f"{source}_grid_sample")(image, params, align_corners=align_corners)
    assert_close(ours, rivals.sample(case, image, grid))


# ------------------------------------------------------------------------------------------------ the bytes
def identity(work, **options):
    """An image of 2 x 3 x 4 x 5 float32, 480 bytes, each pixel of which is read; theta has 48."""
    return cases.case("rgb", "affine", work, 2, 3, 4, 5, **options)


@pytest.mark.parametrize(
    "work, moved",
    [
        ("forward", 480 + 480 + 48),
        ("image", 480 + 480 + 48),  # d output in, d image out
        ("params", 480 + 480 + 48 + 48),  # d output, image, theta; d theta
        ("both", 3 * 480 + 2 * 48),
        ("step", 5 * 480 + 3 * 48),
    ],
)
def test_bytes_by_hand(work, moved):
    assert cases.bytes_moved(identity(work), 1.0) == moved


def test_bytes_of_parts_and_of_grids():
    assert cases.bytes_moved(identity("forward"), 0.25) == 120 + 480 + 48
    grid = cases.case("grid", "grid", "both", 2, 3, 4, 5, dtype=torch.bfloat16)
    assert cases.bytes_moved(grid, 1.0) == 3 * 240 + 2 * (2 * 4 * 5 * 2 * 2)
    flow = cases.case("other", "flow", "forward", 2, 3, 4, 5, shared=True)
    assert cases.bytes_moved(flow, 1.0) == 480 + 480 + 4 * 2 * 4 * 5


@pytest.mark.parametrize("mode, read", [("bilinear", 36), ("nearest", 16)])
def test_share_of_the_image_that_is_read(mode, read):
    """The middle quarter of 8 x 8, magnified twice: 4 x 4 pixels, and those beside them for the outermost."""
    case = cases.case("rgb", "affine", "forward", 1, 2, 8, 8, mode=mode)
    theta = 0.5 * torch.eye(2, 3)[None]
    inputs = cases.make_inputs(case, CPU)._replace(params=theta)
    assert rivals.share_read(case, inputs) == read / 64


# ------------------------------------------------------------------------------------------------ the judge
def wrong(case, inputs):
    sampler = rivals.ours(case, inputs)
    return lambda image, params: sampler(image, params + 0.05)


FIRST = cases.CASES[0].small()


def test_a_wrong_result_is_not_timed():
    found = sweep.measure(FIRST, rivals.Rival("wrong", wrong), sweep.Bench(CPU), 0.001)
    assert (found.status, found.median) == ("mismatch", None)
    assert "errors" in found.why


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_number_is_a_mismatch_even_if_nobody_judges(value):
    with pytest.raises(rivals.Mismatch):
        rivals.check(FIRST, dataclasses.replace(rivals.OURS, judged=False), [value])


def test_each_result_is_judged():
    """Output, d image and d parameters: one of them wrong is enough."""
    step = dataclasses.replace(FIRST, work="step")
    assert len(rivals.limits(step)) == 3
    for which in range(3):
        with pytest.raises(rivals.Mismatch):
            rivals.check(step, rivals.OURS, [0.5 if k == which else 0.0 for k in range(3)])


def test_deterministic_cases_run_deterministically():
    seen = []

    def build(case, inputs):
        def sampler(image, grid):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return rivals.sample(case, image, grid)

        return sampler

    case = next(case for case in cases.CASES if case.deterministic).small()
    case = dataclasses.replace(case, work="step")
    inputs = cases.make_inputs(case, CPU)
    original = rivals.OURS
    ours = dataclasses.replace(original, build=build)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rivals, "OURS", ours)
        rivals.prepare(case, ours, inputs)()
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()


# --------------------------------------------------------------------------------------------- the sweep
@pytest.fixture
def handlers():
    """``bench.gpu`` and ``bench.sweep`` change what SIGTERM does."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run_sweep(folder, *arguments, **options):
    with backend.use("torch"):
        return sweep.main(["--cpu", "--out", str(folder), "--rival", "eager", *arguments], **options)


ONE = ("--select", "rgb-affine-forward", "--quick")


def test_sweep_writes_what_it_measured(tmp_path, capsys):
    assert run_sweep(tmp_path, *ONE, "--commit", "abc") == 0
    found = results.load(tmp_path / "results.json")
    assert found.complete
    assert found.machine["commit"] == "abc"
    assert found.roof > 0
    (entry,) = found.entries
    assert entry.status == "done"
    assert set(entry.times()) == {"ours", "eager"}
    ours = entry.find("ours")
    assert 0 < ours.low <= ours.median <= ours.high
    assert len(ours.errors) == 1
    assert entry.bytes == cases.bytes_moved(FIRST, entry.share_read)
    assert cases.ROWS[FIRST.row].title in capsys.readouterr().out


def test_results_survive_the_file(tmp_path):
    made = synthetic()
    made.save(tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == made
    text = json.loads((tmp_path / "results.json").read_text())
    assert text["schema"] == results.SCHEMA
    (tmp_path / "results.json").write_text(json.dumps(text | {"schema": 0}))
    with pytest.raises(ValueError, match="schema 0"):
        results.load(tmp_path / "results.json")


def test_sweep_goes_on_where_it_ended(tmp_path, capsys):
    """What the budget does not reach is listed, and measured by a second call, which repeats nothing."""
    assert run_sweep(tmp_path, *ONE, "--budget-seconds", "0") == 0
    found = results.load(tmp_path / "results.json")
    assert not found.complete
    assert found.entries == []
    assert set(found.not_reached.values()) == {FIRST.row}
    assert "not reached" in capsys.readouterr().out
    assert run_sweep(tmp_path, *ONE) == 0
    once = results.load(tmp_path / "results.json")
    assert once.complete
    assert run_sweep(tmp_path, *ONE) == 0
    assert results.load(tmp_path / "results.json").entries == once.entries


def test_results_of_another_run_are_not_mixed(tmp_path, capsys):
    assert run_sweep(tmp_path, *ONE) == 0
    found = results.load(tmp_path / "results.json")
    found.machine["sources"] = "other"
    found.save(tmp_path / "results.json")
    assert run_sweep(tmp_path, *ONE, "--seconds-each", "0.002") == 2
    assert "sources, method" in capsys.readouterr().err


def test_failures_are_recorded_and_the_sweep_goes_on(tmp_path, monkeypatch, capsys):
    """A wrong result of ours: no rival is timed beside it. A rival that raises: the others are timed."""

    def raises(case, inputs):
        raise ZeroDivisionError("no such luck")

    def sometimes_wrong(case, inputs):
        return (wrong if case.channels_last else rivals.ours)(case, inputs)

    ours = dataclasses.replace(rivals.OURS, build=sometimes_wrong)
    broken = rivals.Rival("broken", raises)
    monkeypatch.setattr(rivals, "OURS", ours)
    monkeypatch.setattr(rivals, "RIVALS", (ours, broken, rival("eager")))
    select = (*ONE, "--select", "rgb-last-affine", "--rival", "broken")
    assert run_sweep(tmp_path, *select) == 1
    entries = {entry.row: entry for entry in results.load(tmp_path / "results.json").entries}
    assert [m.status for m in entries["rgb"].measurements] == ["timed", "failed", "timed"]
    assert [m.status for m in entries["rgb-last"].measurements] == ["mismatch"]
    assert {entry.status for entry in entries.values()} == {"failed"}
    printed = capsys.readouterr().out
    assert "no such luck" in printed
    assert "mismatch" in printed


def test_lost_device_restarts_the_process(tmp_path, monkeypatch, capsys):
    """What was measured stays; the case that lost it is not run again."""
    restarted = []

    def lost(*_):
        raise sweep.DeviceLost("illegal memory access")

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "run_case", lost)
        run_sweep(tmp_path, *ONE, restart=lambda: restarted.append(1))
    assert restarted
    (entry,) = results.load(tmp_path / "results.json").entries
    assert entry.status == "failed"
    assert run_sweep(tmp_path, *ONE) == 1
    assert "illegal memory access" in capsys.readouterr().out


def test_process_that_dies_in_a_case_twice_leaves_it_out(tmp_path):
    assert run_sweep(tmp_path, *ONE, "--budget-seconds", "0") == 0
    path = tmp_path / "results.json"
    found = results.load(path)
    case = cases.CASES[0]
    found.entries = [results.Entry(case.id, case.row, sweep.describe(case), attempts=2)]
    found.save(path)
    assert run_sweep(tmp_path, *ONE) == 1
    assert results.load(path).entries[0].why == "the process ended in it"


def test_interrupted_sweep_keeps_what_it_has(tmp_path, monkeypatch, handlers):
    run_case, seen = sweep.run_case, []

    def interrupted(*arguments):
        seen.append(1)
        if len(seen) == 2:
            # Who is killed here leaves the first case, and a note of the second.
            first, second = results.load(tmp_path / "results.json").entries
            assert (first.status, second.status) == ("done", "running")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return run_case(*arguments)

    monkeypatch.setattr(sweep, "run_case", interrupted)
    assert run_sweep(tmp_path, "--select", "rgb-affine-forward") == 130
    (entry,) = results.load(tmp_path / "results.json").entries
    assert entry.status == "done"
    assert not list(tmp_path.glob("*.part"))


# ------------------------------------------------------------------------------------- table and pictures
def synthetic(**milliseconds):
    """Results with one case; ours takes 1 ms and moves half of what a copy would."""
    case = cases.CASES[0]
    times = {"ours": 1.0, "eager": 4.0, "compiled": 2.0} | milliseconds
    measured = [
        results.Measurement(name, "timed", name in ("eager", "cudnn"), median=time, low=time, high=time)
        for name, time in times.items()
    ]
    entry = results.Entry(
        case.id, case.row, sweep.describe(case), "done", bytes=10**9, share_read=0.5, measurements=measured
    )
    entry.case = json.loads(json.dumps(entry.case))  # lists for tuples
    row = cases.ROWS[case.row]
    facts = {"device": "synthetic", "torch": "2", "triton": "3", "commit": "0" * 40, "date": "2026-01-01"}
    return results.Results(
        machine=facts,
        method={"clock": "none", "small": False},
        rows={case.row: {"title": row.title, "targets": row.targets, "roof": row.roof}},
        roof=2e12,
        floor=0.003,
        entries=[entry],
    )


def test_table_holds_targets_against_the_slowest_case():
    printed = results.table(synthetic())
    assert "eager 4.00x (>= 2.50x: met)" in printed
    assert "compiled 2.00x (>= 1.30x: met)" in printed
    assert "roof 50 % (>= 70 %: MISSED)" in printed
    slower = synthetic(eager=2.0)
    slower.entries += [dataclasses.replace(entry, id="other") for entry in synthetic().entries]
    assert "eager 2.00-4.00x (>= 2.50x: MISSED)" in results.table(slower)


def test_eager_is_the_fastest_of_pytorchs_ways():
    assert "eager 1.50x (>= 2.50x: MISSED)" in results.table(synthetic(cudnn=1.5))


def test_table_says_when_a_rival_wins():
    assert "faster" not in results.table(synthetic())
    assert "kornia is faster, 0.5 ms to our 1" in results.table(synthetic(kornia=0.5))


def test_target_is_not_met_by_half_of_the_cases():
    found = synthetic()
    found.not_reached["another"] = found.entries[0].row
    assert "eager 4.00x (>= 2.50x: met where measured)" in results.table(found)
    found = synthetic()
    found.entries.append(results.Entry("wrong", found.entries[0].row, {}, "failed", "mismatch"))
    assert "met where measured" in results.table(found)
    assert "wrong: failed: mismatch" in results.table(found)


PUBLISHED = machine.ROOT / "bench/results/h200-2026-11-27/results.json"


def test_published_tables_are_the_results():
    """README and docs/numbers.md, which `python -m bench.results FILE` writes."""
    found = results.load(PUBLISHED)
    readme, numbers = (machine.ROOT / name for name in ("README.md", "docs/numbers.md"))
    assert "\n".join(results.markdown(found)) in readme.read_text()
    assert "\n".join(results.markdown(found, by_case=True)) in numbers.read_text()


def test_markdown_has_losses_in_bold():
    found, slower = synthetic(compiled=0.5), synthetic(eager=12.0, compiled=3.0)
    found.entries += slower.entries
    images = "2 of 2: 8x3x1234x1345"
    cells = ["forward, NCHW, C 1-3, float32", images, "4.0 - 12.0", "**0.50** - 3.0", "", "50 %"]
    assert list(results.markdown(found))[-1] == "| " + " | ".join(cells) + " |"


def test_counters_of_the_hardware():
    """The table of what Nsight Compute writes: a mark begins each group, what warps waited for comes last."""
    case = cases.CASES[0]
    heads = ["ID", "Kernel Name", "gpu__time_duration.sum", "launch__registers_per_thread"]
    heads += ["smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"]
    rows = [heads, ["", "", "us", "", "inst"], ["0", "BitwiseXor", "1", "16", ""]]
    rows += [
        ["1", "sample_forward_kernel", "12.5", "64", "1,234.5"],
        ["2", "bitwise_xor_kernel", "1", "16", ""],
    ]
    lines = ["==PROF== Connected", *(",".join(f'"{cell}"' for cell in row) for row in rows)]
    assert inside.report(lines, [case], "eager") == [
        f"\n{case.id}: ours",
        "  sample_forward_kernel: us 12.5 us; registers 64; waits: wait 1234.5",
        f"\n{case.id}: eager",
    ]
    assert inside.report(lines, [case], "none", [inside.tile("rows=2,columns=8")]) == [
        f"\n{case.id}: ours",
        "  sample_forward_kernel: us 12.5 us; registers 64; waits: wait 1234.5",
        f"\n{case.id}: ours rows=2 columns=8",
    ]


@pytest.mark.parametrize("text", ["rows", "rows=", "rows=x", "lanes=3", ""])
def test_tiles_that_are_none_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"a number for one of rows, columns"):
        inside.tile(text)


def test_pictures(tmp_path):
    """From the file alone; the conditions are in them, and an empty run has pictures too."""
    plot = pytest.importorskip("bench.plot")
    found = synthetic(kornia=3.0)
    paths = plot.draw(found, tmp_path)
    assert {path.name for path in paths} == {f"{a}.{b}" for a in ("bars", "roofline") for b in ("svg", "png")}
    for name in ("bars", "roofline"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    figure = plot.bars(found)
    widths = {bar.get_width() for bar in figure.axes[0].patches}
    assert {1000.0, 250.0, 500.0} <= {round(width, 6) for width in widths}  # GB/s: 1e9 bytes in 1, 4, 2 ms
    texts = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert "4.0× eager, 2.0× compiled" in texts
    assert figure.get_supxlabel() == results.conditions(found)
    found.entries[0].bytes = 4 * 10**6  # less than the copy moves in the shortest kernel's time, 6 MB
    (line,) = plot.roofline(found).axes[0].lines
    sizes, roof = line.get_data()
    assert sizes[0] < 4e6 < 6e6 < sizes[-1]
    assert_close(torch.tensor(roof), torch.tensor(sizes).div(0.003e-3).clamp(max=2e12) / 1e9)
    found.entries = []
    assert plot.draw(found, tmp_path / "empty")
    plot.plt.close("all")


# ------------------------------------------------------------------------------------------- time, machine
def test_time_on_a_cpu():
    timed = timing.time_device(lambda: time.sleep(0.002), CPU, 0.02)
    assert timed.how == "wall"
    assert timed.low <= timed.median <= timed.high
    assert timed.median >= 2.0
    assert timed.runs >= 3
    assert timing.time_calls(lambda: time.sleep(0.002), CPU, 0.01) >= 2.0


class FakeModule:
    """A device's module whose events only note when they are recorded."""

    def __init__(self):
        self.log = []
        module = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                module.log.append("event")

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 0.5

        self.Event = Event

    def synchronize(self, device):
        pass


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("host, wipes", [(0.0, 1), (0.002, 5)], ids=["quick", "slow"])
def test_cache_is_wiped_outside_of_the_timed_part(monkeypatch, flush, host, wipes):
    """As often as a slow host needs to queue the call while the device is busy: here 0.5 ms each."""
    fake = FakeModule()
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(timing, "_wiper", lambda device, l2: lambda: fake.log.append("wipe"))
    monkeypatch.setattr(timing, "_host_seconds", lambda call, device: host)
    timing._seconds_of_wipe.cache_clear()
    try:
        timed = timing.time_device(lambda: fake.log.append("call"), torch.device("meta"), 0.02, flush)
    finally:
        timing._seconds_of_wipe.cache_clear()
    assert (timed.median, timed.how) == (0.5, "events")
    one = ["wipe"] * (wipes * flush) + ["event", "call", "event"]
    assert fake.log[-len(one) * timed.runs :] == one * timed.runs
    assert timed.runs == max(10, int(0.02 / (0.0005 + flush * wipes * 0.0005)))


@pytest.mark.gpu
@pytest.mark.skipif(machine.accelerator() is None, reason="needs a GPU")
@pytest.mark.parametrize("work", ["forward", "both", "step"])
@pytest.mark.parametrize("name", ["ours", "eager", "compiled"])
def test_time_on_a_gpu(name, work):
    """Graphs take the place of eager calls, backward passes included; no memory moves 20 TB/s."""
    device = machine.accelerator()
    case = cases.case("rgb", "affine", work, 8, 3, 1080, 1920)
    with timing.own_stream(device):
        found = sweep.measure(case, rival(name), sweep.Bench(device), 0.05)
    assert found.status == "timed", found.why
    assert found.how == ("graph" if device.type == "cuda" else "events")
    assert found.median > 1e3 * cases.bytes_moved(case, 0.75) / 20e12
    assert found.peak >= 8 * 3 * 1080 * 1920 * 4


@pytest.mark.gpu
@pytest.mark.skipif(machine.accelerator() is None, reason="needs a GPU")
def test_training_step_holds_no_grid():
    """Beyond its inputs the output and the image's gradient, and less than a grid would take."""
    device = machine.accelerator()
    case = cases.case("step", "affine", "step", 8, 3, 1080, 1920)
    inputs = cases.make_inputs(case, device)
    call = rivals.prepare(case, rivals.OURS, inputs)
    call()
    image = inputs.image.numel() * 4
    assert timing.peak_bytes(call, device) < 2 * image + image // 3


def test_commit_of_a_tree_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delenv("STN_COMMIT", raising=False)
    assert machine.commit() == "unknown"
    (tmp_path / "COMMIT").write_text("fed\n")
    assert machine.commit() == "fed"
    monkeypatch.setenv("STN_COMMIT", "cba")
    assert machine.commit() == "cba"
    assert machine.commit("abc") == "abc"


def test_sources_tell_two_trees_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    file = tmp_path / "kernels" / "sample.py"
    file.write_text("a")
    before = machine.sources()
    file.write_text("b")
    assert machine.sources() != before


# ------------------------------------------------------------------------------------- all of it: make gpu
def python(name, code, **options):
    return gpu.Stage(name, [sys.executable, "-u", "-c", code], **options)


def test_stopped_tests_are_a_failure_only_if_some_failed(tmp_path):
    for said, failed in (("... [ 40%]", False), ("FAILED tests/test_x.py::test_y - wrong", True)):
        stage = python(
            f"tests-{failed}", f"import time; print({said!r}, flush=True); time.sleep(60)", may_stop=True
        )
        gpu.run([stage], tmp_path, time.monotonic() + 3)
        assert stage.stopped
        assert stage.failed == failed


def test_a_tool_that_the_machine_refuses_is_absent(tmp_path):
    code = "import sys; print('Error: Device not supported.'); sys.exit(1)"
    refused = python("refused", code, refusal="Device not supported")
    failing = python("failing", "import sys; print('4 errors'); sys.exit(1)", refusal="Device not supported")
    gpu.run([refused, failing], tmp_path, time.monotonic() + 30)
    assert refused.outcome == "absent"
    assert not refused.failed
    assert failing.failed


def test_stages_run_at_once_and_are_stopped_with_their_children(tmp_path):
    """A hanging one, deaf to being asked, and its child are killed; what they printed is kept."""
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    deaf = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    stages = [
        python("good", "print('1 passed')"),
        python("bad", "import sys; print('2 failed'); sys.exit(3)"),
        python("deaf", deaf),
        gpu.Stage("none", [], absent="not installed"),
        python("unneeded", "import time; time.sleep(60)", may_stop=True),
        python(
            "asked",
            "try:\n  import time; time.sleep(60)\nexcept KeyboardInterrupt:\n  print('what there is')",
        ),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "GRACE", 2)
        start = time.monotonic()
        ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for a job in the background
        try:
            gpu.run(stages, tmp_path, start + 4)
        finally:
            signal.signal(signal.SIGINT, ignored)
    assert time.monotonic() - start < 20
    assert [stage.failed for stage in stages] == [False, True, True, False, False, True]
    lines = gpu.lines_of(tmp_path, stages)
    assert "1 passed" in lines[0]
    assert "exit status 3" in lines[1]
    assert "2 failed" in lines[1]
    assert "stopped" in lines[2]
    assert "not installed" in lines[3]
    assert "what there is" in lines[5]
    left = int((tmp_path / "deaf.log").read_text())
    for _ in range(100):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(left)], capture_output=True, text=True)
        if state.stdout.strip() in ("", "Z"):
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child lives on")
    gpu.collect(tmp_path, stages)
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.log"]
    assert "2 failed" in (tmp_path / "gpu.log").read_text()


def test_command_for_a_gpu(tmp_path, monkeypatch, capsys, handlers):
    """The plumbing, with a real sweep and pictures on few pixels."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(gpu, "checks", lambda options: [python("tests", "print('7 passed')")])
    arguments = ["--cpu", "--quick", "--select", "rgb-affine-forward", "--rival", "eager", "--seconds", "120"]
    status = gpu.main([*arguments, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "7 passed" in printed
    assert printed.splitlines()[-1].startswith("plot")
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"results.json", "gpu.log", "bars.svg", "bars.png", "roofline.svg", "roofline.png"}
    assert results.load(tmp_path / "results.json").complete


@pytest.mark.parametrize("code", ["raise SystemExit(1)", "import time; time.sleep(60)"])
@pytest.mark.parametrize("which", ["tests", "sweep"])
def test_command_for_a_gpu_fails_with_a_stage(tmp_path, monkeypatch, capsys, handlers, which, code):
    """One that fails and one that is stopped; what there is of the results is told all the same."""
    synthetic().save(tmp_path / "results.json")
    good = [sys.executable, "-c", "pass"]
    bad = [sys.executable, "-c", code]
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    monkeypatch.setattr(
        gpu, "checks", lambda options: [gpu.Stage("tests", bad if which == "tests" else good)]
    )
    monkeypatch.setattr(gpu, "sweep", lambda *arguments: bad if which == "sweep" else good)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)  # no pictures
    assert gpu.main(["--cpu", "--seconds", "2", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "eager 4.00x" in printed
    assert [line.split()[0] for line in printed.splitlines()[-3:]] == ["tests", "sweep", "plot"]


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "accelerator", lambda: None)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert sweep.main(["--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_checks_of_a_gpu_are_told_apart(tmp_path):
    """Each has a log of its own; the cases are split over the processes that compile them."""
    stages = gpu.checks(gpu.parse(["--quick", "--rival", "eager", "--out", str(tmp_path)]))
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    assert {"tests", "tests-gpu", "tests-large", "memcheck"} < set(names)
    parts = [
        stage.command[stage.command.index("--warm") + 1] for stage in stages if "--warm" in stage.command
    ]
    assert parts == [f"{part}/{gpu.WARMING}" for part in range(gpu.WARMING)]


def test_command_for_a_gpu_does_one_part_alone(tmp_path, monkeypatch, capsys, handlers):
    """In all the time: tests without a sweep, a sweep without tests. Together they are the whole."""
    options = {only: gpu.parse(["--only", only] * bool(only)) for only in ("", "tests", "sweep")}
    names = {only: {stage.name.partition("-")[0] for stage in gpu.checks(options[only])} for only in options}
    assert names == {"": {"tests", "memcheck", "warm"}, "tests": {"tests", "memcheck"}, "sweep": {"warm"}}
    monkeypatch.setattr(gpu, "tests", lambda options: [python("tests", "import time; time.sleep(3.5)")])
    monkeypatch.setattr(gpu, "warming", lambda options: [python("warm", "pass")])
    monkeypatch.setattr(gpu, "sweep", lambda *arguments: [sys.executable, "-c", "pass"])
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)  # no pictures
    for only, ran in (("tests", ["tests"]), ("sweep", ["warm", "sweep", "plot"])):
        assert gpu.main(["--cpu", "--only", only, "--seconds", "6", "--out", str(tmp_path / only)]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in printed[-len(ran) :]] == ran


def test_files_of_device_tests_exist():
    for name in gpu.DEVICE_TESTS:
        assert (machine.ROOT / "tests" / f"{name}.py").exists(), name


def test_regression_benchmarks_run(tmp_path):
    """``make bench`` on few pixels."""
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench/test_speed.py", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "rgb-affine-forward-16x1", "--benchmark-max-time=0.01", "--benchmark-min-rounds=2"]
    command += [f"--benchmark-json={tmp_path / 'speed.json'}"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    environment.pop("PYTEST_XDIST_WORKER", None)  # in a worker's child too, benchmarks would not be taken
    result = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout
    (benchmark,) = json.loads((tmp_path / "speed.json").read_text())["benchmarks"]
    assert benchmark["group"] == "rgb"
    assert benchmark["extra_info"]["bytes"] > 0
