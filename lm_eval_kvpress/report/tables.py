"""Cells -> tables of runs that may be compared: one checkpoint, dtype and protocol, the same documents of each task.

Each table has one baseline, the uncompressed cache under the table's own protocol. If nobody ran it, a row says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lm_eval_kvpress.report.cell import STOCK_PROTOCOL, Cell, Pairs, Task
from lm_eval_kvpress.report.differences import Comparison
from lm_eval_kvpress.report.metrics import MetricKey, group_keys, metric_keys
from lm_eval_kvpress.report.rows import Row, build_rows


@dataclass(frozen=True)
class Setting:
    """What all rows of a table share."""

    checkpoint: str
    dtype: str
    model_settings: Pairs
    protocol: Pairs

    @property
    def is_stock(self) -> bool:
        return self.protocol == STOCK_PROTOCOL


@dataclass(frozen=True)
class Table:
    """Rows that may be compared, the baseline first.

    ``documents`` counts those of each task. ``metrics`` are those of groups of tasks, then those of tasks.
    """

    setting: Setting
    documents: tuple[tuple[str, int | None], ...]
    metrics: tuple[MetricKey, ...]
    rows: tuple[Row, ...]

    @property
    def baseline(self) -> Row:
        return self.rows[0]

    @property
    def cells(self) -> list[Cell]:
        """The cells of all rows that were run."""
        return [row.cell for row in self.rows if row.cell is not None]


def build_tables(cells: Sequence[Cell]) -> list[Table]:
    """The tables of all cells, stock lm-eval last and the largest first.

    Raises:
        UsageError: if the samples of a run cannot be read.
    """
    by_setting: dict[Setting, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_setting[Setting(cell.checkpoint, cell.dtype, cell.model_settings, cell.protocol)].append(cell)
    tables = [_table(setting, group) for setting, alike in by_setting.items() for group in _by_documents(alike)]
    return sorted(tables, key=lambda table: (table.setting.is_stock, -len(table.rows), str(table.setting)))


def _table(setting: Setting, cells: Sequence[Cell]) -> Table:
    rows = build_rows(cells)
    ran = [row.cell for row in rows if row.cell is not None]
    tasks = {task.name: task for cell in ran for task in cell.tasks}
    groups = dict.fromkeys(group.name for cell in ran for group in cell.groups)
    metrics = (
        *(key for name in groups for key in group_keys(name, ran)),
        *(key for name in tasks for key in metric_keys(name, ran)),
    )
    documents = tuple((name, task.num_documents) for name, task in tasks.items())
    return Table(setting, documents, metrics, _compared(_baseline_first(rows), metrics))


def _baseline_first(rows: Sequence[Row]) -> list[Row]:
    """The rows behind their baseline: the run of ``press=none`` with most tasks, of several the newest."""
    baseline = max(
        (row for row in rows if row.cell and row.cell.press.is_none),
        key=lambda row: (len(row.cell.tasks), row.cell.date) if row.cell else (0, 0.0),
        default=Row(None),
    )
    return [replace(baseline, is_baseline=True), *(row for row in rows if row is not baseline)]


def _compared(rows: Sequence[Row], metrics: Sequence[MetricKey]) -> tuple[Row, ...]:
    """The rows with their differences to the first one, the baseline."""
    baseline, *others = rows
    if baseline.cell is None:
        return tuple(rows)
    comparison = Comparison(baseline.cell)
    cells = [row.cell for row in others if row.cell is not None]
    compared = [
        replace(
            row,
            differences=differences,
            has_same_answers=comparison.has_same_answers(cell),
            changes=comparison.changes(cell, metrics),
        )
        for row, cell, differences in zip(others, cells, comparison.differences(cells, metrics), strict=True)
    ]
    return (baseline, *compared)


# -------------------------------------------------------------------------------------------------- same documents


def _by_documents(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Groups that share a task and contradict each other in none. Runs of other tasks or documents stand apart."""
    groups: list[tuple[dict[str, Task], list[Cell]]] = []
    for cell in sorted(cells, key=lambda cell: (-len(cell.tasks), str(cell.file))):
        own = {task.name: task for task in cell.tasks}
        for known, members in groups:
            shared = own.keys() & known.keys()
            if shared and all(_agree(known[name], own[name]) for name in shared):
                known.update({name: _merged(task, known.get(name)) for name, task in own.items()})
                members.append(cell)
                break
        else:
            groups.append((own, [cell]))
    return [members for _, members in groups]


def _agree(one: Task, other: Task) -> bool:
    """Whether two tasks may have had the same documents.

    If both runs logged samples, lm-eval's hashes decide. Otherwise documents that ``--samples`` chose are not known to
    be the same, and what both say that they loaded, or of their examples, may not differ. Nor may arguments of
    generation, which no hash holds.
    """
    if any(getattr(one, name) != getattr(other, name) for name in ("num_documents", "version", "num_fewshot")):
        return False
    if _contradict(one, other, "generation"):
        return False
    if one.fingerprint is not None and other.fingerprint is not None:
        return one.fingerprint == other.fingerprint
    if one.is_chosen or other.is_chosen:
        return False
    return not _contradict(one, other, "loaded", "few_shots")


def _contradict(one: Task, other: Task, *names: str) -> bool:
    """Whether both tasks say one of these and say it differently."""
    pairs = ((getattr(one, name), getattr(other, name)) for name in names)
    return any(None not in pair and pair[0] != pair[1] for pair in pairs)


def _merged(task: Task, known: Task | None) -> Task:
    """The task with what earlier runs of the group said of its documents.

    So a run that says nothing of its documents cannot bring together two that contradict each other.
    """
    if known is None:
        return task
    said = ("fingerprint", "loaded", "few_shots", "generation")
    return replace(task, **{name: getattr(known, name) or getattr(task, name) for name in said})
