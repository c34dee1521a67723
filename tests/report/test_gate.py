"""``--fail-if``: rows beyond a bound are named and the command exits with 3."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_files import with_fidelity, write_results

from lm_eval_kvpress import cli
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.gate import failures, parse_condition


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for press, acc, kl in (("none", 0.9, 0.0), ("knorm", 0.9, 0.25), ("snapkv", 0.7, 0.01)):
        with_fidelity(write_results(tmp_path, press, 0.5, acc=acc), kl)
    return tmp_path


@pytest.mark.parametrize(
    "conditions, named",
    [
        (["kl_mean>0.05"], ["knorm"]),
        (["kl_mean > 0.005"], ["knorm", "snapkv"]),
        (["recall.acc<0.8"], ["snapkv"]),
        (["recall.acc<=0.9"], ["none", "knorm", "snapkv"]),
        (["top1_agreement<0.8", "recall.acc<0.8"], ["knorm", "snapkv"]),
        (["kl_mean>=0.3"], []),
        ([], []),
    ],
)
def test_rows_beyond_the_bound_are_named(
    folder: Path, conditions: list[str], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [part for condition in conditions for part in ("--fail-if", condition)]
    assert cli.main(["report", str(folder), "-o", str(folder / "r.md"), *options]) == (3 if named else 0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in lines] == named
    assert (folder / "r.md").is_file()


def test_a_row_without_the_number_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A gate that nothing was measured for must not pass."""
    write_results(folder, "tova", 0.5)
    assert cli.main(["report", str(folder), "--fail-if", "kl_mean>0.5"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "tova" in line and line.endswith("has no number for kl_mean>0.5")


@pytest.mark.parametrize("text", ["kl_mean", "kl_mean=0.1", ">0.1", "kl_mean>", "kl_mean>x", "kl_mean>nan", ""])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no condition: write a column"):
        parse_condition(text)


def test_an_unknown_column_is_refused_with_the_near_name(folder: Path) -> None:
    with pytest.raises(UsageError, match="--fail-if kl_maen>0.1: no such column; did you mean 'kl_mean'"):
        failures(build_report([folder]), [parse_condition("kl_maen>0.1")])


def test_columns_stand_where_fidelity_was_measured_and_zero_is_marked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_fidelity(write_results(folder, "tova", 0.5, acc=0.9), 0.0)
    cli.main(["report", str(folder)])
    text = capsys.readouterr().out
    assert "KL is exactly 0 where entries were removed (recall)" in text
    (table,) = build_report([folder]).tables
    assert [row.press for row in table.rows if "not_read" in {mark.code for mark in row.marks}] == ["tova"]
    assert "0.25" in text and "75.0 %" in text


def test_a_row_whose_press_never_acted_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its figures are the full cache's, and say nothing of the press."""
    with_fidelity(write_results(folder, "tova", 0.5, acc=0.9, kept=1.0), 0.0)
    assert cli.main(["report", str(folder), "--fail-if", "recall.acc<0.5"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "tova" in line and line.endswith("has no figure of its press for recall.acc<0.5 (kept everything)")


def test_unfinished_cells_of_a_sweep_fail(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "sweep.json").write_text("{}")
    (folder / "cells" / "tova").mkdir(parents=True)
    command = ["report", str(folder)]
    assert cli.main(command) == 0
    assert cli.main([*command, "--fail-if", "kl_mean>0.5"]) == 3
    assert "1 cells are unfinished and left out: tova" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["top1_agreement<90", "kept_share>50", "kept_share<-0.1", "top1_agreement>inf"])
def test_a_bound_in_per_cent_is_refused(folder: Path, text: str) -> None:
    """No fraction is beyond it: the condition would never hold, or always."""
    with pytest.raises(UsageError, match="shares are fractions here: write a bound from 0 to 1"):
        failures(build_report([folder]), [parse_condition(text)])
