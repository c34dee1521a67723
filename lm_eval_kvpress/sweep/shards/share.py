"""Workers of a part of the jobs: those of one shard, or none at all, once the shards are joined.

Knows jobs, and where lm-eval goes on from requests to metrics. Does not know stores or models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lm_eval.tasks import TaskManager

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.sweep.shards.shard import Shard, number_of
from lm_eval_kvpress.sweep.workers.jobs import Answered, Job, WorkerFacts, Workers


class ShareOnly:
    """Workers that do the jobs of one shard and leave the others out (`jobs.Workers`).

    Args:
        workers: that do them.
        note: is called before the first answer is handed on, and again once other workers answer.
    """

    answers_all = is_here = False

    def __init__(self, workers: Workers, shard: Shard, note: Callable[[], None]) -> None:
        self._workers, self._shard, self._note = workers, shard, note
        self._noted: Sequence[WorkerFacts] | None = None

    @property
    def facts(self) -> Sequence[WorkerFacts]:
        return self._workers.facts

    @property
    def busy_sec(self) -> float:
        return self._workers.busy_sec

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Answered]]:
        for answer in self._workers.run(job for job in jobs if self._shard.has(job.block)):
            if self._noted != self._workers.facts:
                self._note()
                self._noted = self._workers.facts
            yield answer

    def close(self) -> None:
        self._workers.close()


class Joined:
    """No workers: every answer must be there, from the shards that were joined (`jobs.Workers`).

    Args:
        count: number of shards.
        facts: of all processes that answered for them.
    """

    answers_all, is_here, busy_sec = True, False, 0.0

    def __init__(self, count: int, facts: Sequence[WorkerFacts]) -> None:
        self._count, self.facts = count, facts

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Answered]]:
        if missing := sorted({number_of(job.block, self._count) for job in jobs}):
            names = ", ".join(f"{number}/{self._count}" for number in missing)
            raise UsageError(
                f"answers are missing of shard {names}, which was done: run the same command with --shard for each of "
                "them, then --merge again"
            )
        return iter(())

    def close(self) -> None: ...


class AllAnswered(Exception):
    """Every request was handed to the model; what follows in lm-eval needs all answers."""


def stop_after_requests(tasks: TaskManager) -> None:
    """Have lm-eval end with `AllAnswered` where it would go on from answers to metrics."""
    load = tasks.load

    def load_and_stop(*arguments: Any, **keywords: Any) -> Any:
        loaded = load(*arguments, **keywords)
        for task in loaded["tasks"].values():
            task.apply_filters = _stop  # the first that `lm_eval.evaluator.evaluate` does with answers
        return loaded

    tasks.load = load_and_stop


def _stop() -> None:
    raise AllAnswered
