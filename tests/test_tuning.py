"""Tables of configurations, and the search that fills them. What is fast is made up: there is no GPU."""

import itertools
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import stn_triton as stn
from bench import machine
from bench.cases import CASES
from bench.interpreter import quick_interpreter
from stn_triton import backend
from stn_triton.kernels.host import configs, tables, tuning
from stn_triton.kernels.modes import Interpolation, Source

PROBLEM = configs.Problem(
    kernel="forward",
    source=Source.AFFINE,
    interpolation=Interpolation.BILINEAR,
    dims=2,
    images=8,
    channels=3,
    rows=224,
    columns=224,
    element_size=4,
    channels_last=False,
    backward=False,
)
GPU = torch.device("meta")  # the rules for GPUs, no kernel is run


@pytest.fixture
def ship(tmp_path, monkeypatch):
    """Ships a table for an architecture of which the device "meta" is one."""
    monkeypatch.setattr(tables, "SHIPPED", tmp_path)
    monkeypatch.setattr(tables, "_target", lambda: "sm_90")
    tables.shipped.cache_clear()

    def write(entries):
        tables.write(
            tmp_path / "sm_90.json",
            {
                "format": tables.FORMAT,
                "entries": {key: {"fields": fields} for key, fields in entries.items()},
            },
        )
        tables.shipped.cache_clear()

    yield write
    tables.shipped.cache_clear()


# ------------------------------------------------------------------------------------------------- keys
@pytest.mark.parametrize(
    "change",
    [
        {"source": Source.PROJECTIVE},
        {"columns": 200},
        {"rows": 200},
        {"images": 7},
        {"columns": 1024, "rows": 49},
    ],
    ids=str,
)
def test_neighbouring_problems_share_a_bucket(change):
    assert PROBLEM._replace(**change).key == PROBLEM.key


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "gather"},
        {"source": Source.TPS},
        {"source": Source.GRID},
        {"interpolation": Interpolation.BICUBIC},
        {"dims": 3},
        {"images": 800},
        {"channels": 4},
        {"rows": 14, "columns": 14, "images": 2048},
        {"element_size": 2},
        {"channels_last": True},
    ],
    ids=str,
)
def test_what_costs_differently_has_a_bucket_of_its_own(change):
    assert PROBLEM._replace(**change).key != PROBLEM.key


def test_the_pixels_of_a_bucket():
    """Powers of four are the last of theirs."""

    def pixels(n):
        return PROBLEM._replace(images=n, rows=1, columns=1).key.split("pixels<=")[1]

    assert [pixels(n) for n in (0, 1, 2, 4, 5, 16, 17, 64, 65)] == [
        f"4^{k}" for k in (0, 0, 1, 1, 2, 2, 3, 3, 4)
    ]


# ----------------------------------------------------------------------------------------------- tables
def test_a_shipped_table_decides_and_override_still_more(ship):
    rules = configs.choose(GPU, PROBLEM)
    ship({PROBLEM.key: {"rows": 2, "columns": 128, "warps": 8}})
    tuned = configs.choose(GPU, PROBLEM)
    assert (tuned.rows, tuned.columns, tuned.warps) == (2, 128, 8)
    assert (tuned.channels, tuned.unroll) == (rules.channels, rules.unroll)
    assert configs.choose(GPU, PROBLEM._replace(channels=64)).warps == 4, "another bucket"
    with configs.override(warps=1):
        assert configs.choose(GPU, PROBLEM).warps == 1
    with configs.override("gather", warps=1):
        assert configs.choose(GPU, PROBLEM).warps == 8, "meant for another kernel"


def test_a_shipped_table_can_be_ignored(ship):
    """In all threads and by what is kept of choices, until the outermost block ends."""
    rules = configs.choose(GPU, PROBLEM)
    ship({PROBLEM.key: {"warps": 8}})
    state = configs.state()
    with tables.ignore_shipped():
        with tables.ignore_shipped():
            assert configs.choose(GPU, PROBLEM) == rules
            assert configs.state() != state
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(configs.choose, GPU, PROBLEM).result() == rules
    assert configs.choose(GPU, PROBLEM).warps == 8
    assert configs.state() == state


