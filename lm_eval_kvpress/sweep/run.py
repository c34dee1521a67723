"""The cells of a sweep in this process: load the model once, then let lm-eval evaluate one cell after the other.

Each cell ends as a standard lm-eval results file with its samples, as the run of that cell alone would have written it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import datasets
import lm_eval
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from lm_eval_kvpress.errors import UsageError, one_line
from lm_eval_kvpress.files import write_whole
from lm_eval_kvpress.harness.identity import checkpoint_hashes
from lm_eval_kvpress.harness.statistics import hashes_of_statistics
from lm_eval_kvpress.sweep.cell_run import CellRun
from lm_eval_kvpress.sweep.cells import Cell, presses_of
from lm_eval_kvpress.sweep.launchers.launch import launch, of_driver
from lm_eval_kvpress.sweep.model import SweepModel, load_model
from lm_eval_kvpress.sweep.results import log_to_wandb, write_results
from lm_eval_kvpress.sweep.settings import SweepSettings
from lm_eval_kvpress.sweep.store import SweepStore
from lm_eval_kvpress.sweep.tasks import check_tasks, task_hashes, task_manager
from lm_eval_kvpress.sweep.workers.jobs import Workers

logger = logging.getLogger("lm_eval_kvpress")


def run_cells(settings: SweepSettings, cells: Sequence[Cell], store: SweepStore) -> None:
    """Run all unfinished cells.

    Raises:
        UsageError: for an unknown task, other weights than before, or a cell that does not fit the model.
    """
    start = time.perf_counter()
    for line in (line for cell in cells for line in store.cell(cell.folder).drop_damage()):
        say(line)
    todo = [cell for cell in cells if not store.cell(cell.folder).is_finished]
    say(f"{len(cells)} cells, {len(cells) - len(todo)} of them finished before, in {store.folder}")
    tasks = _checked_tasks(settings, cells, store)
    if not todo:
        return
    _remind_of_baseline(cells)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model = load_model(of_driver(settings))
    checkpoint = {**checkpoint_hashes(model.lm), **hashes_of_statistics(presses_of(settings, cells))}
    store.begin(tasks, checkpoint)
    with (
        _says_what_is_complete(cells, store),
        closing(launch(settings, model, checkpoint)) as workers,
        _opened(model, todo, store, workers) as runs,
    ):
        for peers in sharing_prefills(runs):
            _evaluate_all(model, settings, peers, workers)
    num_tokens_shared = sum(run.num_tokens_shared for run in runs)
    summary = {
        "num_cells": len(cells),
        "num_cells_run": len(todo),
        "num_workers": max(1, len(workers.facts)),
        "num_tokens_prefilled": num_tokens_shared + sum(run.num_tokens_prefilled for run in runs),
        "num_tokens_prefilled_shared": num_tokens_shared,
        "seconds": time.perf_counter() - start,
    }
    write_whole(store.folder / "summary.json", json.dumps(summary, indent=2))
    say(
        f"{len(todo)} cells finished by this call in {summary['seconds']:.0f} s, "
        f"{summary['num_tokens_prefilled']:,} tokens prefilled; "
        f"next: lm-eval-kvpress report {store.folder} -o report.html"
    )


def _checked_tasks(settings: SweepSettings, cells: Sequence[Cell], store: SweepStore) -> dict[str, dict[str, str]]:
    if settings.trust_remote_code:  # as lm-eval's command does, for data sets that are scripts
        datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = True
    tasks = task_manager(settings, cells[0])
    check_tasks(settings, tasks)
    hashes = task_hashes(settings, tasks)
    store.check_tasks(hashes)
    return hashes


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


def say(message: str) -> None:
    """Print a line about the sweep, beside the progress bars and apart from results."""
    print(message, file=sys.stderr)


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
            runs[-1].session.num_ranks = max(1, len(workers.facts))
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


def _evaluate_all(model: SweepModel, settings: SweepSettings, peers: Sequence[CellRun], workers: Workers) -> None:
    """Evaluate the cells of a group one after the other; the first has all of them answered."""
    tasks = task_manager(settings, peers[0].cell)
    if not peers[0].shares:
        say(f"{peers[0].cell.name} runs on prefills of its own")
    with _messages() as name_cell:
        for index, run in enumerate(peers):
            name_cell(run.cell.name)
            model.turn_to(run, peers[index:], workers)
            _evaluate(model, settings, tasks, run, workers)
            say(f"{run.cell.name} is finished")


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


def _evaluate(model: SweepModel, settings: SweepSettings, tasks: TaskManager, run: CellRun, workers: Workers) -> None:
    """Have lm-eval evaluate a cell, and write its results and samples as lm-eval's command does."""
    tracker = EvaluationTracker(output_path=str(run.store.new_results()))
    results = lm_eval.simple_evaluate(
        model=model.lm,
        tasks=settings.tasks,
        task_manager=tasks,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        samples=settings.samples,
        apply_chat_template=settings.apply_chat_template,
        fewshot_as_multiturn=settings.chats_in_turns,
        system_instruction=settings.system_instruction,
        predict_only=settings.predict_only,
        gen_kwargs=settings.gen_kwargs,
        torch_random_seed=settings.seed,
    )
    assert results is not None
    results["config"] |= _config(settings, run)
    results["config"]["kvpress"] |= workers.facts[0].record if workers.facts else {}
    results["config"]["kvpress"]["sweep"] = {
        "cell": run.cell.name,
        "shares_prefill": run.shares,
        "workers": [{"host": facts.host, "device": facts.record["device"]} for facts in workers.facts],
        "settings": settings.as_typed(),
    }
    template = model.lm.chat_template(settings.apply_chat_template) if settings.apply_chat_template else None
    tracker.general_config_tracker.log_experiment_args(
        *(settings.model, results["config"]["model_args"], settings.system_instruction, template),
        settings.chats_in_turns,
    )
    samples = results.pop("samples")
    if settings.wandb_args is not None:
        problem = log_to_wandb({"name": run.cell.name, **settings.wandb_args}, results, samples)
        say(problem or f"{run.cell.name} is logged to Weights & Biases")
    write_results(tracker, results, samples)
    run.store.finish()


def _config(settings: SweepSettings, run: CellRun) -> dict[str, Any]:
    """What lm-eval records of a model that it makes itself."""
    return {
        "model": settings.model,
        "model_args": {**settings.model_args, **run.cell.arguments},
        "batch_size": settings.batch_size,
        "device": settings.device,
    }
