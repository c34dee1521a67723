"""A column of a table: what it takes from a row, in which unit, and what it means. Does not know which there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lm_eval_kvpress.report.cell import Cell
from lm_eval_kvpress.report.fidelity import Bounds
from lm_eval_kvpress.report.formatting import Kind, Value
from lm_eval_kvpress.report.metrics import MetricKey
from lm_eval_kvpress.report.rows import Row


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: its name in data files and for ``--sort``.
        title, group: its title, and the task of a metric or the kind of its neighbours.
        help: what it holds, in a sentence.
        higher_is_better: None where neither is.
        metric: set for columns of metrics, whose differences stand in the same place.
        is_main: False for what tables for people leave out without ``--all-metrics``.
        bounds: the 95 % interval of the value itself, where it has one.
        is_plotted: whether plots show it; those of metrics always do.
    """

    key: str
    title: str
    group: str
    kind: Kind
    value: Callable[[Row], Value]
    help: str
    higher_is_better: bool | None = None
    metric: MetricKey | None = None
    is_main: bool = True
    bounds: Callable[[Row], Bounds | None] | None = None
    is_plotted: bool = False

    @property
    def is_text(self) -> bool:
        return self.kind is Kind.TEXT

    @property
    def heading(self) -> str:
        return self.title if self.metric is None else f"{self.group} {self.title}"

    @property
    def arrow(self) -> str:
        """The better direction of a metric."""
        if self.metric is None or self.higher_is_better is None:
            return ""
        return "↑" if self.higher_is_better else "↓"


def of_cell(value: Callable[[Cell], Value]) -> Callable[[Row], Value]:
    """What a cell says; missing for a baseline that nobody ran."""
    return lambda row: None if row.cell is None else value(row.cell)
