"""Tokens that all workers ran count once, whoever shares them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lm_eval_kvpress.sweep import pace
from lm_eval_kvpress.sweep.cells import Cell
from lm_eval_kvpress.sweep.workers.jobs import Answered


def answered(num_prefill: int, num_output: int, num_shared: int) -> Answered:
    batch: Any = SimpleNamespace(record=SimpleNamespace(num_prefill_tokens=num_prefill, num_output_tokens=num_output))
    return Answered(Cell("a", {}), (), (), (batch,), num_shared)


def test_a_shared_prefill_counts_once_and_seconds_are_those_of_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((10.0, 14.0))
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(now))
    found = pace.Pace()
    for one, shares in ((answered(800, 40, 800), True), (answered(800, 40, 0), True), (answered(700, 20, 0), False)):
        found.add(one, shares=shares)
    assert str(found) == f"{(800 + 40 + 40 + 720) / 4:,.0f}"
