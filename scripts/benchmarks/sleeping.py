"""Workers that sleep instead of answering, a thousand of them in a few processes, at the far end of real transports.

What they send is shaped as a model's answers are: one score of a continuation of four tokens per context, and the
record of the batch. Knows jobs and events. Does not know what the driver does with them.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import multiprocessing
import os
import resource
import selectors
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import ray

from lm_eval_kvpress.engine.outcomes import Scored
from lm_eval_kvpress.engine.scoring import BranchScore
from lm_eval_kvpress.records.meter import MeteredBatch, RequestShare
from lm_eval_kvpress.records.timings import BatchRecord
from lm_eval_kvpress.records.totals import ContextRecord
from lm_eval_kvpress.sweep.cells import Cell
from lm_eval_kvpress.sweep.launchers.processes import ProcessPool
from lm_eval_kvpress.sweep.launchers.ray_actors import RayPool
from lm_eval_kvpress.sweep.workers.crew import Done, Event, Ready
from lm_eval_kvpress.sweep.workers.jobs import Answered, Job, WorkerFacts

NUM_LAYERS = 32
FACTS = WorkerFacts("sleeping", {}, {}, None, {"device": "none"})
PER_ACTOR = 250
"""Workers of one process of Ray."""


def events_of(job: Job) -> Iterator[Event]:
    """What a worker would send for a job."""
    for cell, places in job.todo:
        yield _answered(job, cell, sorted(places))
    yield Done()


def _answered(job: Job, cell: Cell, places: Sequence[int]) -> Answered:
    context = ContextRecord(1000, (500.0,) * NUM_LAYERS, 2**24, 2**23, True)
    outcome = Scored((BranchScore((-1.5, -0.25, -3.125, -0.0625), False),), True, context)
    ids = [id for place in places for id in job.requests.identity(place)[2]]
    shares = tuple(RequestShare(id, 1000, 4, context=context) for id in ids)
    return Answered(cell, tuple(places), (outcome,) * len(places), (MeteredBatch(_record(len(places)), shares),))


def _record(batch_size: int) -> BatchRecord:
    labels = dict.fromkeys(("run", "model", "press", "arguments", "protocol", "device", "dtype", "machine"), "sleeping")
    seconds = dict.fromkeys(("seconds", "prefill_sec", "press_sec", "score_sec", "decode_sec"), 0.5)
    counts = {"num_prefill_tokens": 1000 * batch_size, "num_output_tokens": 4 * batch_size, "batch_size": batch_size}
    others = dict.fromkeys(BatchRecord.__dataclass_fields__.keys() - {*labels, *seconds, *counts})
    known = {"record": "batch", "batch": 0, "request_type": "loglikelihood", "is_warmup": False}
    values: dict[str, Any] = {**others, **labels, **seconds, **counts, **known}
    return BatchRecord(**values)


class SleepingProcesses(ProcessPool):
    """A pool of processes, of which there is one, behind as many pipes as there are workers.

    Args:
        sleep_sec: that a job takes.
    """

    def __init__(self, num_workers: int, sleep_sec: float) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self.num_workers, self._broken = num_workers, deque[int]()
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(num_workers)]
        theirs = [pair[1] for pair in pairs]
        self._pipes = {worker: pair[0] for worker, pair in enumerate(pairs)}
        self._processes = {0: context.Process(target=_sleep_behind, args=(theirs, sleep_sec), daemon=True)}
        self._processes[0].start()
        for pipe in theirs:
            pipe.close()


def _sleep_behind(pipes: Sequence[Connection], sleep_sec: float) -> None:
    """Be all workers at once: send each event when it is due, until the pipes are closed."""
    selector, due, order = selectors.DefaultSelector(), list[tuple[float, int, Connection, Event]](), itertools.count()
    for pipe in pipes:
        selector.register(pipe, selectors.EVENT_READ)
        pipe.send(Ready(FACTS))
    try:
        while True:
            wait_sec = max(0.0, due[0][0] - time.monotonic()) if due else None
            for key, _ in selector.select(wait_sec):
                asking: Any = key.fileobj
                events = list(events_of(asking.recv()))
                for number, event in enumerate(events, start=1):
                    moment = time.monotonic() + sleep_sec * min(1.0, number / (len(events) - 1))
                    heapq.heappush(due, (moment, next(order), asking, event))
            while due and due[0][0] <= time.monotonic():
                _, _, asking, event = heapq.heappop(due)
                asking.send(event)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


class SleepingActors(RayPool):
    """A pool of Ray's actors, each of them `PER_ACTOR` workers.

    Args:
        sleep_sec: that a job takes.
    """

    def __init__(self, num_workers: int, sleep_sec: float) -> None:
        self.num_workers, self._is_ours = num_workers, True
        os.environ.setdefault("RAY_worker_niceness", "0")  # else the driver waits for all other programs
        ray.init(address="local", include_dashboard=False, logging_level="warning")
        actor_class = ray.remote(_SleepingActor).options(num_cpus=0, max_concurrency=2 * PER_ACTOR)
        num_actors = -(-num_workers // PER_ACTOR)
        actors = [actor_class.remote(sleep_sec) for _ in range(num_actors)]
        self._actors = {worker: actors[worker // PER_ACTOR] for worker in range(num_workers)}
        self._events = {
            worker: actor.start.options(num_returns="streaming").remote() for worker, actor in self._actors.items()
        }


class _SleepingActor:
    def __init__(self, sleep_sec: float) -> None:
        self._sleep_sec = sleep_sec

    async def start(self) -> AsyncIterator[Event]:
        yield Ready(FACTS)

    async def do(self, job: Job) -> AsyncIterator[Event]:
        events = list(events_of(job))
        for event in events:
            if isinstance(event, Answered):
                await asyncio.sleep(self._sleep_sec / (len(events) - 1))
            yield event
