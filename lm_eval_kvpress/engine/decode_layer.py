"""Compress one layer of a ragged batch by a decoding press: who is scored together, and what is left of each row.

Rows of which all heads see equally many entries are scored in groups of one length; a row whose heads keep different
entries is scored head by head. What is left of a row depends on no other row. Knows cached layers. Does not know when
they are compressed, or text.

Letters in shape comments: H key-value heads, n entries.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from lm_eval_kvpress.cache.compressed import CachedLayer
from lm_eval_kvpress.engine.decode_choice import best_of_all, best_of_each
from lm_eval_kvpress.engine.decode_row import Row, layer_of, rows_of
from lm_eval_kvpress.engine.decode_scores import DecodingScores
from lm_eval_kvpress.engine.decode_watch import Watch
from lm_eval_kvpress.engine.stream_eviction import highest
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.cam import merge_evicted
from lm_eval_kvpress.presses.decoding import DecodingSpec


@dataclass(frozen=True)
class Moment:
    """When a batch is compressed.

    Attributes:
        num_forwards: before.
        num_kept: entries that stay of each row.
        positions: of each row's next token.
    """

    num_forwards: int
    num_kept: Sequence[int]
    positions: Sequence[int]


class LayerCompressor:
    """Compresses layers of one batch.

    Args:
        model: the model.
        spec: what scores entries, and how many stay.
        watch: what was seen of the forwards before; `Watch.received` loses what is evicted.
        seeds: of each row's random draws, for a press that draws some.
    """

    def __init__(self, model: PressableModel, spec: DecodingSpec, watch: Watch, seeds: Sequence[int]) -> None:
        self._model, self._spec, self._watch, self._seeds = model, spec, watch, seeds
        self._scores = DecodingScores(model, spec, watch)
        self._merged_at: dict[tuple[int, int], int] = {}  # by layer and row, the forwards before its last merge

    def compressed(self, index: int, layer: CachedLayer, moment: Moment) -> CachedLayer:
        """The layer of this index without what is evicted."""
        rows = rows_of(layer, self._watch.received.get(index), self._model.num_key_value_heads)
        for places in self._groups(rows, moment):
            for place, row in zip(places, self._compressed(index, places, rows, moment), strict=True):
                rows[place] = row
        found, received = layer_of(rows, layer)
        if received is not None:
            self._watch.received[index] = received
        return found

    def _groups(self, rows: Sequence[Row], moment: Moment) -> Iterator[list[int]]:
        """Places of rows of which something is evicted; those that are scored together stand together."""
        groups = defaultdict(list)
        for place, row in enumerate(rows):
            num_kept, counts = moment.num_kept[place], row.counts
            shared = self._spec.alpha_safeguard is not None
            if sum(counts) > num_kept * len(counts) if shared else max(counts) > num_kept:
                alone = place if self._spec.draws or not row.is_even else None
                position = moment.positions[place] if self._spec.reads_position else None
                groups[alone, counts[0], num_kept, position].append(place)
        yield from groups.values()

    def _compressed(self, index: int, places: list[int], rows: Sequence[Row], moment: Moment) -> list[Row]:
        """What is left of the rows of a group."""
        group, num_kept = [rows[place] for place in places], moment.num_kept[places[0]]
        positions = [moment.positions[place] for place in places]
        with self._drawing(index, places[0], moment):
            scores = self._scores.of_rows(index, places, group, num_kept, positions)
            if self._spec.merge_budget is not None:
                num_new = moment.num_forwards - self._merged_at.get((index, places[0]), 0)
                self._merged_at[index, places[0]] = moment.num_forwards
                return [self._merged(index, group[0], torch.stack(scores[0]), num_kept, num_new)]
        return [row.at(self._best(of_row, num_kept)) for row, of_row in zip(group, scores, strict=True)]

    def _best(self, scores: Sequence[torch.Tensor], num_kept: int) -> list[torch.Tensor]:
        if self._spec.alpha_safeguard is None:
            return best_of_each(scores, num_kept)
        return best_of_all(scores, num_kept, self._spec.alpha_safeguard)

    def _merged(self, index: int, row: Row, scores: torch.Tensor, num_kept: int, num_new: int) -> Row:
        """A row into which CaM merged the best of what it evicts: as many entries as there are new tokens.

        Args:
            scores: ``(H, n)``, averaged over heads, which keep the same entries.
        """
        assert row.received is not None and self._spec.merge_budget is not None
        of_token = scores.mean(dim=0)
        stays = torch.zeros_like(of_token, dtype=torch.bool)
        stays[highest(of_token, num_kept)] = True
        evicted = (~stays).nonzero()[:, 0]
        merges = torch.zeros_like(stays)
        merges[evicted[highest(of_token[evicted], min(num_new, len(evicted)))]] = True
        keys, values = merge_evicted(
            self._model.attentions[index],
            *(row.keys, row.values, row.received[..., 0]),
            stays=stays,
            merges=merges,
            merge_budget=self._spec.merge_budget,
        )
        return replace(row.at([stays.nonzero()[:, 0]] * len(row.counts)), keys=keys, values=values)

    @contextmanager
    def _drawing(self, index: int, place: int, moment: Moment) -> Iterator[None]:
        """A context in which random draws depend on the row, the layer and the moment alone."""
        if not self._spec.draws:
            yield
            return
        with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
            key = torch.initial_seed(), self._seeds[place], index, moment.num_forwards
            torch.manual_seed(zlib.crc32(repr(key).encode()))
            yield
