"""lm-eval's generation arguments to a `Sampler` and a stop test. Does not know models or caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lm_eval_kvpress.engine.decoding import Sampler

WARPERS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
"""Supported arguments and transformers' processors for them, in the order in which transformers applies them."""

NEUTRAL = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def sampler_for(options: Mapping[str, Any], seeds: Sequence[int], max_new_tokens: int) -> Sampler:
    """The sampler for one batch.

    Args:
        options: lm-eval's normalized generation arguments, without ``until`` and ``max_gen_toks``.
        seeds: one per row; a row's tokens depend on its own seed only.

    Raises:
        ValueError: for an argument that is not supported (beams, for example).
    """
    left = {name: value for name, value in options.items() if value is not None}
    sampling = bool(left.pop("do_sample", False))
    num_beams = left.pop("num_beams", 1)
    if num_beams != 1:
        raise ValueError(
            f"num_beams={num_beams} is not supported: a compressed cache is decoded greedily or by sampling"
        )
    if sampling and not left.get("temperature", 1.0) > 0:
        raise ValueError(f"do_sample=true needs temperature > 0, not {left['temperature']}")
    processors = LogitsProcessorList()
    for name, warper in WARPERS.items():
        value = left.pop(name, NEUTRAL[name])
        if value != NEUTRAL[name] and (sampling or name == "repetition_penalty"):
            processors.append(warper(value))
    if left:
        raise ValueError(
            f"generation arguments not supported: {', '.join(sorted(left))}; supported are do_sample, until, "
            f"max_gen_toks, {', '.join(WARPERS)}"
        )
    return Sampler(processors, _uniforms(seeds, max_new_tokens) if sampling else None)


def _uniforms(seeds: Sequence[int], max_new_tokens: int) -> torch.Tensor:
    return torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


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
