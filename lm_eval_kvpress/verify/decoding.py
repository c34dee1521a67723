"""Check what is scored, and what is generated, while a decoding press compresses the cache under it.

StreamingLLM's rule says beforehand what is left: the first entries and the newest ones. So the reference is one whole
forward of the untouched copy, in which the tokens after the first compression do not see what was evicted by then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lm_eval_kvpress.engine.decode_budget import BudgetKeeper
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.parity import worst
from lm_eval_kvpress.verify.check import Check, Part
from lm_eval_kvpress.verify.scores import generated
from lm_eval_kvpress.verify.subject import Subject, compress, score

INTERVAL, NUM_SINKS = 16, 4

LEAST_EFFECT = 1e-3
"""Nats per token by which the eviction moves a score."""


def check_decoding(subject: Subject) -> Check:
    """Compare scores under ``decode_scoring=true`` and greedy texts with whole forwards that mask evicted entries."""
    target, model = subject.max_length // 8, subject.lm.press_model
    lm = subject.under(
        "decoding:streaming_llm",
        target_size=target,
        compression_interval=INTERVAL,
        decode_scoring=True,
        **{"decoding.n_sink": NUM_SINKS},
    )
    scored, effects, of_new = list[float](), list[float](), list[float]()
    for seed, length in enumerate((subject.max_length // 2, subject.max_length // 5)):
        context, continuation = subject.tokens(length, seed=seed), subject.tokens(2 * INTERVAL, seed=5 + seed)
        num_seen = length - 1 + INTERVAL  # the last token of the context is fed first, and counts
        evicted = [_between(num_seen, target, model.num_key_value_heads)] * len(model.attentions)
        (found,) = score(lm, context, [continuation])
        expected, full = (
            subject.log_probabilities(context, continuation, masked).sum().item() for masked in (evicted, None)
        )
        scored.append(abs(found - expected) / len(continuation))
        effects.append(abs(found - full) / len(continuation))
        new, logprobs = _generated(lm, context)
        of_new.append((logprobs - subject.log_probabilities(context, new, evicted)).abs().max().item())
    recorded = lm.describe()["tasks"][""]
    parts = (
        Part("decoding:streaming_llm: nats per token", worst(scored), subject.tolerance),
        Part("decoding:streaming_llm: generated tokens, nats", worst(of_new), subject.tolerance),
        Part("nats per token that the eviction moves a score", min(effects), LEAST_EFFECT, at_least=True),
        Part("tokens after an eviction, misreported", abs(recorded["tokens_scored_after_eviction"] - 2 * INTERVAL), 0),
    )
    claim = "scores and texts under a decoding press are the dense ones with evicted entries masked"
    return Check("decoding", claim, parts)


def _generated(lm: KVPress, context: Sequence[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens under the lm's decoding press, and their log-probabilities, ``(n,)``."""
    decoding = lm.session.settings.decoding
    assert decoding is not None
    cache, query = compress(lm, context)
    return generated(lm, cache, context, query, 2 * INTERVAL, BudgetKeeper(lm.press_model, decoding))


def _between(num_seen: int, target: int, num_heads: int) -> torch.Tensor:
    """The entries between the sinks and the newest ones, ``(G, P)``."""
    evicted = torch.zeros(num_heads, num_seen, dtype=torch.bool)
    evicted[:, NUM_SINKS : num_seen - (target - NUM_SINKS)] = True
    return evicted
