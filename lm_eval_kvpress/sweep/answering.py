"""Answers for all cells of one protocol at once: batches become jobs for workers, and what comes back is stored.

What has been answered is on disk before it counts, cell by cell: a sweep that is killed loses one batch of one cell of
each worker. Knows cells and their stores. Does not know where jobs are done.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from lm_eval_kvpress.engine.batching import in_batches
from lm_eval_kvpress.engine.request_batches import RequestBatches
from lm_eval_kvpress.harness.answering import BatchLimits, shared_limits
from lm_eval_kvpress.sweep.cell_run import CellRun
from lm_eval_kvpress.sweep.pace import Pace
from lm_eval_kvpress.sweep.workers.jobs import Job, Workers


class CellAnswering:
    """Answer under one cell, and run every request under its peers as well (an `Answering` of the model).

    Args:
        run: the cell whose answers lm-eval asks for.
        peers: it and the unfinished cells that share its prefills.
        limits: sizes of batches of one session.
        workers: that do the jobs. If they do a share only, every answer is None.
    """

    def __init__(self, run: CellRun, peers: Sequence[CellRun], limits: BatchLimits, workers: Workers) -> None:
        self._run, self._peers, self._limits, self._workers = run, list(peers), limits, workers

    def answers(self, kinds: Sequence[RequestBatches[Any]], bar: tqdm[Any]) -> Iterator[tuple[int, Any]]:
        for requests in kinds:
            for peer in self._peers:
                peer.session.check_lengths(requests)
        for requests in kinds:
            keys = _keys(requests)
            self._run_all(requests, keys, bar)
            if not self._workers.answers_all:
                yield from dict.fromkeys(requests.requests).items()
                continue
            if requests.splits_requests:
                self._run.session.num_stored_windows += len(keys)
            stored = self._run.store.answers.outcomes()
            outcomes = {item: stored[key] for item, key in enumerate(keys)}
            requests.record_totals(outcomes, self._run.session.totals)
            yield from requests.answers(outcomes).items()

    def _run_all(self, requests: RequestBatches[Any], keys: Sequence[str], bar: tqdm[Any]) -> None:
        """Have done what some peer has not answered yet; the bar counts answers of all of them."""
        unfinished = [peer for peer in self._peers if not peer.done.issuperset(keys)]
        counted = unfinished or [self._run]
        bar.total += len(keys) * (len(counted) - 1)
        bar.update(sum(len(peer.done.intersection(keys)) for peer in counted))
        runs, pace = {peer.cell.name: peer for peer in unfinished}, Pace()
        for job, answered in self._workers.run(self._jobs(requests, keys, unfinished)):
            run = runs[answered.cell.name]
            run.store_answers(requests, [keys[job.items[place]] for place in answered.places], answered)
            pace.add(answered, shares=run.shares)
            bar.update(len(answered.places))
            live = {"cell": run.cell.name, **run.session.runner.meter.live(), "tok/s": str(pace)}
            bar.set_postfix(live, refresh=False)
        for peer in unfinished:
            peer.session.runner.meter.finish(requests.request_type)
            peer.store.answers.add({})  # the records of whole documents belong to what is kept

    def _jobs(self, requests: RequestBatches[Any], keys: Sequence[str], runs: Sequence[CellRun]) -> Iterator[Job]:
        """One for each batch that some cell has not answered, made when a worker asks for it."""
        max_items, max_tokens = shared_limits(self._limits, requests)
        blocks = [block for items in requests.segments() for block in in_batches(items, max_items, requests.length)]
        for number, block in enumerate(blocks):
            for items in in_batches(block, max_items, requests.length, max_tokens):
                missing = [item for item in items if any(keys[item] not in run.done for run in runs)]
                todo = [
                    (run.cell, frozenset(place for place, item in enumerate(missing) if keys[item] not in run.done))
                    for run in runs
                ]
                if missing:
                    found = tuple((cell, places) for cell, places in todo if places)
                    yield Job(requests.part(missing), missing, found, block=number)


def _keys(requests: RequestBatches[Any]) -> list[str]:
    """A name for each item that says all that its outcome depends on, within the sweep's settings.

    A document that repeats itself has windows that are alike: their names differ by a count.
    """
    num_items = sum(len(segment) for segment in requests.segments())
    seen, keys = Counter[str](), []
    for text in (repr((requests.request_type, requests.identity(item))) for item in range(num_items)):
        keys.append(hashlib.sha256(f"{text} {seen[text]}".encode()).hexdigest()[:24])
        seen[text] += 1
    return keys
