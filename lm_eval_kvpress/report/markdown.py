"""Tables as text: Markdown and LaTeX for people, CSV and JSON for programs.

What came from a file is escaped for the format it goes into. Data files hold every metric in full precision; what is
missing is empty in CSV and null in JSON, NaN stays ``NaN`` in CSV and is a string in JSON, which has no NaN.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lm_eval_kvpress.report.columns import MISSING, Column, Kind, arguments, columns, interval, shown, signed
from lm_eval_kvpress.report.result_files import Kept
from lm_eval_kvpress.report.rows import Curve, Mark, Row, Setting, Table


@dataclass(frozen=True)
class Report:
    """Everything a page shows, made and ordered. ``notices`` has a list for each table."""

    title: str
    date: str
    version: str
    tables: tuple[Table, ...]
    notices: tuple[tuple[str, ...], ...]
    all_metrics: bool = False


# -------------------------------------------------------------------------------------------------------- headings


def heading(setting: Setting) -> str:
    return f"{setting.checkpoint} · {setting.dtype}"


def protocol_words(table: Table) -> str:
    """The protocol in one line; that of perplexities where there are any."""
    setting = table.setting
    if setting.is_stock:
        return "Stock lm-eval: one forward per request"
    facts = dict(setting.protocol)
    rolling = facts.get("rolling", "?")
    match rolling:
        case "prefix":
            rolling = f"prefix, {facts.get('rolling_context')} tokens prefilled and {facts.get('rolling_score')} scored"
        case "stream":
            rolling = f"stream, chunks of {facts.get('stream_chunk')}, {facts.get('stream_positions')} positions"
    rest = [f"{name}={facts[name]}" for name in ("query_tokens", "short_context", "max_length") if name in facts]
    settings = [f"{name}={value}" for name, value in setting.model_settings]
    has_perplexity = any(task.is_rolling for row in table.rows if row.cell for task in row.cell.tasks)
    return (f"Perplexity over {rolling}; " if has_perplexity else "") + ", ".join([*rest, *settings])


def documents_words(table: Table) -> str:
    counts = [name if count is None else f"{name} ({count})" for name, count in table.documents]
    return "Documents: " + (", ".join(counts) or "none")


def all_marks(table: Table) -> list[Mark]:
    """Each mark of the table once, in the order of the rows."""
    return list(dict.fromkeys(mark for row in table.rows for mark in row.marks))


# -------------------------------------------------------------------------------------------------------- Markdown


def markdown(report: Report) -> str:
    """YAML front matter, then a section per table."""
    return "\n".join([*front_matter(report), *(line for part in _markdown_parts(report) for line in part)]) + "\n"


def front_matter(report: Report) -> list[str]:
    """What static site generators read. JSON strings are YAML strings."""
    checkpoints = list(dict.fromkeys(table.setting.checkpoint for table in report.tables))
    fields = {"title": report.title, "date": report.date, "generator": f"lm-eval-kvpress {report.version}"}
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    return ["---", *lines, f"models: {json.dumps(checkpoints)}", "---", ""]


def _markdown_parts(report: Report) -> Iterator[list[str]]:
    for table, notices in zip(report.tables, report.notices, strict=True):
        shown_columns = columns(table, all_metrics=report.all_metrics)
        marks = all_marks(table)
        yield [f"## {_md(heading(table.setting))}", "", f"{_md(protocol_words(table))}.", ""]
        yield [
            f"{_md(documents_words(table))}. Differences to the baseline with 95 % intervals (paired bootstrap).",
            "",
        ]
        yield ["| " + " | ".join([*map(_md, _titles(shown_columns)), "Marks"]) + " |"]
        yield ["|" + "|".join([":--" if one.kind is Kind.TEXT else "--:" for one in shown_columns] + [":--"]) + "|"]
        for row in table.rows:
            numbers = ", ".join(str(marks.index(mark) + 1) for mark in row.marks) or MISSING
            yield ["| " + " | ".join([*(cell_text(one, row, _md) for one in shown_columns), numbers]) + " |"]
        yield [
            "",
            *(f"{number}. **{_md(mark.label)}**: {_md(mark.text)}" for number, mark in enumerate(marks, start=1)),
        ]
        yield ["", *(f"- {_md(notice)}" for notice in notices), ""]


def _titles(shown_columns: Sequence[Column]) -> list[str]:
    titles = [column.title if column.metric is None else f"{column.group} {column.title}" for column in shown_columns]
    arrows = {True: " ↑", False: " ↓", None: ""}
    return [
        title + (arrows[one.higher_is_better] if one.metric else "")
        for title, one in zip(titles, shown_columns, strict=True)
    ]


def cell_text(column: Column, row: Row, escape: Callable[[str], str]) -> str:
    """One cell in one line: a press with its arguments, a metric with its difference."""
    text = escape(shown(column.value(row), column.kind))
    if column.key == "press":
        details = [detail for detail in ("baseline" if row.is_baseline else "", arguments(row)) if detail]
        return f"{text} ({escape('; '.join(details))})" if details else text
    difference = row.difference(column.metric) if column.metric else None
    return text if difference is None else f"{text} ({f'{signed(difference.value)} {interval(difference)}'.strip()})"


def _md(text: str) -> str:
    """No Markdown, HTML or Liquid (the template language of static hosts) in what came from a file."""
    return " ".join(text.translate(_MARKDOWN).split())


_MARKDOWN = str.maketrans({one: f"&#{ord(one)};" for one in "&<>{}|`*[]\\~$!"})


# ------------------------------------------------------------------------------------------------------------- data


def records(report: Report) -> Iterator[dict[str, Any]]:
    """A flat record per row, with every metric; a baseline that nobody ran has its setting and nothing else."""
    for number, table in enumerate(report.tables, start=1):
        for row in table.rows:
            setting = table.setting
            yield {
                "table": number,
                "checkpoint": setting.checkpoint,
                "dtype": setting.dtype,
                "protocol": protocol_words(table),
                "is_baseline": row.is_baseline,
                "was_run": row.cell is not None,
                "arguments": arguments(row),
                **{column.key: column.value(row) for column in columns(table, all_metrics=True)},
                **_differences(table, row),
                **_kept_by_task(row),
                "score_tokens_per_sec": None if row.cell is None else row.cell.speed.score_tokens_per_sec,
                "versions": "" if row.cell is None else " ".join("=".join(pair) for pair in row.cell.versions),
                "marks": "; ".join(f"{mark.label}: {mark.text}" for mark in row.marks),
                "file": None if row.cell is None else str(row.cell.file),
            }


def _differences(table: Table, row: Row) -> dict[str, float | None]:
    fields: dict[str, float | None] = {}
    for column in columns(table, all_metrics=True):
        if column.metric is not None and column.metric.higher_is_better is not None:
            found = row.difference(column.metric)
            fields[f"{column.key}_difference"] = found.value if found else None
            fields[f"{column.key}_difference_low"] = found.low if found else None
            fields[f"{column.key}_difference_high"] = found.high if found else None
            fields[f"{column.key}_num_paired_documents"] = found.num_documents if found else None
    return fields


def _kept_by_task(row: Row) -> dict[str, float | None]:
    tasks = () if row.cell is None else row.cell.tasks
    kept: list[tuple[str, Kept]] = [(task.name, task.kept) for task in tasks if task.kept is not None]
    names = ("share", "share_min_layer", "share_max_layer")
    return {f"{task}.kept_{name}": getattr(one, name) for task, one in kept for name in names}


def as_csv(report: Report) -> str:
    """All tables below each other; the column ``table`` tells them apart."""
    rows = list(records(report))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _csv(value) for key, value in row.items()} for row in rows)
    return stream.getvalue()


def _csv(value: Any) -> Any:
    """NaN by its name; text that a spreadsheet would run as a formula, quoted."""
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def as_json(report: Report) -> str:
    """The records under ``rows``, with the curves of streams and what is said of each table under ``tables``."""
    tables = [
        {"table": number, "notices": list(notices), "documents": dict(table.documents), **asdict(table.setting)}
        for number, (table, notices) in enumerate(zip(report.tables, report.notices, strict=True), start=1)
    ]
    content = {"title": report.title, "date": report.date, "version": report.version, "tables": tables}
    runs = [row for table in report.tables for row in table.rows]
    rows = [
        {**{key: _json(value) for key, value in record.items()}, "curves": [_curve(one) for one in row.curves]}
        for record, row in zip(records(report), runs, strict=True)
    ]
    return json.dumps({**content, "rows": rows}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _curve(curve: Curve) -> dict[str, Any]:
    return {**asdict(curve), "perplexities": [_json(one) for one in curve.perplexities]}


def _json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
