"""What lm-eval writes of one task -> metrics.

Every number counts, whether or not the file says which direction is better. What stands in place of a number does not:
text, lists and null are metrics without a value, and a placeholder is no metric. The shapes of lm-eval 0.4.13's tasks
are in ``tests/report/test_metric_values.py``. Knows one task at a time; groups are `averages`'.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lm_eval_kvpress.report.cell import Metric

# lm-eval writes this name and 999 in place of every metric under --predict_only.
PREDICT_ONLY = "bypass"
# RULER declares a metric per length and writes this for each that was not run (`tasks/ruler/common_utils.py`).
NOT_RUN = -1
ALL_LENGTHS = "all_lengths"
# For files that do not say (lm-eval to 0.4.2): `HIGHER_IS_BETTER_REGISTRY` of `lm_eval/api/registry.py`.
KNOWN_BETTER = {
    **dict.fromkeys(("acc", "acc_norm", "acc_mutual_info", "acc_bytes", "acc_all", "exact_match", "likelihood"), True),
    **dict.fromkeys(("mcc", "f1", "bleu", "chrf", "chrf++"), True),
    **dict.fromkeys(("brier_score", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "ter"), False),
}


def task_metrics(figures: Mapping[str, Any], better: Mapping[str, Any]) -> tuple[Metric, ...]:
    """The metrics of a task, and the mean over its lengths if several were run.

    Args:
        figures: metrics under ``name,filter``, among other keys.
        better: whether higher is better, by name.
    """
    known = {**KNOWN_BETTER, **{name: value for name, value in better.items() if isinstance(value, bool)}}
    of_lengths = {value for name, value in known.items() if name.isdecimal()}
    of_length = of_lengths.pop() if len(of_lengths) == 1 else None  # RULER names no direction for those below 4,096
    metrics = [
        replace(metric, higher_is_better=known.get(name, of_length if metric.is_length else None))
        for name, metric in _numbers(figures)
        if not (metric.is_length and metric.value == NOT_RUN)
    ]
    return *metrics, *means_over_lengths(metrics)


def means_over_lengths(metrics: Iterable[Metric]) -> Iterator[Metric]:
    """The mean over all lengths under each filter that has several."""
    lengths: dict[str, list[Metric]] = defaultdict(list)
    for metric in metrics:
        if metric.is_length:
            lengths[metric.filter].append(metric)
    for filter, found in lengths.items():
        values = [metric.value for metric in found if metric.value is not None]
        if len(values) == len(found) > 1:
            names = tuple(metric.name for metric in found)
            yield Metric(ALL_LENGTHS, filter, mean(values), None, found[0].higher_is_better, names)


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of infinities of both signs, for which `statistics.fmean` raises."""
    return sum(values) / len(values)


def number(value: Any) -> float | None:
    """A float, NaN and infinities included; None for null, text such as "N/A", booleans and lists."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _numbers(figures: Mapping[str, Any]) -> Iterator[tuple[str, Metric]]:
    """Each metric with the name under which its direction is known; a dictionary's items are metrics of their own."""
    for key, value in figures.items():
        name, comma, filter = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        if isinstance(value, Mapping):
            yield from ((name, Metric(f"{name}_{item}", filter, number(one))) for item, one in value.items())
        else:
            yield name, Metric(name, filter, number(value), number(figures.get(f"{name}_stderr,{filter}")))
