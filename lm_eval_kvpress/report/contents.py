"""The contents of a report: everything that a writer prints, computed once.

A writer takes a `Report` and decides only how it looks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lm_eval_kvpress.report.cell import Cell
from lm_eval_kvpress.report.column import Column
from lm_eval_kvpress.report.differences import Difference
from lm_eval_kvpress.report.formatting import Kind, Value, format_interval, format_signed, format_value
from lm_eval_kvpress.report.loss_curves import Curve
from lm_eval_kvpress.report.marks import Mark
from lm_eval_kvpress.report.tables import Setting


@dataclass(frozen=True)
class Entry:
    """What stands in one column of one row. The texts of the difference and its interval are empty without one."""

    value: Value
    kind: Kind
    difference: Difference | None = None
    bounds: tuple[float, float] | None = None  # of the value itself, as speeds have them

    @property
    def text(self) -> str:
        if self.bounds is None:
            return format_value(self.value, self.kind)
        low, high = (format_value(bound, self.kind) for bound in self.bounds)
        return f"{format_value(self.value, self.kind)} [{low}, {high}]"

    @property
    def number(self) -> float | None:
        """The value if it can be plotted."""
        return self.value if isinstance(self.value, float) and math.isfinite(self.value) else None

    @property
    def order(self) -> float | str:
        """What a page sorts by: a number or a text, empty where it is missing."""
        return self.value if isinstance(self.value, str) else "" if self.number is None else self.number

    @property
    def difference_text(self) -> str:
        return "" if self.difference is None else format_signed(self.difference.value, self.kind)

    @property
    def interval_text(self) -> str:
        return "" if self.difference is None else format_interval(self.difference, self.kind)


@dataclass(frozen=True)
class ReportRow:
    """A run.

    Attributes:
        cell: None for a baseline that nobody ran.
        arguments: of the press, with the seeds if they tell rows apart.
        own_arguments: those of them that rows of the same press differ in.
        series: the press and what tells it apart, except how much it keeps.
        amount: how much the press was asked to keep, in words.
        entries: by the key of the column.
        curves: perplexity over the position, for streams.
    """

    cell: Cell | None
    press: str
    arguments: str
    own_arguments: str
    series: str
    amount: str
    is_baseline: bool
    entries: Mapping[str, Entry]
    marks: tuple[Mark, ...]
    curves: tuple[Curve, ...]

    @property
    def is_void(self) -> bool:
        """Whether its figures are not those of the press that it names."""
        return any(mark.is_void for mark in self.marks)

    @property
    def details(self) -> str:
        """What stands behind the name of the press where a table has one line per row."""
        return "; ".join(detail for detail in ("baseline" if self.is_baseline else "", self.own_arguments) if detail)

    def number(self, key: str) -> float | None:
        """The value in a column if it can be plotted."""
        return self.entries[key].number


@dataclass(frozen=True)
class ReportTable:
    """Runs that may be compared.

    Attributes:
        number: from 1.
        heading, protocol, facts, documents: what all rows share, in words.
        num_documents: by task.
        shared_arguments: of presses, in one line, which the names in rows leave out; one of the notices.
        columns: with every metric.
        shown_columns: those of tables for people.
        rows: the baseline first.
    """

    number: int
    setting: Setting
    heading: str
    protocol: str
    facts: str
    documents: str
    num_documents: Mapping[str, int | None]
    notices: Sequence[str]
    shared_arguments: str
    columns: Sequence[Column]
    shown_columns: Sequence[Column]
    rows: Sequence[ReportRow]

    @cached_property
    def marks(self) -> list[Mark]:
        """Each mark once, in the order of the rows."""
        return list(dict.fromkeys(mark for row in self.rows for mark in row.marks))

    def mark_numbers(self, row: ReportRow) -> list[int]:
        """The numbers of the row's marks among those of the table, from 1."""
        return [self.marks.index(mark) + 1 for mark in row.marks]

    @property
    def filled_columns(self) -> list[Column]:
        """Columns of which some run says something, those of `shown_columns` among them."""
        shown = {column.key for column in self.shown_columns}
        return [
            column
            for column in self.columns
            if column.key in shown or any(row.entries[column.key].value is not None for row in self.rows)
        ]

    @property
    def metric_columns(self) -> list[Column]:
        return [column for column in self.columns if column.metric]

    @property
    def plotted_columns(self) -> list[Column]:
        """Columns that plots show: fidelity and metrics."""
        return [column for column in self.columns if column.metric or column.is_plotted]


@dataclass(frozen=True)
class Report:
    """Everything that a writer prints.

    Attributes:
        date: ISO 8601.
        version: this package's.
        opens_with: the column by which rows are ranked, with which plots open; empty without one.
    """

    title: str
    date: str
    version: str
    tables: Sequence[ReportTable]
    opens_with: str = ""
