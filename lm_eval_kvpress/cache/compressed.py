"""The compressed KV cache as a value: what each layer kept, which entries may be attended, ragged batches of it.

Knows tensors only: no presses, no models, no text. A `CompressedCache` never changes once it is made; `layers` makes
transformers caches that read it or continue from a copy of it, `masks` the attention masks that belong to it.

Letters in shape comments: B rows, H key-value heads, T cached entries of one layer, D head_dim, E hidden size.
T differs from layer to layer; within a layer, rows with fewer entries are padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch


class CachedLayer(Protocol):
    """What one layer kept, stored in any way: `LayerKV`, or packed integers (`packed.PackedKV`)."""

    @property
    def keys(self) -> torch.Tensor:
        """``(B, H, T, D)``, in full precision."""

    @property
    def values(self) -> torch.Tensor:
        """``(B, H, T, D)``, in full precision."""

    @property
    def hidden(self) -> torch.Tensor | None:
        """As `LayerKV.hidden`."""

    @property
    def num_rows(self) -> int:
        """B."""

    @property
    def num_entries(self) -> int:
        """T, the allocated entries, attended or not."""

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values as they are read."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    @property
    def num_bytes(self) -> int:
        """Bytes that hold the keys and values of all rows."""

    @property
    def entry_bytes(self) -> int:
        """Bytes of the key and the value of one entry of all heads, in full precision."""

    def kept_per_row(self) -> list[float]:
        """Entries that can be attended, per row; the mean over heads where heads keep different entries."""

    def select(self, rows: torch.Tensor) -> CachedLayer:
        """The rows at the given indices, ``(B',)``."""

    def joined(
        self, layers: Sequence[CachedLayer], rows: Sequence[Sequence[int]], hidden: torch.Tensor | None
    ) -> CachedLayer:
        """One layer of several caches, itself the first; each row goes where ``rows`` says, padded on the left."""


@dataclass(frozen=True, eq=False)
class LayerKV:
    """What one layer kept, in full precision (a `CachedLayer`).

    Attributes:
        keys, values: ``(B, H, T, D)``.
        hidden: ``(B, 1 or H, T)``, True where an entry must not be attended: padding, or evicted by a press that
            masks instead of shrinking. None when every entry counts.
    """

    keys: torch.Tensor
    values: torch.Tensor
    hidden: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.keys.shape[0]

    @property
    def num_entries(self) -> int:
        return self.keys.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def entry_bytes(self) -> int:
        return 2 * self.keys.shape[1] * self.keys.shape[3] * self.keys.element_size()

    def kept_per_row(self) -> list[float]:
        return kept_per_row(self)

    def select(self, rows: torch.Tensor) -> LayerKV:
        return LayerKV(self.keys[rows], self.values[rows], None if self.hidden is None else self.hidden[rows])

    def joined(
        self, layers: Sequence[CachedLayer], rows: Sequence[Sequence[int]], hidden: torch.Tensor | None
    ) -> LayerKV:
        keys, values = ([getattr(layer, name) for layer in layers] for name in ("keys", "values"))
        return LayerKV(left_padded(keys, rows), left_padded(values, rows), hidden)


def kept_per_row(layer: CachedLayer) -> list[float]:
    """As `CachedLayer.kept_per_row`, from what a layer hides."""
    if layer.hidden is None:
        return [float(layer.num_entries)] * layer.num_rows
    return (~layer.hidden).sum(dim=-1).float().mean(dim=1).tolist()


@dataclass(frozen=True, eq=False)
class CompressedCache:
    """B prefilled and compressed contexts.

    Attributes:
        layers: what each layer kept.
        num_seen: tokens prefilled, per row.
        next_position: the position of the next token, per row: the number seen, or the number kept after a press that
            rotates its keys to positions ``0..kept-1``.
        last_hidden: ``(B, E)``, the hidden state after the last prefilled token (before the head), or None. Only the
            rule ``query_tokens=0`` reads it: it comes from the *full* cache.
    """

    layers: tuple[CachedLayer, ...]
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
    return join(list(caches), rows)


def join(caches: list[CompressedCache], rows: Sequence[int] | None = None) -> CompressedCache:
    """As `stack`. Empties the list, so that a layer's parts are free as soon as they are joined, if nothing else holds
    them: no more than one layer is in memory twice."""
    ends = list(accumulate(len(cache.num_seen) for cache in caches))
    places = list(range(ends[-1]) if rows is None else rows)
    order = sorted(range(len(places)), key=places.__getitem__)
    if len(caches) == 1:
        return caches[0] if order == places else caches[0].select(order)
    parts = [places[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    hidden_states = [cache.last_hidden for cache in caches if cache.last_hidden is not None]
    last_hidden = torch.cat(hidden_states)[order] if len(hidden_states) == len(caches) else None
    num_seen = [number for cache in caches for number in cache.num_seen]
    next_position = [position for cache in caches for position in cache.next_position]
    by_layer = [list(layers) for layers in zip(*(cache.layers for cache in caches), strict=True)]
    caches.clear()
    joined = []
    for layers in by_layer:
        joined.append(_stack_layers(layers, parts))
        layers.clear()
    return CompressedCache(
        tuple(joined), tuple(num_seen[row] for row in order), tuple(next_position[row] for row in order), last_hidden
    )


def _stack_layers(layers: Sequence[CachedLayer], rows: Sequence[Sequence[int]]) -> CachedLayer:
    """One layer of all caches."""
    batch, longest, device = sum(map(len, rows)), max(layer.num_entries for layer in layers), layers[0].device
    hidden = None
    if any(layer.num_entries != longest or layer.hidden is not None for layer in layers):
        heads = max(1 if layer.hidden is None else layer.hidden.shape[1] for layer in layers)
        hidden = torch.ones(batch, heads, longest, dtype=torch.bool, device=device)  # (B, 1 | H, T)
        for layer, places in zip(layers, rows, strict=True):
            start = longest - layer.num_entries
            hidden[torch.tensor(places), :, start:] = False if layer.hidden is None else layer.hidden
    return layers[0].joined(layers, rows, hidden)


def left_padded(parts: Sequence[torch.Tensor], rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """One tensor of all rows, in which those that have fewer places in dim 2 are padded on the left.

    Padding is zero, since a weight of zero times NaN would be NaN.
    """
    like, longest = parts[0], max(part.shape[2] for part in parts)
    whole = like.new_zeros(sum(map(len, rows)), like.shape[1], longest, *like.shape[3:])
    for part, places in zip(parts, rows, strict=True):
        whole[torch.tensor(places), :, longest - part.shape[2] :] = part
    return whole
