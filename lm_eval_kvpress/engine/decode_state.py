"""The growing cache of a ragged batch while it is decoded: its buffers, masks and positions, a forward per step.

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
    """Feeds held-back tokens, then one token per row and step.

    Args:
        model: the model.
        cache: where to start from; it is copied.
        held: how many tokens `first` will be given, per row; they stand on the right.
        num_new: tokens to be fed after them, at most.

    Attributes:
        biases: the mask of each layer for the next forward; give them to `pressable.masked`.
        layers: the growing buffers.
        masks: per layer what single tokens may attend, ``(B, 1 or heads, 1, C)``, open for all that is to come; None
            where nothing is hidden.
        positions: of the next token, ``(B,)``.
    """

    def __init__(self, model: PressableModel, cache: CompressedCache, held: Sequence[int], num_new: int) -> None:
        width = max(held)
        self.model, self._num_seen = model, cache.num_seen
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

    def over(self, cache: CompressedCache, num_new: int) -> DecodeState:
        """Steps that go on over another cache, under the masks that were given away."""
        steps = DecodeState(self.model, cache, [0] * len(cache.num_seen), num_new)
        steps.biases = self.biases
        return steps

    def first(self, queries: Sequence[Sequence[int]]) -> torch.Tensor:
        """Feeds the held-back tokens; the hidden state after the last, ``(B, E)``."""
        device, width = self.model.device, max(len(query) for query in queries)
        padding = torch.tensor([width - len(query) for query in queries], device=device)
        columns = torch.arange(width, device=device)
        tokens = torch.tensor([[0] * (width - len(query)) + list(query) for query in queries], device=device)
        positions = (columns - padding[:, None]).clamp(min=0) + self.positions[:, None]
        earlier = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        real = columns >= padding[:, None]
        own = torch.eye(width, dtype=torch.bool, device=device)
        visible = (earlier & real[:, None, :]) | own  # (B, Q, Q)
        for index, layer in enumerate(self.layers):
            cached = LayerKV(layer.keys, layer.values, self._hidden(index))
            self.biases[index] = attention_bias(
                cached, visible.to(layer.keys.device), layer.keys.dtype, self.model.num_query_heads
            )
        self.positions = self.positions + width - padding
        return self.run(tokens, positions)

    def next(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feeds one token per row, ``(B,)``; its hidden state, ``(B, E)``."""
        for index, (mask, layer) in enumerate(zip(self.masks, self.layers, strict=True)):
            self.biases[index] = None if mask is None else mask[..., : layer.length + 1]
        positions = self.positions[:, None]
        self.positions = self.positions + 1
        return self.run(tokens[:, None], positions)

    def run(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One forward over ``(B, Q)`` tokens under `biases`; the last hidden state, ``(B, E)``."""
        hidden = self.model.hidden_states(
            tokens,
            position_ids=positions,
            past_key_values=self.reader,
            attention_mask=self._placeholder,
            cache_position=positions[0],  # spares counting; with a mask of 4 dimensions nothing reads it
            use_cache=True,
        )
        return hidden[:, -1]

    def standing(self) -> CompressedCache:
        """What is cached now, as a value that looks into the buffers."""
        layers = [LayerKV(layer.keys, layer.values, self._hidden(index)) for index, layer in enumerate(self.layers)]
        return CompressedCache(tuple(layers), self._num_seen, tuple(self.positions.tolist()))

    def _hidden(self, index: int) -> torch.Tensor | None:
        mask = self.masks[index]
        return None if mask is None else mask[:, :, 0, : self.layers[index].length] < 0
