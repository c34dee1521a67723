"""What the server of the campaign does once, before it forks a process: most of what a small command takes time for.

It imports the libraries, lists lm-eval's 14,000 tasks (folders beside lm-eval's own are listed by each command), asks
pip for the environment that lm-eval records, and has standard errors of perplexities drawn from fewer resamples.
Imported by the server alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lm_eval.__main__
import lm_eval.tasks.manager
from lm_eval.api import metrics
from lm_eval.tasks._index import TaskIndex
from torch.utils import collect_env

import lm_eval_kvpress.harness.model
import lm_eval_kvpress.report.command
import lm_eval_kvpress.sweep.command
import lm_eval_kvpress.verify.command  # noqa: F401

OWN = Path(lm_eval.tasks.manager.__file__).parent


def remember_tasks() -> None:
    """List lm-eval's tasks now, and never again."""
    build = TaskIndex.build
    known = build([OWN])

    def build_others(paths: Iterable[Path], **options: Any) -> dict[str, Any]:
        paths = list(paths)
        return {**(known if OWN in paths else {}), **build([path for path in paths if path != OWN], **options)}

    TaskIndex.build = staticmethod(build_others)


def remember_environment() -> None:
    """Ask for the environment now, and never again."""
    found = collect_env.get_pretty_env_info()
    collect_env.get_pretty_env_info = lambda: found


def draw_fewer_resamples() -> None:
    """Draw 100 resamples, where lm-eval draws 100,000 in Python."""
    bootstrap = metrics.bootstrap_stderr
    metrics.bootstrap_stderr = lambda f, xs, iters: bootstrap(f, xs, iters=min(iters, 100))


remember_tasks()
draw_fewer_resamples()
remember_environment()
