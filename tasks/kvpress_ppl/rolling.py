"""Figures of a rolling log-likelihood: by word, by byte, and by token where the model says how many it scored.

The kvpress models answer with a float that carries counts (`lm_eval_kvpress.records.rolling_score.RollingScore`). From
a model that answers with a plain number, such as stock `hf`, the token figures are left out rather than guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.metrics import weighted_perplexity


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


def token_perplexity(items: Sequence[tuple[float, int]]) -> float | None:
    """lm-eval's weighted perplexity; None, shown as missing, where no token was scored (`one_pass`, short texts).

    Documents without a pressed token stay in with weight 0: lm-eval warns of metrics that lack some documents.
    """
    if not any(num_tokens for _, num_tokens in items):
        return None
    perplexity: float = weighted_perplexity(items)
    return perplexity


def total(counts: Sequence[int]) -> int:
    return sum(counts)
