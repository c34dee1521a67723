"""A worker's own side: load the model, do jobs, and tell what happens as events.

Knows the model. Does not know how events travel.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from lm_eval_kvpress.errors import UsageError, one_line
from lm_eval_kvpress.sweep.cells import cells_of, presses_of
from lm_eval_kvpress.sweep.model import load_model
from lm_eval_kvpress.sweep.settings import SweepSettings
from lm_eval_kvpress.sweep.workers.crew import Done, Event, Ready, Refused
from lm_eval_kvpress.sweep.workers.jobs import Job
from lm_eval_kvpress.sweep.workers.worker import Worker, timed


class Server:
    """Does jobs in this process, which does nothing else.

    Args:
        settings: of the sweep, with this process's device.
        num_threads: of this process.
    """

    def __init__(self, settings: SweepSettings, num_threads: int) -> None:
        logging.basicConfig(format="worker: %(message)s", level=logging.WARNING)
        torch.set_num_threads(num_threads)
        self._settings = settings
        self._worker: Worker | None = None

    def start(self) -> Iterator[Event]:
        """Load the model."""
        return _with_refusals(self._start())

    def do(self, job: Job) -> Iterator[Event]:
        """Answer a job, once started."""
        return _with_refusals(self._do(job))

    def _start(self) -> Iterator[Event]:
        self._worker = Worker(load_model(self._settings))
        torch.manual_seed(self._settings.seed)
        yield Ready(self._worker.facts(presses_of(self._settings, cells_of(self._settings))))

    def _do(self, job: Job) -> Iterator[Event]:
        assert self._worker is not None, "start() comes first"
        seconds = yield from timed(self._worker.answer(job))
        yield Done(seconds)


def _with_refusals(events: Iterator[Event]) -> Iterator[Event]:
    """Tell an error that a user can mend, instead of raising it where nobody reads it."""
    try:
        yield from events
    except (UsageError, OSError) as error:
        if (line := one_line(error)) is None:
            raise
        yield Refused(line)
