"""Measure a run's batches, and share each batch's seconds out among its requests.

Knows clocks. Does not know files, lm-eval, models or presses by name.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from lm_eval_kvpress.records.clock import Clock, PhaseTiming
from lm_eval_kvpress.records.timings import (
    PHASES,
    BatchRecord,
    RequestRecord,
    RunLabels,
    RunRecords,
    machines_of,
    token_latencies,
)
from lm_eval_kvpress.records.totals import ContextRecord


@dataclass(frozen=True)
class RequestId:
    """The first three fields are those of lm-eval's samples; ``repeat`` counts the answers to one request."""

    task: str
    doc_id: int | None
    idx: int
    repeat: int = 0


@dataclass(frozen=True)
class RequestShare:
    """A request's part in one batch.

    Attributes:
        id: the request.
        num_prompt_tokens: tokens of its context that the batch used.
        num_output_tokens: tokens scored or produced for it.
        weight: its share of the batch's seconds, relative to the other requests of the batch.
        context: what was kept of its context, if one was prefilled.
        token_times_sec: for generated tokens, seconds from the start of the batch to each.
    """

    id: RequestId
    num_prompt_tokens: int
    num_output_tokens: int
    weight: float = 1.0
    context: ContextRecord | None = None
    token_times_sec: tuple[float, ...] = ()


@dataclass(frozen=True)
class MeteredBatch:
    """A batch with its requests, as one process hands it to another."""

    record: BatchRecord
    shares: tuple[RequestShare, ...]
    lost_weight: float = 0.0


class Recorder(Protocol):
    """Takes records as soon as they are complete, for a file or an endpoint."""

    def add(self, record: BatchRecord | RequestRecord) -> None: ...


class Meter:
    """Collects a run's batches and requests.

    Args:
        clock: times the phases; each batch takes the timings since the last.
        labels: of the run, for every record.
        recorders: get every record.

    Attributes:
        labels: as given; the machine is that whose speeds are the run's.
        records: all records so far.
    """

    def __init__(self, clock: Clock, labels: RunLabels, recorders: Sequence[Recorder] = ()) -> None:
        self._clock, self.labels, self._recorders = clock, labels, tuple(recorders)
        self._started_sec = 0.0
        self._open: dict[RequestId, list[tuple[BatchRecord, RequestShare, float]]] = {}
        self._lost: dict[int, float] = {}
        self._shapes: set[tuple[str, int, int]] = set()
        self.records = RunRecords()

    def restore(self, records: Iterable[BatchRecord | RequestRecord]) -> None:
        """Go on from the records of an interrupted run, which the recorders have already. They do not hold the times of
        single tokens, so a run that was interrupted after a generation has no ITL."""
        for record in records:
            if isinstance(record, BatchRecord):
                self.records.batches.append(record)
            else:
                self.records.requests.append(record)

    def start(self) -> None:
        """Mark the start of a batch; the timings of a batch that failed are dropped."""
        self._clock.take()
        self._started_sec = time.perf_counter()

    def batch(
        self,
        request_type: str,
        batch_size: int,
        shares: Sequence[RequestShare],
        *,
        decoding_steps: str | None = None,
        lost_weight: float = 0.0,
    ) -> None:
        """Record a batch with the timings since `start`, for the requests that shared it.

        Args:
            lost_weight: of work in the batch that is done again, whose seconds are no request's.
        """
        seconds, timings = time.perf_counter() - self._started_sec, self._clock.take()
        seconds += sum(timing.seconds for timing in timings if timing.is_borrowed)
        self._add(self._record(request_type, batch_size, seconds, timings, decoding_steps), shares, lost_weight)

    def take(self) -> list[MeteredBatch]:
        """Return the batches since the last call or `finish`, for the meter of the process that records them."""
        batches: dict[int, MeteredBatch] = {}
        for parts in self._open.values():
            for record, share, _ in parts:
                before = batches.get(record.batch, MeteredBatch(record, (), self._lost.get(record.batch, 0.0)))
                batches[record.batch] = replace(before, shares=(*before.shares, share))
        self._open.clear()
        self._lost.clear()
        return list(batches.values())

    def adopt(self, batches: Iterable[MeteredBatch]) -> None:
        """Record what another meter measured, on its device, as batches of this run."""
        for batch in batches:
            record = replace(batch.record, run=self.labels.run, batch=len(self.records.batches))
            self._add(record, batch.shares, batch.lost_weight)

    def _add(self, record: BatchRecord, shares: Sequence[RequestShare], lost_weight: float) -> None:
        self.records.batches.append(record)
        self._write(record)
        if lost_weight:
            self._lost[record.batch] = lost_weight
        total = lost_weight + sum(share.weight for share in shares)
        for share in shares:
            self._open.setdefault(share.id, []).append((record, share, share.weight / total))

    def finish(self, request_type: str) -> None:
        """Record the requests of the batches since the last call."""
        for id, parts in self._open.items():
            batches = [batch for batch, _, _ in parts]  # another process's, if that ran them
            labels = replace(self.labels, device=batches[-1].device, machine=machines_of(batches))
            record = _request_record(labels, id, request_type, parts)
            self.records.requests.append(record)
            self._write(record)
            self.records.itls[record] = [
                itl for _, share, _ in parts for itl in np.diff(share.token_times_sec).tolist()
            ]
        self._open.clear()
        self._lost.clear()

    def live(self) -> dict[str, str]:
        """Figures of the newest batch, for the progress bar."""
        if not self.records.batches:
            return {}
        newest = self.records.batches[-1]
        tokens = newest.num_prefill_tokens + newest.num_output_tokens
        figures = {"tok/s": f"{tokens / newest.seconds:,.0f}"} if newest.seconds else {}
        contexts = [share.context for parts in self._open.values() for _, share, _ in parts if share.context]
        if contexts:
            figures["kept"] = f"{100 * sum(map(_kept_share, contexts)) / len(contexts):.0f}%"
            figures["KV MiB"] = f"{contexts[-1].bytes_allocated / 2**20:.1f}"
        return figures

    def _record(
        self,
        request_type: str,
        batch_size: int,
        elapsed_sec: float,
        timings: Sequence[PhaseTiming],
        decoding_steps: str | None,
    ) -> BatchRecord:
        seconds, tokens, peaks = _by_phase(timings)
        outputs = tokens["score"] + tokens["decode"]
        shape = (request_type, batch_size, (tokens["prefill"] + outputs).bit_length())
        is_warmup = shape not in self._shapes
        self._shapes.add(shape)
        return BatchRecord(
            **vars(self.labels),
            record="batch",
            batch=len(self.records.batches),
            request_type=request_type,
            batch_size=batch_size,
            is_warmup=is_warmup,
            seconds=elapsed_sec,
            prefill_sec=seconds["prefill"],
            press_sec=seconds["press"],
            score_sec=seconds["score"],
            decode_sec=seconds["decode"],
            num_prefill_tokens=tokens["prefill"],
            num_output_tokens=outputs,
            prefill_tokens_per_sec=_rate(tokens["prefill"], seconds["prefill"]),
            output_tokens_per_sec=_rate(outputs, seconds["score"] + seconds["decode"]),
            prefill_peak_memory_bytes=peaks.get("prefill"),
            score_peak_memory_bytes=peaks.get("score"),
            decode_peak_memory_bytes=peaks.get("decode"),
            decoding_steps=decoding_steps,
        )

    def _write(self, record: BatchRecord | RequestRecord) -> None:
        for recorder in self._recorders:
            recorder.add(record)


