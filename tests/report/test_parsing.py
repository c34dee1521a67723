"""A results file is read as it is: what it does not say is None."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from report_files import amend, predict_only, results_file, write_results

from lm_eval_kvpress.report.result_files import read_cell


def test_facts_of_our_models_are_read(tmp_path: Path) -> None:
    cell = read_cell(write_results(tmp_path, "snapkv", 0.5, kept=0.49))
    assert (cell.press.name, cell.press.removed_asked) == ("snapkv", 0.5)
    assert (cell.checkpoint, cell.dtype) == ("tiny", "float32")
    (task,) = cell.tasks
    assert task.kept is not None and task.kept.share == 0.49
    assert cell.speed.decode_tokens_per_sec == 20.0 and cell.parity is None


def test_stock_results_have_no_press_and_another_protocol(tmp_path: Path) -> None:
    cell = read_cell(write_results(tmp_path, "none", 0.0, stock=True))
    assert cell.press.is_none and cell.is_stock
    assert cell.tasks[0].kept is None and cell.speed.prefill_tokens_per_sec is None


def test_speeds_of_several_ranks_are_told_apart_from_those_of_one(tmp_path: Path) -> None:
    file = write_results(tmp_path, "snapkv", 0.5)
    amend(file, lambda content: content["config"]["kvpress"].update(num_ranks=2))
    assert read_cell(file).device == "cpu (one of 2)"


@pytest.mark.parametrize("value, read", [(None, None), ("N/A", None), (math.nan, math.nan), (1, 1.0)])
def test_missing_is_none_and_nan_is_nan(tmp_path: Path, value: Any, read: float | None) -> None:
    found = read_cell(write_results(tmp_path, "none", 0.0, acc=value)).tasks[0].metrics[0].value
    assert found == read or (found is not None and read is not None and math.isnan(found) and math.isnan(read))


def test_the_placeholder_of_predict_only_is_no_metric(tmp_path: Path) -> None:
    (task,) = read_cell(predict_only(tmp_path, "none")).tasks
    assert task.metrics == ()


def test_older_files_that_hold_arguments_as_text_are_read(tmp_path: Path) -> None:
    content = results_file("none", 0.0, stock=True)
    content["config"]["model_args"] = "pretrained=old,revision=step1"
    file = tmp_path / "results_old.json"
    file.write_text(json.dumps(content))
    cell = read_cell(file)
    assert cell.checkpoint == "old" and dict(cell.model_settings)["revision"] == "step1"
