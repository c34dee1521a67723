"""A shard does its own jobs, all shards together do each job once, and joined ones do none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.sweep.cells import Cell
from lm_eval_kvpress.sweep.shards.shard import Shard
from lm_eval_kvpress.sweep.shards.share import AllAnswered, Joined, ShareOnly, stop_after_requests
from lm_eval_kvpress.sweep.workers.jobs import Answered, Job, WorkerFacts

REQUESTS: Any = None
CELL = Cell("a", {})


class Noting:
    """Workers that note what they are asked to do."""

    answers_all = True
    facts = (WorkerFacts("host", {}, {}, None),)
    is_closed = False

    def __init__(self) -> None:
        self.blocks = list[int]()

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Answered]]:
        self.blocks += [job.block for job in jobs]
        return iter(())

    def close(self) -> None:
        self.is_closed = True


def jobs(*blocks: int) -> list[Job]:
    return [Job(REQUESTS, [block], (), block=block) for block in blocks]


def test_all_shards_together_do_each_job_once() -> None:
    workers = [Noting() for _ in range(3)]
    for number, own in enumerate(workers, start=1):
        share = ShareOnly(own, Shard(number, 3), note=lambda: None)
        list(share.run(jobs(0, 1, 2, 2, 3, 4)))
        share.close()
        assert own.is_closed and share.facts == own.facts and not share.answers_all
    assert [own.blocks for own in workers] == [[0, 3], [1, 4], [2, 2]]


def test_who_answers_is_noted_before_the_first_answer_and_not_without_one() -> None:
    class Answering(Noting):
        def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Answered]]:
            for job in jobs:
                yield job, Answered(CELL, (), (), ())

    told = list[str]()
    share = ShareOnly(Answering(), Shard(1, 2), note=lambda: told.append("noted"))
    for blocks in ((1, 3), (0, 2), (4,)):
        told += [f"answer {job.block}" for job, _ in share.run(jobs(*blocks))]
    assert told == ["noted", "answer 0", "answer 2", "answer 4"]


def test_a_worker_that_took_anothers_place_elsewhere_is_noted_too() -> None:
    class Replaced(Noting):
        def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Answered]]:
            for job in jobs:
                if job.block == 2:
                    self.facts = (*self.facts, WorkerFacts("other host", {}, {}, None))
                yield job, Answered(CELL, (), (), ())

    workers, told = Replaced(), list[list[str]]()
    share = ShareOnly(workers, Shard(1, 1), note=lambda: told.append([facts.host for facts in workers.facts]))
    list(share.run(jobs(0, 1, 2, 3)))
    assert told == [["host"], ["host", "other host"]]


def test_joined_shards_name_whose_answers_are_missing() -> None:
    joined = Joined(3, Noting.facts)
    assert joined.answers_all and not list(joined.run(jobs()))
    with pytest.raises(
        UsageError, match="answers are missing of shard 1/3, 3/3, which was done: run the same command with --shard"
    ):
        joined.run(jobs(2, 3, 5))


def test_lm_eval_stops_before_it_makes_metrics_of_answers() -> None:
    class Tasks:
        task = type("Task", (), {"apply_filters": lambda self: None})()

        def load(self, names: list[str]) -> dict[str, Any]:
            return {"tasks": {name: self.task for name in names}}

    tasks: Any = Tasks()
    stop_after_requests(tasks)
    with pytest.raises(AllAnswered):
        tasks.load(["a"])["tasks"]["a"].apply_filters()
