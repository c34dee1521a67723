"""A run logs what its press kept, and warns where it acted on nothing or on some contexts only."""

from __future__ import annotations

import pytest

from lm_eval_kvpress.harness import messages
from lm_eval_kvpress.harness.arguments import parse_arguments
from lm_eval_kvpress.harness.ranks import RankFacts
from lm_eval_kvpress.records.timings import RunRecords
from lm_eval_kvpress.records.totals import ContextRecord, TaskTotals


def totals() -> dict[str, TaskTotals]:
    of_task = TaskTotals()
    of_task.pressed.add(ContextRecord(20, (10.0, 5.0), 400, 200, pressed=True))
    return {"task": of_task}


def test_contexts_that_were_too_short_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    settings, _ = parse_arguments({"press": "knorm"})
    tasks = totals()
    tasks["task"].unpressed.add(ContextRecord(3, (3.0, 3.0), 60, 60, pressed=False))
    tasks["task"].num_short_contexts = 1
    messages.log_kept_shares(settings, tasks)
    assert "task: 1 of 2 contexts were too short for press=knorm and stayed uncompressed" in caplog.text


def test_a_press_that_compressed_nothing_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    settings, _ = parse_arguments({"press": "knorm"})
    messages.log_kept_shares(settings, {"other": TaskTotals()})
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == "other: press=knorm compressed nothing; its figures are the uncompressed ones"


@pytest.mark.parametrize(("num_ranks", "says"), [(1, "tells of 0 requests"), (2, "beside it for each of 2 ranks")])
def test_where_records_are_is_said(caplog: pytest.LogCaptureFixture, num_ranks: int, says: str) -> None:
    settings, _ = parse_arguments({"throughput_log": "log.csv"})
    with caplog.at_level("INFO"):
        messages.log_records(settings, RankFacts({}, RunRecords(), num_ranks))
    (record,) = caplog.records
    assert record.getMessage().startswith("throughput_log=log.csv tells of 0 requests") and says in record.getMessage()
