"""Jobs are dealt out, and what a lost worker leaves is done by another one, once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.sweep.cells import Cell
from lm_eval_kvpress.sweep.workers.crew import Crew, Done, Event, Lost, Ready, checker
from lm_eval_kvpress.sweep.workers.jobs import Answered, Job, WorkerFacts

CELLS = [Cell(name, {}) for name in ("none", "knorm", "random")]
FACTS = WorkerFacts("host", {"torch": "2"}, {"weights": "aa"}, None)


class Simulated:
    """Workers that are lost as ``dies`` says, before they answer a cell."""

    def __init__(self, num_workers: int, dies: Callable[[], bool], seed: int = 0) -> None:
        self.num_workers, self._dies, self._random = num_workers, dies, random.Random(seed)
        self._events: list[list[Event]] = [[Ready(FACTS)] for _ in range(num_workers)]
        self.is_closed = False

    def send(self, worker: int, job: Job) -> None:
        assert not self._events[worker], "a worker has one job at a time"
        for cell, places in job.todo:
            if self._dies():
                self._events[worker] += [Lost("killed"), Ready(FACTS)]
                return
            self._events[worker].append(Answered(cell, tuple(sorted(places)), tuple(places), ()))
        self._events[worker].append(Done())

    def next_event(self) -> tuple[int, Event]:
        worker = self._random.choice([index for index, events in enumerate(self._events) if events])
        return worker, self._events[worker].pop(0)

    def close(self) -> None:
        self.is_closed = True


def jobs(count: int) -> list[Job]:
    requests: Any = None
    places = frozenset({0, 1})
    return [Job(requests, [2 * n, 2 * n + 1], tuple((cell, places) for cell in CELLS)) for n in range(count)]


def never() -> bool:
    return False


@pytest.mark.parametrize("seed", range(20))
def test_every_item_of_every_cell_is_answered_once_whoever_is_lost(seed: int) -> None:
    draw = random.Random(seed)
    crew = Crew(Simulated(3, lambda: draw.random() < 0.05, seed), checker(FACTS.versions, FACTS.checkpoint))
    for count in (0, 12, 1, 5):  # one call of lm-eval after the other
        found = Counter(
            (answered.cell.name, job.items[place])
            for job, answered in crew.run(jobs(count))
            for place in answered.places
        )
        assert found == Counter({(cell.name, item): 1 for cell in CELLS for item in range(2 * count)})


def test_a_batch_that_costs_every_worker_ends_the_sweep_in_one_line() -> None:
    crew = Crew(Simulated(2, lambda: True), checker(FACTS.versions, FACTS.checkpoint))
    with pytest.raises(UsageError, match="3 workers were lost over the same batch: lower --batch_size"):
        list(crew.run(jobs(1)))


@pytest.mark.parametrize(
    ("versions", "checkpoint", "says"),
    [({"torch": "3"}, {"weights": "aa"}, r"torch \(2 there, 3 here\)"), ({"torch": "2"}, {"weights": "bb"}, "weights")],
)
def test_a_worker_of_other_packages_or_weights_is_refused(versions: Any, checkpoint: Any, says: str) -> None:
    pool = Simulated(2, never)
    with pytest.raises(UsageError, match=f"the worker on host differs in {says}"):
        Crew(pool, checker(versions, checkpoint))
    assert pool.is_closed


def test_a_worker_that_was_replaced_elsewhere_is_still_named() -> None:
    """Not one that was lost before all were ready, which had no job, nor twice one whose successor is on its host."""
    hosts = (("a", 1), ("b", 1), ("b", 2))
    places = [WorkerFacts(host, FACTS.versions, FACTS.checkpoint, free_bytes) for host, free_bytes in hosts]
    pool = Simulated(2, never)
    pool._events = [[Ready(FACTS), Lost("killed"), Ready(places[0])], [Ready(FACTS)]]
    order = iter([0, 0, 0, 1])
    pool.next_event = lambda: (worker := next(order), pool._events[worker].pop(0))  # type: ignore[method-assign]
    crew = Crew(pool, checker(FACTS.versions, FACTS.checkpoint))
    assert [facts.host for facts in crew.facts] == ["a", "host"]
    for place in places[1:]:
        crew._handle(0, Lost("killed"), {})
        crew._handle(0, Ready(place), {})
    assert [facts.host for facts in crew.facts] == ["a", "b", "host"]


class Timed:
    """Workers of which each takes its own time for a job, by a clock that only they advance."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.num_workers, self._seconds = len(seconds), seconds
        self.now_sec, self.num_jobs = 0.0, Counter[int]()
        self._due: list[tuple[float, int, Event]] = [(0.0, worker, Ready(FACTS)) for worker in range(len(seconds))]

    def send(self, worker: int, job: Job) -> None:
        self.num_jobs[worker] += 1
        end_sec = self.now_sec + self._seconds[worker]
        for cell, places in job.todo:
            self._due.append((end_sec, worker, Answered(cell, tuple(sorted(places)), tuple(places), ())))
        self._due.append((end_sec, worker, Done(self._seconds[worker])))

    def next_event(self) -> tuple[int, Event]:
        first = min(self._due, key=lambda due: due[0])  # the first of several, as they were sent
        self._due.remove(first)
        self.now_sec = first[0]
        return first[1], first[2]

    def close(self) -> None: ...


def test_a_slow_worker_takes_fewer_jobs_and_only_its_last_is_waited_for() -> None:
    pool = Timed([10.0, 1.0, 1.0])
    crew = Crew(pool, checker(FACTS.versions, FACTS.checkpoint))
    found = Counter(job.items[place] for job, answered in crew.run(jobs(40)) for place in answered.places)
    assert found == Counter({item: len(CELLS) for item in range(80)})
    assert pool.num_jobs[0] == 2 and pool.num_jobs[1] + pool.num_jobs[2] == 38
    assert pool.now_sec == 20.0, "as if the jobs were dealt out in advance, it would be 140"
    assert crew.busy_sec == 2 * 10.0 + 38 * 1.0
