"""What became of answers is counted document by document, from the samples alone."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from report_files import sample_line, write_results

from lm_eval_kvpress import cli
from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.changes import Changes, answered
from lm_eval_kvpress.report.contents import ReportRow

OPTIONS = 4


def write_choices(folder: Path, press: str, likelihoods: Sequence[Sequence[float]], **facts: Any) -> None:
    """A run of a task with several options, the first of which is right; lm-eval writes the numbers as text."""
    scores = [float(max(range(OPTIONS), key=row.__getitem__) == 0) for row in likelihoods]
    file = write_results(folder, press, 0.5, scores=scores, **facts)
    lines = []
    for index, (row, score) in enumerate(zip(likelihoods, scores, strict=True)):
        sample = json.loads(sample_line(index, score))
        lines.append(json.dumps({**sample, "resps": [[[str(value), "False"]] for value in row]}))
    file.with_name("samples_recall_2026.jsonl").write_text("\n".join(lines) + "\n")


def row_of(folder: Path, press: str) -> ReportRow:
    return next(row for table in build_report([folder]).tables for row in table.rows if row.press == press)


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock lm-eval"])
def test_flips_are_those_counted_by_hand(tmp_path: Path, stock: bool) -> None:
    draws = random.Random(5)
    before, after = (
        [[draws.gauss(bias * (option == 0), 1) for option in range(OPTIONS)] for _ in range(60)] for bias in (1, 0)
    )
    write_choices(tmp_path, "none", before)
    write_choices(tmp_path, "knorm", after)
    if stock:  # no facts of ours: two plain runs, told apart by the press that our files name
        for file in tmp_path.rglob("results_*.json"):
            content = json.loads(file.read_text())
            content["config"]["kvpress"] = {"press": content["config"]["kvpress"]["press"]}
            file.write_text(json.dumps(content))
    chosen = [[row.index(max(row)) for row in run] for run in (before, after)]
    pairs = list(zip(*chosen, strict=True))
    row = row_of(tmp_path, "knorm")
    expected = {
        "right_to_wrong": sum(one == 0 and other != 0 for one, other in pairs) / 60,
        "wrong_to_right": sum(one != 0 and other == 0 for one, other in pairs) / 60,
        "option_changed": sum(one != other for one, other in pairs) / 60,
    }
    assert {key: row.entries[key].value for key in expected} == expected
    assert len(set(expected.values())) == 3 and min(expected.values()) > 0
    difference = row.entries["recall.acc"].difference
    assert difference is not None
    assert difference.value == pytest.approx(expected["wrong_to_right"] - expected["right_to_wrong"])
    low, high = row.entries["option_changed"].bounds or (0, 0)
    assert low < expected["option_changed"] < high


def test_other_documents_have_no_flips(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0, scores=[1, 0, 1, 0])
    other = write_results(tmp_path, "knorm", 0.5, scores=[0, 0, 1, 0])
    samples = other.with_name("samples_recall_2026.jsonl")
    samples.write_text(samples.read_text().replace('"hash', '"another'))
    assert "right_to_wrong" not in row_of(tmp_path, "knorm").entries


def test_scores_between_right_and_wrong_are_not_judged(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0, scores=[1, 0.5, 1, 0])
    write_results(tmp_path, "knorm", 0.5, scores=[0, 0, 1, 0])
    assert "right_to_wrong" not in row_of(tmp_path, "knorm").entries


def test_texts_are_compared_by_words() -> None:
    before = ["the cold river ran", "seven geese", "", "an old mill"]
    after = ["the cold river ran", "seven grey geese slept", "so", "an old mill by the sea"]
    assert answered(after, before) == Changes(
        num_texts=4, num_same_texts=1, num_words_before=0 + 1 + 0 + 3, num_words_added=0 + 2 + 1 + 3
    )


def test_a_gate_may_name_flips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path, "none", 0.0, scores=[1, 1, 0, 0])
    write_results(tmp_path, "knorm", 0.5, scores=[0, 1, 1, 0])
    assert cli.main(["report", str(tmp_path), "--fail-if", "right_to_wrong>0.2"]) == 3
    assert "right_to_wrong is 0.25" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path), "--fail-if", "right_to_wrong>0.3"]) == 0
    assert "Right → wrong" not in capsys.readouterr().out
    cli.main(["report", str(tmp_path), "--all-metrics"])
    assert "Right → wrong" in capsys.readouterr().out
