"""A document's log-likelihood as lm-eval wants it, one number, with the counts that token perplexity needs."""

from __future__ import annotations

from typing import Any


class RollingScore(float):
    """A document's log-likelihood in nats, with the number of tokens that it is a sum over.

    lm-eval hands a task one number per rolling request; this one carries the counts that token perplexity needs.

    Attributes:
        num_tokens: tokens scored.
        num_tokens_pressed: of these, the tokens scored over a cache that the press had compressed; for ``press=none``
            the same tokens, over the full cache, so that baseline and press compare like with like.
        loglikelihood_pressed: their log-likelihood in nats.
    """

    num_tokens: int
    num_tokens_pressed: int
    loglikelihood_pressed: float

    def __new__(
        cls, loglikelihood: float, num_tokens: int, num_tokens_pressed: int, loglikelihood_pressed: float
    ) -> RollingScore:
        score = super().__new__(cls, loglikelihood)
        score.num_tokens = num_tokens
        score.num_tokens_pressed = num_tokens_pressed
        score.loglikelihood_pressed = loglikelihood_pressed
        return score

    def __reduce__(self) -> tuple[Any, ...]:
        counts = (self.num_tokens, self.num_tokens_pressed, self.loglikelihood_pressed)
        return RollingScore, (float(self), *counts)
