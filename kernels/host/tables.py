"""Tables of tuned configurations: one JSON file for each GPU architecture.

The package ships those in ``kernels/tuned/`` (written by ``make tune``); a table of the user's own is kept
where ``STN_TRITON_CACHE`` says (default: ``stn_triton`` in the user's cache directory) and is only read and
written inside ``stn_triton.autotune()``. A table maps keys, buckets of problems (``configs.Problem``), to the
fields of a configuration that differ from the rules in ``configs``.

A table is checked when it is read. It is not used, and a warning says so, if it is damaged, of another
format or for another device, or has a field that no search comes to (``LIMITS``). Processes that add to one
table take turns, by a lock on a file beside it: each reads the table, adds, and replaces it whole. Readers
need no lock.
"""

from __future__ import annotations

import json
import math
import os
import stat
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .blocks import Block, Blocks, lock
from .files import replacing

FORMAT = 1  # of the files; a file of another one is not used
SECONDS = 10.0  # that a process waits at most for others that write to the same table
SHIPPED = Path(__file__).parent.parent / "tuned"

Fields = Mapping[str, int]
_EMPTY: dict[str, Fields] = {}
_EMPTY_FIELDS: Fields = {}
_EMPTY_FACTS: Mapping[str, str] = {}


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


class Limit(NamedTuple):
    """What a field may be: a whole number from ``low`` to ``high``, and a power of two unless ``any``."""

    low: int
    high: int
    any: bool = False


MOST_LANES = 16384  # elements of a block: beyond, no kernel of ours keeps them in registers
BLOCKS = (  # whose products they are: of what a program makes, and of the outputs that ``gather`` reads
    ("rows", "columns", "channels", "unroll"),
    ("out_rows", "out_columns", "channels", "unroll"),
)
LIMITS = {
    "rows": Limit(1, MOST_LANES),
    "columns": Limit(1, MOST_LANES),
    "channels": Limit(1, 256),
    "unroll": Limit(1, 8, any=True),
    "warps": Limit(1, 32),
    "waves": Limit(1, 64),
    "group": Limit(1, 8),
    "out_rows": Limit(1, 64),
    "out_columns": Limit(1, 1024),
    "candidates": Limit(16, 4096),
    "sorted": Limit(0, 1, any=True),
}
"""All fields that a table may have: what ``tuning`` searches for."""


def lanes(fields: Mapping[str, int]) -> int:
    """Elements of the largest block of these sizes."""
    return max(math.prod(fields.get(name, 1) for name in block) for block in BLOCKS)


def _wrong_field(name: str, value: Any) -> str | None:
    """What is wrong with a field; None if nothing is."""
    limit = LIMITS.get(name)
    if limit is None:
        return f"no field is called {_short(name)}"
    fits = type(value) is int and limit.low <= value <= limit.high
    if fits and (limit.any or value & (value - 1) == 0):
        return None
    kind = "a whole number" if limit.any else "a power of two"
    return f"{name} must be {kind} from {limit.low} to {limit.high}, got {_short(value)}"


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:60]}..."


def _problem_with(content: Any, facts: Mapping[str, str]) -> str | None:
    """What is wrong with the content of a table that is to be of these facts; None if nothing is."""
    written = content.get("format") if isinstance(content, dict) else None
    if type(written) is not int or written != FORMAT:  # True and 1.0 are equal to 1
        return f"not a table of format {FORMAT}"
    for name, fact in facts.items():
        if content.get(name, fact) != fact:
            return f"its {name} is {_short(content[name])}, not {fact!r}"
    entries = content.get("entries")
    if not isinstance(entries, dict):
        return "it has no entries"
    for key, entry in entries.items():
        fields = entry.get("fields") if isinstance(entry, dict) else None
        if not isinstance(fields, dict):
            return f"there are no fields of {_short(key)}"
        for name, value in fields.items():
            wrong = _wrong_field(name, value)
            if wrong is not None:
                return f"of the fields of {_short(key)}, {wrong}"
        if lanes(fields) > MOST_LANES:
            sizes = ", ".join(name for name in fields if any(name in block for block in BLOCKS))
            return f"of the fields of {_short(key)}, {sizes} make a block of over {MOST_LANES}"
    return None


