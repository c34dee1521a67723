"""KVCompose on the model as it is held here: the context is replayed behind itself, and each head keeps its own tokens.

kvpress's class prefills under eager attention and replays in a forward that it puts in the model's place. Here the
prefill is the run's own, and only the replay is eager. kvpress leaves the replay's entries in the cache of the variant
that hides entries head by head; here they go. Scores and choice are kvpress's own. Does not know models.

Source: arXiv 2509.05165; kvpress ``presses/kvcompose_press.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import kvpress
from kvpress.presses.kvcompose_press import aggregator_by_name

from lm_eval_kvpress.presses.replay import Replay, check_positions

AGGREGATES = ("agg_task", "agg_group", "agg_head")


@dataclass
class ReplayedKVComposePress(Replay, kvpress.KVComposePress):
    """KVCompose: the attention that the replay pays an entry; heads keep different tokens, and equally many of them.

    Layers share one ratio: what each keeps depends on the text.
    """

    def replay(self, model: Any) -> None:
        num_context = self._context_ids.shape[1]
        check_positions("kvcompose", model, num_context, num_context, "")
        self._register_model(model)
        self.register_context_ids(self._context_ids)
        self._register_cache(self._cache)
        with ExitStack() as hooks:
            hooks.enter_context(_eager(model.config))
            for layer in model.model.layers:
                hook = layer.self_attn.register_forward_hook(self.forward_hook, with_kwargs=True)
                hooks.callback(hook.remove)
            model.model(input_ids=self._context_ids.to(model.device), past_key_values=self._cache)
        self.prepare_important_masks()
        for entries in self._cache.layers:
            entries.keys, entries.values = entries.keys[:, :, :num_context], entries.values[:, :, :num_context]
        self.compress_cache(model)

    def forget(self) -> None:
        self._reset_state()


@dataclass
class UnstructuredKVComposePress(ReplayedKVComposePress):
    """KVCompose where heads keep different numbers of tokens too: it hides entries head by head and frees nothing."""

    structured: bool = False


@contextmanager
def _eager(config: Any) -> Iterator[None]:
    """Eager attention, which returns its weights, for a while."""
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def check_arguments(arguments: Mapping[str, Any]) -> str:
    """Say which of the names of aggregates kvpress would not find; empty if none."""
    for name in AGGREGATES:
        if arguments[name] not in aggregator_by_name:
            return f"{name}={arguments[name]} is not known: choose one of {', '.join(aggregator_by_name)}"
    return ""
