"""The user's tables of tuned configurations: damaged, foreign, read-only, shared by processes."""
# ruff: noqa: F401, F811  (fixtures)

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import socket
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from test_tuning import GPU, PROBLEM, pretend, ship

import stn_triton as stn
from stn_triton.kernels.host import configs, tables, tuning
from stn_triton.kernels.modes import Interpolation, Source

KEY = PROBLEM.key
USER_TABLE = tables.user_table.__wrapped__


def content_of(fields, **more):
    return {"format": tables.FORMAT, "entries": {KEY: {"fields": fields}}, **more}


# ---------------------------------------------------------------------------------------- what is read
@pytest.mark.parametrize(
    "fields, says",
    [
        ({"warps": 0}, "warps must be a power of two from 1 to 32, got 0"),
        ({"warps": -4}, "got -4"),
        ({"warps": 3}, "got 3"),
        ({"warps": 64}, "got 64"),
        ({"warps": 4.0}, "got 4.0"),
        ({"warps": True}, "got True"),
        ({"warps": "4"}, "got '4'"),
        ({"warps": None}, "got None"),
        ({"rows": 24}, "rows must be a power of two"),
        ({"columns": 1 << 40}, "columns must be"),
        ({"unroll": 0}, "unroll must be a whole number from 1 to 8, got 0"),
        ({"unroll": 9}, "got 9"),
        ({"channels": 512}, "channels must be"),
        ({"group": 3}, "group must be"),
        ({"waves": 0}, "waves must be"),
        ({"candidates": 8192}, "candidates must be"),
        ({"sorted": 2}, "sorted must be"),
        ({"rows": 256, "columns": 256}, "rows, columns make a block of over 16384"),
        ({"out_rows": 64, "out_columns": 1024}, "out_rows, out_columns make a block of over 16384"),
        ({"colums": 32}, "no field is called 'colums'"),
        ({"splits": 2}, "no field is called 'splits'"),
        ({"x" * 1000: 2}, "no field is called 'xxx"),
        ([4], "no fields of"),
    ],
    ids=str,
)
def test_a_field_that_cannot_be_is_named(ship, tmp_path, fields, says):
    """With its file; the rules hold, for all problems of the table."""
    rules, other = configs.choose(GPU, PROBLEM), PROBLEM._replace(channels=64)
    path = tmp_path / "sm_90.json"
    content = content_of(fields)
    content["entries"][other.key] = {"fields": {"warps": 8}}
    path.write_text(json.dumps(content))
    tables.shipped.cache_clear()
    with pytest.warns(UserWarning, match="does not use") as caught:
        assert configs.choose(GPU, PROBLEM) == rules
    assert configs.choose(GPU, other).warps == 4
    (warning,) = caught
    assert f"does not use the tuned configurations in {path}: " in str(warning.message)
    assert says in str(warning.message)
    assert len(str(warning.message)) < 600


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "Expecting value"),
        (b'{"format": 1, "entries": {"a": {"fie', "Unterminated string"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"format": ' + b"9" * 10_000 + b"}", ""),
        (b"\xff\xfe\x00", "decode"),
        (b"null", "not a table of format 1"),
        (b'{"format": 2, "entries": []}', "not a table of format 1"),
        (b'{"format": true, "entries": {}}', "not a table of format 1"),
        (b'{"format": 1.0, "entries": {}}', "not a table of format 1"),
        (b'{"format": 1, "entries": {"a": {}, "a": {}}}', "the key 'a' comes twice"),
        (b'{"format": 1, "entries": []}', "no entries"),
        (b'{"format": 1, "architecture": "sm_80", "entries": {}}', "architecture is 'sm_80', not 'sm_90'"),
        (b'{"format": 1, "architecture": 90, "entries": {}}', "architecture is 90, not 'sm_90'"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_a_damaged_or_foreign_table_is_told(ship, tmp_path, content, says):
    rules = configs.choose(GPU, PROBLEM)
    (tmp_path / "sm_90.json").write_bytes(content)
    tables.shipped.cache_clear()
    with pytest.warns(UserWarning, match=r"does not use .*sm_90\.json: ") as caught:
        assert configs.choose(GPU, PROBLEM) == rules
    assert says in str(caught[0].message)


def test_fields_that_do_not_go_with_the_rules_are_told(ship, tmp_path):
    """Each is possible; with what the rules say of the others the block would have over 2^14 elements."""
    rules = configs.choose(GPU, PROBLEM)
    ship({KEY: {"rows": 1024}})
    tables._refused.clear()
    with pytest.warns(UserWarning, match=r"sm_90\.json: of the fields of .*too large"):
        assert configs.choose(GPU, PROBLEM) == rules
    assert configs.choose(GPU, PROBLEM) == rules, "it is said once"
    with configs.override(rows=1024):  # whoever asks in so many words
        assert configs.choose(GPU, PROBLEM).rows == 1024


def test_a_search_that_does_not_go_with_the_tile_is_told(ship):
    """``gather`` holds the gradients of a block of outputs by channels."""
    problem = PROBLEM._replace(kernel="gather", channels=64, channels_last=True, backward=True)
    tile, rules = configs.choose_gather(GPU, problem)
    assert tile.channels * tile.unroll > 4
    ship({problem._replace(kernel="gather search").key: {"out_rows": 64, "out_columns": 256}})
    tables._refused.clear()
    with pytest.warns(UserWarning, match=r"sm_90\.json: of the fields of .*too large"):
        assert configs.choose_gather(GPU, problem) == (tile, rules)


def some_problems():
    kernels = "forward", "backward parameters", "gather", "gather search", "grid", "sum", "sorted sum"
    sources = Source.AFFINE, Source.TPS, Source.GRID
    for kernel, source, interpolation, channels, last in itertools.product(
        kernels, sources, Interpolation, (1, 3, 64, 1000), (False, True)
    ):
        yield PROBLEM._replace(
            kernel=kernel,
            source=source,
            interpolation=interpolation,
            channels=channels,
            channels_last=last,
            backward="backward" in kernel,
        )


def test_what_rules_and_search_come_to_is_possible():
    """Every field that they know has its limits, and keeps them."""
    chance, found = random.Random(0), 0
    assert tables.LIMITS.keys() == (
        {"waves", *configs.Tile._fields, *configs.Gather._fields, *configs.Sum._fields} - {"splits", "steps"}
    )

    def cost(fields):
        nonlocal found
        found += 1
        for name, value in fields.items():
            assert tables._wrong_field(name, value) is None, (name, value)
        assert tables.lanes(fields) <= tables.MOST_LANES
        return chance.random()

    for problem in some_problems():
        tile, ways = configs.choose_gather(GPU, problem)
        for chosen in (configs.choose(GPU, problem), tile, ways, configs.Sum(0)):
            start = {k: v for k, v in chosen._asdict().items() if k not in ("splits", "steps")}
            if isinstance(chosen, configs.Tile):
                start["waves"] = configs.waves(problem)
            tuning.search(problem, start, cost)
    assert found > 5000


# -------------------------------------------------------------------------------------- what is written
def unwritable(kind, tmp_path, monkeypatch):
    """A directory that cannot be written, as the environment names it."""
    path = tmp_path / "cache"
    monkeypatch.setenv("STN_TRITON_CACHE", str(path))
    if kind == "a file":
        path.write_text("")
    elif kind == "below a file":
        path.write_text("")
        monkeypatch.setenv("STN_TRITON_CACHE", str(path / "further"))
    elif kind == "no home":
        for name in ("STN_TRITON_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)

        def home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(tables.Path, "home", home)
    elif kind == "full":

        def dump(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(json, "dump", dump)
    elif kind == "read-only":

        def mkdir(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(tables.Path, "mkdir", mkdir)
    elif kind == "no locks":
        import filelock

        def acquire(*args, **kwargs):
            raise NotImplementedError("FileSystem does not appear to support flock")

        monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    else:
        monkeypatch.setitem(sys.modules, "filelock", None)


def say_once(caught):
    ours = [str(warning.message) for warning in caught if "stn_triton" in str(warning.message)]
    assert len(ours) == 1
    assert "kept in memory" in ours[0]
    assert "STN_TRITON_CACHE" in ours[0]


@pytest.mark.parametrize(
    "kind", ["a file", "below a file", "no home", "full", "read-only", "no locks", "no filelock"]
)
def test_what_cannot_be_written_is_kept_in_memory(kind, tmp_path, monkeypatch):
    """One warning says why, and what would help."""
    monkeypatch.setattr(tables, "about", lambda device: dict(ABOUT))
    unwritable(kind, tmp_path, monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table, version = USER_TABLE(GPU), tables.version
        for key in "ab":
            table.add(key, {"fields": {"rows": 4}}, ABOUT)
    assert table.entries == {"a": {"rows": 4}, "b": {"rows": 4}}
    assert tables.version > version
    say_once(caught)


def test_a_call_goes_on_where_nothing_can_be_written(pretend, tmp_path, monkeypatch):
    """As it would without tuning; and what was found is not searched for again."""
    _, timed = pretend
    monkeypatch.setattr(tuning, "NEIGHBOURS", ())  # what the rules say is timed, and nothing else
    image, theta = torch.randn(1, 2, 4, 5), torch.eye(2, 3)[None] + 0.1
    expected = stn.affine_grid_sample(image, theta)
    monkeypatch.setattr(tables, "about", lambda device: dict(ABOUT))
    unwritable("a file", tmp_path, monkeypatch)
    table, searched = USER_TABLE(GPU), []
    monkeypatch.setattr(tables, "user_table", lambda device: table)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with stn.autotune():
            for count in (1, 8, 1, 8):  # two entries
                found = stn.affine_grid_sample(image, theta.expand(1, count, 2, 3))
                torch.testing.assert_close(found[:, 0], expected)
                searched.append(len(timed))
    assert searched == [1, 2, 2, 2]
    assert len(table.entries) == 2
    say_once(caught)


ABOUT = {"architecture": "sm_90", "device": "a GPU", "triton": "3.9.0", "torch": "2.13.0"}


def test_a_search_that_runs_out_of_memory_goes_on(pretend, monkeypatch):
    """A configuration for which there is none is one that is not possible."""
    table, _ = pretend

    def clock(run, device):
        run()
        if configs.choose(GPU, PROBLEM).warps == 2:
            raise torch.OutOfMemoryError("none left")
        return float(configs.choose(GPU, PROBLEM).warps)

    monkeypatch.setattr(tuning, "clock", clock)
    monkeypatch.setattr(tuning, "NEIGHBOURS", (tuning._warps,))
    with stn.autotune():
        stn.affine_grid_sample(torch.randn(1, 2, 4, 5), torch.eye(2, 3)[None])
    assert [entry["warps"] for entry in table.entries.values()] == [4]
    assert tables.read(table.path)["entries"].keys() == table.entries.keys()


def test_a_search_in_which_all_fails_is_not_kept(pretend, monkeypatch):
    """The call itself decides; another process searches again."""
    table, _ = pretend

    def clock(run, device):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(tuning, "clock", clock)
    with stn.autotune():
        stn.affine_grid_sample(torch.randn(1, 2, 4, 5), torch.eye(2, 3)[None])
    assert len(table.entries) == 1
    assert not table.path.exists()


def add(path, name, count, start):
    table = tables.UserTable(path)
    start.wait(60)
    for k in range(count):
        table.add(f"{name}{k}", {"fields": {"rows": 4}}, {"device": "a GPU"})


def test_two_processes_lose_nothing(tmp_path):
    """Fifty entries each, one of them by way of a link."""
    (tmp_path / "real").mkdir()
    path, link = tmp_path / "real" / "x.json", tmp_path / "x.json"
    link.symlink_to(path)
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    processes = [
        context.Process(target=add, args=(file, name, 50, start)) for file, name in ((path, "a"), (link, "b"))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert tables.read(path)["entries"].keys() == {f"{name}{k}" for name in "ab" for k in range(50)}
    assert link.is_symlink()
    assert sorted(file.name for file in path.parent.iterdir()) == [".x.json.lock", "x.json"]


def test_threads_lose_nothing(tmp_path):
    path, start = tmp_path / "x.json", threading.Barrier(4)
    threads = [threading.Thread(target=add, args=(path, name, 10, start)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tables.read(path)["entries"]) == 40


@pytest.mark.parametrize(
    "content", [b'{"format": 1, "entr', b"", b'{"format": 2, "entries": {"kept": 1}}', b"[" * 200_000]
)
@pytest.mark.parametrize("linked", [False, True], ids=["file", "link"])
def test_what_cannot_be_used_is_set_aside(tmp_path, content, linked):
    """It is not overwritten, once and again."""
    real = path = tmp_path / "x.json"
    if linked:
        real = tmp_path / "real" / "y.json"
        real.parent.mkdir()
        path.symlink_to(real)
    for number in (1, 2):
        real.write_bytes(content)
        with pytest.warns(UserWarning, match="does not use the tuned"):
            table = tables.UserTable(path)
        assert table.entries == {}
        with pytest.warns(
            UserWarning, match=rf"has set .*{real.name} aside as {real.name}.unusable-{number}"
        ):
            table.add("a", {"fields": {"rows": 4}}, {})
        assert real.with_name(f"{real.name}.unusable-{number}").read_bytes() == content
        assert tables.read(path)["entries"].keys() == {"a"}
        assert path.is_symlink() == linked


def test_another_devices_table_is_set_aside(tmp_path):
    path = tmp_path / "x.json"
    theirs = tables.UserTable(path, {"device": "a GPU"})
    theirs.add("a", {"fields": {"rows": 4}}, {"device": "a GPU"})
    with pytest.warns(UserWarning, match="device is 'a GPU', not 'another'"):
        ours = tables.UserTable(path, {"device": "another"})
    with pytest.warns(UserWarning, match="aside"):
        ours.add("b", {"fields": {"rows": 4}}, {"device": "another"})
    assert tables.read(path)["entries"].keys() == {"b"}


def test_a_writer_that_hangs_is_not_waited_for_long(tmp_path, monkeypatch):
    import filelock

    monkeypatch.setattr(tables, "SECONDS", 0.05)
    path = tmp_path / "x.json"
    table = tables.UserTable(path)
    with filelock.FileLock(tmp_path / ".x.json.lock"), pytest.warns(UserWarning, match="kept in memory"):
        table.add("a", {"fields": {"rows": 4}}, {})
    assert table.entries == {"a": {"rows": 4}}
    table.add("b", {"fields": {"rows": 4}}, {})
    assert tables.read(path)["entries"].keys() == {"b"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
@pytest.mark.parametrize("linked", [False, True], ids=["itself", "link"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "socket"])
def test_what_is_no_regular_file_is_left_alone(tmp_path, monkeypatch, kind, linked):
    """It is neither opened, which may wait for ever, nor renamed. It is said once."""
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    real = path = Path("x.json")
    if linked:
        real = Path("real") / "y"
        real.parent.mkdir()
        path.symlink_to(real)
    if kind == "pipe":
        os.mkfifo(real)
    elif kind == "folder":
        real.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(real))
    before = sorted(tmp_path.rglob("*")), real.stat().st_ino
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = tables.UserTable(path)
        for key in "ab":
            table.add(key, {"fields": {"rows": 4}}, {})
    say_once(caught)
    assert "is not a regular file" in str(caught[0].message)
    assert table.entries.keys() == {"a", "b"}
    assert (sorted(tmp_path.rglob("*")), real.stat().st_ino) == before
    with pytest.raises(OSError, match="is not a regular file"):  # of a table that became one since
        tables.update(path, {}, {})
    assert (sorted(tmp_path.rglob("*")), real.stat().st_ino) == before


def test_tables_have_the_umasks_mode(tmp_path):
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(umask)
        try:
            tables.UserTable(tmp_path / "x.json").add("a", {"fields": {"rows": 4}}, {})
        finally:
            os.umask(before)
        assert (tmp_path / "x.json").stat().st_mode & 0o777 == mode


# --------------------------------------------------------------------------------------- where they are
@pytest.mark.parametrize("value", ["~/x", "x"])
def test_the_directory_is_absolute(monkeypatch, tmp_path, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STN_TRITON_CACHE", value)
    assert tables.user_directory() == tmp_path / "x"


@pytest.mark.parametrize("named", [None, "~/x"])
def test_a_relative_home_is_none(monkeypatch, named):
    """What it leads to would depend on the folder in which a process began."""
    monkeypatch.setenv("HOME", "relative")
    for name, value in (("XDG_CACHE_HOME", "relative"), ("STN_TRITON_CACHE", named)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match=r"STN_TRITON_CACHE must name a directory, .*HOME is a relative path"):
        tables.user_directory()


@pytest.mark.parametrize("kind", ["a file", "no user"])
def test_nonsense_in_the_variable_names_it(monkeypatch, tmp_path, kind):
    (tmp_path / "file").write_text("")
    value = str(tmp_path / "file") if kind == "a file" else "~nobody-of-that-name/x"
    monkeypatch.setenv("STN_TRITON_CACHE", value)
    with pytest.raises(OSError, match=rf"STN_TRITON_CACHE must name a directory, got '{value}'"):
        tables.user_directory()