def _read(path: Path, facts: Mapping[str, str]) -> tuple[dict[str, Any] | None, str | None]:
    """The content of a table, None where there is none to use; and what is wrong with the file that is there.

    Raises:
        OSError: it cannot be read, which says nothing about its content.
    """
    try:
        _need_regular(path)
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (FileNotFoundError, NotADirectoryError):
        return None, None
    except RecursionError:
        return None, "it is nested too deeply"
    except ValueError as error:
        return None, str(error)
    wrong = _problem_with(content, facts)
    return (content, None) if wrong is None else (None, wrong)


def _need_regular(path: Path) -> None:
    """
    Raises:
        OSError: what is there, or what a link leads to, is no regular file: a pipe would be waited for, and a
            device is not ours to replace.
    """
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} is not a regular file")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the key {_short(next(name for name in names if names.count(name) > 1))} comes twice"
        )
    return content


def read(path: Path, facts: Mapping[str, str] = _EMPTY_FACTS) -> dict[str, Any] | None:
    """The content of a table; None where there is none, and with a warning where it cannot be used.

    ``facts``: "architecture" and the like, of which a table that names them must be.
    """
    try:
        content, wrong = _read(path, facts)
    except OSError as error:
        content, wrong = None, str(error)
    if wrong is not None:
        _warn(path, wrong)
    return content


def _warn(path: Path | None, wrong: str) -> None:
    warnings.warn(f"stn_triton does not use the tuned configurations in {path}: {wrong}", stacklevel=3)


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces a table, whole or not at all.

    Raises:
        ValueError: it would not be used.
        OSError: it cannot be written.
    """
    wrong = _problem_with(content, {})
    if wrong is not None:
        raise ValueError(f"content: {wrong}")
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.write("\n")


def update(
    path: Path,
    about: Mapping[str, Any],
    entries: Mapping[str, Any],
    facts: Mapping[str, str] = _EMPTY_FACTS,
    *,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Adds entries to a table, whatever other processes add meanwhile; returns its content.

    A file that cannot be used is set aside first, under another name.

    Args:
        about: what else the table is to say.
        facts: see :func:`read`.
        without: keys of entries that are to go.
    """
    import filelock  # PyTorch brings it; nothing else here needs it

    path = Path(os.path.realpath(path))  # one lock for all links to a table
    _need_regular(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=SECONDS, poll_interval=0.01):
        found, wrong = _read(path, facts)
        if wrong is not None:
            _set_aside(path, wrong)
        found_entries = found["entries"] if found is not None else {}
        known = {key: entry for key, entry in found_entries.items() if key not in without}
        content = {**about, "format": FORMAT, "entries": {**known, **entries}}
        write(path, content)
    return content


def _set_aside(path: Path, wrong: str) -> None:
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.unusable-{number}")):
        number += 1
    path.rename(aside)
    warnings.warn(f"stn_triton has set {path} aside as {aside.name}: {wrong}", stacklevel=4)


def _fields(content: Mapping[str, Any] | None) -> dict[str, Fields]:
    return {} if content is None else {key: entry["fields"] for key, entry in content["entries"].items()}


@cache
def shipped(arch: str) -> Mapping[str, Fields]:
    """What the package brings for an architecture."""
    return _fields(read(_shipped_path(arch), {"architecture": arch})) if arch else _EMPTY


def _shipped_path(arch: str) -> Path:
    return SHIPPED / f"{arch}.json"


