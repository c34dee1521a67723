"""In a command our messages appear where lm-eval's own do; any other program is left as it is."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness import command_line, messages
from lm_eval_kvpress.harness.arguments import parse_arguments
from lm_eval_kvpress.records.totals import ContextRecord, TaskTotals


@pytest.fixture
def lm_eval_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """As lm-eval's command sets it up; all as before afterwards."""
    monkeypatch.setattr("sys.argv", ["/usr/bin/lm_eval"])
    said, loggers = io.StringIO(), [logging.getLogger("lm_eval"), command_line.logger]
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
    command_line.share_log_handlers("lm_eval")
    command_line.share_log_handlers("lm_eval")
    messages.log_kept_shares(settings, totals())
    (line,) = lm_eval_log.getvalue().splitlines()
    assert line.startswith("task: press=knorm kept 37.5 % of 20 tokens in 1 contexts (layers 25.0 to 50.0 %)")


def test_lm_evals_level_is_ours_but_a_warning_is_always_heard(lm_eval_log: io.StringIO) -> None:
    settings, _ = parse_arguments({"press": "knorm"})
    command_line.share_log_handlers("lm_eval")
    logging.getLogger("lm_eval").setLevel("ERROR")  # --verbosity, which comes later
    command_line.share_log_handlers("lm_eval")
    messages.log_kept_shares(settings, {**totals(), "other": TaskTotals()})
    (line,) = lm_eval_log.getvalue().splitlines()
    assert line == "other: press=knorm compressed nothing; its figures are the uncompressed ones"


def test_ones_own_handlers_still_hear(lm_eval_log: io.StringIO) -> None:
    own = io.StringIO()
    command_line.logger.handlers = [logging.StreamHandler(own)]
    command_line.share_log_handlers("lm_eval")
    command_line.logger.warning("both")
    assert own.getvalue() == lm_eval_log.getvalue() == "both\n"


def test_without_its_handlers_messages_go_where_they_went(caplog: pytest.LogCaptureFixture) -> None:
    settings, _ = parse_arguments({"press": "knorm"})
    command_line.share_log_handlers("a_package_without_handlers")
    messages.log_kept_shares(settings, {"other": TaskTotals()})
    assert "other: press=knorm compressed nothing; its figures are the uncompressed ones" in caplog.text


def test_ctrl_c_and_a_full_disk_are_one_line_and_a_defect_is_handed_on(capsys: pytest.CaptureFixture[str]) -> None:
    handed_on: list[BaseException] = []
    hook = command_line.UsageErrorsInOneLine(lambda kind, error, trace: handed_on.append(error))
    errors = [
        KeyboardInterrupt(),
        OSError(28, "No space left on device"),
        UsageError("do this"),
        ValueError("a defect"),
    ]
    for error in errors:
        hook(type(error), error, None)
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[0] == "error: interrupted"
        and lines[1].startswith("error: No space left on device: ")
        and lines[2:] == ["error: do this"]
    )
    assert handed_on == errors[3:]


def test_a_program_of_ones_own_is_no_command() -> None:
    ours = ["/usr/bin/lm_eval", "/x/lm_eval/__main__.py", "/x/lm_eval_kvpress/__main__.py", "lm-eval-kvpress.exe"]
    others = ["/x/mine/__main__.py", "", "train.py"]
    assert [command_line.is_a_command(program) for program in [*ours, *others]] == [True] * 4 + [False] * 3


@pytest.mark.parametrize("program", ["train.py", ""])
def test_a_program_of_ones_own_keeps_its_logging_and_its_hook_for_errors(
    lm_eval_log: io.StringIO, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr("sys.argv", [program])
    before = list(command_line.logger.handlers), command_line.logger.level, sys.excepthook
    command_line.share_log_handlers("lm_eval")
    command_line.show_usage_errors_in_one_line()
    assert (command_line.logger.handlers, command_line.logger.level, sys.excepthook) == before
