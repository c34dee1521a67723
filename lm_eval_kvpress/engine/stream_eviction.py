"""Which entries of a standing cache stay: scored by a press, and evicted after each layer's attention has run.

Knows kvpress's ``score`` and the cache's layers. Does not know any press by name, or text.

Letters in shape comments: B rows, H key-value heads, T cached entries, E hidden size.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from transformers.cache_utils import Cache

from lm_eval_kvpress.cache.window_layer import WindowLayer
from lm_eval_kvpress.engine.stream_plan import StreamPlan
from lm_eval_kvpress.presses.positions import expect_from

ROUNDING = 2.0**-18
"""Relative difference of two scores that may be rounding: some thirty units in the last place of fp32."""


class Scorer(Protocol):
    """kvpress's ``ScorerPress``: the importance of each cached entry, ``(B, H, T)``; higher is kept."""

    def score(self, *arguments: Any) -> torch.Tensor: ...


class Evictor:
    """Scores the cache of a batch of documents layer by layer, and evicts down to the budget.

    Args:
        cache: of `StreamLayer`s or `WindowLayer`s, one per attention.
        plan: how documents are streamed.
        press_for: a press for a standing cache of so many entries, set to keep ``plan.budget`` of them.
        seeds: one per row, for a press that draws random numbers.

    Attributes:
        enabled: whether anything will read the cache after this step.
        next_position: of the first token after this step, from which presses expect queries.
    """

    def __init__(
        self, cache: Cache, plan: StreamPlan, press_for: Callable[[int], Scorer | None], seeds: Sequence[int]
    ) -> None:
        self._cache, self._plan, self._press_for, self._seeds = cache, plan, press_for, list(seeds)
        self._hidden: dict[int, torch.Tensor] = {}  # by layer, the newest (B, tokens, E)
        self._num_hidden = max(plan.num_hidden, plan.chunk + 1)
        self._step = [0] * len(cache.layers)
        self.enabled, self.next_position = True, 0

    def keep_rows(self, num_rows: int) -> None:
        """Keep the first rows of the batch; the documents of the others have ended."""
        for layer in self._cache.layers:
            layer.select(torch.arange(num_rows, device=layer.keys.device))
        self._hidden = {index: hidden[:num_rows] for index, hidden in self._hidden.items()}
        self._seeds = self._seeds[:num_rows]

    @contextmanager
    def watching(self, attentions: Sequence[nn.Module]) -> Iterator[None]:
        """A context in which each layer's cache is held to the budget once its attention has run."""

        def hook_for(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]) -> None:
                self._after_attention(index, module, kwargs, output[1])

            return hook

        with ExitStack() as hooks:
            for index, attention in enumerate(attentions):
                hooks.callback(attention.register_forward_hook(hook_for(index), with_kwargs=True).remove)
            yield

    def _after_attention(
        self, index: int, module: nn.Module, kwargs: dict[str, Any], attentions: torch.Tensor | None
    ) -> None:
        layer = self._cache.layers[index]
        if isinstance(layer, WindowLayer):
            layer.evict()
            return
        hidden = self._remember(index, kwargs["hidden_states"])
        self._step[index] += 1
        if self.enabled and layer.num_entries > self._plan.budget:
            kwargs = {**kwargs, "past_key_values": self._cache}
            states = (hidden, layer.seen_keys, layer.values)
            if self._plan.row_by_row:
                layer.keep(self._kept_row_by_row(index, module, states, attentions, kwargs))
            else:
                layer.keep(self._kept(module, states, attentions, kwargs))
        layer.store()

    def _remember(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        if index in self._hidden:
            hidden = torch.cat([self._hidden[index], hidden], dim=1)
        self._hidden[index] = hidden[:, -self._num_hidden :]
        return self._hidden[index]

    def _kept_row_by_row(
        self,
        index: int,
        module: nn.Module,
        states: tuple[torch.Tensor, ...],
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """As `_kept`, with random numbers that depend on the document, the layer and the step alone."""
        kept = []
        for row, seed in enumerate(self._seeds):
            one = slice(row, row + 1)
            weights = None if attentions is None else attentions[one]
            with torch.random.fork_rng([]):
                torch.manual_seed(zlib.crc32(repr((torch.initial_seed(), seed, index, self._step[index])).encode()))
                kept.append(self._kept(module, tuple(state[one] for state in states), weights, kwargs))
        return torch.cat(kept)

    def _kept(
        self,
        module: nn.Module,
        states: tuple[torch.Tensor, ...],
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Indices of the entries that stay, ``(B, H, budget)``, given hidden states, keys and values."""
        press = self._press_for(states[1].shape[2])
        assert press is not None, "a stream needs a press"
        expect_from(press, self.next_position)
        return highest(press.score(module, *states, attentions, kwargs), self._plan.budget)


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
