"""PyTorch and Triton that are too old or missing are named at once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from common import number_of

from stn_triton import backend, versions

ROOT = Path(__file__).resolve().parent.parent


def outcome(code, *, triton=None, tmp_path=None, module=False, **environment):
    """What a Python prints, or the last line of its error. ``triton``: the source of the module there."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    if triton is not None:
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton" / "__init__.py").write_text(triton)
        env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m" if module else "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    said = result.stderr.strip()  # nothing: a report that fails, as nothing can compute
    return result.stdout if result.returncode == 0 or not said else said.splitlines()[-1]


MISSING = "raise ModuleNotFoundError(\"No module named 'triton'\")"
WARP = (
    "import torch, stn_triton as stn; stn.affine_grid_sample(torch.ones(1, 1, 2, 2), torch.eye(2, 3)[None])"
)


@pytest.mark.parametrize("found", ["2.10.1+cu128", "1.13.1"])
def test_an_older_pytorch_is_refused_at_import(found):
    said = outcome(f"import torch; torch.__version__ = {found!r}; import stn_triton")
    assert said == f"ImportError: stn_triton needs PyTorch 2.11 or later, and finds PyTorch {found}"


def test_an_older_triton_is_refused_at_import(tmp_path):
    """By its source: it is not imported."""
    source = "__version__ = '3.5.1'\nraise SystemExit('imported')"
    said = outcome("import stn_triton", triton=source, tmp_path=tmp_path)
    assert said == "ImportError: stn_triton needs Triton 3.6 or later, and finds Triton 3.5.1"


def test_an_older_triton_that_is_loaded_is_refused():
    code = "import sys, types; sys.modules['triton'] = types.ModuleType('triton'); "
    code += "sys.modules['triton'].__version__ = '3.4.0'; import stn_triton.versions"
    assert outcome(code) == "ImportError: stn_triton needs Triton 3.6 or later, and finds Triton 3.4.0"


@pytest.mark.parametrize("found", ["3.6.0", "3.10.0+git1234", "4.0", "unknown", "", None])
def test_what_is_new_enough_or_no_version_passes(found):
    versions.refuse_older("Triton", found, versions.TRITON)


def test_the_installed_version_is_told(monkeypatch):
    triton = pytest.importorskip("triton")
    assert versions.triton_version() == triton.__version__
    monkeypatch.delitem(sys.modules, "triton")
    assert versions.triton_version() == triton.__version__


def test_the_oldest_versions_are_those_of_the_requirements():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name, oldest in (("torch", versions.TORCH), ("triton", versions.TRITON)):
        needed = re.search(rf'"{name}>=(\d+)\.(\d+)', text)
        assert tuple(map(int, needed.groups())) == oldest


def test_the_interpreter_without_triton(tmp_path):
    """What is computed says that Triton is missing, and so does the report."""
    said = outcome(WARP, triton=MISSING, tmp_path=tmp_path, TRITON_INTERPRET="1")
    assert said.startswith("ImportError: TRITON_INTERPRET is set, but Triton is missing (No module named")
    assert "install it (pip install triton), or unset that" in said
    report = outcome("stn_triton", module=True, PYTHONPATH=str(tmp_path), TRITON_INTERPRET="1")
    assert re.search(r"^cpu .*: nothing - TRITON_INTERPRET is set, but Triton is missing", report, re.M)
    assert "interpreted" not in report
    report = outcome("stn_triton", module=True, PYTHONPATH=str(tmp_path))
    assert re.search(r"^cpu .*: PyTorch's operators", report, re.M)


def test_triton_whose_import_fails_otherwise(tmp_path):
    """The report tells it in a line."""
    source = "raise RuntimeError('libtriton.so\\nis damaged')"
    report = outcome("stn_triton", module=True, triton=source, tmp_path=tmp_path, TRITON_INTERPRET="1")
    wrong = r"Triton is missing \(importing it raises RuntimeError: libtriton\.so is damaged\): install it"
    assert re.search(rf"^cpu .*: nothing - TRITON_INTERPRET is set, but {wrong}", report, re.M)


def test_a_folder_without_code_is_no_triton(tmp_path, monkeypatch):
    """Python takes it for a package."""
    (tmp_path / "triton").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    assert versions.triton_version() is None
    with pytest.raises(
        ImportError, match=r"backend\.use\('triton'\), but Triton is missing .* a folder without"
    ):
        backend.use("triton")
    assert versions.triton_version() is None, "nor once it was imported"
    assert backend._of_accelerator("cuda").advice == backend._advice(ImportError())


def test_a_backend_without_triton_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("triton", "interpreter"):
        with pytest.raises(ImportError, match=rf"backend\.use\('{name}'\), but Triton is missing"):
            backend.use(name)
    assert versions.triton_version() is None
    with backend.use("torch"):
        assert backend.select("cpu").name == "torch"


@pytest.mark.parametrize("name", ["tritn", "", None, 3])
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match="name must be one of 'triton', 'interpreter', 'torch', got"):
        backend.use(name)


@pytest.mark.parametrize("value", ["many", "1.5", "-3"])
def test_nonsense_in_the_tests_own_variables_names_them(monkeypatch, value):
    monkeypatch.setenv("STN_FUZZ", value)
    with pytest.raises(ValueError, match=rf"STN_FUZZ must be a whole number, 0 or more, got '{value}'"):
        number_of("STN_FUZZ", 3)
    for value, number in (("12", 12), ("", 3)):
        monkeypatch.setenv("STN_FUZZ", value)
        assert number_of("STN_FUZZ", 3) == number
