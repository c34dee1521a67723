"""Losses over the position: the right losses for a run or none, and figures that equal the definition."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_files import STREAMED, amend, write_results, write_stream

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.data_files import as_json
from lm_eval_kvpress.report.html import html
from lm_eval_kvpress.report.loss_curves import Curve, curve


def curves(*places: Path) -> dict[str, tuple[Curve, ...]]:
    rows = [row for table in build_report(places).tables for row in table.rows]
    return {row.press: row.curves for row in rows if row.cell is not None}


def test_a_figure_is_the_perplexity_of_all_tokens_between_two_ends() -> None:
    draws = np.random.default_rng(0)
    documents = [draws.random(length) * 5 for length in (700, 90, 3)]
    found = curve("task", documents)
    assert found.ends[:5] == (16, 22, 32, 45, 64) and found.ends[-1] == 700
    for start, end, perplexity, count in zip(
        (0, *found.ends), found.ends, found.perplexities, found.num_documents, strict=False
    ):
        tokens = [loss for losses in documents for loss in losses[start:end]]
        assert math.isclose(perplexity, math.exp(sum(tokens) / len(tokens)), rel_tol=1e-12)
        assert count == sum(len(losses) > start for losses in documents)


def test_losses_beside_a_sweeps_results_are_found_whichever_folder_is_named(tmp_path: Path) -> None:
    file = write_stream(tmp_path / "cells" / "snapkv", "snapkv")
    expected = (curve("recall", [np.array(losses) for losses in STREAMED]),)
    for place in (tmp_path, file.parents[1], file):
        assert curves(place) == {"snapkv": expected}


def test_each_press_has_its_own_losses_and_of_two_runs_the_nearest_count(tmp_path: Path) -> None:
    write_stream(tmp_path / "a", "knorm")
    write_stream(tmp_path / "b", "snapkv", [[2.0] * 50, [2.0] * 40])
    write_stream(tmp_path / "z", "snapkv", [[9.0] * 50, [9.0] * 40]).unlink()
    found = curves(tmp_path)
    assert found["knorm"][0].perplexities[0] == pytest.approx(math.exp(2))
    assert set(np.round(found["snapkv"][0].perplexities, 6)) == {round(math.exp(2), 6)}


@pytest.mark.parametrize(
    "changed", [{"dtype": "float16"}, {"revision": "step1"}, {"versions": {}}, {"pretrained": "x"}]
)
def test_losses_of_another_run_are_not_shown(tmp_path: Path, changed: dict[str, Any]) -> None:
    write_stream(tmp_path, "snapkv", **changed)
    assert curves(tmp_path) == {"snapkv": ()}


def test_losses_of_another_seed_are_not_shown(tmp_path: Path) -> None:
    """A folder that does not say its seed may be of any."""
    for name, seed in (("a", {"seed": 2}), ("b", {"seed": 1}), ("c", {})):
        file = write_stream(tmp_path / name, "random", **seed)
        amend(file, lambda content: content["config"].update(torch_seed=1))
    assert [bool(curves(tmp_path / name)["random"]) for name in "abc"] == [False, True, True]


def test_losses_of_other_than_the_rows_documents_are_not_shown(tmp_path: Path) -> None:
    write_stream(tmp_path, "snapkv", STREAMED[:1])
    assert curves(tmp_path) == {"snapkv": ()}


@pytest.mark.parametrize(
    "text", ["position,loss_nats\n0,1.0\n2,1.0\n", "position,loss_nats\n0,x\n", "position,loss\n0,1.0\n", ""]
)
def test_a_file_that_is_not_losses_is_one_line_that_names_it(tmp_path: Path, text: str) -> None:
    write_stream(tmp_path, "snapkv")
    file = next((tmp_path / "stream" / "recall").glob("0-*.csv"))
    file.write_text(text)
    with pytest.raises(UsageError, match=file.name) as error:
        build_report([tmp_path])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", '{"editor.fontSize": 12}', '{"protocol": 1}', "[" * 9999])
def test_settings_of_other_programs_are_passed_over(tmp_path: Path, text: str) -> None:
    write_stream(tmp_path / "run", "snapkv")
    (tmp_path / ".vscode").mkdir()
    (tmp_path / ".vscode" / "settings.json").write_text(text, encoding="latin-1")
    assert len(curves(tmp_path)["snapkv"]) == 1


def test_a_stream_in_a_shallow_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_stream(tmp_path, "snapkv")
    file.rename(tmp_path / file.name)
    monkeypatch.chdir(tmp_path)
    assert len(curves(Path(file.name))["snapkv"]) == len(curves(Path())["snapkv"]) == 1


@pytest.mark.parametrize("ending", [".csv", ".json"])
def test_losses_that_do_not_match_their_checksum_are_not_drawn(tmp_path: Path, ending: str) -> None:
    """Cut at a line's end a table is a table still, of fewer tokens."""
    write_stream(tmp_path, "snapkv")
    file = next((tmp_path / "stream" / "recall").glob(f"0-*{ending}"))
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    with pytest.raises(UsageError, match=rf"{file.stem}.csv or the .json beside it is damaged"):
        build_report([tmp_path])


def test_losses_of_an_older_version_have_no_checksum_and_are_drawn(tmp_path: Path) -> None:
    write_stream(tmp_path, "snapkv")
    for file in (tmp_path / "stream" / "recall").glob("*.json"):
        file.write_text("{}")
    assert curves(tmp_path)["snapkv"]


def test_a_page_and_data_hold_the_curve_and_a_page_without_streams_none(tmp_path: Path) -> None:
    write_stream(tmp_path / "a", "snapkv")
    write_results(tmp_path / "b", "none", 0.0)
    report = build_report([tmp_path / "a"])
    (row,) = [row for row in json.loads(as_json(report))["rows"] if row["press"] == "snapkv"]
    assert row["curves"][0]["ends"][-1] == 50 and '"position": 50' in html(report)
    assert '"position":' not in html(build_report([tmp_path / "b"]))


def test_losses_are_written_by_the_store_in_the_layout_that_is_read(tmp_path: Path) -> None:
    write_stream(tmp_path, "snapkv")
    file = next((tmp_path / "stream" / "recall").glob("1-*.csv"))
    with file.open(newline="") as lines:
        assert [float(row["loss_nats"]) for row in csv.DictReader(lines)] == STREAMED[1]
