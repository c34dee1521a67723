"""Differences are to the baseline of the same table, with intervals where both runs logged the same documents."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from report_files import NUM_DOCUMENTS, write_results

from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.differences import Comparison, Difference
from lm_eval_kvpress.report.metrics import metric_keys
from lm_eval_kvpress.report.result_files import read_cell


def difference(baseline: Path, other: Path) -> tuple[Difference, bool]:
    """The difference of `acc`, and whether all answers are the same."""
    cells = [read_cell(file) for file in (baseline, other)]
    comparison = Comparison(cells[0])
    keys = metric_keys("recall", cells)
    (by_metric,) = comparison.differences(cells[1:], keys)
    return by_metric[keys[0]], comparison.has_same_answers(cells[1])


def test_a_difference_of_logged_runs_has_its_interval(tmp_path: Path) -> None:
    baseline = write_results(tmp_path, "none", 0.0, scores=[1] * NUM_DOCUMENTS)
    other = write_results(tmp_path, "snapkv", 0.5, scores=[1, 0] * (NUM_DOCUMENTS // 2))
    found, is_same = difference(baseline, other)
    assert found.value == -0.5 and found.num_documents == NUM_DOCUMENTS and not is_same
    assert found.low is not None and found.high is not None and found.low < -0.5 < found.high
    assert found.bounds == (found.low, found.high)


def test_without_samples_of_both_runs_a_difference_has_no_interval(tmp_path: Path) -> None:
    baseline = write_results(tmp_path, "none", 0.0, scores=[1] * NUM_DOCUMENTS)
    found, is_same = difference(baseline, write_results(tmp_path, "snapkv", 0.5, acc=0.25))
    assert found == Difference(-0.75) and found.bounds is None and not is_same


@pytest.mark.parametrize("changed", ["doc_hash", "doc_id"])
def test_runs_of_other_documents_are_not_paired(tmp_path: Path, changed: str) -> None:
    """As many documents, and other ones: a paired interval, or equal answers, would be of nothing."""
    scores = [1, 0] * (NUM_DOCUMENTS // 2)
    baseline = write_results(tmp_path, "none", 0.0, scores=scores)
    other = write_results(tmp_path, "snapkv", 0.5, scores=scores)
    (file,) = other.parent.glob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    for sample in samples:
        sample[changed] = 1000 + sample["doc_id"] if changed == "doc_id" else f"other {sample['doc_id']}"
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    found, is_same = difference(baseline, other)
    assert found == Difference(0.0) and found.bounds is None and not is_same


def test_the_same_answers_are_recognized(tmp_path: Path) -> None:
    scores = [1, 0] * (NUM_DOCUMENTS // 2)
    baseline = write_results(tmp_path, "none", 0.0, scores=scores)
    found, is_same = difference(baseline, write_results(tmp_path, "snapkv", 0.5, scores=scores))
    assert found == Difference(0, num_documents=NUM_DOCUMENTS) and is_same


def test_documents_of_which_none_changed_give_no_interval(tmp_path: Path) -> None:
    """[0, 0] would say that no other document can change."""
    baseline = write_results(tmp_path, "none", 0.0, scores=[1] * NUM_DOCUMENTS)
    other = write_results(tmp_path, "snapkv", 0.5, scores=[1] * NUM_DOCUMENTS)
    found, _ = difference(baseline, other)
    assert found.bounds is None and found.num_documents == NUM_DOCUMENTS
    (row,) = [row for row in build_report([tmp_path]).tables[0].rows if row.press == "snapkv"]
    assert row.entries["recall.acc"].difference_text == "0.000" and row.entries["recall.acc"].interval_text == ""
    low, high = row.entries["right_to_wrong"].bounds or (0, 0)
    assert low == 0 and high == pytest.approx(0.161, abs=5e-4)  # Wilson's of 0 of 20


def test_two_endless_perplexities_have_no_difference(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0, acc=math.inf)
    write_results(tmp_path, "snapkv", 0.5, acc=math.inf)
    write_results(tmp_path, "knorm", 0.5, acc=1.0)
    texts = {row.press: row.entries["recall.acc"].difference_text for row in build_report([tmp_path]).tables[0].rows}
    assert texts == {"none": "", "snapkv": "", "knorm": "−∞"}
