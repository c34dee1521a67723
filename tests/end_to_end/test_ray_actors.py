"""A sweep over actors of Ray equals the sweep of one process, also if an actor is killed on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweep_runs import assert_same, command_line, manager, results_of, write_tasks

from lm_eval_kvpress import cli
from lm_eval_kvpress.sweep import command, run
from lm_eval_kvpress.sweep.workers.jobs import Job

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'lm-eval-kvpress[ray]'")

FEW = {"presses": "none,knorm,observed_attention", "ratios": "0.5", "batch_size": 2}


@pytest.fixture(autouse=True)
def only_these_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "task_manager", lambda settings, cell: manager(settings.include_path))


def test_two_actors_one_of_them_killed_equal_one_process(
    checkpoint_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval_kvpress.sweep.launchers.ray_actors import RayPool

    (tmp_path / "tasks").mkdir()
    places = (checkpoint_dir, write_tasks(tmp_path / "tasks"))
    assert command.main([*command_line(*places, tmp_path / "whole", **FEW), "--fidelity"]) == 0
    send, num_sent = RayPool.send, 0

    def send_and_kill(pool: RayPool, worker: int, job: Job) -> None:
        nonlocal num_sent
        num_sent += 1
        send(pool, worker, job)
        if num_sent == 3:
            ray.kill(pool._actors[worker])

    monkeypatch.setattr(RayPool, "send", send_and_kill)
    actors = {"launcher": "ray", "workers": 2, "gpus_per_worker": 0}
    assert command.main([*command_line(*places, tmp_path / "ray", **FEW, **actors), "--fidelity"]) == 0
    assert num_sent > 3 and not ray.is_initialized()
    assert_same(tmp_path / "ray", tmp_path / "whole")
    for results, _ in results_of(tmp_path / "ray").values():
        facts = results["config"]["kvpress"]
        assert facts["num_ranks"] == 2 and len(facts["sweep"]["workers"]) == 2


def test_a_cluster_that_is_not_there_is_one_line(
    checkpoint_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tasks").mkdir()
    places = (checkpoint_dir, write_tasks(tmp_path / "tasks"), tmp_path / "out")
    ray_settings = {"launcher": "ray", "ray_address": "127.0.0.1:1"}
    assert cli.main(["sweep", *command_line(*places, **FEW, **ray_settings)]) == 2
    assert "ray_address=127.0.0.1:1: there is no Ray cluster" in capfd.readouterr().err.splitlines()[-1]
