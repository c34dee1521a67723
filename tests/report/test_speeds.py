"""Speeds are shown with an interval and the machine, and only if they rest on enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_files import amend, timed, write_results

from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.result_files import read_cell
from lm_eval_kvpress.report.speeds import MIN_BATCHES, MIN_TOKENS, MIN_VALUES, parse_speed

MACHINE = {"cpu": "AMD EPYC", "num_threads": 2, "memory_bytes": 2**33, "gpu": None}


@pytest.mark.parametrize(
    "num_batches, num_tokens, is_shown",
    [
        (MIN_BATCHES, MIN_TOKENS, True),
        (MIN_BATCHES - 1, 4000, False),
        (20, MIN_TOKENS - 1, False),
        (1, 29, False),
    ],
)
def test_a_rate_needs_batches_and_tokens(num_batches: int, num_tokens: int, is_shown: bool) -> None:
    speed = parse_speed({"decode": timed(500.0, num_batches=num_batches, num_tokens=num_tokens)}, MACHINE)
    assert speed.decode_tokens_per_sec == (500.0 if is_shown else None)
    assert speed.withheld == (() if is_shown else ("decode_tokens_per_sec",))


@pytest.mark.parametrize(
    "num_values, num_batches, shown", [(MIN_VALUES, MIN_BATCHES, 0.25), (1, 9, None), (8, 1, None)]
)
def test_a_median_needs_several_values_of_several_batches(
    num_values: int, num_batches: int, shown: float | None
) -> None:
    """The requests of one batch wait together: eight of them are one measurement."""
    median = {"num_values": num_values, "p50": 0.25, "p50_low": 0.2, "p50_high": 0.3}
    for name, phase in (("ttft_sec", "prefill"), ("tpot_sec", "decode")):
        speed = parse_speed({name: median, phase: timed(500.0, num_batches=num_batches)}, MACHINE)
        assert getattr(speed, name) == shown, name


@pytest.mark.parametrize("warm", ["decode", "tpot_sec"])
def test_a_speed_that_is_nothing_but_warm_up_is_not_shown(warm: str) -> None:
    """As of eight batches of eight shapes: each was the first of its shape."""
    median = {"num_values": 20, "p50": 0.25, "p50_low": 0.2, "p50_high": 0.3}
    speed = parse_speed({"decode": timed(500.0), "tpot_sec": median, "includes_warmup": [warm]}, MACHINE)
    assert (speed.decode_tokens_per_sec, speed.tpot_sec) == {"decode": (None, 0.25), "tpot_sec": (500.0, None)}[warm]
    assert speed.withheld == ({"decode": "decode_tokens_per_sec"}.get(warm, warm),)


@pytest.mark.parametrize("machine", [None, {}])
def test_a_speed_of_an_unknown_machine_is_not_shown(machine: dict[str, Any] | None) -> None:
    speed = parse_speed({"decode": timed(500.0)}, machine)
    assert speed.decode_tokens_per_sec is None and speed.withheld == ("decode_tokens_per_sec",)


def test_a_speed_without_an_interval_is_not_shown() -> None:
    rate = {"num_batches": 20, "num_tokens": 4000, "tokens_per_sec": 500.0}
    assert parse_speed({"decode": rate}, MACHINE).decode_tokens_per_sec is None


def test_the_interval_the_machine_and_what_is_left_out_are_said(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0)
    few = write_results(tmp_path, "snapkv", 0.5, acc=0.4)
    amend(few, lambda content: content["config"]["kvpress"]["throughput"].update(decode=timed(522.0, num_batches=1)))
    (table,) = build_report([tmp_path]).tables
    texts = {row.press: row.entries["decode_tokens_per_sec"].text for row in table.rows}
    assert texts == {"none": "20.0 [18.0, 22.0]", "snapkv": "-"}
    assert any(notice.endswith("measured on 2 threads of AMD EPYC, 8 GiB.") for notice in table.notices)
    assert any(notice.startswith("Speeds of 1 of 2 runs are not shown.") for notice in table.notices)


def test_another_machine_is_marked(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0)
    file = write_results(tmp_path, "snapkv", 0.5, acc=0.4)
    amend(file, lambda content: content["config"]["kvpress"]["machine"].update(num_threads=4))
    assert read_cell(file).speed.machine == "4 threads of AMD EPYC, 8 GiB"
    (table,) = build_report([tmp_path]).tables
    assert [mark.label for mark in table.rows[1].marks] == ["other speed"]
