"""A layer of the compressed cache whose entries are stored as packed integers and unpacked when they are read.

All entries of a context are packed but the newest ``residual``. The first block of a row is filled up at its beginning,
so that rows of any length end together, as the rows of a ragged batch do (`compressed`). Groups belong to one row: what
a row reads does not depend on its neighbours. An entry is packed once: those that stay when others are evicted keep
their codes. Knows tensors only: no presses, no models, no text.

Letters in shape comments: B rows, H key-value heads, T cached entries of one layer, E entries of a block, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from lm_eval_kvpress.cache import quantized
from lm_eval_kvpress.cache.compressed import CachedLayer, CompressedCache, LayerKV, kept_per_row, left_padded
from lm_eval_kvpress.cache.quantized import Blocks, Quantization


@dataclass(frozen=True, eq=False)
class PackedKV:
    """What one layer kept, packed (a `CachedLayer`).

    Attributes:
        packed_keys, packed_values: all entries but the newest.
        num_unused: places at the beginning of the blocks that no row uses.
        newest: entries in full precision, which follow the packed ones; no mask of their own.
        hidden: ``(B, 1 or H, T)``, as `LayerKV` has it.
    """

    packed_keys: Blocks
    packed_values: Blocks
    num_unused: int
    newest: LayerKV
    hidden: torch.Tensor | None = None

    @property
    def keys(self) -> torch.Tensor:
        """``(B, H, T, D)``, unpacked anew at every call."""
        return torch.cat([self.packed_keys.unpack()[:, :, self.num_unused :], self.newest.keys], dim=2)

    @property
    def values(self) -> torch.Tensor:
        """``(B, H, T, D)``, unpacked anew at every call."""
        return torch.cat([self.packed_values.unpack()[:, :, self.num_unused :], self.newest.values], dim=2)

    @property
    def num_rows(self) -> int:
        return self.newest.num_rows

    @property
    def num_entries(self) -> int:
        return self.packed_keys.num_entries - self.num_unused + self.newest.num_entries

    @property
    def dtype(self) -> torch.dtype:
        return self.newest.dtype

    @property
    def device(self) -> torch.device:
        return self.newest.device

    @property
    def num_bytes(self) -> int:
        return self.packed_keys.num_bytes + self.packed_values.num_bytes + self.newest.num_bytes

    @property
    def entry_bytes(self) -> int:
        return self.newest.entry_bytes

    def kept_per_row(self) -> list[float]:
        return kept_per_row(self)

    def select(self, rows: torch.Tensor) -> PackedKV:
        return replace(
            self,
            packed_keys=self.packed_keys.map(lambda tensor: tensor[rows]),
            packed_values=self.packed_values.map(lambda tensor: tensor[rows]),
            newest=self.newest.select(rows),
            hidden=None if self.hidden is None else self.hidden[rows],
        )

    def joined(
        self, layers: Sequence[CachedLayer], rows: Sequence[Sequence[int]], hidden: torch.Tensor | None
    ) -> PackedKV:
        packed = [layer for layer in layers if isinstance(layer, PackedKV)]
        assert len(packed) == len(layers), "packed and unpacked rows in one batch"
        keys = _joined([layer.packed_keys for layer in packed], rows)
        longest = max(layer.packed_keys.num_entries - layer.num_unused for layer in packed)
        newest = self.newest.joined([layer.newest for layer in packed], rows, None)
        values = _joined([layer.packed_values for layer in packed], rows)
        return PackedKV(keys, values, keys.num_entries - longest, newest, hidden)

    @property
    def packs_single_entries(self) -> bool:
        """Whether an entry shares no scale with others, so that one more can be packed, or evicted, at any time."""
        return self.packed_keys.block_entries == 1

    def packed_but(self, num_newest: int) -> PackedKV:
        """The same entries, all packed but so many newest ones; blocks are single entries."""
        rule, newest = self.packed_keys.rule, self.newest
        end = newest.num_entries - num_newest
        keys = self.packed_keys.followed_by(quantized.pack(newest.keys[:, :, :end], rule))
        values = self.packed_values.followed_by(quantized.pack(newest.values[:, :, :end], rule))
        rest = LayerKV(newest.keys[:, :, end:].clone(), newest.values[:, :, end:].clone())
        return replace(self, packed_keys=keys, packed_values=values, newest=rest)

    def at(self, columns: torch.Tensor, hidden: torch.Tensor | None) -> PackedKV:
        """The entries of each head in the given columns, ``(B, H, N)``, all of them packed; blocks are single entries.

        Args:
            hidden: as `LayerKV` has it, of the entries that stay.
        """
        whole = self.packed_but(0)
        return replace(
            whole,
            packed_keys=whole.packed_keys.at(columns),
            packed_values=whole.packed_values.at(columns),
            hidden=hidden,
        )


def _joined(blocks: Sequence[Blocks], rows: Sequence[Sequence[int]]) -> Blocks:
    """The blocks of all rows, padded on the left."""
    codes, scales, zeros = (
        left_padded([getattr(one, name) for one in blocks], rows) for name in ("codes", "scales", "zeros")
    )
    return replace(blocks[0], codes=codes, scales=scales, zeros=zeros)


def pack(cache: CompressedCache, rule: Quantization) -> CompressedCache:
    """The cache with its layers packed; rows without padding, each of which gets groups of its own.

    Entries that a press evicted by masking have a place and no say in the scales.
    """
    return replace(cache, layers=tuple(_pack_layer(layer, rule) for layer in cache.layers))


def _pack_layer(layer: CachedLayer, rule: Quantization) -> PackedKV:
    keys, values, hidden = layer.keys, layer.values, layer.hidden
    num_packed = max(0, layer.num_entries - rule.residual)
    num_unused = -num_packed % rule.block_entries(keys.shape[3])
    ignored = None if hidden is None and not num_unused else _ignored(layer, num_packed, num_unused)
    parts = [functional.pad(part[:, :, :num_packed], (0, 0, num_unused, 0)) for part in (keys, values)]
    return PackedKV(
        quantized.pack(parts[0], rule, by_channel=rule.layout == "kivi", ignored=ignored),
        quantized.pack(parts[1], rule, by_channel=False, ignored=ignored),
        num_unused,
        LayerKV(keys[:, :, num_packed:].clone(), values[:, :, num_packed:].clone()),
        hidden,
    )


def _ignored(layer: CachedLayer, num_packed: int, num_unused: int) -> torch.Tensor:
    """``(B, 1 or H, N * E)``, True for places without an entry and for entries that are hidden."""
    hidden = layer.hidden
    if hidden is None:
        hidden = torch.zeros(layer.num_rows, 1, layer.num_entries, dtype=torch.bool, device=layer.device)
    return functional.pad(hidden[:, :, :num_packed], (num_unused, 0), value=True)
