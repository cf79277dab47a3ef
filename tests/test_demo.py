"""The demo: runs as a user runs it, with no display, and leaves a table and a figure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")

ROOT = Path(__file__).resolve().parent.parent
CASES = ("bilinear, four crops", "bilinear ", "bicubic", "nearest", "bilinear, channels last", "float16")


def run_demo(*arguments, **environment):
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND", "PYTHONWARNINGS", "TRITON_INTERPRET")
    env = {name: value for name, value in os.environ.items() if name not in hidden} | environment
    command = [sys.executable, "-m", "examples.demo", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What the demo printed, and its figure."""
    figure = tmp_path_factory.mktemp("demo") / "new" / "figure.png"
    result = run_demo("--size", 48, "--output", figure)
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
    height, width, _ = pixels.shape
    assert width == 1600
    # every panel has something in it: no large part of the figure is of one colour
    for rows in (slice(40, height // 3), slice(height // 3, 2 * height // 3), slice(2 * height // 3, -40)):
        for column in range(4):
            assert pixels[rows, column * width // 4 : (column + 1) * width // 4].std() > 0.05


@pytest.mark.parametrize(
    "arguments, message",
    [(["--size", "2"], "--size must be 16 or more, got 2"), (["--size", "x"], "invalid int value")],
    ids=["too-small", "no-number"],
)
def test_bad_size_is_refused(arguments, message):
    result = run_demo(*arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_missing_package_is_named(tmp_path):
    blocker = "import importlib.util as u\nfind = u.find_spec\n"
    blocker += "u.find_spec = lambda name, *rest: None if name == 'skimage' else find(name, *rest)\n"
    (tmp_path / "sitecustomize.py").write_text(blocker)
    result = run_demo(PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert "this needs scikit-image: pip install stn_triton[demo]" in result.stderr
