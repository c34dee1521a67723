"""A cell while its sweep lasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lm_eval_kvpress.engine.request_batches import RequestBatches
from lm_eval_kvpress.harness.machine import machine_name
from lm_eval_kvpress.harness.session import Session
from lm_eval_kvpress.records.log_file import ThroughputLog
from lm_eval_kvpress.sweep.cell_store import CellStore
from lm_eval_kvpress.sweep.cells import Cell
from lm_eval_kvpress.sweep.workers.jobs import Answered, WorkerFacts


@dataclass
class CellRun:
    """A cell, its session and what it has answered.

    Attributes:
        session: of the loaded model, under the cell's press and protocol.
        done: the items that have an answer.
        num_batches_before: of the meter's batches, those of earlier calls.
        num_tokens_shared: prefilled by this call for this cell and others.
    """

    cell: Cell
    session: Session
    store: CellStore
    log: ThroughputLog
    done: set[str] = field(default_factory=set)
    num_batches_before: int = 0
    num_tokens_shared: int = 0

    def note_workers(self, facts: Sequence[WorkerFacts]) -> None:
        """Note the processes that answer for this one, if others do. The times are those of the first one's machine."""
        self.session.num_ranks = max(1, len(facts))
        if facts:
            meter, device = self.session.runner.meter, facts[0].record["device"]
            machine = machine_name(facts[0].record["machine"], device)
            meter.labels = replace(meter.labels, device=device, machine=machine)

    def store_answers(self, requests: RequestBatches[Any], keys: Sequence[str], answered: Answered) -> None:
        """Bring a worker's answers to disk, behind the records of the time that they took.

        Args:
            requests: to which they belong.
            keys: the name of each answered item.
        """
        self.record(requests, answered)
        self.store.answers.add(dict(zip(keys, answered.outcomes, strict=True)))
        self.done.update(keys)

    def record(self, requests: RequestBatches[Any], answered: Answered) -> None:
        """Record how long a worker's answers took; the log is on disk with the next answers."""
        meter = self.session.runner.meter
        meter.adopt(answered.batches)
        if not requests.splits_requests:
            meter.finish(requests.request_type)
        self.num_tokens_shared += answered.num_tokens_shared

    @property
    def shares(self) -> bool:
        """Whether its prefills are shared with other cells."""
        return self.session.runner.compressor.shares

    @property
    def num_tokens_prefilled(self) -> int:
        """Tokens of this call's prefills of its own."""
        batches = self.session.runner.meter.records.batches[self.num_batches_before :]
        return 0 if self.shares else sum(batch.num_prefill_tokens for batch in batches)
