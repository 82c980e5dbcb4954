"""The notebooks in examples/notebooks: run from the top, they print what they show."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(notebook: Path) -> list[dict[str, Any]]:
    """The code cells, in order."""
    content = json.loads(notebook.read_text())
    assert content["nbformat"] == 4
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_from_the_top(notebook: Path) -> None:
    code = cells(notebook)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert f"(notebooks/{notebook.name})" in (FOLDER.parent / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_it_shows(notebook: Path) -> None:
    """Cells are plain Python, so no kernel is needed: one after the other, in one namespace."""
    pytest.importorskip("matplotlib")
    space: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(notebook):
        name = f"cell {cell['execution_count']}"
        code = compile("".join(cell["source"]), name, "exec", dont_inherit=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, space)
        shown = [out for out in cell["outputs"] if out["output_type"] == "stream"]
        assert all(out["name"] == "stdout" for out in shown)
        expected = "".join(line for out in shown for line in out["text"])
        assert printed.getvalue() == expected, f"{name}: run the notebook again"
