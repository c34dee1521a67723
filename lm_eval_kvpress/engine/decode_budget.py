"""A budget for the cache while tokens are decoded: every few forwards a press chooses what stays of each row.

The rule is that of kvpress's ``DecodingPress``, for ragged batches: rows are scored in groups of equal length, so that
no padding enters a press, and each keeps ``target_size`` entries. Three things differ from kvpress: kept entries stay
in the order of their tokens, on which presses that go by place rely the next time; each query of an observation window
is rotated to its own position; and of scores that equal the lowest kept one to rounding the newest entries stay, where
kvpress keeps what ``topk`` happens to return (`stream_eviction.highest`). Knows caches and kvpress's ``score``. Does
not know press names or text.

Letters in shape comments: B rows, G rows of equal length, H key-value heads, T cached entries, D head_dim, W newest
tokens whose hidden states are kept, E hidden size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lm_eval_kvpress.cache.compressed import CachedLayer, CompressedCache, LayerKV, stack
from lm_eval_kvpress.engine.stream_eviction import Scorer, highest
from lm_eval_kvpress.models.pressable import PressableModel


@dataclass(frozen=True)
class DecodingPlan:
    """When a press compresses the cache of a text that is being decoded, and to what size.

    Attributes:
        interval: forwards between two compressions.
        target_size: entries that every layer of every row keeps.
        num_hidden: hidden states of the newest tokens that the press looks at.
        press_for: a press for a standing cache of so many entries, set to keep ``target_size`` of them.
    """

    interval: int
    target_size: int
    num_hidden: int
    press_for: Callable[[int], Scorer]


class BudgetKeeper:
    """Compresses the cache of one batch while it is decoded.

    Attributes:
        compressions: of each, how many tokens every row had, and the entries of each row in its fullest layer.
    """

    def __init__(self, model: PressableModel, plan: DecodingPlan) -> None:
        self._model, self._plan = model, plan
        self._hidden: dict[int, torch.Tensor] = {}
        self._num_tokens = 0
        self.compressions: list[tuple[int, list[int]]] = []

    def is_due(self, num_forwards: int, num_tokens: int) -> bool:
        """Whether to compress after ``num_forwards`` forwards, which have made ``num_tokens`` new tokens per row."""
        self._num_tokens = num_tokens
        return num_forwards > 0 and num_forwards % self._plan.interval == 0

    def counts(self, row: int, num_new_tokens: int) -> tuple[int, int]:
        """How often a row was compressed before its last token, and the most entries that it then had."""
        target = self._plan.target_size
        found = [
            entries[row] for after, entries in self.compressions if after < num_new_tokens and entries[row] > target
        ]
        return len(found), max(found, default=0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context in which the newest hidden states that enter each attention are kept, ``(B, W, E)``."""

        def hook_for(index: int) -> Callable[..., None]:
            def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                newest = (args[0] if args else kwargs["hidden_states"])[:, -1:]
                before = [self._hidden[index]] if index in self._hidden else []
                self._hidden[index] = torch.cat([*before, newest], dim=1)[:, -self._plan.num_hidden :]

            return keep

        with ExitStack() as hooks:
            for index, attention in enumerate(self._model.attentions):
                hooks.callback(attention.register_forward_pre_hook(hook_for(index), with_kwargs=True).remove)
            yield

    def compress(self, cache: CompressedCache) -> CompressedCache:
        """Evict down to ``target_size`` entries per row. Rows may be padded anywhere."""
        positions = torch.tensor(cache.next_position, device=self._model.device)
        self.compressions.append((self._num_tokens, [round(max(entries)) for entries in cache.kept()]))
        with self._model.presented():
            layers = [self._compress_layer(index, layer, positions) for index, layer in enumerate(cache.layers)]
        self._hidden.clear()
        return CompressedCache(tuple(layers), cache.num_seen, cache.next_position)

    def _compress_layer(self, index: int, layer: CachedLayer, positions: torch.Tensor) -> CachedLayer:
        groups: dict[int, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        for row in range(layer.keys.shape[0]):
            places = _visible(layer, row)
            groups[len(places)].append((row, places))
        kept: dict[int, LayerKV] = {}
        for length, members in groups.items():
            rows = torch.tensor([row for row, _ in members], device=layer.keys.device)
            places = torch.stack([places for _, places in members])[:, None, :, None]  # (G, 1, T, 1)
            keys, values = (
                entries[rows].gather(2, places.expand(-1, entries.shape[1], -1, entries.shape[3]))
                for entries in (layer.keys, layer.values)
            )
            if length > self._plan.target_size:
                keys, values = self._best(index, rows, keys, values, positions)
            for place, (row, _) in enumerate(members):
                kept[row] = LayerKV(keys[place : place + 1], values[place : place + 1])
        return _stacked([kept[row] for row in range(len(kept))])

    def _best(
        self, index: int, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = keys.device  # of this layer: a model may be spread over several
        module, hidden = self._model.attentions[index], self._hidden[index].to(device)[rows]
        back = torch.arange(-hidden.shape[1], 0, device=device)
        angles = self._model.model.base_model.rotary_emb(hidden, positions.to(device)[rows, None] + back)
        kwargs = {"hidden_states": hidden, "position_embeddings": tuple(angle.to(device) for angle in angles)}
        press = self._plan.press_for(keys.shape[2])
        scores = press.score(module, hidden, keys, values, None, kwargs)  # (G, H, T)
        stay = highest(scores, self._plan.target_size)[..., None].expand(-1, -1, -1, keys.shape[3])
        return keys.gather(2, stay), values.gather(2, stay)


def _visible(layer: CachedLayer, row: int) -> torch.Tensor:
    if layer.hidden is None:
        return torch.arange(layer.num_entries, device=layer.keys.device)
    assert layer.hidden.shape[1] == 1, "entries hidden head by head cannot be evicted row by row"
    return (~layer.hidden[row, 0]).nonzero()[:, 0]


def _stacked(rows: Sequence[LayerKV]) -> CachedLayer:
    return stack([CompressedCache((row,), (0,), (0,)) for row in rows]).layers[0]
