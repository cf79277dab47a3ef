"""What a result was measured on and with: the facts that every results file carries."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
# What decides a measurement, for trees that have no git.
SOURCES = ("stn_triton/**/*.py", "kernels/**/*.py", "kernels/**/*.json", "bench/*.py")


def accelerator() -> torch.device | None:
    """The GPU that PyTorch uses; None without one, and where TRITON_INTERPRET=1 keeps the kernels off it."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1" or not torch.accelerator.is_available():
        return None
    found = torch.accelerator.current_accelerator()
    return found if found is not None and found.type in ("cuda", "xpu") else None


def version(package: str) -> str | None:
    """Of an installed distribution; None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit(given: str | None = None) -> str:
    """The commit: as given, as git says ("+" for a tree with changes), of STN_COMMIT, of the file COMMIT."""
    if given:
        return given
    git = ["git", "-C", str(ROOT)]
    if shutil.which("git") and (ROOT / ".git").exists():
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        if head.returncode == 0:
            status = [*git, "status", "--porcelain", "--untracked-files=no"]
            changes = subprocess.run(status, capture_output=True, text=True, check=False).stdout.strip()
            return head.stdout.strip() + ("+" if changes else "")
    if os.environ.get("STN_COMMIT"):
        return os.environ["STN_COMMIT"]
    file = ROOT / "COMMIT"
    return file.read_text().strip() if file.exists() else "unknown"


def sources() -> str:
    """A checksum of the code, by which two results are of the same one even where no git tells the commit."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def smi(*fields: str) -> dict[str, str]:
    """Fields of ``nvidia-smi --query-gpu`` for PyTorch's first GPU; empty where there is no such tool."""
    if not shutil.which("nvidia-smi"):
        return {}
    # nvidia-smi numbers all GPUs, PyTorch those that CUDA_VISIBLE_DEVICES leaves.
    which = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={which}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (subprocess.SubprocessError, OSError):
        return {}
    lines = result.stdout.strip().splitlines()
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    return dict(zip(fields, values)) if len(values) == len(fields) else {}


def cuda_tool(name: str) -> str | None:
    """The path of one of CUDA's tools, which an installation need not put where commands are looked for."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def clocks() -> dict[str, str]:
    """Clocks, power and temperature now: they are read, never set."""
    return smi("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def l2_bytes(device: torch.device) -> int:
    """The size of the last-level cache; 64 MiB where the driver does not tell."""
    if device.type == "cpu":
        return 0
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "L2_cache_size", 0) or 64 << 20


def facts(device: torch.device, given_commit: str | None = None) -> dict[str, Any]:
    """Device, versions and code, in terms that JSON knows."""
    described: dict[str, Any] = {
        "device": f"{platform.machine()} CPU",
        "device_type": device.type,
        "driver": None,
        "memory_bytes": None,
        "l2_bytes": None,
        "multiprocessors": None,
        "capability": None,
    }
    if device.type != "cpu":
        properties = torch.get_device_module(device).get_device_properties(device)
        described |= {
            "device": properties.name,
            "driver": smi("driver_version").get("driver_version"),
            "memory_bytes": properties.total_memory,
            "l2_bytes": l2_bytes(device),
            "multiprocessors": getattr(properties, "multi_processor_count", None),
            "capability": f"{properties.major}.{properties.minor}" if hasattr(properties, "major") else None,
        }
    cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None
    return described | {
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "host_cores": os.cpu_count(),
        "interpreted": os.environ.get("TRITON_INTERPRET", "0") == "1",
        "commit": commit(given_commit),
        "sources": sources(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "clocks": clocks() if device.type == "cuda" else {},
    }
