"""Rates of a run are tokens of the phase per second of the phase, with their intervals and those of medians."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap

from lm_eval_kvpress.records.timings import BatchRecord, RunRecords, machines_of, percentiles, rate_interval

PLACES = [("A", 1.0), ("B", 10.0), ("A", 1.0)]


def batch(**figures: Any) -> BatchRecord:
    empty: dict[str, Any] = {field.name: None for field in dataclasses.fields(BatchRecord)}
    none = dict.fromkeys(("seconds", "prefill_sec", "press_sec", "score_sec", "decode_sec"), 0.0)
    return BatchRecord(
        **{**empty, **none, "num_prefill_tokens": 0, "num_output_tokens": 0, "is_warmup": False, **figures}
    )


def test_prefill_and_press_are_rated_by_prefilled_tokens_and_the_rest_by_output_tokens() -> None:
    sizes = {"num_prefill_tokens": 300, "num_output_tokens": 12}
    scored = batch(**sizes, seconds=5.0, prefill_sec=3.0, press_sec=1.0, score_sec=0.5)
    written = batch(**sizes, seconds=9.0, prefill_sec=3.0, press_sec=2.0, decode_sec=4.0)
    summary = RunRecords([scored, written], []).summary()
    rates = {phase: summary[phase]["tokens_per_sec"] for phase in ("prefill", "press", "score", "decode")}
    assert rates == {"prefill": 600 / 6, "press": 600 / 3, "score": 12 / 0.5, "decode": 12 / 4}


def test_a_run_without_batches_or_seconds_has_no_rates() -> None:
    assert "prefill" not in RunRecords([batch(num_prefill_tokens=3)], []).summary()
    summary = RunRecords([], []).summary()
    assert (summary["seconds_total"], summary["ttft_sec"], summary["itl_sec"]) == (0, None, None)


def test_the_interval_of_a_rate_is_near_that_of_a_bootstrap_over_batches() -> None:
    random = np.random.default_rng(0)
    tokens, seconds = random.integers(20, 40, 60), random.uniform(0.8, 1.2, 60)
    found = bootstrap(
        (tokens, seconds),
        lambda tokens, seconds, axis: tokens.sum(axis) / seconds.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        random_state=0,
    ).confidence_interval
    assert rate_interval(tokens.tolist(), seconds.tolist()) == pytest.approx((found.low, found.high), rel=0.02)


def test_one_batch_has_no_interval_and_equal_ones_a_point() -> None:
    assert rate_interval([29], [0.0568]) == (None, None)
    assert rate_interval([10, 10, 10], [2.0, 2.0, 2.0]) == (5.0, 5.0)


def test_the_interval_of_a_median_is_of_its_ranks() -> None:
    found = percentiles([float(value) for value in range(1, 102)])
    assert found is not None and (found["num_values"], found["p50"]) == (101, 51.0)
    assert (found["p50_low"], found["p50_high"]) == pytest.approx((51 - 9.75, 51 + 9.75), abs=0.1)
    assert percentiles([]) is None


def test_times_of_one_machine_are_not_pooled_with_those_of_another() -> None:
    batches = [batch(num_prefill_tokens=100, machine=name, prefill_sec=seconds) for name, seconds in PLACES]
    records = RunRecords(batches, [])
    rates = {name: records.on(name).summary()["prefill"]["tokens_per_sec"] for name in ("A", "B")}
    assert rates == {"A": 100.0, "B": 10.0} and "prefill" not in records.on("C").summary()
    assert machines_of(batches) == "A and B" and machines_of(batches[:1]) == "A"
    assert not records.on(machines_of(batches)).batches
