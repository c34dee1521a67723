"""What lm-eval could not save: its tracker swallows every error, and its command then ends well beside a torn file.

The tracker logs a warning, then the error at the level of information. A filter on its logger hears both, so lm-eval
itself is as it was. Standard library only. Knows that logger. Does not know results.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lm_eval_kvpress.harness.command_line import discard_output, is_lm_evals_command

TRACKER = logging.getLogger("lm_eval.loggers.evaluation_tracker")
SAYS = "Could not save"


class TrackerErrors:
    """A filter of the tracker's logger.

    Args:
        hides: whether the messages of an error are said elsewhere.

    Attributes:
        found: every error, in lm-eval's words.
    """

    def __init__(self, *, hides: bool = False) -> None:
        self.found, self._hides, self._is_due = list[str](), hides, False

    def __call__(self, record: logging.LogRecord) -> bool:
        text, was_due = record.getMessage(), self._is_due
        self._is_due = text.startswith(SAYS)
        if was_due:
            self.found.append(text)
        of_an_error = was_due or self._is_due
        is_heard = record.levelno >= logging.getLogger("lm_eval").getEffectiveLevel()
        return is_heard and not (of_an_error and self._hides)

    def listen(self) -> None:
        """Hear the tracker, whatever ``--verbosity`` lets through."""
        TRACKER.setLevel(logging.DEBUG)
        TRACKER.addFilter(self)


@contextmanager
def tracker_errors() -> Iterator[list[str]]:
    """Collect what the tracker swallows, and keep it off the screen."""
    errors, level = TrackerErrors(hides=True), TRACKER.level
    errors.listen()
    try:
        yield errors.found
    finally:
        TRACKER.removeFilter(errors)
        TRACKER.setLevel(level)


@functools.cache
def end_on_unsaved_results() -> None:
    """Have lm-eval's command end in one line and with status 1 if results or samples are not whole on disk.

    Its figures are printed before. In any other program nothing is done.
    """
    if is_lm_evals_command(sys.argv[0]):
        errors = TrackerErrors()
        errors.listen()
        atexit.register(_end, errors)


def _end(errors: TrackerErrors) -> None:
    """The last thing that the process does: an exit status cannot be changed otherwise once Python is ending."""
    if not errors.found:
        return
    discard_output()
    reasons = "; ".join(dict.fromkeys(errors.found))
    print(
        f"error: results or samples are not whole on disk ({reasons}); the figures above are. Make room, and run the "
        "same command again; a sweep (lm-eval-kvpress sweep) keeps its answers then",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
