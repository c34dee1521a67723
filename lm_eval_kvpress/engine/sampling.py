"""How the next token is chosen: greedily, or by drawing from the processed logits.

Knows lm-eval's generation arguments and transformers' logits processors. Does not know models, caches or text.

Letters in shape comments: B rows, N tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lm_eval_kvpress.errors import UsageError

WARPERS: Mapping[str, Callable[[Any], LogitsProcessor]] = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
"""Supported arguments and transformers' processors for them, in the order in which transformers applies them."""

NEUTRAL = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


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

    def on(self, device: torch.device) -> Sampler:
        """The sampler with its numbers on a device."""
        return self if self.uniforms is None else replace(self, uniforms=self.uniforms.to(device))

    def choose(self, ids: torch.Tensor, logits: torch.Tensor, step: int | torch.Tensor) -> torch.Tensor:
        """The next token per row, ``(B,)``.

        Args:
            ids: ``(B, N)``, all ids so far, in any order and number: supported processors ask which ids there are.
            logits: ``(B, V)``.
            step: tokens chosen before; ``(1,)``, on the device, in a step that a graph repeats.
        """
        scores = self.processors(ids, logits)
        if self.uniforms is None:
            return scores.argmax(dim=-1)
        probabilities, tokens = scores.softmax(dim=-1).sort(dim=-1, descending=True)
        cumulative = probabilities.cumsum(dim=-1)
        uniforms = self.uniforms[:, step, None] if isinstance(step, int) else self.uniforms.index_select(1, step)
        drawn = uniforms.to(cumulative) * cumulative[:, -1:]
        return tokens.gather(1, torch.searchsorted(cumulative, drawn, right=True).clamp(max=tokens.shape[1] - 1))[:, 0]


def sampler_for(options: Mapping[str, Any], seeds: Sequence[int], max_new_tokens: int) -> Sampler:
    """Make the sampler of one batch.

    Args:
        options: lm-eval's normalized generation arguments, without ``until`` and ``max_gen_toks``.
        seeds: one per row; a row's tokens depend on its own seed only.

    Raises:
        UsageError: for an argument that is not supported (beams, for example).
    """
    left = {name: value for name, value in options.items() if value is not None}
    sampling = bool(left.pop("do_sample", False))
    num_beams = left.pop("num_beams", 1)
    if num_beams != 1:
        raise UsageError(
            f"num_beams={num_beams} is not supported: a compressed cache is decoded greedily or by sampling"
        )
    if sampling and not left.get("temperature", 1.0) > 0:
        raise UsageError(f"do_sample=true needs temperature > 0, not {left['temperature']}")
    processors = LogitsProcessorList()
    for name in WARPERS:
        value = left.pop(name, NEUTRAL[name])
        if value != NEUTRAL[name] and (sampling or name == "repetition_penalty"):
            processors.append(_warper(name, value))
    if left:
        raise UsageError(
            f"generation arguments not supported: {', '.join(sorted(left))}; supported are do_sample, until, "
            f"max_gen_toks, {', '.join(WARPERS)}"
        )
    return Sampler(processors, _uniforms(seeds, max_new_tokens) if sampling else None)


def _warper(name: str, value: Any) -> LogitsProcessor:
    try:
        return WARPERS[name](value)
    except ValueError as error:  # transformers checks the range
        raise UsageError(str(error)) from error


def _uniforms(seeds: Sequence[int], max_new_tokens: int) -> torch.Tensor:
    return torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
