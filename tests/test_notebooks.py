"""Notebooks run from top to bottom without a GPU, are committed with their outputs, and match their source."""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_every_notebook_source_has_its_executed_notebook() -> None:
    assert [p.stem for p in NOTEBOOKS] == [p.stem for p in sorted(FOLDER.glob("*.py"))]
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_committed_notebook_shows_what_its_source_says(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    source = jupytext.read(path.with_suffix(".py"))
    assert [c.source for c in notebook.cells] == [c.source for c in source.cells]
    assert any("image/png" in output.get("data", {}) for c in notebook.cells for output in c.get("outputs", []))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_executes_from_top_to_bottom(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(FOLDER)}}).execute()
