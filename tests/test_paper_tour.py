"""The tour: the committed notebook is the script's, and every cell of it runs."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from matplotlib.pyplot import figure

from examples import notebook
from examples.notebook import Cell, cells_of

EXAMPLES = Path(notebook.__file__).parent
pytestmark = pytest.mark.usefixtures("torch_on_one_thread")


@pytest.fixture(scope="module")
def cells():
    return cells_of((EXAMPLES / "tour.py").read_text())


@pytest.fixture(scope="module")
def committed():
    return json.loads((EXAMPLES / "tour.ipynb").read_text())


def test_committed_notebook_is_the_scripts(cells, committed):
    theirs = [Cell(cell["cell_type"] == "markdown", "".join(cell["source"])) for cell in committed["cells"]]
    assert theirs == cells


def test_outputs_are_small(committed):
    assert (EXAMPLES / "tour.ipynb").stat().st_size < 200 * 1024
    for cell in committed["cells"]:
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error"
            assert len(json.dumps(output)) < 50 * 1024


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PyTorch's own, in export
def test_every_cell_runs(cells, committed, tmp_path, monkeypatch):
    """As from the command line; prints and pictures are of the same kinds as the committed ones, and what is
    said to hold does."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    path = tmp_path / "tour.ipynb"
    assert notebook.main([str(EXAMPLES / "tour.py"), "--output", str(path)]) == 0
    made = json.loads(path.read_text())

    def kinds(of):
        return [[out.get("name", "picture") for out in cell.get("outputs", [])] for cell in of["cells"]]

    assert kinds(made) == kinds(committed)
    printed = [
        "".join(output["text"])
        for cell in made["cells"]
        for output in cell.get("outputs", [])
        if "text" in output
    ]
    assert sum("True" in text for text in printed) >= 6
    assert not any("False" in text for text in printed)
    (right,) = [text for text in printed if "told right" in text]
    assert int(right.split()[0]) > 75
    assert torch.is_grad_enabled()


def test_five_lines_change(cells):
    """Each line of the difference that the tour shows is one of the nets' cells."""
    code = [cell.source for cell in cells if not cell.text]
    (before,) = [source for source in code if "class Net(" in source]
    (after,) = [source for source in code if "class Fused(" in source]
    (shown,) = [cell.source for cell in cells if cell.text and "```diff" in cell.source]
    lines = shown.partition("```diff\n")[2].partition("```")[0].splitlines()
    changed = [line for line in lines if line[:1] in "+-" and line]
    assert len(changed) == 5
    imports = code[0]
    for line in changed:
        where = imports if "import" in line else before if line.startswith("-") else after
        assert line[1:] in where.splitlines()
    (kept,) = [line[1:] for line in lines if line.startswith(" ")]
    assert kept in before.splitlines()
    assert kept in after.splitlines()


def test_cells():
    script = "# before\n# %% [markdown]\n# # Title\n#\n# Words.\n\n# %%\nx = 1\n\n# %%\nprint(x)\n"
    cells = cells_of(script)
    figure()  # left open by somebody: no cell's
    assert cells == [Cell(True, "# Title\n\nWords."), Cell(False, "x = 1"), Cell(False, "print(x)")]
    outputs = notebook.run(cells)
    assert outputs == [[], [], [{"name": "stdout", "output_type": "stream", "text": ["1\n"]}]]
    made = notebook.notebook_of(cells, outputs)["cells"]
    assert [cell.get("execution_count") for cell in made] == [None, 1, 2]
    with pytest.raises(ValueError, match=r"must begin with '# %%'.*got '# %% raw'"):
        cells_of("# %% raw\n")
    with pytest.raises(ValueError, match="of comments alone, got 'y = 2'"):
        cells_of("# %% [markdown]\n# x\ny = 2\n")
