"""``python -m stn_triton``: versions, devices, and which code computes on each of them, and why."""

from __future__ import annotations

import platform

import torch

from . import __version__, backend
from .kernels.host import tables
from .versions import triton_version

_CODE = {
    "triton": "Triton kernels",
    "interpreter": "Triton kernels, interpreted in Python",
    "torch": "PyTorch's operators",
}


def _devices() -> list[tuple[str, str]]:
    """(type, description) of the CPU and of every accelerator."""
    devices = [("cpu", f"cpu ({platform.machine()})")]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        module = torch.get_device_module(accelerator)
        for index in range(torch.accelerator.device_count()):
            name = module.get_device_name(index) if hasattr(module, "get_device_name") else "unnamed"
            devices.append((accelerator.type, f"{accelerator.type}:{index} ({name})"))
    return devices


def _code(kind: str) -> str:
    """What computes on a device of this type, and why."""
    try:
        chosen = backend.select(kind)
    except ImportError as error:
        return f"nothing - {error}"
    return f"{_CODE[chosen.name]} - {chosen.reason}"


def _configurations(devices: list[tuple[str, str]]) -> str:
    """Where the kernels' tile sizes come from."""
    sources = []
    for kind, _ in devices[1:2]:
        architecture = tables.architecture(torch.device(kind, 0))
        entries = len(tables.shipped(architecture))
        if entries:
            sources.append(f"{entries} tuned for {architecture}")
        if backend.select(kind).name == "triton":
            user = tables.user_table(torch.device(kind, 0))
            sources.append(f"inside autotune() {len(user.entries)} in {user.path or 'memory alone'}")
    sources.append("else the rules in stn_triton/kernels/configs.py")
    return "; ".join(sources).removeprefix("else ") + " (nothing is tuned unless asked for)"


def main() -> None:
    versions = {
        "stn_triton": __version__,
        "torch": torch.__version__,
        "triton": triton_version() or "not installed",
        "python": platform.python_version(),
    }
    print("versions:", ", ".join(f"{name} {version}" for name, version in versions.items()))
    devices = _devices()
    for kind, description in devices:
        print(f"{description}: {_code(kind)}")
    if len(devices) == 1:
        print("no accelerator: torch finds none")
    print("kernel configurations:", _configurations(devices))


if __name__ == "__main__":
    main()
