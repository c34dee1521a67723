"""One value against its type and range: the check of every press argument and of every setting of a sweep.

Knows types and numbers. Does not know presses.
"""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from lm_eval_kvpress.errors import UsageError


@dataclass(frozen=True)
class Range:
    """The numbers that an argument may take.

    Attributes:
        low, high: least and greatest number.
        excludes_low, excludes_high: whether these two are themselves refused.
        is_odd: whether even numbers are refused.
        meaning: ends the message about a number outside, to say what the argument means.
    """

    low: float = -math.inf
    high: float = math.inf
    excludes_low: bool = False
    excludes_high: bool = False
    is_odd: bool = False
    meaning: str = ""

    def holds(self, number: float) -> bool:
        """Whether a number is neither too low nor too high."""
        is_low = number <= self.low if self.excludes_low else number < self.low
        is_high = number >= self.high if self.excludes_high else number > self.high
        return not (is_low or is_high)

    def describe(self) -> str:
        """Such as ``at least 0 and below 1``."""
        lower = f"{'above' if self.excludes_low else 'at least'} {self.low:g}"
        upper = f" and {'below' if self.excludes_high else 'at most'} {self.high:g}" if self.high < math.inf else ""
        return lower + upper


ANY_NUMBER = Range()


def parse_value(name: str, kind: Any, value: Any, allowed: Range = ANY_NUMBER, *, separator: str = "+") -> Any:
    """Convert a value to the type of its argument.

    Args:
        name: of the argument, for messages.
        kind: its type: a number, ``bool``, ``str``, a ``Literal``, a list of these, or such a type or None. A
            ``Literal`` beside another type, as in ``int | Literal["auto"]``, is tried first.
        value: as typed, as YAML or JSON has it, or as Python code gives it.
        allowed: the range of a number.
        separator: between the items of a list that is typed as one word.

    Raises:
        UsageError: one line, starting with ``name=value``.
    """
    options = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return _parse_union(name, options, value, allowed, separator)
    if get_origin(kind) is Literal:
        if value not in options:
            raise UsageError(f"{name}={value} is not known: choose one of {', '.join(map(str, options))}")
        return value
    if get_origin(kind) is list:
        return _parse_list(name, options[0], value, allowed, separator)
    if kind is bool:
        value = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise UsageError(f"{name}={value} must be true or false")
        return value
    if kind is str:
        if not isinstance(value, str):
            raise UsageError(f"{name}={value} must be text")
        return value
    if kind is Any:
        return value
    assert kind in (int, float), f"{name} has a type that no value is parsed to: {kind}"
    return parse_number(name, kind, value, allowed)


def _parse_union(name: str, options: Sequence[Any], value: Any, allowed: Range, separator: str) -> Any:
    if type(None) in options and (value is None or value == "None"):
        return None
    literals = [option for option in options if get_origin(option) is Literal]
    if any(value in get_args(option) for option in literals):
        return value
    kind = next(option for option in options if option is not type(None) and option not in literals)
    return parse_value(name, kind, value, allowed, separator=separator)


def _parse_list(name: str, kind: Any, value: Any, allowed: Range, separator: str) -> tuple[Any, ...]:
    items = value.split(separator) if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    if not items:
        raise UsageError(f"{name} must be at least one number")
    return tuple(parse_value(name, kind, item, allowed) for item in items)


def parse_number(name: str, kind: type, value: Any, allowed: Range = ANY_NUMBER) -> Any:
    """Convert a value to a finite int or float within a range.

    Raises:
        UsageError: one line, starting with ``name=value``.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or (kind is int and number != int(number)):
        raise UsageError(f"{name}={value} must be {'a whole number' if kind is int else 'a number'}")
    if allowed.is_odd and number % 2 == 0:
        raise UsageError(f"{name}={value} must be odd")
    if not allowed.holds(number):
        raise UsageError(f"{name}={value} must be {allowed.describe()}{allowed.meaning}")
    return value if isinstance(value, kind) else kind(number)
