"""Every shape of figures that lm-eval's tasks write is read as it is meant.

The shapes are those of the 14,441 YAML files of lm-eval 0.4.13 (209 metrics, 107 aggregations), and of the functions
that they name.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from lm_eval.api import metrics, registry  # noqa: F401 (the second fills the first)

from lm_eval_kvpress.report.cell import Metric
from lm_eval_kvpress.report.metric_values import KNOWN_BETTER, PREDICT_ONLY, task_metrics

NONE: dict[str, Any] = {}
SHAPES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, tuple[float | None, bool | None]]]] = [
    ("a mean with its error", {"acc,none": 0.5, "acc_stderr,none": 0.1}, {"acc": True}, {"acc,none": (0.5, True)}),
    ("no error", {"acc,none": 0.5}, {"acc": True}, {"acc,none": (0.5, True)}),
    ("an error that is text", {"acc,none": 0.5, "acc_stderr,none": "N/A"}, {"acc": True}, {"acc,none": (0.5, True)}),
    (
        "several filters: gsm8k",
        {"exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.2},
        {"exact_match": True},
        {"exact_match,strict-match": (0.1, True), "exact_match,flexible-extract": (0.2, True)},
    ),
    ("files to 0.4.2 name no direction", {"acc,none": 0.412}, NONE, {"acc,none": (0.412, True)}),
    (
        "a direction that is null: wikitext of older versions",
        {"bits_per_byte,none": 0.9, "word_perplexity,none": 20.0},
        {"bits_per_byte": None},
        {"bits_per_byte,none": (0.9, False), "word_perplexity,none": (20.0, False)},
    ),
    ("no direction is known", {"bytes_per_token,none": 4.25}, NONE, {"bytes_per_token,none": (4.25, None)}),
    ("the file's direction counts first", {"f1,none": 0.5}, {"f1": False}, {"f1,none": (0.5, False)}),
    (
        "one length of ruler, below those declared",
        {"1024,none": 1.0, "4096,none": -1, "4096_stderr,none": "N/A"},
        {"4096": True},
        {"1024,none": (1.0, True)},
    ),
    (
        "two lengths of ruler",
        {"1024,none": 1.0, "2048,none": 0.5, "4096,none": -1.0},
        {"4096": True, "8192": True},
        {"1024,none": (1.0, True), "2048,none": (0.5, True), "all_lengths,none": (0.75, True)},
    ),
    ("ruler when nothing was run", {"4096,none": -1}, {"4096": True}, {}),
    ("minus one of another metric is a figure", {"mcc,none": -1.0}, {"mcc": True}, {"mcc,none": (-1.0, True)}),
    ("negative: crows_pairs, bbq", {"likelihood_diff,none": -3.5}, NONE, {"likelihood_diff,none": (-3.5, None)}),
    (
        "a dictionary: libra, by pages",
        {"libra_score,none": {"8p": 0.5, "16p": 1}, "libra_score_stderr,none": "N/A"},
        {"libra_score": True},
        {"libra_score_8p,none": (0.5, True), "libra_score_16p,none": (1.0, True)},
    ),
    ("a share in per cent: squadv2, bleu", {"bleu,none": 31.25}, {"bleu": True}, {"bleu,none": (31.25, True)}),
    ("NaN: bbq without such a document", {"amb,none": math.nan}, NONE, {"amb,none": (math.nan, None)}),
    ("an infinite perplexity", {"perplexity,none": math.inf}, NONE, {"perplexity,none": (math.inf, False)}),
    ("text", {"acc,none": "N/A"}, NONE, {"acc,none": (None, True)}),
    ("a list", {"acc,none": [0.5, 0.6]}, NONE, {"acc,none": (None, True)}),
    ("null: a metric of no document", {"acc,none": None}, NONE, {"acc,none": (None, True)}),
    ("a whole number", {"count,none": 3}, NONE, {"count,none": (3.0, None)}),
    (
        "names with signs: mutual, humaneval, score, gsm8k_cot_self_consistency",
        {"r@1,none": 0.1, "pass@1,create_test": 0.2, "0_accuracy,none": 0.3, "exact_match,maj@64": 0.4},
        {"r@1": True, "pass@1": True, "0_accuracy": True, "exact_match": True},
        {
            "r@1,none": (0.1, True),
            "pass@1,create_test": (0.2, True),
            "0_accuracy,none": (0.3, True),
            "exact_match,maj@64": (0.4, True),
        },
    ),
    ("what is no metric", {"alias": "a", "name": "a", "sample_len": 7, "sample_count": {"acc,none": 7}}, NONE, {}),
]


@pytest.mark.parametrize("figures, better, expected", [shape[1:] for shape in SHAPES], ids=[one[0] for one in SHAPES])
def test_the_shapes_of_lm_evals_tasks(
    figures: dict[str, Any], better: dict[str, Any], expected: dict[str, tuple[float | None, bool | None]]
) -> None:
    found = {f"{one.name},{one.filter}": (one.value, one.higher_is_better) for one in task_metrics(figures, better)}
    assert str(found) == str(expected), "as text, because NaN equals nothing"


def test_the_error_of_a_metric_is_that_of_its_filter() -> None:
    figures = {"acc,a": 0.5, "acc_stderr,a": 0.1, "acc,b": 0.6, "acc_stderr,b": "N/A"}
    assert task_metrics(figures, {}) == (Metric("acc", "a", 0.5, 0.1, True), Metric("acc", "b", 0.6, None, True))


def test_the_known_directions_are_lm_evals() -> None:
    names = set(registry.higher_is_better_registry) - {PREDICT_ONLY}
    assert {name: registry.higher_is_better_registry[name] for name in names} == KNOWN_BETTER
