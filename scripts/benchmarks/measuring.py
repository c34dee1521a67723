"""How the benchmarks measure: warm-up, rounds in shuffled order, medians with intervals, one document at the end."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from lm_eval_kvpress.bootstrap import interval

Thing = TypeVar("Thing", bound=Hashable)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Estimate:
    """A median over repeats with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def estimate(values: Sequence[float]) -> Estimate:
    """The median of repeats and the percentile bootstrap's interval of it."""
    low, high = interval(np.asarray(values, dtype=np.float64), np.median)
    return Estimate(float(np.median(values)), low, high)


def rounds(
    things: Sequence[Thing], measure: Callable[[Thing], Result], num_rounds: int, *, warms_up: bool = True
) -> list[dict[Thing, Result]]:
    """Measure every thing once a round, in an order that is shuffled anew each time, after one warm-up of each.

    A machine that slows down slows all of a round down; ratios are to be taken within a round.
    """
    if warms_up:
        for thing in things:
            measure(thing)
    order = random.Random(0)
    return [{thing: measure(thing) for thing in order.sample(things, len(things))} for _ in range(num_rounds)]


def seconds(call: Callable[[], Result]) -> tuple[float, Result]:
    """Time a call, the device's work included; its seconds and its result."""
    synchronize()
    start = time.perf_counter()
    result = call()
    synchronize()
    return time.perf_counter() - start, result


def synchronize() -> None:
    """Wait for a GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def write(report: Mapping[str, Any], markdown: str, folder: Path, name: str) -> None:
    """Write a benchmark's two files: NAME.json and NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown, encoding="utf-8")


def counts(text: str) -> list[int]:
    """For argparse: comma-separated numbers, each at least 1."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text}: each must be at least 1")
    return values


def count(text: str) -> int:
    """For argparse: a number of at least 1."""
    (value,) = counts(text)
    return value
