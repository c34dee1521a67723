"""A cache layer from which any entries may be evicted, and whose entries are packed between two steps.

A step's own entries are read in full precision, and packed once it has run: what stays of them keeps its codes until it
is evicted. Keys are packed before rotation where they are stored so (`stream_layer`). Blocks are single entries
(`quantized`). Knows tensors and transformers' cache classes. Does not know presses, models or text.

Letters in shape comments: B rows, H key-value heads, T cached entries, C new tokens, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch

from lm_eval_kvpress.cache.quantized import Blocks, Quantization, pack
from lm_eval_kvpress.cache.stream_layer import StreamLayer


class PackedStreamLayer(StreamLayer):
    """The kept entries of one layer, packed.

    ``keys`` and ``values`` hold all entries from `update` to `store`, and none in between.

    Args:
        rotate: as for `StreamLayer`.
        rule: how entries are packed.
    """

    def __init__(self, rotate: bool, rule: Quantization) -> None:
        super().__init__(rotate)
        self._rule = rule
        self._packed: tuple[Blocks, Blocks] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._packed is not None:
            self.keys, self.values = (blocks.unpack() for blocks in self._packed)
        return super().update(key_states, value_states, cache_kwargs)

    @property
    def num_entries(self) -> int:
        unpacked = super().num_entries
        return self._packed[0].num_entries if self._packed is not None and not unpacked else unpacked

    def get_seq_length(self) -> int:
        return self.num_entries

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, scales and zeros, and of unpacked entries, if there are any."""
        packed = 0 if self._packed is None else sum(blocks.num_bytes for blocks in self._packed)
        return packed + super().num_bytes

    def keep(self, indices: torch.Tensor) -> None:
        self.store()
        assert self._packed is not None
        keys, values = self._packed
        self._packed = keys.at(indices), values.at(indices)

    def store(self) -> None:
        """Pack new entries."""
        super().store()
        first = 0 if self._packed is None else self._packed[0].num_entries
        if self.keys.shape[2]:
            keys, values = (pack(part[:, :, first:], self._rule) for part in (self.keys, self.values))
            if self._packed is not None:
                keys, values = self._packed[0].followed_by(keys), self._packed[1].followed_by(values)
            self._packed = keys, values
            batch, heads, _, dim = self.keys.shape
            self.keys = self.values = self.keys.new_empty(batch, heads, 0, dim)

    def select(self, rows: torch.Tensor) -> None:
        super().select(rows)
        if self._packed is not None:
            keys, values = self._packed
            self._packed = keys.map(lambda tensor: tensor[rows]), values.map(lambda tensor: tensor[rows])
