"""Transformers cache layers over a compressed cache: one to read it, one to continue it token by token.

Scoring reads: a `ReadingLayer` returns the kept entries followed by the new ones and forgets the new ones, so any
number of continuations can be scored on one compressed context without a copy. Decoding appends: a `GrowingLayer` holds
buffers of its own, and a `GrowingPackedLayer` appends to packed entries, which stay as they are. Packed entries are
unpacked whenever a layer is read, for as long as its forward lasts. Knows tensors and transformers' cache classes. Does
not know presses, models or text.

Letters in shape comments: B rows, H key-value heads, T cached entries of one layer, D head_dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from lm_eval_kvpress.cache.compressed import CachedLayer, CompressedCache, LayerKV
from lm_eval_kvpress.cache.packed import PackedKV

ALIGNMENT = 16
"""The capacity of a growing layer is a multiple of this, so that rows of a mask over it are aligned."""


class ReadingLayer(DynamicLayer):
    """Kept entries that a forward reads; its own entries are returned after them and not kept."""

    def __init__(self, layer: CachedLayer) -> None:
        super().__init__()
        self._kept = layer
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([self._kept.keys, key_states], dim=2), torch.cat([self._kept.values, value_states], dim=2)

    def get_seq_length(self) -> int:
        return self._kept.num_entries


class GrowingLayer(DynamicLayer):
    """A copy of kept entries with capacity for more, so that decoding never copies the cache again.

    A forward is given the entries written so far. After `write_at` it is given the whole buffers, which keep their
    address and shape as a CUDA graph needs them; a mask must then hide what is not written yet.

    Args:
        layer: the kept entries.
        num_new: entries to be appended, at most.

    Attributes:
        length: entries written so far, unless `write_at` was called.
    """

    def __init__(self, layer: CachedLayer, num_new: int) -> None:
        super().__init__()
        batch, heads, self.length, dim = layer.keys.shape
        capacity = -(-(self.length + num_new) // ALIGNMENT) * ALIGNMENT
        shape = (batch, heads, capacity, dim)
        self._keys, self._values = layer.keys.new_zeros(shape), layer.values.new_zeros(shape)  # 0 * NaN would be NaN
        self._keys[:, :, : self.length], self._values[:, :, : self.length] = layer.keys, layer.values
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self._place: torch.Tensor | None = None
        self._show_written()

    @property
    def capacity(self) -> int:
        """Entries that the buffers can hold."""
        return self._keys.shape[2]

    def write_at(self, place: torch.Tensor) -> None:
        """Write one entry per later update at ``place``, ``(1,)``, and return the whole buffers from now on."""
        self._place = place
        self.keys, self.values = self._keys, self._values

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
        self._show_written()
        return self.keys, self.values

    def kept(self, hidden: torch.Tensor | None) -> CachedLayer:
        """What was written so far, as views of the buffers."""
        return LayerKV(self.keys, self.values, hidden)

    def _show_written(self) -> None:
        self.keys, self.values = self._keys[:, :, : self.length], self._values[:, :, : self.length]


class GrowingPackedLayer(DynamicLayer):
    """Packed entries, which are not copied, followed by new ones in full precision.

    Args:
        layer: the packed entries.
        num_new: entries to be appended, at most.
    """

    def __init__(self, layer: PackedKV, num_new: int) -> None:
        super().__init__()
        nothing = dataclasses.replace(
            layer.newest, keys=layer.newest.keys[:, :, :0], values=layer.newest.values[:, :, :0]
        )
        self._kept, self._new = layer, GrowingLayer(nothing, num_new)
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True

    @property
    def length(self) -> int:
        """Entries packed and written so far."""
        return self._kept.num_entries + self._new.length

    @property
    def capacity(self) -> int:
        """Entries that the layer can hold, or some more."""
        return -(-(self._kept.num_entries + self._new.capacity) // ALIGNMENT) * ALIGNMENT

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._new.update(key_states, value_states)
        return torch.cat([self._kept.keys, keys], dim=2), torch.cat([self._kept.values, values], dim=2)

    def get_seq_length(self) -> int:
        return self.length

    def kept(self, hidden: torch.Tensor | None) -> CachedLayer:
        """The packed entries, and what was written so far behind them."""
        before, new = self._kept.newest, self._new
        newest = LayerKV(torch.cat([before.keys, new.keys], dim=2), torch.cat([before.values, new.values], dim=2))
        return dataclasses.replace(self._kept, newest=newest, hidden=hidden)


def reading_cache(cache: CompressedCache) -> Cache:
    """A transformers cache over the compressed one, which a forward reads and leaves as it was."""
    return Cache(layers=[ReadingLayer(layer) for layer in cache.layers])


def growing_cache(cache: CompressedCache, num_new: int) -> Cache:
    """A transformers cache that starts from the compressed one, which stays as it is, and takes ``num_new`` more."""
    return Cache(layers=[_growing(layer, num_new) for layer in cache.layers])


def _growing(layer: CachedLayer, num_new: int) -> GrowingLayer | GrowingPackedLayer:
    return GrowingPackedLayer(layer, num_new) if isinstance(layer, PackedKV) else GrowingLayer(layer, num_new)
