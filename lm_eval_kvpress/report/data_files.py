"""A report as data for programs, CSV and JSON: every metric, in full precision.

What is missing is empty in CSV and null in JSON. NaN stays ``NaN`` in CSV; in JSON, which has no NaN, it is a string.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from lm_eval_kvpress.report.contents import Report, ReportRow, ReportTable
from lm_eval_kvpress.report.fidelity import Place
from lm_eval_kvpress.report.loss_curves import Curve

# What a spreadsheet takes for a formula: https://owasp.org/www-community/attacks/CSV_Injection
FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
KEPT_SHARES = ("share", "share_min_layer", "share_max_layer")


def as_csv(report: Report) -> str:
    """All tables below each other; the column ``table`` tells them apart."""
    records = [record(table, row) for table, row in _rows(report)]
    stream = io.StringIO()
    fields = list(dict.fromkeys(key for one in records for key in one))
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(map(_csv_value, fields))
    writer.writerows([_csv_value(one.get(field)) for field in fields] for one in records)
    return stream.getvalue()


def as_json(report: Report) -> str:
    """The records under ``rows``, with the curves of streams; what is said of each table under ``tables``."""
    tables = [
        {
            "table": table.number,
            "notices": list(table.notices),
            "documents": dict(table.num_documents),
            **asdict(table.setting),
        }
        for table in report.tables
    ]
    rows = [
        {
            **{key: _json_value(value) for key, value in record(table, row).items()},
            "curves": [_curve(curve) for curve in row.curves],
            "kl_places": [] if row.cell is None else [_place(place) for place in row.cell.kl_places],
        }
        for table, row in _rows(report)
    ]
    content = {"title": report.title, "date": report.date, "version": report.version, "tables": tables, "rows": rows}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def record(table: ReportTable, row: ReportRow) -> dict[str, Any]:
    """A row as one flat record; a baseline that nobody ran has its setting and nothing else."""
    return {
        "table": table.number,
        "checkpoint": table.setting.checkpoint,
        "dtype": table.setting.dtype,
        "protocol": table.protocol,
        "is_baseline": row.is_baseline,
        "was_run": row.cell is not None,
        "arguments": row.arguments,
        **{key: entry.value for key, entry in row.entries.items()},
        **_differences(table, row),
        **_kept_by_task(row),
        **_bounds(table, row),
        **_speed_bounds(row),
        "machine": None if row.cell is None else row.cell.speed.machine,
        "score_tokens_per_sec": None if row.cell is None else row.cell.speed.score_tokens_per_sec,
        "versions": "" if row.cell is None else " ".join("=".join(pair) for pair in row.cell.versions),
        "marks": "; ".join(f"{mark.label}: {mark.text}" for mark in row.marks),
        "file": None if row.cell is None else str(row.cell.file),
    }


def _rows(report: Report) -> Iterator[tuple[ReportTable, ReportRow]]:
    for table in report.tables:
        for row in table.rows:
            yield table, row


def _differences(table: ReportTable, row: ReportRow) -> dict[str, float | None]:
    fields: dict[str, float | None] = {}
    for column in table.metric_columns:
        difference = row.entries[column.key].difference
        fields[f"{column.key}_difference"] = difference.value if difference else None
        fields[f"{column.key}_difference_low"] = difference.low if difference else None
        fields[f"{column.key}_difference_high"] = difference.high if difference else None
        fields[f"{column.key}_num_paired_documents"] = difference.num_documents if difference else None
    return fields


def _kept_by_task(row: ReportRow) -> dict[str, float | None]:
    tasks = () if row.cell is None else row.cell.tasks
    kept_by_task = [(task.name, task.kept) for task in tasks if task.kept is not None]
    return {f"{task}.kept_{name}": getattr(kept, name) for task, kept in kept_by_task for name in KEPT_SHARES}


def _bounds(table: ReportTable, row: ReportRow) -> dict[str, float | None]:
    """Of columns that may have an interval of their own, speeds apart."""
    fields: dict[str, float | None] = {}
    for column in table.columns:
        if column.bounds is not None:
            low, high = row.entries[column.key].bounds or (None, None)
            fields |= {f"{column.key}_low": low, f"{column.key}_high": high}
    return fields


def _speed_bounds(row: ReportRow) -> dict[str, float]:
    bounds = () if row.cell is None else row.cell.speed.bounds
    return {f"{name}_{end}": one[i] for name, one in bounds for i, end in enumerate(("low", "high"))}


def _csv_value(value: Any) -> Any:
    """NaN by its name; text that a spreadsheet would run as a formula, quoted."""
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULAS) else value


def _json_value(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _place(place: Place) -> dict[str, Any]:
    return {**asdict(place), "kl_mean": _json_value(place.kl_mean)}


def _curve(curve: Curve) -> dict[str, Any]:
    return {**asdict(curve), "perplexities": [_json_value(perplexity) for perplexity in curve.perplexities]}
