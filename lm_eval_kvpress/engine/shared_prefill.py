"""One prefill for many presses: contexts are run once, and every press compresses its own clone of the cache.

A press acts after a layer's attention has run and changes the cache alone, so a prefill is the same under every press.
Here the inputs, keys and values of each attention are kept, and a press is given them again, layer by layer, through
the hook that a forward would have called. That is exact for presses that are nothing but this hook
(`PressSpec.shares_prefill`). It takes one and a half times the bytes of the full cache.

Knows hooks and `prefill`. Does not know any press by name, text or lm-eval.

Letters in shape comments: B rows, T prefilled tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from lm_eval_kvpress.cache.compressed import CompressedCache
from lm_eval_kvpress.engine.prefill import Press, compressed_cache, run_prefill, without_marks
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.records.clock import Clock, PhaseTiming

Tokens = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Call:
    """What hooks see of one attention's forward, without the cache.

    Attributes:
        arguments, output: its keyword arguments and what it returned.
        num_rows: rows of the batch.
    """

    arguments: dict[str, Any]
    output: Any
    num_rows: int

    def of_rows(self, rows: torch.Tensor) -> _Call:
        """The same call for these rows alone."""

        def pick(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(pick(part) for part in value)
            is_batched = isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == self.num_rows
            return value[rows.to(value.device)] if is_batched else value

        return _Call({name: pick(value) for name, value in self.arguments.items()}, pick(self.output), len(rows))


@dataclass(frozen=True, eq=False)
class _Prefill:
    """Contexts of equal length after one forward."""

    contexts: list[Tokens]
    cache: Cache
    calls: list[_Call]
    last_hidden: torch.Tensor | None


class SharedPrefills:
    """The prefills of one batch of contexts, for any number of presses.

    Args:
        model: the model, presentable to kvpress.

    Attributes:
        num_tokens: tokens prefilled so far, each context once.
    """

    def __init__(self, model: PressableModel) -> None:
        self._model, self._clock = model, Clock(model.device, measures_memory=False)
        self._places: dict[Tokens, tuple[_Prefill, int]] = {}
        self._attention: str | None = None
        self._latest = PhaseTiming("prefill", 0.0, 0)
        self.num_tokens = 0

    def run(self, contexts: Sequence[Tokens], *, for_cache_only: bool = False) -> None:
        """Prefill contexts in groups of equal length, those that are there already excepted, and forget all others.

        Nothing is forgotten if all of them are there. What other attention computed is not there: it is rounded
        otherwise, and figures would depend on what was run before.

        Args:
            for_cache_only: as for `prefill.prefill`; the same for all presses.
        """
        attention = self._model.model.config._attn_implementation
        if attention != self._attention:
            self._places, self._attention = {}, attention
        wanted = [context for context in dict.fromkeys(contexts) if context]
        missing = [context for context in wanted if context not in self._places]
        if not missing:
            return
        # Before the next forwards, which need the memory:
        self._places = {context: self._places[context] for context in wanted if context in self._places}
        by_length: dict[int, list[Tokens]] = defaultdict(list)
        for context in missing:
            by_length[len(context)].append(context)
        num_tokens = sum(map(len, missing))
        with self._clock.phase("prefill", num_tokens=num_tokens):
            for group in by_length.values():
                prefill = self._run_group(group, for_cache_only)
                self._places.update({context: (prefill, row) for row, context in enumerate(group)})
        (self._latest,) = self._clock.take()
        self.num_tokens += num_tokens

    def forget(self) -> None:
        """Free all prefills, before what does not share them is measured."""
        self._places = {}

    def share_of(self, contexts: Sequence[Tokens]) -> PhaseTiming:
        """The part of the latest prefills' time that these contexts took, in proportion to their tokens."""
        num_tokens, latest = sum(map(len, contexts)), self._latest
        seconds = latest.seconds * num_tokens / latest.num_tokens if latest.num_tokens else 0.0
        return PhaseTiming("prefill", seconds, num_tokens)

    @torch.inference_mode()
    def compress(self, contexts: Sequence[Tokens], press: Press | None, *, rerotates: bool = False) -> CompressedCache:
        """As `prefill.prefill`, for contexts of one length that `run` has prefilled, and without a forward."""
        prefill, _ = self._places[contexts[0]]
        places = [self._places[context][1] for context in contexts]
        everything = places == list(range(len(prefill.contexts)))
        rows = None if everything else torch.tensor(places)
        cache = _clone(prefill.cache, rows)
        last_hidden, model = prefill.last_hidden, self._model
        if last_hidden is not None:
            last_hidden = last_hidden.clone() if rows is None else last_hidden[rows]
        with without_marks(model.attentions):
            if press is not None:
                with model.presented(), model.fast.forwards(), press(model.model):
                    for attention, call in zip(model.attentions, prefill.calls, strict=True):
                        _replay(press, attention, call if rows is None else call.of_rows(rows), cache)
            return compressed_cache(model, cache, (len(contexts), len(contexts[0])), last_hidden, rerotates=rerotates)

    @torch.inference_mode()
    def _run_group(self, contexts: list[Tokens], for_cache_only: bool) -> _Prefill:
        calls = list[_Call]()

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            arguments = {name: value for name, value in kwargs.items() if not isinstance(value, Cache)}
            calls.append(_Call(arguments, output, len(contexts)))

        with self._model.presented(), ExitStack() as hooks:
            for attention in self._model.attentions:
                hooks.callback(attention.register_forward_hook(keep, with_kwargs=True).remove)
            tokens = torch.tensor(contexts, device=self._model.device)
            cache, hidden = run_prefill(self._model, tokens, for_cache_only=for_cache_only, reads_outputs=True)
        return _Prefill(contexts, cache, calls, None if hidden is None else hidden[:, -1].clone())


def _clone(cache: Cache, rows: torch.Tensor | None) -> DynamicCache:
    """A copy for one press, which may change keys and values in place."""
    clone = DynamicCache()
    for index, layer in enumerate(cache.layers):
        picked = slice(None) if rows is None else rows.to(layer.keys.device)
        clone.update(layer.keys[picked], layer.values[picked], index)  # appending to an empty layer copies
    return clone


def _replay(press: Any, attention: nn.Module, call: _Call, cache: Cache) -> None:
    """Call the press's hook as the attention's forward would have."""
    press.forward_hook(attention, (), {**call.arguments, "past_key_values": cache}, call.output)
