"""Cells -> tables of what may be compared: one checkpoint, dtype and protocol, the same documents of every task.

Each table has one baseline, the uncompressed cache under the table's own protocol. If nobody ran it, a row says so.
Knows results and samples; not how a table looks.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TypeGuard

import numpy as np

from lm_eval_kvpress.report.bootstrap import intervals
from lm_eval_kvpress.report.result_files import SEEDS, STOCK_PROTOCOL, Cell, Metric, Task
from lm_eval_kvpress.report.samples import Samples, Scores, aggregation, read_samples

# Of several metrics of a task, the first of these leads; then the first that has a direction.
LEADING = ("pressed_token_perplexity", "acc_norm", "acc", "exact_match")
AT_DISTANCE = re.compile(r"(?P<metric>.+)_at_(?P<distance>\d+)")


@dataclass(frozen=True)
class MetricKey:
    """One metric column. ``distance`` is set for the curves over a distance, such as ``acc_at_800``."""

    task: str
    name: str
    filter: str
    higher_is_better: bool | None
    is_main: bool = False

    @property
    def distance(self) -> int | None:
        match = AT_DISTANCE.fullmatch(self.name)
        return int(match["distance"]) if match else None

    def of(self, cell: Cell) -> Metric | None:
        task = cell.task(self.task)
        metrics = () if task is None else task.metrics
        return next((one for one in metrics if (one.name, one.filter) == (self.name, self.filter)), None)


@dataclass(frozen=True)
class Difference:
    """A figure less the baseline's. Bounds are None where no samples were logged or nothing reproduces the figure."""

    value: float
    low: float | None = None
    high: float | None = None
    num_documents: int | None = None


@dataclass(frozen=True)
class Curve:
    """Perplexity over the position in one task's documents: each bin's last position, figure and documents in it."""

    task: str
    ends: tuple[int, ...]
    perplexities: tuple[float, ...]
    num_documents: tuple[int, ...]


@dataclass(frozen=True)
class Mark:
    """Why a row needs care; ``is_void`` where its figures are not those of the press that it names."""

    code: str
    label: str
    text: str
    is_void: bool = False


@dataclass(frozen=True)
class Row:
    """A run.

    Attributes:
        cell: None for a baseline that nobody ran.
        num_older, num_newer: files of the same setting that this one stands for.
        seeds: named if they are not those of all rows of the table.
    """

    cell: Cell | None
    is_baseline: bool
    num_older: int = 0
    num_newer: int = 0
    seeds: tuple[tuple[str, str], ...] = ()
    differences: Mapping[tuple[str, str, str], Difference] = field(default_factory=dict)
    answers_are_the_baselines: bool = False
    marks: tuple[Mark, ...] = ()
    curves: tuple[Curve, ...] = ()

    @property
    def is_void(self) -> bool:
        return any(mark.is_void for mark in self.marks)

    def metric(self, key: MetricKey) -> Metric | None:
        return None if self.cell is None else key.of(self.cell)

    def difference(self, key: MetricKey) -> Difference | None:
        return self.differences.get((key.task, key.name, key.filter))


@dataclass(frozen=True)
class Setting:
    """What all rows of a table share."""

    checkpoint: str
    dtype: str
    model_settings: tuple[tuple[str, str], ...]
    protocol: tuple[tuple[str, str], ...]

    @property
    def is_stock(self) -> bool:
        return self.protocol == STOCK_PROTOCOL


@dataclass(frozen=True)
class Table:
    """Rows that may be compared, the baseline first."""

    setting: Setting
    documents: tuple[tuple[str, int | None], ...]
    metrics: tuple[MetricKey, ...]
    rows: tuple[Row, ...]

    @property
    def baseline(self) -> Row:
        return self.rows[0]


