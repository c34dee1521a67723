"""Press names: a press, a wrapper and what it wraps, or presses composed; and which of them make sense.

``NAME``, ``WRAPPER:NAME`` or ``composed:NAME+NAME``. Does not know arguments' values or models.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses.arguments import arguments_of
from lm_eval_kvpress.presses.catalog import ALIASES, ROWS, UNSUPPORTED, Reads, Row
from lm_eval_kvpress.presses.suggest import near

NONE = "none"
DECODING, PREFILL_DECODING = "decoding", "prefill_decoding"
"""Heads of names whose press acts while text is generated (`decoding_spec`)."""


@dataclass(frozen=True)
class Part:
    """A press within a name, with what it wraps or composes."""

    row: Row
    inner: tuple[Part, ...] = ()

    @property
    def name(self) -> str:
        """As typed, aliases resolved."""
        inner = "+".join(part.name for part in self.inner)
        return f"{self.row.name}:{inner}" if inner else self.row.name

    @functools.cached_property
    def rows(self) -> tuple[Row, ...]:
        """Its own row and those within, outermost first."""
        return (self.row, *(row for part in self.inner for row in part.rows))

    @functools.cached_property
    def names(self) -> dict[tuple[str, str], str]:
        """What each row's argument is called: its name, with the press before it where several have one."""
        count = Counter(field for row in self.rows for field in arguments_of(row))
        return {
            (row.name, field): field if count[field] == 1 else f"{row.name}.{field}"
            for row in self.rows
            for field in arguments_of(row)
        }

    @property
    def defaults(self) -> dict[str, Any]:
        """Defaults that its presses set, for themselves and for what they wrap."""
        return {key: value for row in self.rows for key, value in row.defaults.items()}

    @property
    def counting_rows(self) -> tuple[Row, ...]:
        """The rows that decide how many tokens stay: of a composed press, those of the part that removes any."""
        if self.row.name != "composed":
            return self.rows
        return next(part.rows for part in self.inner if part.row.removes_tokens)


def resolve(name: str | None) -> tuple[str, Mapping[str, Any]]:
    """The full name, and the defaults that an alias brings."""
    if name is None or name.lower() == NONE:
        return NONE, {}
    return ALIASES.get(name, (name, {}))


@functools.cache
def parse_name(name: str) -> Part:
    """The presses of a name without aliases at its head.

    Raises:
        UsageError: one line, for a name that is unknown, unsupported or put together wrongly.
    """
    head, colon, rest = name.partition(":")
    row = _row(head)
    if head == "composed":
        return _composed(row, rest)
    if row.wraps is None:
        if colon:
            raise UsageError(f"press={name}: {head} wraps no other press")
        return Part(row)
    if not rest:
        raise UsageError(f"press={name}: {head} wraps another press, as in {head}:knorm")
    inner = parse_name(resolve(rest)[0])
    problem = why_not_wrapped(row, inner)
    if problem:
        raise UsageError(f"press={name}: {head} cannot wrap {inner.row.name}: {problem}")
    return Part(row, (inner,))


def _row(name: str) -> Row:
    if name in ROWS:
        return ROWS[name]
    for known, unsupported in UNSUPPORTED.items():
        if name == known or name in unsupported.variants:
            raise UsageError(f"press={name} is not supported: {unsupported.reason}")
    if name == NONE:
        raise UsageError("press=none removes nothing and cannot be wrapped or composed")
    known_names = [NONE, *ROWS, *ALIASES, DECODING, PREFILL_DECODING]
    listed = ", ".join([NONE, *ROWS, DECODING, PREFILL_DECODING])
    raise UsageError(f"unknown press '{name}': {near(name, known_names)}known are {listed}")


def why_not_wrapped(row: Row, inner: Part) -> str:
    """Why a wrapper cannot wrap a press, or nothing."""
    assert row.wraps is not None
    if inner.row.name in row.refuses:
        return row.refuses[inner.row.name]
    if inner.row.name == "pyramidkv":
        return "it takes the scores alone and would lose the layer budgets: wrap snapkv, whose scores are the same"
    if not inner.row.scores:
        return "it is not a press that scores tokens"
    reads = max(below.reads for below in inner.rows)
    if reads <= row.wraps:
        return ""
    if reads == Reads.ATTENTIONS:
        return f"it needs eager attention, with which {row.name} does not run"
    return (
        f"{row.name} scores parts of the context by themselves, where "
        + ("kvpress computes queries at wrong positions" if reads == Reads.QUERIES else "the order of tokens is lost")
        + ": wrap knorm, keydiff or random"
    )


def _composed(row: Row, rest: str) -> Part:
    parts = tuple(parse_name(resolve(name)[0]) for name in rest.split("+")) if rest else ()
    names = [part_row.name for part in parts for part_row in part.rows]
    if len(parts) < 2 or len(set(names)) < len(names):
        raise UsageError(f"press=composed:{rest}: composed takes two different presses, as in composed:snapkv+think")
    if sum(part.row.removes_tokens for part in parts) != 1:
        raise UsageError(
            f"press=composed:{rest}: composed takes one press that removes tokens, so that compression_ratio is its "
            "ratio, and think"
        )
    for part_row in (part_row for part in parts for part_row in part.rows):
        if part_row.masks or part_row.rerotates:
            raise UsageError(f"press=composed:{rest}: {part_row.name} cannot be composed with other presses")
    return Part(row, parts)
