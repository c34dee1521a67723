"""Compress contexts: which of them a press runs on, in which groups, and what it kept of each.

Knows a `PressSpec` and `prefill`. Does not know text or lm-eval.

No padding ever enters a press: contexts are prefilled in groups of equal length and become a ragged batch only after
compression. Contexts on which no press runs share one padded prefill.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from lm_eval_kvpress.cache.compressed import CompressedCache, stack
from lm_eval_kvpress.engine.batching import in_batches
from lm_eval_kvpress.engine.prefill import prefill, prefill_padded
from lm_eval_kvpress.engine.shared_prefill import SharedPrefills
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.records.clock import Clock
from lm_eval_kvpress.records.totals import ContextRecord

Tokens = tuple[int, ...]

FORWARD_TOKENS = {"cpu": 2_048}
"""The most tokens that one prefill runs side by side: on a CPU more are no faster, and tensors of more than 32 MiB
begin on pages that the kernel zeroes anew."""


class ShortContextError(UsageError):
    """A context is shorter than the press needs, and the user asked for an error."""


@dataclass(frozen=True, eq=False)
class CompressedBatch:
    """A ragged batch, ready to be scored or decoded.

    Attributes:
        cache: one row per context.
        queries: the held-back end of each context.
        pressed: per context, whether its scores count as scored under the press. They do if the press ran, and for
            ``press=none`` if anything was prefilled, so that the baseline's figures cover the same tokens as those of
            a press for which no context is too short.
        records: what was kept, per context.
        borrowed_sec: seconds spent earlier, on forwards that are shared with other presses.
    """

    cache: CompressedCache
    queries: list[Tokens]
    pressed: list[bool]
    records: list[ContextRecord]
    borrowed_sec: float = 0.0


class Compressor:
    """Prefills contexts under one press.

    Args:
        model: the model, presentable to kvpress.
        press: the press and its arguments.
        query_tokens: tokens held back at the end of each context (all of it, if it is shorter).
        short_context: ``keep``, ``shrink`` or ``error``.
        clock: times the prefills.
        shared: prefills whose clones are compressed, instead of running contexts here; the press must allow that.
    """

    def __init__(
        self,
        model: PressableModel,
        press: PressSpec,
        *,
        query_tokens: int,
        short_context: str,
        clock: Clock,
        shared: SharedPrefills | None = None,
    ) -> None:
        assert shared is None or press.shares_prefill, f"press={press.name} needs forwards of its own"
        self._model, self.press = model, press
        self._query_tokens, self._short_context, self._clock = query_tokens, short_context, clock
        self._shared = shared

    def check_lengths(self, contexts: Sequence[Sequence[int]]) -> None:
        """Under ``short_context=error``, refuse contexts that are too short.

        Raises:
            ShortContextError: naming the first one.
        """
        if self._short_context != "error" or self.press.is_none:
            return
        for context in contexts:
            length = max(0, len(context) - self._query_tokens)
            if length < self.press.min_context():
                raise ShortContextError(
                    f"a context of {length} prefilled tokens is shorter than the {self.press.min_context()} that "
                    f"press={self.press.name} needs; short_context=keep leaves such contexts uncompressed and counts "
                    "them, short_context=shrink shrinks the press's window"
                )

    def compress(self, contexts: Sequence[Tokens]) -> CompressedBatch:
        """Prefill all but the held-back end of each context, under the press wherever it runs."""
        prefixes = self._prefixes(contexts)
        ends = [len(prefix) for prefix in prefixes]
        borrowed_sec = self._borrow(contexts)
        order, caches, records = list[int](), list[CompressedCache](), dict[int, ContextRecord]()
        with self._clock.phase("prefill", num_tokens=0 if self._shared else sum(ends)):
            for rows, cache, pressed in self._prefilled(prefixes):
                records |= zip(rows, _context_records(cache, self.press, pressed), strict=True)
                order += rows
                caches.append(cache)
            cache = stack(caches, order)
        queries = [context[end:] for context, end in zip(contexts, ends, strict=True)]
        pressed_rows = [end > 0 if self.press.is_none else self._runs_on(end) for end in ends]
        in_order = [records[row] for row in range(len(contexts))]
        return CompressedBatch(cache, queries, pressed_rows, in_order, borrowed_sec)

    @property
    def shares(self) -> bool:
        """Whether it compresses clones of shared prefills."""
        return self._shared is not None

    def run_shared(self, contexts: Sequence[Tokens]) -> None:
        """Run the shared prefills of these contexts, unless that has been done."""
        assert self._shared is not None
        self._shared.run(self._prefixes(contexts), for_cache_only=self._for_cache_only)

    @property
    def _for_cache_only(self) -> bool:
        """Whether no token is predicted by the prefill, so that its hidden states are not needed."""
        return self._query_tokens > 0

    def _prefixes(self, contexts: Sequence[Tokens]) -> list[Tokens]:
        """What is prefilled: all but the held-back end of each context."""
        return [context[: max(0, len(context) - self._query_tokens)] for context in contexts]

    def _borrow(self, contexts: Sequence[Tokens]) -> float:
        """Record the seconds that the shared prefills of these contexts took, if they are shared."""
        if self._shared is None:
            return 0.0
        self.run_shared(contexts)
        timing = self._shared.share_of(self._prefixes(contexts))
        self._clock.borrow(timing)
        return timing.seconds

    def _runs_on(self, length: int) -> bool:
        if self.press.is_none or length == 0:
            return False
        return length >= self.press.min_context() or self._short_context == "shrink"

    def _prefilled(self, prefixes: Sequence[Tokens]) -> Iterator[tuple[list[int], CompressedCache, bool]]:
        """Rows that can be prefilled together, their cache, and whether the press ran."""
        pressed = [row for row, prefix in enumerate(prefixes) if self._runs_on(len(prefix))]
        empty = [row for row, prefix in enumerate(prefixes) if not prefix]
        plain = [row for row in range(len(prefixes)) if row not in pressed and row not in empty]
        if empty:
            yield empty, self._model.empty_cache(len(empty)), False
        if self._shared is not None:
            for rows in _by_length(plain, prefixes):
                yield rows, self._shared.compress([prefixes[row] for row in rows], None), False
        elif plain:
            yield plain, self._prefill_plain([prefixes[row] for row in plain]), False
        for rows in _by_length(pressed, prefixes):
            for group in self._side_by_side(rows, prefixes) if self.press.batches else [[row] for row in rows]:
                yield group, self._prefill([prefixes[row] for row in group]), True

    def _side_by_side(self, rows: Sequence[int], prefixes: Sequence[Tokens]) -> Iterator[list[int]]:
        """The rows, in order, as many at a time as one forward takes; clones of shared prefills need no forward."""
        limit = FORWARD_TOKENS.get(self._model.device.type) if self._shared is None else None
        return in_batches(rows, len(rows), lambda row: len(prefixes[row]), limit)

    def _prefill_plain(self, prefixes: Sequence[Tokens]) -> CompressedCache:
        groups = list(self._side_by_side(range(len(prefixes)), prefixes))
        return prefill_padded(self._model, prefixes, side_by_side=groups, for_cache_only=self._for_cache_only)

    def _prefill(self, prefixes: Sequence[Tokens]) -> CompressedCache:
        """Prefill prefixes of one length under the press."""
        length = len(prefixes[0])
        press = self.press.build(length, shrink=length < self.press.min_context())
        if press is not None:
            press.forward_hook = self._clock.timed(press.forward_hook)  # kvpress registers what the instance has
        with nullcontext() if self.press.batches else _seeded_by(prefixes[0]):
            if self._shared is not None:
                return self._shared.compress(prefixes, press, rerotates=self.press.rerotates)
            return prefill(
                self._model,
                torch.tensor(prefixes),
                press,
                rerotates=self.press.rerotates,
                for_cache_only=self._for_cache_only,
                reads_outputs=self.press.reads_outputs,
            )


def _by_length(rows: Sequence[int], prefixes: Sequence[Tokens]) -> Iterator[list[int]]:
    groups: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        groups[len(prefixes[row])].append(row)
    yield from groups.values()


def _context_records(cache: CompressedCache, press: PressSpec, pressed: bool) -> list[ContextRecord]:
    return [
        _context_record(cache, press, kept, num_seen, pressed)
        for kept, num_seen in zip(cache.kept(), cache.num_seen, strict=True)
    ]


def _context_record(
    cache: CompressedCache, press: PressSpec, kept: Sequence[float], num_seen: int, pressed: bool
) -> ContextRecord:
    """The record of one row; padding beside it in a plain prefill does not count."""
    sizes = [2 * layer.keys.shape[1] * layer.keys.shape[3] * layer.keys.element_size() for layer in cache.layers]
    entries = [layer.num_entries if pressed else num_seen for layer in cache.layers]
    return ContextRecord(
        num_tokens=num_seen,
        kept_per_layer=tuple(kept),
        bytes_before=sum(sizes) * num_seen,
        bytes_allocated=sum(size * count for size, count in zip(sizes, entries, strict=True)),
        pressed=pressed,
        is_short=not pressed and not press.is_none,
        is_shrunk=pressed and num_seen < press.min_context(),
        notes=tuple(press.notes(num_seen, len(cache.layers))) if pressed else (),
    )


@contextmanager
def _seeded_by(context: Tokens) -> Iterator[None]:
    """A context in which a press draws the same random numbers for the same tokens, in any order or batch."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices):
        torch.manual_seed(zlib.crc32(repr((torch.initial_seed(), context)).encode()))
        yield
