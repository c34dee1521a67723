"""Who does the jobs of a sweep: this process, or others that a launcher starts."""

from __future__ import annotations

from lm_eval_kvpress.sweep.model import SweepModel
from lm_eval_kvpress.sweep.workers.jobs import Workers
from lm_eval_kvpress.sweep.workers.worker import Here, Worker


def launch(model: SweepModel) -> Workers:
    """Start what does the jobs.

    Args:
        model: loaded in this process.
    """
    return Here(Worker(model))
