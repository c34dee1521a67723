"""Speed-ups are over one process, and the time in which workers do no job is what the driver costs."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.benchmarks.workers import figures, markdown


def run(side: str, seconds: float, busy: float, num_workers: int) -> dict[str, Any]:
    counts = {"num_workers": num_workers, "num_values": 1200, "num_differences": 0}
    return {"side": side, "seconds": seconds, "seconds_busy": busy, **counts}


def test_idle_workers_are_what_the_driver_costs() -> None:
    alone, two = figures([run("one process", 100.0, 90.0, 1), run("two processes", 55.0, 100.0, 2)])
    assert (alone["speedup"], two["speedup"]) == (1.0, pytest.approx(100 / 55))
    assert (alone["overhead"], two["overhead"]) == (pytest.approx(1 / 9), pytest.approx(0.1))
    assert "| two processes | 55 | 100 | 1.82 | 10.0 % | 0 of 1,200 |" in markdown([alone, two])
