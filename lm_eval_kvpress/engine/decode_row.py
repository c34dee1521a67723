"""One row of one layer while it is decoded: entries that each head sees, without the padding of its batch.

Knows tensors and cached layers only.

Letters in shape comments: B rows, H key-value heads, T cached entries, n of them that a head sees, N the most that any
sees, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from lm_eval_kvpress.cache.compressed import CachedLayer, LayerKV, left_padded


@dataclass(frozen=True, eq=False)
class Row:
    """The entries of one row; heads that see fewer than others are padded on the left.

    Attributes:
        keys, values: ``(1, H, N, D)``.
        received: ``(1, H, N, 2)``, as `Watch.received` has it; None where no attention is added up.
        counts: n, of each head.
    """

    keys: torch.Tensor
    values: torch.Tensor
    received: torch.Tensor | None
    counts: tuple[int, ...]

    @property
    def is_even(self) -> bool:
        """Whether all heads see equally many entries."""
        return len(set(self.counts)) == 1

    def at(self, places: Sequence[torch.Tensor]) -> Row:
        """The entries of each head at these places, counted from its own first one, in this order."""
        longest = self.keys.shape[2]
        columns = [chosen + longest - count for chosen, count in zip(places, self.counts, strict=True)]
        return _row(self.keys[0], self.values[0], None if self.received is None else self.received[0], columns)

    def head(self, index: int) -> Row:
        """The entries of one head alone, ``(1, 1, n, D)``."""
        start = self.keys.shape[2] - self.counts[index]
        keys, values = (part[:, index : index + 1, start:] for part in (self.keys, self.values))
        return Row(keys, values, None, (self.counts[index],))


def rows_of(layer: CachedLayer, received: torch.Tensor | None, num_heads: int) -> list[Row]:
    """The rows of a layer.

    Args:
        received: ``(B, H, T, 2)`` or None.
        num_heads: H.
    """
    keys, values = layer.keys, layer.values
    return [
        _row(keys[row], values[row], None if received is None else received[row], _seen(layer, row, num_heads))
        for row in range(layer.num_rows)
    ]


def _seen(layer: CachedLayer, row: int, num_heads: int) -> list[torch.Tensor]:
    """The columns that each head sees, ascending."""
    if layer.hidden is None:
        return [torch.arange(layer.num_entries, device=layer.device)] * num_heads
    seen = [(~of_head).nonzero()[:, 0] for of_head in layer.hidden[row]]
    return seen if len(seen) == num_heads else seen * num_heads


def _row(
    keys: torch.Tensor, values: torch.Tensor, received: torch.Tensor | None, columns: Sequence[torch.Tensor]
) -> Row:
    """Entries ``(H, T, D)`` at some columns of each head."""
    counts = tuple(map(len, columns))
    padded = torch.stack([functional.pad(chosen, (max(counts) - len(chosen), 0)) for chosen in columns])  # (H, N)
    parts = [
        None if part is None else part.gather(1, padded[..., None].expand(-1, -1, part.shape[2]))[None]
        for part in (keys, values, received)
    ]
    assert parts[0] is not None and parts[1] is not None
    return Row(parts[0], parts[1], parts[2], counts)


def layer_of(rows: Sequence[Row]) -> tuple[LayerKV, torch.Tensor | None]:
    """One ragged layer of rows, padded on the left, and what its entries received."""
    parts = [[getattr(row, name) for row in rows] for name in ("keys", "values", "received")]
    order = [[index] for index in range(len(rows))]
    keys, values, received = (None if part[0] is None else left_padded(part, order) for part in parts)
    assert keys is not None and values is not None
    is_shared = all(row.is_even for row in rows)
    first = [[keys.shape[2] - count for count in (row.counts[:1] if is_shared else row.counts)] for row in rows]
    hidden = None
    if any(map(any, first)):
        places = torch.arange(keys.shape[2], device=keys.device)
        hidden = places < torch.tensor(first, device=keys.device)[..., None]  # (B, 1 or H, N)
    return LayerKV(keys, values, hidden), received
