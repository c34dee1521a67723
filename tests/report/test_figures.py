"""Figures for papers: points at the measured share, intervals as bars, hollow points for marked rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_files import NUM_DOCUMENTS, predict_only, write_results, write_stream

from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.figures import write_figures


def test_figures_have_points_at_the_measured_share_their_intervals_and_hollow_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    write_results(tmp_path, "none", 0.0, scores=[1] * NUM_DOCUMENTS)
    write_results(tmp_path, "snapkv", 0.5, scores=[0, 1, 1, 1] * (NUM_DOCUMENTS // 4), kept=0.6)
    write_results(tmp_path, "inert", 0.5, acc=0.4, kept=1.0)
    report = build_report([tmp_path])
    write_figures(report, tmp_path / "f")
    (kept,) = [one.axes[0] for one in drawn if one.axes[0].get_xlabel() == "measured kept share"]
    bars = {one.get_label(): one for one in kept.containers}
    assert bars["snapkv"].lines[0].get_xydata().tolist() == [[pytest.approx(0.6), 0.75]]
    row = next(row for row in report.tables[0].rows if row.press == "snapkv")
    difference = row.entries["recall.acc"].difference
    assert difference is not None and difference.bounds is not None
    (segment,) = bars["snapkv"].lines[2][0].get_segments()
    assert segment[:, 1].tolist() == pytest.approx([1 + bound for bound in difference.bounds])
    hollow = [line.get_xydata().tolist() for line in kept.lines if line.get_markerfacecolor() == "white"]
    assert hollow == [[[1.0, 0.4]]]
    for figure in drawn:
        figure.clear()


def test_files_are_named_by_table_metric_and_axis(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for press in ("snapkv", "a_$b"):
        write_stream(tmp_path / press, press)
    files = write_figures(build_report([tmp_path]), tmp_path / "f")
    names = {f"table1_{stem}.{ending}" for stem in ("recall.acc_kept", "recall_position") for ending in ("png", "svg")}
    assert {file.name for file in files} == {file.name for file in (tmp_path / "f").iterdir()} == names


def test_a_table_without_figures_has_none(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for press in ("none", "snapkv"):
        predict_only(tmp_path, press)
    assert write_figures(build_report([tmp_path]), tmp_path / "f") == []
