"""Answers of one token, with the end of the context held back and without: where a press can act, and where not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from lm_eval_kvpress import recall
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.verify.subject import score_pairs
from scripts.studies.findings.pressed import under
from scripts.studies.findings.rows import FirstToken
from scripts.studies.findings.wrong_split import contiguous_split


@dataclass(frozen=True)
class Question:
    """A fact in the context, asked for at its end; answers of one token, of which one is right."""

    context: tuple[int, ...]
    answers: tuple[int, ...]
    right: int


def questions(lm: KVPress, count: int) -> list[Question]:
    """Questions about facts some 400 tokens back. An answer of several tokens is cut to its first one."""
    documents = [recall.recall_document(seed, distance=400, kind="word") for seed in range(count)]
    return [
        Question(
            tuple(lm.tok_encode(document.context + document.question)),
            tuple(lm.tok_encode(choice)[0] for choice in document.choices),
            document.answer,
        )
        for document in documents
    ]


def answer(
    lm: KVPress, asked: Sequence[Question], press: str, removed: float, held_back: int, *, split: str = "right"
) -> list[list[float]]:
    """Log-probabilities of the answers to each question."""
    pressed = under(lm, press, compression_ratio=removed, query_tokens=held_back)
    pairs = [(question.context, (token,)) for question in asked for token in question.answers]
    with contiguous_split() if split == "contiguous" else nullcontext():
        scores = iter(score_pairs(pressed, pairs))
    return [[next(scores) for _ in question.answers] for question in asked]


def first_token(
    asked: Sequence[Question],
    found: Sequence[Sequence[float]],
    plain: Sequence[Sequence[float]],
    **setting: Any,
) -> FirstToken:
    """How far the answers moved from those without a press, and how many are right."""
    pairs = zip(found, plain, strict=True)
    moves = [abs(a - b) for scores, others in pairs for a, b in zip(scores, others, strict=True)]
    best = [max(range(len(scores)), key=scores.__getitem__) for scores in found]
    right = sum(choice == question.right for choice, question in zip(best, asked, strict=True))
    accuracy = right / len(asked)
    return FirstToken(**setting, largest_move=max(moves), mean_move=math.fsum(moves) / len(moves), accuracy=accuracy)


def first_tokens(lm: KVPress, asked: Sequence[Question], presses: Sequence[str], removed: float) -> list[FirstToken]:
    """Every press with one token of the context held back, and with none."""
    rows = []
    for held_back in (1, 0):
        figures = {press: answer(lm, asked, press, removed, held_back) for press in presses}
        for press, found in figures.items():
            rows.append(first_token(asked, found, figures["none"], press=press, held_back=held_back, split="right"))
    return rows


def wrong_answers(lm: KVPress, asked: Sequence[Question], presses: Sequence[str], removed: float) -> list[FirstToken]:
    """The same questions, one token held back, with the contiguous split."""
    plain = answer(lm, asked, "none", removed, 1)
    return [
        first_token(asked, found, plain, press=press, held_back=1, split="contiguous")
        for press in presses
        for found in [answer(lm, asked, press, removed, 1, split="contiguous")]
    ]
