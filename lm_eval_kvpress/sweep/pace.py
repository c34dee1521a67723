"""Tokens per second of all workers together, for the progress bar."""

from __future__ import annotations

import time

from lm_eval_kvpress.sweep.workers.jobs import Answered


class Pace:
    """The speed since it was made.

    A prefill that several cells share counts once, for the cell that has it in ``num_tokens_shared``.
    """

    def __init__(self) -> None:
        self._start_sec, self._num_tokens = time.perf_counter(), 0

    def add(self, answered: Answered, *, shares: bool) -> None:
        """Count what a worker ran for an answer.

        Args:
            shares: whether the cell shares its prefills with others.
        """
        self._num_tokens += answered.num_tokens_shared
        for batch in answered.batches:
            self._num_tokens += batch.record.num_output_tokens + (0 if shares else batch.record.num_prefill_tokens)

    @property
    def tokens_per_sec(self) -> float:
        return self._num_tokens / max(1e-9, time.perf_counter() - self._start_sec)

    def __str__(self) -> str:
        return f"{self.tokens_per_sec:,.0f}"
