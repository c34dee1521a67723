"""Ranking by a column, best first or worst first."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_files import write_results

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.report.build import build_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranked")
    for press, acc in (("none", 0.9), ("a", 0.2), ("b", None), ("c", 0.7), ("d", float("nan"))):
        write_results(folder, press, 0.5, acc=acc)
    return folder


@pytest.mark.parametrize("key, presses", [("recall.acc", "cabd"), ("-recall.acc", "acbd"), ("press", "abcd")])
def test_ranking_keeps_the_baseline_on_top_and_the_missing_last(folder: Path, key: str, presses: str) -> None:
    (table,) = build_report([folder], sort=[key]).tables
    assert [row.press for row in table.rows] == ["none", *presses]


def test_the_first_of_several_columns_counts_most(folder: Path) -> None:
    (table,) = build_report([folder], sort=["kept_share", "-recall.acc"]).tables
    assert [row.press for row in table.rows] == ["none", *"acbd"]


def test_a_column_that_does_not_exist_is_refused_with_the_near_name(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"did you mean 'recall\.acc'"):
        build_report([folder], sort=["recall.ac"])
