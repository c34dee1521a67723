"""Shards and their merge as jobs of a queue, by submitit's executor of this machine, equal the sweep of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sweep_runs import assert_same, command_line, results_of, write_tasks

from lm_eval_kvpress import cli
from lm_eval_kvpress.sweep import command

pytest.importorskip("submitit", reason="needs submitit: pip install 'lm-eval-kvpress[slurm]'")

FEW = {"presses": "none,knorm", "ratios": "0.5", "batch_size": 2}


def test_two_shards_and_their_merge_equal_one_process(
    checkpoint_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the jobs, as in this process: two threads round otherwise
    (tmp_path / "tasks").mkdir()
    places = (checkpoint_dir, write_tasks(tmp_path / "tasks"))
    assert command.main(command_line(*places, tmp_path / "whole", **FEW)) == 0
    jobs = {"launcher": "submitit", "workers": 2, "slurm": "cluster=local"}
    capfd.readouterr()
    assert command.main(command_line(*places, tmp_path / "jobs", **FEW, **jobs)) == 0
    assert "2 shards are jobs" in capfd.readouterr().err
    assert_same(tmp_path / "jobs", tmp_path / "whole")
    for results, _ in results_of(tmp_path / "jobs").values():
        about = results["config"]["kvpress"]["sweep"]
        assert len(about["workers"]) == 2 and about["settings"]["launcher"] == "local"
    assert json.loads((tmp_path / "jobs" / "summary.json").read_text())["num_workers"] == 2


def test_a_job_that_fails_is_one_line(checkpoint_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tasks").mkdir()
    places = (checkpoint_dir, write_tasks(tmp_path / "tasks"), tmp_path / "jobs")
    jobs = {"launcher": "submitit", "slurm": "cluster=local", "tasks": "sweep_choise"}
    assert cli.main(["sweep", *command_line(*places, **FEW, **jobs)]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert " failed: see " in line
    log = Path(line.rpartition("see ")[2])
    assert "unknown task 'sweep_choise': did you mean 'sweep_choice'" in log.read_text()
