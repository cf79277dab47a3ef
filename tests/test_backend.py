"""Which code runs where, and that the package tells."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stn_triton as stn
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
