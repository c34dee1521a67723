"""Behave well inside a command: errors in one line, log messages where lm-eval prints its own, output that may fail.

All of it changes state of the whole process, so it happens only where the process is lm-eval's command line or ours. In
a program that merely imports lm-eval or loads a model nothing is touched.

Standard library only: start-up imports this as soon as lm-eval's models are imported.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lm_eval_kvpress.errors import UsageError, one_line

LM_EVALS, OURS = ("lm_eval", "lm-eval"), ("lm-eval-kvpress",)
"""Names of commands."""

logger = logging.getLogger("lm_eval_kvpress")


def is_a_command(program: str) -> bool:
    """Whether ``program``, a ``sys.argv[0]``, is lm-eval's command line or ours, as a script or by ``python -m``."""
    return is_lm_evals_command(program) or _is(program, OURS, package="lm_eval_kvpress")


def is_lm_evals_command(program: str) -> bool:
    """Whether it is lm-eval's."""
    return _is(program, LM_EVALS, package="lm_eval")


def _is(program: str, names: Sequence[str], *, package: str) -> bool:
    path = Path(program)
    return path.name.removesuffix(".exe") in names or (path.name == "__main__.py" and path.parent.name == package)


class UsageErrorsInOneLine:
    """A ``sys.excepthook`` that prints as one line what a user can mend or did, and hands on every other error."""

    def __init__(self, previous: Callable[..., Any]) -> None:
        self._previous = previous

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        line = one_line(error)
        if line is None:
            self._previous(kind, error, trace)
        else:
            print(f"error: {line}", file=sys.stderr)
            discard_output()


CLOSED = "the standard output is closed: leave it open, or have it written to a file"


class ClosedOutput(io.TextIOBase):
    """The standard output of a command that was started without one (``>&-``), for which Python has None."""

    def write(self, text: str, /) -> int:
        raise UsageError(CLOSED)


def refuse_closed_output() -> None:
    """Say before the work that figures would be printed nowhere, as by lm-eval's command, which would not notice.

    Raises:
        UsageError: if this process is that command, and its standard output is closed.
    """
    is_closed = sys.stdout is None or isinstance(sys.stdout, ClosedOutput)
    if is_closed and is_lm_evals_command(sys.argv[0]):
        raise UsageError(CLOSED)


def open_output() -> None:
    """Have a closed standard output say so when it is written to, and keep its number from the next file opened."""
    if sys.stdout is None:
        os.open(os.devnull, os.O_RDONLY)
        sys.stdout = ClosedOutput()


def discard_output() -> None:
    """Forget what could not be written, which Python would try again when it ends, with an error of its own."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_usage_errors_in_one_line() -> None:
    """End a command on a `UsageError` with its one line and exit status 1, without a traceback.

    lm-eval's command is ``sys.exit(cli_evaluate())``: what a model or a task raises passes through it uncaught, and
    ``sys.excepthook`` alone decides how an uncaught error is shown. It is set where the process is such a command,
    with which it ends, and in no other program.
    """
    if is_a_command(sys.argv[0]) and not isinstance(sys.excepthook, UsageErrorsInOneLine):
        sys.excepthook = UsageErrorsInOneLine(sys.excepthook)


def share_log_handlers(other: str) -> None:
    """In a command, print this package's messages through the handlers of another package's logger.

    lm-eval's command sets up its own logger alone; what other packages log below a warning is lost. Messages appear
    from the other logger's level on, warnings always. Does nothing in any other program.
    """
    if not is_a_command(sys.argv[0]):
        return
    theirs = logging.getLogger(other)
    for handler in theirs.handlers:
        logger.addHandler(handler)  # a handler that is there already is not added again
        logger.setLevel(min(theirs.level, logging.WARNING))