def test_rules_choose_nearly_the_best_of_the_tiles_that_were_timed():
    """On an H200; within a tenth, as one rule has to do for all angles. What they choose now may not be among
    the tiles that were tried for a case."""
    path = machine.ROOT / "bench/results/h200-2026-11-27/tiles.json"
    kernels = {"forward": "forward", "image": "gather", "params": "backward parameters"}
    ratios = {}
    for series, case in itertools.product(json.loads(path.read_text())["series"], CASES):
        rows = [row for row in series["rows"] if row["case"] == case.id and row["ms"] is not None]
        if case.work not in kernels or not rows:
            continue
        kernel, like = kernels[case.work], torch.empty(1, dtype=case.dtype, device="meta")
        kind = Source[case.source.upper()], Interpolation[case.mode.upper()]
        size = torch.Size(case.shape[2:] if kernel == "gather" else case.size)
        last, back = case.channels_last and case.shape[1] > 1, kernel != "forward"
        problem = configs.Problem.of(kernel, kind, *case.shape[:2], size, like, last, back)
        tile = configs.choose_gather(GPU, problem)[0] if kernel == "gather" else configs.choose(GPU, problem)
        chosen = tile._asdict() | {"waves": configs.waves(problem)}
        timed = [r["ms"] for r in rows if "rows" in r["fields"] and r["fields"].items() <= chosen.items()]
        if timed:
            ratios[case.id, series["commit"]] = min(timed) / min(row["ms"] for row in rows)
    assert len(ratios) >= 15, "the rules have left what was timed"
    assert {case: ratio for case, ratio in ratios.items() if ratio > 1.11} == {}


