"""Who does the jobs of a sweep: this process, or others that a launcher starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lm_eval_kvpress.harness.run_record import versions
from lm_eval_kvpress.sweep.launchers.processes import ProcessPool
from lm_eval_kvpress.sweep.model import SweepModel
from lm_eval_kvpress.sweep.settings import SweepSettings
from lm_eval_kvpress.sweep.workers.crew import Crew, Pool, checker
from lm_eval_kvpress.sweep.workers.jobs import Workers
from lm_eval_kvpress.sweep.workers.worker import Here, Worker


def of_driver(settings: SweepSettings) -> SweepSettings:
    """The settings under which this process loads the model: in main memory if others answer with it."""
    return in_main_memory(settings) if settings.has_workers else settings


def in_main_memory(settings: SweepSettings) -> SweepSettings:
    """The settings of a process that loads the model and answers nothing with it."""
    arguments = {key: value for key, value in settings.model_args.items() if key != "parity"}
    return replace(settings, device="cpu", model_args=arguments)


def launch(settings: SweepSettings, model: SweepModel, checkpoint: Mapping[str, str]) -> Workers:
    """Start what does the jobs.

    Args:
        model: loaded in this process.
        checkpoint: hashes of it and of statistics that presses read, which those of every worker must equal.

    Raises:
        UsageError: if workers do not start, or differ from this process.
    """
    if not settings.has_workers:
        return Here(Worker(model))
    return Crew(_pool(settings), checker(versions(), checkpoint))


def _pool(settings: SweepSettings) -> Pool:
    if settings.launcher == "local":
        return ProcessPool(settings)
    from lm_eval_kvpress.sweep.launchers.ray_actors import RayPool  # an extra

    return RayPool(settings)
