"""The cells of a sweep in this process: load the model once, then let lm-eval evaluate one cell after the other.

A shard answers its share of the requests, and ends there. Knows cells, stores and workers.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

import datasets
from lm_eval.tasks import TaskManager

from lm_eval_kvpress.errors import UsageError, one_line
from lm_eval_kvpress.files import write_whole
from lm_eval_kvpress.harness.identity import checkpoint_hashes
from lm_eval_kvpress.harness.statistics import hashes_of_statistics
from lm_eval_kvpress.sweep.cell_run import CellRun
from lm_eval_kvpress.sweep.cells import Cell, presses_of
from lm_eval_kvpress.sweep.evaluation import ask, environment_asked_once, evaluate, say
from lm_eval_kvpress.sweep.launchers.launch import in_main_memory, launch, of_driver
from lm_eval_kvpress.sweep.model import SweepModel, load_model
from lm_eval_kvpress.sweep.settings import SweepSettings
from lm_eval_kvpress.sweep.shards.joining import join_shards
from lm_eval_kvpress.sweep.shards.record import note_cells, note_workers
from lm_eval_kvpress.sweep.shards.shard import Shard
from lm_eval_kvpress.sweep.shards.share import AllAnswered, ShareOnly, stop_after_requests
from lm_eval_kvpress.sweep.store import SweepStore
from lm_eval_kvpress.sweep.tasks import check_tasks, loads_once, task_hashes, task_manager
from lm_eval_kvpress.sweep.workers.jobs import Workers
from lm_eval_kvpress.sweep.workers.worker import Worker

logger = logging.getLogger("lm_eval_kvpress")


def run_cells(
    settings: SweepSettings, cells: Sequence[Cell], store: SweepStore, *, of_shards: Mapping[str, Any] | None = None
) -> None:
    """Run all unfinished cells.

    Args:
        of_shards: settings of the shards that have answered, if this call joins them and answers nothing itself.

    Raises:
        UsageError: for an unknown task, other weights than before, a cell that does not fit the model, or answers that
            are missing from the shards.
    """
    start = time.perf_counter()
    _drop_damage(cells, store)
    todo = [cell for cell in cells if not store.cell(cell.folder).is_finished]
    say(f"{len(cells)} cells, {len(cells) - len(todo)} of them finished before, in {store.folder}")
    tasks, hashes = _checked_tasks(settings, cells, store)
    if not todo:
        return
    _remind_of_baseline(cells)
    model = _loaded(of_driver(settings) if of_shards is None else in_main_memory(settings))
    checkpoint = _checkpoint(settings, cells, model)
    store.begin(hashes, checkpoint)
    with ExitStack() as opened:
        opened.enter_context(_says_what_is_complete(cells, store))
        opened.enter_context(environment_asked_once())
        workers: Workers
        if of_shards is None:
            workers = launch(settings, model, checkpoint)
        else:
            workers, lines = join_shards(store, of_shards, [cell.folder for cell in todo], hashes, checkpoint)
            _say_all(lines)
        opened.enter_context(closing(workers))
        runs = opened.enter_context(_opened(model, todo, store, workers))
        for peers in sharing_prefills(runs):
            _evaluate_all(model, settings, tasks, peers, workers)
    seconds, num_tokens = _summarize(store, cells, runs, workers, start)
    say(
        f"{len(todo)} cells finished by this call in {seconds:.0f} s, {num_tokens:,} tokens prefilled; "
        f"next: lm-eval-kvpress report {store.folder} -o report.html"
    )


def run_shard(
    settings: SweepSettings, cells: Sequence[Cell], store: SweepStore, shard: Shard, siblings: Sequence[SweepStore]
) -> None:
    """Answer the requests of one shard.

    Args:
        store: of the shard.
        siblings: stores of the same sweep, which must be of the same tasks and checkpoint.

    Raises:
        UsageError: as `run_cells`.
    """
    start = time.perf_counter()
    say(f"shard {shard} of {len(cells)} cells, in {store.folder}")
    _drop_damage(cells, store)
    tasks, hashes = _checked_tasks(settings, cells, store)
    for other in siblings:
        other.check_tasks(hashes)
    model = _loaded(of_driver(settings))
    checkpoint = _checkpoint(settings, cells, model)
    for other in siblings:
        other.check_checkpoint(checkpoint)
    store.begin(hashes, checkpoint)
    stop_after_requests(tasks)
    folders = [cell.folder for cell in cells]
    note_cells(store.folder, folders, are_answered=False)
    with (
        closing(launch(settings, model, checkpoint)) as those,
        _opened(model, cells, store, those) as runs,
    ):
        own = [] if those.facts else [Worker(model).facts(presses_of(settings, cells))]
        workers = ShareOnly(those, shard, note=lambda: note_workers(store.folder, those.facts or own))
        for peers in sharing_prefills(runs):
            _ask_all(model, settings, tasks, peers, workers)
    note_cells(store.folder, folders, are_answered=True)
    seconds, num_tokens = _summarize(store, cells, runs, workers, start)
    say(
        f"shard {shard} is done in {seconds:.0f} s, {num_tokens:,} tokens prefilled; once all {shard.count} are, the "
        "same command with --merge joins them"
    )


def _drop_damage(cells: Sequence[Cell], store: SweepStore) -> None:
    _say_all(line for cell in cells for line in store.cell(cell.folder).drop_damage())


def _say_all(lines: Iterable[str]) -> None:
    for line in lines:
        say(line)


def _loaded(settings: SweepSettings) -> SweepModel:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return load_model(settings)


def _checkpoint(settings: SweepSettings, cells: Sequence[Cell], model: SweepModel) -> dict[str, str]:
    """Hashes of the checkpoint, and of the statistics that presses read."""
    return {**checkpoint_hashes(model.lm), **hashes_of_statistics(presses_of(settings, cells))}


def _summarize(
    store: SweepStore, cells: Sequence[Cell], runs: Sequence[CellRun], workers: Workers, start: float
) -> tuple[float, int]:
    """Write what this call did; return its seconds and the tokens that it prefilled."""
    num_tokens_shared = sum(run.num_tokens_shared for run in runs)
    num_tokens = num_tokens_shared + sum(run.num_tokens_prefilled for run in runs)
    seconds = time.perf_counter() - start
    summary = {
        "num_cells": len(cells),
        "num_cells_run": len(runs),
        "num_workers": max(1, len(workers.facts)),
        "num_tokens_prefilled": num_tokens,
        "num_tokens_prefilled_shared": num_tokens_shared,
        "seconds": seconds,
        "seconds_busy": workers.busy_sec,
    }
    write_whole(store.folder / "summary.json", json.dumps(summary, indent=2))
    return seconds, num_tokens


def _checked_tasks(
    settings: SweepSettings, cells: Sequence[Cell], store: SweepStore
) -> tuple[TaskManager, dict[str, dict[str, str]]]:
    """Return the tasks, which all cells share, and what tells whether they have changed since an earlier call."""
    if settings.trust_remote_code:  # as lm-eval's command does, for data sets that are scripts
        datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = True
    tasks = loads_once(task_manager(settings, cells[0]))
    check_tasks(settings, tasks)
    hashes = task_hashes(settings, tasks)
    store.check_tasks(hashes)
    return tasks, hashes


@contextmanager
def _says_what_is_complete(cells: Sequence[Cell], store: SweepStore) -> Iterator[None]:
    """Add to an error's one line how far the sweep came."""
    try:
        yield
    except (UsageError, OSError) as error:
        if (line := one_line(error)) is None:
            raise
        num_finished = sum(store.cell(cell.folder).is_finished for cell in cells)
        raise UsageError(
            f"{line} ({num_finished} of {len(cells)} cells are finished, what the others have answered is kept)"
        ) from error


