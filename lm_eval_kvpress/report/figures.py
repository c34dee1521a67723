"""Fidelity and the leading metric of each task as figures for papers: over the kept share, KV bytes and positions.

Where a run of the table packs its entries, there is a figure over the cache size, on which eviction and quantization
stand together.

Colours and markers are those of the page (`palette`). Bars are the 95 % interval of the difference to the baseline,
around the figure; those of fidelity are its own. Hollow points are rows that the report marks as not to be trusted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.report.contents import Report, ReportRow, ReportTable
from lm_eval_kvpress.report.palette import Style, styles

Styles = Mapping[str, Style]
DASHES = ("-", "--", ":", "-.")


class Looks:
    """How each line of a figure looks: the colour and marker of its press, and dashes that tell its lines apart.

    Args:
        by_press: the styles of the report.
    """

    def __init__(self, by_press: Styles) -> None:
        self._by_press, self._num_drawn = by_press, Counter[str]()

    def next(self, press: str) -> dict[str, Any]:
        """Of the next line of a press."""
        style, number = self._by_press[press], self._num_drawn[press]
        self._num_drawn[press] += 1
        dashes = DASHES[number % len(DASHES)]
        return {"color": style.color or "black", "marker": style.marker, "linestyle": dashes}


@dataclass(frozen=True)
class Axis:
    """A horizontal axis: where a row stands on it, None if nowhere."""

    name: str
    label: str
    position: Callable[[ReportRow], float | None]


def _mebibytes(row: ReportRow) -> float | None:
    size = row.number("kv_bytes_allocated")
    return None if size is None else size / 2**20


def _cache_size(row: ReportRow) -> float | None:
    return row.number("cache_size") if "cache_size" in row.entries else None  # where a run of the table packs


AXES = (
    Axis("kept", "measured kept share", lambda row: row.number("kept_share")),
    Axis("size", "cache size, fraction of the full one's bytes", _cache_size),
    Axis("bytes", "KV allocated per context in MiB", _mebibytes),
)


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    row: ReportRow
    bar: tuple[float, float]  # how far the interval goes below and above the figure


def write_figures(report: Report, folder: Path) -> list[Path]:
    """Writes ``TABLE_METRIC_AXIS``, ``TABLE_TASK_position`` and ``TABLE_kl_place`` as PNG and SVG.

    A table of one run has none.

    Raises:
        UsageError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("figures need matplotlib: pip install 'lm-eval-kvpress[report]'") from error
    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    by_press = styles(report)
    return [
        file
        for table in report.tables
        if len(table.rows) > 1
        for file in _table_figures(table, by_press, folder, f"table{table.number}")
    ]


def _table_figures(table: ReportTable, by_press: Styles, folder: Path, name: str) -> Iterator[Path]:
    for column in table.plotted_columns:
        if column.is_main:
            for axis in AXES:
                stem = folder / f"{name}_{_safe(column.key)}_{axis.name}"
                yield from _metric_figure(table, by_press, column.key, axis, stem)
    if any(row.cell is not None and row.cell.kl_places for row in table.rows):
        yield from _place_figure(table, by_press, folder / f"{name}_kl_place")
    for task in dict.fromkeys(curve.task for row in table.rows for curve in row.curves):
        yield from _position_figure(table, by_press, task, folder / f"{name}_{_safe(task)}_position")


def _metric_figure(table: ReportTable, by_press: Styles, metric: str, axis: Axis, stem: Path) -> list[Path]:
    """A metric over an axis, a line per press."""
    from matplotlib import pyplot

    lines = {name: list(_points(rows, axis, metric)) for name, rows in _rows_by_line(table).items()}
    if sum(map(len, lines.values())) < 2:  # streams have no kept share
        return []
    figure, axes = pyplot.subplots(figsize=(6.5, 3.4), layout="constrained")
    looks = Looks(by_press)
    for name, points in lines.items():
        if points:
            _draw_line(
                axes, name, sorted(points, key=lambda point: (point.x, point.y)), looks.next(points[0].row.press)
            )
    return _save(figure, axes, stem, axis.label, metric)


