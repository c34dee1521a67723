"""Do jobs of a sweep with a loaded model: one prefill for all cells of a job, halved where memory runs out.

Knows the model. Does not know files, lm-eval's tasks, or from where jobs come.
"""

from __future__ import annotations

import functools
import socket
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TypeVar

from lm_eval_kvpress.engine.batch_size import free_bytes
from lm_eval_kvpress.engine.batching import Halving
from lm_eval_kvpress.harness.identity import checkpoint_hashes
from lm_eval_kvpress.harness.run_record import versions
from lm_eval_kvpress.harness.session import Session
from lm_eval_kvpress.harness.statistics import hashes_of_statistics
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.sweep.cells import Cell
from lm_eval_kvpress.sweep.model import SweepModel
from lm_eval_kvpress.sweep.workers.jobs import Answered, Job, WorkerFacts

Item = TypeVar("Item")

OF_THE_PLACE = ("device", "machine", "fast", "linear_layers", "dtype", "parity")
"""Entries of a run's record that are about where it was computed."""


class Worker:
    """A model and a session per cell.

    Args:
        model: that answers.
    """

    def __init__(self, model: SweepModel) -> None:
        self._model, self._sessions = model, dict[str, Session]()
        self._halving = defaultdict[str, Halving](Halving)  # by request type, from one job to the next
        self._num_tokens_before = 0

    def facts(self, presses: Iterable[PressSpec]) -> WorkerFacts:
        """Say with what it answers.

        Args:
            presses: of all cells; some read statistics from files.
        """
        lm = self._model.lm
        record = lm.describe()
        return WorkerFacts(
            host=socket.gethostname(),
            versions=versions(),
            checkpoint={**checkpoint_hashes(lm), **hashes_of_statistics(presses)},
            free_bytes=free_bytes(lm.press_model.device),
            record={key: record[key] for key in OF_THE_PLACE},
        )

    def answer(self, job: Job) -> Iterator[Answered]:
        """Answer a batch under every cell that has not answered it, cell by cell.

        Raises:
            UsageError: for a single context that does not fit into memory, or scores that are not finite.
        """
        todo = {cell.name: set(places) for cell, places in job.todo}
        places = sorted(set[int]().union(*todo.values()))
        for name in self._sessions.keys() - todo.keys():  # what they keep would be in the peak of these cells
            if not self._sessions[name].runner.compressor.shares:
                self._sessions[name].runner.compressor.forget()
        self._model.set_attention(self._session(job.todo[0][0]))
        with self._model.lm.press_model.in_use():
            run, halving = functools.partial(self._run, job, todo), self._halving[job.requests.request_type]
            for answered in halving.run(run, places, job.requests.length):
                todo[answered.cell.name].difference_update(answered.places)
                yield answered

    def _run(self, job: Job, todo: dict[str, set[int]], places: Sequence[int]) -> Iterator[Answered]:
        cells = [cell for cell, _ in job.todo if not todo[cell.name].isdisjoint(places)]
        shared = [cell for cell in cells if self._session(cell).runner.compressor.shares]
        if shared:
            self._session(shared[0]).runner.compressor.run_shared(job.requests.contexts(places))
        for cell in cells:
            runner, own = self._session(cell).runner, tuple(place for place in places if place in todo[cell.name])
            outcomes = job.requests.run(runner, own, _no_bar)
            yield Answered(cell, own, tuple(outcomes), tuple(runner.meter.take()), self._newly_shared())

    def _session(self, cell: Cell) -> Session:
        if cell.name not in self._sessions:
            self._sessions[cell.name] = self._model.open_session(cell)
        return self._sessions[cell.name]

    def _newly_shared(self) -> int:
        before, self._num_tokens_before = self._num_tokens_before, self._model.num_tokens_shared
        return self._num_tokens_before - before


class Here:
    """Does jobs in this process, one after the other.

    Args:
        worker: that does them.
    """

    answers_all = is_here = True

    def __init__(self, worker: Worker) -> None:
        self._worker, self.busy_sec = worker, 0.0
        self.facts: Sequence[WorkerFacts] = ()

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Answered]]:
        for job in jobs:
            self.busy_sec += yield from timed((job, answered) for answered in self._worker.answer(job))

    def close(self) -> None: ...


def timed(answers: Iterator[Item]) -> Generator[Item, None, float]:
    """Hand on what comes; return the seconds in which it was made."""
    seconds = 0.0
    while True:
        start = time.perf_counter()
        answer = next(answers, None)
        seconds += time.perf_counter() - start
        if answer is None:
            return seconds
        yield answer


def _no_bar(num_items: int) -> None:
    """Progress shows where answers are stored."""
