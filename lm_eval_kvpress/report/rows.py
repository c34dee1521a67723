"""Cells -> the rows of one table: which of several files of one setting counts, and what tells two runs apart."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lm_eval_kvpress.report.cell import BUDGETS, Cell, Metric, Pairs
from lm_eval_kvpress.report.changes import Changes
from lm_eval_kvpress.report.differences import Difference
from lm_eval_kvpress.report.metrics import MetricKey
from lm_eval_kvpress.report.parsing import SEEDS


@dataclass(frozen=True)
class Row:
    """A run.

    Attributes:
        cell: None for a baseline that nobody ran.
        num_older, num_newer: files of the same setting that this row stands for.
        seeds: named if they are not those of all rows of the table.
        shared_arguments: that all rows of this press in the table have, budgets aside; a notice names them once.
        has_same_answers: whether every logged answer is the baseline's; None where they cannot be compared.
        changes: what became of answers beside the baseline's.
    """

    cell: Cell | None
    is_baseline: bool = False
    num_older: int = 0
    num_newer: int = 0
    seeds: Pairs = ()
    shared_arguments: Pairs = ()
    differences: Mapping[MetricKey, Difference] = field(default_factory=dict)
    has_same_answers: bool | None = None
    changes: Changes = Changes()

    @property
    def press(self) -> str:
        return "none" if self.cell is None else self.cell.press.name

    @property
    def arguments(self) -> str:
        """Arguments of the press, and seeds, as text."""
        return joined(self._pairs)

    @property
    def own_arguments(self) -> str:
        """What tells the row from others of its press, how much is removed aside."""
        return joined(pair for pair in self._pairs if pair not in self.shared_arguments)

    @property
    def series(self) -> str:
        """The press and what tells it apart, except how much it keeps: a curve over the kept share joins such rows."""
        left_out = self.shared_arguments
        rest = joined(pair for pair in self._pairs if pair[0] not in BUDGETS and pair not in left_out)
        return f"{self.press} {rest}".strip()

    @property
    def _pairs(self) -> Pairs:
        return (*(() if self.cell is None else self.cell.press.arguments), *self.seeds)

    def metric(self, key: MetricKey) -> Metric | None:
        return None if self.cell is None else key.find(self.cell)

    def difference(self, key: MetricKey) -> Difference | None:
        return self.differences.get(key)


def build_rows(cells: Iterable[Cell]) -> list[Row]:
    """A row per press, seeds, tasks and machine, ordered by press and how much it removes."""
    rows = sorted(_with_seeds(list(_without_repeats(cells))), key=_order)
    shared = {
        press: _shared_arguments([row for row in rows if row.press == press]) for press in {r.press for r in rows}
    }
    return [replace(row, shared_arguments=shared[row.press]) for row in rows]


def _shared_arguments(rows: Sequence[Row]) -> Pairs:
    """The arguments that all rows of one press have, budgets aside: they say how much a row keeps."""
    found = [row.cell.press.arguments for row in rows if row.cell]
    return tuple(pair for pair in found[0] if pair[0] not in BUDGETS and all(pair in other for other in found))


def joined(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values as text."""
    return ", ".join(f"{name}={value}" for name, value in pairs)


def _order(row: Row) -> tuple[object, ...]:
    assert row.cell is not None, "a row is made of a cell"
    press = row.cell.press
    sizes = tuple((name, float(value)) for name, value in press.arguments if re.fullmatch(r"\d+(\.\d+)?", value))
    return (press.name, press.removed_asked or 0.0, sizes, press.arguments, row.cell.seeds, str(row.cell.file))


# ------------------------------------------------------------------------------------- several files of one setting


def _without_repeats(cells: Iterable[Cell]) -> Iterator[Row]:
    """One row for all files of one setting."""
    groups: dict[object, list[Cell]] = defaultdict(list)
    for cell in cells:
        names = tuple(sorted(task.name for task in cell.tasks))
        groups[cell.press, cell.seeds, names, cell.device, cell.batch_size].append(cell)
    for group in groups.values():
        cell = _latest(group)
        num_newer = sum(_age(other) > _age(cell) for other in group)
        yield Row(cell, num_older=len(group) - 1 - num_newer, num_newer=num_newer)


def _latest(cells: Sequence[Cell]) -> Cell:
    """The newest cell with figures; the newest measured one, if a later run only repeated it from a cache."""
    newest = max([cell for cell in cells if any(task.metrics for task in cell.tasks)] or cells, key=_age)
    if not newest.unmeasured_tasks:
        return newest
    measured = [cell for cell in cells if not cell.unmeasured_tasks and _figures(cell) == _figures(newest)]
    return max(measured, key=_age, default=newest)


def _age(cell: Cell) -> tuple[float, str]:
    return cell.date, str(cell.file)


def _figures(cell: Cell) -> set[str]:
    """The figures of all tasks, and whether samples were logged; as text, because NaN equals nothing."""
    return {
        f"{task.name} {task.samples is None} {metric.name},{metric.filter} {metric.value}"
        for task in cell.tasks
        for metric in task.metrics
    }


# ------------------------------------------------------------------------------------------------------------ seeds


def _with_seeds(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows, their seeds named where these differ: one by its name, several as lm-eval's --seed takes them."""
    known = [dict(row.cell.seeds) for row in rows if row.cell and row.cell.seeds]
    differing = [name for name in SEEDS if len({seeds.get(name) for seeds in known}) > 1]
    num_rows = Counter(row.cell.press for row in rows if row.cell)
    for row in rows:
        assert row.cell is not None, "a row is made of a cell"
        if known and not row.cell.seeds and num_rows[row.cell.press] > 1:
            yield replace(row, seeds=(("seeds", "unknown"),))
        else:
            yield replace(row, seeds=_named_seeds(row.cell.seeds, differing))


def _named_seeds(seeds: Pairs, differing: Sequence[str]) -> Pairs:
    if not differing or not seeds:
        return ()
    if len(differing) == 1:
        return tuple(pair for pair in seeds if pair[0] in differing)
    values = [value for _, value in seeds]
    return (("seeds", ",".join(values if len(set(values)) > 1 else values[:1])),)
