"""Ranks the rows of tables by their columns (``--sort``), and chooses columns (``--columns``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.report.contents import ReportRow, ReportTable
from lm_eval_kvpress.report.formatting import Value


def rank_tables(tables: Sequence[ReportTable], keys: Sequence[str]) -> list[ReportTable]:
    """The tables, their rows ranked by columns: best first, the baseline on top and what is missing last.

    Args:
        keys: of columns, the most important first; ``-key`` puts the worst first.

    Raises:
        UsageError: if no table has such a column.
    """
    known = sorted({column.key for table in tables for column in table.columns})
    ranked = list(tables)
    for key in reversed(keys):  # sorting is stable: the least important first
        check_column(f"--sort {key}", column_key(key), known)
        ranked = [replace(table, rows=_ranked(table, key)) for table in ranked]
    return ranked


def with_columns(tables: Sequence[ReportTable], keys: Sequence[str]) -> list[ReportTable]:
    """The tables with these columns for people, in this order, the press before them.

    Args:
        keys: of columns; a table leaves out those that it has not.

    Raises:
        UsageError: if no table has such a column.
    """
    known = sorted({column.key for table in tables for column in table.columns})
    for key in keys:
        check_column(f"--columns {key}", key, known)
    wanted = list(dict.fromkeys(["press", *keys]))
    chosen = []
    for table in tables:
        by_key = {column.key: column for column in table.columns}
        shown = [by_key[key] for key in wanted if key in by_key]
        rest = [column for column in table.columns if column.key not in wanted]
        chosen.append(replace(table, shown_columns=shown, columns=[*shown, *rest]))
    return chosen


def check_column(what: str, name: str, known: Sequence[str]) -> None:
    """Refuse a column that no table has.

    Args:
        what: the option, as typed.
        name: of the column.
        known: all columns.

    Raises:
        UsageError: with a near name.
    """
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"{what}: no such column; {hint}columns: {', '.join(known)}")


def _ranked(table: ReportTable, key: str) -> Sequence[ReportRow]:
    name = column_key(key)
    column = next((column for column in table.columns if column.key == name), None)
    if column is None:  # another table has it
        return table.rows
    descending = bool(column.higher_is_better) != key.startswith("-")
    baseline, *others = table.rows
    known = [row for row in others if not _is_missing(row.entries[name].value)]
    missing = [row for row in others if _is_missing(row.entries[name].value)]
    return [baseline, *sorted(known, key=lambda row: row.entries[name].value, reverse=descending), *missing]  # type: ignore[arg-type,return-value]


def column_key(key: str) -> str:
    """The column that a key names, without the sign of its direction."""
    return key.lstrip("-+")


def _is_missing(value: Value) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
