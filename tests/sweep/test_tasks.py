"""What the answers and figures of a task depend on is told apart by hashes that two processes agree on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.loggers.utils import add_env_info
from lm_eval.tasks import TaskManager
from repository import ROOT
from sweep_runs import manager
from torch.utils import collect_env

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.sweep import tasks as sweep_tasks
from lm_eval_kvpress.sweep.cells import cells_of
from lm_eval_kvpress.sweep.evaluation import environment_asked_once
from lm_eval_kvpress.sweep.settings import parse_settings
from lm_eval_kvpress.sweep.tasks import task_hashes

YAML = """
task: hashed
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: [a, b]
doc_to_target: 0
process_docs: !function data.shorten
custom_dataset: !function data.load
"""
DATA = """
import datasets

def shorten(documents):
    return documents.map(lambda document: {"text": document["text"][:LENGTH]})

LENGTH = 5

def load(**_):
    make = lambda texts: datasets.Dataset.from_list([{"text": text} for text in texts])
    return {"test": make(["one two", "three four", "five six"]), "train": make(["seven", "eight"])}
"""


def hashes(folder: Path, yaml: str = YAML, data: str = DATA, **settings: Any) -> dict[str, str]:
    folder.mkdir(parents=True)
    (folder / "data.py").write_text(data)
    (folder / "hashed.yaml").write_text(yaml)
    given = {"tasks": "hashed", "presses": "none", "output_path": "o", **settings}
    return task_hashes(parse_settings(given), manager(folder))["hashed"]


CHANGES: dict[str, tuple[str, str, set[str]]] = {
    "a choice": ("[a, b]", "[a, c]", {"doc_to_choice", "fewshot_config"}),
    "a document": ("five six", "nine six", {"documents", "custom_dataset"}),
    "a helper of a function": ("LENGTH = 5", "LENGTH = 6", {"documents", "custom_dataset", "process_docs"}),
    "a few-shot document": ("eight", "nine", {"custom_dataset", "few-shot documents"}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_any_part_that_was_corrected_is_named(what: str, tmp_path: Path) -> None:
    old, new, parts = CHANGES[what]
    before = hashes(tmp_path / "a", num_fewshot=1)
    after = hashes(tmp_path / "b", YAML.replace(old, new), DATA.replace(old, new), num_fewshot=1)
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert parts <= changed, changed
    assert hashes(tmp_path / "c", num_fewshot=1) == before, "the same task elsewhere"


FORMS: dict[str, str] = {
    "a partial": "import functools\ndef cut(documents, n): return documents\nshorten = functools.partial(cut, n=5)\n",
    "a partial's function": (
        "import functools\ndef cut(documents): return documents if 5 else 0\nshorten = functools.partial(cut)\n"
    ),
    "a function that remembers": "import functools\n@functools.cache\ndef shorten(documents): return documents or 5\n",
    "an object": ("class Cut:\n    n = 5\n    def __call__(self, documents): return documents\nshorten = Cut()\n"),
    "an object's value": (
        "class Cut:\n    def __init__(self, n): self.n = n\n    def __call__(self, documents): return documents\n"
        "def at(n): return Cut(n)\nimport length\nshorten = at(length.N)\n"
    ),
    "a variable around it": (
        "import length\ndef at(n):\n    def cut(documents): return documents if n else n\n    return cut\n"
        "shorten = at(length.N)\n"
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_functions_in_every_form_are_told_apart_by_what_they_do(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's own tasks have partials by the dozen, as mmlu_pro's prompts are."""
    text = f"{FORMS[form]}\nimport datasets\ndef load{DATA.partition('def load')[2]}"
    found = []
    for number, folder in ((5, "a"), (5, "b"), (6, "c")):
        monkeypatch.setitem(sys.modules, "length", SimpleNamespace(N=number))
        found.append(hashes(tmp_path / folder, data=text.replace("5", str(number)))["process_docs"])
    assert found[0] == found[1] != found[2]


def test_a_set_that_is_bound_has_one_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep_tasks._plain({"a", "b", "c"}) == sweep_tasks._plain(frozenset({"c", "b", "a"}))


def test_documents_beyond_the_limit_change_nothing(tmp_path: Path) -> None:
    before = hashes(tmp_path / "a", limit=2)["documents"]
    assert hashes(tmp_path / "b", data=DATA.replace("five six", "five seven"), limit=2)["documents"] == before
    assert hashes(tmp_path / "c")["documents"] != before


