"""A sweep in four shards, in any order and whoever is killed on the way, equals the sweep of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT
from sweep_runs import assert_same, command_line, only_own_tasks, results_of, write_tasks

from lm_eval_kvpress import cli
from lm_eval_kvpress.sweep import command

FEW = {"presses": "none,knorm,random,observed_attention", "ratios": "0.5", "batch_size": 2}
KILLED = """
import os, signal, sys
from lm_eval.tasks import TaskManager
from lm_eval_kvpress.sweep import command, run
from lm_eval_kvpress.sweep.answers import Answers

limit, add, calls = int(sys.argv[1]), Answers.add, []


def dying(self, outcomes):
    calls.append(outcomes)
    if len(calls) == limit:  # records of the batch are in the log, and its answers nowhere
        os.kill(os.getpid(), signal.SIGKILL)
    return add(self, outcomes)


Answers.add = dying
run.task_manager = lambda settings, cell: TaskManager(include_path=settings.include_path, include_defaults=False)
sys.exit(command.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module", autouse=True)
def only_these_tasks() -> Any:
    with only_own_tasks():
        yield


@pytest.fixture(scope="module")
def whole(checkpoint_dir: Path, tasks_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep of one process."""
    output = tmp_path_factory.mktemp("whole")
    assert command.main([*command_line(checkpoint_dir, tasks_dir, output, **FEW), "--fidelity"]) == 0
    return output


def test_four_shards_one_of_them_killed_twice_equal_one_process(
    checkpoint_dir: Path, tasks_dir: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "shards"
    arguments = [*command_line(checkpoint_dir, tasks_dir, output, **FEW), "--fidelity"]
    for limit in (2, 4):
        program = [sys.executable, "-c", KILLED, str(limit), *arguments, "--shard", "3/4"]
        killed = subprocess.run(program, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert killed.returncode == -signal.SIGKILL
    for number in (4, 1):
        assert command.main([*arguments, "--shard", f"{number}/4"]) == 0
    capfd.readouterr()
    assert cli.main(["sweep", *arguments, "--merge"]) == 2
    assert (
        "2 of 4 shards are not done: run the same command with --shard 2/4 and 3/4, then --merge again"
        in capfd.readouterr().err
    )
    assert cli.main(["report", str(output)]) == 2
    assert "its command with --merge joins its shards" in capfd.readouterr().err
    for number in (3, 2, 4):  # one of them runs twice
        assert command.main([*arguments, "--shard", f"{number}/4"]) == 0
    for _ in range(2):  # the second time there is nothing to do
        assert command.main([*arguments, "--merge"]) == 0
        assert_same(output, whole)
    _assert_counts_and_places(output, whole)


def _assert_counts_and_places(output: Path, whole: Path) -> None:
    """What `assert_same` leaves out: batches and requests, each once, and where they were computed."""
    of_one = {name: results["config"]["kvpress"] for name, (results, _) in results_of(whole).items()}
    for name, (results, _) in results_of(output).items():
        facts = results["config"]["kvpress"]
        assert facts["num_ranks"] == 4 and [worker["device"] for worker in facts["sweep"]["workers"]] == ["cpu"] * 4
        assert facts["throughput"]["num_batches"] == of_one[name]["throughput"]["num_batches"], name
        assert facts["throughput"]["num_requests"] <= of_one[name]["throughput"]["num_requests"], name
        tokens = [f["throughput"]["prefill"]["num_tokens"] for f in (facts, of_one[name])]
        assert tokens[0] > 0 and facts["device"] == of_one[name]["device"], tokens
        compared = facts["tasks"]["sweep_choice"]["fidelity"]
        assert compared["num_tokens"] > 10 and (compared["kl_mean"] > 1e-3) == (name != "none"), name
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["num_cells_run"], summary["num_workers"], summary["num_tokens_prefilled"]) == (4, 4, 0)
