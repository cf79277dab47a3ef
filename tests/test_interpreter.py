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

def samples(image, parameters, function, *options):
    samples = function(image, parameters, *options)
    return samples.detach(), *torch.autograd.grad(samples.float().square().sum(), (image, parameters))

def found(function, parameters, dtype, *options):
    torch.manual_seed(0)
    image = torch.randn(1, 2, 5, 6, dtype=dtype, requires_grad=True)
    parameters = (parameters + 0.3 * torch.randn(parameters.shape)).to(torch.float32).requires_grad_()
    return samples(image, parameters, function, *options)

matrix, homography, flow = torch.eye(2, 3)[None], torch.eye(3)[None], torch.zeros(1, 2, 3, 4)
cases = [
    (stn.affine_grid_sample, matrix, torch.float32, (3, 4), "bicubic", "reflection"),
    (stn.affine_grid_sample, matrix, torch.bfloat16, (3, 4), "bilinear", "zeros", True),
    (stn.projective_grid_sample, homography, torch.float64, (3, 4), "bilinear", "circular"),
    (stn.flow_grid_sample, flow, torch.float16, "bilinear", "border"),
]
for case in cases:
    plain = found(*case)
    for checks in (True, False) if case is cases[0] else (False,):
        with quick_interpreter(checks):
            quick = found(*case)
        assert all(torch.equal(a, b) for a, b in zip(plain, quick)), (case, checks)
"""


@pytest.mark.skipif(ON_GPU, reason="tests run on the GPU that is there, not in the interpreter")
def test_results_are_those_of_tritons_own():
    here = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)])}
    subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], env=environment, check=True)
