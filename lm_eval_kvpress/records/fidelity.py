"""How far scores over a compressed cache are from those over the full cache, token by token, and what a task has of it.

The divergence of Kullback and Leibler (1951), KL(full || compressed), is what the compressed cache loses of the full
one's distribution; the other direction is another number. Knows plain values. Does not know models or presses.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FAR_NATS = 1.0
"""A token is far off from here on."""


@dataclass(frozen=True)
class Fidelity:
    """The tokens of one continuation or window, each predicted twice: over the full cache and over the compressed one.

    Attributes:
        kl: KL(full || compressed) over the whole vocabulary in nats. Rounding can make it negative, by 1e-6 or less.
        agrees: whether both have the same most likely token.
        logprob_changes: the token's log-probability over the compressed cache less that over the full one, in nats.
    """

    kl: tuple[float, ...]
    agrees: tuple[bool, ...]
    logprob_changes: tuple[float, ...]


@dataclass
class FidelityTotals:
    """The tokens of many continuations that were scored under a press.

    Attributes:
        kl, agrees, logprob_changes: as in `Fidelity`, a number per token.
        places: how many tokens were scored after the same context before each.
    """

    kl: array[float] = field(default_factory=lambda: array("d"))
    agrees: array[int] = field(default_factory=lambda: array("b"))
    logprob_changes: array[float] = field(default_factory=lambda: array("d"))
    places: array[int] = field(default_factory=lambda: array("l"))

    def add(self, tokens: Fidelity) -> None:
        """Add the tokens of one continuation or window."""
        self.kl.extend(tokens.kl)
        self.agrees.extend(tokens.agrees)
        self.logprob_changes.extend(tokens.logprob_changes)
        self.places.extend(range(len(tokens.kl)))

    def merge(self, other: FidelityTotals) -> None:
        """Add the tokens of others."""
        for name, values in vars(other).items():
            getattr(self, name).extend(values)

    def summary(self) -> dict[str, Any] | None:
        """Figures for JSON, in nats; None without tokens. No figure depends on the order of the tokens."""
        if not self.kl:
            return None
        kl = np.array(self.kl)
        return {
            "num_tokens": len(kl),
            "kl_mean": _mean(kl),
            "kl_median": float(np.median(kl)),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "kl_max": float(kl.max()),
            f"share_above_{FAR_NATS:g}_nat": float((kl > FAR_NATS).mean()),
            "top1_agreement": float(np.mean(self.agrees)),
            "logprob_change_mean": _mean(self.logprob_changes),
            "by_position": list(self._by_position(kl)),
        }

    def _by_position(self, kl: np.ndarray) -> Iterator[dict[str, Any]]:
        """The tokens by their place after the context, counted from 1: 1, 2, 3 to 4, 5 to 8 and so on."""
        places, agrees = np.array(self.places), np.array(self.agrees)
        first, last = 0, 0
        while first <= places.max():
            chosen = (places >= first) & (places <= last)
            if chosen.any():
                yield {
                    "first": first + 1,
                    "last": last + 1,
                    "num_tokens": int(chosen.sum()),
                    "kl_mean": _mean(kl[chosen]),
                    "top1_agreement": float(agrees[chosen].mean()),
                }
            first, last = last + 1, 2 * last + 1


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return math.fsum(values) / len(values)
