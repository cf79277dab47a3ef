"""What the package needs of PyTorch and Triton; importing this module refuses what is older.

Triton need not be installed, and is not imported here.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

TORCH = (2, 11)
TRITON = (3, 6)


def is_folder(module: Any) -> bool:
    """Whether it is a folder of that name and nothing else, which Python takes for a namespace package."""
    return getattr(module, "__file__", None) is None and bool(list(getattr(module, "__path__", ())))


def triton_version() -> str | None:
    """Of what ``import triton`` would bring, "unknown" if it does not tell; None if there is none."""
    module = sys.modules.get("triton")
    if module is not None:
        return None if is_folder(module) else str(getattr(module, "__version__", "unknown"))
    spec = None if "triton" in sys.modules else importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:  # a folder without code
        return None
    # The source tells what will run, whatever the distribution is called: PyTorch has several names for it.
    if spec.origin.endswith(".py"):
        try:
            source = Path(spec.origin).read_text(encoding="utf-8")
        except (OSError, ValueError):
            source = ""
        found = re.search(r"""^__version__\s*=\s*["'](.+?)["']""", source, re.MULTILINE)
        if found:
            return found[1]
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "unknown"


def numbers_of(version: str | None) -> tuple[int, int] | None:
    """Its first two numbers; None of what is no version."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(numbers[1]), int(numbers[2])) if numbers else None


def refuse_older(name: str, found: str | None, oldest: tuple[int, int], who: str = "stn_triton") -> None:
    """
    Raises:
        ImportError: ``found`` is older; what is no version passes.
    """
    numbers = numbers_of(found)
    if numbers and numbers < oldest:
        needed = ".".join(map(str, oldest))
        raise ImportError(f"{who} needs {name} {needed} or later, and finds {name} {found}")


refuse_older("PyTorch", str(torch.__version__), TORCH)
refuse_older("Triton", triton_version(), TRITON)

# Whether PyTorch's own samplers know "bicubic" of volumes, on CPUs and CUDA devices.
TRICUBIC = (numbers_of(str(torch.__version__)) or TORCH) >= (2, 15)
