"""Conditions under which a report fails (``--fail-if``), for continuous integration.

Knows the contents of a report. Does not know files or exit codes.
"""

from __future__ import annotations

import math
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.report.contents import Report, ReportRow, ReportTable
from lm_eval_kvpress.report.formatting import Kind
from lm_eval_kvpress.report.ranking import check_column

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
CONDITION = re.compile(r"\s*(?P<column>[^<>=]+?)\s*(?P<sign><=|>=|<|>)\s*(?P<bound>\S+)\s*")


@dataclass(frozen=True)
class Condition:
    """A row fails if its number in a column stands on this side of the bound.

    Attributes:
        text: as typed.
    """

    text: str
    column: str
    sign: str
    bound: float


def parse_condition(text: str) -> Condition:
    """Read ``COLUMN<NUMBER``, with ``<``, ``<=``, ``>`` or ``>=``.

    Raises:
        UsageError: in one line, if it is none.
    """
    found = CONDITION.fullmatch(text)
    try:
        bound = float(found["bound"]) if found else math.nan
    except ValueError:
        bound = math.nan
    if found is None or math.isnan(bound):
        raise UsageError(f"--fail-if {text!r} is no condition: write a column, < or > and a number: kl_mean>0.05")
    return Condition(text, found["column"], found["sign"], bound)


def failures(report: Report, conditions: Sequence[Condition]) -> list[str]:
    """Name in a line each row that meets a condition, or that has no number of its press to hold against it.

    The baseline is what others are compared with: where nobody ran it, it does not fail.

    Raises:
        UsageError: if no table has such a column, or if a bound of shares is none.
    """
    kinds = defaultdict[str, set[Kind]](set)
    for column in (column for table in report.tables for column in table.columns):
        kinds[column.key].add(column.kind)
    for condition in conditions:
        check_column(f"--fail-if {condition.text}", condition.column, sorted(kinds))
        if kinds[condition.column] == {Kind.SHARE} and not 0 <= condition.bound <= 1:
            raise UsageError(f"--fail-if {condition.text}: shares are fractions here: write a bound from 0 to 1")
    return [
        line
        for table in report.tables
        for row in table.rows
        if row.cell is not None
        for condition in conditions
        for line in _failure(table, row, condition)
    ]


def _failure(table: ReportTable, row: ReportRow, condition: Condition) -> Iterator[str]:
    entry = row.entries.get(condition.column)
    name = f"table {table.number}: {' '.join(filter(None, (row.press, row.details, row.amount)))}"
    if row.is_void:
        labels = ", ".join(mark.label for mark in row.marks if mark.is_void)
        yield f"{name}: has no figure of its press for {condition.text} ({labels})"
    elif entry is None or not isinstance(entry.value, float | int) or math.isnan(entry.value):
        if not row.is_baseline:
            yield f"{name}: has no number for {condition.text}"
    elif OPERATORS[condition.sign](entry.value, condition.bound):
        yield f"{name}: {condition.column} is {entry.value:.6g} ({condition.text})"
