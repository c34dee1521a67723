"""What became of a fault: held, one line, a traceback, silent, or hung."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from scripts.studies.faults.process import HUNG, Ended

Verdict = Literal["held", "one line", "traceback", "silent", "hung", "no line"]
VERDICTS: tuple[Verdict, ...] = ("held", "one line", "traceback", "silent", "hung", "no line")
"""Held: it ended as undisturbed. One line: it ended in a message that says what is wrong. Silent: it says that all is
well, and figures or files differ. No line: it failed without a traceback and without a message of the kind meant."""

STARTS = ("error: ", "lm-eval-kvpress ")


@dataclass(frozen=True)
class Trial:
    """One fault and what became of it.

    Attributes:
        kind: of the fault.
        name: which one; with the kind it names the trial.
        detail: how the fault was made, and the last line that was printed.
    """

    kind: str
    name: str
    verdict: Verdict
    detail: str


def judged(ended: Ended, contents: Callable[[], Any], expected: Any) -> tuple[Verdict, str]:
    """The verdict on a command that should end as undisturbed, and why.

    Args:
        contents: what it left; may raise if something is missing.
        expected: what it leaves undisturbed.
    """
    if ended.status != 0 or HUNG in ended.stderr or ended.has_traceback:
        return refused(ended)
    try:
        found = contents()
    except (OSError, ValueError, KeyError) as error:
        return "silent", f"{type(error).__name__}: {error}"
    return ("held", ended.last_line) if found == expected else ("silent", f"other {difference(found, expected)}")


def refused(ended: Ended) -> tuple[Verdict, str]:
    """The verdict on a command that did not end as undisturbed."""
    if HUNG in ended.stderr:
        return "hung", ended.last_line
    if ended.has_traceback:
        return "traceback", ended.last_line
    if ended.status == 0:
        return "silent", ended.last_line
    return ("one line" if ended.last_line.startswith(STARTS) else "no line"), ended.last_line


def difference(found: Any, expected: Any, path: str = "") -> str:
    """Where two values differ first."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in found.keys() | expected.keys():
            if found.get(key) != expected.get(key):
                return difference(found.get(key), expected.get(key), f"{path}/{key}")
    return f"{path or 'value'}: {str(found)[:80]} for {str(expected)[:80]}"
