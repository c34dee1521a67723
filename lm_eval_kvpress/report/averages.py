"""Averages over the tasks of a group, such as ``ruler``, ``longbench`` and ``mmlu``.

lm-eval's own averages stand in the results file. It has none of RULER's lengths but 4,096, and none at all where a
group's tasks were named one by one. Those of RULER and LongBench are made here, as lm-eval makes its own: means over
the tasks that ran, whatever their sizes. No other is: a mean over tasks whose author gave none, such as perplexities of
different texts, is nobody's figure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_kvpress.report.cell import Group, Metric, Task
from lm_eval_kvpress.report.metric_values import mean, means_over_lengths, task_metrics


@dataclass(frozen=True)
class Family:
    """A group whose tasks are known by their names.

    Attributes:
        tasks: a regular expression of the names.
        metric: of which the group has an average; None for all lengths that its tasks ran.
    """

    tasks: str
    metric: str | None = None

    def counts(self, task: Task) -> bool:
        """Whether a task is one of the family and has what is averaged."""
        has = any(one.is_length if self.metric is None else one.name == self.metric for one in task.metrics)
        return has and re.fullmatch(self.tasks, task.name) is not None


FAMILIES = {
    "ruler": Family("(niah|ruler)_.+"),
    "longbench": Family("longbench_.+(?<!_e)", "score"),
    "longbench_e": Family("longbench_.+_e", "score"),
    "longbench2": Family("longbench2_.+", "acc"),
}
"""Groups that get an average also where their tasks were named one by one."""


def group_members(content: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """The tasks below each group of a results file, whether or not they ran; tasks alone are no groups."""
    children: Mapping[str, Sequence[str]] = content.get("group_subtasks") or {}

    def leaves(name: str, above: frozenset[str]) -> frozenset[str]:
        below = children.get(name) or () if name not in above else ()
        return frozenset().union(*(leaves(child, above | {name}) for child in below)) if below else frozenset({name})

    named = [*(name for name, below in children.items() if below), *(content.get("groups") or {})]
    return {name: leaves(name, frozenset()) - {name} for name in named}


def groups(content: Mapping[str, Any], tasks: Sequence[Task]) -> Iterator[Group]:
    """The groups that have an average, with the tasks that ran and have one of its metrics."""
    members = group_members(content)
    for name, family in FAMILIES.items():
        counted = [task.name for task in tasks if family.counts(task)]
        if name not in members and len(counted) > 1:
            members[name] = frozenset(counted)
    for name, names in members.items():
        figures, better = ((content.get(part) or {}).get(name) or {} for part in ("results", "higher_is_better"))
        own = [metric for metric in task_metrics(figures, better) if not metric.averaged]
        ran = [task for task in tasks if task.name in names]
        made = [metric for metric in _means(name, ran) if (metric.name, metric.filter) not in _keys(own)]
        metrics = (*own, *made, *means_over_lengths([*own, *made]))
        counted = [task.name for task in ran if _keys(task.metrics) & _keys(metrics)]
        if metrics:
            yield Group(name, metrics, tuple(sorted(counted)))


def _means(group: str, tasks: Sequence[Task]) -> Iterator[Metric]:
    """The means over tasks of each length that all with lengths ran, or of the metric of a family."""
    averaged = FAMILIES.get(group, Family("")).metric
    found = [[one for one in task.metrics if one.is_length or one.name == averaged] for task in tasks]
    found = [metrics for metrics in found if metrics]
    for first in found[0] if found else ():
        alike = [metric for metrics in found for metric in metrics if _keys([metric]) == _keys([first])]
        values = [metric.value for metric in alike if metric.value is not None]
        if len(values) == len(found):
            yield Metric(first.name, first.filter, mean(values), None, first.higher_is_better)


def _keys(metrics: Sequence[Metric]) -> set[tuple[str, str]]:
    return {(metric.name, metric.filter) for metric in metrics}
