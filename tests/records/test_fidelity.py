"""Summaries of many tokens are numpy's, whatever their order; intervals resample documents."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lm_eval_kvpress.records.fidelity import Fidelity, FidelityTotals

DOCUMENTS: list[tuple[int, list[float]]] = []
for _number in range(40):
    _draws = random.Random(_number)
    DOCUMENTS.append((_number, [abs(_draws.gauss(_number % 4, 0.5)) for _ in range(3 + _number % 5)]))


def tokens(kl: list[float]) -> Fidelity:
    return Fidelity(tuple(kl), tuple(value < 1 for value in kl), tuple(-value for value in kl))


def totals(order: list[int]) -> FidelityTotals:
    found = FidelityTotals()
    for index in order:
        number, kl = DOCUMENTS[index]
        found.add(tokens(kl), number)
    return found


def test_the_summary_is_that_of_all_tokens() -> None:
    found = totals(list(range(40))).summary()
    kl = np.concatenate([kl for _, kl in DOCUMENTS])
    assert found is not None and found["num_tokens"] == len(kl)
    expected = {
        "kl_mean": kl.mean(),
        "kl_median": np.median(kl),
        "kl_p99": np.quantile(kl, 0.99),
        "kl_max": kl.max(),
        "share_above_1_nat": (kl > 1).mean(),
        "top1_agreement": (kl < 1).mean(),
        "logprob_change_mean": -kl.mean(),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    firsts = np.mean([kl[0] for _, kl in DOCUMENTS])
    assert found["by_position"][0] == {
        "first": 1,
        "last": 1,
        "num_tokens": 40,
        "kl_mean": pytest.approx(firsts),
        "top1_agreement": np.mean([kl[0] < 1 for _, kl in DOCUMENTS]),
    }
    assert [(row["first"], row["last"]) for row in found["by_position"]] == [(1, 1), (2, 2), (3, 4), (5, 8)]


def test_order_and_processes_change_nothing() -> None:
    whole, mixed = totals(list(range(40))), list(range(40))
    random.Random(1).shuffle(mixed)
    halves = totals(mixed[:20])
    halves.merge(totals(mixed[20:]))
    found, expected = halves.summary(), whole.summary()
    assert found is not None and expected is not None
    places, places_expected = found.pop("by_position"), expected.pop("by_position")
    assert found == pytest.approx(expected, rel=1e-12)
    assert all(one == pytest.approx(other, rel=1e-12) for one, other in zip(places, places_expected, strict=True))


def test_intervals_resample_documents_and_not_tokens() -> None:
    """Against resamples that are drawn one by one."""
    found = totals(list(range(40))).summary()
    assert found is not None
    draws, means = random.Random(3), []
    for _ in range(4_000):
        kl = [value for _ in DOCUMENTS for value in draws.choice(DOCUMENTS)[1]]
        means.append(sum(kl) / len(kl))
    low, high = np.quantile(means, [0.025, 0.975])
    assert (found["kl_mean_low"], found["kl_mean_high"]) == pytest.approx((low, high), abs=0.08 * (high - low))
    assert found["top1_agreement_low"] < found["top1_agreement"] < found["top1_agreement_high"]


def test_one_document_has_no_interval() -> None:
    found = totals([3]).summary()
    assert found is not None and found["kl_mean_low"] is None and found["top1_agreement_high"] is None
