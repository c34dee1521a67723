"""Tables as one self-contained page: opens from disk, asks for nothing from a network.

The sortable tables are DataTables and the plots are Plotly, both taken from the wheels of `itables` and `plotly` when
the page is made, so no minified code lies in this repository. Text from files is escaped by Jinja; what goes into a
script element is JSON without ``<``, ``>``, ``&`` and the line separators that JavaScript once refused.
"""

from __future__ import annotations

import base64
import json
import math
from importlib import resources
from typing import Any

from lm_eval_kvpress.report.columns import (
    Column,
    arguments,
    bytes_per_context,
    columns,
    interval,
    kept_share,
    press_name,
    series,
    shown,
    signed,
)
from lm_eval_kvpress.report.markdown import Report, all_marks, documents_words, heading, protocol_words
from lm_eval_kvpress.report.result_files import ResultsError
from lm_eval_kvpress.report.rows import Row, Table

# Of each plot: its name in the script, its title and its horizontal axis.
PLOTS = (
    ("bytes", "Quality against KV bytes", "KV allocated per context in MiB"),
    ("decode", "Quality against decode speed", "decode tokens per second"),
    ("kept", "Quality over the kept share", "measured kept share"),
    ("distance", "Recall over the distance", "distance in tokens"),
    ("position", "Perplexity over the position in the stream", "position in tokens"),
)
UNSAFE = {ord(one): f"\\u{ord(one):04x}" for one in "<>&\u2028\u2029"}


def html(report: Report) -> str:
    """The page.

    Raises:
        ResultsError: if the libraries of the `report` extra are not installed.
    """
    try:
        import itables  # noqa: F401 (its wheel holds DataTables)
        from jinja2 import Environment
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ResultsError(f"a page needs {error.name}: pip install 'lm-eval-kvpress[report]'") from error
    assets = resources.files(__package__) / "assets"
    bundle = resources.files("itables") / "html" / "dt_bundle.js"
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((assets / "page.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        tables=[_table(table, list(said)) for table, said in zip(report.tables, report.notices, strict=True)],
        plots=PLOTS,
        presses=list(dict.fromkeys(press_name(row) for table in report.tables for row in table.rows)),
        style=(assets / "page.css").read_text(encoding="utf-8"),
        script=(assets / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        datatables=base64.b64encode(bundle.read_bytes()).decode(),
        points=safe_json([_points(table) for table in report.tables]),
    )


def safe_json(value: Any) -> str:
    """JSON that stays inside its script element whatever the strings hold."""
    return json.dumps(value, allow_nan=False).translate(UNSAFE)


def _table(table: Table, said: list[str]) -> dict[str, Any]:
    marks = all_marks(table)
    of_table = columns(table, all_metrics=True)
    return {
        "heading": heading(table.setting),
        "protocol": protocol_words(table),
        "documents": documents_words(table),
        "notices": said,
        "columns": of_table,
        "groups": _groups(of_table),
        "rows": [
            {
                "press": press_name(row),
                "arguments": arguments(row),
                "is_baseline": row.is_baseline,
                "is_void": row.is_void,
                "marks": [(marks.index(mark) + 1, mark) for mark in row.marks],
                "cells": [_cell(column, row) for column in of_table],
            }
            for row in table.rows
        ],
        "marks": marks,
    }


def _groups(of_table: list[Column]) -> list[tuple[str, int, int]]:
    """Neighbours of one group: its name, its columns, and how many of these are shown at first."""
    groups: list[tuple[str, int, int]] = []
    for column in of_table:
        name, size, num_main = groups[-1] if groups and groups[-1][0] == column.group else (column.group, 0, 0)
        if size:
            groups.pop()
        groups.append((name, size + 1, num_main + column.is_main))
    return groups


def _cell(column: Column, row: Row) -> dict[str, Any]:
    value = column.value(row)
    difference = row.difference(column.metric) if column.metric else None
    is_number = isinstance(value, float) and math.isfinite(value)
    return {
        "text": shown(value, column.kind),
        "order": value if is_number or isinstance(value, str) else "",  # "" is missing: last in both directions
        "is_number": is_number,
        "is_main": column.is_main,
        "difference": "" if difference is None else signed(difference.value),
        "interval": "" if difference is None else interval(difference),
    }


def _points(table: Table) -> dict[str, Any]:
    """What the plots show: a point per run, and each metric's figures with their distance to the baseline."""
    metrics = [
        column for column in columns(table, all_metrics=True) if column.metric and column.higher_is_better is not None
    ]
    metrics.sort(key=lambda column: not column.is_main)
    return {
        "metrics": [
            {
                "name": one.key,
                "task": one.group,
                "better": one.higher_is_better,
                "distance": one.metric and one.metric.distance,
            }
            for one in metrics
        ],
        "rows": [
            {
                "press": press_name(row),
                "arguments": arguments(row),
                "series": series(row),
                "amount": _amount(row),
                "is_baseline": row.is_baseline,
                "void": ", ".join(mark.label for mark in row.marks if mark.is_void),
                "removed": row.cell.press.removed_asked,
                "kept": kept_share(row),
                "bytes": bytes_per_context(row, "bytes_allocated"),
                "decode": row.cell.speed.decode_tokens_per_sec,
                "values": [_finite(one.value(row)) for one in metrics],
                "bounds": [_bounds(one, row) for one in metrics],
                "curves": {
                    one.task: [
                        {"position": end, "perplexity": _finite(perplexity), "num_documents": num_documents}
                        for end, perplexity, num_documents in zip(
                            one.ends, one.perplexities, one.num_documents, strict=True
                        )
                    ]
                    for one in row.curves
                },
            }
            for row in table.rows
            if row.cell is not None
        ],
    }


def _amount(row: Row) -> str:
    """How much the press was asked to keep, in words: what runs have in common that a reader compares."""
    if row.cell is None or row.cell.press.is_none:
        return ""
    if row.cell.press.removed_asked is not None:
        return f"{100 * row.cell.press.removed_asked:g} % removed"
    facts = dict(row.cell.press.arguments)
    entries = facts.get("stream_budget", facts.get("kv_budget"))
    return "" if entries is None else f"{entries} entries kept"


def _bounds(column: Column, row: Row) -> list[float] | None:
    found = row.difference(column.metric) if column.metric else None
    if found is None or found.low is None or found.high is None or not math.isfinite(found.low + found.high):
        return None
    return [found.low, found.high]


def _finite(value: Any) -> float | None:
    return value if isinstance(value, float) and math.isfinite(value) else None
