"""The package as it is shipped: what is in it, that each way to install it works, and who may import whom."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# One worker builds the package once for all of these tests.
pytestmark = pytest.mark.xdist_group("package")


def run(*command, cwd, **environment):
    """Runs this interpreter with the arguments `command`; returns what it printed."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    # -W error and the like, meant for the tests, do not concern pip and setuptools.
    env.pop("PYTHONWARNINGS", None)
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=env | {name: str(value) for name, value in environment.items()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout.strip()


# --- builds and installs --------------------------------------------------------------------------


def can_build():
    try:  # not find_spec("pip"): from there on setuptools can no longer be imported
        metadata.version("pip")
        return int(metadata.version("setuptools").split(".")[0]) >= 77
    except metadata.PackageNotFoundError:
        return False


needs_build = pytest.mark.skipif(not can_build(), reason="needs pip and setuptools>=77")
PIP_INSTALL = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]


def build(kind, source, out):
    """Builds the `kind` ("sdist" or "wheel") of `source` into the directory `out`; returns the file."""
    out.mkdir()
    hook = f"from setuptools.build_meta import build_{kind} as build; print(build({str(out)!r}))"
    return out / run("-c", hook, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, link and all: builds leave nothing behind and find nothing stale."""
    copy = tmp_path_factory.mktemp("package") / "checkout"
    copy.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
    for name in ("stn_triton", "kernels", "tests", "bench", "examples", "docs", ".ci"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, copy)
    for name in ("LICENSE", "Makefile"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout):
    return build("sdist", checkout, checkout.parent / "sdist")


@pytest.fixture(scope="module")
def wheel(checkout):
    return build("wheel", checkout, checkout.parent / "wheel")


def modules_of(package):
    """The files of the package's modules and of its packages' own, relative to its directory."""
    root = ROOT / package
    return {str(path.relative_to(root)) for path in root.rglob("*.py")}


@needs_build
def test_sdist_has_every_source_once(sdist):
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert len(names) == len(set(names))
    expected = {f"{package}/{name}" for package in ("stn_triton", "kernels") for name in modules_of(package)}
    expected |= {"kernels/README.md", "stn_triton/py.typed", "pyproject.toml", "README.md", "LICENSE"}
    expected |= {"CHANGELOG.md", "Makefile", ".ci/run", ".ci/venv", ".ci/versions", "tests/test_package.py"}
    assert not expected - set(names)
    assert not [name for name in names if name.startswith("stn_triton/kernels") or name.endswith(".pyc")]


@needs_build
def test_wheel_has_kernels_inside_the_package_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    modules = {f"stn_triton/{name}" for name in modules_of("stn_triton")}
    modules |= {f"stn_triton/kernels/{name}" for name in modules_of("kernels")}
    info = [name for name in names if ".dist-info/" in name]
    assert sorted(set(names) - set(info)) == sorted(modules | {"stn_triton/py.typed"})
    assert len(names) == len(set(names))
    assert any(name.endswith("LICENSE") for name in info)


# Run with -S, so that an editable install in the tests' own environment is not found; the arguments name the
# paths of everything else there. Imports every module of the kernels: the package alone loads none of them.
IMPORT_KERNELS = """
import importlib.util, pkgutil, site, sys
sys.path.insert(0, sys.argv[1])
site.addsitedir(sys.argv[1])
sys.path += sys.argv[2:]
import stn_triton, stn_triton.kernels
from importlib.machinery import PathFinder
assert PathFinder.find_spec("kernels", [sys.argv[1]]) is None, "a top-level package `kernels` was installed"
if importlib.util.find_spec("triton"):
    for module in pkgutil.walk_packages(stn_triton.kernels.__path__, "stn_triton.kernels."):
        importlib.import_module(module.name)
print(stn_triton.__version__, stn_triton.__file__, stn_triton.kernels.__file__, sep="\\n")
"""


def import_from(directory, cwd):
    """Imports the package from a site directory: its version, its directory and that of the kernels."""
    others = [path for path in sys.path if path and Path(path).resolve() not in (ROOT, ROOT / "tests")]
    output = run("-S", "-c", IMPORT_KERNELS, directory, *others, cwd=cwd)
    version, package, kernels = output.splitlines()[-3:]
    return version, Path(package).resolve().parent, Path(kernels).resolve().parent


@needs_build
@pytest.mark.parametrize("source", ["wheel", "sdist", "checkout"])
def test_installed_package_imports(source, request, tmp_path):
    site = tmp_path / "site"
    run(*PIP_INSTALL, "--target", site, request.getfixturevalue(source), cwd=tmp_path)
    version, package, kernels = import_from(site, cwd=tmp_path)
    assert package == (site / "stn_triton").resolve()
    assert kernels == package / "kernels"
    assert not (site / "kernels").exists()
    assert next(site.glob("stn_triton-*.dist-info")).name == f"stn_triton-{version}.dist-info"


@needs_build
def test_editable_install_imports(checkout, tmp_path):
    # A prefix of its own: an editable install in the environment of the tests stays as it is.
    prefix = tmp_path / "prefix"
    run(*PIP_INSTALL, "--ignore-installed", "--prefix", prefix, "--editable", checkout, cwd=tmp_path)
    (site,) = {path.parent for path in prefix.rglob("__editable__*.pth")}
    _, package, kernels = import_from(site, cwd=tmp_path)
    assert package == (checkout / "stn_triton").resolve()
    assert kernels == (checkout / "kernels").resolve()


def test_imports_in_place():
    report = "import stn_triton.kernels as k, stn_triton as s; print(s.__file__, k.__file__, sep='\\n')"
    package, kernels = run("-c", report, cwd=ROOT).splitlines()[-2:]
    assert Path(package).resolve().parent == ROOT / "stn_triton"
    assert Path(kernels).resolve().parent == ROOT / "kernels"


# --- imports --------------------------------------------------------------------------------------

# Importing PyTorch starts threads and loads modules of its own; what counts is what our import adds to that.
IMPORT_EFFECTS = """
import os, sys, threading
import torch, torch.nn.functional

def tasks():
    '''Threads and child processes of this process, from Linux's /proc if there is one.'''
    if not os.path.isdir("/proc/self/task"):
        return threading.active_count()
    threads = os.listdir("/proc/self/task")
    return len(threads), [open(f"/proc/self/task/{thread}/children").read()
                          for thread in threads if os.path.exists(f"/proc/self/task/{thread}/children")]

modules, before = set(sys.modules), tasks()
import stn_triton
assert tasks() == before, f"import started something: {before} -> {tasks()}"
assert not torch.cuda.is_initialized(), "import initialised CUDA"
print(*sorted(set(sys.modules) - modules))
"""


def test_import_starts_nothing(tmp_path):
    """`import stn_triton` loads no Triton, initialises no CUDA and starts neither a thread nor a process."""
    loaded = run("-c", IMPORT_EFFECTS, cwd=tmp_path, PYTHONPATH=ROOT).split()
    assert "stn_triton" in loaded
    banned = (
        "triton",
        "matplotlib",
        "filelock",
        "skimage",
        "kornia",
        "torch.distributed.tensor",
        "stn_triton.kernels.sample",
    )
    assert not [name for name in loaded if name.startswith(banned)]


# A layer (a module or a folder of stn_triton) -> the layers it may import, at the top or inside a function.
# Each line names itself and lower layers only, so there are no cycles. `kernels.modes` is free of Triton.
ANY = None
ALLOWED_IMPORTS = {
    "kernels": {"kernels"},
    "versions": set(),
    "backend": {"kernels.host.blocks", "versions"},
    "calls": set(),
    "hints": {"kernels.modes", "kernels.host.dtypes"},
    "checks": {"calls", "hints", "kernels.modes", "kernels.host.dtypes"},
    "distributed": {"calls", "kernels.modes"},
    "transforms": {"transforms", "calls", "checks", "distributed", "hints"},
    "reference": {"reference", "calls", "kernels.modes", "kernels.host.dtypes", "versions"},
    "ops": {"kernels", "backend", "calls", "reference", "transforms"},
    "autograd": {
        "autograd",
        "ops",
        "backend",
        "calls",
        "distributed",
        "export",
        "reference",
        "transforms",
        "kernels.modes",
    },
    "functional": {
        "autograd",
        "backend",
        "calls",
        "distributed",
        "transforms",
        "checks",
        "hints",
        "kernels.modes",
        "kernels.host.dtypes",
    },
    "export": {"ops", "reference", "transforms", "kernels.modes"},
    "nn": {"functional", "transforms", "calls", "checks", "backend", "kernels.host.dtypes"},
    "switch": {"kernels.host.blocks"},
    "patch": {"kernels", "backend", "calls", "checks", "switch", "versions"},
    "kornia_patch": {
        "kornia_patch",
        "functional",
        "transforms",
        "backend",
        "calls",
        "checks",
        "switch",
        "versions",
    },
    "viz": {"functional", "transforms", "checks", "reference"},
    "__init__": ANY,
    "__main__": ANY,
}
# These are plain PyTorch: they run where Triton is not installed.
PURE = {
    "versions",
    "calls",
    "checks",
    "distributed",
    "transforms",
    "reference",
    "kernels.modes",
    "kernels.host.dtypes",
}


def imports_of(path, package):
    """The absolute dotted names that the module at `path`, in the dotted `package`, imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            # `from package import module` names a module only in the second half.
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def sources():
    """(layer, dotted package, file) of every module of the package."""
    for path in sorted((ROOT / "stn_triton").glob("*.py")):
        yield path.stem, "stn_triton", path
    for directory in sorted((ROOT / "stn_triton").iterdir()):
        if directory.is_dir() and directory.name != "__pycache__":
            for path in sorted(directory.rglob("*.py")):
                relative = path.relative_to(ROOT / "stn_triton").parent
                yield directory.name, ".".join(["stn_triton", *relative.parts]), path


@pytest.mark.parametrize(
    ("layer", "package", "path"),
    [pytest.param(*source, id=f"{source[1]}.{source[2].stem}") for source in sources()],
)
def test_imports_run_one_way(layer, package, path):
    def within(name, layers):
        return any(f"{name}.".startswith(f"stn_triton.{allowed}.") for allowed in layers)

    assert layer in ALLOWED_IMPORTS, f"say in ALLOWED_IMPORTS what {layer} may import"
    allowed = ALLOWED_IMPORTS[layer]
    for name in imports_of(path, package):
        top = name.partition(".")[0]
        assert top != "kernels", f"{path.name} imports the top-level `kernels`; it is stn_triton.kernels"
        if top == "stn_triton" and allowed is not ANY and name != "stn_triton.__version__":
            assert within(name, allowed), f"{layer} imports {name}, and may import {sorted(allowed)}"
        if within(f"{package}.{path.stem}", PURE):
            known = top in ("stn_triton", "torch") or top in sys.stdlib_module_names
            assert known, f"{package}.{path.stem} imports {name}, and may import only torch"


def test_files_stay_short():
    """600 lines at most: a longer one does more than one thing."""
    files = [path for _, _, path in sources()]
    assert {ROOT / "kernels" / "sample.py", ROOT / "stn_triton" / "ops.py"} <= {
        path.resolve() for path in files
    }
    assert not [path.name for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 600]


DEVICE = ROOT / "kernels" / "device"


@pytest.mark.parametrize("path", sorted(DEVICE.glob("*.py")), ids=lambda path: path.stem)
def test_device_code_knows_triton_alone(path):
    """No torch, no launchers: kernels import it, never the other way round."""
    allowed = tuple(f"stn_triton.kernels.{name}." for name in ("device", "modes", "spec"))
    for name in imports_of(path, "stn_triton.kernels.device"):
        top = name.partition(".")[0]
        known = top == "triton" or top in sys.stdlib_module_names or f"{name}.".startswith(allowed)
        assert known, f"{path.name} imports {name}"


def test_tables_are_looked_for_where_they_are_shipped():
    """``make tune`` writes there too."""
    from stn_triton.kernels.host import tables

    assert tables.SHIPPED.resolve() == ROOT / "kernels" / "tuned"


def test_device_functions_take_few_arguments():
    """8 at most, the specification and flags included; kernels, which bundle their arguments, any number."""
    checked = 0
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            if "triton.jit" in map(ast.unparse, node.decorator_list):  # kernels' decorators are calls
                arguments = [argument.arg for argument in node.args.args]
                assert len(arguments) <= 8, f"{path.name}: {node.name}({', '.join(arguments)})"
                checked += 1
    assert checked > 100
