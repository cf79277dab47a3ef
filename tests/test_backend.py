"""Which code runs where, and that the package tells."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import stn_triton as stn
from stn_triton import __main__ as command
from stn_triton import backend

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments, **environment):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_report_on_a_plain_cpu():
    """`python -m stn_triton` names versions, devices, the code that computes on each, and why."""
    output = python("-m", "stn_triton")
    for word in (stn.__version__, torch.__version__, "triton", "cpu", "PyTorch's operators", "no CPU driver"):
        assert word in output
    assert "configurations" in output


def test_report_under_the_interpreter():
    assert "interpreted" in python("-m", "stn_triton", TRITON_INTERPRET="1")


@pytest.mark.parametrize("value", ["1", "true", "on", "0", "", "off"])
def test_the_interpreter_is_recognised_as_triton_does(value):
    """Both sides must agree, or CPU tensors would be given to compiled kernels."""
    code = """
import triton
from stn_triton import backend
print(triton.knobs.runtime.interpret, backend.interpreting())
"""
    triton_says, we_say = python("-c", code, TRITON_INTERPRET=value).split()
    assert triton_says == we_say


@pytest.mark.parametrize("asked", ["stn.affine_grid_sample(image, theta)", "backend.use('interpreter')"])
def test_the_interpreter_is_asked_for_too_late(asked):
    """Triton has read the variable by then."""
    code = f"""
import os, triton
os.environ["TRITON_INTERPRET"] = "1"
import torch, stn_triton as stn
from stn_triton import backend
image, theta = torch.rand(1, 1, 4, 4), torch.eye(2, 3)[None]
try:
    {asked}
except ImportError as error:
    print(error)
"""
    assert "set TRITON_INTERPRET=1 before Python starts" in python("-c", code)


def test_use_is_undone(device):
    """Also when the block fails."""
    before = backend.select(device.type)

    def fail():
        with backend.use("torch"):
            assert backend.select(device.type).name == "torch"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert backend.select(device.type) == before


def test_cpu_needs_no_triton():
    """Without Triton the CPU path works, and an accelerator's would say why it is not used."""
    code = """
import sys
sys.modules["triton"] = None
import torch, stn_triton as stn
from stn_triton import backend
image = torch.randn(1, 2, 4, 5, requires_grad=True)
theta = torch.eye(2, 3)[None].requires_grad_()
stn.affine_grid_sample(image, theta).sum().backward()
assert image.grad is not None and theta.grad is not None
chosen = backend.select("cuda")
assert chosen.name == "torch" and "triton" in chosen.reason.lower(), chosen
print("fine")
"""
    assert python("-c", code).strip() == "fine"


class Driver:
    """Of Triton's, what is asked: a target (backend, architecture), or an error."""

    def __init__(self, answer):
        self.active, self.answer = self, answer

    def get_current_target(self):
        if isinstance(self.answer, Exception):
            raise self.answer
        return SimpleNamespace(**dict(zip(("backend", "arch"), self.answer)))


# What an accelerator lacks: (platform, driver's answer or None without Triton, device, words of the warning).
LACKS = {
    "no Triton": ("linux", None, "cuda", "Triton cannot run", "Faster: pip install triton"),
    "no Triton on Windows": ("win32", None, "cuda", "Triton cannot run", "WSL"),
    "an old GPU": ("linux", ("cuda", 61), "cuda", "capability is 6.1, and Triton needs 7.0"),
    "another driver": ("linux", ("xpu", 1), "cuda", "active driver is for xpu"),
    "no compiler": ("linux", RuntimeError("Failed to find C compiler"), "cuda", "C compiler", "CC="),
    "an Apple": ("darwin", None, "mps", "Apple"),
}


@pytest.mark.parametrize("lack", LACKS)
def test_an_accelerator_without_kernels_is_told_once(lack, monkeypatch):
    """The first use says why, and what would help; meta tensors are no accelerator's."""
    system, answer, device, *words = LACKS[lack]
    if answer is None:
        monkeypatch.setitem(sys.modules, "triton", None)
    else:
        triton = pytest.importorskip("triton")
        monkeypatch.setattr(triton.runtime, "driver", Driver(answer))
    monkeypatch.setattr(backend.sys, "platform", system)
    backend._select.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert [backend.select(device).name for _ in range(3)] == ["torch"] * 3
            backend.select("meta")
    finally:
        backend._select.cache_clear()
    (warning,) = caught
    assert all(word in str(warning.message) for word in words)


@pytest.mark.parametrize("arguments, status", [(["--help"], 0), (["--nonsense"], 2)], ids=str)
def test_help_and_wrong_arguments(arguments, status, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == status
    assert "--require-kernels" in "".join(capsys.readouterr())


def test_report_of_an_accelerator(monkeypatch, capsys):
    """Its code, the reason and the line to type; the exit status tells scripts."""
    cpu, gpu = ("cpu", "cpu", "torch", "no driver", ""), ("cuda", "cuda:0 (old)", "torch", "too old", "buy")
    monkeypatch.setattr(command, "_devices", lambda: [command.Device(*one) for one in devices])
    devices = [cpu]
    assert command.main([]) == 0
    assert command.main(["--require-kernels"]) == 1
    devices = [cpu, gpu]
    monkeypatch.setattr(command.tables, "architecture", lambda device: "sm_90")
    assert command.main([]) == 1
    assert "cuda:0 (old): PyTorch's operators - too old\n    faster: buy" in capsys.readouterr().out
    devices = [cpu, (*gpu[:2], "triton", "there is a driver", "")]
    user = type("Table", (), {"entries": {}, "path": None})()
    monkeypatch.setattr(command.tables, "user_table", lambda device: user)
    assert command.main(["--require-kernels"]) == 0
    assert "faster: nothing is tuned for sm_90: make tune" in capsys.readouterr().out
