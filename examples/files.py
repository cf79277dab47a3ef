"""Reading and writing files: what is damaged is said in one way, what is written is whole or not there."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stn_triton.kernels.host.files import replacing

__all__ = ["DataError", "load", "read_json", "reading", "replacing", "write_json", "write_text"]


class DataError(ValueError):
    """A file that is there, or belongs to what is there, cannot be used.

    The message names the file and says what is wrong with it and what to do.
    """

    def __init__(self, path: Path | str, wrong: object, remedy: str) -> None:
        super().__init__(f"{path} cannot be used: {wrong}. {remedy}")


@contextmanager
def reading(path: Path | str, remedy: str) -> Iterator[None]:
    """Inside, whatever a file makes its readers raise becomes a :class:`DataError`.

    Errors that say nothing about the file's content pass: it may not be read, memory or a library is missing.
    """
    try:
        yield
    except (DataError, PermissionError, MemoryError, ImportError):
        raise
    except FileNotFoundError as error:
        raise DataError(path, "it is missing", remedy) from error
    except Exception as error:  # readers of damaged files raise nearly all there are
        raise DataError(path, f"{type(error).__name__}: {error}", remedy) from error


def read_json(path: Path, remedy: str) -> Any:
    """
    Raises:
        DataError: the file is damaged.
    """
    with reading(path, remedy):
        return json.loads(path.read_text(encoding="utf-8"))


def load(path: Path, remedy: str, **options: Any) -> Any:
    """What ``torch.save`` wrote, tensors and plain values alone.

    Raises:
        DataError: the file is damaged.
    """
    with reading(path, remedy):
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()  # PyTorch writes checksums and does not look at them
        if wrong is not None:
            raise ValueError(f"the checksum of {wrong} in it is wrong")
        return torch.load(path, weights_only=True, **options)


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Replaces a file by what ``save`` writes to the path that it is given, whole or not at all."""
    with replacing(path) as part:
        save(part)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")
