"""``--kv_quant`` is an axis of a sweep: its cells share prefills, equal runs of their own, and go on after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval
import pytest
from sweep_runs import Killed, assert_same, command_line, dies_once, figures, manager, results_of

from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.sweep import command
from lm_eval_kvpress.sweep.answers import Answers

TASKS = ("sweep_choice", "sweep_gen")


def test_cells_share_prefills_equal_runs_of_their_own_and_go_on(
    checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "model_args": f"pretrained={checkpoint_dir},dtype=float64,kv_group=32",
        "presses": "none,knorm",
        "ratios": "0.5",
        "kv_quant": "none,int2",
        "tasks": ",".join(TASKS),
    }

    def sweep(folder: Path) -> None:
        assert command.main(command_line(checkpoint_dir, tasks_dir, folder, **settings)) == 0

    sweep(tmp_path / "whole")
    results = results_of(tmp_path / "whole")
    assert sorted(results) == [
        "knorm_compression_ratio=0.5_kv_quant=int2",
        "knorm_compression_ratio=0.5_kv_quant=none",
        "none_kv_quant=int2",
        "none_kv_quant=none",
    ]
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    one = next(iter(results.values()))[0]["config"]["kvpress"]["tasks"]
    once = sum(of_task[kind]["num_tokens"] for of_task in one.values() for kind in of_task if kind.startswith("conte"))
    assert summary["num_tokens_prefilled"] == once, "every context once, for four cells"
    for name, (found, _) in results.items():
        model = KVPress(batch_size=1, device="cpu", **found["config"]["model_args"])
        alone = lm_eval.simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager(tasks_dir))
        assert figures(found) == pytest.approx(figures(json.loads(json.dumps(alone, default=str))), rel=1e-6), name
        for task in TASKS:
            ours, theirs = (facts["config"]["kvpress"]["tasks"][task] for facts in (found, alone))
            for kind in ("contexts_pressed", "contexts_unpressed"):
                assert ours[kind] == theirs[kind]

    dies_once(monkeypatch, Answers, "add", at=5)
    with pytest.raises(Killed):
        sweep(tmp_path / "killed")
    sweep(tmp_path / "killed")
    assert_same(tmp_path / "killed", tmp_path / "whole")