class UserTable:
    """What was tuned on this machine, for one model of GPU and this version of Triton.

    ``path``: None where no directory can be named, because of ``wrong``, or where the path leads to what is
    no regular file. Entries are kept in memory then, as they are where the file cannot be read or written.
    ``facts``: see :func:`read`.
    """

    def __init__(
        self, path: Path | None, facts: Mapping[str, str] = _EMPTY_FACTS, *, wrong: str = ""
    ) -> None:
        try:
            if path is not None:
                _need_regular(path)
        except OSError as error:
            path, wrong = None, str(error)
        self.path, self._facts, self._wrong = path, facts, wrong
        self.entries = {} if path is None else _fields(read(path, facts))
        self._lock = lock()
        self._warned = False

    def remember(self, key: str, fields: Fields) -> None:
        """Keeps an entry in memory alone."""
        with self._lock:
            self.entries = {**self.entries, key: fields}
        changed()

    def add(self, key: str, entry: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Keeps an entry, here and in the file, to which other processes add theirs. Raises nothing: what was
        called is the user's function, which works without."""
        self.remember(key, entry["fields"])
        with self._lock:
            try:
                if self.path is None:
                    raise FileNotFoundError(self._wrong)
                content = update(self.path, about, {key: dict(entry)}, self._facts)
                self.entries = {**_fields(content), **self.entries}
            except Warning:  # warnings are errors where the user says so
                raise
            except Exception as error:
                self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            where = "" if self.path is None else f" in {self.path}"
            warnings.warn(
                f"stn_triton cannot keep tuned configurations{where}: {error}. They are kept in memory; "
                "the environment variable STN_TRITON_CACHE names another directory",
                stacklevel=3,
            )


def user_directory() -> Path:
    """Where tables of the user's own are kept.

    Raises:
        NotADirectoryError: STN_TRITON_CACHE names something else.
        FileNotFoundError: it names nothing, and the user has no home.
    """
    named = os.environ.get("STN_TRITON_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or ".")
    try:
        if named:
            path = Path(named).expanduser()
        else:  # a relative base is to be ignored, says the standard
            path = (base if base.is_absolute() else Path.home() / ".cache") / "stn_triton"
        if not path.is_absolute() and (not named or named.startswith("~")):
            raise RuntimeError("HOME is a relative path")
        path = path.absolute()
    except RuntimeError as error:
        raise FileNotFoundError(
            f"STN_TRITON_CACHE must name a directory, got {named!r}, and the user has no home: {error}"
        ) from error
    if named and path.exists() and not path.is_dir():
        raise NotADirectoryError(f"STN_TRITON_CACHE must name a directory, got {named!r}, which is a file")
    return path


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
    facts = {fact: facts[fact] for fact in ("architecture", "device", "triton")}
    try:
        return UserTable(user_directory() / f"{name}.json", facts)
    except OSError as error:
        return UserTable(None, facts, wrong=str(error))


live: Blocks[None] = Blocks()  # of autotune(): inside, and in all threads, the user's own table is in use
ignoring: Blocks[None] = Blocks()  # of ignore_shipped()
version = 0  # counts what changes the user's tables, of which a lookup depends on while live
_version_lock = lock()


def changed() -> None:
    """Tells those who keep what they looked up that it may have changed."""
    global version
    with _version_lock:
        version += 1


def ignore_shipped() -> Block[None]:
    """Inside, and in all threads, a lookup finds nothing in the package's tables: the rules hold instead."""
    return Block(ignoring, None)


_refused: set[tuple[torch.device, str]] = set()


def refuse(device: torch.device, key: str, wrong: str) -> None:
    """Warns, once, that what :func:`lookup` gave for a key is not used."""
    if (device, key) not in _refused:
        _refused.add((device, key))
        user = user_table(device) if live.open and device.type not in ("cpu", "meta") else None
        path = user.path if user and key in user.entries else _shipped_path(architecture(device))
        _warn(path, f"of the fields of {key!r}, {wrong}")


def lookup(device: torch.device, key: Callable[[], str]) -> Fields:
    """The fields that a table has for ``key()``: the user's own while live, then the package's."""
    fields: Fields | None = None
    if live.open and device.type not in ("cpu", "meta"):
        fields = user_table(device).entries.get(key())
    if fields is None and not ignoring.open:
        table = shipped(architecture(device))
        fields = table.get(key()) if table else None
    return _EMPTY_FIELDS if fields is None else fields
