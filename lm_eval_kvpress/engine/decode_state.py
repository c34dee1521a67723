"""The growing cache of a ragged batch while it is decoded: buffers, masks and positions, and one forward per step.

Token ids in, hidden states out. Does not know how tokens are chosen, text or presses.

Letters in shape comments: B rows, T cached entries, Q held-back tokens, C capacity of a layer's buffers, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lm_eval_kvpress.cache.compressed import CompressedCache, LayerKV
from lm_eval_kvpress.cache.layers import growing_cache
from lm_eval_kvpress.cache.masks import attention_bias, decoding_bias
from lm_eval_kvpress.models.pressable import PressableModel, placeholder_mask


class DecodeState:
    """Takes the held-back tokens first, then one token per row and step.

    Args:
        model: the model.
        cache: the compressed contexts; it is copied.
        held: number of held-back tokens per row, which are padded on the left.
        num_new: the most tokens that follow them.

    Attributes:
        biases: the mask of each layer for the next forward, for `pressable.masked`.
        layers: the growing buffers.
        masks: per layer which entries single tokens may attend, ``(B, 1 or heads, 1, C)``, open for entries to come;
            None where nothing is hidden.
        positions: positions of the next tokens, ``(B,)``.
    """

    def __init__(self, model: PressableModel, cache: CompressedCache, held: Sequence[int], num_new: int) -> None:
        width = max(held)
        self.model, self._num_seen = model, cache.num_seen
        self._unfed: CompressedCache | None = cache  # until the held-back tokens have been fed
        self.reader = growing_cache(cache, width + num_new)
        self.layers = self.reader.layers
        padding = torch.arange(width) < (width - torch.tensor(list(held)))[:, None]  # (B, Q)
        self.masks = [
            decoding_bias(kept, padding, layer.capacity, model.num_query_heads)
            for kept, layer in zip(cache.layers, self.layers, strict=True)
        ]
        self.biases: list[torch.Tensor | None] = [None] * len(self.masks)
        self.positions = torch.tensor(cache.next_position, device=model.device)
        self._placeholder = placeholder_mask(model)

    def with_cache(self, cache: CompressedCache, num_new: int) -> DecodeState:
        """The state that goes on from another cache. It shares `biases`, which attention modules read already."""
        state = DecodeState(self.model, cache, [0] * len(cache.num_seen), num_new)
        state.biases, state._unfed = self.biases, None
        return state

    def feed_held_back(self, queries: Sequence[Sequence[int]]) -> torch.Tensor:
        """Feed the held-back tokens; return the hidden state after the last, ``(B, E)``."""
        device, width = self.model.device, max(len(query) for query in queries)
        padding = torch.tensor([width - len(query) for query in queries], device=device)
        columns = torch.arange(width, device=device)
        tokens = torch.tensor([[0] * (width - len(query)) + list(query) for query in queries], device=device)
        positions = (columns - padding[:, None]).clamp(min=0) + self.positions[:, None]
        earlier = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        real = columns >= padding[:, None]
        own = torch.eye(width, dtype=torch.bool, device=device)
        visible = (earlier & real[:, None, :]) | own  # (B, Q, Q)
        assert self._unfed is not None, "held-back tokens come first"
        for index, layer in enumerate(self._unfed.layers):
            self.biases[index] = attention_bias(
                layer, visible.to(layer.device), layer.dtype, self.model.num_query_heads
            )
        self._unfed, self.positions = None, self.positions + width - padding
        return self.forward(tokens, positions)

    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feed one token per row, ``(B,)``; return its hidden state, ``(B, E)``."""
        for index, (mask, layer) in enumerate(zip(self.masks, self.layers, strict=True)):
            self.biases[index] = None if mask is None else mask[..., : layer.length + 1]
        positions = self.positions[:, None]
        self.positions = self.positions + 1
        return self.forward(tokens[:, None], positions)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run ``(B, Q)`` tokens under `biases`; return the last hidden state, ``(B, E)``."""
        hidden = self.model.hidden_states(
            tokens,
            position_ids=positions,
            past_key_values=self.reader,
            attention_mask=self._placeholder,
            cache_position=positions[0],  # else transformers counts it; with a mask of 4 dimensions nothing reads it
            use_cache=True,
        )
        return hidden[:, -1]

    def as_cache(self) -> CompressedCache:
        """The entries cached so far. Its tensors are views of the buffers."""
        layers = [LayerKV(layer.keys, layer.values, self._hidden(index)) for index, layer in enumerate(self.layers)]
        return CompressedCache(tuple(layers), self._num_seen, tuple(self.positions.tolist()))

    def _hidden(self, index: int) -> torch.Tensor | None:
        mask = self.masks[index]
        return None if mask is None else mask[:, :, 0, : self.layers[index].length] < 0
