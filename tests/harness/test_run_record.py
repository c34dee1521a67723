"""What a run says of itself is heard where lm-eval's own messages are."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from lm_eval_kvpress.harness import run_record
from lm_eval_kvpress.harness.arguments import parse_arguments
from lm_eval_kvpress.harness.model import is_a_command
from lm_eval_kvpress.records.totals import ContextRecord, TaskTotals


@pytest.fixture
def lm_eval_log() -> Iterator[io.StringIO]:
    """As lm-eval's command sets it up; all as before afterwards."""
    said, loggers = io.StringIO(), [logging.getLogger("lm_eval"), run_record.logger]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    loggers[0].handlers, loggers[0].propagate = [logging.StreamHandler(said)], False
    loggers[0].setLevel("INFO")
    yield said
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def totals() -> dict[str, TaskTotals]:
    of_task = TaskTotals()
    of_task.pressed.add(ContextRecord(20, (10.0, 5.0), 400, 200, pressed=True))
    return {"task": of_task}


def test_what_was_kept_is_said_on_the_screen_of_lm_evals_command(lm_eval_log: io.StringIO) -> None:
    settings, _ = parse_arguments({"press": "knorm"})
    run_record.speak_as("lm_eval")
    run_record.speak_as("lm_eval")
    run_record.tell(settings, totals())
    (line,) = lm_eval_log.getvalue().splitlines()
    assert line.startswith("task: press=knorm kept 37.5 % of 20 tokens in 1 contexts (layers 25.0 to 50.0 %)")


def test_contexts_that_were_too_short_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    settings, _ = parse_arguments({"press": "knorm"})
    tasks = totals()
    tasks["task"].unpressed.add(ContextRecord(3, (3.0, 3.0), 60, 60, pressed=False))
    tasks["task"].num_short_contexts = 1
    run_record.tell(settings, tasks)
    assert "task: 1 of 2 contexts were too short for press=knorm and stayed uncompressed" in caplog.text


def test_lm_evals_level_is_ours_but_a_warning_is_always_heard(lm_eval_log: io.StringIO) -> None:
    settings, _ = parse_arguments({"press": "knorm"})
    run_record.speak_as("lm_eval")
    logging.getLogger("lm_eval").setLevel("ERROR")  # --verbosity, which comes later
    run_record.speak_as("lm_eval")
    run_record.tell(settings, {**totals(), "other": TaskTotals()})
    (line,) = lm_eval_log.getvalue().splitlines()
    assert line == "other: press=knorm compressed nothing; its figures are the uncompressed ones"


def test_ones_own_handlers_still_hear(lm_eval_log: io.StringIO) -> None:
    own = io.StringIO()
    run_record.logger.handlers = [logging.StreamHandler(own)]
    run_record.speak_as("lm_eval")
    run_record.logger.warning("both")
    assert own.getvalue() == lm_eval_log.getvalue() == "both\n"


def test_somebodys_own_program_is_left_alone() -> None:
    programs = ("/usr/bin/lm_eval", "/x/lm_eval/__main__.py", "/x/lm_eval_kvpress/__main__.py")
    assert all(map(is_a_command, programs)) and not any(map(is_a_command, ("/x/mine/__main__.py", "", "train.py")))


def test_without_its_handlers_messages_go_where_they_went(caplog: pytest.LogCaptureFixture) -> None:
    settings, _ = parse_arguments({"press": "knorm"})
    run_record.speak_as("a_package_without_handlers")
    run_record.tell(settings, {"other": TaskTotals()})
    assert "other: press=knorm compressed nothing; its figures are the uncompressed ones" in caplog.text
