"""The evaluation of one cell by lm-eval, and its results.

Each cell ends as a standard lm-eval results file with its samples, as the run of that cell alone would have written it.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lm_eval
from lm_eval import evaluator
from lm_eval.loggers import EvaluationTracker
from lm_eval.loggers.utils import get_commit_from_path
from lm_eval.tasks import TaskManager
from torch.utils import collect_env

from lm_eval_kvpress.models.lend import lend
from lm_eval_kvpress.sweep.cell_run import CellRun
from lm_eval_kvpress.sweep.model import SweepModel
from lm_eval_kvpress.sweep.results import log_to_wandb, write_results
from lm_eval_kvpress.sweep.settings import SweepSettings
from lm_eval_kvpress.sweep.workers.jobs import Workers


def say(message: str) -> None:
    """Print a line about the sweep, beside the progress bars and apart from results."""
    print(message, file=sys.stderr)


def evaluate(model: SweepModel, settings: SweepSettings, tasks: TaskManager, run: CellRun, workers: Workers) -> None:
    """Have lm-eval evaluate a cell, and write its results and samples as lm-eval's command does."""
    tracker = EvaluationTracker(output_path=str(run.store.new_results()))
    results = ask(model, settings, tasks)
    results["config"] |= _config(settings, run)
    results["config"]["kvpress"] |= workers.facts[0].record if workers.facts else {}
    results["config"]["kvpress"]["sweep"] = {
        "cell": run.cell.name,
        "shares_prefill": run.shares,
        "workers": [
            {"host": facts.host, **{key: facts.record[key] for key in ("device", "machine")}} for facts in workers.facts
        ],
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


@contextmanager
def environment_asked_once() -> Iterator[None]:
    """Have lm-eval, which asks pip for the installed packages and git for a commit with every result, ask once."""
    packages = functools.cache(collect_env.get_pretty_env_info)
    with (
        lend(collect_env, get_pretty_env_info=packages),
        lend(evaluator, get_git_commit_hash=functools.cache(_git_commit)),
    ):
        yield


def _git_commit() -> str | None:
    """What lm-eval finds, without git's message on the screen where there is no repository."""
    try:
        done = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True)
    except FileNotFoundError:  # no git here
        done = None
    return done.stdout.strip() if done and done.returncode == 0 else get_commit_from_path(os.getcwd())


def ask(model: SweepModel, settings: SweepSettings, tasks: TaskManager) -> dict[str, Any]:
    """Have lm-eval ask everything of the cell to which the model was turned."""
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
    return results


def _config(settings: SweepSettings, run: CellRun) -> dict[str, Any]:
    """What lm-eval records of a model that it makes itself."""
    return {
        "model": settings.model,
        "model_args": {**settings.model_args, **run.cell.arguments},
        "batch_size": settings.batch_size,
        "device": settings.device,
    }
