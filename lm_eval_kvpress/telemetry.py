"""What was really scored, kept and timed: records with units in their names, and a clock that synchronizes.

Knows torch's clocks. Does not know lm-eval, presses or models.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


class RollingScore(float):
    """A document's log-likelihood in nats that also says how many tokens it is a sum over.

    lm-eval hands a task one number per rolling request; this number carries the counts that token perplexity needs.

    Attributes:
        num_tokens: tokens scored.
        num_tokens_pressed: of these, the tokens scored over a cache that a press had compressed.
        loglikelihood_pressed: their log-likelihood in nats.
    """

    num_tokens: int
    num_tokens_pressed: int
    loglikelihood_pressed: float

    def __new__(
        cls, loglikelihood: float, num_tokens: int, num_tokens_pressed: int, loglikelihood_pressed: float
    ) -> RollingScore:
        score = super().__new__(cls, loglikelihood)
        score.num_tokens = num_tokens
        score.num_tokens_pressed = num_tokens_pressed
        score.loglikelihood_pressed = loglikelihood_pressed
        return score

    def __reduce__(self) -> tuple[Any, ...]:
        counts = (self.num_tokens, self.num_tokens_pressed, self.loglikelihood_pressed)
        return RollingScore, (float(self), *counts)


@dataclass(frozen=True)
class PhaseTiming:
    """One phase of one batch.

    Attributes:
        phase: ``prefill`` (the press included), ``score`` or ``decode``.
        seconds: wall clock between two synchronized edges.
        num_tokens: real tokens that the phase ran over, padding not counted.
        batch_size: contexts in the batch.
    """

    phase: str
    seconds: float
    num_tokens: int
    batch_size: int


class Clock:
    """Times phases; the device is synchronized at the edges of a phase only."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.timings: list[PhaseTiming] = []

    @contextmanager
    def phase(self, name: str, *, num_tokens: int, batch_size: int) -> Iterator[None]:
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self.timings.append(PhaseTiming(name, time.perf_counter() - start, num_tokens, batch_size))

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@dataclass(frozen=True)
class ContextRecord:
    """One prefilled context.

    Attributes:
        num_tokens: tokens prefilled.
        kept_per_layer: entries that can be attended afterwards; a mean over heads where heads differ.
        bytes_before: bytes of its keys and values without a press.
        bytes_allocated: bytes they take afterwards. A masking press leaves them all allocated.
        pressed: whether a press ran over this context.
    """

    num_tokens: int
    kept_per_layer: tuple[float, ...]
    bytes_before: int
    bytes_allocated: int
    pressed: bool


@dataclass
class KeptTotals:
    """Sums over many contexts, one instance for the pressed and one for the others."""

    num_contexts: int = 0
    num_tokens: int = 0
    kept_per_layer: list[float] = field(default_factory=list)
    bytes_before: int = 0
    bytes_allocated: int = 0

    def add(self, record: ContextRecord) -> None:
        if not self.kept_per_layer:
            self.kept_per_layer = [0.0] * len(record.kept_per_layer)
        self.num_contexts += 1
        self.num_tokens += record.num_tokens
        self.kept_per_layer = [a + b for a, b in zip(self.kept_per_layer, record.kept_per_layer, strict=True)]
        self.bytes_before += record.bytes_before
        self.bytes_allocated += record.bytes_allocated

    def summary(self) -> dict[str, Any]:
        """Counts, kept shares (fractions of the prefilled tokens) and bytes, ready for JSON."""
        shares = [kept / self.num_tokens for kept in self.kept_per_layer] if self.num_tokens else []
        share = sum(shares) / len(shares) if shares else None
        return {
            "num_contexts": self.num_contexts,
            "num_tokens": self.num_tokens,
            "kept_tokens_per_layer": [round(kept, 3) for kept in self.kept_per_layer],
            "kept_share": share,
            "kept_share_min_layer": min(shares, default=None),
            "kept_share_max_layer": max(shares, default=None),
            "kv_bytes_before": self.bytes_before,
            "kv_bytes_allocated": self.bytes_allocated,
            "kv_bytes_effective": None if share is None else round(self.bytes_before * share),
        }


@dataclass
class ScoredTotals:
    """Tokens scored for one task, and their log-likelihood in nats."""

    num_tokens: int = 0
    num_tokens_pressed: int = 0
    loglikelihood: float = 0.0
    loglikelihood_pressed: float = 0.0
