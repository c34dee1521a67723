"""Documents of any length through a cache of fixed size: score a chunk, evict down to the budget, go on.

Token ids in, losses out. Does not know text, lm-eval, or any press by name.

Before a chunk is scored every layer holds at most ``budget`` entries. With ``rotate`` keys are stored *before* rotation
and rotated by their place in the cache at every step, so positions stay within ``budget + chunk`` however long the
document is: StreamingLLM's own rule (https://arxiv.org/abs/2309.17453, section 3.2). Without it keys keep the position
of their token, as after an ordinary press. If entries are packed, a chunk sees itself in full precision, and what stays
of it is packed once.

Letters in shape comments: B rows (documents side by side), C tokens of a chunk, T cached entries, H key-value heads,
D head_dim, E hidden size, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache

from lm_eval_kvpress.cache.masks import attention_bias
from lm_eval_kvpress.cache.packed_stream_layer import PackedStreamLayer
from lm_eval_kvpress.cache.stream_layer import StreamLayer
from lm_eval_kvpress.cache.window_layer import WindowLayer, window_places
from lm_eval_kvpress.engine.online_softmax import rows_at_once
from lm_eval_kvpress.engine.outcomes import Streamed
from lm_eval_kvpress.engine.stream_eviction import Evictor, Scorer
from lm_eval_kvpress.engine.stream_plan import StreamPlan
from lm_eval_kvpress.models.pressable import PressableModel, masked, placeholder_mask
from lm_eval_kvpress.records.fidelity import Fidelity


@dataclass(frozen=True, eq=False)
class ChunkLosses:
    """One step of several documents.

    Attributes:
        documents: the index of each row's document.
        start: place in the document of the first token scored here.
        losses: negative log-likelihoods in nats, one list per row, shorter where a document ends.
        num_entries: entries per layer that the chunk was scored over, itself not counted.
        cache_bytes: bytes of keys and values of all layers and rows, read off the tensors after the step.
        hidden: ``(B, C, E)``: what predicts the chunk's tokens, before the head; shorter rows are padded.
    """

    documents: list[int]
    start: int
    losses: list[list[float]]
    num_entries: int
    cache_bytes: int
    hidden: torch.Tensor


class DocumentStream:
    """The losses of one document so far.

    Args:
        tokens: the document.
        plan: how it is streamed.
    """

    def __init__(self, tokens: Sequence[int], plan: StreamPlan) -> None:
        self._num_tokens, self._plan = len(tokens), plan
        self._losses: list[float] = []
        self._fidelity = list[Fidelity]()
        self._max_entries = self._max_bytes = 0

    def add(self, step: ChunkLosses, losses: Sequence[float], fidelity: Fidelity | None = None) -> None:
        """Take in the document's own losses of a step, and how far their predictions are from the full cache's."""
        self._losses += losses
        if fidelity is not None:
            self._fidelity.append(fidelity)
        self._max_entries = max(self._max_entries, step.num_entries)
        self._max_bytes = max(self._max_bytes, step.cache_bytes)

    @property
    def is_finished(self) -> bool:
        return len(self._losses) == self._num_tokens

    def outcome(self) -> Streamed:
        num_pressed = max(0, len(self._losses) - self._plan.first_pressed)
        return Streamed(
            tuple(self._losses),
            num_pressed,
            self._max_entries,
            self._max_bytes,
            self._plan.first_pressed,
            Fidelity.joined(self._fidelity) if self._fidelity else None,
        )


@torch.inference_mode()
def stream(
    model: PressableModel,
    documents: Sequence[Sequence[int]],
    prefix_token: int,
    plan: StreamPlan,
    press_for: Callable[[int], Scorer | None],
) -> Iterator[ChunkLosses]:
    """Score documents side by side, every token once, each chunk over the cache that the press left.

    Args:
        documents: token ids, each at least one. Rows leave the batch as their documents end.
        prefix_token: predicts each document's first token.
        press_for: a press for a standing cache of so many entries, set to keep ``plan.budget`` of them.
    """
    order = sorted(range(len(documents)), key=lambda index: -len(documents[index]))
    inputs = [torch.tensor([prefix_token, *documents[index][:-1]]) for index in order]
    rotations = _Rotations(model, window_places(plan.budget, plan.chunk)) if plan.rotate else None
    cache = Cache(layers=[_new_layer(plan, rotations) for _ in model.attentions])
    evictor = Evictor(cache, plan, press_for, [_seed(documents[index]) for index in order])
    biases: list[torch.Tensor | None] = [None] * len(model.attentions)
    with model.presented(), evictor.watching(model.attentions), masked(model.attentions, biases):
        for start in range(0, len(inputs[0]), plan.chunk):
            num_running = sum(len(row) > start for row in inputs)
            if num_running < len(inputs):
                inputs, order = inputs[:num_running], order[:num_running]
                evictor.keep_rows(num_running)
            evictor.enabled = start + plan.chunk < len(inputs[0])  # nothing reads the cache after the last chunk
            num_cached = _num_entries(cache)
            chunk = _chunk(inputs, start, plan.chunk).to(model.device)
            biases[:] = [_causal_bias(model, chunk, num_cached)] * len(biases)
            if rotations is not None and plan.num_sinks is None:
                rotations.set(cache, num_cached)
            first_position = cache.layers[0].begin + num_cached if plan.rotate else start
            evictor.next_position = first_position + chunk.shape[1]
            hidden = _forward(model, cache, chunk, first_position)
            losses = _losses(model, hidden, [documents[index][start : start + plan.chunk] for index in order])
            yield ChunkLosses(list(order), start, losses, num_cached, _num_bytes(cache), hidden)


def _seed(document: Sequence[int]) -> int:
    return zlib.crc32(repr(list(document)).encode())


def _new_layer(plan: StreamPlan, rotations: _Rotations | None) -> StreamLayer | WindowLayer:
    if plan.quantization is not None:
        return PackedStreamLayer(plan.rotate, plan.quantization)
    if plan.num_sinks is None:
        return StreamLayer(plan.rotate)
    return WindowLayer(plan.num_sinks, plan.budget, plan.chunk, None if rotations is None else rotations.in_fp32)


class _Rotations:
    """The rotations of the cache's places, made once."""

    def __init__(self, model: PressableModel, num_places: int) -> None:
        places = torch.arange(num_places, device=model.device)[None]
        like = torch.zeros(1, dtype=model.model.dtype, device=model.device)
        rotary = model.model.base_model.rotary_emb
        assert rotary.attention_scaling == 1.0, "rescaled keys cannot be turned back; `check_rope` refuses them"
        self._cos, self._sin = rotary(like, places)

    @property
    def in_fp32(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, ``(1, 1, places, D)`` each."""
        return self._cos[:, None].float(), self._sin[:, None].float()

    def set(self, cache: Cache, num_cached: int) -> None:
        """Give each layer the rotations of the places that it holds."""
        for layer in cache.layers:
            layer.set_rotations(self._cos[:, :num_cached], self._sin[:, :num_cached])


def _forward(model: PressableModel, cache: Cache, chunk: torch.Tensor, first_position: int) -> torch.Tensor:
    """Hidden states ``(B, C, E)`` of a chunk ``(B, C)`` over the cache, whose layers take in its keys and values."""
    positions = torch.arange(first_position, first_position + chunk.shape[1], device=model.device)
    return model.hidden_states(
        chunk,
        position_ids=positions.expand(len(chunk), -1),
        past_key_values=cache,
        attention_mask=placeholder_mask(model),
        use_cache=True,
    )


def _chunk(inputs: Sequence[torch.Tensor], start: int, size: int) -> torch.Tensor:
    """``(B, C)``; a document that ends in this chunk is padded on the right, where nothing real can see it."""
    rows = [row[start : start + size] for row in inputs]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _causal_bias(model: PressableModel, chunk: torch.Tensor, num_cached: int) -> torch.Tensor | None:
    """``(1, 1, C, T + C)``: all of the cache, and of the chunk what is not later."""
    width = chunk.shape[1]
    if width == 1:
        return None
    dtype = model.model.dtype
    earlier = torch.ones(1, width, width, dtype=torch.bool, device=chunk.device).tril()
    within = attention_bias(None, earlier, dtype, model.num_query_heads)
    assert within is not None
    return torch.cat([within.new_zeros(1, 1, width, num_cached), within], dim=3)


def _losses(model: PressableModel, hidden: torch.Tensor, targets: Sequence[Sequence[int]]) -> list[list[float]]:
    padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in targets], batch_first=True)  # (B, C)
    step = rows_at_once(model)  # the logits of all rows may be larger than the cache
    parts = zip(hidden.reshape(-1, hidden.shape[-1]).split(step), padded.reshape(-1).split(step), strict=True)
    found = []
    for predicting, wanted in parts:
        logits = model.logits(predicting)  # (rows, V)
        found.append(nn.functional.cross_entropy(logits, wanted.to(logits.device), reduction="none"))
    losses = torch.cat(found)
    return [row[: len(t)] for row, t in zip(losses.view(padded.shape).tolist(), targets, strict=True)]


def _num_entries(cache: Cache) -> int:
    found: int = cache.layers[0].num_entries
    return found


def _num_bytes(cache: Cache) -> int:
    return sum(layer.num_bytes for layer in cache.layers)
