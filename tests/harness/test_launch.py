"""Variables of a shell neither hang a run nor double it."""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta

import pytest

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness import launch

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
NAMES += ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # set by the law itself, and taken back
    monkeypatch.setattr(launch, "WAIT", timedelta(seconds=1))


def test_one_process_meets_nobody(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for world_size in (None, "1", ""):
        if world_size is not None:
            monkeypatch.setenv("WORLD_SIZE", world_size)
        launch.meet_the_others("cpu")
    assert not caplog.records and launch.num_processes() == 1


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_never_come_are_one_line_soon(
    monkeypatch: pytest.MonkeyPatch, unused_port: int, rank: str
) -> None:
    shell = {"WORLD_SIZE": "4", "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**shell, "MASTER_PORT": str(unused_port)}.items():
        monkeypatch.setenv(name, value)
    began = time.perf_counter()
    with pytest.raises(UsageError, match="WORLD_SIZE=4 processes are announced.* or unset WORLD_SIZE") as caught:
        launch.meet_the_others("cpu")
    assert time.perf_counter() - began < 20 and "\n" not in str(caught.value)


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "4", "RANK": "0"}, "WORLD_SIZE=4 is set and LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"),
        ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR, MASTER_PORT is not"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE=four is no number of processes"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is no number of processes"),
    ],
)
def test_half_a_launch_is_one_line(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=says):
        launch.meet_the_others("cpu")


def test_a_size_that_a_shell_exports_leaves_one_process(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a script or an interactive allocation leaves it; accelerate, which reads it too, would wait for others."""
    shell = {"WORLD_SIZE": "4", "SLURM_NTASKS": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    launch.meet_the_others("cpu")
    assert launch.num_processes() == 1 and "WORLD_SIZE" not in os.environ
    (record,) = caplog.records
    assert record.getMessage() == "WORLD_SIZE=4 is set without a RANK, and is left out of account: this is one process"


def test_tasks_of_a_slurm_step_are_told_that_each_does_all(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")  # as in a batch script, which is one process
    launch.meet_the_others("cpu")
    assert not caplog.records
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "2")
    with caplog.at_level(logging.WARNING):
        launch.meet_the_others("cpu")
    (record,) = caplog.records
    assert "task 2 of the 4 tasks of a Slurm step, and each of them does all the work" in record.getMessage()
