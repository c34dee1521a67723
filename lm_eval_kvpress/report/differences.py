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

from lm_eval_kvpress.bootstrap import paired_intervals
from lm_eval_kvpress.report.cell import Cell, Task
from lm_eval_kvpress.report.changes import Changes, answered, judged
from lm_eval_kvpress.report.metrics import MetricKey
from lm_eval_kvpress.report.samples import Aggregation, DocumentKey, Samples, Scores, aggregation, read_samples


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


@dataclass(frozen=True)
class FigureScores:
    """What a figure is made of: its documents, their scores, and how the one comes from the others."""

    documents: tuple[tuple[str, int, str], ...]  # task, lm-eval's doc_id and its hash of the document
    scores: Scores
    aggregate: Aggregation


class Comparison:
    """Compares runs with one baseline. Reads each file of samples once."""

    def __init__(self, baseline: Cell):
        self.baseline = baseline
        self._read: dict[Path, dict[str, Samples]] = {}

    def differences(self, cells: Sequence[Cell], metrics: Sequence[MetricKey]) -> list[dict[MetricKey, Difference]]:
        """For each cell, its differences to the baseline by metric."""
        differences: list[dict[MetricKey, Difference]] = [{} for _ in cells]
        for key in metrics:
            base = key.find(self.baseline)
            if base is None or not _is_number(base.value):
                continue
            bounds = self._bounds(cells, key)
            for index, cell in enumerate(cells):
                own = key.find(cell)
                if own is not None and _is_number(own.value) and _is_number(change := own.value - base.value):
                    differences[index][key] = Difference(change, *bounds.get(index, ()))
        return differences

    def has_same_answers(self, cell: Cell) -> bool | None:
        """Whether every logged answer is the baseline's, sample by sample; None where they cannot be compared."""
        pairs = [(task, self.baseline.task(task.name)) for task in cell.tasks]
        answers = [(self._answers(task), {} if other is None else self._answers(other)) for task, other in pairs]
        if any(own and base and own != base for own, base in answers):
            return False
        return True if answers and all(own and base for own, base in answers) else None

    def changes(self, cell: Cell, metrics: Sequence[MetricKey]) -> Changes:
        """What became of the answers to the documents that both runs logged, over all tasks but texts to score."""
        total = Changes()
        for task in cell.tasks:
            base = self.baseline.task(task.name)
            keys = [key for key in metrics if key.task == task.name and key.is_main and not key.members]
            if base is not None and keys and not task.is_rolling:
                total += self._task_changes(cell, task, base, keys[-1])  # the mean over lengths stands last
        return total

    def _task_changes(self, cell: Cell, task: Task, base: Task, key: MetricKey) -> Changes:
        own, other = (self._samples_by_filter(one).get(key.filter) for one in (task, base))
        if own is None or other is None or own.documents != other.documents:
            return Changes()
        scores = [self._task_scores(one, task.name, key) for one in (cell, self.baseline)]
        total = answered(own.answers, other.answers)
        return total if None in scores else total + judged(*(found for _, found in filter(None, scores)))

    def _bounds(self, cells: Sequence[Cell], key: MetricKey) -> dict[int, tuple[float | None, float | None, int]]:
        """Lower bound, upper bound and number of documents by the index of the cell, where documents are paired.

        Documents of which none changed do not bound how many of the others would: they give no interval.
        """
        base = self._scores(self.baseline, key)
        if base is None or len(base.documents) < 2:
            return {}
        compared: dict[int, FigureScores] = {}
        for index, cell in enumerate(cells):
            own = self._scores(cell, key)
            if own is not None and (own.documents, own.aggregate) == (base.documents, base.aggregate):
                compared[index] = own
        if not compared:
            return {}
        scores = [one.scores for one in (base, *compared.values())]
        numerators = np.stack([score.numerators for score in scores], 1)  # (documents, runs)
        denominators = np.stack([score.denominators for score in scores], 1)
        low, high = paired_intervals(numerators, denominators, 0, base.aggregate)
        return {
            index: (
                *((float(low[column]), float(high[column])) if low[column] < high[column] else (None, None)),
                len(base.documents),
            )
            for column, index in enumerate(compared, start=1)
            if not np.isnan(low[column])
        }

    def _scores(self, cell: Cell, key: MetricKey) -> FigureScores | None:
        """What a figure is made of: the documents of its tasks behind each other, its metrics summed."""
        metric = key.find(cell)
        parts = [self._task_scores(cell, task, key) for task in key.sampled_tasks]
        known = [part for part in parts if part is not None]
        if metric is None or len(known) < len(parts):
            return None
        scores = Scores(
            np.concatenate([scores.numerators for _, scores in known]),
            np.concatenate([scores.denominators for _, scores in known]),
        )
        aggregate = aggregation(scores, metric.value)
        documents = tuple(
            (task, *one) for task, (found, _) in zip(key.sampled_tasks, known, strict=True) for one in found
        )
        return None if aggregate is None else FigureScores(documents, scores, aggregate)

    def _task_scores(self, cell: Cell, name: str, key: MetricKey) -> tuple[tuple[DocumentKey, ...], Scores] | None:
        task = cell.task(name)
        samples = None if task is None else self._samples_by_filter(task).get(key.filter)
        if samples is None or not set(key.sampled_metrics) <= samples.scores.keys():
            return None
        scores = [samples.scores[one] for one in key.sampled_metrics]
        numerators, denominators = (
            sum(getattr(one, part) for one in scores) for part in ("numerators", "denominators")
        )
        return samples.documents, Scores(numerators, denominators)

    def _answers(self, task: Task) -> dict[str, tuple[tuple[DocumentKey, ...], int]]:
        return {name: (samples.documents, samples.checksum) for name, samples in self._samples_by_filter(task).items()}

    def _samples_by_filter(self, task: Task) -> dict[str, Samples]:
        if task.samples is None:
            return {}
        if task.samples not in self._read:
            self._read[task.samples] = read_samples(task.samples)
        return self._read[task.samples]


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and not np.isnan(value)
