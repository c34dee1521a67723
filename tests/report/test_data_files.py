"""Data files hold every metric in full precision; what is missing is told from NaN and from 0."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from report_files import amend, portable, without_prefill_press, write_results

from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.contents import Report
from lm_eval_kvpress.report.data_files import as_csv, as_json

EXPECTED = Path(__file__).parent / "expected"


@pytest.mark.parametrize("name, writer", [("report.csv", as_csv), ("report.json", as_json)])
def test_the_data_of_a_known_report(leaderboard: Path, name: str, writer: Callable[[Report], str]) -> None:
    report = build_report([leaderboard])
    assert portable(writer(report), report, leaderboard) == (EXPECTED / name).read_text(encoding="utf-8")


def test_missing_and_nan_are_written_as_such(tmp_path: Path) -> None:
    for press, acc in (("none", 0.5), ("a", float("nan")), ("b", None)):
        write_results(tmp_path, press, 0.5, acc=acc)
    report = build_report([tmp_path])
    rows = {row["press"]: row for row in csv.DictReader(io.StringIO(as_csv(report)))}
    assert (rows["a"]["recall.acc"], rows["b"]["recall.acc"]) == ("NaN", "")
    parsed = {row["press"]: row["recall.acc"] for row in json.loads(as_json(report))["rows"]}
    assert parsed == {"none": 0.5, "a": "nan", "b": None}


def test_what_a_press_of_generated_text_removes_from_contexts_is_missing_and_not_zero(tmp_path: Path) -> None:
    without_prefill_press(tmp_path, "decoding:knorm", num_compressions=23)
    without_prefill_press(tmp_path, "prefill_decoding:snapkv+knorm", num_compressions=23)
    rows = {row["press"]: row for row in json.loads(as_json(build_report([tmp_path])))["rows"]}
    names = ("removed_asked", "kept_share", "num_uncompressed")
    assert [rows["decoding:knorm"][name] for name in names] == [None, None, None]
    assert [rows["prefill_decoding:snapkv+knorm"][name] for name in names] == [0.0, None, 4]


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\uff1d1"])
def test_text_that_a_spreadsheet_would_run_is_quoted(tmp_path: Path, name: str) -> None:
    file = write_results(tmp_path, "none", 0.0, checkpoint=name)
    amend(file, lambda content: content.update(results={name: {"acc,none": -0.5}}))
    (row,) = csv.DictReader(io.StringIO(as_csv(build_report([tmp_path]))))
    assert row["checkpoint"] == f"'{name}" and row[f"'{name}.acc"] == "-0.5"
    assert not any(text.startswith(name) for text in (*row, *row.values()))


def test_500_rows_are_in_both_formats(many_results: Path) -> None:
    report = build_report([many_results], sort=["recall.acc"])
    assert [len(table.rows) for table in report.tables] == [500]
    assert len(list(csv.DictReader(io.StringIO(as_csv(report))))) == 500
    assert len(json.loads(as_json(report))["rows"]) == 500
