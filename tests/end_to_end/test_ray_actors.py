"""A sweep over actors of Ray equals the sweep of one process, also if an actor, a node or the driver is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from documentation import titled_blocks
from repository import ROOT
from sweep_runs import assert_same, command_line, only_own_tasks, results_of, write_tasks

from lm_eval_kvpress import cli
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.sweep import command
from lm_eval_kvpress.sweep.workers.jobs import Job

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'lm-eval-kvpress[ray]'")
pytestmark = pytest.mark.xdist_group("ray")  # one cluster of this machine at a time

FEW = {"presses": "none,knorm,observed_attention", "ratios": "0.5", "batch_size": 2}
ACTORS = {"launcher": "ray", "workers": 2, "gpus_per_worker": 0}


@pytest.fixture(scope="module", autouse=True)
def only_these_tasks() -> Iterator[None]:
    with only_own_tasks():
        yield


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def whole(checkpoint_dir: Path, tasks_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep of one process."""
    output = tmp_path_factory.mktemp("whole")
    assert command.main([*command_line(checkpoint_dir, tasks_dir, output, **FEW), "--fidelity"]) == 0
    return output


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two nodes, each with room for one worker of one thread."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    yield nodes
    ray.shutdown()
    nodes.shutdown()


DRIVER = """
import sys
from lm_eval.tasks import TaskManager
from lm_eval_kvpress.sweep import command, run

run.task_manager = lambda settings, cell: TaskManager(include_path=settings.include_path, include_defaults=False)
sys.exit(command.main(sys.argv[1:]))
"""


def at_send(patch: pytest.MonkeyPatch, number: int, then: Any) -> list[Job]:
    """Call ``then(pool, worker)`` after the job of this number, counted from 1, is sent; return the jobs that were."""
    from lm_eval_kvpress.sweep.launchers.ray_actors import RayPool

    send, jobs = RayPool.send, list[Job]()

    def send_and_do(pool: Any, worker: int, job: Job) -> None:
        jobs.append(job)
        send(pool, worker, job)
        if len(jobs) == number:
            then(pool, worker)

    patch.setattr(RayPool, "send", send_and_do)
    return jobs


def test_two_actors_one_of_them_killed_equal_one_process(
    checkpoint_dir: Path, tasks_dir: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Ray that the sweep starts, and ends."""
    jobs = at_send(monkeypatch, 3, lambda pool, worker: ray.kill(pool._actors[worker]))
    assert command.main([*command_line(checkpoint_dir, tasks_dir, tmp_path, **FEW, **ACTORS), "--fidelity"]) == 0
    assert len(jobs) > 3 and not ray.is_initialized()
    assert_same(tmp_path, whole)
    for results, _ in results_of(tmp_path).values():
        facts = results["config"]["kvpress"]
        assert facts["num_ranks"] == 2 and len(facts["sweep"]["workers"]) == 2


def test_two_nodes_one_of_them_lost_equal_one_process(
    cluster: Any,
    checkpoint_dir: Path,
    tasks_dir: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The worker that is left does all that remains, while the other one's place stays empty."""
    (second,) = cluster.worker_nodes
    jobs = at_send(monkeypatch, 4, lambda pool, worker: cluster.remove_node(second, allow_graceful=False))
    settings = {**FEW, **ACTORS, "ray_address": cluster.address}
    assert command.main([*command_line(checkpoint_dir, tasks_dir, tmp_path, **settings), "--fidelity"]) == 0
    assert len(jobs) > 4 and "was lost" in capfd.readouterr().err
    assert_same(tmp_path, whole)


def test_a_driver_that_is_killed_goes_on_with_the_same_command(
    cluster: Any, checkpoint_dir: Path, tasks_dir: Path, whole: Path, tmp_path: Path
) -> None:
    """Ray ends its actors with it, which makes room for the next driver's; a second driver beside it is refused."""
    settings = {**FEW, **ACTORS, "ray_address": cluster.address}
    arguments = [*command_line(checkpoint_dir, tasks_dir, tmp_path, **settings), "--fidelity"]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], cwd=ROOT)
    _wait_for(tmp_path, "sweep.json", driver)
    with pytest.raises(UsageError, match="is being written by another sweep"):
        command.main(arguments)
    _wait_for(tmp_path, "cells/*/answers.sqlite", driver)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert command.main(arguments) == 0
    assert_same(tmp_path, whole)


def test_the_cluster_of_the_guide_is_one_that_ray_takes() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(titled_blocks(ROOT / "docs/scale.md")["cluster.yaml"]))
    validate_config(config)
    (nodes,) = config["available_node_types"].values()
    assert nodes["min_workers"] == nodes["max_workers"] == len(config["provider"]["worker_ips"]) == 3


def _wait_for(folder: Path, pattern: str, driver: subprocess.Popen[bytes]) -> None:
    while not list(folder.glob(pattern)):
        assert driver.poll() is None, f"the driver ended before there was {pattern}"
        time.sleep(0.02)


def test_a_cluster_that_is_not_there_is_one_line(
    checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ray_settings = {"launcher": "ray", "ray_address": "127.0.0.1:1"}
    assert cli.main(["sweep", *command_line(checkpoint_dir, tasks_dir, tmp_path, **FEW, **ray_settings)]) == 2
    assert "ray_address=127.0.0.1:1: there is no Ray cluster" in capfd.readouterr().err.splitlines()[-1]
