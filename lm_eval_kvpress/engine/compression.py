"""Compress contexts: which of them a press runs on, in which groups, and what it kept of each.

Knows a `PressSpec` and `prefill`. Does not know text or lm-eval.

No padding ever enters a press: contexts are prefilled in groups of equal length and become a ragged batch only after
compression. Contexts on which no press runs share one padded prefill. If entries are stored as integers, each context
is packed once the press has acted on it, before it gets neighbours of other lengths.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from lm_eval_kvpress.cache.compressed import CompressedCache, LayerKV, join
from lm_eval_kvpress.cache.packed import pack
from lm_eval_kvpress.cache.quantized import Quantization
from lm_eval_kvpress.engine.batching import in_batches
from lm_eval_kvpress.engine.context_records import context_records
from lm_eval_kvpress.engine.contexts import Context, without_repeats
from lm_eval_kvpress.engine.footprint import PACKED_FORWARD_TOKENS
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


@dataclass(frozen=True, eq=False)
class _Latest:
    """The compressed part that ended a batch, for the next batch, which may begin with it.

    Attributes:
        tokens, record: of that one context.
        cache: likewise; None where prefills are shared with other presses, so that a clone is compressed again.
    """

    tokens: Tokens
    cache: CompressedCache | None
    record: ContextRecord

    def serves(self, context: Context) -> bool:
        """Whether the context has the same compressed part."""
        return context.is_shared and context.compressed == self.tokens


class Compressor:
    """Prefills contexts under one press.

    Args:
        model: the model, presentable to kvpress.
        press: the press and its arguments.
        short_context: ``keep``, ``shrink`` or ``error``.
        clock: times the prefills.
        shared: prefills whose clones are compressed, instead of running contexts here; the press must allow that.
        quantization: how kept entries are stored; None for full precision.
    """

    def __init__(
        self,
        model: PressableModel,
        press: PressSpec,
        *,
        short_context: str,
        clock: Clock,
        shared: SharedPrefills | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        assert shared is None or press.shares_prefill, f"press={press.name} needs forwards of its own"
        self._model, self.press, self.quantization = model, press, quantization
        self._short_context, self._clock, self._shared = short_context, clock, shared
        self._latest: _Latest | None = None

    def check_lengths(self, contexts: Sequence[Context]) -> None:
        """Under ``short_context=error``, refuse contexts that are too short.

        Raises:
            ShortContextError: naming the first one.
        """
        if self._short_context != "error" or self.press.is_none:
            return
        for context in contexts:
            length, press = len(context.compressed), self._press_for(context)
            if self.press.reads_question and not context.num_question:
                raise ShortContextError(
                    f"a context of {length} prefilled tokens does not end with a question, which press={press.name} "
                    "reads; short_context=keep leaves such contexts uncompressed and counts them"
                )
            if length < press.min_context():
                raise ShortContextError(
                    f"a context of {length} prefilled tokens is shorter than the {press.min_context()} that "
                    f"press={press.name} needs; short_context=keep leaves such contexts uncompressed and counts "
                    "them, short_context=shrink shrinks the press's window"
                )

    def compress(self, contexts: Sequence[Context]) -> CompressedBatch:
        """Prefill all but the held-back end of each context, under the press wherever it runs.

        A compressed part that contexts share is prefilled once, also if the batch before ended with it.
        """
        distinct, places = without_repeats(contexts)
        cache, records, borrowed_sec = self._compress(distinct)
        last, place = contexts[-1], places[-1]
        kept = None if self._shared else cache.select([place])
        self._latest = _Latest(last.compressed, kept, records[place]) if last.is_shared else None
        if len(distinct) < len(contexts):
            cache = cache.select(places)
        pressed_rows = [
            bool(context.compressed) if self.press.is_none else self._runs_on(context) for context in contexts
        ]
        queries = [context.held_back for context in contexts]
        return CompressedBatch(cache, queries, pressed_rows, [records[place] for place in places], borrowed_sec)

    def _compress(self, contexts: Sequence[Context]) -> tuple[CompressedCache, list[ContextRecord], float]:
        """Compress contexts without repeats: their cache, their records, and the seconds borrowed."""
        latest, all_rows = self._latest, range(len(contexts))
        known = [row for row in all_rows if latest is not None and latest.serves(contexts[row])]  # at most one
        borrowed_sec = self._borrow(contexts, [row for row in all_rows if row not in known])
        num_tokens = 0
        if self._shared is None:
            num_tokens = sum(len(contexts[row].compressed) for row in all_rows if row not in known)
        with self._clock.phase("prefill", num_tokens=num_tokens):
            order, caches, records = self._parts(contexts, known)
            cache = join(caches, order)
        return cache, [records[row] for row in all_rows], borrowed_sec

    def _parts(
        self, contexts: Sequence[Context], known: Sequence[int]
    ) -> tuple[list[int], list[CompressedCache], dict[int, ContextRecord]]:
        """The contexts as parts of one length each, in any order; the known one need not be prefilled."""
        latest, order, caches = self._latest, list[int](), list[CompressedCache]()
        records = dict[int, ContextRecord]()
        if known and latest is not None and latest.cache is not None:
            order, caches, records = list(known), [latest.cache], {known[0]: latest.record}
        todo = [row for row in range(len(contexts)) if row not in order]
        missing = [contexts[row] for row in todo]
        for places, cache, pressed in self._stored(missing, _for_cache_only(contexts)):
            rows, press = [todo[place] for place in places], self._press_for(missing[places[0]])
            records |= zip(rows, context_records(cache, press, pressed), strict=True)
            order += rows
            caches.append(cache)
        return order, caches, records

    @property
    def shares(self) -> bool:
        """Whether it compresses clones of shared prefills."""
        return self._shared is not None

    def run_shared(self, contexts: Sequence[Context]) -> None:
        """Run the shared prefills of these contexts, unless that has been done."""
        assert self._shared is not None
        self._shared.run([context.compressed for context in contexts], for_cache_only=_for_cache_only(contexts))

    def _borrow(self, contexts: Sequence[Context], rows: Sequence[int]) -> float:
        """Run shared prefills of contexts, and record the seconds that those of some of them took."""
        if self._shared is None:
            return 0.0
        self.run_shared(contexts)
        timing = self._shared.share_of([contexts[row].compressed for row in rows])
        self._clock.borrow(timing)
        return timing.seconds

    def _press_for(self, context: Context) -> PressSpec:
        return self.press.for_question(context.num_question)

    def _runs_on(self, context: Context) -> bool:
        length, press = len(context.compressed), self._press_for(context)
        if press.is_none or length == 0 or (press.reads_question and not context.num_question):
            return False
        return length >= press.min_context() or self._short_context == "shrink"

    def _stored(
        self, contexts: Sequence[Context], for_cache_only: bool
    ) -> Iterator[tuple[list[int], CompressedCache, bool]]:
        """As `_prefilled`; if entries are packed, rows of one length each, so that no padding is packed."""
        for places, cache, pressed in self._prefilled(contexts, for_cache_only):
            if self.quantization is None:
                yield places, cache, pressed
            elif pressed:
                yield places, pack(cache, self.quantization), pressed
            else:
                for rows in _alike(range(len(places)), [contexts[place] for place in places]):
                    part = _without_padding(cache.select(rows))
                    yield [places[row] for row in rows], pack(part, self.quantization), pressed

    def _prefilled(
        self, contexts: Sequence[Context], for_cache_only: bool
    ) -> Iterator[tuple[list[int], CompressedCache, bool]]:
        """Rows that can be prefilled together, their cache, and whether the press ran."""
        prefixes = [context.compressed for context in contexts]
        pressed = [row for row, context in enumerate(contexts) if self._runs_on(context)]
        empty = [row for row, prefix in enumerate(prefixes) if not prefix]
        plain = [row for row in range(len(prefixes)) if row not in pressed and row not in empty]
        if empty:
            yield empty, self._model.empty_cache(len(empty)), False
        if self._shared is not None:
            for rows in _alike(plain, contexts):
                yield rows, self._shared.compress([prefixes[row] for row in rows], None), False
        elif plain and self.quantization is None:
            yield plain, self._prefill_plain([prefixes[row] for row in plain], for_cache_only), False
        else:  # packed before the next ones are prefilled
            for rows in self._side_by_side(plain, prefixes):
                yield rows, self._prefill_plain([prefixes[row] for row in rows], for_cache_only), False
        for rows in _alike(pressed, contexts):
            press = self._press_for(contexts[rows[0]])
            for group in self._side_by_side(rows, prefixes) if press.batches else [[row] for row in rows]:
                yield group, self._prefill([prefixes[row] for row in group], press, for_cache_only), True

    def _side_by_side(self, rows: Sequence[int], prefixes: Sequence[Tokens]) -> Iterator[list[int]]:
        """The rows, in order, as many at a time as one forward takes; clones of shared prefills need no forward."""
        limit = FORWARD_TOKENS.get(self._model.device.type) if self._shared is None else None
        if self.quantization is not None:
            limit = min(limit or PACKED_FORWARD_TOKENS, PACKED_FORWARD_TOKENS)
        return in_batches(rows, len(rows), lambda row: len(prefixes[row]), limit)

    def _prefill_plain(self, prefixes: Sequence[Tokens], for_cache_only: bool) -> CompressedCache:
        groups = list(self._side_by_side(range(len(prefixes)), prefixes))
        return prefill_padded(self._model, prefixes, side_by_side=groups, for_cache_only=for_cache_only)

    def _prefill(self, prefixes: Sequence[Tokens], spec: PressSpec, for_cache_only: bool) -> CompressedCache:
        """Prefill prefixes of one length under the press."""
        length = len(prefixes[0])
        press = spec.build(length, shrink=length < spec.min_context())
        if press is not None:  # kvpress registers what the instance has; a replay runs its own hooks
            step: Any = "replay" if hasattr(press, "replay") else "forward_hook"
            setattr(press, step, self._clock.timed(getattr(press, step)))
        with nullcontext() if spec.batches else _seeded_by(prefixes[0]):
            if self._shared is not None:
                return self._shared.compress(prefixes, press, rerotates=spec.rerotates)
            return prefill(
                self._model,
                torch.tensor(prefixes),
                press,
                rerotates=spec.rerotates,
                for_cache_only=for_cache_only,
                reads_outputs=spec.reads_outputs,
            )


def _for_cache_only(contexts: Sequence[Context]) -> bool:
    """Whether no token is predicted by the prefill, so that its hidden states are not needed."""
    return all(context.num_held_back for context in contexts)


def _without_padding(cache: CompressedCache) -> CompressedCache:
    """Contexts of one length on which no press ran, as `prefill_padded` leaves them."""
    (length,) = set(cache.num_seen)
    layers = (LayerKV(layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in cache.layers)
    return replace(cache, layers=tuple(layers))


def _alike(rows: Sequence[int], contexts: Sequence[Context]) -> Iterator[list[int]]:
    """Rows whose contexts have one length, and questions of one length where a press reads them."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row in rows:
        groups[len(contexts[row].compressed), contexts[row].num_question].append(row)
    yield from groups.values()


@contextmanager
def _seeded_by(context: Tokens) -> Iterator[None]:
    """A context in which a press draws the same random numbers for the same tokens, in any order or batch."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices):
        torch.manual_seed(zlib.crc32(repr((torch.initial_seed(), context)).encode()))
        yield
