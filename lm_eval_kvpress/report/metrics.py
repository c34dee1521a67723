"""Which metrics the rows of a table have, and which one leads each task."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lm_eval_kvpress.report.cell import Cell, Metric

# The first of these that a task has is its leading metric; otherwise its first metric that has a better direction.
LEADING = ("pressed_token_perplexity", "acc_norm", "acc", "exact_match")
AT_DISTANCE = re.compile(r".+_at_(?P<distance>\d+)")


@dataclass(frozen=True)
class MetricKey:
    """One metric of a table. ``is_main`` where it is the leading one of its task."""

    task: str
    name: str
    filter: str
    higher_is_better: bool | None
    is_main: bool = False

    @property
    def distance(self) -> int | None:
        """In tokens, for metrics such as ``acc_at_800``."""
        match = AT_DISTANCE.fullmatch(self.name)
        return int(match["distance"]) if match else None

    @property
    def full_name(self) -> str:
        """``task.metric``, with the filter if there is one."""
        return f"{self.task}.{self.name}" + ("" if self.filter == "none" else f",{self.filter}")

    def find(self, cell: Cell) -> Metric | None:
        """The cell's figure of this metric."""
        task = cell.task(self.task)
        metrics = () if task is None else task.metrics
        return next((metric for metric in metrics if (metric.name, metric.filter) == (self.name, self.filter)), None)


def metric_keys(task: str, cells: Sequence[Cell]) -> list[MetricKey]:
    """The task's metrics in the order of the files; under several filters the first one's metric leads."""
    found = {
        (metric.name, metric.filter): MetricKey(task, metric.name, metric.filter, metric.higher_is_better)
        for cell in cells
        for cell_task in cell.tasks
        if cell_task.name == task
        for metric in cell_task.metrics
    }
    if not found:
        return []
    keys = list(found.values())
    directed = [key for key in keys if key.higher_is_better is not None] or keys
    main = min(directed, key=lambda key: LEADING.index(key.name) if key.name in LEADING else len(LEADING))
    return [replace(key, is_main=key is main) for key in keys]
