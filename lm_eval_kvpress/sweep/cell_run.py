"""A cell while its sweep lasts."""

from __future__ import annotations

from dataclasses import dataclass, field

from lm_eval_kvpress.harness.session import Session
from lm_eval_kvpress.records.log_file import ThroughputLog
from lm_eval_kvpress.sweep.cell_store import CellStore
from lm_eval_kvpress.sweep.cells import Cell


@dataclass
class CellRun:
    """A cell, its session and what it has answered.

    Attributes:
        session: of the loaded model, under the cell's press and protocol.
        done: the items that have an answer.
        num_batches_before: of the runner's batches, those of earlier calls.
    """

    cell: Cell
    session: Session
    store: CellStore
    log: ThroughputLog
    done: set[str] = field(default_factory=set)
    num_batches_before: int = 0

    @property
    def shares(self) -> bool:
        """Whether its prefills are shared with other cells."""
        return self.session.runner.compressor.shares

    @property
    def num_tokens_prefilled(self) -> int:
        """Tokens of this call's prefills of its own."""
        batches = self.session.runner.meter.records.batches[self.num_batches_before :]
        return 0 if self.shares else sum(batch.num_prefill_tokens for batch in batches)
