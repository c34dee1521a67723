"""The table of a machine: a row per workload with both other sides, a heading that says what was measured when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

from scripts.benchmarks import document
from scripts.benchmarks.comparisons import COMPARISONS
from scripts.benchmarks.performance_table import BEGIN, END, WORKLOADS, main, requests_table
from scripts.machine import machine


def estimated(median: float) -> dict[str, float]:
    return {"median": median, "low": median - 0.5, "high": median + 0.5}


def row(model: str, workload: str, press: str, against: str, ours: float, ratio: float) -> dict[str, Any]:
    return {
        **{"model": model, "workload": workload, "press": press, "against": against},
        "seconds": estimated(ours),
        "their_seconds": estimated(ours * ratio),
        "times_as_fast": estimated(ratio),
        "commit": "abc123",
        "date": "2026-11-28",
    }


ROWS = [
    row("builtin", "choice-800", "snapkv", "stock", 2.0, 4.0),
    row("builtin", "choice-800", "snapkv", "pipeline", 1.5, 8.0),
    row("builtin", "generate-64x16", "snapkv", "pipeline", 1.0, 5.0),
    row("builtin", "choice-800", "none", "products", 1.0, 0.8),
    row("pythia-70m", "choice-800", "none", "stock", 3.0, 9.0),
]


def test_a_row_has_our_side_and_the_ratios_of_their_own_pairs() -> None:
    assert requests_table(ROWS).splitlines()[2:] == [
        "| builtin | choice-800 | snapkv | 2.00 | 8.00 | 4.00 [3.50, 4.50] | 12.00 | 8.00 [7.50, 8.50] |",
        "| builtin | generate-64x16 | snapkv | 1.00 | - | - | 5.00 | 5.00 [4.50, 5.50] |",
        "| pythia-70m | choice-800 | none | 3.00 | 27.00 | 9.00 [8.50, 9.50] | - | - |",
    ]


def test_every_workload_of_the_table_is_measured_against_both_sides() -> None:
    measured = {(one.task, one.press, one.against) for one in COMPARISONS}
    for workload, press in WORKLOADS:
        assert (workload, press, "stock") in measured
    assert {workload for workload, _, against in measured if against == "pipeline"} >= {"choice-800", "generate-64x16"}


def test_the_tables_replace_what_stands_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{BEGIN}, by a script -->\n\nold\n\n{END}\n\nmore\n")
    document.write({"machine": machine(), "dtype": "float32", "evaluation": {"rows": ROWS}}, tmp_path)
    assert main([str(tmp_path), "--into", str(page)]) == 0
    once = page.read_text()
    assert once.startswith(f"# Title\n\n{BEGIN}, by a script -->\n\n**") and once.endswith(f"|\n\n{END}\n\nmore\n")
    assert "old" not in once and "2026-11-28 at abc123" in once and machine()["cpu"] in once
    assert main([str(tmp_path), "--into", str(page)]) == 0
    assert page.read_text() == once


def test_a_page_without_marks_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    document.write({"machine": machine(), "dtype": "float32", "evaluation": {"rows": ROWS}}, tmp_path)
    assert main([str(tmp_path), "--into", str(page)]) == 2
    assert "has no lines" in capsys.readouterr().err and page.read_text() == "nothing"


def test_the_page_of_the_docs_has_the_marks() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    assert page.index(BEGIN) < page.index(END)


def test_a_folder_without_a_document_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    (tmp_path / "performance.json").write_text(json.dumps({})[:1])
    assert main([str(tmp_path)]) == 2
