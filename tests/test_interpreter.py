"""The quick interpreter, in which all these tests run, computes what Triton's own does."""

import os
import subprocess
import sys

import pytest
from conftest import ON_GPU

PROGRAM = """
import torch
import stn_triton as stn
from bench.interpreter import quick_interpreter

def found(dtype):
    torch.manual_seed(0)
    image = torch.randn(1, 2, 5, 6, dtype=dtype, requires_grad=True)
    theta = (torch.eye(2, 3)[None] + 0.3 * torch.randn(1, 2, 3)).requires_grad_()
    samples = stn.affine_grid_sample(image, theta, (3, 4), "bilinear", "reflection")
    return samples.detach(), *torch.autograd.grad(samples.float().square().sum(), (image, theta))

for dtype in (torch.float32, torch.bfloat16):
    plain = found(dtype)
    with quick_interpreter():
        quick = found(dtype)
    assert all(torch.equal(a, b) for a, b in zip(plain, quick)), dtype
"""


@pytest.mark.skipif(ON_GPU, reason="tests run on the GPU that is there, not in the interpreter")
def test_results_are_those_of_tritons_own():
    here = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)])}
    subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], env=environment, check=True)
