"""Check how far compressed predictions are said to be from the full cache's.

The reference is two whole forwards of the untouched copy, one of which hides what the press evicted
(`dense_reference`), and their distributions over the whole vocabulary.
"""

from __future__ import annotations

import torch

from lm_eval_kvpress.verify.check import Check, Part
from lm_eval_kvpress.verify.scores import NUM_CONTINUED, evicted_by
from lm_eval_kvpress.verify.subject import Subject, score

LEAST_DIVERGENCE = 1e-6
"""Nats per token. A press that removed entries and diverges by exactly nothing was not read."""


def check_fidelity(subject: Subject) -> Check:
    """Compare the recorded KL of each press with that of whole forwards, and ask that it is not zero."""
    context, continuation = subject.tokens(subject.max_length // 2), subject.tokens(NUM_CONTINUED, seed=5)
    full = subject.distributions(context, continuation)
    parts, smallest = list[Part](), dict[str, float]()
    for press in subject.presses(none=True):
        lm = subject.under(press, fidelity=True)
        score(lm, context, [continuation])
        found = lm.describe()["tasks"][""]["fidelity"]["kl_mean"]
        compressed = subject.distributions(context, continuation, evicted_by(lm, context))
        parts.append(Part(f"{press}: nats per token", abs(found - divergence(full, compressed)), subject.tolerance))
        if press != "none":
            smallest[press] = found
    closest = min(smallest, key=lambda press: smallest[press])
    parts.append(Part(f"KL of {closest}, nats per token", smallest[closest], LEAST_DIVERGENCE, at_least=True))
    return Check("fidelity", "KL from the full cache is that of dense forwards, and no press has none", tuple(parts))


def divergence(full: torch.Tensor, compressed: torch.Tensor) -> float:
    """Mean KL(full || compressed) in nats of tables of log-probabilities ``(n, V)``."""
    full, compressed = full.double(), compressed.double()
    return float((full.exp() * (full - compressed)).sum(dim=-1).mean())
