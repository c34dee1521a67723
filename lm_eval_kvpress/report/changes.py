"""What became of each answer beside the baseline's: now wrong, now right, another option, another text.

Accuracy hides answers that change both ways. Knows the samples of two runs over the same documents, whoever wrote
them. Does not know tables or models: texts are compared by words, for there is no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from lm_eval_kvpress.report.samples import Answer, Scores


@dataclass(frozen=True)
class Changes:
    """Counts over the documents that two runs answered.

    Attributes:
        num_judged: documents of which both runs have a score of 0 or 1.
        num_lost, num_won: of these, right at the baseline and now wrong, and the other way round.
        num_choices, num_moved: documents with several options, and those of which another one is now most likely.
        num_texts, num_same_texts: documents answered by a text, and those with the baseline's own.
        num_words_before: words before the first difference, summed over texts that differ.
        num_words_added: words of all texts less those of the baseline's.
    """

    num_judged: int = 0
    num_lost: int = 0
    num_won: int = 0
    num_choices: int = 0
    num_moved: int = 0
    num_texts: int = 0
    num_same_texts: int = 0
    num_words_before: int = 0
    num_words_added: int = 0

    def __add__(self, other: Changes) -> Changes:
        return Changes(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def judged(own: Scores, baseline: Scores) -> Changes:
    """Right and wrong answers of the same documents; no document counts if a score is not 0 or 1."""
    is_about = (own.denominators > 0) & (baseline.denominators > 0)
    scores = [one.numerators[is_about] / one.denominators[is_about] for one in (own, baseline)]
    if not all(np.isin(score, (0, 1)).all() for score in scores):
        return Changes()
    now, before = (score == 1 for score in scores)
    return Changes(num_judged=len(now), num_lost=int((before & ~now).sum()), num_won=int((now & ~before).sum()))


def answered(own: Sequence[Answer], baseline: Sequence[Answer]) -> Changes:
    """Options and texts of the same documents."""
    pairs = list(zip(own, baseline, strict=True))
    moved = [now != before for now, before in pairs if isinstance(now, int) and isinstance(before, int)]
    texts = [(now, before) for now, before in pairs if isinstance(now, str) and isinstance(before, str)]
    words = [(now.split(), before.split()) for now, before in texts]
    changed = [pair for pair, (now, before) in zip(words, texts, strict=True) if now != before]
    return Changes(
        num_choices=len(moved),
        num_moved=sum(moved),
        num_texts=len(texts),
        num_same_texts=len(texts) - len(changed),
        num_words_before=sum(_num_shared(*pair) for pair in changed),
        num_words_added=sum(len(now) - len(before) for now, before in words),
    )


def _num_shared(now: Sequence[str], before: Sequence[str]) -> int:
    """Words before the first difference."""
    pairs = zip(now, before, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(now), len(before)))
