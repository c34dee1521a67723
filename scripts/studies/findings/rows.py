"""The figures of the findings, as frozen rows. Knows neither how they are measured nor how they are reported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Perplexity:
    """One data set under one press and protocol.

    Attributes:
        split: of the fused projection: ``right``, or ``contiguous`` (the origin's mistake).
        perplexity: per token; under ``prefix`` of the tokens scored over the cache.
        num_tokens: it is over so many.
        kept_share: entries that could be attended, of those prefilled; None where nothing was compressed.
        notes: what the press reported of itself.
    """

    dataset: str
    press: str
    removed: float
    protocol: str
    split: str
    perplexity: float
    num_tokens: int
    kept_share: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class OneForward:
    """One forward over a window under a press: what it left in the cache, and what it did to the logits."""

    press: str
    num_tokens: int
    kept_share: float
    largest_logit: float
    largest_difference: float


@dataclass(frozen=True)
class SplitDifference:
    """Entries that a press keeps with the right split of the fused projection and evicts with the contiguous one."""

    press: str
    num_contexts: int
    num_kept: int
    num_different: int


@dataclass(frozen=True)
class FirstToken:
    """Answers of one token: how far a press moves them, and how many are right.

    Attributes:
        held_back: context tokens fed after compression; with 0 the full cache predicts the answer.
        split: as in `Perplexity`.
        largest_move, mean_move: change of the answers' log-probabilities against no press, nats.
        accuracy: of the most likely among four answers.
    """

    press: str
    held_back: int
    split: str
    largest_move: float
    mean_move: float
    accuracy: float


@dataclass(frozen=True)
class Speed:
    """One press and batch size; each figure a dict of ``median``, ``low`` and ``high`` over the repeats."""

    press: str
    batch_size: int
    num_prompt_tokens: int
    num_new_tokens: int
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Findings:
    """Everything that was measured.

    Attributes:
        setting: what it was measured on, as lines of text.
        skipped: what could not be measured, and why.
        removed: the fraction removed where not stated otherwise.
        protocols: presses under both protocols.
        forwards: a single forward under each press.
        wrong: presses with the contiguous split, under both protocols.
        differences: entries kept by one split only.
        wrong_answers: questions answered with the contiguous split.
        ratios: perplexities under ``prefix`` at each ratio.
        first_tokens: one-token answers with a token held back and without.
        speeds: prefill and decoding.
    """

    setting: Sequence[str]
    removed: float
    skipped: Sequence[str] = ()
    protocols: Sequence[Perplexity] = ()
    forwards: Sequence[OneForward] = ()
    wrong: Sequence[Perplexity] = ()
    differences: Sequence[SplitDifference] = ()
    wrong_answers: Sequence[FirstToken] = ()
    ratios: Sequence[Perplexity] = ()
    first_tokens: Sequence[FirstToken] = ()
    speeds: Sequence[Speed] = ()


def datasets(rows: Iterable[Perplexity]) -> list[str]:
    """The data sets of the rows, each once, in order."""
    return list(dict.fromkeys(row.dataset for row in rows))


def presses(rows: Iterable[Perplexity | Speed]) -> list[str]:
    """The presses of the rows, each once, in order."""
    return list(dict.fromkeys(row.press for row in rows))
