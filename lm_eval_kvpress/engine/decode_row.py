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
from lm_eval_kvpress.cache.packed import PackedKV


@dataclass(frozen=True, eq=False)
class Row:
    """The entries of one row; heads that see fewer than others are padded on the left.

    Attributes:
        keys, values: ``(1, H, N, D)``.
        received: ``(1, H, N, 2)``, as `Watch.received` has it; None where no attention is added up.
        columns: ``(1, H, N, 1)``, where the entries stand in their layer.
        counts: n, of each head.
    """

    keys: torch.Tensor
    values: torch.Tensor
    received: torch.Tensor | None
    columns: torch.Tensor
    counts: tuple[int, ...]

    @property
    def is_even(self) -> bool:
        """Whether all heads see equally many entries."""
        return len(set(self.counts)) == 1

    def at(self, places: Sequence[torch.Tensor]) -> Row:
        """The entries of each head at these places, counted from its own first one, in this order."""
        longest = self.keys.shape[2]
        chosen = [of_head + longest - count for of_head, count in zip(places, self.counts, strict=True)]
        received = None if self.received is None else self.received[0]
        return _row(self.keys[0], self.values[0], received, self.columns[0], chosen)

    def head(self, index: int) -> Row:
        """The entries of one head alone, ``(1, 1, n, D)``."""
        start = self.keys.shape[2] - self.counts[index]
        parts = self.keys, self.values, self.columns
        keys, values, columns = (part[:, index : index + 1, start:] for part in parts)
        return Row(keys, values, None, columns, (self.counts[index],))


def rows_of(layer: CachedLayer, received: torch.Tensor | None, num_heads: int) -> list[Row]:
    """The rows of a layer.

    Args:
        received: ``(B, H, T, 2)`` or None.
        num_heads: H.
    """
    keys, values = layer.keys, layer.values
    columns = torch.arange(layer.num_entries, device=layer.device)[:, None].expand(num_heads, -1, 1)  # (H, T, 1)
    return [
        _row(keys[row], values[row], None if received is None else received[row], columns, _seen(layer, row, num_heads))
        for row in range(layer.num_rows)
    ]


def _seen(layer: CachedLayer, row: int, num_heads: int) -> list[torch.Tensor]:
    """The columns that each head sees, ascending."""
    if layer.hidden is None:
        return [torch.arange(layer.num_entries, device=layer.device)] * num_heads
    seen = [(~of_head).nonzero()[:, 0] for of_head in layer.hidden[row]]
    return seen if len(seen) == num_heads else seen * num_heads


def _row(
    keys: torch.Tensor,
    values: torch.Tensor,
    received: torch.Tensor | None,
    columns: torch.Tensor,
    chosen: Sequence[torch.Tensor],
) -> Row:
    """Entries ``(H, T, D)`` at some places of each head."""
    counts = tuple(map(len, chosen))
    padded = torch.stack([functional.pad(of_head, (max(counts) - len(of_head), 0)) for of_head in chosen])  # (H, N)

    def taken(part: torch.Tensor) -> torch.Tensor:
        return part.gather(1, padded[..., None].expand(-1, -1, part.shape[2]))[None]

    return Row(taken(keys), taken(values), None if received is None else taken(received), taken(columns), counts)


def layer_of(rows: Sequence[Row], layer: CachedLayer) -> tuple[CachedLayer, torch.Tensor | None]:
    """One ragged layer of rows, padded on the left, and what its entries received.

    Args:
        layer: from which the rows were taken; where it is packed, their entries keep their codes.
    """
    keys, columns = _padded([row.keys for row in rows]), _padded([row.columns for row in rows])
    received = [row.received for row in rows if row.received is not None]
    hidden = _hidden(rows, keys)
    if isinstance(layer, PackedKV):
        found: CachedLayer = layer.at(columns[..., 0], hidden)
    else:
        found = LayerKV(keys, _padded([row.values for row in rows]), hidden)
    return found, _padded(received) if received else None


def _padded(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return left_padded(parts, [[index] for index in range(len(parts))])


def _hidden(rows: Sequence[Row], keys: torch.Tensor) -> torch.Tensor | None:
    """``(B, 1 or H, N)``, as `LayerKV` has it, for the padded keys of the rows."""
    is_shared = all(row.is_even for row in rows)
    first = [[keys.shape[2] - count for count in (row.counts[:1] if is_shared else row.counts)] for row in rows]
    if not any(map(any, first)):
        return None
    places = torch.arange(keys.shape[2], device=keys.device)
    return places < torch.tensor(first, device=keys.device)[..., None]
