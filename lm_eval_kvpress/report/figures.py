"""The leading metric of each task as figures for papers: over the kept share and KV bytes, and streams' perplexities.

Bars are the 95 % interval of the difference to the baseline, around the figure. Hollow points are rows that the report
marks as not to be trusted.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_kvpress.report.columns import (
    Column,
    arguments,
    bytes_per_context,
    columns,
    kept_share,
    press_name,
    series,
)
from lm_eval_kvpress.report.markdown import Report
from lm_eval_kvpress.report.result_files import ResultsError
from lm_eval_kvpress.report.rows import Row, Table

AXES = {
    "kept": ("measured kept share", kept_share),
    "bytes": ("KV allocated per context in MiB", lambda row: _mebibytes(bytes_per_context(row, "bytes_allocated"))),
}


def write_figures(report: Report, folder: Path) -> list[Path]:
    """Writes ``TABLE_METRIC_AXIS`` and ``TABLE_TASK_position`` as PNG and SVG; a table of one run has none.

    Raises:
        ResultsError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ResultsError("figures need matplotlib: pip install 'lm-eval-kvpress[report]'") from error
    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    return [
        file
        for number, table in enumerate(report.tables, start=1)
        if len(table.rows) > 1
        for file in _figures(table, folder, f"table{number}")
    ]


def _figures(table: Table, folder: Path, name: str) -> Iterator[Path]:
    for column in columns(table):
        if column.metric is not None:
            for axis in AXES:
                yield from _pareto(table, column, axis, folder / f"{name}_{_file_name(column.key)}_{axis}")
    for task in dict.fromkeys(curve.task for row in table.rows for curve in row.curves):
        yield from _positions(table, task, folder / f"{name}_{_file_name(task)}_position")


def _pareto(table: Table, column: Column, axis: str, stem: Path) -> list[Path]:
    from matplotlib import pyplot

    label, place = AXES[axis]
    lines = {name: list(_points(rows, place, column)) for name, rows in _by_series(table).items()}
    if sum(map(len, lines.values())) < 2:  # streams have no kept share
        return []
    figure, axes = pyplot.subplots(figsize=(6.5, 3.4), layout="constrained")
    for name, points in lines.items():
        if points:
            _line(axes, name, sorted(points, key=lambda point: point[:2]), column)
    return _saved(figure, axes, stem, label, column.key)


def _points(
    rows: Sequence[Row], place: Callable[[Row], float | None], column: Column
) -> Iterator[tuple[float, float, Row]]:
    for row in rows:
        x, y = place(row), _number(column, row)
        if x is not None and y is not None:
            yield x, y, row


def _line(axes: Any, name: str, points: Sequence[tuple[float, float, Row]], column: Column) -> None:
    xs, ys, rows = zip(*points, strict=True)
    errors = list(zip(*(_reach(row, column) for row in rows), strict=True))
    style = "k*" if rows[0].is_baseline else "o-"
    drawn = axes.errorbar(xs, ys, yerr=errors, fmt=style, label=name, markersize=5, elinewidth=0.7)
    void = [(x, y) for x, y, row in points if row.is_void]
    if void:
        color = drawn[0].get_color()
        axes.plot(*zip(*void, strict=True), "o", markersize=5, color=color, markerfacecolor="white", zorder=5)


def _reach(row: Row, column: Column) -> tuple[float, float]:
    """How far the interval goes below and above the figure."""
    found = row.difference(column.metric) if column.metric else None
    if found is None or found.low is None or found.high is None or not math.isfinite(found.low + found.high):
        return 0.0, 0.0
    return max(0.0, found.value - found.low), max(0.0, found.high - found.value)


def _positions(table: Table, task: str, stem: Path) -> list[Path]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 3.4), layout="constrained")
    for row in table.rows:
        for curve in row.curves:
            if curve.task == task:
                name = _plain(f"{press_name(row)} {arguments(row)}".strip())
                axes.plot(curve.ends, curve.perplexities, "k-" if row.is_baseline else "-", label=name)
    axes.set_xscale("log", base=2)
    return _saved(figure, axes, stem, "position in tokens", f"{task} perplexity")


def _saved(figure: Any, axes: Any, stem: Path, xlabel: str, ylabel: str) -> list[Path]:
    from matplotlib import pyplot

    axes.set(xlabel=xlabel, ylabel=_plain(ylabel))
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    files = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=160)
    pyplot.close(figure)
    return files


def _by_series(table: Table) -> Mapping[str, list[Row]]:
    """Rows of one line by its name: a press, with its arguments where the table has it with several."""
    names: dict[str, set[str]] = defaultdict(set)
    for row in table.rows:
        names[press_name(row)].add(series(row))
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in table.rows:
        press = press_name(row)
        lines[_plain(series(row) if len(names[press]) > 1 else press)].append(row)
    return lines


def _mebibytes(size: float | None) -> float | None:
    return None if size is None else size / 2**20


def _plain(text: str) -> str:
    """No formulas in what came from a file."""
    return text.replace("$", r"\$")


def _number(column: Column, row: Row) -> float | None:
    value = column.value(row)
    return value if isinstance(value, float) and math.isfinite(value) else None


def _file_name(text: str) -> str:
    return "".join(one if one.isalnum() or one in "._-" else "_" for one in text)
