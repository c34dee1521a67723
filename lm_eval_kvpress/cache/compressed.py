"""The compressed KV cache as a value: what each layer kept, which entries may be attended, how many bytes that is.

Knows tensors and transformers' cache classes. Does not know presses, models, text or lm-eval.

A `CompressedCache` is never changed once made. Scoring reads it through `reading_cache`, whose layers return
``[kept entries, new entries]`` and forget the new ones, so any number of continuations can be scored on one
compressed context without a clone. Decoding appends, so it works on the private buffers of `growing_cache`.

Letters in shape comments: B batch rows, H key-value heads, T cached entries of one layer, Q new tokens, D head_dim,
E hidden size. T differs from layer to layer; within a layer, rows with fewer entries are padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

ALIGNMENT = 16
"""Entries by which the buffers of a growing cache are rounded up."""


@dataclass(frozen=True, eq=False)
class LayerKV:
    """What one layer kept.

    Attributes:
        keys, values: ``(B, H, T, D)``.
        hidden: ``(B, 1 or H, T)``, True where an entry must not be attended: padding, or evicted by a press that
            masks instead of shrinking. None when every entry counts.
    """

    keys: torch.Tensor
    values: torch.Tensor
    hidden: torch.Tensor | None = None

    @property
    def num_entries(self) -> int:
        """T, the allocated entries, attended or not."""
        return self.keys.shape[2]

    def kept_per_row(self) -> list[float]:
        """Entries that can be attended, per row; the mean over heads where heads keep different entries."""
        batch = self.keys.shape[0]
        if self.hidden is None:
            return [float(self.num_entries)] * batch
        return (~self.hidden).sum(dim=-1).float().mean(dim=1).tolist()

    def select(self, rows: torch.Tensor) -> LayerKV:
        """The rows at the given indices, ``(B',)``."""
        return LayerKV(self.keys[rows], self.values[rows], None if self.hidden is None else self.hidden[rows])


@dataclass(frozen=True, eq=False)
class CompressedCache:
    """B prefilled and compressed contexts.

    Attributes:
        layers: one `LayerKV` per layer.
        num_seen: tokens prefilled, per row.
        next_position: the position of the next token, per row: the number seen, or the number kept after a press that
            rotates its keys to positions ``0..kept-1``.
        last_hidden: ``(B, E)``, the hidden state after the last prefilled token (before the head), or None. Only the
            rule ``query_tokens=0`` reads it: it comes from the *full* cache.
    """

    layers: tuple[LayerKV, ...]
    num_seen: tuple[int, ...]
    next_position: tuple[int, ...]
    last_hidden: torch.Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no layer of no row holds an entry."""
        return all(layer.num_entries == 0 for layer in self.layers)

    def kept(self) -> list[list[float]]:
        """Entries that can be attended: one list per row, one number per layer."""
        return [list(row) for row in zip(*(layer.kept_per_row() for layer in self.layers), strict=True)]

    def select(self, rows: Sequence[int]) -> CompressedCache:
        """The given rows, in the given order."""
        index = torch.tensor(list(rows))  # on the CPU, from where it indexes layers on any device
        last_hidden = None if self.last_hidden is None else self.last_hidden[index]
        return CompressedCache(
            tuple(layer.select(index) for layer in self.layers),
            tuple(self.num_seen[row] for row in rows),
            tuple(self.next_position[row] for row in rows),
            last_hidden,
        )


def empty_cache(batch: int, num_layers: int, num_heads: int, head_dim: int, like: torch.Tensor) -> CompressedCache:
    """A cache of B contexts of which nothing has been prefilled; dtype and device of ``like``."""
    nothing = like.new_empty(batch, num_heads, 0, head_dim)
    layers = tuple(LayerKV(nothing, nothing) for _ in range(num_layers))
    return CompressedCache(layers, (0,) * batch, (0,) * batch)


def stack(caches: Sequence[CompressedCache], rows: Sequence[int] | None = None) -> CompressedCache:
    """One ragged batch out of several caches: each layer padded on the left to its longest row.

    Args:
        rows: where each row goes, counted through all caches; in their order by default.
    """
    ends = list(accumulate(len(cache.num_seen) for cache in caches))
    places = list(range(ends[-1]) if rows is None else rows)
    order = sorted(range(len(places)), key=places.__getitem__)
    if len(caches) == 1:
        return caches[0] if order == places else caches[0].select(order)
    parts = [places[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    hidden_states = [cache.last_hidden for cache in caches if cache.last_hidden is not None]
    num_seen = [number for cache in caches for number in cache.num_seen]
    next_position = [position for cache in caches for position in cache.next_position]
    return CompressedCache(
        tuple(_stack_layers(layers, parts) for layers in zip(*(cache.layers for cache in caches), strict=True)),
        tuple(num_seen[row] for row in order),
        tuple(next_position[row] for row in order),
        torch.cat(hidden_states)[order] if len(hidden_states) == len(caches) else None,
    )


def _stack_layers(layers: Sequence[LayerKV], rows: Sequence[Sequence[int]]) -> LayerKV:
    """One layer of all caches; padding is zero, since a weight of zero times NaN would be NaN."""
    like, longest = layers[0].keys, max(layer.num_entries for layer in layers)
    batch, num_heads, dim = sum(map(len, rows)), like.shape[1], like.shape[3]
    keys, values = (like.new_zeros(batch, num_heads, longest, dim) for _ in range(2))
    hidden = None
    if any(layer.num_entries != longest or layer.hidden is not None for layer in layers):
        heads = max(1 if layer.hidden is None else layer.hidden.shape[1] for layer in layers)
        hidden = torch.ones(batch, heads, longest, dtype=torch.bool, device=like.device)  # (B, 1 | H, T)
    for layer, places in zip(layers, rows, strict=True):
        index, start = torch.tensor(places), longest - layer.num_entries
        keys[index, :, start:], values[index, :, start:] = layer.keys, layer.values
        if hidden is not None:
            hidden[index, :, start:] = False if layer.hidden is None else layer.hidden
    return LayerKV(keys, values, hidden)


def attention_bias(
    layer: LayerKV | None, pack: torch.Tensor, dtype: torch.dtype, num_query_heads: int
) -> torch.Tensor | None:
    """The additive attention mask of one layer, from that layer's own length.

    Args:
        layer: what the layer kept, or None for an empty cache.
        pack: ``(B, Q, Q)``, True where a new token may attend another new token.
        dtype: of the attention scores.
        num_query_heads: to repeat head-wise masks for grouped-query attention.

    Returns:
        ``(B, 1 or query heads, Q, T + Q)`` with 0 where attention is allowed and the lowest finite number elsewhere (an
        infinite one would turn a padding row, which attends nothing but itself, into NaN in some kernels), or None
        when nothing is hidden.
    """
    batch, num_new, _ = pack.shape
    hidden = None if layer is None else layer.hidden
    if num_new == 1 and hidden is None:
        return None
    num_cached = 0 if layer is None else layer.num_entries
    heads = 1 if hidden is None or hidden.shape[1] == 1 else num_query_heads
    lowest = torch.finfo(dtype).min
    bias = torch.zeros(batch, heads, num_new, num_cached + num_new, dtype=dtype, device=pack.device)
    if hidden is not None:
        by_head = hidden.repeat_interleave(heads // hidden.shape[1], dim=1)
        bias[..., :num_cached].masked_fill_(by_head[:, :, None, :], lowest)
    bias[..., num_cached:].masked_fill_(~pack[:, None], lowest)
    return bias


class ReadingLayer(DynamicLayer):
    """Returns the kept entries followed by the new ones, and keeps nothing of the new ones."""

    def __init__(self, layer: LayerKV) -> None:
        super().__init__()
        self.keys, self.values = layer.keys, layer.values
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)


class GrowingLayer(DynamicLayer):
    """Appends in place to buffers of a fixed capacity, so that decoding never copies the cache.

    Attention is given what is there, until `repeat_at` fixes the place: from then on it is given whole buffers, which
    keep their address and shape, and a mask must hide what is not written.
    """

    def __init__(self, layer: LayerKV, num_new: int) -> None:
        super().__init__()
        batch, heads, self.length, dim = layer.keys.shape
        capacity = -(-(self.length + num_new) // ALIGNMENT) * ALIGNMENT
        shape = (batch, heads, capacity, dim)
        self._keys, self._values = layer.keys.new_zeros(shape), layer.values.new_zeros(shape)  # 0 * NaN would be NaN
        self._keys[:, :, : self.length], self._values[:, :, : self.length] = layer.keys, layer.values
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self._place: torch.Tensor | None = None
        self._expose()

    @property
    def capacity(self) -> int:
        """Entries that the buffers can hold: rows of a mask over them are aligned as attention kernels want them."""
        return self._keys.shape[2]

    def repeat_at(self, place: torch.Tensor) -> None:
        """Makes every later update write one entry at ``place``, ``(1,)``, and return the whole buffers."""
        self._place = place
        self.keys, self.values = self._keys, self._values

    def _expose(self) -> None:
        self.keys, self.values = self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._place is not None:
            self._keys.index_copy_(2, self._place, key_states)
            self._values.index_copy_(2, self._place, value_states)
            return self.keys, self.values
        end = self.length + key_states.shape[2]
        assert end <= self.capacity, f"{end} entries in a buffer of {self.capacity}"
        self._keys[:, :, self.length : end], self._values[:, :, self.length : end] = key_states, value_states
        self.length = end
        self._expose()
        return self.keys, self.values


def reading_cache(cache: CompressedCache) -> Cache:
    """A transformers cache over the compressed one; a forward reads it and leaves it as it was."""
    return Cache(layers=[ReadingLayer(layer) for layer in cache.layers])


def growing_cache(cache: CompressedCache, num_new: int) -> Cache:
    """A transformers cache that starts from a copy of the compressed one and has room for ``num_new`` more entries."""
    return Cache(layers=[GrowingLayer(layer, num_new) for layer in cache.layers])
