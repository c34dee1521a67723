"""Press names: a press, a wrapper and what it wraps, or presses composed; and which combinations make sense.

``NAME``, ``WRAPPER:NAME`` or ``composed:NAME+NAME``; wrappers nest, as in ``key_rerotation:criticalkv:knorm``. The
grammar has neither ``,`` nor ``=``, at which lm-eval splits its arguments. Does not know values or models.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses.arguments import arguments_of
from lm_eval_kvpress.presses.catalog import ALIASES, ROWS, Reads, Row
from lm_eval_kvpress.presses.suggest import near
from lm_eval_kvpress.presses.unsupported import UNSUPPORTED

NONE = "none"
DECODING, PREFILL_DECODING = "decoding", "prefill_decoding"
RATIO_DECODING, CAM = "compression_ratio_decoding", "cam"
ACT_WHILE_DECODING = (DECODING, RATIO_DECODING, CAM, PREFILL_DECODING)
"""Names that start so have a press that acts while text is generated (`presses.decoding`)."""

MOST_PARTS = 16
"""Wrappers and composed presses of one name; no combination that makes sense has half as many."""


@dataclass(frozen=True)
class ParsedName:
    """A press name taken apart: its first press, and the names that this press wraps or composes."""

    row: Row
    inner: tuple[ParsedName, ...] = ()

    @property
    def full(self) -> str:
        """The name with aliases resolved."""
        inner = "+".join(name.full for name in self.inner)
        return f"{self.row.name}:{inner}" if inner else self.row.name

    @functools.cached_property
    def rows(self) -> tuple[Row, ...]:
        """The presses of the name, outermost first."""
        return (self.row, *(row for name in self.inner for row in name.rows))

    @functools.cached_property
    def argument_names(self) -> dict[tuple[str, str], str]:
        """(press, argument) -> how the argument is written: with the press before it where several presses have it."""
        count = Counter(argument for row in self.rows for argument in arguments_of(row))
        return {
            (row.name, argument): argument if count[argument] == 1 else f"{row.name}.{argument}"
            for row in self.rows
            for argument in arguments_of(row)
        }

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults that its presses set, for themselves and for what they wrap."""
        return {argument: value for row in self.rows for argument, value in row.defaults.items()}

    @property
    def sizing_rows(self) -> tuple[Row, ...]:
        """The presses that decide how many tokens stay: in ``composed``, those of the name that removes any."""
        if self.row.name != "composed":
            return self.rows
        return next(name.rows for name in self.inner if name.row.removes_tokens)


def resolve_alias(name: str | None) -> tuple[str, Mapping[str, Any]]:
    """Look up a name's combination and the defaults that come with it; None is ``none``."""
    if name is None or name.lower() == NONE:
        return NONE, {}
    return ALIASES.get(name, (name, {}))


@functools.cache
def parse_name(name: str) -> ParsedName:
    """Take apart a name that is itself no alias; what it wraps may be one.

    Raises:
        UsageError: one line, for a name that is unknown, unsupported or put together wrongly.
    """
    if name.count(":") + name.count("+") > MOST_PARTS:
        raise UsageError(f"press={name[:40]}... has too many parts: a press is wrapped a few times at most")
    first, colon, rest = name.partition(":")
    row = _row(first)
    if first == "composed":
        return _composed(row, rest)
    if row.wraps is None:
        if colon:
            raise UsageError(f"press={name}: {first} wraps no other press")
        return ParsedName(row)
    if not rest:
        raise UsageError(f"press={name}: {first} wraps another press, as in {first}:knorm")
    inner = parse_name(resolve_alias(rest)[0])
    problem = why_not_wrapped(row, inner)
    if problem:
        raise UsageError(f"press={name}: {first} cannot wrap {inner.full}: {problem}")
    return ParsedName(row, (inner,))


def _row(name: str) -> Row:
    if name in ROWS:
        return ROWS[name]
    for known, unsupported in UNSUPPORTED.items():
        if name == known or name in unsupported.variants:
            raise UsageError(f"press={name} is not supported: {unsupported.reason}")
    if name == NONE:
        raise UsageError("press=none removes nothing and cannot be wrapped or composed")
    listed = ", ".join([NONE, *ROWS, *ACT_WHILE_DECODING])
    raise UsageError(f"unknown press '{name}': {near(name, listed_names())}known are {listed}")


def listed_names() -> list[str]:
    """Every name that a press may begin with."""
    return [NONE, *ROWS, *ALIASES, *ACT_WHILE_DECODING]


def why_not_wrapped(row: Row, inner: ParsedName) -> str:
    """Say why a wrapper cannot wrap a press; empty if it can."""
    assert row.wraps is not None
    for below in inner.rows:
        if below.name in row.refuses:
            return row.refuses[below.name]
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


def _composed(row: Row, rest: str) -> ParsedName:
    inner = tuple(parse_name(resolve_alias(name)[0]) for name in rest.split("+")) if rest else ()
    rows = [inner_row for name in inner for inner_row in name.rows]
    if len(inner) < 2 or len({inner_row.name for inner_row in rows}) < len(rows):
        raise UsageError(f"press=composed:{rest}: composed takes two different presses, as in composed:snapkv+think")
    if sum(name.row.removes_tokens for name in inner) != 1:
        raise UsageError(
            f"press=composed:{rest}: composed takes one press that removes tokens, so that compression_ratio is its "
            "ratio, and think"
        )
    for inner_row in rows:
        if inner_row.masks or inner_row.rerotates or not inner_row.is_hook:
            raise UsageError(f"press=composed:{rest}: {inner_row.name} cannot be composed with other presses")
    return ParsedName(row, inner)
