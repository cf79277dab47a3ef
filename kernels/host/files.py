"""Files that are replaced whole or not at all."""

from __future__ import annotations

import glob
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DAY = 24 * 3600.0  # seconds: nobody writes a file for longer
_HOST = re.sub(r"[^\w-]", "_", platform.node()) or "_"
_writing: set[str] = set()  # names of this process


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path of the same name to write a file or folder to, which replaces ``path`` when the block has ended.

    A block that fails leaves what was there. What processes left that were killed inside is swept away by the
    next one. A link is followed. The mode is that of a new file, by the process's umask.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # /dev/stdout and the like
        yield path
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    scratch = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}.part")
    part = scratch / path.name
    _writing.add(scratch.name)
    try:
        scratch.mkdir()
        yield part
        if part.is_file():
            with part.open("r+b") as file:
                os.fsync(file.fileno())  # else a power failure could leave an empty file
        os.replace(part, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        _writing.discard(scratch.name)


def _sweep(path: Path) -> None:
    shape = re.compile(rf"\.{re.escape(path.name)}\.([^.]+)\.(\d+)\.[0-9a-f]+\.part")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        match = shape.fullmatch(left.name)
        if match is None or left.name in _writing:
            continue
        try:
            here = match[1] == _HOST
            if (here and not _runs(int(match[2]))) or time.time() - left.stat().st_mtime > _DAY:
                shutil.rmtree(left, ignore_errors=True)
        except FileNotFoundError:  # another process was first
            continue


def _runs(pid: int) -> bool:
    """Whether another process of this machine has that number; where it cannot be asked, yes."""
    if pid == os.getpid():
        return False  # an earlier process had this one's number
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
