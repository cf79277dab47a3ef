"""The documentation: its code runs as it stands, every public name is in it, links lead somewhere."""

import doctest
import re
import types
from pathlib import Path

import pytest
import torch

import stn_triton as stn

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
pytestmark = [
    pytest.mark.usefixtures("torch_on_one_thread"),
    pytest.mark.xdist_group("docs"),
    # as readers see them, once; what PyTorch says of its own is not ours
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks_of(page):
    """(line, code) of each block that runs: those fenced by ```python. A {code-block} is not run."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, block.start(1)), block[1]


def readme_names():
    """What the README's code takes for granted."""
    return {
        "homography": torch.eye(3).repeat(8, 1, 1),
        "points": stn.transforms.identity(8, "tps"),
        "flow": torch.zeros(8, 2, 480, 640),
        "digits": torch.rand(8, 1, 28, 28),
    }


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks_of(page))], ids=name_of)
def test_code_runs(page, tmp_path, monkeypatch):
    """A page's blocks, one after the other, where a photograph and no display are. Nothing asks for a GPU."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib").use("Agg")
    if "onnx.export" in page.read_text(encoding="utf-8"):
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
    image.linear_gradient("L").resize((320, 240)).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = readme_names() if page.name == "README.md" else {}
    for line, code in blocks_of(page):
        code = code.replace(', device="cuda"', "")
        # so that tracebacks have the page's lines
        exec(compile("\n" * line + code, str(page), "exec"), names)


def test_scipy_recipe_is_scipy():
    """The volumes of docs/how/pixels.md, by SciPy's own function."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="compares with SciPy, which is no dependency")
    blocks = [code for _, code in blocks_of(DOCS / "how" / "pixels.md")]
    (begin,) = (k for k, code in enumerate(blocks) if code.startswith("volume ="))
    names = {}
    torch.manual_seed(0)
    for code in (blocks[0], *blocks[begin : begin + 2]):
        exec(code, names)
    volume, matrix, offset = (names[name].double().numpy() for name in ("volume", "matrix", "offset"))
    for ours, mode in (("by_taps", "grid-constant"), ("by_place", "constant")):
        theirs = ndimage.affine_transform(
            volume[0, 0], matrix, offset, output_shape=names["out_size"], order=1, mode=mode
        )
        found = names[ours][0, 0].double()
        torch.testing.assert_close(found, torch.from_numpy(theirs), rtol=0, atol=1e-5)


def public_objects():
    """(dotted name, object) of what ``__all__`` names, in the package and in its public modules."""
    for name in stn.__all__:
        value = getattr(stn, name)
        if isinstance(value, types.ModuleType):
            yield from ((f"stn_triton.{name}.{inner}", getattr(value, inner)) for inner in value.__all__)
        elif name != "__version__":
            yield f"stn_triton.{name}", value


def test_every_public_name_is_in_the_reference():
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    named = re.findall(r"^\.\. auto\w+:: (\S+)$", pages, re.MULTILINE)
    assert len(named) == len(set(named))
    assert set(named) == {name for name, _ in public_objects()}


@pytest.mark.parametrize("name, value", [(n, v) for n, v in public_objects() if callable(v)])
def test_docstrings_have_examples_that_run(name, value, tmp_path, monkeypatch):
    """With ``torch`` and ``stn`` at hand."""
    if name in ("stn_triton.viz.GridLines", "stn_triton.viz.Kind"):
        return
    if name.startswith("stn_triton.viz"):
        pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    (test,) = doctest.DocTestFinder(recurse=False).find(value, name, globs={"torch": torch, "stn": stn})
    for ending, needed in (("onnx_translations", "onnxscript"), ("patch_kornia", "kornia")):
        if name.endswith(ending):
            pytest.importorskip(needed)
    assert test.examples, f"{name} has no example"
    said = []
    failures, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert not failures, "".join(said)


def test_help_shows_the_arguments():
    """``help(SpatialTransformer.__init__)``, where ``nn.Module``'s would say nothing of use."""
    documentation = stn.nn.SpatialTransformer.__init__.__doc__
    assert all(f"{name}:" in documentation for name in ("localisation", "regions", "features", "lattice"))


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=name_of)
def test_code_fits_the_page(page):
    """Wider lines are cut on a screen of 1280 pixels."""
    text = page.read_text(encoding="utf-8")
    fenced = r"^```(?:python|sh|\{code-block\} python)\n(.*?)^```$"
    blocks = re.findall(fenced, text, re.MULTILINE | re.DOTALL)
    assert not [line for block in blocks for line in block.splitlines() if len(line) > 88]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_files_lead_somewhere(page):
    """As GitHub follows them; ``make docs`` checks those of the site, and its anchors."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (page.parent / target).exists(), target
