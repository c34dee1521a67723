"""Builds the contents of a report from results files."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from lm_eval_kvpress import __version__
from lm_eval_kvpress.report.cell import BUDGETS, Press
from lm_eval_kvpress.report.change_columns import ANSWERS
from lm_eval_kvpress.report.column import Column
from lm_eval_kvpress.report.columns import table_columns
from lm_eval_kvpress.report.contents import Entry, Report, ReportRow, ReportTable
from lm_eval_kvpress.report.facts import model_facts
from lm_eval_kvpress.report.loss_curves import Curve, LossFolders
from lm_eval_kvpress.report.marks import Mark, row_marks
from lm_eval_kvpress.report.notices import shared_arguments, table_notices
from lm_eval_kvpress.report.ranking import column_key, rank_tables, with_columns
from lm_eval_kvpress.report.result_files import read_results
from lm_eval_kvpress.report.rows import Row, joined
from lm_eval_kvpress.report.tables import Table, build_tables

TITLE = "KV-cache compression"


def build_report(
    places: Sequence[Path],
    *,
    sort: Sequence[str] = (),
    title: str = TITLE,
    all_metrics: bool = False,
    columns: Sequence[str] = (),
) -> Report:
    """The report of all results below the places.

    Args:
        places: folders, or results files.
        sort: columns to rank by, the most important first; ``-column`` puts the worst first.
        title: of the page.
        all_metrics: whether tables for people show every metric, not only the leading one of each task.
        columns: those of tables for people, in order, behind the press; chosen by `all_metrics` and what runs say if
            empty.

    Raises:
        UsageError: for files that cannot be read and columns that do not exist.
    """
    tables = build_tables(read_results(places))
    losses = LossFolders.find([cell for table in tables for cell in table.cells], places)
    contents = [
        _table_contents(number, table, tables, losses, all_metrics) for number, table in enumerate(tables, start=1)
    ]
    if columns:
        contents = with_columns(contents, columns)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return Report(title, date, __version__, rank_tables(contents, sort), column_key(sort[0]) if sort else "")


def _table_contents(
    number: int, table: Table, tables: Sequence[Table], losses: LossFolders, all_metrics: bool
) -> ReportTable:
    columns = table_columns(table)
    curves = [() if row.cell is None else losses.curves(row.cell) for row in table.rows]
    return ReportTable(
        number=number,
        setting=table.setting,
        heading=_heading(number, table, tables),
        protocol=_protocol(table),
        facts=model_facts(table),
        documents=_documents(table),
        num_documents=dict(table.documents),
        notices=table_notices(table, curves),
        shared_arguments=shared_arguments(table),
        columns=columns,
        shown_columns=[column for column in columns if _is_shown(column, table, all_metrics=all_metrics)],
        rows=[
            _row_contents(row, columns, row_marks(row, table, tables), row_curves)
            for row, row_curves in zip(table.rows, curves, strict=True)
        ],
    )


def _is_shown(column: Column, table: Table, *, all_metrics: bool) -> bool:
    """Whether a table for people has a column: leading metrics, and what any run of the table says.

    What became of answers stands beside fidelity, which asks the same.
    """
    beside_fidelity = column.group == ANSWERS and any(cell.fidelities for cell in table.cells)
    if not (column.is_main or all_metrics or beside_fidelity):
        return False
    return any(column.value(row) is not None for row in table.rows)


def _row_contents(row: Row, columns: Sequence[Column], marks: tuple[Mark, ...], curves: tuple[Curve, ...]) -> ReportRow:
    return ReportRow(
        cell=row.cell,
        press=row.press,
        arguments=row.arguments,
        own_arguments=row.own_arguments,
        series=row.series,
        amount="" if row.cell is None else _amount(row.cell.press),
        is_baseline=row.is_baseline,
        entries={column.key: _entry(column, row) for column in columns},
        marks=marks,
        curves=curves,
    )


def _entry(column: Column, row: Row) -> Entry:
    value = column.value(row)
    difference = None if column.metric is None else row.difference(column.metric)
    if column.bounds is not None:
        bounds = column.bounds(row)
    else:
        bounds = None if row.cell is None else dict(row.cell.speed.bounds).get(column.key)
    return Entry(value, column.kind, difference, bounds)


# ------------------------------------------------------------------------------------------------------------ words


def _heading(number: int, table: Table, tables: Sequence[Table]) -> str:
    """Checkpoint and dtype; with the table's number where another has them too."""
    names = [f"{one.setting.checkpoint} · {one.setting.dtype}" for one in tables]
    own = names[number - 1]
    return own if names.count(own) == 1 else f"{own} · table {number}"


def _protocol(table: Table) -> str:
    """The protocol in one line; that of perplexities where there are any."""
    setting = table.setting
    if setting.is_stock:
        return "; ".join(filter(None, ("Stock lm-eval: one forward per request", joined(setting.model_settings))))
    facts = dict(setting.protocol)
    rest = [f"{name}={facts[name]}" for name in ("query_tokens", "short_context", "max_length") if name in facts]
    if "query_aware" in facts:
        names = ("query_aware", "question_pattern", "question_field")
        rest[:1] = [f"{name}={facts[name]}" for name in names if name in facts] + _held_back(table)
    rest += [f"{name}={value}" for name, value in setting.model_settings]
    has_perplexity = any(task.is_rolling for cell in table.cells for task in cell.tasks)
    return (f"Perplexity over {_rolling(facts)}; " if has_perplexity else "") + ", ".join(rest)


def _held_back(table: Table) -> list[str]:
    """How many tokens of each task's prompts were fed after compression, in words."""
    spreads = {task.name: task.held_back for cell in table.cells for task in cell.tasks if task.held_back is not None}
    return [
        f"{name}: {least:g} to {most:g} tokens held back (median {median:g})"
        for name, (least, median, most) in spreads.items()
    ]


def _rolling(facts: dict[str, str]) -> str:
    match facts.get("rolling", "?"):
        case "prefix":
            return f"prefix, {facts.get('rolling_context')} tokens prefilled and {facts.get('rolling_score')} scored"
        case "stream":
            return f"stream, chunks of {facts.get('stream_chunk')}, {facts.get('stream_positions')} positions"
        case rolling:
            return rolling


def _documents(table: Table) -> str:
    counts = [name if count is None else f"{name} ({count})" for name, count in table.documents]
    return "Documents: " + (", ".join(counts) or "none")


def _amount(press: Press) -> str:
    """How much the press was asked to keep: what runs have in common that a reader compares."""
    if not press.evicts:
        return press.packed_as
    if press.removed_asked is not None:
        return f"{100 * press.removed_asked:g} % removed"
    facts = dict(press.arguments)
    return next((f"{facts[name]} entries kept" for name in BUDGETS if name in facts), "")
