"""Makes a notebook of a script and runs it: ``python -m examples.notebook examples/tour.py``.

Scripts are in the percent format, which editors know: ``# %%`` begins a cell of code, ``# %% [markdown]`` one
of text in comments. The notebook (nbformat 4.5) lies beside the script, with what the cells print and draw.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from examples.files import write_text

DPI = 60  # of figures: outputs are kept small
TEXT = " [markdown]"


class Cell(NamedTuple):
    text: bool  # Markdown, else code
    source: str


def cells_of(script: str) -> list[Cell]:
    """A script's cells. What stands before the first mark is none.

    Raises:
        ValueError: a mark has words behind it other than "[markdown]", or a cell of text holds code.
    """
    cells = []
    for part in ("\n" + script).split("\n# %%")[1:]:
        kind, _, body = part.partition("\n")
        if kind.rstrip() not in ("", TEXT.rstrip()):
            raise ValueError(f"a cell must begin with '# %%' or '# %%{TEXT}', got '# %%{kind}'")
        lines = body.strip().split("\n")
        if kind:
            if wrong := [line for line in lines if not line.startswith("#")]:
                raise ValueError(f"a cell of text must be of comments alone, got {wrong[0]!r}")
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        cells.append(Cell(bool(kind), "\n".join(lines)))
    return cells


def run(cells: Sequence[Cell]) -> list[list[dict[str, Any]]]:
    """Of each cell its outputs, in the notebook's format. Cells run one after the other in one namespace."""
    from matplotlib import pyplot

    namespace: dict[str, Any] = {"__name__": "__main__"}
    found = []
    pyplot.close("all")  # the first cell's figures are its own, not those that somebody left open
    with pyplot.rc_context({"figure.dpi": DPI}):
        for index, cell in enumerate(cells):
            outputs: list[dict[str, Any]] = []
            if not cell.text:
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile(cell.source, f"cell {index}", "exec"), namespace)
                if printed.getvalue():
                    said = _lines(printed.getvalue())
                    outputs.append({"name": "stdout", "output_type": "stream", "text": said})
                outputs += map(_picture, pyplot.get_fignums())
                pyplot.close("all")
            found.append(outputs)
    return found


def _picture(number: int) -> dict[str, Any]:
    from matplotlib import pyplot

    drawn = io.BytesIO()
    pyplot.figure(number).savefig(drawn, format="jpeg", pil_kwargs={"quality": 85})
    image = base64.b64encode(drawn.getvalue()).decode()
    data = {"image/jpeg": image, "text/plain": ["<Figure>"]}
    return {"data": data, "metadata": {}, "output_type": "display_data"}


def notebook_of(cells: Sequence[Cell], outputs: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    made: list[dict[str, Any]] = []
    for index, (cell, its) in enumerate(zip(cells, outputs)):
        own = {"id": f"cell-{index}", "metadata": {}, "source": _lines(cell.source)}
        if cell.text:
            made.append({"cell_type": "markdown", **own})
        else:
            count = 1 + sum(not one.text for one in cells[:index])
            made.append({"cell_type": "code", "execution_count": count, "outputs": its, **own})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.notebook", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("script", type=Path, help="in the percent format")
    parser.add_argument("--output", type=Path, help="default: beside the script")
    options = parser.parse_args(arguments)
    cells = cells_of(options.script.read_text())
    output = options.output or options.script.with_suffix(".ipynb")
    write_text(output, json.dumps(notebook_of(cells, run(cells)), indent=1, ensure_ascii=False) + "\n")
    print(f"{output}: {len(cells)} cells, {output.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
