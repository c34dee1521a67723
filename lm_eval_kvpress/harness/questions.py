"""Where a prompt's question begins, in characters: what ``query_aware=false`` holds out of compression, and what
``press=finch`` scores a context by.

The rules of known tasks are data, in ``question_rules.yaml`` beside this file; a user gives a rule for any other task.
Knows text and documents. Does not know tokens, models or presses.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.settings import Settings

RULES = Path(__file__).with_name("question_rules.yaml")


@dataclass(frozen=True)
class Rule:
    """Where the question of some tasks begins; one of the last three is given.

    Attributes:
        tasks: names, with the wildcards of `fnmatch`.
        pattern: a regular expression, whose last match begins the question.
        field: the document's field that is the question; it begins where that text stands last.
        none: why there is no question apart from the context.
    """

    tasks: tuple[str, ...] = ("*",)
    pattern: str | None = None
    field: str | None = None
    none: str | None = None

    def __str__(self) -> str:
        return f"pattern {self.pattern!r}" if self.field is None else f"field {self.field!r}"

    def start(self, prompt: str, document: Mapping[str, Any]) -> int | None:
        """The place of the question's first character, or None if the prompt does not hold it.

        Raises:
            UsageError: if the document has no such field, or no text in it.
        """
        if self.field is not None:
            return _last_place_of(self._text_of(document), prompt)
        assert self.pattern is not None
        starts = [match.start() for match in re.finditer(self.pattern, prompt) if match.start() < len(prompt)]
        return starts[-1] if starts else None

    def _text_of(self, document: Mapping[str, Any]) -> str:
        assert self.field is not None
        if self.field not in document:
            raise UsageError(f"question_field={self.field}: a document has the fields {', '.join(document) or 'none'}")
        if not isinstance(document[self.field], str):
            raise UsageError(f"question_field={self.field} is no text, but {type(document[self.field]).__name__}")
        return str(document[self.field]).strip()


def _last_place_of(text: str, prompt: str) -> int | None:
    place = prompt.rfind(text) if text else -1
    return None if place < 0 else place


def rule_for(task: str, settings: Settings) -> Rule:
    """The rule that the user gave, or that of the table.

    Raises:
        UsageError: if there is none, or the task has no question apart from its context.
    """
    if settings.is_question_known:
        return Rule(pattern=settings.question_pattern, field=settings.question_field)
    found = next((rule for rule in known_rules() if any(fnmatchcase(task, name) for name in rule.tasks)), None)
    needed_by = settings.question_needed_by
    if found is None:
        raise UsageError(
            f"{needed_by}: where the question of task '{task}' begins is not known: pass question_pattern=REGEX, or "
            "question_field=NAME of the document's field with which the prompt ends"
        )
    if found.none is not None:
        raise UsageError(
            f"{needed_by}: {found.none} in task '{task}', so there is nothing to compress without it: leave the task "
            "out, or say by question_pattern=REGEX where its context ends"
        )
    return found


@functools.cache
def known_rules() -> tuple[Rule, ...]:
    """The rules of the table, in order."""
    rows = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    return tuple(Rule(**{**row, "tasks": tuple(row["tasks"])}) for row in rows)
