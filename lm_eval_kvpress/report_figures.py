"""The leading metric of each task as figures for papers: over the kept share and over KV bytes, PNG and SVG."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from lm_eval_kvpress.report_columns import Column, bytes_per_context, columns, kept_share, press_name
from lm_eval_kvpress.report_table import Row, Table
from lm_eval_kvpress.report_text import Report
from lm_eval_kvpress.results import ResultsError

AXES = {
    "kept": ("measured kept share", kept_share),
    "bytes": ("KV bytes allocated per context", lambda row: bytes_per_context(row, "bytes_allocated")),
}


def write_figures(report: Report, folder: Path) -> list[Path]:
    """Writes ``TABLE_METRIC_AXIS.png`` and ``.svg``; a table of one run has none.

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
        for column in columns(table)
        if column.metric is not None and len(table.rows) > 1
        for axis in AXES
        for file in _figure(table, column, axis, folder / f"table{number}_{_file_name(column.key)}_{axis}")
    ]


def _figure(table: Table, column: Column, axis: str, stem: Path) -> list[Path]:
    from matplotlib import pyplot

    label, place = AXES[axis]
    by_press: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in table.rows:
        x, y = place(row), _number(column, row)
        if x is not None and y is not None:
            by_press[press_name(row)].append((x, y))
    figure, axes = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    for press, points in by_press.items():
        style = "k*" if press == "none" else "o-"
        axes.plot(*zip(*sorted(points), strict=True), style, label=press.replace("$", r"\$"), markersize=5)
    axes.set(xlabel=label, ylabel=column.key.replace("$", r"\$"))
    axes.grid(alpha=0.3)
    if by_press:
        axes.legend(frameon=False, fontsize="small")
    files = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=160)
    pyplot.close(figure)
    return files


def _number(column: Column, row: Row) -> float | None:
    value = column.value(row)
    return value if isinstance(value, float) else None


def _file_name(text: str) -> str:
    return "".join(one if one.isalnum() or one in "._-" else "_" for one in text)
