"""The growing cache of a ragged batch while it is decoded: buffers, masks and positions, and one forward per step.

Token ids in, hidden states out. Does not know how tokens are chosen, text or presses.

Letters in shape comments: B rows, T cached entries, Q held-back tokens, C capacity of a layer's buffers, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lm_eval_kvpress.cache.compressed import CompressedCache
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
        self._first_positions = cache.next_position
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

    def feed_known(self, tokens: torch.Tensor, last_positions: torch.Tensor) -> torch.Tensor:
        """Feed several known tokens per row at once, ``(B, Q)``; return their hidden states, ``(B, Q, E)``.

        Args:
            last_positions: ``(B,)``, of each row's last real token; what is fed behind it is padding.
        """
        width = tokens.shape[1]
        earlier = torch.ones(width, width, dtype=torch.bool, device=self.model.device).tril()
        for index, (mask, layer) in enumerate(zip(self.masks, self.layers, strict=True)):
            dtype, device = layer.dtype, layer.device
            own = torch.zeros(width, width, dtype=dtype, device=device).masked_fill(
                ~earlier.to(device), torch.finfo(dtype).min
            )
            cached = own.new_zeros(1, 1, 1, layer.length) if mask is None else mask[..., : layer.length]
            shape = (*cached.shape[:2], width, -1)
            self.biases[index] = torch.cat([cached.expand(shape), own.expand(*cached.shape[:2], -1, -1)], dim=-1)
        positions = self.positions[:, None] + torch.arange(width, device=self.model.device)
        self.positions = torch.minimum(self.positions + width, last_positions + 1)
        return self._hidden_states(tokens, torch.minimum(positions, last_positions[:, None]))

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run ``(B, Q)`` tokens under `biases`; return the last hidden state, ``(B, E)``."""
        return self._hidden_states(tokens, positions)[:, -1]

    def _hidden_states(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model.hidden_states(
            tokens,
            position_ids=positions,
            past_key_values=self.reader,
            attention_mask=self._placeholder,
            cache_position=positions[0],  # else transformers counts it; with a mask of 4 dimensions nothing reads it
            use_cache=True,
        )

    def as_cache(self) -> CompressedCache:
        """The entries cached so far, with the tokens fed among those seen. Its tensors may be views of the buffers."""
        layers = [layer.kept(self._hidden(index)) for index, layer in enumerate(self.layers)]
        positions = tuple(self.positions.tolist())
        num_fed = [next - first for next, first in zip(positions, self._first_positions, strict=True)]
        num_seen = tuple(before + fed for before, fed in zip(self._num_seen, num_fed, strict=True))
        return CompressedCache(tuple(layers), num_seen, positions)

    def _hidden(self, index: int) -> torch.Tensor | None:
        """``(B, 1 or H, T)``, as `LayerKV` has it; masks have a row for each query head where heads differ."""
        mask = self.masks[index]
        if mask is None:
            return None
        hidden = mask[:, :, 0, : self.layers[index].length] < 0
        return hidden if hidden.shape[1] == 1 else hidden[:, :: hidden.shape[1] // self.model.num_key_value_heads]
