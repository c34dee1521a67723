"""Samples are read without their texts, and only aggregations that reproduce a figure are believed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from report_files import sample_line, write_results

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.report.samples import Scores, aggregation, parse_sample, read_samples


def test_a_sample_is_the_same_with_and_without_its_texts() -> None:
    line = sample_line(3, 1.0)
    key, short = parse_sample(line.encode())
    whole = json.loads(line)
    assert key == (whole["doc_id"], whole["doc_hash"])
    assert short == {name: value for name, value in whole.items() if name not in ("doc_id", "doc")}


def test_a_metric_about_some_documents_is_a_share_of_these(tmp_path: Path) -> None:
    file = write_results(tmp_path, "none", 0.0, scores=[1, 0, 0, 1])
    scores = read_samples(file.with_name("samples_recall_2026.jsonl"))["none"].scores["acc_at_100"]
    assert scores.numerators.tolist() == [1, 0, 0, 0] and scores.denominators.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "line",
    [
        *(
            '{"doc_id": 1, "doc',
            '{"doc_id": 1, "doc_hash": "x", "resps": []}',
            "7",
            '"text"',
            "[1]",
            "\x00",
            "[" * 9999,
        ),
        sample_line(1, 1.0).replace('"resps"', '"responses"'),
        sample_line(1, 1.0).replace('"filter"', '"filters"'),
        sample_line(1, 1.0).replace('"doc_id": 1', '"doc_id": "1"'),
        sample_line(1, 1.0).replace('"doc_id": 1', '"doc_id": null'),
        sample_line(1, 1.0).replace('"hash1"', "1"),
        sample_line(1, 1.0).replace('["acc", "acc_at_100"]', '"acc"'),
        sample_line(1, 1.0).replace('["acc", "acc_at_100"]', "[1]"),
    ],
)
def test_a_line_that_is_not_a_whole_sample_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "samples_x.jsonl"
    file.write_text(sample_line(0, 1.0) + "\n" + line)
    with pytest.raises(UsageError, match=r"samples_x.jsonl, line 2, is not a whole sample"):
        read_samples(file)


def test_scores_that_no_float_holds_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "samples_x.jsonl"
    file.write_text(sample_line(0, 1.0).replace('"acc": 1.0', f'"acc": {"9" * 400}'))
    with pytest.raises(UsageError, match=r"samples_x.jsonl holds scores that are no numbers"):
        read_samples(file)


@pytest.mark.parametrize("reported", [0.75, math.exp(-0.75), -0.75 / math.log(2)])
def test_the_aggregation_reproduces_the_figure(reported: float) -> None:
    aggregate = aggregation(Scores(np.array([1.0, 2.0]), np.array([2.0, 2.0])), reported)
    assert aggregate is not None and math.isclose(float(aggregate(np.array(0.75))), reported)


@pytest.mark.parametrize("reported", [None, math.nan, 0.7])
def test_a_figure_that_nothing_reproduces_has_no_aggregation(reported: float | None) -> None:
    assert aggregation(Scores(np.array([1.0, 2.0]), np.array([2.0, 2.0])), reported) is None
