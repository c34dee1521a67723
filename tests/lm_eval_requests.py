"""Requests of all three types for the tiny checkpoint, and our model on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from lm_eval_kvpress.harness.model import KVPress

SENTENCE = "the cold river ran past an old mill where seven grey geese slept and nobody asked who owned them"
WORDS = SENTENCE.split() * 40


def text(start: int, num_words: int) -> str:
    return " ".join(WORDS[start : start + num_words])


def loglikelihood_requests() -> list[Instance]:
    contexts = [text(17 * index, 25 + 20 * index) for index in range(5)] + [""]
    return [
        Instance("loglikelihood", {}, (context, f" {text(300 + 5 * choice, 1 + choice)}"), choice, ("choice", index, 1))
        for index, context in enumerate(contexts)
        for choice in range(4)
    ]


def rolling_requests() -> list[Instance]:
    return [
        Instance("loglikelihood_rolling", {}, (text(index, num_words),), 0, ("rolling", index, 1))
        for index, num_words in enumerate([500, 1, 180, 333])
    ]


def generation_requests(**gen_kwargs: Any) -> list[Instance]:
    return [
        Instance("generate_until", {}, (text(31 * index, 10 + 25 * index), dict(gen_kwargs)), 0, ("gen", index, 1))
        for index in range(5)
    ]


def ours(checkpoint_dir: Path, **arguments: Any) -> KVPress:
    return KVPress(pretrained=str(checkpoint_dir), device="cpu", **arguments)
