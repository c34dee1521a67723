"""Pack generated tokens some at a time, so that a long text holds few entries in full precision.

Only where entries have scales of their own. Groups of several entries are left as they are: which entries share one
would depend on how many tokens the neighbours in the batch hold back. Knows caches only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Protocol

from lm_eval_kvpress.cache.compressed import CompressedCache
from lm_eval_kvpress.cache.packed import PackedKV

PACKED_TOGETHER = 64


class Keeper(Protocol):
    """Changes the growing cache of a batch every few tokens: `decode_budget.BudgetKeeper` evicts, `EntryPacker` packs.

    Attributes:
        most_fed: tokens that are fed between two changes, at most.
    """

    @property
    def most_fed(self) -> int: ...

    def watching(self) -> AbstractContextManager[None]: ...

    def is_due(self, num_forwards: int, num_tokens: int) -> bool: ...

    def compress(self, cache: CompressedCache) -> CompressedCache: ...


class EntryPacker:
    """Packs what a batch generates (a `Keeper`).

    Args:
        num_newest: generated entries that always stay in full precision.
    """

    def __init__(self, num_newest: int) -> None:
        self._num_newest = num_newest

    @classmethod
    def of(cls, cache: CompressedCache) -> EntryPacker | None:
        """For a cache whose entries are packed one by one; None for any other."""
        layer = cache.layers[0]
        if not isinstance(layer, PackedKV) or not layer.packs_single_entries:
            return None
        return cls(layer.packed_keys.rule.residual)

    @property
    def most_fed(self) -> int:
        """As `Keeper` has it."""
        return self._num_newest + PACKED_TOGETHER

    def watching(self) -> AbstractContextManager[None]:
        """There is nothing to be seen."""
        return nullcontext()

    def is_due(self, num_forwards: int, num_tokens: int) -> bool:
        """Whether to pack before the newest of ``num_tokens`` tokens per row is fed."""
        num_full = num_tokens - 1 - self._num_newest
        return num_full > 0 and num_full % PACKED_TOGETHER == 0

    def compress(self, cache: CompressedCache) -> CompressedCache:
        """Pack all but the newest entries."""
        layers = tuple(
            layer.packed_but(self._num_newest) if isinstance(layer, PackedKV) else layer for layer in cache.layers
        )
        return replace(cache, layers=layers)
