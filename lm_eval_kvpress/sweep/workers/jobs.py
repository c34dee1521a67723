"""The work of a sweep in pieces that any process can do, as plain values that travel between processes.

A job is a batch of items for all cells that share its prefill. What comes back is stored, cell by cell, by the one
process that asked. Knows request batches. Does not know models, files or lm-eval.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from lm_eval_kvpress.engine.request_batches import RequestBatches
from lm_eval_kvpress.records.meter import MeteredBatch
from lm_eval_kvpress.sweep.cells import Cell


@dataclass(frozen=True)
class Job:
    """A batch for some cells.

    Attributes:
        requests: a part of them, all of it one batch.
        items: what the process that asks calls its items, by their place in ``requests``.
        todo: the cells, each with the places that it has not answered.
        block: which share of the requests it is of (`shards`).
    """

    requests: RequestBatches[Any]
    items: Sequence[int]
    todo: tuple[tuple[Cell, frozenset[int]], ...]
    block: int = 0

    def without(self, answered: Answered) -> Job:
        """What is left to do after an answer."""
        done = {answered.cell.name: frozenset(answered.places)}
        left = ((cell, places - done.get(cell.name, frozenset())) for cell, places in self.todo)
        return replace(self, todo=tuple((cell, places) for cell, places in left if places))


@dataclass(frozen=True)
class Answered:
    """What one cell answered of one job, or of a part of it.

    Attributes:
        places: of the items within the job.
        outcomes: one for each of them.
        batches: how long that took.
        num_tokens_shared: tokens prefilled for this cell and those that follow.
    """

    cell: Cell
    places: tuple[int, ...]
    outcomes: tuple[Any, ...]
    batches: tuple[MeteredBatch, ...]
    num_tokens_shared: int = 0


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker says of itself once it has loaded the model.

    Attributes:
        host: its machine.
        versions: of the packages on which answers depend.
        checkpoint: a hash of each part, as `harness.identity.checkpoint_hashes` has it, and of each file of statistics.
        free_bytes: of its GPU; None on a CPU.
        record: entries of a run's record that are about where it was computed.
    """

    host: str
    versions: Mapping[str, str]
    checkpoint: Mapping[str, str]
    free_bytes: int | None
    record: Mapping[str, Any] = field(default_factory=dict)

    def is_of_the_place_of(self, other: WorkerFacts) -> bool:
        """Whether another worker, such as one that took its place, answers on the same host and with the same."""
        return (self.host, self.record) == (other.host, other.record)


class Workers(Protocol):
    """Whoever does the jobs.

    Attributes:
        answers_all: whether every job that is given is done; if not, this process answers a share (`shards`).
        is_here: whether this process does all jobs by itself.
    """

    answers_all: bool
    is_here: bool

    @property
    def facts(self) -> Sequence[WorkerFacts]:
        """Of each process beside this one, also of one that was lost and replaced elsewhere; none if this process does
        the jobs itself."""

    @property
    def busy_sec(self) -> float:
        """Seconds in which jobs were done, by the clocks of those who did them, in sum."""

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Answered]]:
        """Do all jobs, in any order, and yield each answer as it comes.

        Raises:
            UsageError: in one line, for what a user can mend.
        """

    def close(self) -> None:
        """End the processes that belong to it."""
