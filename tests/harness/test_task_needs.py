"""What long-context tasks need is looked at before their texts are made, and RULER finds our tokenizer."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager
from repository import ROOT

from lm_eval_kvpress import cli
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness import plugin, task_needs
from lm_eval_kvpress.harness.checkpoint import BUILTIN, resolve_pretrained
from lm_eval_kvpress.harness.task_needs import prepared

FOLDER = resolve_pretrained(BUILTIN)


@pytest.mark.parametrize(
    ("model", "arguments", "metadata", "tokenizer", "pretrained"),
    [
        ("pythia-kvpress", {"pretrained": "builtin"}, {}, FOLDER, "builtin"),
        ("kvpress", {"pretrained": "builtin"}, {"tokenizer": "mine"}, "mine", "builtin"),
        ("pythia-kvpress", {}, {}, None, "EleutherAI/pythia-2.8b"),
        ("kvpress", {"pretrained": "org/name"}, {}, None, "org/name"),
        ("hf", {"pretrained": "builtin"}, {}, None, "builtin"),
    ],
)
def test_ruler_finds_the_tokenizer_of_the_model(
    model: str, arguments: dict[str, Any], metadata: dict[str, Any], tokenizer: str | None, pretrained: str
) -> None:
    found = prepared(model, arguments, arguments | metadata, ["gsm8k"])
    assert (found.get("tokenizer"), found["pretrained"]) == (tokenizer, pretrained)


def test_a_task_manager_of_a_program_gets_the_built_in_tokenizer() -> None:
    plugin.include_tasks()
    manager = TaskManager(include_path=str(ROOT / "tasks"), include_defaults=False, metadata={"pretrained": "builtin"})
    assert manager.metadata == {"pretrained": "builtin", "tokenizer": FOLDER}


@pytest.mark.parametrize("lengths", [[64, 513], 513, "1k", "1M", "513"])
def test_texts_longer_than_the_model_are_refused(checkpoint_dir: Path, lengths: Any) -> None:
    arguments = {"pretrained": str(checkpoint_dir)}
    with pytest.raises(UsageError, match="takes 512 tokens at most") as raised:
        prepared("kvpress", arguments, arguments | {"max_seq_lengths": lengths}, ["babilong_qa1"])
    assert "\n" not in str(raised.value)
    beyond = arguments | {"allow_extrapolation": True}
    assert prepared("kvpress", beyond, beyond | {"max_seq_lengths": lengths}, ["babilong_qa1"])
    with pytest.raises(UsageError, match="takes 100 tokens at most"):
        prepared("kvpress", beyond | {"max_length": 100}, {"max_seq_lengths": lengths}, ["babilong_qa1"])


@pytest.mark.parametrize("task", ["niah_single_1", "ruler_cwe", "ruler", "niah_*", "longcxt", "ruler_qa_squad"])
def test_rulers_own_length_is_looked_at_where_no_other_is_given(monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    monkeypatch.setattr(task_needs, "_has_punkt", lambda: True)
    monkeypatch.setattr(task_needs.importlib.util, "find_spec", lambda name: True)
    built_in = {"pretrained": "builtin"}
    with pytest.raises(
        UsageError, match=r"RULER's texts have 4096 tokens: builtin takes 2048 .*\{\"max_seq_lengths\": \["
    ):
        prepared("pythia-kvpress", built_in, built_in, ["gsm8k", task])
    prepared("pythia-kvpress", built_in, {"max_seq_lengths": [2048]}, [task])
    prepared("pythia-kvpress", built_in, built_in, ["babilong_qa1", "longbench_qasper", "gsm8k"])


@pytest.mark.parametrize("wrong", ["abc", 0, 0.5, True, [4096]])
def test_a_max_length_that_is_no_number_is_one_line(wrong: Any) -> None:
    """This is read before the model looks at its arguments."""
    with pytest.raises(UsageError, match="^max_length=.* must be "):
        prepared("kvpress", {"pretrained": "builtin", "max_length": wrong}, {}, ["gsm8k"])


@pytest.mark.parametrize("lengths", [[64, 512], "0k", None])
def test_texts_that_fit_are_not(checkpoint_dir: Path, lengths: Any) -> None:
    prepared("kvpress", {"pretrained": str(checkpoint_dir)}, {"max_seq_lengths": lengths}, ["babilong_qa1"])


@pytest.mark.parametrize(
    "task",
    ["niah_single_1", "ruler", "longcxt", "niah_*", "ruler_?we", "longbench", "longbench*", "longbench_qasper"]
    + ["minerva_math500", "minerva*"],
)
def test_missing_libraries_are_one_line(monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    monkeypatch.setattr(task_needs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=rf"task '{re.escape(task)}' needs .*: pip install 'lm-eval-kvpress\[longcontext\]'"
    ):
        prepared("kvpress", {}, {}, [task])
    prepared("kvpress", {}, {}, ["longbench2_graph", "gsm8k"])


def test_missing_sentences_are_one_line_and_only_where_essays_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    nltk = pytest.importorskip("nltk")
    asked: list[str] = []
    monkeypatch.setattr(nltk, "download", lambda name, quiet: asked.append(name))
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(task_needs.importlib.util, "find_spec", lambda name: True)
    for task in ("niah_single_2", "niah_*", "niah_single_[12]", "ruler", "longcxt"):
        with pytest.raises(UsageError, match=f"task '{re.escape(task)}' .*`python -m nltk.downloader punkt_tab"):
            prepared("kvpress", {}, {}, ["niah_single_1", task])
    assert set(asked) == {"punkt_tab"}
    prepared("kvpress", {}, {}, ["niah_single_1", "ruler_cwe"])


def test_lm_evals_command_looks_at_it(checkpoint_dir: Path) -> None:
    plugin.check_arguments()

    def configured(model: str, length: int) -> EvaluatorConfig:
        given = {"model": model, "model_args": {"pretrained": str(checkpoint_dir)}, "tasks": "a,b"}
        return EvaluatorConfig.from_cli(Namespace(**given, metadata={"max_seq_lengths": [length]}))

    assert configured("kvpress", 512).metadata["pretrained"] == str(checkpoint_dir)
    assert configured("hf", 513).metadata["max_seq_lengths"] == [513]
    with pytest.raises(UsageError, match="takes 512 tokens"):
        configured("kvpress", 513)


def test_a_command_prints_the_built_in_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["builtin"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt_neox"
