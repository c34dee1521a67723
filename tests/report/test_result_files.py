"""Result files are read as they are: what a file does not say is None, what is not one is refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from report_files import amend, results_file, write_results

from lm_eval_kvpress.report import command
from lm_eval_kvpress.report.result_files import ResultsError, read_results


def test_facts_of_our_models_are_read(tmp_path: Path) -> None:
    write_results(tmp_path, "snapkv", 0.5, kept=0.49)
    (cell,) = read_results([tmp_path])
    assert (cell.press.name, cell.press.removed_asked, cell.checkpoint, cell.dtype) == (
        "snapkv",
        0.5,
        "tiny",
        "float32",
    )
    (task,) = cell.tasks
    assert task.kept is not None and task.kept.share == 0.49
    assert cell.speed.decode_tokens_per_sec == 20.0 and cell.parity is None


def test_stock_results_have_no_press_and_another_protocol(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0, stock=True)
    (cell,) = read_results([tmp_path])
    assert cell.press.is_none and cell.is_stock
    assert cell.tasks[0].kept is None and cell.speed.prefill_tokens_per_sec is None


def test_unfinished_cells_of_a_sweep_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, outputs = tmp_path / "runs" / "sweep", ["-o", str(tmp_path / "report.md")]
    for cell in ("none", "snapkv", "knorm"):
        (sweep / "cells" / cell).mkdir(parents=True)
    (sweep / "sweep.json").write_text("{}")
    with pytest.raises(ResultsError, match="no cell of the sweep in .* is finished: its command goes on"):
        command.main([str(sweep), *outputs])
    write_results(sweep / "cells" / "none" / "results", "none", 0.0)
    assert command.main([str(tmp_path), *outputs]) == 0
    said = capsys.readouterr()
    assert said.err == f"{sweep}: 2 cells are unfinished and left out: knorm, snapkv\n"
    assert said.out.endswith("1 rows in 1 table\n")


def test_figures_of_which_warm_up_is_a_part_are_named(tmp_path: Path) -> None:
    warm_up = {"includes_warmup": ["decode", "tpot_sec", "score"]}
    write_results(tmp_path, "none", 0.0)
    amend(
        write_results(tmp_path, "snapkv", 0.5),
        lambda content: content["config"]["kvpress"]["throughput"].update(warm_up),
    )
    (said,) = command.make_report([tmp_path]).notices
    assert "Too little was run to leave warm-up out of decode tok/s, TPOT in 1 of 2 runs" in " ".join(said)


def test_speeds_of_several_ranks_are_told_apart_from_those_of_one(tmp_path: Path) -> None:
    amend(write_results(tmp_path, "snapkv", 0.5), lambda content: content["config"]["kvpress"].update(num_ranks=2))
    (cell,) = read_results([tmp_path])
    assert cell.device == "cpu (one of 2)"


@pytest.mark.parametrize("value, read", [(None, None), ("N/A", None), (math.nan, math.nan), (1, 1.0)])
def test_missing_is_none_and_nan_is_nan(tmp_path: Path, value: Any, read: float | None) -> None:
    write_results(tmp_path, "none", 0.0, acc=value)
    found = read_results([tmp_path])[0].tasks[0].metrics[0].value
    assert found == read or (found is not None and read is not None and math.isnan(found) and math.isnan(read))


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"results": {"a"', "is not whole JSON"),
        ("[1, 2]", "is not what lm-eval writes"),
        ("{}", "is not what lm-eval writes"),
        (json.dumps({"config": {}, "results": [1]}), "is not what lm-eval writes"),
    ],
)
def test_what_is_no_results_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "results_x.json").write_text(text)
    with pytest.raises(ResultsError, match=message) as error:
        read_results([tmp_path])
    assert "results_x.json" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no results_"):
        read_results([tmp_path])


def test_older_files_that_hold_arguments_as_text_are_read(tmp_path: Path) -> None:
    content = results_file("none", 0.0, stock=True)
    content["config"]["model_args"] = "pretrained=old,revision=step1"
    (tmp_path / "results_old.json").write_text(json.dumps(content))
    (cell,) = read_results([tmp_path])
    assert cell.checkpoint == "old" and dict(cell.model_settings)["revision"] == "step1"