DRAWS = """
import datasets, random
import numpy as np
import torch

def load(**_):
    drawn = [f"{random.random()} {np.random.rand()} {torch.rand(1).item()}" for _ in range(3)]
    return {"test": datasets.Dataset.from_list([{"text": text} for text in drawn])}
"""


class Indifferent(LM):
    """Likes all answers alike. The registry's own dummy would import every model of lm-eval."""

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError


def test_documents_that_a_task_draws_are_those_of_lm_evals_own_command(tmp_path: Path) -> None:
    """As RULER's are: each process draws anew, and a sweep must go on with what it began."""
    yaml = YAML.replace("process_docs: !function data.shorten\n", "").replace("fewshot_split: train\n", "")
    found = [hashes(tmp_path / folder, yaml, DRAWS)["documents"] for folder in ("a", "b")]
    assert found[0] == found[1]
    results = lm_eval.simple_evaluate(
        Indifferent(), tasks=["hashed"], task_manager=manager(tmp_path / "a"), bootstrap_iters=0
    )
    assert results is not None
    asked = [sample["doc"] for sample in results["samples"]["hashed"]]
    assert sweep_tasks._hash(enumerate(asked)) == found[0]


@pytest.mark.parametrize("name", ["../../outside", "a/b", "x" * 201])
def test_a_task_whose_samples_would_be_written_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "data.py").write_text(DATA)
    (tmp_path / "tasks" / "hashed.yaml").write_text(YAML.replace("task: hashed", f"task: {name}"))
    settings = parse_settings({"tasks": name, "presses": "none", "output_path": "o"})
    with pytest.raises(UsageError, match=r"cannot be part of a file's name.*rename it in its YAML") as caught:
        task_hashes(settings, manager(tmp_path / "tasks"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        ({"hashed": [3]}, "hashed has 3 documents, counted from 0, and no document 3"),
        ({"hash": [0]}, "did you mean 'hashed'"),
    ],
)
def test_documents_that_are_not_there_are_refused(samples: dict[str, list[int]], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        hashes(tmp_path / "a", samples=samples)
    chosen = hashes(tmp_path / "b", samples={"hashed": [0, 1]})
    assert chosen["documents"] == hashes(tmp_path / "c", limit=2)["documents"]


@pytest.mark.parametrize(
    ("tasks", "include_path", "with_defaults"),
    [
        ("kvpress_recall,kvpress_demo", False, [False]),
        ("kvpress_recall,own", True, [False]),
        ("arc_easy", False, [False, True]),
        ("arc_easy", True, [False, True]),
        ("mixed", True, [False, True]),
    ],
)
def test_lm_evals_own_tasks_are_indexed_only_where_they_are_asked_for(
    tasks: str, include_path: bool, with_defaults: list[bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = list[bool]()
    (tmp_path / "own.yaml").write_text("task: own\n")
    (tmp_path / "mixed.yaml").write_text("group: mixed\ntask: [own, arc_easy]\n")

    def made(include_path: list[str], metadata: object, include_defaults: bool = True) -> TaskManager:
        asked.append(include_defaults)
        return TaskManager(include_path=include_path, metadata=metadata, include_defaults=False)

    monkeypatch.setattr(sweep_tasks, "TaskManager", made)
    given = {"tasks": tasks, "presses": "none", "output_path": "o"}
    settings = parse_settings({**given, "include_path": str(tmp_path)} if include_path else given)
    found = sweep_tasks.task_manager(settings, cells_of(settings)[0])
    assert asked == with_defaults and "kvpress_recall" in found.all_tasks


@pytest.mark.parametrize("in_repository", [True, False])
def test_the_commit_is_lm_evals_and_git_says_nothing(
    in_repository: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT if in_repository else tmp_path)
    expected = evaluator.get_git_commit_hash()
    capfd.readouterr()
    with environment_asked_once():
        assert evaluator.get_git_commit_hash() == expected
    assert capfd.readouterr().err == ""


def test_the_environment_is_asked_once_in_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    monkeypatch.setattr(collect_env, "get_pretty_env_info", lambda: asked.append("once") or "packages")
    with environment_asked_once():
        results = [dict[str, Any](), dict[str, Any]()]
        for one in results:
            add_env_info(one)
    assert asked == ["once"] and [one["pretty_env_info"] for one in results] == ["packages"] * 2
    add_env_info({})
    assert asked == ["once", "once"]