def build_tables(cells: Sequence[Cell]) -> list[Table]:
    """Tables, the largest first; their rows by press and kept share."""
    by_setting: dict[Setting, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_setting[Setting(cell.checkpoint, cell.dtype, cell.model_settings, cell.protocol)].append(cell)
    tables = [
        _table(setting, group) for setting, alike in by_setting.items() for group in _of_the_same_documents(alike)
    ]
    return sorted(tables, key=lambda table: (table.setting.is_stock, -len(table.rows), str(table.setting)))


def _of_the_same_documents(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Groups that share a task and contradict each other in none; runs of other tasks or documents stand apart."""
    groups: list[tuple[dict[str, Task], list[Cell]]] = []
    for cell in sorted(cells, key=lambda cell: (-len(cell.tasks), str(cell.file))):
        own = {task.name: task for task in cell.tasks}
        for known, members in groups:
            shared = own.keys() & known.keys()
            if shared and all(_agree(known[name], own[name]) for name in shared):
                known.update({name: _with_what_is_known(task, known.get(name)) for name, task in own.items()})
                members.append(cell)
                break
        else:
            groups.append((own, [cell]))
    return [members for _, members in groups]


def _agree(one: Task, other: Task) -> bool:
    """Of two runs that logged samples the hashes decide; else what both say that they loaded may not differ."""
    if any(getattr(one, name) != getattr(other, name) for name in ("num_documents", "version", "num_fewshot")):
        return False
    if one.fingerprint is not None and other.fingerprint is not None:
        return one.fingerprint == other.fingerprint
    return None in (one.loaded, other.loaded) or one.loaded == other.loaded


def _with_what_is_known(task: Task, known: Task | None) -> Task:
    """So that a run which says nothing of its documents cannot bring together two that contradict each other."""
    if known is None:
        return task
    return replace(task, fingerprint=known.fingerprint or task.fingerprint, loaded=known.loaded or task.loaded)


def _table(setting: Setting, cells: Sequence[Cell]) -> Table:
    rows = sorted(_with_seeds(list(_newest(cells))), key=lambda row: _order(row.cell))
    tasks = {task.name: task for row in rows if row.cell for task in row.cell.tasks}
    metrics = tuple(key for name in tasks for key in _metric_keys(name, [row.cell for row in rows if row.cell]))
    baseline = max(
        (row for row in rows if row.cell and row.cell.press.is_none),
        key=lambda row: (len(row.cell.tasks), row.cell.date) if row.cell else (0, 0.0),
        default=Row(None, is_baseline=True),
    )
    rows = [replace(baseline, is_baseline=True), *(row for row in rows if row is not baseline)]
    documents = tuple((name, task.num_documents) for name, task in tasks.items())
    return Table(setting, documents, metrics, tuple(_with_differences(rows, metrics)))


def _newest(cells: Iterable[Cell]) -> Iterator[Row]:
    """Of several files of one setting, the one that counts, and how many it stands for."""
    alike: dict[object, list[Cell]] = defaultdict(list)
    for cell in cells:
        names = tuple(sorted(task.name for task in cell.tasks))
        alike[cell.press, cell.seeds, names, cell.device, cell.batch_size].append(cell)
    for files in alike.values():
        cell = _counting(files)
        num_newer = sum(_age(one) > _age(cell) for one in files)
        yield Row(cell, is_baseline=False, num_older=len(files) - 1 - num_newer, num_newer=num_newer)


def _counting(files: Sequence[Cell]) -> Cell:
    """The newest with figures, but the newest measured one where a later run only gave the same from a cache."""
    newest = max([one for one in files if any(task.metrics for task in one.tasks)] or files, key=_age)
    if not newest.unmeasured_tasks:
        return newest
    measured = [one for one in files if not one.unmeasured_tasks and _told(one) == _told(newest)]
    return max(measured, key=_age, default=newest)


def _age(cell: Cell) -> tuple[float, str]:
    return cell.date, str(cell.file)


def _told(cell: Cell) -> set[str]:
    """What a file says of the answers; as text, because NaN equals nothing."""
    return {
        f"{task.name} {task.samples is None} {metric.name},{metric.filter} {metric.value}"
        for task in cell.tasks
        for metric in task.metrics
    }


def _with_seeds(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows, their seeds named where these differ: one by its name, several as lm-eval's --seed takes them."""
    known = [dict(row.cell.seeds) for row in rows if row.cell and row.cell.seeds]
    differing = [name for name in SEEDS if len({seeds.get(name) for seeds in known}) > 1]
    twins = Counter(row.cell.press for row in rows if row.cell)
    for row in rows:
        pairs = row.cell.seeds if row.cell and differing else ()
        if row.cell and known and not row.cell.seeds and twins[row.cell.press] > 1:
            yield replace(row, seeds=(("seeds", "unknown"),))
        elif len(differing) == 1:
            yield replace(row, seeds=tuple(pair for pair in pairs if pair[0] in differing))
        else:
            values = [value for _, value in pairs]
            text = ",".join(values if len(set(values)) > 1 else values[:1])
            yield replace(row, seeds=(("seeds", text),) if text else ())


def _order(cell: Cell | None) -> tuple[object, ...]:
    assert cell is not None
    press = cell.press
    sizes = tuple((name, float(value)) for name, value in press.arguments if re.fullmatch(r"\d+(\.\d+)?", value))
    return (press.name, press.removed_asked or 0.0, sizes, press.arguments, cell.seeds, str(cell.file))


def _metric_keys(task: str, cells: Sequence[Cell]) -> list[MetricKey]:
    """The task's metrics in the order of the files; the leading one of the first filter is the main one."""
    found = {
        (metric.name, metric.filter): MetricKey(task, metric.name, metric.filter, metric.higher_is_better)
        for cell in cells
        for one in cell.tasks
        if one.name == task
        for metric in one.metrics
    }
    if not found:
        return []
    keys = list(found.values())
    directed = [key for key in keys if key.higher_is_better is not None] or keys
    main = min(directed, key=lambda key: LEADING.index(key.name) if key.name in LEADING else len(LEADING))
    return [replace(key, is_main=key is main) for key in keys]


# ---------------------------------------------------------------------------------------------------- differences


def _with_differences(rows: Sequence[Row], metrics: Sequence[MetricKey]) -> Iterator[Row]:
    """The rows with their differences to the first one."""
    baseline = rows[0]
    found: list[dict[tuple[str, str, str], Difference]] = [{} for _ in rows]
    for key in metrics:
        base = baseline.metric(key)
        if base is None or not _is_number(base.value) or key.higher_is_better is None:
            continue
        for index, bounds in enumerate(_bounds(rows, key)):
            own = rows[index].metric(key)
            if index and own is not None and _is_number(own.value):
                found[index][key.task, key.name, key.filter] = Difference(own.value - base.value, *bounds)
    for row, differences in zip(rows, found, strict=True):
        yield replace(row, differences=differences, answers_are_the_baselines=_same_answers(row, baseline))


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and not np.isnan(value)


def _bounds(rows: Sequence[Row], key: MetricKey) -> list[tuple[float | None, float | None, int | None]]:
    """Bootstrap bounds and the number of documents for each row; the first row is the baseline."""
    bounds: list[tuple[float | None, float | None, int | None]] = [(None, None, None)] * len(rows)
    base = _samples(rows[0], key)
    if base is None or key.name not in base.scores:
        return bounds
    metric = rows[0].metric(key)
    aggregate = aggregation(base.scores[key.name], metric.value if metric else None)
    if aggregate is None or len(base.documents) < 2:
        return bounds
    columns, scores = [0], [base.scores[key.name]]
    for index, row in enumerate(rows[1:], start=1):
        own, metric = _samples(row, key), row.metric(key)
        if own is None or metric is None or key.name not in own.scores or own.documents != base.documents:
            continue
        if aggregation(own.scores[key.name], metric.value) is aggregate:
            columns.append(index)
            scores.append(own.scores[key.name])
    low, high = intervals(*_stacked(scores), 0, aggregate)
    for place, index in enumerate(columns):
        if not np.isnan(low[place]):
            bounds[index] = (float(low[place]), float(high[place]), len(base.documents))
    return bounds


def _stacked(scores: Sequence[Scores]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([one.numerators for one in scores], 1), np.stack([one.denominators for one in scores], 1)


def _same_answers(row: Row, baseline: Row) -> bool:
    """Whether every logged answer to every task is the baseline's."""
    if row.cell is None or baseline.cell is None or row.is_baseline:
        return False
    pairs = [(task, baseline.cell.task(task.name)) for task in row.cell.tasks]
    return bool(pairs) and all(other is not None and _answers(task) == _answers(other) != {} for task, other in pairs)


def _answers(task: Task) -> dict[str, int]:
    return {} if task.samples is None else {name: one.answers for name, one in _read(task.samples).items()}


def _samples(row: Row, key: MetricKey) -> Samples | None:
    task = None if row.cell is None else row.cell.task(key.task)
    return None if task is None or task.samples is None else _read(task.samples).get(key.filter)


@cache
def _read(file: Path) -> dict[str, Samples]:
    return read_samples(file)
