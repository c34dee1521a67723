"""Sweeps of six presses over three small tasks: their command line, their results, and when two are the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

from lm_eval_kvpress.sweep import run

PRESSES = "none,knorm,streaming_llm,random,pyramidkv,observed_attention"
DATA = """
import datasets

WORDS = ("the cold river ran past an old mill where seven grey geese slept and nobody asked who owned " * 30).split()


def load(**_):
    def words(start, count):
        return " ".join(WORDS[start : start + count])

    documents = [
        {"text": words(17 * i, 60 + 40 * (i // 2)), "choices": [f" {words(200 + i + c, 1 + c)}" for c in range(3)]}
        for i in range(6)
    ]
    return {"test": datasets.Dataset.from_list(documents)}
"""
KINDS: dict[str, dict[str, Any]] = {
    "choice": {"output_type": "multiple_choice", "doc_to_text": "text", "doc_to_choice": "choices", "doc_to_target": 0},
    "gen": {
        "output_type": "generate_until",
        "doc_to_text": "text",
        "doc_to_target": "text",
        "generation_kwargs": {"until": [" the"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"},
}


def write_tasks(folder: Path) -> Path:
    """Three small tasks, one per request type."""
    (folder / "data.py").write_text(DATA)
    for name, kind in KINDS.items():
        lines = json.dumps({"task": f"sweep_{name}", "test_split": "test", **kind})[1:-1]
        (folder / f"{name}.yaml").write_text("{" + lines + ", custom_dataset: !function data.load}\n")
    return folder


class Killed(BaseException):
    """Ends a sweep as a signal would: nothing below may catch it."""


def dies_once(patch: pytest.MonkeyPatch, owner: type, name: str, *, at: int) -> list[int]:
    """Let the call of this number, counted from 1, of a method raise `Killed`; return the number of calls so far."""
    method, num_calls = getattr(owner, name), [0]

    def call(self: Any, *arguments: Any) -> Any:
        num_calls[0] += 1
        if num_calls[0] == at:
            raise Killed
        return method(self, *arguments)

    patch.setattr(owner, name, call)
    return num_calls


def manager(folder: str | Path | None) -> TaskManager:
    """Without lm-eval's own thousands of tasks, which take seconds to list."""
    return TaskManager(include_path=str(folder), include_defaults=False)


@contextmanager
def only_own_tasks() -> Iterator[None]:
    """Sweeps list the tasks of their ``--include_path`` alone, and ask pip for no packages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "task_manager", lambda settings, cell: manager(settings.include_path))
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "not asked for")
        yield


def command_line(checkpoint_dir: Path, tasks_dir: Path, output: Path, **settings: Any) -> list[str]:
    given = {
        "model_args": f"pretrained={checkpoint_dir},rolling_context=96,rolling_score=96",
        "presses": PRESSES,
        "ratios": "0.5,0.75",
        "tasks": ",".join(f"sweep_{name}" for name in KINDS),
        "include_path": tasks_dir,
        "device": "cpu",
        "batch_size": 4,
        "output_path": output,
        **settings,
    }
    return [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]


def results_of(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]]:
    """Cell to its results and its samples by task."""
    found = {}
    for cell in sorted((folder / "cells").iterdir()):
        (file,) = cell.glob("results/*/results_*.json")
        samples = {
            path.name.split("_2")[0].removeprefix("samples_"): [json.loads(line) for line in path.open()]
            for path in file.parent.glob("samples_*.jsonl")
        }
        found[cell.name] = json.loads(file.read_text()), samples
    return found


def figures(results: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{task}/{metric}": value
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float | int)
    }


def assert_same(one: Path, other: Path, *, some_cells: bool = False) -> None:
    """The same cells, or some of the other's, with the same figures, samples and counts; seconds and dates differ."""
    found, expected = results_of(one), results_of(other)
    assert found.keys() <= expected.keys() if some_cells else found.keys() == expected.keys()
    for name, (results, samples) in found.items():
        of_other, samples_of_other = expected[name]
        assert figures(results) == figures(of_other), name
        assert samples == samples_of_other, name
        for key in ("press", "protocol", "tasks"):
            assert results["config"]["kvpress"][key] == of_other["config"]["kvpress"][key], (name, key)
    assert not list(one.glob("cells/*/answers.sqlite")) and not list(one.glob("cells/*/results.part"))
