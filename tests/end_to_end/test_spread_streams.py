"""Streams over several workers or shards equal those of one process: figures, samples, and losses by position."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sweep_runs import Killed, assert_same, command_line, dies_once, only_own_tasks, results_of, write_tasks

from lm_eval_kvpress.records.loss_files import LossFiles
from lm_eval_kvpress.sweep import command
from lm_eval_kvpress.sweep.cell_run import CellRun
from lm_eval_kvpress.sweep.launchers.processes import ProcessPool
from lm_eval_kvpress.sweep.workers.jobs import Job

CELLS = ("knorm_stream_budget=64_rolling=stream", "random_stream_budget=64_rolling=stream")
STREAMS = {
    "presses": "knorm,random",
    "ratios": None,
    "budgets": 64,
    "rolling": "stream",
    "tasks": "sweep_rolling,sweep_choice",
    "batch_size": 2,
}


@pytest.fixture(scope="module", autouse=True)
def only_these_tasks() -> Iterator[None]:
    with only_own_tasks():
        yield


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def sweep(checkpoint_dir: Path, tasks_dir: Path, output: Path, *more: str, **settings: Any) -> None:
    given = {**STREAMS, "model_args": f"pretrained={checkpoint_dir},stream_chunk=16", **settings}
    assert command.main([*command_line(checkpoint_dir, tasks_dir, output, **given), "--fidelity", *more]) == 0


@pytest.fixture(scope="module")
def whole(checkpoint_dir: Path, tasks_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep of one process."""
    output = tmp_path_factory.mktemp("whole")
    sweep(checkpoint_dir, tasks_dir, output)
    return output


def losses(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.glob("cells/*/stream/*/*.csv")}


def assert_same_streams(one: Path, other: Path) -> None:
    assert_same(one, other)
    assert set(results_of(one)) == set(CELLS) and len(losses(one)) == 2 * 6 and losses(one) == losses(other)


def record(folder: Path, cell: str) -> dict[str, Any]:
    return results_of(folder)[cell][0]["config"]["kvpress"]


def test_two_workers_one_of_them_killed_equal_one_process(
    checkpoint_dir: Path, tasks_dir: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, jobs = ProcessPool.send, list[Job]()

    def send_and_kill(pool: ProcessPool, worker: int, job: Job) -> None:
        jobs.append(job)
        if len(jobs) == 2:
            os.kill(pool._processes[worker].pid or 0, signal.SIGKILL)
        send(pool, worker, job)

    monkeypatch.setattr(ProcessPool, "send", send_and_kill)
    sweep(checkpoint_dir, tasks_dir, tmp_path, workers=2)
    assert_same_streams(tmp_path, whole)
    assert [len(job.items) for job in jobs[:4]] == [2] * 4, "three batches of documents, one of them twice"
    for cell in CELLS:
        of_two, of_one = (record(folder, cell) for folder in (tmp_path, whole))
        assert of_two["num_ranks"] == 2 and of_two["answered_before"]["documents_from_stream_output"] == 0
        assert of_two["tasks"]["sweep_rolling"]["fidelity"]["kl_mean"] > 1e-3
        counts = [facts["throughput"][name] for facts in (of_two, of_one) for name in ("num_batches", "num_requests")]
        assert counts[:2] == counts[2:], cell


def test_two_shards_killed_on_the_way_equal_one_process(
    checkpoint_dir: Path, tasks_dir: Path, whole: Path, tmp_path: Path
) -> None:
    """The first before its second batch of two documents is saved, the second when it is and has no records yet."""
    kills = {"1/2": (LossFiles, "save", 3), "2/2": (CellRun, "record", 1)}
    for shard, (owner, name, at) in kills.items():
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            dies_once(patch, owner, name, at=at)
            sweep(checkpoint_dir, tasks_dir, tmp_path, "--shard", shard)
    for shard in ("2/2", "1/2", "2/2"):  # one of them runs twice
        sweep(checkpoint_dir, tasks_dir, tmp_path, "--shard", shard)
    sweep(checkpoint_dir, tasks_dir, tmp_path, "--merge")
    assert_same_streams(tmp_path, whole)
    assert json.loads((tmp_path / "summary.json").read_text())["num_workers"] == 2
    untimed = {cell: record(tmp_path, cell)["answered_before"]["documents_from_stream_output"] for cell in CELLS}
    assert untimed == {CELLS[0]: 2, CELLS[1]: 0}, "those whose seconds were lost, and no others"
    for cell in CELLS:
        lines = (tmp_path / "cells" / cell / "throughput.jsonl").read_text().splitlines()
        documents = [
            found["doc_id"]
            for found in map(json.loads, lines)
            if found["record"] == "request" and found["request_type"] == "loglikelihood_rolling"
        ]
        assert len(documents) == len(set(documents)) == 6 - untimed[cell]
