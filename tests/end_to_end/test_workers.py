"""A sweep over several processes equals the sweep of one process, whoever is killed on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep_runs import assert_same, manager, results_of, write_tasks
from sweep_runs import command_line as plain_command_line
from transformers import AutoModelForCausalLM

from lm_eval_kvpress.errors import UsageError
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


DRIVER = """
import os, signal, sys
from lm_eval.tasks import TaskManager
from lm_eval_kvpress.sweep import command, run
from lm_eval_kvpress.sweep.answers import Answers

add, calls = Answers.add, []


def dying(self, outcomes):
    calls.append(outcomes)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return add(self, outcomes)


if __name__ == "__main__":  # workers import this file too
    Answers.add = dying
    run.task_manager = lambda settings, cell: TaskManager(include_path=settings.include_path, include_defaults=False)
    sys.exit(command.main(sys.argv[1:]))
"""


def test_a_driver_that_is_killed_takes_its_workers_along_and_the_same_command_goes_on(
    checkpoint_dir: Path, tasks_dir: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its pipes end with it. A second driver is refused as long as one writes there."""
    (tmp_path / "driver.py").write_text(DRIVER)
    arguments = command_line(checkpoint_dir, tasks_dir, tmp_path / "killed", **FEW, workers=2)
    driver = subprocess.Popen([sys.executable, str(tmp_path / "driver.py"), *arguments], stderr=subprocess.PIPE)
    while not (tmp_path / "killed" / "sweep.json").exists() and driver.poll() is None:
        time.sleep(0.05)
    with pytest.raises(UsageError, match="killed is being written by another sweep"):
        command.main(arguments)
    _, _ = driver.communicate(timeout=120)  # until the last worker has closed its end of stderr
    assert driver.returncode == -signal.SIGKILL
    assert command.main(arguments) == 0
    assert " answers of unfinished cells are there from an earlier call" in capfd.readouterr().err
    assert_same(tmp_path / "killed", whole)


def test_a_worker_of_other_weights_is_refused_before_it_answers(
    checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine whose copy of the checkpoint is another one."""
    shutil.copytree(checkpoint_dir, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    start = ProcessPool._start

    def start_on_other(pool: ProcessPool, worker: int) -> None:
        if worker == 1:
            arguments = {**pool._settings.model_args, "pretrained": str(tmp_path / "other")}
            pool._settings = replace(pool._settings, model_args=arguments)
        start(pool, worker)

    monkeypatch.setattr(ProcessPool, "_start", start_on_other)
    with pytest.raises(UsageError, match=r"the worker on .* differs in weights \(.* there, .* here\), and answers are"):
        command.main(command_line(checkpoint_dir, tasks_dir, tmp_path / "two", **FEW, workers=2))
    assert not list((tmp_path / "two").glob("cells/*/answers.sqlite"))
