"""Check what is scored while a decoding press compresses the cache under it.

StreamingLLM's rule says beforehand what is left: the first entries and the newest ones. So the reference is one whole
forward of the untouched copy, in which the tokens after the first compression do not see what was evicted by then.
"""

from __future__ import annotations

import torch

from lm_eval_kvpress.harness.parity import worst
from lm_eval_kvpress.verify.check import Check, Part
from lm_eval_kvpress.verify.subject import Subject, score

INTERVAL, NUM_SINKS = 16, 4

LEAST_EFFECT = 1e-3
"""Nats per token by which the eviction moves a score."""


def check_decoding(subject: Subject) -> Check:
    """Compare log-likelihoods under ``decode_scoring=true`` with whole forwards that mask what was evicted."""
    target, model = subject.max_length // 8, subject.lm.press_model
    lm = subject.under(
        "decoding:streaming_llm",
        target_size=target,
        compression_interval=INTERVAL,
        decode_scoring=True,
        **{"decoding.n_sink": NUM_SINKS},
    )
    differences, effects = [], []
    for seed, length in enumerate((subject.max_length // 2, subject.max_length // 5)):
        context, continuation = subject.tokens(length, seed=seed), subject.tokens(2 * INTERVAL, seed=5 + seed)
        num_seen = length - 1 + INTERVAL  # the last token of the context is fed first, and counts
        evicted = [_between(num_seen, target, model.num_key_value_heads)] * len(model.attentions)
        (found,) = score(lm, context, [continuation])
        expected, full = (
            subject.log_probabilities(context, continuation, masked).sum().item() for masked in (evicted, None)
        )
        differences.append(abs(found - expected) / len(continuation))
        effects.append(abs(found - full) / len(continuation))
    recorded = lm.describe()["tasks"][""]
    parts = (
        Part("decoding:streaming_llm: nats per token", worst(differences), subject.tolerance),
        Part("nats per token that the eviction moves a score", min(effects), LEAST_EFFECT, at_least=True),
        Part("tokens after an eviction, misreported", abs(recorded["tokens_scored_after_eviction"] - 2 * INTERVAL), 0),
    )
    return Check("decoding", "a score under a decoding press is the dense one with evicted entries masked", parts)


def _between(num_seen: int, target: int, num_heads: int) -> torch.Tensor:
    """The entries between the sinks and the newest ones, ``(G, P)``."""
    evicted = torch.zeros(num_heads, num_seen, dtype=torch.bool)
    evicted[:, NUM_SINKS : num_seen - (target - NUM_SINKS)] = True
    return evicted