def test_programs_over_the_channels_follow_the_tuned_number(ship):
    few = PROBLEM._replace(images=1, channels=512, rows=16, columns=16)
    splits = configs.choose(GPU, few).splits
    ship({few.key: {"waves": 2 * configs.waves(few)}})
    assert configs.choose(GPU, few).splits == min(2 * splits, 512 // 4)


def test_a_table_chooses_the_sum_of_general_grids(ship):
    problem = PROBLEM._replace(kernel="sum", source=Source.GRID)
    assert not configs.prefers_sorted(GPU, problem)
    ship({problem.key: {"sorted": 1}})
    assert configs.prefers_sorted(GPU, problem)


@pytest.mark.parametrize(
    "content, says",
    [
        ("{", "Expecting"),
        ('{"format": 0, "entries": {}}', "format"),
        ('{"format": 1}', "entries"),
        ('{"format": 1, "entries": {"a": {"fields": {"rows": 0.5}}}}', "fields of 'a'"),
        ('{"format": 1, "entries": {"a": {"fields": {"rows": -1}}}}', "fields of 'a'"),
        ('{"format": 1, "entries": {"a": {"fields": {"rows": true}}}}', "fields of 'a'"),
        ('{"format": 1, "entries": {"a": {}}}', "fields of 'a'"),
        ("[]", "format"),
    ],
)
def test_a_broken_table_is_said_and_not_used(ship, tmp_path, content, says):
    rules = configs.choose(GPU, PROBLEM)
    (tmp_path / "sm_90.json").write_text(content)
    tables.shipped.cache_clear()
    with pytest.warns(UserWarning, match="does not use") as caught:
        assert configs.choose(GPU, PROBLEM) == rules
    assert says in str(caught[0].message)


def test_a_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "tables" / "x.json"
    good = {"format": tables.FORMAT, "entries": {"a": {"fields": {"rows": 4}}}}
    tables.write(path, good)
    with pytest.raises(ValueError, match="content"):
        tables.write(path, {"format": tables.FORMAT, "entries": {"a": {"fields": {"rows": -4}}}})
    with monkeypatch.context() as broken:
        broken.setattr(json, "dump", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            tables.write(path, {"format": tables.FORMAT, "entries": {}})
    assert tables.read(path) == good
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_processes_add_to_one_table(tmp_path):
    path, facts = tmp_path / "x.json", {"device": "a GPU"}
    one, other = tables.UserTable(path), tables.UserTable(path)
    one.add("a", {"fields": {"rows": 1}}, facts)
    other.add("b", {"fields": {"rows": 2}}, facts)
    assert tables.UserTable(path).entries == {"a": {"rows": 1}, "b": {"rows": 2}}
    assert tables.read(path)["device"] == "a GPU"


# ----------------------------------------------------------------------------------------------- search
def test_the_search_finds_what_is_faster_and_stays_where_nothing_is():
    start = {"rows": 8, "columns": 32, "channels": 1, "unroll": 3, "warps": 4, "group": 1, "waves": 8}

    def cost(fields):
        far = abs(math.log2(fields["rows"])) + abs(math.log2(fields["columns"] / 64)) + fields["warps"] / 8
        return 1 + far

    fields, best, first = tuning.search(PROBLEM, start, cost)
    assert fields == {**start, "rows": 1, "columns": 64, "warps": 1}
    assert best == cost(fields)
    assert first == cost(start)

    noise = iter(range(10**6))
    fields, _, _ = tuning.search(PROBLEM, start, lambda fields: 1 + 0.02 * (next(noise) % 2))
    assert fields == start


def test_the_search_tries_only_what_is_possible():
    tried = []

    def cost(fields):
        tried.append(fields)
        return math.inf if fields["rows"] * fields["columns"] > 256 else 1 / (1 + fields["warps"])

    start = {"rows": 8, "columns": 32, "channels": 1, "unroll": 3, "warps": 4, "group": 1, "waves": 8}
    fields, best, _ = tuning.search(PROBLEM, start, cost)
    assert fields["warps"] == 16
    assert best < math.inf
    for fields in tried:
        for name in ("rows", "columns", "warps"):
            assert fields[name] & (fields[name] - 1) == 0, name
        assert fields["channels"] == 1, "planar"
        assert fields["unroll"] <= 3
        assert fields["group"] == 1, "no spline"
        assert tuning.lanes(fields) <= tuning.MOST_LANES
    assert len(tried) == len({tuple(fields.items()) for fields in tried}), "one try each"


# ----------------------------------------------------------------------------- inside autotune()
@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """The interpreter is taken for a GPU on which few warps are fast, and the sorted sum; yields the user's
    table and what has been timed."""
    table, timed = tables.UserTable(tmp_path / "user.json"), []

    def device_time(run, device):
        with configs.observe() as seen:
            run()
        timed.append([problem.kernel for problem, _ in seen])
        costs = (10 * getattr(chosen, "warps", 0) - 150 * getattr(chosen, "sorted", 0) for _, chosen in seen)
        return 200.0 + sum(costs)

    monkeypatch.setattr(tables, "user_table", lambda device: table)
    tables.changed()
    monkeypatch.setattr(tables, "about", lambda device: {"device": "pretended"})
    monkeypatch.setattr(tuning, "clock", device_time)
    can_tune = tuning._can_tune
    monkeypatch.setattr(tuning, "_can_tune", lambda device: can_tune(torch.device("xpu")))
    monkeypatch.setattr(tuning, "NEIGHBOURS", (tuning._warps, tuning._sum))
    lookup = tables.lookup
    monkeypatch.setattr(
        tables,
        "lookup",
        lambda device, key: (tables.live and table.entries.get(key())) or lookup(device, key),
    )
    with backend.use("interpreter"), quick_interpreter():
        yield table, timed


def warp(dtype=torch.float32):
    torch.manual_seed(0)
    image = torch.randn(1, 2, 4, 5, dtype=dtype, requires_grad=True)
    theta = (torch.eye(2, 3) + 0.1 * torch.randn(1, 2, 3)).requires_grad_()
    samples = stn.affine_grid_sample(image, theta)
    samples.square().sum().backward()
    return samples.detach(), image.grad, theta.grad


def test_autotune_searches_once_and_changes_no_result(pretend):
    table, timed = pretend
    before = warp()
    assert not timed
    with stn.autotune():
        first = warp()
        searched = len(timed)
        second = warp()
    assert searched > 0
    assert len(timed) == searched, "what is in the table is not searched again"
    after = warp()
    for a, b, c, d in zip(before, first, second, after):
        torch.testing.assert_close(a, b)
        assert torch.equal(b, c)
        assert torch.equal(a, d), "outside the block the table is not in use"
    kernels = {key.split(" matrix")[0] for key in table.entries}
    assert kernels == {"forward", "backward parameters", "gather", "gather search"}
    assert table.entries == tables.UserTable(table.path).entries
    entry = next(e for key, e in tables.read(table.path)["entries"].items() if key.startswith("forward"))
    assert entry["fields"]["warps"] == 1
    assert entry["milliseconds"] < entry["milliseconds_by_the_rules"]


def test_what_is_tuned_costs_nothing_more(pretend, monkeypatch):
    """In the block a later call is one launch of a plan that is kept; after it the plan from before holds."""
    from stn_triton.kernels.host import launch

    launches, call = [], launch.Plan.__call__

    def spy(plan, *tensors):
        launches.append(plan)
        call(plan, *tensors)

    monkeypatch.setattr(launch.Plan, "__call__", spy)
    image, theta = torch.randn(1, 2, 4, 5), torch.eye(2, 3)[None]

    def run():
        launches.clear()
        stn.affine_grid_sample(image, theta)
        return launches.copy()

    before = run()
    with stn.autotune():
        assert len(run()) > 2
        tuned = run()
        assert len(tuned) == 1
        assert tuned[0] is not before[0]
        assert run() == tuned
    assert run() == before


def test_autotune_takes_the_faster_sum(pretend):
    table, _ = pretend
    torch.manual_seed(0)
    image = torch.randn(1, 2, 5, 7, requires_grad=True)
    grid = torch.rand(1, 4, 3, 2) * 2 - 1

    def gradient():
        return torch.autograd.grad(stn.grid_sample(image, grid, align_corners=False).sum(), image)[0]

    expected = gradient()
    with stn.autotune():
        torch.testing.assert_close(gradient(), expected)
        with configs.observe() as seen:
            torch.testing.assert_close(gradient(), expected)
    assert "sorted sum" in {problem.kernel for problem, _ in seen}
    assert {"sum", "sorted keys", "sorted sum"} <= {key.split(" dense")[0] for key in table.entries}


def test_nothing_is_tuned_where_bits_must_repeat(pretend):
    _, timed = pretend
    torch.use_deterministic_algorithms(True)
    try:
        with stn.autotune():
            warp()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not timed


def test_a_failure_leaves_the_search_usable(pretend, monkeypatch):
    _, timed = pretend
    with monkeypatch.context() as broken, stn.autotune():
        broken.setattr(tuning, "search", lambda *args: (_ for _ in ()).throw(RuntimeError("interrupted")))
        with pytest.raises(RuntimeError, match="interrupted"):
            warp()
    assert not tables.live
    with stn.autotune():
        warp()
    assert timed


def test_backward_threads_are_concerned(pretend):
    """autograd's threads have none of the caller's context."""
    table, _ = pretend
    with stn.autotune():
        thread = threading.Thread(target=warp)
        thread.start()
        thread.join()
    assert table.entries


def test_the_cpu_backend_tunes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("STN_TRITON_CACHE", str(tmp_path / "cache"))
    with backend.use("torch"), stn.autotune():
        warp()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"STN_TRITON_CACHE": "/a/b"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/stn_triton"),
        ({"XDG_CACHE_HOME": "c", "HOME": "/d"}, "/d/.cache/stn_triton"),
        ({"HOME": "/d"}, "/d/.cache/stn_triton"),
    ],
    ids=str,
)
def test_where_the_users_tables_are(monkeypatch, environment, expected):
    for name in ("STN_TRITON_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(tables.user_directory()) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_autotune_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("STN_TRITON_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "NEIGHBOURS", (tuning._warps,))
    tables.user_table.cache_clear()
    image = torch.randn(4, 3, 64, 64, device="cuda")
    theta = torch.eye(2, 3, device="cuda").expand(4, 2, 3)
    expected = stn.affine_grid_sample(image, theta)
    try:
        with stn.autotune():
            torch.testing.assert_close(stn.affine_grid_sample(image, theta), expected)
    finally:
        tables.user_table.cache_clear()
    assert list(tmp_path.glob("*.json"))


