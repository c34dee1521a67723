"""A cache layer from which any entries may be evicted; its keys are rotated by their place at every step.

Knows tensors and transformers' cache classes. Does not know presses, models or text.

Letters in shape comments: B rows, H key-value heads, T cached entries, C new tokens, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import rotate_half


class StreamLayer(DynamicLayer):
    """The kept entries of one layer.

    Args:
        rotate: whether keys are stored before rotation, and rotated by their place in the cache at every step.
    """

    begin = 0  # the place of the first entry

    def __init__(self, rotate: bool) -> None:
        super().__init__()
        self._rotate = rotate
        self._rotated: torch.Tensor | None = None
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None

    def set_rotations(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Set the rotations of places ``0..T-1``, ``(1, T, D)`` each, for the next step."""
        self._angles = cos[:, None], sin[:, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            empty = key_states[:, :, :0]
            self.keys, self.values = empty, value_states[:, :, :0]
        if not self._rotate:
            return super().update(key_states, value_states)
        assert cache_kwargs is not None and self._angles is not None
        cos, sin = cache_kwargs["cos"][:, None], cache_kwargs["sin"][:, None]
        unrotated = key_states * cos - rotate_half(key_states) * sin  # rotated back
        num_cached = self.keys.shape[2]
        old_cos, old_sin = (angle[:, :, :num_cached].to(self.keys.device) for angle in self._angles)
        rotated = self.keys * old_cos + rotate_half(self.keys) * old_sin
        self._rotated = torch.cat([rotated, key_states], dim=2)
        self.keys = torch.cat([self.keys, unrotated], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        return self._rotated, self.values

    @property
    def num_entries(self) -> int:
        """T."""
        return self.keys.shape[2] if self.is_initialized else 0

    @property
    def seen_keys(self) -> torch.Tensor:
        """The keys as attention just saw them, ``(B, H, T + C, D)``."""
        return self.keys if self._rotated is None else self._rotated

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.keys, self.values))

    def keep(self, indices: torch.Tensor) -> None:
        """Evict all entries but these, ``(B, H, kept)`` in ascending order."""
        places = indices[..., None].expand(-1, -1, -1, self.keys.shape[3])
        self.keys, self.values = self.keys.gather(2, places), self.values.gather(2, places)

    def store(self) -> None:
        """Put away what attention alone needed, once a step has run and the press has chosen."""
        self._rotated = None

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        self.keys, self.values, self._rotated = self.keys[rows], self.values[rows], None
