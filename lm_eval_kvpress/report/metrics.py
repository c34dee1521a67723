"""Which metrics the rows of a table have, and which ones lead each task and group of tasks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lm_eval_kvpress.report.cell import Cell, Metric

# The first of these that a task has is its leading metric; otherwise its first metric that has a better direction.
LEADING = ("pressed_token_perplexity", "acc_norm", "acc", "exact_match")
AT_DISTANCE = re.compile(r"(acc|exact_match)_at_(?P<distance>\d+)")  # not mbpp's pass_at_1


@dataclass(frozen=True)
class MetricKey:
    """One metric of a table.

    Attributes:
        task: or the group of tasks.
        is_main: whether it is a leading one of its task.
        members: the tasks of a group; a row that ran others has no figure.
        averaged: the metrics whose mean it is, if it is one (`Metric.averaged`); a mean of others is another figure.
    """

    task: str
    name: str
    filter: str
    higher_is_better: bool | None
    is_main: bool = False
    members: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()

    @property
    def distance(self) -> int | None:
        """In tokens, for metrics such as ``acc_at_800``."""
        match = AT_DISTANCE.fullmatch(self.name)
        return int(match["distance"]) if match else None

    @property
    def is_length(self) -> bool:
        """Whether it is of documents of one length, as RULER's metrics are, or the mean over all lengths."""
        return self.name.isdecimal() or bool(self.averaged)

    @property
    def full_name(self) -> str:
        """``task.metric``, with the filter if there is one."""
        return f"{self.task}.{self.name}" + ("" if self.filter == "none" else f",{self.filter}")

    @property
    def sampled_tasks(self) -> tuple[str, ...]:
        """The tasks over whose documents it is a figure."""
        return self.members or (self.task,)

    @property
    def sampled_metrics(self) -> tuple[str, ...]:
        """The metrics of their samples that it is made of."""
        return self.averaged or (self.name,)

    def find(self, cell: Cell) -> Metric | None:
        """The cell's figure of this metric."""
        found = cell.group(self.task) if self.members else cell.task(self.task)
        members = getattr(found, "members", ())
        metrics = () if found is None or members != self.members else found.metrics
        own = self.name, self.filter, self.averaged
        return next((metric for metric in metrics if (metric.name, metric.filter, metric.averaged) == own), None)


def metric_keys(task: str, cells: Sequence[Cell]) -> list[MetricKey]:
    """The task's metrics in the order of the files; under several filters the first one's metric leads."""
    found = [one.metrics for cell in cells for one in cell.tasks if one.name == task]
    return _led(_keys(task, (), found))


def group_keys(group: str, cells: Sequence[Cell]) -> list[MetricKey]:
    """The averages of a group over the tasks of the row that ran most of them."""
    found = [one for cell in cells for one in cell.groups if one.name == group]
    members = max((one.members for one in found), key=lambda names: (len(names), names), default=())
    return _led(_keys(group, members, [one.metrics for one in found if one.members == members]))


def _keys(task: str, members: tuple[str, ...], found: Iterable[Sequence[Metric]]) -> list[MetricKey]:
    keys: dict[tuple[str, str], MetricKey] = {}
    for metric in (metric for metrics in found for metric in metrics):
        known = keys.get((metric.name, metric.filter))
        better = metric.higher_is_better if known is None or known.higher_is_better is None else known.higher_is_better
        averaged = metric.averaged if known is None else known.averaged
        key = MetricKey(task, metric.name, metric.filter, better, members=members, averaged=averaged)
        keys[metric.name, metric.filter] = key
    return list(keys.values())


def _led(keys: Sequence[MetricKey]) -> list[MetricKey]:
    """The metrics, those that lead marked: every length, or else one."""
    lengths = [key for key in keys if key.is_length]
    directed = [key for key in keys if key.higher_is_better is not None] or keys
    first = sorted(directed, key=lambda key: LEADING.index(key.name) if key.name in LEADING else len(LEADING))[:1]
    return [replace(key, is_main=key in (lengths or first)) for key in keys]
