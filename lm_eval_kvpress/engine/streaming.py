"""Documents of any length under a fixed cache: score a chunk, let the press choose what stays, go on.

Token ids in, losses out. Does not know text, lm-eval, or any press by name; a press is whatever has kvpress's `score`.

Before a chunk is scored every layer holds at most ``budget`` entries. With ``rotate`` keys are stored *before* rotation
and rotated by their place in the cache at every step, so positions stay within ``budget + chunk`` however long the
document is: StreamingLLM's own rule (https://arxiv.org/abs/2309.17453, section 3.2). Without it keys keep the position
of their token, as after an ordinary press.

Letters in shape comments: B rows (documents side by side), C tokens of a chunk, T cached entries, H key-value heads,
D head_dim, E hidden size, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.llama.modeling_llama import rotate_half

from lm_eval_kvpress.cache.compressed import attention_bias
from lm_eval_kvpress.cache.window_layer import WindowLayer, window_places
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models.pressable import PressableModel, masked, placeholder_mask


class Scorer(Protocol):
    """kvpress's ``ScorerPress``: importance per cached entry, ``(B, H, T)``, higher is kept."""

    def score(self, *arguments: Any) -> torch.Tensor: ...


@dataclass(frozen=True)
class StreamPlan:
    """How documents flow.

    Attributes:
        budget: entries that every layer holds at most before a chunk is scored.
        chunk: tokens scored per step; 1 is the strict protocol of the papers.
        rotate: keys rotated by their place in the cache instead of their place in the document.
        num_hidden: hidden states of the newest tokens that the press sees: the chunk and one before it, or
            ``budget + chunk`` for a press that takes statistics over them.
        num_sinks: the press keeps so many first entries and else the newest ones, whatever they hold, which is then
            done in place (`stream_window`); None asks the press.
        row_by_row: whether the press must choose for each document by itself (it draws random numbers).
    """

    budget: int
    chunk: int
    rotate: bool = True
    num_hidden: int = 0
    num_sinks: int | None = None
    row_by_row: bool = False


@dataclass(frozen=True, eq=False)
class ChunkLosses:
    """One step of several documents.

    Attributes:
        documents: the index of each row's document.
        start: place in the document of the first token scored here.
        losses: negative log-likelihoods in nats, one list per row, shorter where a document ends.
        num_entries: entries per layer that the chunk was scored over, itself not counted.
        cache_bytes: bytes of keys and values of all layers and rows, read off the tensors after the step.
    """

    documents: list[int]
    start: int
    losses: list[list[float]]
    num_entries: int
    cache_bytes: int


