"""How far two greedy texts of one model are from a tie where they part: rounding may choose either side of a tie.

Knows ``HFLM``, its tokenizer and how it generates. Does not know presses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from lm_eval_kvpress.engine.logits_processors import processors_for
from lm_eval_kvpress.engine.outcomes import GenerationSettings
from lm_eval_kvpress.harness.generation_arguments import generation_settings
from lm_eval_kvpress.harness.tokenization import encode_prompts


def text_gap(lm: HFLM, prompt: str, text: str, other: str, gen_kwargs: Mapping[str, Any]) -> float:
    """How much lower the score of one of two greedy texts is where they part; 0 for equal texts.

    Scores are those that greedy decoding compares: logits, after the checkpoint's penalties and bans. Where one text
    goes on and the other has ended, the end is a token too: one that ends a text, or a stop string's first.

    Args:
        gen_kwargs: with which both were generated.
    """
    if text == other:
        return 0.0
    first, second = (lm.tok_encode(continuation, add_special_tokens=False) for continuation in (text, other))
    pairs = enumerate(itertools.zip_longest(first, second))
    common = next((place for place, (a, b) in pairs if a != b), None)
    if common is None:
        return float("inf")  # of the same tokens, and yet another text
    settings, _ = generation_settings(lm, {**gen_kwargs, "ignore_eos": False})  # both texts are cut where they end
    ends = [*settings.stop_ids, *(lm.tok_encode(stop, add_special_tokens=False)[0] for stop in settings.until if stop)]
    choices = [[tokens[common]] if common < len(tokens) else ends for tokens in (first, second)]
    (context,) = encode_prompts(lm, [prompt])
    scores = _next_scores(lm, context, first[:common], settings)
    return min(_gap(scores[a], scores[b]) for a in choices[0] for b in choices[1])


@torch.inference_mode()
def _next_scores(lm: HFLM, context: Sequence[int], new: Sequence[int], settings: GenerationSettings) -> list[float]:
    """By token id, the logits of the token after a prompt and its new tokens, as they are compared."""
    ids = torch.tensor([[*context, *new]], device=lm.device)
    logits = lm.model(ids).logits[:, -1].float()
    process = processors_for(settings.options, context, settings.max_new_tokens, lm.device)
    scores: list[float] = process(ids, logits)[0].tolist()
    return scores


def _gap(score: float, other: float) -> float:
    """Their difference; infinite for a token that is banned."""
    return abs(score - other) if math.isfinite(score) and math.isfinite(other) else math.inf
