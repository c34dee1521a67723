"""Deal jobs out to workers that may be lost, and hand back what they answer as it comes.

Each free worker gets the next job; what a lost worker had not answered goes to another one. Knows jobs and events. Does
not know models, stores, or how workers are reached (`sweep.launchers`).
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.sweep.workers.jobs import Answered, Job, WorkerFacts

MAX_LOSSES_OF_JOB = 3
"""Workers that one job may cost before it is given up."""

MAX_LOST_STARTS = 3
"""Workers that may be lost one after the other before one is ready."""

logger = logging.getLogger("lm_eval_kvpress")


@dataclass(frozen=True)
class Ready:
    """A worker has loaded the model and waits for a job."""

    facts: WorkerFacts


@dataclass(frozen=True)
class Done:
    """A worker has answered its whole job, in so many seconds."""

    seconds: float = 0.0


@dataclass(frozen=True)
class Refused:
    """A worker met an error that a user can mend, in one line."""

    reason: str


@dataclass(frozen=True)
class Lost:
    """A worker is gone; another takes its place, and says so when it is ready."""

    reason: str


Event = Ready | Answered | Done | Refused | Lost


class Pool(Protocol):
    """Workers that a launcher has started, each by its number.

    Attributes:
        num_workers: how many are wanted.
    """

    num_workers: int

    def send(self, worker: int, job: Job) -> None:
        """Give a job to a worker that is ready or done."""

    def next_event(self) -> tuple[int, Event]:
        """Wait for something to happen."""

    def close(self) -> None:
        """End all workers."""


class Crew:
    """Workers that do jobs side by side (`jobs.Workers`).

    Args:
        pool: the workers.
        check: refuses a worker whose answers would be others than this process's.

    Raises:
        UsageError: if a worker does not start, or is refused.
    """

    answers_all, is_here = True, False

    def __init__(self, pool: Pool, check: Callable[[WorkerFacts], None]) -> None:
        self._pool, self._check = pool, check
        self._facts, self._free = dict[int, list[WorkerFacts]](), deque[int]()
        self._num_lost_starts, self.busy_sec = 0, 0.0
        try:
            while len(self._facts) < pool.num_workers:
                self._handle(*pool.next_event(), {})
        except BaseException:
            pool.close()
            raise
        self._facts = {worker: known[-1:] for worker, known in self._facts.items()}  # the others had no job

    @property
    def facts(self) -> Sequence[WorkerFacts]:
        return [facts for worker in sorted(self._facts) for facts in self._facts[worker]]

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Answered]]:
        waiting, given, returned, losses = iter(jobs), dict[int, Job](), deque[Job](), Counter[int]()
        all_given = False
        while True:
            while self._free and not all_given:
                job = returned.popleft() if returned else next(waiting, None)
                all_given = job is None
                if job is not None:
                    given[self._free[0]] = job
                    self._pool.send(self._free.popleft(), job)
            if all_given and not given:
                return
            worker, event = self._pool.next_event()
            if isinstance(event, Answered):
                job = given[worker]
                given[worker] = job.without(event)
                losses.pop(job.items[0], None)
                yield job, event
            elif left := self._handle(worker, event, given):
                losses[left.items[0]] += 1
                if losses[left.items[0]] == MAX_LOSSES_OF_JOB:
                    raise UsageError(
                        f"{MAX_LOSSES_OF_JOB} workers were lost over the same batch: lower --batch_size, or give "
                        "workers more memory"
                    )
                returned.append(left)
                all_given = False

    def _handle(self, worker: int, event: Event, given: dict[int, Job]) -> Job | None:
        """Note what became of a worker; return what it leaves to others."""
        if isinstance(event, Refused):
            raise UsageError(event.reason)
        if isinstance(event, Ready):
            self._check(event.facts)
            known, self._num_lost_starts = self._facts.setdefault(worker, []), 0
            if not known or not known[-1].is_of_the_place_of(event.facts):
                known.append(event.facts)
        if isinstance(event, Done):
            self.busy_sec += event.seconds
        if isinstance(event, Ready | Done):
            self._free.append(worker)
            given.pop(worker, None)
        if not isinstance(event, Lost):
            return None
        logger.warning("worker %d was lost (%s); another one takes its place", worker, event.reason)
        if worker in self._free:
            self._free.remove(worker)
        job = given.pop(worker, None)
        if job is None:
            self._num_lost_starts += 1
            if self._num_lost_starts >= MAX_LOST_STARTS * self._pool.num_workers:
                raise UsageError(f"workers do not start ({event.reason}): see their messages above")
        return job if job is not None and job.todo else None

    def close(self) -> None:
        self._pool.close()


def checker(versions: Mapping[str, str], checkpoint: Mapping[str, str]) -> Callable[[WorkerFacts], None]:
    """Return a check that a worker has the packages, the checkpoint and the files of statistics of this process.

    Raises:
        UsageError: by the check, in one line that names what differs.
    """

    def check(facts: WorkerFacts) -> None:
        own, theirs = {**versions, **checkpoint}, {**facts.versions, **facts.checkpoint}
        differ = [
            f"{key} ({theirs.get(key)} there, {own.get(key)} here)"
            for key in sorted(own.keys() | theirs.keys())
            if own.get(key) != theirs.get(key)
        ]
        if differ:
            raise UsageError(
                f"the worker on {facts.host} differs in {', '.join(differ)}, and answers are never mixed: give every "
                "machine the same packages, checkpoint and statistics"
            )

    return check
