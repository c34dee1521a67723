"""A sweep over several processes equals the sweep of one process, whoever is killed on the way."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from sweep_runs import assert_same, manager, results_of, write_tasks
from sweep_runs import command_line as plain_command_line

from lm_eval_kvpress.sweep import command, run
from lm_eval_kvpress.sweep.launchers.processes import ProcessPool
from lm_eval_kvpress.sweep.workers.jobs import Job

PRESSES = "none,knorm,random,observed_attention"
FEW = {"presses": PRESSES, "ratios": "0.5", "batch_size": 2}


def command_line(*places: Path, **settings: Any) -> list[str]:
    """With the full cache's predictions, which workers compute for themselves."""
    return [*plain_command_line(*places, **settings), "--fidelity"]


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True)
def only_these_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "task_manager", lambda settings, cell: manager(settings.include_path))


@pytest.fixture(scope="module")
def whole(checkpoint_dir: Path, tasks_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep of one process."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "task_manager", lambda settings, cell: manager(settings.include_path))
        assert command.main(command_line(checkpoint_dir, tasks_dir, output, **FEW)) == 0
    return output


def test_two_workers_one_of_them_killed_equal_one_process(
    checkpoint_dir: Path, tasks_dir: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, num_sent = ProcessPool.send, 0

    def send_and_kill(pool: ProcessPool, worker: int, job: Job) -> None:
        nonlocal num_sent
        num_sent += 1
        if num_sent == 3:
            os.kill(pool._processes[worker].pid or 0, signal.SIGKILL)
        send(pool, worker, job)

    monkeypatch.setattr(ProcessPool, "send", send_and_kill)
    assert command.main(command_line(checkpoint_dir, tasks_dir, tmp_path / "two", **FEW, workers=2)) == 0
    assert_same(tmp_path / "two", whole)
    for name, (results, _) in results_of(tmp_path / "two").items():
        facts, alone = results["config"]["kvpress"], results_of(whole)[name][0]["config"]["kvpress"]
        assert facts["num_ranks"] == 2 and len(facts["sweep"]["workers"]) == 2
        for key in ("device", "machine", "dtype", "attn_implementation"):
            assert key == "machine" or facts[key] == alone[key], (name, key)
        compared = facts["tasks"]["sweep_choice"]["fidelity"]
        assert compared["num_tokens"] > 10 and (compared["kl_mean"] > 1e-3) == (name != "none"), name
        counts = [f["throughput"][key] for f in (facts, alone) for key in ("num_batches", "num_requests")]
        assert counts[:2] == counts[2:], name
    summary, of_one = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "two", whole))
    assert summary["num_workers"] == 2 and of_one["num_workers"] == 1
    assert summary["num_tokens_prefilled"] >= of_one["num_tokens_prefilled"]
