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


def pressed(num_kept: float) -> TaskTotals:
    of_task = TaskTotals()
    of_task.add_context(ContextRecord(20, (num_kept, num_kept), 400, 200, pressed=True))
    of_task.add_scores([-1.0, -2.0], pressed=True)
    return of_task


def test_a_line_says_what_was_kept_and_what_was_measured(caplog: pytest.LogCaptureFixture) -> None:
    settings, _ = parse_arguments({"press": "knorm"})
    with caplog.at_level("INFO"):
        messages.log_kept_shares(settings, {"task": pressed(10.0)})
    (record,) = caplog.records
    assert record.getMessage() == (
        "task: press=knorm kept 50.0 % of 20 tokens in 1 contexts (layers 50.0 to 50.0 %); 0 contexts were left "
        "uncompressed; 2 tokens were scored over what was kept"
    )


def test_many_tasks_are_few_lines_and_those_that_were_left_alone_are_named(caplog: pytest.LogCaptureFixture) -> None:
    settings, _ = parse_arguments({"press": "knorm"})
    tasks = {f"mmlu_{number}": pressed(5.0 + number) for number in range(10)}
    tasks |= {f"idle_{number}": TaskTotals() for number in range(4)}
    with caplog.at_level("INFO"):
        messages.log_kept_shares(settings, tasks)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("14 tasks: press=knorm kept 47.5 % of 200 tokens in 10 contexts")
    assert lines[1] == "press=knorm compressed nothing in 4 tasks: idle_0, idle_1, idle_2, ..."


def test_no_run_ends_in_more_than_five_lines(caplog: pytest.LogCaptureFixture) -> None:
    settings, _ = parse_arguments({"press": "knorm", "throughput_log": "log.csv"})
    of_task = pressed(10.0)
    of_task.notes.update({f"note {number}": 1 for number in range(7)})
    with caplog.at_level("INFO"):
        messages.log_kept_shares(settings, {"one": of_task, "other": of_task})
        messages.log_records(settings, RankFacts({}, RunRecords()))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 5 and lines[3] == "5 more lines stand in the results, under config.kvpress"
