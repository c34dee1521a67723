"""The position from which presses expect queries, where kvpress takes the number of hidden states for it.

``ExpectedAttentionPress`` and ``CapPress`` average rotations over positions to come. In a prefill there are as many
hidden states as positions. While text is generated only the newest hidden states are known, and kvpress would expect
queries near the beginning of the text. Does not know models or caches.
"""

from __future__ import annotations

import functools
from typing import Any

AVERAGES = {"apply_avg_rope": 3, "_avg_rope_matrix": 1}
"""The methods of kvpress's presses that are given the number of hidden states, and the place of that argument."""


def expect_from(press: Any, position: int) -> None:
    """Have a press, and those that it wraps, expect queries from ``position`` on."""
    for part in _parts(press):
        for name, place in AVERAGES.items():
            average = getattr(type(part), name, None)
            if average is not None:
                setattr(part, name, functools.partial(_at, average, part, place, position))


def _at(average: Any, press: Any, place: int, position: int, *arguments: Any, **named: Any) -> Any:
    if "q_len" in named:
        return average(press, *arguments, **{**named, "q_len": position})
    return average(press, *arguments[:place], position, *arguments[place + 1 :], **named)


def _parts(press: Any) -> list[Any]:
    """A press and those that it wraps, outermost first."""
    inner = getattr(press, "press", None)
    return [press, *(_parts(inner) if inner is not None else [])]
