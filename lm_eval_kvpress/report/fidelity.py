"""How far a task's scored tokens are from the full cache's predictions, as a results file says, and means over tasks.

Frozen values. Knows neither JSON nor other runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Place:
    """The tokens at some places after their contexts, counted from 1; KL in nats per token."""

    last: int
    num_tokens: int
    kl_mean: float


@dataclass(frozen=True)
class Figure:
    """A mean over tokens, with its 95 % interval if there is one."""

    mean: float
    bounds: Bounds | None = None


@dataclass(frozen=True)
class Fidelity:
    """A task's tokens scored under the press.

    Attributes:
        kl: KL(full cache || compressed cache) in nats.
        kl_max: of the token that is furthest off.
        agreement: share of tokens for which both caches have the same most likely one.
        places: KL by place after the context, in order.
    """

    num_tokens: int
    kl: Figure
    kl_max: float
    agreement: Figure
    places: tuple[Place, ...] = ()


def pooled(num_tokens: Sequence[int], figures: Sequence[Figure]) -> Figure | None:
    """The mean over the tokens of all tasks; None without tokens.

    The interval joins those of the tasks, whose documents are independent: distances to a bound are added as standard
    errors are (method of variance estimates recovery; Zou and Donner, Statistics in Medicine 27, 2008). It is the
    task's own where there is one task, and none where a task has none, or where no document differs from the others.
    """
    total = sum(num_tokens)
    if not total:
        return None
    weights = [number / total for number in num_tokens]
    mean = sum(weight * figure.mean for weight, figure in zip(weights, figures, strict=True))
    bounds = [figure.bounds for figure in figures]
    if None in bounds:
        return Figure(mean)
    reach = [
        math.hypot(*(w * (f.bounds[end] - f.mean) for w, f in zip(weights, figures, strict=True) if f.bounds))
        for end in (0, 1)
    ]
    return Figure(mean, (mean - reach[0], mean + reach[1]) if any(reach) else None)


def pooled_places(fidelities: Sequence[Fidelity]) -> tuple[Place, ...]:
    """KL by place after the context over the tokens of all tasks."""
    places = {place.last: list[Place]() for one in fidelities for place in one.places}
    for place in (place for one in fidelities for place in one.places):
        places[place.last].append(place)
    found = []
    for last, members in sorted(places.items()):
        num_tokens = sum(place.num_tokens for place in members)
        found.append(Place(last, num_tokens, sum(p.num_tokens * p.kl_mean for p in members) / num_tokens))
    return tuple(found)
