"""The cache layer of StreamingLLM's own rule: the first few entries and the newest ones, kept in place.

Knows tensors and transformers' cache classes. Does not know presses, models or text.

A general press may evict any entry, so a stream rotates, joins and gathers all keys at every step
(`engine.streaming`). Here the kept set is known, and attention depends on distances only: when the window slides, the
distances within it stay, and only the sinks have to move along. So the window lies rotated in a buffer, new entries are
written behind it, and the sinks, kept unrotated, are rotated and written again just before it, over evicted entries. At
the end of the buffer the window is moved to its front and rotated back by as many places. No place exceeds the buffer,
however long the document is.

Letters in shape comments: B rows, H key-value heads, T cached entries, C new tokens, S sinks, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import rotate_half


def window_places(budget: int, chunk: int) -> int:
    """Entries of the buffer: the cache, a chunk, and places to slide over.

    These are a quarter of the budget at least. An entry is then rotated back at most four times before it is evicted,
    which bounds the rounding of 16-bit keys, and moving costs little per token.
    """
    return budget + chunk + max(budget // 4, 4 * chunk)


class WindowLayer(DynamicLayer):
    """The ``num_sinks`` first and ``budget - num_sinks`` newest entries of one layer.

    Args:
        rotations: cos and sin of the buffer's places, ``(1, 1, places, D)`` each; None leaves keys at the position of
            their token in the document.

    Attributes:
        begin: the place of the first entry; new tokens are rotated as ``begin + T`` and further.
    """

    def __init__(
        self, num_sinks: int, budget: int, chunk: int, rotations: tuple[torch.Tensor, torch.Tensor] | None
    ) -> None:
        super().__init__()
        self._num_sinks, self._budget, self._chunk, self._rotations = num_sinks, budget, chunk, rotations
        self._sinks: tuple[torch.Tensor, torch.Tensor] | None = None  # unrotated keys, and values
        self.begin = 0
        self._end = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], window_places(self._budget, self._chunk), key_states.shape[3])
            self._key_buffer, self._value_buffer = key_states.new_empty(shape), value_states.new_empty(shape)
        end = self._end + key_states.shape[2]
        self._key_buffer[:, :, self._end : end] = key_states
        self._value_buffer[:, :, self._end : end] = value_states
        self._end = end
        self._show()
        return self.keys, self.values

    def evict(self) -> None:
        """Slide the window on, so that at most ``budget`` entries are left and the next chunk fits."""
        num_evicted = self._end - self.begin - self._budget
        if num_evicted > 0:
            if self._sinks is None:
                self._sinks = self._unrotated_sinks()
            self.begin += num_evicted
            self._write_sinks()
        if self._end + self._chunk > self._key_buffer.shape[2]:
            self._move_to_front()
        self._show()

    def select(self, rows: torch.Tensor) -> None:
        """Keep the rows at the given indices, ``(B',)``."""
        self._key_buffer, self._value_buffer = self._key_buffer[rows], self._value_buffer[rows]
        if self._sinks is not None:
            self._sinks = self._sinks[0][rows], self._sinks[1][rows]
        self._show()

    @property
    def num_entries(self) -> int:
        """T."""
        return self._end - self.begin

    @property
    def num_bytes(self) -> int:
        """Allocated bytes of keys and values, places to slide over included."""
        buffers = (self._key_buffer, self._value_buffer)
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)

    def _show(self) -> None:
        self.keys = self._key_buffer[:, :, self.begin : self._end]  # (B, H, T, D), views
        self.values = self._value_buffer[:, :, self.begin : self._end]

    def _unrotated_sinks(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.keys[:, :, : self._num_sinks].clone(), self.values[:, :, : self._num_sinks].clone()
        return (keys if self._rotations is None else self._turned(keys, 0, back=True)), values

    def _write_sinks(self) -> None:
        assert self._sinks is not None
        keys, values = self._sinks
        places = slice(self.begin, self.begin + self._num_sinks)
        self._key_buffer[:, :, places] = keys if self._rotations is None else self._turned(keys, self.begin)
        self._value_buffer[:, :, places] = values

    def _move_to_front(self) -> None:
        self._show()
        keys, values, num_entries = self.keys, self.values, self._end - self.begin
        if self._rotations is not None:
            keys = self._rotated(keys, self.begin, 1, back=True)
        self._key_buffer[:, :, :num_entries] = keys.clone()  # the two ends may overlap
        self._value_buffer[:, :, :num_entries] = values.clone()
        self.begin, self._end = 0, num_entries
        if self._sinks is not None:
            self._write_sinks()

    def _turned(self, keys: torch.Tensor, first: int, back: bool = False) -> torch.Tensor:
        """The keys rotated by places ``first`` and further, or rotated back by them."""
        return self._rotated(keys, first, keys.shape[2], back=back)

    def _rotated(self, keys: torch.Tensor, first: int, num_places: int, *, back: bool) -> torch.Tensor:
        """Rotate by ``num_places`` places, or by one for all, in fp32 whatever the dtype: one rounding per rotation."""
        assert self._rotations is not None
        places = slice(first, first + num_places)
        cos, sin = (angle[:, :, places].to(keys.device) for angle in self._rotations)  # layers may lie on other devices
        full = keys.float()
        return (full * cos + rotate_half(full) * (-sin if back else sin)).to(keys.dtype)
