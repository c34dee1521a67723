"""Seconds, tokens and bytes of each batch and each request, and the throughput and latency of a run.

Plain values. Names follow vLLM's benchmarks: TTFT is the time to the first token, TPOT = (end-to-end - TTFT) /
(tokens - 1), ITL the time between two tokens of a request.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

PERCENTILES = (50, 90, 99)
PHASES = ("prefill", "press", "score", "decode")
LATENCIES = ("ttft_sec", "tpot_sec")
NORMAL_95 = 1.96  # standard errors to either side


@dataclass(frozen=True)
class RunLabels:
    """What tells the records of one run from those of another in the same file.

    Attributes:
        run: a name that no other run has; the results hold it as ``config.kvpress.run``. Each process of a run with
            several has its own.
        model: the checkpoint, as the user typed it.
        press, arguments: the press's name, and its arguments as ``name=value``, separated by spaces.
        protocol: how contexts were compressed and scored, in the same way.
        device, dtype: where and in what the model computed.
        machine: in one line; speeds of two machines are never pooled. Empty if it is not known.
    """

    run: str
    model: str
    press: str
    arguments: str
    protocol: str
    device: str
    dtype: str
    machine: str


@dataclass(frozen=True)
class BatchRecord(RunLabels):
    """One batch: seconds per phase, press apart from prefill; tokens really run, without padding.

    ``seconds`` is measured from end to end, on its own: the rest beside the phases was spent between them.
    Tokens/s are per second of the phases; bytes are the most that was allocated, on CUDA only, and None beside what
    other presses share.
    ``is_warmup`` marks the first use of a shape (request type, batch size, power of two of the tokens).
    ``decoding_steps`` names what computed a step of generation.
    """

    record: str
    batch: int
    request_type: str
    batch_size: int
    is_warmup: bool
    seconds: float
    prefill_sec: float
    press_sec: float
    score_sec: float
    decode_sec: float
    num_prefill_tokens: int
    num_output_tokens: int
    prefill_tokens_per_sec: float | None
    output_tokens_per_sec: float | None
    prefill_peak_memory_bytes: int | None
    score_peak_memory_bytes: int | None
    decode_peak_memory_bytes: int | None
    decoding_steps: str | None


@dataclass(frozen=True)
class RequestRecord(RunLabels):
    """One request, over all its batches. Seconds are its share of theirs, so that requests sum to the run; its latency
    is the whole time of its batches.

    ``kept_tokens_*`` are over layers, for the last context that was prefilled for the request.
    """

    record: str
    task: str
    doc_id: int | None
    idx: int
    repeat: int
    request_type: str
    num_batches: int
    is_warmup: bool
    num_prompt_tokens: int
    num_output_tokens: int
    seconds: float
    prefill_sec: float
    press_sec: float
    score_sec: float
    decode_sec: float
    latency_sec: float
    ttft_sec: float | None
    tpot_sec: float | None
    itl_p50_sec: float | None
    itl_p90_sec: float | None
    itl_p99_sec: float | None
    num_contexts: int
    num_context_tokens: int
    kept_tokens_min: float | None
    kept_tokens_mean: float | None
    kept_tokens_max: float | None
    kv_bytes_before: int
    kv_bytes_allocated: int
    kv_bytes_effective: int


Timed = TypeVar("Timed", BatchRecord, RequestRecord)


def machines_of(records: Iterable[RunLabels]) -> str:
    """The machine of what these records sum up to: that of all of them, or the names of several."""
    return " and ".join(sorted({record.machine for record in records}))


def token_latencies(times_sec: Sequence[float]) -> dict[str, Any]:
    """TTFT, TPOT and percentiles of ITL of one request in seconds; None without enough tokens.

    Args:
        times_sec: when each token came, from the start of the request's batch.
    """
    itls = np.diff(times_sec)
    itl_percentiles = map(float, np.percentile(itls, PERCENTILES)) if len(itls) else [None] * len(PERCENTILES)
    return {
        "ttft_sec": times_sec[0] if times_sec else None,
        "tpot_sec": (times_sec[-1] - times_sec[0]) / (len(times_sec) - 1) if len(times_sec) > 1 else None,
        **{f"itl_p{p}_sec": value for p, value in zip(PERCENTILES, itl_percentiles, strict=True)},
    }


@dataclass
class RunRecords:
    """The records of a run.

    Attributes:
        batches, requests: in the order in which they were made.
        itls: seconds between the tokens of each request whose tokens were timed.
    """

    batches: list[BatchRecord] = field(default_factory=list)
    requests: list[RequestRecord] = field(default_factory=list)
    itls: dict[RequestRecord, list[float]] = field(default_factory=dict)

    def merge(self, other: RunRecords) -> None:
        """Add the records of another process."""
        self.batches += other.batches
        self.requests += other.requests
        self.itls |= other.itls

    def on(self, machine: str) -> RunRecords:
        """The records of one machine. Times of a request whose batches ran on several are of none."""
        batches = [batch for batch in self.batches if batch.machine == machine]
        return RunRecords(batches, [request for request in self.requests if request.machine == machine], self.itls)

    def summary(self) -> dict[str, Any]:
        """Tokens, seconds and tokens/s per phase; TTFT, TPOT and ITL in seconds. A figure leaves warm-up out, unless
        there is nothing else: ``includes_warmup`` names those (ITL goes with TPOT)."""
        chosen: dict[str, list[Any]] = {
            **{phase: _steady([b for b in self.batches if getattr(b, f"{phase}_sec")]) for phase in PHASES},
            **{name: _steady([r for r in self.requests if getattr(r, name) is not None]) for name in LATENCIES},
        }
        return {
            "num_batches": len(self.batches),
            "num_batches_warmup": sum(batch.is_warmup for batch in self.batches),
            "includes_warmup": [name for name, items in chosen.items() if any(item.is_warmup for item in items)],
            "num_requests": len(self.requests),
            "seconds_total": sum(batch.seconds for batch in self.batches),
            **{phase: _phase_sum(phase, chosen[phase]) for phase in PHASES if chosen[phase]},
            **{name: percentiles([getattr(record, name) for record in chosen[name]]) for name in LATENCIES},
            "itl_sec": self._itl(chosen["tpot_sec"]),
            "peak_memory_bytes": max(filter(None, map(_peak_memory, self.batches)), default=None),
        }

    def _itl(self, requests: Sequence[RequestRecord]) -> dict[str, float] | None:
        if any(request not in self.itls for request in requests):
            return None  # the run was interrupted, and single tokens are not on disk
        return percentiles([itl for request in requests for itl in self.itls[request]])

    def decoding_steps(self) -> dict[str, int]:
        """Number of batches by what computed their steps."""
        return dict(Counter(batch.decoding_steps for batch in self.batches if batch.decoding_steps is not None))


def _peak_memory(batch: BatchRecord) -> int | None:
    peaks = (batch.prefill_peak_memory_bytes, batch.score_peak_memory_bytes, batch.decode_peak_memory_bytes)
    return max(filter(None, peaks), default=None)


def _steady(items: Sequence[Timed]) -> list[Timed]:
    """Those beyond warm-up; all of them if there are no others."""
    return [item for item in items if not item.is_warmup] or list(items)


def _phase_sum(phase: str, batches: Sequence[BatchRecord]) -> dict[str, Any]:
    before = phase in ("prefill", "press")
    tokens_by_batch = [batch.num_prefill_tokens if before else batch.num_output_tokens for batch in batches]
    seconds_by_batch = [getattr(batch, f"{phase}_sec") for batch in batches]
    tokens, seconds = sum(tokens_by_batch), sum(seconds_by_batch)
    low, high = rate_interval(tokens_by_batch, seconds_by_batch)
    return {
        "num_batches": len(batches),
        "num_tokens": tokens,
        "seconds": seconds,
        "tokens_per_sec": tokens / seconds,
        "tokens_per_sec_low": low,
        "tokens_per_sec_high": high,
    }


def rate_interval(num_tokens: Sequence[int], seconds: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of a ratio of sums over batches (Cochran, Sampling Techniques, 6.4); None of one batch."""
    if len(seconds) < 2:
        return None, None
    rate = sum(num_tokens) / sum(seconds)
    residuals = np.asarray(num_tokens) - rate * np.asarray(seconds)
    error = float(np.sqrt(len(seconds) / (len(seconds) - 1) * np.square(residuals).sum())) / sum(seconds)
    return max(0.0, rate - NORMAL_95 * error), rate + NORMAL_95 * error


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    reach = NORMAL_95 / 2 / math.sqrt(len(values))  # of the median's rank: Conover, Practical Nonparametric Statistics
    low, high = np.quantile(values, np.clip([0.5 - reach, 0.5 + reach], 0, 1))
    return {
        "num_values": len(values),
        **{f"p{p}": float(value) for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)},
        "p50_low": float(low),
        "p50_high": float(high),
    }
