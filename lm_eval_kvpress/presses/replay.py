"""KVzip on the model as it is held here: the context is replayed behind itself, and tokens that this needs stay.

kvpress's class loads a tokenizer by the checkpoint's name and finds context and cache by replacing a forward. Here the
tokenizer is lent with the model, and a hook finds the others. Scores and choice are kvpress's own. Does not know models
or how a prefill is run.

Source: arXiv 2505.23416; kvpress ``presses/kvzip_press.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import kvpress

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses.silenced import silenced

AFTER_CONTEXT = "\n"
"""What stands between the prompt and what is repeated, as kvpress has it for checkpoints without a chat template. A
context of lm-eval does not say where a chat template's parts end."""


@dataclass
class ReplayedKVzipPress(kvpress.KVzipPress):
    """KVzip: a token stays by the attention that it gets while the model repeats the context.

    It hides entries head by head. Heads, and without ``layerwise`` layers too, share one ratio.
    """

    def __post_init__(self) -> None:
        with silenced("kvpress.presses.kvzip_press"):  # about the time of replays, which is measured here
            super().__post_init__()

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """A context for the prefill of one row; at its end the context is replayed and entries are marked."""
        hook = model.base_model.register_forward_pre_hook(self._keep, with_kwargs=True)
        try:
            try:
                yield
            finally:
                hook.remove()
            if self.compression_ratio > 0:
                self.replay(model)
        finally:
            self._reset_internal_parameters()

    def _keep(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._context_ids = args[0] if args else kwargs["input_ids"]
        self._cache = kwargs["past_key_values"]

    def replay(self, model: Any) -> None:
        """Score every entry of the prefilled cache by a replay, and mark those that go.

        Raises:
            UsageError: if the replay needs more positions than the model was trained on.
        """
        tokenizer = model.replay_tokenizer
        self._suffix_ids = tokenizer.encode(AFTER_CONTEXT, return_tensors="pt", add_special_tokens=False)
        self._check_positions(model, tokenizer)
        self._perform_kvzip_compression(model, tokenizer)

    def _check_positions(self, model: Any, tokenizer: Any) -> None:
        self.context_length = self._context_ids.shape[1]
        longest = max(replayed.shape[1] for _, replayed in self.prepare(model, tokenizer))
        needed, trained = self.context_length + longest, model.config.max_position_embeddings
        if needed > trained:
            raise UsageError(
                f"press=kvzip replays a context of {self.context_length} tokens behind itself, which takes {needed} "
                f"positions, and the model was trained on {trained}: lower max_length, or chunk_size={self.chunk_size}"
            )
