"""A budget for the cache while tokens are decoded: every few forwards a press chooses what stays of each row.

The rule is that of kvpress's ``DecodingPress``, for ragged batches: rows are scored in groups of equal length, so that
no padding enters a press. Four things differ from kvpress:

- Kept entries stay in the order of their tokens, on which presses that go by place rely the next time.
- Queries are taken at their positions: each of an observation window at its own, and those to come where the text goes
  on. kvpress has one position for a whole window, and expects queries to come near the beginning of the text.
- Of scores that equal the lowest kept one to rounding the newest entries stay; kvpress keeps what ``topk`` returns.
- What one head evicts while others keep it is gone. kvpress leaves it in the cache and scores it again by a fake key.

When to compress and what happened is here, how one layer is compressed in `decode_layer`. Knows caches and what a
decoding press is. Does not know text.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from lm_eval_kvpress.cache.compressed import CompressedCache
from lm_eval_kvpress.engine.decode_layer import LayerCompressor, Moment
from lm_eval_kvpress.engine.decode_watch import Watch
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.decoding import DecodingSpec


class BudgetKeeper:
    """Compresses the cache of one batch while it is decoded.

    Args:
        model: the model.
        spec: what scores entries, how many stay, and when.
        seeds: of each row's random draws, for a press that draws some.

    Attributes:
        compressions: of each, how many tokens every row had, and the entries of each row in its fullest layer; 0 for a
            row of which nothing was evicted.
    """

    def __init__(self, model: PressableModel, spec: DecodingSpec, seeds: Sequence[int] = ()) -> None:
        self._model, self._spec = model, spec
        self._watch = Watch(spec.num_hidden, spec.adds_up_attention, model.num_key_value_heads)
        self._layers = LayerCompressor(model, spec, self._watch, seeds)
        self._num_forwards, self._num_tokens = 0, 0
        self.compressions: list[tuple[int, list[int]]] = []

    def watching(self) -> AbstractContextManager[None]:
        """A context in which forwards are seen."""
        return self._watch.watching(self._model.attentions)

    def expect(self, num_new: int) -> None:
        """Say how many of the last tokens of the next forwards count, at first one; those before may be padding."""
        self._watch.num_new = num_new

    @property
    def most_fed(self) -> int:
        """Tokens that are fed between two compressions, at most (`decode_packing.Keeper`)."""
        return self._spec.interval

    def num_until_due(self, num_forwards: int) -> int:
        """Tokens that may be fed after ``num_forwards`` before a compression is due."""
        return self._spec.interval - num_forwards % self._spec.interval

    def is_due(self, num_forwards: int, num_tokens: int) -> bool:
        """Whether to compress after ``num_forwards`` forwards, which have made ``num_tokens`` new tokens per row."""
        self._num_forwards, self._num_tokens = num_forwards, num_tokens
        return num_forwards > 0 and num_forwards % self._spec.interval == 0

    def compress(self, cache: CompressedCache) -> CompressedCache:
        """Evict down to the budget. Rows may be padded anywhere."""
        num_kept = [self._spec.num_kept(num_seen) for num_seen in cache.num_seen]
        moment = Moment(self._num_forwards, num_kept, cache.next_position)
        with self._model.presented():
            layers = tuple(self._layers.compressed(index, one, moment) for index, one in enumerate(cache.layers))
        self._watch.hidden.clear()
        compressed = CompressedCache(layers, cache.num_seen, cache.next_position)
        pairs = zip(cache.kept(), compressed.kept(), strict=True)
        fullest = [round(max(before)) if before != after else 0 for before, after in pairs]
        self.compressions.append((self._num_tokens, fullest))
        return compressed

    def counts(self, row: int, num_new_tokens: int) -> tuple[int, int]:
        """How often a row was compressed before its last token, and the most entries that it then had."""
        found = [entries[row] for after, entries in self.compressions if after < num_new_tokens and entries[row]]
        return len(found), max(found, default=0)

    def num_before(self, row: int, num_new_tokens: int) -> int:
        """How many new tokens of a row, of so many, were predicted before anything was evicted."""
        return min([num_new_tokens, *(after for after, entries in self.compressions if entries[row])])