def _by_phase(timings: Sequence[PhaseTiming]) -> tuple[Mapping[str, float], Mapping[str, int], Mapping[str, int]]:
    """Seconds, tokens and the highest peak of memory in bytes, by phase. A stream only scores."""
    seconds, tokens, peaks = defaultdict[str, float](float), Counter[str](), dict[str, int]()
    for timing in timings:
        phase = "score" if timing.phase == "stream" else timing.phase
        seconds[phase] += timing.seconds
        tokens[phase] += timing.num_tokens
        if timing.peak_memory_bytes is not None:
            peaks[phase] = max(peaks.get(phase, 0), timing.peak_memory_bytes)
    return seconds, tokens, peaks


def _request_record(
    labels: RunLabels, id: RequestId, request_type: str, parts: Sequence[tuple[BatchRecord, RequestShare, float]]
) -> RequestRecord:
    times = [time for _, share, _ in parts for time in share.token_times_sec]
    phases = ("seconds", *(f"{phase}_sec" for phase in PHASES))
    return RequestRecord(
        **vars(labels),
        record="request",
        **vars(id),
        request_type=request_type,
        num_batches=len(parts),
        is_warmup=any(batch.is_warmup for batch, _, _ in parts),
        num_prompt_tokens=sum(share.num_prompt_tokens for _, share, _ in parts),
        num_output_tokens=sum(share.num_output_tokens for _, share, _ in parts),
        **{name: sum(getattr(batch, name) * fraction for batch, _, fraction in parts) for name in phases},
        latency_sec=times[-1] if times else sum(batch.seconds for batch, _, _ in parts),
        **token_latencies(times),
        **_kept_and_bytes([share.context for _, share, _ in parts if share.context is not None]),
    )


def _kept_and_bytes(contexts: Sequence[ContextRecord]) -> dict[str, Any]:
    """What was kept of the last context, and sums over all contexts of a request."""
    kept = contexts[-1].kept_per_layer if contexts else ()
    return {
        "num_contexts": len(contexts),
        "num_context_tokens": sum(context.num_tokens for context in contexts),
        "kept_tokens_min": min(kept, default=None),
        "kept_tokens_mean": sum(kept) / len(kept) if kept else None,
        "kept_tokens_max": max(kept, default=None),
        "kv_bytes_before": sum(context.bytes_before for context in contexts),
        "kv_bytes_allocated": sum(context.bytes_allocated for context in contexts),
        "kv_bytes_effective": round(sum(_bytes_effective(context) for context in contexts)),
    }


def _bytes_effective(context: ContextRecord) -> float:
    return context.bytes_before * _kept_share(context) * context.packed_share


def _kept_share(context: ContextRecord) -> float:
    total = context.num_tokens * len(context.kept_per_layer)
    return sum(context.kept_per_layer) / total if total else 1.0


def _rate(num_tokens: int, seconds: float) -> float | None:
    return num_tokens / seconds if seconds else None
