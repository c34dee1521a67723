"""Generates from a ragged batch of compressed caches, one forward per token. Token ids in, token ids out.

Does not know text, lm-eval or presses.

Letters in shape comments: B rows, T cached entries, Q held-back tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList
from transformers.cache_utils import Cache

from lm_eval_kvpress.cache import CompressedCache, LayerKV, attention_bias, growing_cache
from lm_eval_kvpress.engine import PressableModel, masked, placeholder_mask, prefill_hidden


@dataclass(frozen=True, eq=False)
class Sampler:
    """How the next token is chosen.

    Attributes:
        processors: transformers' logits processors, applied in order.
        uniforms: ``(B, tokens)`` numbers in [0, 1), one row per request, for sampling by inverse transform, so that a
            request draws the same tokens in every batch; None for greedy decoding.
    """

    processors: LogitsProcessorList
    uniforms: torch.Tensor | None = None

    def choose(self, ids: torch.Tensor, logits: torch.Tensor, step: int) -> torch.Tensor:
        """The next token per row, ``(B,)``, from all ids so far ``(B, n)`` and logits ``(B, V)``."""
        scores = self.processors(ids, logits)
        if self.uniforms is None:
            return scores.argmax(dim=-1)
        probabilities, tokens = scores.softmax(dim=-1).sort(dim=-1, descending=True)
        cumulative = probabilities.cumsum(dim=-1)
        drawn = self.uniforms[:, step, None].to(cumulative) * cumulative[:, -1:]
        return tokens.gather(1, torch.searchsorted(cumulative, drawn, right=True).clamp(max=tokens.shape[1] - 1))[:, 0]


@torch.inference_mode()
def decode(
    model: PressableModel,
    cache: CompressedCache,
    contexts: Sequence[Sequence[int]],
    *,
    num_held_back: Sequence[int],
    max_new_tokens: int,
    sampler: Sampler,
    stop_ids: frozenset[int],
    stopped: Callable[[torch.Tensor], Sequence[bool]],
    on_token: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Generates for each row from its compressed cache, one forward per token for the whole ragged batch.

    Args:
        contexts: the full context of each row, compressed part included (for processors that look at it).
        num_held_back: how many of a context's last tokens were held back; all rows or none may have zero.
        stop_ids: tokens that end a row; they are part of the result.
        stopped: told the new tokens so far, ``(B, n)``, says which rows are complete for other reasons.
        on_token: called when the tokens of a step have reached the host.

    Returns:
        the new tokens of each row, up to and including the one that ended it.
    """
    ids = _left_padded_with_own(contexts).to(model.device)
    prompt = ids.shape[1]
    queries = [list(context[len(context) - held :]) for context, held in zip(contexts, num_held_back, strict=True)]
    width = max(num_held_back)
    assert width == 0 or min(num_held_back) > 0, f"some rows hold back nothing, others do: {list(num_held_back)}"
    steps = _Steps.of(model, cache, width, num_held_back, max_new_tokens)
    lengths = [max_new_tokens] * len(contexts)
    open_rows = set(range(len(contexts)))
    with masked(model.attentions, steps.biases):
        hidden = prefill_hidden(cache) if width == 0 else steps.first(queries)
        for step in range(max_new_tokens):
            chosen = sampler.choose(ids, model.logits(hidden).to(ids.device), step)
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            ended = [token in stop_ids for token in chosen.tolist()]
            on_token()
            ended = [a or b for a, b in zip(ended, stopped(ids[:, prompt:]), strict=True)]
            for row in [row for row in open_rows if ended[row]]:
                lengths[row] = step + 1
                open_rows.remove(row)
            if not open_rows or step + 1 == max_new_tokens:
                break
            hidden = steps.next(chosen)
    return [row[:length] for row, length in zip(ids[:, prompt:].tolist(), lengths, strict=True)]


