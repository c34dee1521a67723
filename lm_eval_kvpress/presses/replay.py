"""Presses that replay a context behind itself on the model as it is held here, and KVzip, the first of them.

kvpress's classes load a tokenizer by the checkpoint's name, and find context and cache by replacing a forward. Here the
tokenizer is lent with the model, and a hook finds the others. Scores and choice are kvpress's own. Does not know models
or how a prefill is run.

Source: arXiv 2505.23416; kvpress ``presses/kvzip_press.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import kvpress

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses.silenced import silenced

AFTER_CONTEXT = "\n"
"""What stands between the prompt and what is repeated, as kvpress has it for checkpoints without a chat template. A
context of lm-eval does not say where a chat template's parts end."""


class Replay:
    """The way of a press that replays the context of one row once it is prefilled. Its time is the press's."""

    compression_ratio: float
    _context_ids: Any
    _cache: Any

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """A context for the prefill of one row; at its end the context is replayed and entries go."""
        hook = model.base_model.register_forward_pre_hook(self._keep, with_kwargs=True)
        try:
            try:
                yield
            finally:
                hook.remove()
            if self.compression_ratio > 0:
                self.replay(model)
        finally:
            self._context_ids = self._cache = None
            self.forget()

    def _keep(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._context_ids = args[0] if args else kwargs["input_ids"]
        self._cache = kwargs["past_key_values"]

    def replay(self, model: Any) -> None:
        """Score every entry of the prefilled cache by a replay, and remove or mark those that go.

        Raises:
            UsageError: if the replay needs more positions than the model was trained on.
        """
        raise NotImplementedError

    def forget(self) -> None:
        """Let go of the scores."""
        raise NotImplementedError


def check_positions(press: str, model: Any, num_context: int, num_replayed: int, advice: str) -> None:
    """Refuse a replay that would need more positions than the model was trained on, or sees at once.

    Args:
        advice: what to do beside lowering ``max_length``; ends the message.

    Raises:
        UsageError: in one line.
    """
    needed, most = num_context + num_replayed, getattr(model, "num_positions", model.config.max_position_embeddings)
    if needed > most:
        raise UsageError(
            f"press={press} replays a context of {num_context} tokens behind itself, which takes {needed} positions, "
            f"and the model has {most} for it: lower max_length{advice}"
        )


@dataclass
class ReplayedKVzipPress(Replay, kvpress.KVzipPress):
    """KVzip: a token stays by the attention that it gets while the model repeats the context, part by part.

    It hides entries head by head. Heads, and without ``layerwise`` layers too, share one ratio.
    """

    name: ClassVar[str] = "kvzip"

    def __post_init__(self) -> None:
        with silenced("kvpress.presses.kvzip_press"):  # about the time of replays, which is measured here
            super().__post_init__()

    def replay(self, model: Any) -> None:
        tokenizer = model.replay_tokenizer
        self._suffix_ids = tokenizer.encode(AFTER_CONTEXT, return_tensors="pt", add_special_tokens=False)
        self.context_length = self._context_ids.shape[1]
        longest = max(replayed.shape[1] for _, replayed in self.prepare(model, tokenizer))
        check_positions(self.name, model, self.context_length, longest, f", or chunk_size={self.chunk_size}")
        self._perform_kvzip_compression(model, tokenizer)

    def forget(self) -> None:
        self._reset_internal_parameters()
