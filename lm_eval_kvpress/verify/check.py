"""What a check is: measurements, each with a limit, and a verdict.

Knows nothing of models, nor of what is checked: see `presentation`, `kept`, `scores`,
`fidelity`, `decoding`, `packing`, `answers`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One measurement of a check.

    Attributes:
        what: what was measured, with its unit.
        measured: the figure.
        limit: what it must not exceed, or with ``at_least`` not fall below.
        at_least: whether the figure must be large: an effect that has to show.
    """

    what: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    @property
    def strain(self) -> float:
        """How close the figure is to its limit: 0 is far away, 1 is at it, more is beyond; NaN counts as infinite."""
        if math.isnan(self.measured):
            return math.inf
        if not self.at_least:
            return self.measured / self.limit if self.limit else (math.inf if self.measured > 0 else 0.0)
        return self.limit / self.measured if self.measured > 0 else math.inf


@dataclass(frozen=True)
class Check:
    """The outcome of one check; its figures are those of the measurement that came closest to failing.

    Attributes:
        name: short, as on the command line.
        claim: what holds if it passed.
        parts: the measurements.
    """

    name: str
    claim: str
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        assert self.parts, f"check {self.name} measured nothing"

    @property
    def worst(self) -> Part:
        """The measurement that came closest to failing, or failed by most."""
        return max(self.parts, key=lambda part: part.strain)

    @property
    def measured(self) -> float:
        return self.worst.measured

    @property
    def tolerance(self) -> float:
        return self.worst.limit

    @property
    def passed(self) -> bool:
        return all(part.passed for part in self.parts)

    @property
    def detail(self) -> str:
        return self.worst.what