# ------------------------------------------------------------------------------------------ make tune
def run_make_tune(monkeypatch, tmp_path, *more):
    """``bench.tune`` on small cases, the interpreter's device taken for a GPU."""
    from bench import tune
    from bench.cases import CASES

    rows = "rgb", "image-rgb"
    cases = [next(case.small() for case in CASES if case.row == row) for row in rows]
    monkeypatch.setattr(tune, "CASES", cases)
    monkeypatch.setattr(tune.machine, "accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(tables, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(torch.cpu, "current_device", lambda: 0)
    monkeypatch.setenv("STN_TRITON_CACHE", "")
    status = tune.main(["--out", str(tmp_path / "out"), "--workers", "1", "--commit", "abc", *more])
    return status, tmp_path / "out" / "sm_90.json"


def test_make_tune_writes_what_is_faster_than_the_rules(pretend, monkeypatch, tmp_path, capsys):
    table, _ = pretend
    status, path = run_make_tune(monkeypatch, tmp_path)
    assert status == 0
    content = tables.read(path)
    assert content["commit"] == "abc"
    assert content["entries"]
    for key, entry in content["entries"].items():
        assert entry["fields"] == {"warps": 1}, "what differs from the rules, and nothing else"
        assert table.entries[key]["warps"] == 1
    assert "gather search" in {key.split(" matrix")[0] for key in table.entries}
    assert "gather search" not in {key.split(" matrix")[0] for key in content["entries"]}, "not faster"
    assert "faster than by the rules" in capsys.readouterr().out


def test_a_second_make_tune_loses_nothing(pretend, monkeypatch, tmp_path):
    """What ships by then is no rule, and what is not searched again stays."""
    table, _ = pretend
    _, path = run_make_tune(monkeypatch, tmp_path)
    first = tables.read(path)["entries"]
    shipped = {key: entry["fields"] for key, entry in first.items()}
    monkeypatch.setattr(tables, "shipped", lambda arch: shipped)
    for more in ((), ("--budget-seconds", "-1")):
        table.entries = {}
        table.path.unlink()
        tables.changed()
        run_make_tune(monkeypatch, tmp_path, *more)
        assert tables.read(path)["entries"].keys() == first.keys()


def test_make_tune_writes_nothing_if_a_result_is_wrong(pretend, monkeypatch, tmp_path):
    from bench import rivals

    monkeypatch.setattr(rivals, "errors", lambda results, expected: [1.0] * len(results))
    status, path = run_make_tune(monkeypatch, tmp_path)
    assert status == 1
    assert not path.exists()


def test_make_tune_says_what_it_did_not_come_to(pretend, monkeypatch, tmp_path, capsys):
    status, path = run_make_tune(monkeypatch, tmp_path, "--budget-seconds", "-1")
    assert status == 0
    assert tables.read(path)["entries"] == {}
    assert "not reached: 2 of 2" in capsys.readouterr().out


def test_compiling_ahead_times_and_runs_nothing(pretend, monkeypatch):
    from bench import tune
    from stn_triton.kernels.host import launch

    _, timed = pretend
    compiled = []

    class Kernel:
        def warmup(self, *args, grid, **kwargs):
            compiled.append(grid)

    real = launch.runner
    with tune.compiling(), monkeypatch.context() as context:
        context.setattr(tuning, "search", lambda problem, start, cost: (start, cost(start), 1.0))
        tuning.clock(lambda: launch.runner(Kernel(), 3, torch.device("cpu")), torch.device("cpu"))
    assert compiled == [(3,)]
    assert launch.runner is real
    assert not timed
