"""A sweep computes the full cache's predictions once for all cells, and stores what it compared with the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
import pytest
from sweep_runs import Killed, assert_same, command_line, dies_once, manager, results_of

from lm_eval_kvpress.engine import fidelity
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.sweep import command
from lm_eval_kvpress.sweep.answers import Answers

TASKS = ("sweep_choice", "sweep_rolling")


def test_a_sweep_compares_as_single_runs_do_and_goes_on_where_it_was_killed(
    checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict, num_forwards = fidelity.predict, [0]

    def counted(*arguments: Any) -> Any:
        num_forwards[0] += 1
        return predict(*arguments)

    monkeypatch.setattr(fidelity, "predict", counted)
    settings = {"presses": "none,knorm,streaming_llm", "ratios": "0.5", "tasks": ",".join(TASKS)}

    def sweep(folder: Path) -> None:
        assert command.main([*command_line(checkpoint_dir, tasks_dir, folder, **settings), "--fidelity"]) == 0

    sweep(tmp_path / "whole")
    results = results_of(tmp_path / "whole")
    num_batches = [len(_batches(tmp_path / "whole" / "cells" / name)) for name in results]
    assert len(set(num_batches)) == 1 and num_forwards[0] <= num_batches[0], "once for three cells"
    for name, (found, _) in results.items():
        model = KVPress(batch_size=4, device="cpu", **found["config"]["model_args"])
        alone = lm_eval.simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager(tasks_dir))
        for task in TASKS:
            ours = found["config"]["kvpress"]["tasks"][task]["fidelity"]
            theirs = alone["config"]["kvpress"]["tasks"][task]["fidelity"]
            assert ours["num_tokens"] == theirs["num_tokens"] > 10
            assert ours["kl_mean"] == pytest.approx(theirs["kl_mean"], abs=2e-6), name
            assert (ours["kl_mean"] < 2e-6) == (name == "none")

    num_calls = dies_once(monkeypatch, Answers, "add", at=5)
    with pytest.raises(Killed):
        sweep(tmp_path / "killed")
    sweep(tmp_path / "killed")
    assert num_calls[0] > 5
    assert_same(tmp_path / "killed", tmp_path / "whole")


def _batches(cell: Path) -> list[str]:
    lines = (cell / "throughput.jsonl").read_text().splitlines()
    return [line for line in lines if '"record": "batch"' in line]
