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
    """A path to write a file or folder to, which takes the place of ``path`` when the block has ended.

    A block that fails leaves what was there. What processes left that were killed inside is swept away by the
    next one. A link is followed. The mode is that of a new file, by the process's umask.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    part = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}.part")
    _writing.add(part.name)
    try:
        yield part
        if part.is_file():
            with part.open("r+b") as file:
                os.fsync(file.fileno())  # else a power failure could leave an empty file
        os.replace(part, path)
    finally:
        _remove(part)
        _writing.discard(part.name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    shape = re.compile(rf"\.{re.escape(path.name)}\.([^.]+)\.(\d+)\.[0-9a-f]+\.part")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        match = shape.fullmatch(left.name)
        if match is None or left.name in _writing:
            continue
        try:
            here = match[1] == _HOST
            if (here and not _runs(int(match[2]))) or time.time() - left.stat().st_mtime > _DAY:
                _remove(left)
        except OSError:  # another process was first, or may and this one may not
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
