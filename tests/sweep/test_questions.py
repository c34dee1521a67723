"""A sweep over both values of ``query_aware``: each cell is the run of that cell alone, and contexts are run once."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval
import yaml
from lm_eval_requests import text
from sweep_runs import command_line, manager, results_of

from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.sweep import command

DATA = """
import datasets


def load(**_):
    documents = [
        {{"prompt": context + "\\nQuestion: " + question, "choices": [" geese", " mill"]}}
        for context in {contexts!r}
        for question in ("which bird?", "what sleeps near the mill?", "who?")
    ]
    return {{"test": datasets.Dataset.from_list(documents)}}
"""
CONTEXTS = [text(0, 60), text(7, 60), text(3, 90)]
NUM_QUESTIONS = 9


def write_tasks(folder: Path) -> Path:
    (folder / "data.py").write_text(DATA.format(contexts=CONTEXTS))
    choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": 0}
    generation = {"until": [], "max_gen_toks": 4, "do_sample": False}
    texts = {
        "output_type": "generate_until",
        "doc_to_target": "prompt",
        "generation_kwargs": generation,
        "metric_list": [{"metric": "exact_match"}],
    }
    for name, kind in {"choice": choice, "text": texts}.items():
        task = {"task": f"ask_{name}", "test_split": "test", "doc_to_text": "prompt", **kind}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task) + "custom_dataset: !function data.load\n")
    return folder


def test_cells_of_both_kinds_equal_their_own_runs(checkpoint_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    tasks, output = write_tasks(tmp_path / "tasks"), tmp_path / "sweep"
    settings = {
        "model_args": f"pretrained={checkpoint_dir},question_pattern=Question:",
        "presses": "none,knorm",
        "ratios": "0.5",
        "query_aware": "true,false",
        "tasks": "ask_choice,ask_text",
        "batch_size": 2,
    }
    assert command.main(command_line(checkpoint_dir, tasks, output, **settings)) == 0
    found = results_of(output)
    assert len(found) == 4
    for name in ("none_query_aware=False", "knorm_compression_ratio=0.5_query_aware=False"):
        results, samples = found[name]
        lm = KVPress(batch_size=2, device="cpu", **results["config"]["model_args"])
        alone = lm_eval.simple_evaluate(lm, tasks=list(samples), task_manager=manager(tasks))
        assert results["config"]["kvpress"]["protocol"] == json.loads(json.dumps(lm.describe()["protocol"]))
        for task, facts in results["config"]["kvpress"]["tasks"].items():
            theirs = json.loads(json.dumps(lm.describe()["tasks"][task]))
            for key in ("contexts_pressed", "contexts_unpressed", "tokens_held_back", "tokens_generated"):
                assert facts[key] == theirs[key], (name, task, key)
        for one, other in zip(samples["ask_text"], alone["samples"]["ask_text"], strict=True):
            assert one["resps"] == [list(response) for response in other["resps"]], name
        records = map(json.loads, (output / "cells" / name / "throughput.jsonl").read_text().splitlines())
        num_tokens = sum(len(lm.tok_encode(f"{context}\n")) for context in CONTEXTS)
        assert sum(record.get("num_prefill_tokens", 0) for record in records) == 2 * num_tokens, name
    summary = json.loads((output / "summary.json").read_text())
    aware = sum(len(lm.tok_encode(f"{context}\nQuestion: ")) for context in CONTEXTS)
    assert summary["num_tokens_prefilled_shared"] > 2 * num_tokens + NUM_QUESTIONS / 3 * aware


def test_a_press_that_reads_the_question_shares_no_contexts_that_hide_it(checkpoint_dir: Path, tmp_path: Path) -> None:
    """Its cell stands behind one of the same protocol, whose contexts do not say where the question begins."""
    (tmp_path / "tasks").mkdir()
    tasks, output = write_tasks(tmp_path / "tasks"), tmp_path / "sweep"
    settings = {"model_args": f"pretrained={checkpoint_dir},question_pattern=Question:", "query_aware": "true"}
    line = command_line(
        checkpoint_dir, tasks, output, **settings, presses="knorm,finch", tasks="ask_text", ratios="0.5"
    )
    assert command.main(line) == 0
    results, samples = results_of(output)["finch_compression_ratio=0.5_query_aware=True"]
    lm = KVPress(device="cpu", **results["config"]["model_args"])
    alone = lm_eval.simple_evaluate(lm, tasks=list(samples), task_manager=manager(tasks))
    theirs, facts = json.loads(json.dumps(lm.describe()["tasks"]["ask_text"])), results["config"]["kvpress"]["tasks"]
    for key in ("contexts_pressed", "contexts_unpressed", "tokens_held_back", "tokens_of_question"):
        assert facts["ask_text"][key] == theirs[key], key
    assert facts["ask_text"]["contexts_unpressed"]["num_contexts"] == 0
    for one, other in zip(samples["ask_text"], alone["samples"]["ask_text"], strict=True):
        assert one["resps"] == [list(response) for response in other["resps"]]
