"""The notebook of the site runs as it stands, and shows what its text says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

NOTEBOOK = ROOT / "docs/guides/notebook.ipynb"
nbformat: Any = pytest.importorskip("nbformat", reason="of the extra dev: pip install nbclient ipykernel")
nbclient: Any = pytest.importorskip("nbclient", reason="of the extra dev: pip install nbclient ipykernel")


def shown(notebook: Any, kind: str) -> list[str]:
    """All outputs of a kind, in order."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


def printed(notebook: Any) -> list[str]:
    """The lines that its cells printed, without those of the press that draws."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and "%%capture" not in cell.source]
    texts = [output["text"] for cell in cells for output in cell.outputs if output.output_type == "stream"]
    return [line for line in "".join(texts).splitlines() if not line.startswith("random")]


def test_the_notebook_runs_and_shows_what_its_text_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    printed_before, maps_before = printed(notebook), len(shown(notebook, "text/html"))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pages = shown(notebook, "text/html")
    maps = [page for page in pages if "kept-map" in page]
    assert len(maps) == 2 and "<b>snapkv, compression_ratio=0.75</b> kept <b>24.9 %</b>" in maps[0]
    assert printed(notebook) == printed_before, "the outputs that the site shows are of an earlier version: run it anew"
    assert len(pages) == maps_before
    assert len(shown(notebook, "image/png")) == 1 and "kvpress_recall.acc" in pages[-1]
