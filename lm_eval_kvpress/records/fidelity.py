"""How far scores and texts over a compressed cache are from those over the full cache, and what a task has of it.

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

from lm_eval_kvpress.bootstrap import paired_intervals

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

    @classmethod
    def joined(cls, parts: Sequence[Fidelity]) -> Fidelity:
        """The tokens of all parts, in order."""
        kl, agrees, changes = (
            tuple(value for part in parts for value in getattr(part, name)) for name in vars(parts[0])
        )
        return cls(kl, agrees, changes)


@dataclass(frozen=True)
class TextFidelity:
    """A text generated twice, from the full cache and from the compressed one, with the same settings and draws.

    Attributes:
        num_equal: tokens before the first difference.
        num_tokens, num_full_tokens: of the text, and of the full cache's.
    """

    num_equal: int
    num_tokens: int
    num_full_tokens: int

    @property
    def is_identical(self) -> bool:
        return self.num_equal == self.num_tokens == self.num_full_tokens


def text_fidelity(ids: Sequence[int], full: Sequence[int]) -> TextFidelity:
    """Compare the token ids of a text with those of the full cache's."""
    shorter = min(len(ids), len(full))
    pairs = zip(ids, full, strict=False)
    first = next((place for place, (one, other) in enumerate(pairs) if one != other), shorter)
    return TextFidelity(first, len(ids), len(full))


@dataclass
class TextFidelityTotals:
    """Many texts."""

    texts: list[TextFidelity] = field(default_factory=list)

    def add(self, text: TextFidelity) -> None:
        """Add a text."""
        self.texts.append(text)

    def merge(self, other: TextFidelityTotals) -> None:
        """Add the texts of others."""
        self.texts += other.texts

    def summary(self) -> dict[str, Any] | None:
        """Figures for JSON; None without texts. Tokens before a difference are those of texts that have one."""
        if not self.texts:
            return None
        before = [text.num_equal for text in self.texts if not text.is_identical]
        return {
            "num_texts": len(self.texts),
            "num_identical": len(self.texts) - len(before),
            "tokens_before_difference_mean": _mean(before) if before else None,
            "tokens_before_difference_median": float(np.median(before)) if before else None,
            "length_change_mean": _mean([text.num_tokens - text.num_full_tokens for text in self.texts]),
        }


@dataclass
class FidelityTotals:
    """The tokens of many continuations that were scored under a press.

    Attributes:
        kl, agrees, logprob_changes: as in `Fidelity`, a number per token.
        places: how many tokens were scored after the same context before each.
        documents: lm-eval's number of each token's document.
    """

    kl: array[float] = field(default_factory=lambda: array("d"))
    agrees: array[int] = field(default_factory=lambda: array("b"))
    logprob_changes: array[float] = field(default_factory=lambda: array("d"))
    places: array[int] = field(default_factory=lambda: array("l"))
    documents: array[int] = field(default_factory=lambda: array("l"))

    def add(self, tokens: Fidelity, doc_id: int | None, first_place: int = 0) -> None:
        """Add the tokens of one continuation or window of a document.

        Args:
            doc_id: lm-eval's number of the document.
            first_place: how many tokens stand before the first one, after the context.
        """
        self.kl.extend(tokens.kl)
        self.agrees.extend(tokens.agrees)
        self.logprob_changes.extend(tokens.logprob_changes)
        self.places.extend(range(first_place, first_place + len(tokens.kl)))
        self.documents.extend([-1 if doc_id is None else doc_id] * len(tokens.kl))

    def merge(self, other: FidelityTotals) -> None:
        """Add the tokens of others."""
        for name, values in vars(other).items():
            getattr(self, name).extend(values)

    def summary(self) -> dict[str, Any] | None:
        """Figures for JSON, in nats; None without tokens. No figure depends on the order of the tokens."""
        if not self.kl:
            return None
        kl = np.array(self.kl)
        low, high = self._intervals()
        return {
            "num_tokens": len(kl),
            "kl_mean": _mean(kl),
            "kl_mean_low": low[0],
            "kl_mean_high": high[0],
            "kl_median": float(np.median(kl)),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "kl_max": float(kl.max()),
            f"share_above_{FAR_NATS:g}_nat": float((kl > FAR_NATS).mean()),
            "top1_agreement": float(np.mean(self.agrees)),
            "top1_agreement_low": low[1],
            "top1_agreement_high": high[1],
            "logprob_change_mean": _mean(self.logprob_changes),
            "by_position": list(self._by_position(kl)),
        }

    def _intervals(self) -> tuple[list[float | None], list[float | None]]:
        """Lower and upper ends of the 95 % intervals of mean KL and agreement; None of one document.

        Documents are resampled, not tokens: those of one document are alike.
        """
        names, documents = np.unique(self.documents, return_inverse=True)
        if len(names) < 2:
            return [None, None], [None, None]
        columns = (np.zeros(len(self.kl)), np.array(self.kl), np.array(self.agrees, dtype=np.float64))
        sums = np.stack([np.bincount(documents, values).astype(np.float64) for values in columns], axis=1)
        num_tokens = np.repeat(np.bincount(documents).astype(np.float64)[:, None], len(columns), axis=1)
        low, high = paired_intervals(sums, num_tokens, 0, lambda ratio: ratio)
        return low[1:].tolist(), high[1:].tolist()

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
