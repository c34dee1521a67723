"""Notices: what the reader must know about a table as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lm_eval_kvpress.press_list import is_default
from lm_eval_kvpress.report.formatting import first_names
from lm_eval_kvpress.report.loss_curves import Curve
from lm_eval_kvpress.report.rows import joined
from lm_eval_kvpress.report.speeds import MIN_BATCHES, MIN_TOKENS, MIN_VALUES
from lm_eval_kvpress.report.tables import Table

FEW_DOCUMENTS = 10


def table_notices(table: Table, curves: Sequence[Sequence[Curve]]) -> tuple[str, ...]:
    """The notices of a table; ``curves`` are those of each row."""
    return (
        *_protocol(table),
        *filter(None, [shared_arguments(table)]),
        *_limited(table),
        *_averages(table),
        *_unscored(table),
        *_few_documents(table),
        *_without_samples(table),
        *_machines(table),
        *_withheld(table),
        *_without_curves(table, curves),
        *_left_out_files(table),
    )


def _protocol(table: Table) -> Iterator[str]:
    if table.setting.is_stock:
        yield (
            "Stock lm-eval scores each window in one forward, in which no press can change a figure. This is another "
            "protocol than this package's: do not compare across tables."
        )


def shared_arguments(table: Table) -> str:
    """What the names of presses in the table leave out and is no default, as one line; empty if nothing."""
    shared = {
        row.press: [pair for pair in row.shared_arguments if not is_default(row.press, *pair)] for row in table.rows
    }
    listed = "; ".join(f"{press} ({joined(pairs)})" for press, pairs in shared.items() if pairs)
    return f"Arguments that all rows of a press share: {listed}." if listed else ""


def _limited(table: Table) -> Iterator[str]:
    tasks = {task.name: task for cell in table.cells for task in cell.tasks}.values()
    for is_chosen, option in ((False, "--limit"), (True, "--samples")):
        limited = [
            f"{task.num_documents} of {task.num_documents_available} documents of {task.name}"
            for task in tasks
            if task.is_chosen == is_chosen and (task.num_documents or 0) < (task.num_documents_available or 0)
        ]
        if limited:
            yield f"Run with {option}: {', '.join(limited)}."
    unknown = [task.name for task in tasks if task.is_chosen and task.fingerprint is None]
    if unknown:
        yield (
            f"Which documents of {first_names(unknown)} were run is not known without --log_samples: they are compared "
            "with no other run's."
        )


def _averages(table: Table) -> Iterator[str]:
    """Which tasks the averages of each group are over; subjects by the dozen have their group's name."""
    for group, members in {key.task: key.members for key in table.metrics if key.members}.items():
        yield f"{group}: average over {len(members)} tasks that ran ({', '.join(members)})."
    if any(key.averaged for key in table.metrics):
        yield "All lengths: the mean of the figures of each length."


def _unscored(table: Table) -> Iterator[str]:
    scored = {key.task for key in table.metrics}
    unscored = [name for name, _ in table.documents if name not in scored]
    if unscored:
        yield f"No figures of {first_names(unscored)}: --predict_only logs answers and scores none."


def _few_documents(table: Table) -> Iterator[str]:
    few = [f"{name} ({count})" for name, count in table.documents if count is not None and count < FEW_DOCUMENTS]
    if few and len(table.cells) > 1:
        yield f"Few documents, so intervals are rough: {', '.join(few)}."


def _without_samples(table: Table) -> Iterator[str]:
    num_unlogged = sum(any(task.samples is None for task in cell.tasks if task.num_documents) for cell in table.cells)
    if num_unlogged:
        yield f"{num_unlogged} of {len(table.cells)} runs did not log samples (--log_samples): no intervals for them."


def _machines(table: Table) -> Iterator[str]:
    machines = dict.fromkeys(cell.speed.machine for cell in table.cells if cell.speed.machine and cell.speed.bounds)
    if machines:
        yield f"Speeds, with 95 % intervals over batches or requests, were measured on {' and on '.join(machines)}."


def _withheld(table: Table) -> Iterator[str]:
    num_runs = sum(bool(cell.speed.withheld) for cell in table.cells)
    if num_runs:
        yield (
            f"Speeds of {num_runs} of {len(table.cells)} runs are not shown. A rate needs {MIN_BATCHES} batches and "
            f"{MIN_TOKENS} tokens after warm-up, a median {MIN_BATCHES} batches and {MIN_VALUES} requests, and both an "
            "interval and the name of the machine in the results."
        )


def _without_curves(table: Table, curves: Sequence[Sequence[Curve]]) -> Iterator[str]:
    pairs = zip(table.rows, curves, strict=True)
    streams = [row_curves for row, row_curves in pairs if row.cell is not None and row.cell.is_stream]
    num_missing = sum(not row_curves for row_curves in streams)
    if num_missing:
        yield (
            f"No losses by position for {num_missing} of {len(streams)} runs (stream_output): absent, unfinished, or "
            "of other documents or another setting than the results."
        )


def _left_out_files(table: Table) -> Iterator[str]:
    num_older, num_newer = sum(row.num_older for row in table.rows), sum(row.num_newer for row in table.rows)
    if num_older:
        yield f"{_results(num_older, 'older')} left out: the setting was run again, and the newest file counts."
    if num_newer:
        yield (
            f"{_results(num_newer, 'newer')} left out, with no other figures (from a cache, an earlier run or "
            "--predict_only): the file that says more counts."
        )


def _results(count: int, age: str) -> str:
    return f"1 {age} result is" if count == 1 else f"{count} {age} results are"
