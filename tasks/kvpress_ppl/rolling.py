"""Figures of a rolling log-likelihood: by word, by byte, and by token where the model says how many it scored.

The kvpress models answer with a float that carries counts (`lm_eval_kvpress.records.rolling_score.RollingScore`). From
a model that answers with a plain number, such as stock `hf`, the token figures are left out rather than guessed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def process_results(document: dict[str, Any], results: Sequence[float]) -> dict[str, Any]:
    """``(log-likelihood, weight)`` for the perplexities, plain numbers for the counts."""
    (loglikelihood,) = results
    total = float(loglikelihood)
    figures: dict[str, Any] = {
        "word_perplexity": (total, document["num_words"]),
        "byte_perplexity": (total, document["num_bytes"]),
        "bits_per_byte": (total, document["num_bytes"]),
    }
    num_tokens = getattr(loglikelihood, "num_tokens", None)
    if num_tokens is None:
        return figures
    pressed: float = loglikelihood.loglikelihood_pressed  # type: ignore[attr-defined]
    num_pressed: int = loglikelihood.num_tokens_pressed  # type: ignore[attr-defined]
    return {
        **figures,
        "token_perplexity": (total, num_tokens),
        "pressed_token_perplexity": (pressed, num_pressed),
        "scored_tokens": num_tokens,
        "pressed_tokens": num_pressed,
    }


def perplexity(items: Sequence[tuple[float, int]]) -> float | None:
    """lm-eval's `weighted_perplexity`, but infinite where that overflows a float and None where nothing has weight.

    A text with few spaces has a log-likelihood per word that overflows; a text of no bytes, or `one_pass`, has no
    weight. lm-eval aggregates when all is scored, so an exception there loses the figures of every task.
    """
    mean = _mean(items)
    try:
        return None if mean is None else math.exp(-mean)
    except OverflowError:
        return math.inf


def bits_per_byte(items: Sequence[tuple[float, int]]) -> float | None:
    """lm-eval's `bits_per_byte`, but None where there is no byte."""
    mean = _mean(items)
    return None if mean is None else -mean / math.log(2)


def _mean(items: Sequence[tuple[float, int]]) -> float | None:
    """Log-likelihood by weight. Documents without weight stay in: lm-eval warns of metrics that lack some."""
    weight = sum(weight for _, weight in items)
    return sum(loglikelihood for loglikelihood, _ in items) / weight if weight else None


def total(counts: Sequence[int]) -> int:
    return sum(counts)
