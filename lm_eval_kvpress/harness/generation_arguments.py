"""Stop strings among lm-eval's generation arguments, looked for while tokens are produced."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Whether the text of the newest tokens holds a stop string; decodes the batch once for all of them.

    Looks back two tokens more than the longest stop string encodes to, since a string can come out in another
    tokenization than its own (as lm-eval's ``MultiTokenEOSCriteria`` does).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, until: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._until = [stop for stop in until if stop]
        lengths = [len(tokenizer.encode(stop, add_special_tokens=False)) for stop in self._until]
        self._num_back = max(lengths, default=0) + 2

    def __call__(self, new_tokens: torch.Tensor) -> list[bool]:
        if not self._until:
            return [False] * len(new_tokens)
        texts = self._tokenizer.batch_decode(new_tokens[:, -self._num_back :])
        return [any(stop in text for stop in self._until) for text in texts]
