"""Sums of kept tokens and perplexities are what their parts say."""

from __future__ import annotations

import math

import pytest

from lm_eval_kvpress.records.totals import ContextRecord, KeptTotals, TaskTotals, perplexity


def test_short_and_shrunk_contexts_and_notes_are_counted_from_their_records() -> None:
    totals = TaskTotals()
    totals.add_context(ContextRecord(3, (3.0,), 60, 60, pressed=False, is_short=True))
    totals.add_context(ContextRecord(9, (4.0,), 60, 60, pressed=True, is_shrunk=True, notes=("falls back",)))
    totals.add_context(ContextRecord(90, (40.0,), 60, 60, pressed=True, notes=("falls back",)))
    assert (totals.num_short_contexts, totals.num_shrunk_contexts) == (1, 1)
    assert (totals.unpressed.num_contexts, totals.pressed.num_contexts) == (1, 2)
    assert totals.notes == {"falls back": 2}


def test_kept_shares_are_means_over_tokens_not_over_contexts() -> None:
    totals = KeptTotals()
    totals.add(ContextRecord(100, (50.0, 10.0), 1000, 300, True))
    totals.add(ContextRecord(300, (30.0, 30.0), 3000, 300, True))
    summary = totals.summary()
    assert summary["kept_tokens_per_layer"] == [80.0, 40.0]
    assert summary["kept_share"] == pytest.approx(120 / 800)
    assert (summary["kept_share_min_layer"], summary["kept_share_max_layer"]) == (0.1, 0.2)
    assert (summary["kv_bytes_before"], summary["kv_bytes_allocated"]) == (4000, 600)
    assert summary["kv_bytes_effective"] == 600


def test_packed_entries_count_with_the_bytes_that_they_take() -> None:
    record = ContextRecord(100, (50.0, 50.0), 1000, 125, True, bytes_unpacked=500)
    totals = KeptTotals()
    totals.add(record)
    totals.add(record)
    summary = totals.summary()
    assert record.packed_share == 0.25
    assert (summary["kv_bytes_unpacked"], summary["kv_bytes_allocated"]) == (1000, 250)
    assert summary["kv_bytes_effective"] == 2000 * 0.5 * 0.25


def test_a_task_without_requests_has_no_figures_rather_than_zeros() -> None:
    summary = TaskTotals().summary()
    assert summary["token_perplexity"] is None
    assert summary["contexts_pressed"]["kept_share"] is None


def test_perplexity_under_the_press_covers_what_was_scored_under_it() -> None:
    totals = TaskTotals()
    totals.add_scores([math.log(0.5)] * 3, pressed=False)
    totals.add_scores([math.log(0.25)], pressed=True)
    summary = totals.summary()
    assert summary["token_perplexity"] == pytest.approx(32 ** (1 / 4))
    assert summary["token_perplexity_under_press"] == pytest.approx(4)
    assert (summary["tokens_scored"], summary["tokens_scored_under_press"]) == (4, 1)


def test_perplexity_beyond_a_float_is_infinite() -> None:
    assert perplexity(-1e6, 1) == math.inf
