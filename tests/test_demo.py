"""The demo: runs as a user runs it, with no display, and leaves a table and a figure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

pytestmark = pytest.mark.xdist_group("demo")  # it runs once

ROOT = Path(__file__).resolve().parent.parent
CASES = (
    "affine, four crops",
    "affine, bicubic",
    "affine, nearest",
    "affine, float16 image",
    "projective, channels last",
    "thin-plate spline",
    "flow ",
)


def run_demo(*arguments, **environment):
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND", "PYTHONWARNINGS", "TRITON_INTERPRET")
    env = {name: value for name, value in os.environ.items() if name not in hidden} | environment
    command = [sys.executable, "-m", "examples.demo", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What the demo printed, and its figure."""
    figure = tmp_path_factory.mktemp("demo") / "new" / "figure.png"
    result = run_demo("--size", 24, "--steps", 10, "--output", figure)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, figure


def test_table_has_every_case_on_every_backend(demo):
    printed, _ = demo
    for case in CASES:
        assert sum(case in line for line in printed.splitlines()) == 1, printed
    assert "FAILED" not in printed
    if "backend: interpreter" in printed:
        for name in ("interpreter  ", "torch  "):
            assert sum(name in line for line in printed.splitlines()) == len(CASES), printed


def test_what_was_not_done_is_said(demo):
    import torch

    printed, _ = demo
    without_gpu = not torch.cuda.is_available() and not torch.xpu.is_available()
    assert ("no GPU" in printed) == without_gpu, printed
    assert ("forward, ms" in printed) == ("backend: triton" in printed), printed


def test_figure_is_drawn(demo):
    from matplotlib import image

    pixels = image.imread(demo[1])[..., :3]
    assert pixels.shape == (1198, 1600, 3)
    # Every panel has something in it: no large part of the figure is of one colour.
    for row in range(3):
        for column in range(5):
            top, left = 54 + 314 * row, 31 + 314 * column
            assert pixels[top : top + 306, left : left + 306].std() > 0.04, (row, column)
    digits, eyes = pixels[1025:1160, 31:960], pixels[1025:1160, 975:1590]
    assert digits.std() > 0.1
    assert eyes.std() > 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size", "2"], "--size must be 16 or more, got 2"),
        (["--size", "x"], "invalid int value"),
        (["--steps", "0"], "--steps must be 1 or more, got 0"),
    ],
    ids=["too-small", "no-number", "no-steps"],
)
def test_bad_number_is_refused(capsys, arguments, message):
    from examples.demo import main

    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_package_is_named(tmp_path):
    blocker = "import importlib.util as u\nfind = u.find_spec\n"
    blocker += "u.find_spec = lambda name, *rest: None if name == 'skimage' else find(name, *rest)\n"
    (tmp_path / "sitecustomize.py").write_text(blocker)
    result = run_demo(PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert "this needs scikit-image: pip install stn_triton[demo]" in result.stderr
