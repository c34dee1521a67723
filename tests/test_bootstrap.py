"""The bootstrap: its intervals are those of scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from lm_eval_kvpress.bootstrap import NUM_RESAMPLES, interval, paired_intervals, share_interval


def test_interval_equals_scipys_paired_bootstrap() -> None:
    draws = np.random.default_rng(0)
    base, other = draws.random(60), draws.random(60)
    ours = paired_intervals(np.stack([base, other], 1), np.ones((60, 2)), 0, lambda ratio: ratio)
    theirs = bootstrap(
        (other, base),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20 * NUM_RESAMPLES,
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert abs(ours[0][1] - theirs.low) < 0.06 * width and abs(ours[1][1] - theirs.high) < 0.06 * width
    assert ours[0][0] == ours[1][0] == 0


def test_a_run_without_a_document_of_the_metric_has_no_interval() -> None:
    numerators, denominators = np.ones((4, 2)), np.stack([np.ones(4), np.zeros(4)], 1)
    low, high = paired_intervals(numerators * denominators, denominators, 0, lambda ratio: ratio)
    assert low[0] == high[0] == 0 and np.isnan(low[1]) and np.isnan(high[1])


def test_the_interval_of_one_sample_equals_scipys() -> None:
    values = np.random.default_rng(0).random(40)
    ours = interval(values, np.mean, num_resamples=20_000)
    theirs = bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert abs(ours[0] - theirs.low) < 0.06 * width and abs(ours[1] - theirs.high) < 0.06 * width


@pytest.mark.parametrize("num, total", [(0, 30), (30, 30), (4, 30), (1, 2), (700, 1000)])
def test_the_interval_of_a_share_is_wilsons(num: int, total: int) -> None:
    """Also of none and of all, where a bootstrap has no width."""
    theirs = binomtest(num, total).proportion_ci(method="wilson")
    assert share_interval(num, total) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
