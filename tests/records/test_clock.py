"""The clock records what it timed, once."""

from __future__ import annotations

import time

import pytest
import torch

from lm_eval_kvpress.records.clock import Clock

CPU = torch.device("cpu")


def test_a_hook_is_taken_out_of_its_phase_and_both_sum_to_what_passed() -> None:
    clock = Clock(CPU)
    hook = clock.timed(lambda: time.sleep(0.05))
    started = time.perf_counter()
    with clock.phase("prefill", num_tokens=7):
        time.sleep(0.1)
        hook()
        hook()
    elapsed = time.perf_counter() - started
    prefill, press = clock.take()
    assert (prefill.phase, press.phase) == ("prefill", "press")
    assert (prefill.num_tokens, press.num_tokens) == (7, 7)
    assert press.seconds >= 0.1
    assert prefill.seconds >= 0.1
    assert prefill.seconds + press.seconds == pytest.approx(elapsed, rel=0.02)


def test_a_timed_hook_passes_arguments_and_result_through() -> None:
    assert Clock(CPU).timed(lambda *args, **kwargs: (args, kwargs))(1, two=2) == ((1,), {"two": 2})


def test_tokens_produced_inside_a_phase_count() -> None:
    clock = Clock(CPU)
    with clock.phase("decode", num_tokens=1) as produced:
        produced["tokens"] += 4
    assert [timing.num_tokens for timing in clock.take()] == [5]
    assert clock.take() == [], "taken once"


def test_a_phase_that_fails_is_not_recorded_nor_are_its_hooks() -> None:
    clock = Clock(CPU)
    with pytest.raises(RuntimeError), clock.phase("prefill"):
        clock.timed(lambda: None)()
        raise RuntimeError
    with clock.phase("score"):
        pass
    assert [timing.phase for timing in clock.take()] == ["score"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_phase_lasts_until_its_kernels_have_ended_and_peaks_are_torchs() -> None:
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    matrix @ matrix
    torch.cuda.synchronize()
    clock = Clock(device)
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    hook = clock.timed(lambda: matrix @ matrix)
    with clock.phase("prefill"):
        start.record()
        for _ in range(20):
            matrix @ matrix
        middle.record()
        hook()
        end.record()
    prefill, press = clock.take()
    assert prefill.seconds + press.seconds == pytest.approx(start.elapsed_time(end) / 1000, rel=0.05)
    assert press.seconds == pytest.approx(middle.elapsed_time(end) / 1000, rel=0.1)
    assert prefill.peak_memory_bytes == torch.cuda.max_memory_allocated(device)


@pytest.mark.parametrize("measures_memory", [True, False])
def test_a_clock_may_leave_peaks_out(monkeypatch: pytest.MonkeyPatch, measures_memory: bool) -> None:
    monkeypatch.setattr(Clock, "_peak_memory_bytes", lambda clock: 7)
    clock = Clock(CPU, measures_memory=measures_memory)
    with clock.phase("prefill"):
        clock.timed(lambda: None)()
    assert [timing.peak_memory_bytes for timing in clock.take()] == [7 if measures_memory else None] * 2
