"""Two commits' results: what is equal is said to be, and what differs by more than it may ends with exit status 1."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.studies.compare_results import main

FACTS = {"contexts_pressed": {"num_contexts": 2, "kept_tokens_per_layer": [50, 40], "kept_share": 0.45}}
RESULTS: dict[str, Any] = {
    "results": {"recall": {"alias": "recall", "acc,none": 0.75, "ppl,none": 43.0, "acc_stderr,none": "N/A"}},
    "config": {"kvpress": {"press": {"name": "snapkv", "arguments": {"compression_ratio": 0.5}}, "tasks": {}}},
}
RESPS = [[["-1.5", "False"]], [["-2.5", "True"]]]

Change = Callable[[dict[str, Any]], Any]


def write(folder: Path, change: Change | None = None, *, resps: Any = RESPS, time: str = "2026-01-01") -> None:
    results = copy.deepcopy(RESULTS)
    results["config"]["kvpress"]["tasks"] = {"recall": copy.deepcopy(FACTS)}
    if change is not None:
        change(results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"results_{time}.json").write_text(json.dumps(results))
    (folder / f"samples_recall_{time}.jsonl").write_text(
        json.dumps({"doc_id": 0, "filter": "none", "resps": resps}) + "\n"
    )


def set_metric(name: str, value: float) -> Change:
    return lambda results: results["results"]["recall"].update({name: value})


def set_kept(layers: list[int]) -> Change:
    return lambda results: results["config"]["kvpress"]["tasks"]["recall"]["contexts_pressed"].update(
        kept_tokens_per_layer=layers
    )


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        (None, 0, "2 equal | equal | 2: 0 texts differ, 0 nats | equal"),
        (set_metric("acc,none", 0.75 + 1 / 1000), 1, "acc,none by 0.0013"),
        (set_metric("ppl,none", 43.0 * (1 + 1e-8)), 0, "ppl,none by 1e-08 | equal"),
        (set_metric("ppl,none", float("nan")), 1, "ppl,none by inf"),
        (set_metric("new,none", 1.0), 1, "new,none by inf"),
        (set_kept([50, 41]), 1, "kept_tokens_per_layer.1: 40 -> 41"),
    ],
)
def test_verdict_follows_metrics_and_kept_counts(
    change: Change | None, status: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "before" / "snapkv" / "builtin")
    write(tmp_path / "after" / "snapkv" / "builtin", change, time="2026-02-02")
    assert main([str(tmp_path / "before"), str(tmp_path / "after")]) == status
    assert words in capsys.readouterr().out


def test_answers_are_shown_and_decide_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "before")
    write(tmp_path / "after", resps=[[["-1.25", "False"]], [["-2.5", "False"]]])
    assert main([str(tmp_path / "before"), str(tmp_path / "after")]) == 0
    assert "2: 1 texts differ, 0.25 nats" in capsys.readouterr().out


def test_a_run_of_one_side_only_is_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for side in ("before", "after"):
        write(tmp_path / side / "same")
    write(tmp_path / "before" / "gone")
    assert main([str(tmp_path / "before"), str(tmp_path / "after")]) == 1
    assert "| gone | snapkv compression_ratio=0.5 | recall | - | - | - | MISSING after |" in capsys.readouterr().out


def test_two_results_of_one_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    write(tmp_path, time="2026-02-02")
    assert main([str(tmp_path), str(tmp_path)]) == 2
    assert "holds two results of snapkv compression_ratio=0.5 recall" in capsys.readouterr().err


def test_a_folder_without_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path)]) == 2
    assert "no results_*.json below" in capsys.readouterr().err
