"""Several processes with a share of the requests each: the record is that of one process that answers all of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from lm_eval_kvpress.harness import plugin
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.ranks import RankFacts, merge, without_padding
from lm_eval_kvpress.records.timings import RunRecords
from lm_eval_kvpress.records.totals import ContextRecord, TaskTotals

TASKS = ["kvpress_story", "kvpress_recall", "kvpress_recall_gen"]
SETTINGS = {"pretrained": "builtin", "press": "snapkv", "batch_size": 2, "fidelity": True}
LIMIT = 3
"""Documents of a task: rank 0 has two of them, rank 1 one and a copy of it."""

ONE_RANK = """
import json, sys, torch
torch.set_num_threads(1)
import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval_kvpress.harness import plugin
from lm_eval_kvpress.harness.model import KVPress

lm = KVPress(**json.loads(sys.argv[1]))
tasks = TaskManager(include_path=str(plugin.tasks_path()), include_defaults=False)
for limit in (2, int(sys.argv[3])):  # of the first evaluation, the record of the second holds nothing
    answers = lm_eval.simple_evaluate(lm, tasks=json.loads(sys.argv[2]), limit=limit, task_manager=tasks)
assert (answers is None) == (lm.rank > 0)
if answers is not None:
    found = {"results": answers["results"], "record": answers["config"]["kvpress"]}
    print(json.dumps({**found, "samples": {task: len(docs) for task, docs in answers["samples"].items()}}))
"""


@dataclass(eq=False)
class Request:
    repeats: int | None = 1


def test_padding_is_what_comes_more_often_than_it_was_asked() -> None:
    once, thrice = Request(), Request(repeats=3)
    own, answered_by = without_padding([once, thrice, thrice, thrice])
    assert own == [once, thrice, thrice, thrice] and answered_by == [0, 1, 2, 3]
    own, answered_by = without_padding([once, *[thrice] * 3, *[thrice] * 6])
    assert own == [once, thrice, thrice, thrice] and answered_by == [0, 1, 2, 3, 1, 2, 3, 1, 2, 3]
    assert without_padding([once, once, once]) == ([once], [0, 0, 0])
    assert without_padding([]) == ([], [])
    unsaid = Request(repeats=None)
    assert without_padding([unsaid, unsaid]) == ([unsaid], [0, 0])


def test_new_answers_end_the_facts_of_an_evaluation_before(checkpoint_dir: Path) -> None:
    lm = KVPress(pretrained=str(checkpoint_dir), device="cpu", press="knorm")
    lm.session.gathered = RankFacts({"before": TaskTotals()}, RunRecords(), 2)
    assert lm.describe()["num_ranks"] == 2
    lm.loglikelihood([Instance("loglikelihood", {}, ("seven grey", " geese"), 0, ("now", 0, 1))], disable_tqdm=True)
    record = lm.describe()
    assert record["num_ranks"] == 1 and set(record["tasks"]) == {"now"}


def a_rank(*kept: float, note: str) -> TaskTotals:
    totals = TaskTotals(num_cut_contexts=1, max_decode_entries=int(10 * kept[0]), notes=Counter({note: 2, "both": 1}))
    totals.pressed.add(ContextRecord(20, kept, 400, 200, pressed=True))
    totals.add_scores([-1.0, -kept[0]], pressed=True)
    return totals


def test_totals_of_ranks_are_added_and_highest_figures_stay_the_highest() -> None:
    ranks = [a_rank(10.0, 4.0, note="first"), a_rank(6.0, 8.0, note="second")]
    facts = [
        RankFacts({"task": ranks[0]}, RunRecords()),
        RankFacts({"task": ranks[1], "other": ranks[1]}, RunRecords()),
    ]
    found = merge(facts)
    summary = found.totals["task"].summary()
    assert found.num_ranks == 2
    assert summary["contexts_pressed"]["kept_tokens_per_layer"] == [16.0, 12.0]
    assert summary["contexts_pressed"] | {"num_contexts": 2, "num_tokens": 40} == summary["contexts_pressed"]
    assert summary["contexts_pressed"]["kv_bytes_before"] == 800 and summary["contexts_pressed"]["kept_share"] == 0.35
    assert summary["contexts_unpressed"]["num_contexts"] == 0
    assert summary["tokens_scored_under_press"] == 4 and summary["num_cut_contexts"] == 2
    assert summary["max_decode_entries"] == 100 and summary["notes"] == {"first": 2, "both": 2, "second": 2}
    assert found.totals["other"].summary() == ranks[1].summary()
    assert ranks[0].pressed.num_contexts == 1, "what a rank did stays its own"


def two_ranks(settings: dict[str, Any]) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", ONE_RANK, json.dumps(settings), json.dumps(TASKS), str(LIMIT)]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"CUDA_VISIBLE_DEVICES": "", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, errors[-3000:]
    found: dict[str, Any] = json.loads(outputs[0][0].splitlines()[-1])
    return found


def of_the_last_run(log: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if line["run"] == lines[-1]["run"]]


def close(one: Any, other: Any) -> bool:
    """Equal but for the rounding of sums that were added in another order and over other batches."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return bool(one == (pytest.approx(other, rel=1e-6, abs=1e-4) if isinstance(one, float) else other))


def test_a_data_parallel_run_has_the_record_of_a_run_alone(tmp_path: Path) -> None:
    found = two_ranks({**SETTINGS, "throughput_log": str(tmp_path / "log.jsonl")})
    lm = KVPress(**SETTINGS)
    manager = TaskManager(include_path=str(plugin.tasks_path()))
    alone = lm_eval.simple_evaluate(lm, tasks=TASKS, limit=LIMIT, task_manager=manager)
    assert alone is not None
    record, own = found["record"], alone["config"]["kvpress"]
    assert record["num_ranks"] == 2 and own["num_ranks"] == 1
    assert close(record["tasks"], own["tasks"]), (record["tasks"], own["tasks"])
    assert record["tasks"]["kvpress_recall"]["contexts_pressed"]["num_contexts"] == LIMIT
    assert record["tasks"]["kvpress_recall"]["fidelity"]["kl_mean"] > 1e-3
    assert record["throughput"]["num_requests"] == own["throughput"]["num_requests"]
    assert record["throughput"]["itl_sec"] is not None and own["throughput"]["itl_sec"] is not None
    assert record["decoding_steps"] == {"modules": 2} and own["decoding_steps"] == {"modules": 2}
    assert found["samples"] == {task: LIMIT for task in TASKS}
    for task in TASKS:
        assert close(found["results"][task], json.loads(json.dumps(alone["results"][task]))), task
    logs = [tmp_path / name for name in ("log.jsonl", "log.rank1.jsonl")]
    lines = [line for log in logs for line in of_the_last_run(log)]
    logged = Counter((line["task"], line["doc_id"], line["idx"]) for line in lines if line["record"] == "request")
    assert len(logged) == record["throughput"]["num_requests"] and set(logged.values()) == {1}


@pytest.mark.slow
def test_torchrun_on_a_cpu_shares_the_documents_of_lm_evals_command(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lm_eval"]
    asked = ["--model", "kvpress", "--model_args", "pretrained=builtin,press=knorm", "--tasks", "kvpress_recall"]
    asked += ["--limit", "4", "--output_path", str(tmp_path)]
    done = subprocess.run(
        [*torchrun, *asked], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.rglob("results_*.json")
    record = json.loads(file.read_text())["config"]["kvpress"]
    assert record["num_ranks"] == 2
    assert record["tasks"]["kvpress_recall"]["contexts_pressed"]["num_contexts"] == 4