class StreamLayer(DynamicLayer):
    """The kept entries of one layer; keys before rotation if ``rotate``."""

    begin = 0
    """The place of the first entry."""

    def __init__(self, rotate: bool) -> None:
        super().__init__()
        self._rotate = rotate
        self._rotated: torch.Tensor | None = None
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None

    def at(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Sets the rotations of places ``0..T-1``, ``(1, T, D)`` each, for the next step."""
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
        unrotated = key_states * cos - rotate_half(key_states) * sin  # the inverse of a rotation turns back
        num_cached = self.keys.shape[2]
        old_cos, old_sin = (angle[:, :, :num_cached] for angle in self._angles)
        rotated = self.keys * old_cos + rotate_half(self.keys) * old_sin
        self._rotated = torch.cat([rotated, key_states], dim=2)
        self.keys = torch.cat([self.keys, unrotated], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        return self._rotated, self.values

    @property
    def seen_keys(self) -> torch.Tensor:
        """The keys as attention just saw them, ``(B, H, T + C, D)``."""
        return self.keys if self._rotated is None else self._rotated

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.keys, self.values))

    def keep(self, indices: torch.Tensor) -> None:
        """Evicts all but the given entries, ``(B, H, kept)`` in ascending order."""
        places = indices[..., None].expand(-1, -1, -1, self.keys.shape[3])
        self.keys, self.values = self.keys.gather(2, places), self.values.gather(2, places)
        self._rotated = None

    def select(self, rows: torch.Tensor) -> None:
        self.keys, self.values, self._rotated = self.keys[rows], self.values[rows], None


@torch.inference_mode()
def stream(
    model: PressableModel,
    documents: Sequence[Sequence[int]],
    prefix_token: int,
    plan: StreamPlan,
    press_for: Callable[[int], Scorer | None],
) -> Iterator[ChunkLosses]:
    """Scores documents side by side, every token once, each chunk over the cache that the press left.

    Args:
        documents: token ids, each at least one. Rows leave the batch as their documents end.
        prefix_token: predicts each document's first token.
        press_for: a press for a standing cache of so many entries, set to keep ``plan.budget`` of them.
    """
    order = sorted(range(len(documents)), key=lambda index: -len(documents[index]))
    inputs = [torch.tensor([prefix_token, *documents[index][:-1]]) for index in order]
    angles = _Angles(model, window_places(plan.budget, plan.chunk)) if plan.rotate else None
    cache = Cache(layers=[_new_layer(plan, angles) for _ in model.attentions])
    chooser = _Chooser(model, cache, plan, press_for, [zlib.crc32(repr(documents[index]).encode()) for index in order])
    with ExitStack() as context:
        context.enter_context(model.presented())
        context.enter_context(_after_attention(model.attentions, chooser))
        biases: list[torch.Tensor | None] = [None] * len(model.attentions)
        context.enter_context(masked(model.attentions, biases))
        start = 0
        while start < len(inputs[0]):
            running = sum(len(row) > start for row in inputs)
            if running < len(inputs):
                inputs, order = inputs[:running], order[:running]
                chooser.select(torch.arange(running))
            chunk = _chunk(inputs, start, plan.chunk).to(model.device)
            chooser.enabled = start + plan.chunk < len(inputs[0])  # nothing reads the cache after the last chunk
            num_cached = _num_entries(cache)
            first = cache.layers[0].begin + num_cached if plan.rotate else start
            positions = torch.arange(first, first + chunk.shape[1], device=model.device).expand(running, -1)
            if angles is not None and plan.num_sinks is None:
                angles.set(cache, num_cached)
            biases[:] = [_causal_bias(model, chunk, num_cached)] * len(biases)
            hidden = model.hidden_states(
                chunk,
                position_ids=positions,
                past_key_values=cache,
                attention_mask=placeholder_mask(model),
                use_cache=True,
            )
            losses = _losses(model, hidden, [documents[index][start : start + plan.chunk] for index in order])
            yield ChunkLosses(list(order), start, losses, num_cached, _num_bytes(cache))
            start += plan.chunk


def _new_layer(plan: StreamPlan, angles: _Angles | None) -> StreamLayer | WindowLayer:
    if plan.num_sinks is None:
        return StreamLayer(plan.rotate)
    return WindowLayer(plan.num_sinks, plan.budget, plan.chunk, None if angles is None else angles.of_places)


class _Angles:
    """The rotations of places ``0..T-1``, made once."""

    def __init__(self, model: PressableModel, num_places: int) -> None:
        places = torch.arange(num_places, device=model.device)[None]
        like = torch.zeros(1, dtype=model.model.dtype, device=model.device)
        rotary = model.model.base_model.rotary_emb
        if rotary.attention_scaling != 1.0 or "dynamic" in rotary.rope_type or rotary.rope_type == "longrope":
            raise UsageError(
                f"rope_type '{rotary.rope_type}' rescales or recomputes rotations, which cannot be turned back: "
                "rolling=stream with stream_positions=cache needs plain RoPE"
            )
        self._cos, self._sin = rotary(like, places)

    @property
    def of_places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, ``(1, 1, places, D)``, in fp32."""
        return self._cos[:, None].float(), self._sin[:, None].float()

    def set(self, cache: Cache, num_cached: int) -> None:
        for layer in cache.layers:
            layer.at(self._cos[:, :num_cached], self._sin[:, :num_cached])


class _Chooser:
    """After a layer's attention has run: scores its standing cache and evicts down to the budget."""

    def __init__(
        self,
        model: PressableModel,
        cache: Cache,
        plan: StreamPlan,
        press_for: Callable[[int], Scorer | None],
        seeds: list[int],
    ) -> None:
        self._cache, self._plan, self._press_for, self._seeds = cache, plan, press_for, seeds
        self._hidden: dict[int, torch.Tensor] = {}
        self._num_hidden = max(plan.num_hidden, plan.chunk + 1)
        self._step = [0] * len(model.attentions)
        self.enabled = True

    def select(self, rows: torch.Tensor) -> None:
        for layer in self._cache.layers:
            layer.select(rows.to(layer.keys.device))
        self._hidden = {index: hidden[: len(rows)] for index, hidden in self._hidden.items()}
        self._seeds = self._seeds[: len(rows)]

    def __call__(self, index: int, module: nn.Module, kwargs: dict[str, Any], attentions: torch.Tensor | None) -> None:
        layer = self._cache.layers[index]
        if isinstance(layer, WindowLayer):
            layer.evict()
            return
        hidden = kwargs["hidden_states"]
        if index in self._hidden:
            hidden = torch.cat([self._hidden[index], hidden], dim=1)
        self._hidden[index] = hidden[:, -self._num_hidden :]
        self._step[index] += 1
        if not self.enabled or layer.keys.shape[2] <= self._plan.budget:
            return
        kwargs = {**kwargs, "past_key_values": self._cache}
        if not self._plan.row_by_row:
            layer.keep(self._best(module, self._hidden[index], layer.seen_keys, layer.values, attentions, kwargs))
            return
        kept = []
        for row, seed in enumerate(self._seeds):
            one = slice(row, row + 1)
            of_row = None if attentions is None else attentions[one]
            with torch.random.fork_rng([]):
                torch.manual_seed(zlib.crc32(repr((torch.initial_seed(), seed, index, self._step[index])).encode()))
                states = (self._hidden[index][one], layer.seen_keys[one], layer.values[one])
                kept.append(self._best(module, *states, of_row, kwargs))
        layer.keep(torch.cat(kept))

    def _best(
        self,
        module: nn.Module,
        hidden: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        press = self._press_for(keys.shape[2])
        assert press is not None, "a stream needs a press"
        scores = press.score(module, hidden, keys, values, attentions, kwargs)
        return highest(scores, self._plan.budget)


ROUNDING = 2.0**-18
"""Relative difference of two scores that may be rounding: some thirty units in the last place of fp32."""


def highest(scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """Places of the highest scores, ascending; of those that equal the lowest kept one to rounding the newest stay.

    The keys of a repeated token have equal norms in the first layer, up to a rounding that depends on how many rows
    share the batch. `topk` would let that rounding decide, and rows side by side would keep other entries than alone.
    """
    cut = scores.topk(num_kept, dim=-1).values[..., -1:]
    slack = torch.where(cut.isfinite(), ROUNDING * cut.abs(), 0.0)
    num_cached = scores.shape[-1]
    place = torch.arange(num_cached, device=scores.device).expand_as(scores)
    order = torch.where(scores > cut + slack, place + num_cached, place)
    order = order.masked_fill(scores < cut - slack, -1)
    return order.topk(num_kept, dim=-1).indices.sort(dim=-1).values


@contextmanager
def _after_attention(attentions: Sequence[nn.Module], chooser: _Chooser) -> Iterator[None]:
    def hook_for(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]) -> None:
            chooser(index, module, kwargs, output[1])

        return hook

    hooks = [
        attention.register_forward_hook(hook_for(index), with_kwargs=True) for index, attention in enumerate(attentions)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
    logits = model.logits(hidden.reshape(-1, hidden.shape[-1]))  # (B * C, V)
    padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in targets], batch_first=True)
    losses = nn.functional.cross_entropy(logits, padded.reshape(-1).to(logits.device), reduction="none")
    return [row[: len(t)] for row, t in zip(losses.view(padded.shape).tolist(), targets, strict=True)]


def _num_entries(cache: Cache) -> int:
    first = cache.layers[0]
    return first.keys.shape[2] if first.is_initialized else 0


def _num_bytes(cache: Cache) -> int:
    return sum(layer.num_bytes for layer in cache.layers)
