"""Kernels are compared once; whatever speaks against them leaves the known way, and is said once."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_failures import REFUSALS

from lm_eval_kvpress.models.fast.trial import Trial

KNOWN = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
TOLERANCE = 0.01


@pytest.fixture
def trial() -> Trial:
    return Trial("the known way", "the known way runs")


def by(result: Tensor, log: list[str], name: str) -> Callable[[], Tensor]:
    def compute() -> Tensor:
        log.append(name)
        return result.clone()

    return compute


def run(trial: Trial, found: Tensor, expected: Tensor = KNOWN, kind: str = "a") -> tuple[Tensor, bool, list[str]]:
    log: list[str] = []
    result, is_kernels = trial.run(kind, by(found, log, "kernels"), by(expected, log, "known"), TOLERANCE)
    return result, is_kernels, log


def test_kernels_that_agree_run_alone_from_the_second_call_on(trial: Trial) -> None:
    near = KNOWN * 1.005
    result, is_kernels, log = run(trial, near)
    assert torch.equal(result, KNOWN) and not is_kernels and log == ["kernels", "known"]
    result, is_kernels, log = run(trial, near)
    assert torch.equal(result, near) and is_kernels and log == ["kernels"]


def test_every_kind_is_compared(trial: Trial) -> None:
    run(trial, KNOWN, kind="a")
    assert trial.believes("a") and not trial.believes("b")
    assert run(trial, KNOWN, kind="b")[2] == ["kernels", "known"]
    assert trial.believes("b")


@pytest.mark.parametrize("wrong", [1.02, torch.nan])
@pytest.mark.parametrize("rows", [2, 300])
def test_one_wrong_vector_among_many_refuses_all_kinds(
    trial: Trial, caplog: pytest.LogCaptureFixture, rows: int, wrong: float
) -> None:
    run(trial, KNOWN, kind="another")
    expected = torch.randn(rows, 64)
    found = expected.clone()
    found[1] *= wrong
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        assert torch.equal(run(trial, found, expected)[0], expected)
    assert trial.is_refused and not trial.believes("a") and not trial.believes("another")
    (line,) = caplog.messages
    assert line.startswith("the known way runs: results of our kernels differ from those of the known way by")


def test_a_vector_of_zeros_is_no_difference(trial: Trial) -> None:
    expected = KNOWN.clone()
    expected[1] = 0
    run(trial, expected, expected)
    assert trial.believes("a")


def test_where_the_known_way_overflows_nothing_is_settled(trial: Trial) -> None:
    expected = KNOWN.clone()
    expected[0, 3] = torch.inf
    assert run(trial, expected, expected)[2] == ["kernels", "known"]
    assert not trial.is_refused and not trial.believes("a")


@pytest.mark.parametrize("what", REFUSALS)
@pytest.mark.parametrize("is_believed", [False, True])
def test_kernels_that_cannot_be_made_are_refused_and_it_is_said_once(
    trial: Trial, what: str, is_believed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if what == "Triton's own":
        pytest.importorskip("triton", reason="makes an error of Triton's")
    error, told = REFUSALS[what]

    def fails() -> Tensor:
        raise error()

    if is_believed:
        run(trial, KNOWN)
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        for _ in range(2):
            result, is_kernels = trial.run("a", fails, KNOWN.clone, TOLERANCE)
            assert torch.equal(result, KNOWN) and not is_kernels
    (line,) = caplog.messages
    assert line.endswith(told) and trial.is_refused and not trial.believes("a")


def test_out_of_memory_is_left_to_the_caller_and_proves_nothing(trial: Trial) -> None:
    def full() -> Tensor:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        trial.run("a", full, KNOWN.clone, TOLERANCE)
    assert not trial.is_refused


def test_other_errors_are_not_hidden(trial: Trial) -> None:
    class Fault(Exception):
        pass

    def faulty() -> Tensor:
        raise Fault

    with pytest.raises(Fault):
        trial.attempt(faulty)