class _Steps:
    """The growing cache of a ragged batch, with its masks and positions."""

    def __init__(
        self, model: PressableModel, reader: Cache, masks: list[torch.Tensor | None], positions: torch.Tensor
    ) -> None:
        self._model, self._reader, self._masks, self._positions = model, reader, masks, positions
        self.biases: list[torch.Tensor | None] = [None] * len(masks)

    @classmethod
    def of(
        cls,
        model: PressableModel,
        cache: CompressedCache,
        width: int,
        held: Sequence[int],
        max_new_tokens: int,
    ) -> _Steps:
        room = width + max_new_tokens
        columns = torch.arange(width)
        padding = columns < (width - torch.tensor(list(held)))[:, None]  # (B, width): queries stand on the right
        masks = [_open_ended_mask(layer, padding, room, model.num_query_heads) for layer in cache.layers]
        return cls(model, growing_cache(cache, room), masks, torch.tensor(cache.next_position, device=model.device))

    def first(self, queries: Sequence[Sequence[int]]) -> torch.Tensor:
        """Feeds the held-back tokens; the hidden state after the last, ``(B, E)``."""
        width = max(len(query) for query in queries)
        padding = torch.tensor([width - len(query) for query in queries], device=self._model.device)
        columns = torch.arange(width, device=self._model.device)
        tokens = torch.tensor(
            [[0] * (width - len(query)) + list(query) for query in queries], device=self._model.device
        )
        positions = (columns - padding[:, None]).clamp(min=0) + self._positions[:, None]
        earlier = torch.ones(width, width, dtype=torch.bool, device=self._model.device).tril()
        real = columns >= padding[:, None]
        own = torch.eye(width, dtype=torch.bool, device=self._model.device)
        visible = (earlier & real[:, None, :]) | own  # (B, Q, Q)
        for index, layer in enumerate(self._reader.layers):
            cached = LayerKV(layer.keys, layer.values, self._hidden_before(index, width))
            self.biases[index] = attention_bias(
                cached, visible.to(layer.keys.device), layer.keys.dtype, self._model.num_query_heads
            )
        self._positions = self._positions + width - padding
        return self._run(tokens, positions)

    def _hidden_before(self, index: int, width: int) -> torch.Tensor | None:
        mask = self._masks[index]
        return None if mask is None else mask[:, :, 0, : self._reader.layers[index].keys.shape[2]] < 0

    def next(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feeds one token per row, ``(B,)``; its hidden state, ``(B, E)``."""
        for index, (mask, layer) in enumerate(zip(self._masks, self._reader.layers, strict=True)):
            self.biases[index] = None if mask is None else mask[..., : layer.keys.shape[2] + 1]
        positions = self._positions[:, None]
        self._positions = self._positions + 1
        return self._run(tokens[:, None].to(self._model.device), positions)

    def _run(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = self._model.hidden_states(
            tokens,
            position_ids=positions,
            past_key_values=self._reader,
            attention_mask=placeholder_mask(self._model),
            use_cache=True,
        )
        return hidden[:, -1]


def _open_ended_mask(
    layer: LayerKV, query_padding: torch.Tensor, room: int, num_query_heads: int
) -> torch.Tensor | None:
    """The additive mask of a layer for single-token steps, ``(B, 1 or heads, 1, T + room)``, or None if all is seen."""
    if layer.hidden is None and not query_padding.any():
        return None
    batch, cached = layer.keys.shape[0], layer.num_entries
    heads = 1 if layer.hidden is None or layer.hidden.shape[1] == 1 else num_query_heads
    mask = layer.keys.new_zeros(batch, heads, 1, cached + room)
    lowest = torch.finfo(mask.dtype).min
    if layer.hidden is not None:
        by_head = layer.hidden.repeat_interleave(heads // layer.hidden.shape[1], dim=1)
        mask[..., :cached].masked_fill_(by_head[:, :, None], lowest)
    padding = query_padding.to(mask.device)[:, None, None]
    mask[..., cached : cached + query_padding.shape[1]].masked_fill_(padding, lowest)
    return mask


def _left_padded_with_own(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Padded with each row's own first token, so that a repetition penalty sees no token that is not in the row."""
    width = max(len(row) for row in rows)
    return torch.tensor([[row[0]] * (width - len(row)) + list(row) for row in rows])
