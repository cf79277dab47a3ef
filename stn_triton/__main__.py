"""``python -m stn_triton``: versions, devices, which code computes on each and why; what would be faster."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import warnings
from typing import NamedTuple

import torch

from . import __version__, backend
from .kernels.host import tables
from .versions import triton_version

_CODE = {
    "triton": "Triton kernels",
    "interpreter": "Triton kernels, interpreted in Python: for tests",
    "torch": "PyTorch's operators",
}
_STATUS = """exit status:
  0  every accelerator runs the kernels (or there is none)
  1  an accelerator does not; with --require-kernels also: there is none
  2  the arguments are wrong"""


class Device(NamedTuple):
    """``name`` is one of ``backend.Name``, or "" where nothing computes."""

    kind: str
    description: str
    name: str
    reason: str
    advice: str


def _devices() -> list[Device]:
    """The CPU and every accelerator."""
    found = [("cpu", f"cpu ({platform.machine()})")]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        module = torch.get_device_module(accelerator)
        for index in range(torch.accelerator.device_count()):
            name = module.get_device_name(index) if hasattr(module, "get_device_name") else "unnamed"
            found.append((accelerator.type, f"{accelerator.type}:{index} ({name})"))
    return [Device(kind, description, *_code(kind)) for kind, description in found]


def _code(kind: str) -> tuple[str, str, str]:
    """What computes on a device of this type, why, and what would make it faster."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report says it
            return backend.select(kind)
    except ImportError as error:
        return "", str(error), ""


def _no_accelerator() -> tuple[str, str]:
    """Why there is none, and what would bring one."""
    built_for = torch.version.cuda or torch.version.hip
    if built_for:
        return (
            f"PyTorch's build for {built_for} finds no GPU",
            "nvidia-smi (rocm-smi) tells what the driver sees",
        )
    if shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia"):
        install = (
            "pip install --force-reinstall torch (its CUDA build: https://pytorch.org/get-started/locally)"
        )
        return "this PyTorch is a CPU build, and there is an NVIDIA driver", install
    if os.path.exists("/dev/kfd"):
        return "this PyTorch is a CPU build, and there is an AMD GPU", (
            "PyTorch's ROCm build: https://pytorch.org/get-started/locally"
        )
    return "this PyTorch is a CPU build", ""


def _configurations(devices: list[Device]) -> tuple[str, str]:
    """Where the kernels' tile sizes come from, and how to tune them."""
    sources, advice = [], ""
    for device in devices[1:2]:
        first = torch.device(device.kind, 0)
        architecture = tables.architecture(first)
        entries = len(tables.shipped(architecture))
        if entries:
            sources.append(f"{entries} tuned for {architecture}")
        if device.name == "triton":
            user = tables.user_table(first)
            sources.append(f"inside autotune() {len(user.entries)} in {user.path or 'memory alone'}")
            if not entries:
                advice = (
                    f"nothing is tuned for {architecture}: make tune (in a clone), or with stn.autotune():"
                )
    sources.append("else the rules in stn_triton/kernels/host/configs.py")
    return "; ".join(sources).removeprefix("else ") + " (nothing is tuned unless asked for)", advice


def _say(line: str, advice: str) -> None:
    print(line)
    if advice:
        print(f"    faster: {advice}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stn_triton",
        description="Tells which code computes on each device, why, and what would make it faster.",
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--require-kernels", action="store_true", help="fail unless an accelerator runs the Triton kernels"
    )
    options = parser.parse_args(arguments)
    versions = {
        "stn_triton": __version__,
        "torch": torch.__version__,
        "triton": triton_version() or "not installed",
        "python": platform.python_version(),
    }
    print("versions:", ", ".join(f"{name} {version}" for name, version in versions.items()))
    devices = _devices()
    for device in devices:
        code = _CODE.get(device.name, "nothing")
        _say(f"{device.description}: {code} - {device.reason}", device.advice)
    if len(devices) == 1:
        reason, advice = _no_accelerator()
        _say(f"no accelerator: {reason}", advice)
    source, advice = _configurations(devices)
    _say(f"kernel configurations: {source}", advice)
    accelerators = [device.name == "triton" for device in devices[1:]]
    fine = all(accelerators) and devices[0].name != ""
    return 0 if fine and (accelerators or not options.require_kernels) else 1


if __name__ == "__main__":
    sys.exit(main())
