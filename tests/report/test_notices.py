"""Notices say what is true of a table as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from report_files import STREAMED, amend, predict_only, unmeasured, write_results, write_stream

from lm_eval_kvpress.report.build import build_report


def notices(folder: Path) -> Sequence[str]:
    (table,) = build_report([folder]).tables
    return table.notices


def test_limits_of_tasks_that_the_first_row_did_not_run_are_named(tmp_path: Path) -> None:
    def add_a_task(content: dict[str, Any]) -> None:
        for part in ("results", "n-samples", "versions", "n-shot", "higher_is_better"):
            content[part]["story"] = content[part]["recall"]

    write_results(tmp_path, "none", 0.0, num_documents=3)
    amend(write_results(tmp_path, "snapkv", 0.5, acc=0.4, num_documents=3), add_a_task)
    said = " ".join(notices(tmp_path))
    assert "Run with --limit: 3 of 20 documents of recall, 3 of 20 documents of story." in said


def test_tasks_without_figures_are_named(tmp_path: Path) -> None:
    predict_only(tmp_path, "none")
    assert any(notice.startswith("No figures of recall: ") for notice in notices(tmp_path))
    write_results(tmp_path, "snapkv", 0.5)
    assert not any(notice.startswith("No figures") for notice in notices(tmp_path))


@pytest.mark.parametrize("acc, said", [(0.4, "1 newer result is left out"), (0.3, "1 older result is left out")])
def test_files_that_do_not_count_are_counted(tmp_path: Path, acc: float, said: str) -> None:
    write_results(tmp_path, "none", 0.0, acc=0.9)
    write_results(tmp_path, "snapkv", 0.5, name="a", acc=0.4, date=1.0)
    unmeasured(tmp_path, "snapkv", name="b", date=3.0, acc=acc)
    assert any(said in notice for notice in notices(tmp_path)), notices(tmp_path)


def test_several_older_files_are_plural(tmp_path: Path) -> None:
    for date in (1.0, 3.0, 2.0):
        write_results(tmp_path, "none", 0.0, name=str(date), date=date)
    assert any("2 older results are left out" in notice for notice in notices(tmp_path))


def test_streams_without_losses_are_counted(tmp_path: Path) -> None:
    write_stream(tmp_path, "snapkv", STREAMED[:1])
    assert any("No losses by position for 1 of 1 runs" in notice for notice in notices(tmp_path))
