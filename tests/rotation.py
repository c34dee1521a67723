"""Cases of a law that depends on one thing and must hold for the others: each name once, the others' values in turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def in_turn(names: Iterable[Any], *others: Sequence[Any]) -> list[tuple[Any, ...]]:
    """``(name, value of the first, value of the second, ...)`` for each name.

    Two lists of others whose lengths share no factor meet in every pair, if there are names enough.
    """
    return [(name, *(values[place % len(values)] for values in others)) for place, name in enumerate(names)]