def _remind_of_baseline(cells: Sequence[Cell]) -> None:
    presses = [cell.arguments["press"] for cell in cells if "stream_budget" not in cell.arguments]
    if presses and "none" not in presses:  # a stream has no baseline
        say("no cell is the baseline, from which differences are taken: add none to the presses")


# ---------------------------------------------------------------------------------------------------------------- cells


@contextmanager
def _opened(model: SweepModel, cells: Sequence[Cell], store: SweepStore, workers: Workers) -> Iterator[list[CellRun]]:
    """Open cells, with what an earlier call answered; their throughput logs are closed at the end."""
    with ExitStack() as logs:
        runs = list[CellRun]()
        for cell in cells:
            runs.append(model.open(cell, store.cell(cell.folder)))
            runs[-1].note_workers(workers.facts)
            logs.callback(runs[-1].log.close)
        if num_kept := sum(len(run.done) for run in runs):
            say(f"{num_kept} answers of unfinished cells are there from an earlier call")
        yield runs


def sharing_prefills(runs: Sequence[CellRun]) -> list[list[CellRun]]:
    """Group cells of one protocol that share their prefills; each other cell is a group of its own.

    Presses that read questions are apart: their contexts say where the question begins.
    """
    groups: dict[Any, list[CellRun]] = {}
    for run in runs:
        alike = run.cell.protocol, run.session.settings.press.reads_question
        groups.setdefault(alike if run.shares else run.cell.name, []).append(run)
    return list(groups.values())


def _evaluate_all(
    model: SweepModel, settings: SweepSettings, tasks: TaskManager, peers: Sequence[CellRun], workers: Workers
) -> None:
    """Evaluate the cells of a group one after the other; the first has all of them answered."""
    if not peers[0].shares:
        say(f"{peers[0].cell.name} runs on prefills of its own")
    with _messages() as name_cell:
        for index, run in enumerate(peers):
            name_cell(run.cell.name)
            model.turn_to(run, peers[index:], workers)
            evaluate(model, settings, tasks, run, workers)
            say(f"{run.cell.name} is finished")


def _ask_all(
    model: SweepModel, settings: SweepSettings, tasks: TaskManager, peers: Sequence[CellRun], workers: Workers
) -> None:
    """Have this process's share of the requests answered for all cells of a group; no results come of it."""
    with _messages() as name_cell, suppress(AllAnswered):
        name_cell(peers[0].cell.name)
        model.turn_to(peers[0], peers, workers)
        ask(model, settings, tasks)
        raise AssertionError("lm-eval went on to metrics without answers")


@contextmanager
def _messages() -> Iterator[Callable[[str], None]]:
    """Print this package's messages, each with the name of the cell that the yielded function was last given."""
    handler, level = logging.StreamHandler(sys.stderr), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lambda cell: handler.setFormatter(logging.Formatter(f"{cell}: %(message)s"))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
