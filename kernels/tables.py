"""Tables of tuned configurations: one JSON file for each GPU architecture.

The package ships those in ``kernels/tuned/`` (written by ``make tune``); a table of the user's own is kept
where ``STN_TRITON_CACHE`` says (default: ``stn_triton`` in the user's cache directory) and is only read and
written inside ``stn_triton.autotune()``. A table maps keys, buckets of problems (``configs.Problem``), to the
fields of a configuration that differ from the rules in ``configs``.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

FORMAT = 1  # of the files; a file of another one is not used
SHIPPED = Path(__file__).parent / "tuned"

Fields = Mapping[str, int]
_EMPTY: dict[str, Fields] = {}
_EMPTY_FIELDS: Fields = {}


def architecture(device: torch.device) -> str:
    """``sm_90``, ``gfx942``, ...: what a table is for; "" where no kernel is compiled."""
    if device.type == "cpu":
        return ""
    # tensors without memory are compiled for one target after another
    return _target() if device.type == "meta" else _architecture(device)


@cache
def _architecture(device: torch.device) -> str:
    with torch.get_device_module(device).device(device.index):  # Triton tells the current device's
        return _target()


def _target() -> str:
    try:
        import triton

        target = triton.runtime.driver.active.get_current_target()
    except Exception:  # no triton, no driver: the rules hold
        return ""
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


def _problem_with(content: Any) -> str | None:
    """What is wrong with the content of a table; None if nothing is."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return f"not a table of format {FORMAT}"
    entries = content.get("entries")
    if not isinstance(entries, dict):
        return "it has no entries"
    for key, entry in entries.items():
        fields = entry.get("fields") if isinstance(entry, dict) else None
        if not isinstance(fields, dict) or not all(
            type(value) is int and 0 <= value <= 1 << 14 for value in fields.values()
        ):
            return f"the fields of {key!r} are not whole numbers from 0 to {1 << 14}"
    return None


def read(path: Path) -> dict[str, Any] | None:
    """The content of a table; None where there is none, and with a warning where it cannot be used."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        wrong: str | None = str(error)
    else:
        wrong = _problem_with(content)
        if wrong is None:
            return content
    warnings.warn(f"stn_triton does not use the tuned configurations in {path}: {wrong}", stacklevel=2)
    return None


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces a table, whole or not at all."""
    wrong = _problem_with(content)
    if wrong is not None:
        raise ValueError(f"content: {wrong}")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1, sort_keys=True)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _fields(content: Mapping[str, Any] | None) -> dict[str, Fields]:
    return {} if content is None else {key: entry["fields"] for key, entry in content["entries"].items()}


@cache
def shipped(arch: str) -> Mapping[str, Fields]:
    """What the package brings for an architecture."""
    return _fields(read(SHIPPED / f"{arch}.json")) if arch else _EMPTY


class UserTable:
    """What was tuned on this machine, for one model of GPU and this version of Triton."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = _fields(read(path))
        self._lock = threading.Lock()

    def add(self, key: str, entry: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Keeps an entry, here and in the file, to which other processes add theirs."""
        with self._lock:
            self.entries = {**self.entries, key: entry["fields"]}
            content = read(self.path) or {"entries": {}}
            entries = {**content["entries"], key: dict(entry)}
            write(self.path, {**about, "format": FORMAT, "entries": entries})
        changed()


def user_directory() -> Path:
    """Where tables of the user's own are kept."""
    named = os.environ.get("STN_TRITON_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "stn_triton"


def about(device: torch.device) -> dict[str, str]:
    """The conditions of a measurement on a device."""
    import triton

    module = torch.get_device_module(device)
    return {
        "device": str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type,
        "architecture": architecture(device),
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
    }


@cache
def user_table(device: torch.device) -> UserTable:
    facts = about(device)
    parts = facts["architecture"], facts["device"], f"triton-{facts['triton']}"
    name = "-".join("".join(c if c.isalnum() or c in "._-" else "_" for c in part) for part in parts)
    return UserTable(user_directory() / f"{name}.json")


live = 0  # open blocks of autotune(): inside, the user's own table is in use
version = 0  # counts what changes the user's tables, of which a lookup depends on while live
ignoring = 0  # open blocks of ignore_shipped()
_blocks_lock = threading.Lock()


def set_live(change: int) -> None:
    """Opens (1) or closes (-1) a block, in all threads: gradients are computed in others."""
    global live
    with _blocks_lock:
        live += change


def changed() -> None:
    """Tells those who keep what they looked up that it may have changed."""
    global version
    with _blocks_lock:
        version += 1


@contextlib.contextmanager
def ignore_shipped() -> Iterator[None]:
    """Inside, and in all threads, a lookup finds nothing in the package's tables: the rules hold instead."""
    global ignoring
    with _blocks_lock:
        ignoring += 1
    try:
        yield
    finally:
        with _blocks_lock:
            ignoring -= 1


def lookup(device: torch.device, key: Callable[[], str]) -> Fields:
    """The fields that a table has for ``key()``: the user's own while live, then the package's."""
    fields: Fields | None = None
    if live and device.type not in ("cpu", "meta"):
        fields = user_table(device).entries.get(key())
    if fields is None and not ignoring:
        table = shipped(architecture(device))
        fields = table.get(key()) if table else None
    return _EMPTY_FIELDS if fields is None else fields
