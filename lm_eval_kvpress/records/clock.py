"""Wall-clock times of a batch's phases, with the device synchronized at their edges.

Knows torch's clocks. Does not know lm-eval, presses or models.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class PhaseTiming:
    """One phase of one batch.

    Attributes:
        phase: ``prefill``, ``press`` (the time in the press's hooks, not part of prefill), ``score``, ``decode`` or
            ``stream``.
        seconds: wall clock between two synchronized edges.
        num_tokens: real tokens that went in (``prefill``, ``press``), were scored, or were produced; padding never
            counts.
        peak_memory_bytes: the most that was allocated on a CUDA device; None elsewhere, and if the clock leaves it out.
        is_borrowed: whether the time was spent once for several presses, before this clock ran.
    """

    phase: str
    seconds: float
    num_tokens: int
    peak_memory_bytes: int | None = None
    is_borrowed: bool = False


class Clock:
    """Times phases. The device is synchronized at the edges of a phase only; hooks inside are timed by CUDA events.

    Args:
        measures_memory: whether phases have a peak of memory. It says nothing of a press while prefills that others
            share are in memory.
    """

    def __init__(self, device: torch.device, *, measures_memory: bool = True) -> None:
        self._device, self._is_cuda, self._measures_memory = device, device.type == "cuda", measures_memory
        self._timings: list[PhaseTiming] = []
        self._hooks: list[Callable[[], float]] = []
        self._apart_sec = 0.0

    @contextmanager
    def phase(self, name: str, *, num_tokens: int = 0) -> Iterator[Counter[str]]:
        """Time a block. Tokens that the block adds to the yielded counter's ``tokens`` count as well."""
        produced: Counter[str] = Counter(tokens=num_tokens)
        self._hooks.clear()
        self._apart_sec = 0.0
        self._synchronize()
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        yield produced
        self._synchronize()
        seconds = time.perf_counter() - start
        in_hooks = sum(measure() for measure in self._hooks)
        peak = self._peak_memory_bytes() if self._measures_memory else None
        self._timings.append(PhaseTiming(name, seconds - in_hooks - self._apart_sec, produced["tokens"], peak))
        if self._hooks:
            self._timings.append(PhaseTiming("press", in_hooks, produced["tokens"], peak))

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leave a block out of the time of the phase in which it runs."""
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self._apart_sec += time.perf_counter() - start

    def timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook, its time recorded as ``press`` and not as the phase in which it runs."""

        def run(*arguments: Any, **keywords: Any) -> Any:
            if self._is_cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                result = hook(*arguments, **keywords)
                end.record()
                self._hooks.append(lambda: start.elapsed_time(end) / 1000)
                return result
            begin = time.perf_counter()
            result = hook(*arguments, **keywords)
            seconds = time.perf_counter() - begin
            self._hooks.append(lambda: seconds)
            return result

        return run

    def borrow(self, timing: PhaseTiming) -> None:
        """Record time that was spent once for several presses, as each of them would have spent it alone."""
        self._timings.append(replace(timing, is_borrowed=True))

    def take(self) -> list[PhaseTiming]:
        """Return the timings since the last call, and forget them."""
        timings, self._timings = self._timings, []
        return timings

    def _peak_memory_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) if self._is_cuda else None

    def _synchronize(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize(self._device)
