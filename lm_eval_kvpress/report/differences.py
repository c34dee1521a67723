"""Differences of runs to their baseline, with the 95 % interval of a paired bootstrap over documents.

A difference needs both figures; its interval also needs the samples of both runs, over the same documents, from which
one and the same aggregation reproduces both figures. Knows cells and samples, no tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np

from lm_eval_kvpress.report.bootstrap import paired_intervals
from lm_eval_kvpress.report.cell import Cell, Task
from lm_eval_kvpress.report.metrics import MetricKey
from lm_eval_kvpress.report.samples import Aggregation, Samples, Scores, aggregation, read_samples


@dataclass(frozen=True)
class Difference:
    """A figure less the baseline's; ``low`` and ``high`` bound its interval, None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None
    num_documents: int | None = None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval where both ends are finite, as a plot needs it."""
        if self.low is None or self.high is None or not math.isfinite(self.low + self.high):
            return None
        return self.low, self.high


class Comparison:
    """Compares runs with one baseline. Reads each file of samples once."""

    def __init__(self, baseline: Cell):
        self.baseline = baseline
        self._read: dict[Path, dict[str, Samples]] = {}

    def differences(self, cells: Sequence[Cell], metrics: Sequence[MetricKey]) -> list[dict[MetricKey, Difference]]:
        """For each cell, its differences to the baseline by metric; counts have none."""
        differences: list[dict[MetricKey, Difference]] = [{} for _ in cells]
        for key in metrics:
            base = key.find(self.baseline)
            if base is None or not _is_number(base.value) or key.higher_is_better is None:
                continue
            bounds = self._bounds(cells, key)
            for index, cell in enumerate(cells):
                own = key.find(cell)
                if own is not None and _is_number(own.value):
                    differences[index][key] = Difference(own.value - base.value, *bounds.get(index, ()))
        return differences

    def has_same_answers(self, cell: Cell) -> bool:
        """Whether every logged answer to every task is the baseline's."""
        pairs = [(task, self.baseline.task(task.name)) for task in cell.tasks]
        return bool(pairs) and all(
            other is not None and self._answers(task) == self._answers(other) != {} for task, other in pairs
        )

    def _bounds(self, cells: Sequence[Cell], key: MetricKey) -> dict[int, tuple[float, float, int]]:
        """Lower bound, upper bound and number of documents by the index of the cell, where there is an interval."""
        base = self._samples(self.baseline, key)
        aggregate = _aggregation(self.baseline, base, key)
        if base is None or aggregate is None or len(base.documents) < 2:
            return {}
        compared: dict[int, Scores] = {}
        for index, cell in enumerate(cells):
            own = self._samples(cell, key)
            if own is not None and own.documents == base.documents and _aggregation(cell, own, key) is aggregate:
                compared[index] = own.scores[key.name]
        if not compared:
            return {}
        scores = [base.scores[key.name], *compared.values()]
        numerators = np.stack([score.numerators for score in scores], 1)  # (documents, runs)
        denominators = np.stack([score.denominators for score in scores], 1)
        low, high = paired_intervals(numerators, denominators, 0, aggregate)
        return {
            index: (float(low[column]), float(high[column]), len(base.documents))
            for column, index in enumerate(compared, start=1)
            if not np.isnan(low[column])
        }

    def _samples(self, cell: Cell, key: MetricKey) -> Samples | None:
        task = cell.task(key.task)
        return None if task is None else self._samples_by_filter(task).get(key.filter)

    def _answers(self, task: Task) -> dict[str, int]:
        return {filter: samples.answers for filter, samples in self._samples_by_filter(task).items()}

    def _samples_by_filter(self, task: Task) -> dict[str, Samples]:
        if task.samples is None:
            return {}
        if task.samples not in self._read:
            self._read[task.samples] = read_samples(task.samples)
        return self._read[task.samples]


def _aggregation(cell: Cell, samples: Samples | None, key: MetricKey) -> Aggregation | None:
    """The aggregation that makes the cell's figure from its samples, or None."""
    metric = key.find(cell)
    if metric is None or samples is None or key.name not in samples.scores:
        return None
    return aggregation(samples.scores[key.name], metric.value)


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and not np.isnan(value)
