"""Two sides timed in turns, each at its best batch size, and how far their answers agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from scripts.benchmarks.measuring import estimate, seconds
from scripts.benchmarks.sides import Answers, Side
from scripts.benchmarks.workloads import Workload


def measure_pairs(
    ours: Callable[[int], Side],
    theirs: Callable[[int], Side],
    workload: Workload,
    *,
    sizes: Sequence[int],
    their_sizes: Sequence[int],
    num_pairs: int,
) -> dict[str, Any]:
    """Time both sides in pairs (A B, B A, A B, ...); seconds and the ratios within the pairs, with intervals."""
    our_times, their_times = tried(ours, workload, sizes), tried(theirs, workload, their_sizes)
    our_size, their_size = (min(tries, key=lambda size: tries[size][0]) for tries in (our_times, their_times))
    our_side, their_side = our_times[our_size][1], their_times[their_size][1]
    times: dict[Side, list[float]] = {our_side: [], their_side: []}
    answers: dict[Side, Answers] = {}
    for pair in range(num_pairs):
        for side in (our_side, their_side) if pair % 2 else (their_side, our_side):
            taken, answers[side] = seconds(partial(side, workload))
            times[side].append(taken)
    ratios = [theirs / mine for mine, theirs in zip(times[our_side], times[their_side], strict=True)]
    return {
        "batch_size": our_size,
        "their_batch_size": their_size,
        "seconds_by_batch_size": {size: once[0] for size, once in our_times.items()},
        "their_seconds_by_batch_size": {size: once[0] for size, once in their_times.items()},
        "seconds": asdict(estimate(times[our_side])),
        "their_seconds": asdict(estimate(times[their_side])),
        "times_as_fast": asdict(estimate(ratios)),
        **agreement(answers[our_side], answers[their_side]),
    }


def tried(make: Callable[[int], Side], workload: Workload, sizes: Sequence[int]) -> dict[int, tuple[float, Side]]:
    """Try batch sizes: size to seconds and side, each the faster of two runs after a warm-up."""
    sides = {size: make(size) for size in sizes}
    sides[sizes[0]](workload)
    num_runs = 2 if len(sizes) > 1 else 0
    times = {size: [seconds(partial(side, workload))[0] for _ in range(num_runs)] for size, side in sides.items()}
    return {size: (min(times[size], default=0.0), side) for size, side in sides.items()}


def agreement(mine: Answers, theirs: Answers) -> dict[str, float]:
    """How far two sides' answers agree.

    Returns:
        For texts ``share_of_equal_texts``. For numbers ``largest_difference`` in nats and ``scaled_difference``, the
        same with that of a long sum divided by a thousandth of it.
    """
    if isinstance(mine[0], str):
        return {"share_of_equal_texts": sum(a == b for a, b in zip(mine, theirs, strict=True)) / len(mine)}
    pairs = [(_number(a), _number(b)) for a, b in zip(mine, theirs, strict=True)]
    scaled = max(abs(a - b) / max(1.0, 1e-3 * abs(b)) for a, b in pairs)
    return {"largest_difference": max(abs(a - b) for a, b in pairs), "scaled_difference": scaled}


def _number(answer: Any) -> float:
    """A log-likelihood, which lm-eval has alone or beside a flag."""
    return float(answer[0] if isinstance(answer, (tuple, list)) else answer)
