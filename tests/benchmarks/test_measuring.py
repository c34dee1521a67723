"""Rounds are shuffled and whole, estimates hold their median, ratios are not skewed by a slow round."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from scripts.benchmarks.measuring import Estimate, counts, estimate, rounds


def test_the_interval_holds_the_median_and_narrows_with_repeats() -> None:
    values = np.random.default_rng(0).normal(10, 1, size=400)
    few, many = estimate(list(values[:5])), estimate(list(values))
    for found in (few, many):
        assert found.low <= found.median <= found.high
    assert many.high - many.low < few.high - few.low
    assert estimate([3.0]) == Estimate(3.0, 3.0, 3.0)


def test_every_thing_is_warmed_up_once_and_measured_once_a_round_in_changing_order() -> None:
    order: list[str] = []
    found = rounds("abcd", lambda thing: order.append(thing) or len(order), 6)
    assert order[:4] == list("abcd")
    orders = [tuple(order[start : start + 4]) for start in range(4, len(order), 4)]
    assert all(sorted(one) == list("abcd") for one in orders) and len(set(orders)) > 1
    assert [min(one.values()) for one in found] == [5, 9, 13, 17, 21, 25]


def test_counts_are_positive() -> None:
    assert counts("1,16") == [1, 16]
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
        counts("4,0")