def _position_figure(table: ReportTable, by_press: Styles, task: str, stem: Path) -> list[Path]:
    """Perplexity over the position, a line per run."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 3.4), layout="constrained")
    looks = Looks(by_press)
    for row in table.rows:
        for curve in row.curves:
            if curve.task == task:
                name = _plain(f"{row.press} {row.own_arguments}".strip())
                axes.plot(curve.ends, curve.perplexities, label=name, **looks.next(row.press), markersize=3)
    axes.set_xscale("log", base=2)
    return _save(figure, axes, stem, "position in tokens", f"{task} perplexity")


def _place_figure(table: ReportTable, by_press: Styles, stem: Path) -> list[Path]:
    """KL from the full cache over the place after the context, a line per run."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 3.4), layout="constrained")
    looks = Looks(by_press)
    for row in table.rows:
        if row.cell is not None and not row.is_baseline and (places := row.cell.kl_places):
            name = _plain(" ".join(filter(None, (row.press, row.own_arguments, row.amount))))
            lasts, means = [place.last for place in places], [place.kl_mean for place in places]
            axes.plot(lasts, means, label=name, **looks.next(row.press), markersize=3)
    axes.set_xscale("log", base=2)
    return _save(figure, axes, stem, "tokens after the context", "KL from the full cache in nats")


def _rows_by_line(table: ReportTable) -> dict[str, list[ReportRow]]:
    """The rows of each line by its name: a press, with its arguments where the table has it with several."""
    series: dict[str, set[str]] = defaultdict(set)
    for row in table.rows:
        series[row.press].add(row.series)
    lines: dict[str, list[ReportRow]] = defaultdict(list)
    for row in table.rows:
        lines[_plain(row.series if len(series[row.press]) > 1 else row.press)].append(row)
    return lines


def _points(rows: Sequence[ReportRow], axis: Axis, metric: str) -> Iterator[Point]:
    for row in rows:
        x, y = axis.position(row), row.number(metric)
        if x is not None and y is not None:
            yield Point(x, y, row, _bar(row, metric))


def _bar(row: ReportRow, metric: str) -> tuple[float, float]:
    entry = row.entries[metric]
    difference = entry.difference
    if entry.bounds is not None and entry.number is not None:
        return entry.number - entry.bounds[0], entry.bounds[1] - entry.number
    if difference is None or difference.bounds is None:
        return 0.0, 0.0
    low, high = difference.bounds
    return max(0.0, difference.value - low), max(0.0, high - difference.value)


def _draw_line(axes: Any, name: str, points: Sequence[Point], look: Mapping[str, Any]) -> None:
    xs, ys = [point.x for point in points], [point.y for point in points]
    bars = list(zip(*(point.bar for point in points), strict=True))
    axes.errorbar(xs, ys, yerr=bars, label=name, **look, markersize=5, elinewidth=0.7)
    void = [(point.x, point.y) for point in points if point.row.is_void]
    if void:
        hollow = {**look, "linestyle": "none", "markerfacecolor": "white"}
        axes.plot(*zip(*void, strict=True), **hollow, markersize=5, zorder=5)


def _save(figure: Any, axes: Any, stem: Path, xlabel: str, ylabel: str) -> list[Path]:
    from matplotlib import pyplot

    axes.set(xlabel=xlabel, ylabel=_plain(ylabel))
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    files = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
    for file in files:
        part = file.with_name(f"{file.name}.part")
        figure.savefig(part, dpi=160, format=file.suffix[1:])
        part.replace(file)
    pyplot.close(figure)
    return files


def _plain(text: str) -> str:
    """Text from a file without formulas, which matplotlib writes between dollar signs."""
    return text.replace("$", r"\$")


def _safe(text: str) -> str:
    """Text as part of a file name."""
    return "".join(character if character.isalnum() or character in "._-" else "_" for character in text)
