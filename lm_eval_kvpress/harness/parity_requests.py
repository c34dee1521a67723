"""The requests of the parity certificate: ragged contexts and continuations, several windows, short and long prompts.

Knows lm-eval's requests. Does not know models. The texts are generated, so a certificate needs no data.
"""

from __future__ import annotations

import random

from lm_eval.api.instance import Instance

from lm_eval_kvpress import recall

MAX_LENGTH = 320
"""Windows of the certificate: short, so that it costs seconds, and shorter than its longest document."""

MAX_GEN_TOKS = 16


def loglikelihood_requests() -> list[Instance]:
    """Ragged contexts, the empty one among them, each with ragged continuations."""
    documents = [recall.recall_document(seed, distance=48 + 40 * seed, kind=recall.KINDS[seed]) for seed in range(4)]
    pairs = [(document.context + document.question, choice) for document in documents for choice in document.choices]
    pairs += [(_prose(9, 20), " " + _prose(10 + length, length)) for length in (12, 24)]
    pairs += [("", _prose(13, 16))]
    return [Instance("loglikelihood", {}, pair, 0, ("parity", index, 1)) for index, pair in enumerate(pairs)]


def rolling_requests() -> list[Instance]:
    """Several windows, less than one, and one token or so."""
    texts = (_prose(20, 2 * MAX_LENGTH + 30), _prose(21, 60), "The")
    return [Instance("loglikelihood_rolling", {}, (text,), 0, ("parity", index, 1)) for index, text in enumerate(texts)]


def generation_requests(max_length: int) -> list[Instance]:
    until = {"until": ["\n\n"], "max_gen_toks": min(MAX_GEN_TOKS, max_length // 2)}
    return [
        Instance("generate_until", {}, (_prose(30 + index, length), dict(until)), 0, ("parity", index, 1))
        for index, length in enumerate((90, 40, 12))
    ]


def _prose(seed: int, num_tokens: int) -> str:
    return recall.generated_filler(random.Random(seed), num_tokens)
