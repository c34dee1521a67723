"""Answers for all cells of one protocol at once: batch by batch, one prefill, then every cell compresses and scores.

What has been answered is on disk before the next cell is run: a sweep that is killed loses one batch of one cell.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from lm_eval_kvpress.engine.batching import batches, in_halves
from lm_eval_kvpress.engine.request_batches import RequestBatches
from lm_eval_kvpress.harness.answering import BatchLimits
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.sweep.answers import Outcome
from lm_eval_kvpress.sweep.cell_run import CellRun


class CellAnswering:
    """Answer under one cell, and run every request under its peers as well (an `Answering` of the model).

    Args:
        run: the cell whose answers lm-eval asks for.
        peers: it and the unfinished cells that share its prefills.
        limits: sizes of batches of one session.
    """

    def __init__(self, run: CellRun, peers: Sequence[CellRun], limits: BatchLimits) -> None:
        self._run, self._peers, self._limits = run, list(peers), limits

    def answers(self, kinds: Sequence[RequestBatches[Any]], bar: tqdm[Any]) -> Iterator[tuple[int, Any]]:
        for requests in kinds:
            for peer in self._peers:
                peer.session.check_lengths(requests)
        for requests in kinds:
            keys = _keys(requests)
            self._run_all(requests, keys, bar)
            stored = self._run.store.answers.outcomes()
            outcomes = {item: stored[key] for item, key in enumerate(keys)}
            requests.record_totals(outcomes, self._run.session.totals)
            yield from requests.answers(outcomes).items()

    def _run_all(self, requests: RequestBatches[Any], keys: Sequence[str], bar: tqdm[Any]) -> None:
        """Run what some peer has not answered yet, batch by batch; the bar counts answers of all of them."""
        unfinished = [peer for peer in self._peers if not peer.done.issuperset(keys)]
        counted = unfinished or [self._run]
        bar.total += len(keys) * (len(counted) - 1)
        bar.update(sum(len(peer.done.intersection(keys)) for peer in counted))
        for items in batches(requests, *self._shared_limits(requests)):
            missing = [item for item in items if any(keys[item] not in peer.done for peer in unfinished)]
            if missing:
                in_halves(lambda part: _run_batch(requests, part, keys, unfinished, bar), missing)
        for peer in unfinished:
            peer.session.runner.meter.finish(requests.request_type)
            peer.store.answers.add({})  # the records of whole documents belong to what is kept

    def _shared_limits(self, requests: RequestBatches[Any]) -> tuple[int, int | None]:
        """A shared prefill is held whole, with half as much again, and a clone beside it: a third of the tokens."""
        max_items, max_tokens = self._limits(parse_press("none"), requests)
        return max_items, None if max_tokens is None else max(1, max_tokens // 3)


def _run_batch(
    requests: RequestBatches[Any], items: Sequence[int], keys: Sequence[str], runs: Sequence[CellRun], bar: tqdm[Any]
) -> list[None]:
    """Run one batch under every cell that has not answered it."""
    shared = [run for run in runs if run.shares]
    if shared:
        shared[0].session.runner.compressor.run_shared(requests.contexts(items))
    for run in runs:
        runner, todo = run.session.runner, [item for item in items if keys[item] not in run.done]
        if todo:
            found = requests.run(runner, todo, bar.update)
            outcomes: dict[str, Outcome] = {keys[item]: outcome for item, outcome in zip(todo, found, strict=True)}
            if not requests.splits_requests:
                runner.meter.finish(requests.request_type)
            run.store.answers.add(outcomes)
            run.done.update(outcomes)
        bar.set_postfix({"cell": run.cell.name, **runner.meter.live()}, refresh=False)
    return [None] * len(items)


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
