"""`lm-eval-kvpress sweep`: many presses, ratios and protocols in one resumable run.

Each cell ends as a standard lm-eval results file with its samples, as the run of that cell alone would have written it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from rich.console import Console

from lm_eval_kvpress import __version__
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness import plugin, run_record
from lm_eval_kvpress.harness.identity import weights_fingerprint
from lm_eval_kvpress.harness.model import KVPress, PythiaKVPress
from lm_eval_kvpress.presses.suggest import near
from lm_eval_kvpress.records.files import write_whole
from lm_eval_kvpress.sweep.cell_run import CellRun
from lm_eval_kvpress.sweep.cells import Cell, SweepSettings, parse_settings
from lm_eval_kvpress.sweep.model import SweepModel
from lm_eval_kvpress.sweep.store import SweepStore

logger = logging.getLogger("lm_eval_kvpress")

MODELS: Mapping[str, type[KVPress]] = {"pythia-kvpress": PythiaKVPress, "kvpress": KVPress}
INTERRUPTED = 130  # what shells report after Ctrl-C


def main(arguments: Sequence[str]) -> int:
    """The command."""
    settings = parse_settings(arguments)
    if settings.model not in MODELS:
        raise UsageError(f"model={settings.model} is not known: choose one of {', '.join(MODELS)}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError(
            "a sweep is one process: start it without accelerate or torchrun, for several GPUs one per GPU with "
            "--device cuda:N, some of the presses and an --output_path of its own"
        )
    cells = settings.cells()
    versions = {"lm-eval-kvpress": __version__, **run_record.versions()}
    store = SweepStore(Path(settings.output_path), {**settings.shared, "versions": versions})
    try:
        LAUNCHERS[settings.launcher](settings, cells, store)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {settings.output_path}", file=sys.stderr)
        return INTERRUPTED
    finally:
        store.close()
    return 0


def run_local(settings: SweepSettings, cells: Sequence[Cell], store: SweepStore) -> None:
    """Runs all unfinished cells in this process."""
    console, start = Console(stderr=True, soft_wrap=True), time.perf_counter()
    todo = [cell for cell in cells if not store.cell(cell.name).is_finished]
    console.print(f"{len(cells)} cells, {len(cells) - len(todo)} of them finished before, in {store.folder}")
    if not todo:
        return
    presses = [cell.arguments["press"] for cell in cells if "stream_budget" not in cell.arguments]
    if presses and "none" not in presses:  # a stream has no baseline
        console.print("no cell is the baseline, from which differences are taken: add none to the presses")
    _check_tasks(settings, _tasks(settings, todo[0]))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model = _load(settings)
    store.claim(weights_fingerprint(model.lm.model))
    with ExitStack() as logs:
        runs = [model.open(cell, store.cell(cell.name)) for cell in todo]
        for run in runs:
            logs.callback(run.log.close)
        if num_kept := sum(len(run.done) for run in runs):
            console.print(f"{num_kept} answers of unfinished cells are there from an earlier call")
        name_cell = logs.enter_context(_messages())
        for peers in _that_share(runs):
            tasks = _tasks(settings, peers[0].cell)
            if not peers[0].shares:
                console.print(f"{peers[0].cell.name} runs on prefills of its own")
            while peers:
                name_cell(peers[0].cell.name)
                _evaluate(model, settings, tasks, peers)
                console.print(f"{peers.pop(0).cell.name} is finished")
    num_tokens = model.num_tokens_shared + sum(run.num_tokens_prefilled for run in runs)
    summary = {
        "num_cells": len(cells),
        "num_cells_run": len(todo),
        "num_tokens_prefilled": num_tokens,
        "num_tokens_prefilled_shared": model.num_tokens_shared,
        "seconds": time.perf_counter() - start,
    }
    write_whole(store.folder / "summary.json", json.dumps(summary, indent=2))
    console.print(
        f"{len(todo)} cells finished by this call in {summary['seconds']:.0f} s, {num_tokens:,} tokens prefilled; "
        f"next: lm-eval-kvpress report {store.folder} -o report.html"
    )


@contextmanager
def _messages() -> Iterator[Callable[[str], None]]:
    """Has this package's messages printed, each with the cell that is told to the yielded function."""
    handler, level = logging.StreamHandler(sys.stderr), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lambda cell: handler.setFormatter(logging.Formatter(f"{cell}: %(message)s"))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


LAUNCHERS: Mapping[str, Callable[[SweepSettings, Sequence[Cell], SweepStore], None]] = {"local": run_local}


def _load(settings: SweepSettings) -> SweepModel:
    arguments = dict(settings.model_args)
    pretrained = arguments.pop("pretrained", None)
    if pretrained is None:
        pretrained = MODELS[settings.model].DEFAULT_PRETRAINED
    if settings.device is not None:
        arguments["device"] = settings.device
    return SweepModel(pretrained, batch_size=settings.batch_size, max_batch_size=settings.max_batch_size, **arguments)


def _that_share(runs: Sequence[CellRun]) -> list[list[CellRun]]:
    """Cells of one protocol that share their prefills, together; each other one by itself."""
    groups: dict[Any, list[CellRun]] = {}
    for run in runs:
        groups.setdefault(run.cell.protocol if run.shares else run.cell.name, []).append(run)
    return list(groups.values())


def _tasks(settings: SweepSettings, cell: Cell) -> TaskManager:
    """The tasks, told the model arguments and metadata as lm-eval's command line tells them."""
    paths = [str(plugin.tasks_path()), *([settings.include_path] if settings.include_path else [])]
    metadata = {**settings.model_args, **dict(cell.protocol), **settings.metadata}
    return TaskManager(include_path=paths, metadata=metadata)


def _check_tasks(settings: SweepSettings, tasks: TaskManager) -> None:
    """Refuses unknown tasks before the model is loaded.

    Raises:
        UsageError: with the nearest name.
    """
    for name in settings.tasks:
        if name not in tasks.all_tasks and not Path(name).is_file():
            hint = near(name, tasks.all_tasks)
            raise UsageError(f"unknown task '{name}': {hint.rstrip() or '`lm_eval ls tasks` lists them'}")


def _evaluate(model: SweepModel, settings: SweepSettings, tasks: TaskManager, peers: Sequence[CellRun]) -> None:
    """Has lm-eval evaluate the first of the peers, and writes its results."""
    run = peers[0]
    model.turn_to(run, peers)
    tracker = EvaluationTracker(output_path=str(run.store.part()))
    results = lm_eval.simple_evaluate(
        model=model.lm,
        tasks=settings.tasks,
        task_manager=tasks,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        gen_kwargs=settings.gen_kwargs,
        torch_random_seed=settings.seed,
    )
    assert results is not None
    model_args = {**settings.model_args, **run.cell.arguments}
    results["config"] |= {
        "model": settings.model,
        "model_args": model_args,
        "batch_size": settings.batch_size,
        "device": settings.device,
    }
    results["config"]["kvpress"]["sweep"] = {
        "cell": run.cell.name,
        "shares_prefill": run.shares,
        "settings": settings.as_typed(),
    }
    tracker.general_config_tracker.log_experiment_args(settings.model, model_args, None, None, False)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    run.store.finish()
