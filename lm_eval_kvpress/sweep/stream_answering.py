"""Streams of one cell, a document per item: batches become jobs for workers, and each answer is a pair of loss files.

A document is saved before its seconds are recorded, so that a sweep that is killed may lack times and counts nothing
twice. Batches are made of all documents, whichever are finished: shards share them out alike, whenever they run. Knows
cells and loss files. Does not know where jobs are done.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from lm_eval_kvpress.engine.batching import in_batches
from lm_eval_kvpress.engine.outcomes import Streamed
from lm_eval_kvpress.engine.request_batches import RequestBatches
from lm_eval_kvpress.engine.stream_batches import StreamBatches
from lm_eval_kvpress.harness.answering import Answering, BatchLimits, session_limits
from lm_eval_kvpress.harness.session import Session
from lm_eval_kvpress.sweep.cell_run import CellRun
from lm_eval_kvpress.sweep.pace import Pace
from lm_eval_kvpress.sweep.workers.jobs import Job, Workers


class StreamCell:
    """Answer under a cell that streams (an `Answering` of the model).

    Args:
        session: of the cell.
        streams: answers its documents.
        others: answers its other requests, which do not stream.
    """

    def __init__(self, session: Session, streams: Answering, others: Answering) -> None:
        self._session, self._streams, self._others = session, streams, others

    def answers(self, kinds: Sequence[RequestBatches[Any]], bar: tqdm[Any]) -> Iterator[tuple[int, Any]]:
        streams = [requests for requests in kinds if isinstance(requests, StreamBatches)]
        if len(streams) < len(kinds):
            yield from self._others.answers(kinds, bar)
            return
        yield from self._streams.answers(kinds, bar)
        meter = self._session.runner.meter
        timed = {(one.task, one.doc_id, one.idx) for one in meter.records.on(meter.labels.machine).requests}
        for id in (id for requests in streams for id in requests.ids_stored):
            self._session.totals[id.task].num_documents_timed += (id.task, id.doc_id, id.idx) in timed


class StreamAnswering:
    """Have documents streamed by workers (an `Answering` of the model).

    Args:
        run: the cell whose answers lm-eval asks for.
        limits: sizes of batches of one session.
        workers: that do the jobs. If they do a share only, every answer is None.
    """

    def __init__(self, run: CellRun, limits: BatchLimits, workers: Workers) -> None:
        self._run, self._limits, self._workers = run, limits, workers

    def answers(self, kinds: Sequence[RequestBatches[Any]], bar: tqdm[Any]) -> Iterator[tuple[int, Any]]:
        for requests in kinds:
            assert isinstance(requests, StreamBatches)
            outcomes = self._run_all(requests, bar)
            if not self._workers.answers_all:
                yield from dict.fromkeys(requests.requests).items()
                continue
            requests.record_totals(outcomes, self._run.session.totals)
            yield from requests.answers(outcomes).items()

    def _run_all(self, requests: StreamBatches, bar: tqdm[Any]) -> dict[int, Streamed]:
        """Have done what is not finished; return every outcome that is there."""
        outcomes, pace = requests.stored, Pace()
        for job, answered in self._workers.run(self._jobs(requests, outcomes.keys())):
            items = [job.items[place] for place in answered.places]
            for item, outcome in zip(items, answered.outcomes, strict=True):
                requests.save(item, outcome)
                outcomes[item] = outcome
            self._run.record(requests, answered)
            self._run.store.answers.add({})  # the log is complete so far
            pace.add(answered, shares=False)
            bar.update(sum(map(requests.num_tokens, items)))
            bar.set_postfix({"tok/s": str(pace)}, refresh=False)
        return outcomes

    def _jobs(self, requests: StreamBatches, finished: Collection[int]) -> Iterator[Job]:
        """One for each batch with a document that is not finished, made when a worker asks for it."""
        limits = session_limits(self._limits, self._run.session, requests)
        blocks = list(in_batches(requests.longest_first(), limits[0], requests.length, limits[1]))
        for number, block in enumerate(blocks):
            if missing := [item for item in block if item not in finished]:
                todo = ((self._run.cell, frozenset(range(len(missing)))),)
                yield Job(requests.part(missing), missing, todo, block=number)
