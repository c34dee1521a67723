"""Rates of a run are tokens of the phase per second of the phase."""

from __future__ import annotations

import dataclasses
from typing import Any

from lm_eval_kvpress.records.timings import BatchRecord, RunRecords


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
