"""Contexts to a compressed batch: what contexts share is prefilled once, and what was kept of each is recorded.

Knows the groups of `grouped_prefill` and prefills that presses share. Does not know text or lm-eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lm_eval_kvpress.cache.compressed import CompressedCache, join
from lm_eval_kvpress.cache.quantized import Quantization
from lm_eval_kvpress.engine.context_records import context_records
from lm_eval_kvpress.engine.contexts import Context, without_repeats
from lm_eval_kvpress.engine.grouped_prefill import GroupedPrefill
from lm_eval_kvpress.engine.shared_prefill import SharedPrefills
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.records.clock import Clock
from lm_eval_kvpress.records.totals import ContextRecord

Tokens = tuple[int, ...]


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
        self.press, self.quantization, self._clock, self._shared = press, quantization, clock, shared
        self._prefill = GroupedPrefill(model, press, short_context, clock, shared, quantization)
        self._latest: _Latest | None = None

    def check_lengths(self, contexts: Sequence[Context]) -> None:
        """Under ``short_context=error``, refuse contexts that are too short.

        Raises:
            ShortContextError: naming the first one.
        """
        self._prefill.check_lengths(contexts)

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
        runs_on = self._prefill.runs_on
        pressed_rows = [bool(context.compressed) if self.press.is_none else runs_on(context) for context in contexts]
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
        """The contexts as groups, in any order; the known one need not be prefilled."""
        latest, order, caches = self._latest, list[int](), list[CompressedCache]()
        records = dict[int, ContextRecord]()
        if known and latest is not None and latest.cache is not None:
            order, caches, records = list(known), [latest.cache], {known[0]: latest.record}
        todo = [row for row in range(len(contexts)) if row not in order]
        missing = [contexts[row] for row in todo]
        for group in self._prefill.groups(missing, for_cache_only=_for_cache_only(contexts)):
            rows = [todo[place] for place in group.places]
            records |= zip(rows, context_records(group.cache, group.press, group.pressed), strict=True)
            order += rows
            caches.append(group.cache)
        return order, caches, records

    def forget(self) -> None:
        """Free what is kept for the next batch."""
        self._latest = None

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


def _for_cache_only(contexts: Sequence[Context]) -> bool:
    """Whether no token is predicted by the prefill, so that its hidden states are not needed."""
    return all(context.num_held_back for context in contexts)
