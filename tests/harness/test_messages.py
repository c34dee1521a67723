"""A run logs what its press kept, and warns where it acted on nothing or on some contexts only."""

from __future__ import annotations

import pytest

from lm_eval_kvpress.harness import messages
from lm_eval_kvpress.harness.arguments import parse_arguments
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
