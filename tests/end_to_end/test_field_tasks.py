"""The field's long-context tasks as lm-eval builds them, by name: where their questions begin, and that they run.

RULER's tasks make their own texts. The others' data sets are on the hub, and made-up documents stand for them
(`field_documents`). lm-eval lists its thousands of tasks once for all tests here, which takes most of their time.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.tasks
import pytest
import wonderwords
from field_documents import CHOICES, CONTEXT, DECOYS, QUESTIONS, load_dataset
from lm_eval.api.instance import Instance
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness import plugin
from lm_eval_kvpress.harness.model import KVPress, PythiaKVPress
from lm_eval_kvpress.harness.questions import known_rules, rule_for
from lm_eval_kvpress.harness.settings import Settings
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.report.build import build_report

pytestmark = pytest.mark.xdist_group("field tasks")  # one list of tasks for all

LENGTH = 1024  # below it ruler_cwe has no words
SETTINGS = Settings(parse_press("none"), query_aware=False)
OWN_TEXTS = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_cwe", "ruler_fwe"]
FAMILIES = {  # prefix -> tasks of lm-eval, and those of them whose prompts hold the document's own question
    "longbench_": (34, 25),
    "longbench2_": (20, 20),
    "babilong_": (20, 20),
    "infinitebench_": (11, 8),
    "longproc_": (16, 14),
    "scrolls_": (7, 5),
}
WITHOUT_QUESTION = {
    "gsm8k": "a word problem is question and context in one",
    "hendrycks_math500": "a word problem is question and context in one",
    "aime24": "a word problem is question and context in one",
    "infinitebench_longbook_sum_en": "the book ends the prompt, and what is asked stands before it",
}
SCROLLS = Path(lm_eval.tasks.__file__).parent / "scrolls" / "scrolls_qasper.yaml"


class FewAdjectives(wonderwords.RandomWord):
    """RULER sorts all pairs of adjective and noun when it is imported: six million, in 15 seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._categories = {**self._categories, "adjectives": self._categories["adjectives"][:50]}


@pytest.fixture(scope="module")
def manager() -> Iterator[TaskManager]:
    """lm-eval's own, as its command makes it for the built-in checkpoint; data sets of the hub are made up."""
    plugin.include_tasks()
    plugin.read_infinitebench()
    scrolls = sys.modules[load_yaml(SCROLLS)["class"].__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wonderwords, "RandomWord", FewAdjectives)
        for owner in (datasets, scrolls):
            patch.setattr(owner, "load_dataset", load_dataset)
        patch.setattr(scrolls, "_download_metric", lambda: "")  # SCROLLS' metric is a script on the hub
        patch.setattr(scrolls, "load", lambda *_, **__: None)
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "not asked for")
        yield TaskManager(metadata={"pretrained": "builtin", "max_seq_lengths": [LENGTH]})


@pytest.fixture(scope="module")
def own_texts(manager: TaskManager) -> dict[str, Any]:
    """RULER's tasks that make their own texts: 500 each, in a second or two."""
    return tasks_of(manager, OWN_TEXTS)


@pytest.fixture(scope="module")
def agnostic() -> KVPress:
    return KVPress(pretrained="builtin", device="cpu", press="snapkv", compression_ratio=0.5, query_aware=False)


def tasks_of(manager: TaskManager, names: Sequence[str]) -> dict[str, Any]:
    return dict(manager.load(list(names))["tasks"])


def chat(messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """ChatML, as SmolLM2 and Qwen have it; the last turn is left open where an answer has begun."""
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)
    return f"{text}<|im_start|>assistant\n" if add_generation_prompt else text.removesuffix("<|im_end|>\n")


def first_requests(task: Any, *, in_chat: bool) -> list[Instance]:
    """lm-eval's own requests for the task's first document."""
    given = {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": chat} if in_chat else {}
    task.build_all_requests(limit=1, rank=0, world_size=1, **given)
    return list(task.instances)


def split(request: Instance) -> tuple[str, str]:
    """The prompt before its question, and from there."""
    prompt = request.args[0]
    start = rule_for(request.task_name or "", SETTINGS).start(prompt, request.doc)
    assert start is not None, f"{request.task_name}: no question in {prompt[-300:]!r}"
    return prompt[:start], prompt[start:]


def evaluate(lm: KVPress, manager: TaskManager, folder: Path, tasks: dict[str, Any]) -> dict[str, Any]:
    """One document of each task, answered by the model; results and samples are written as lm-eval's command does."""
    tracker = EvaluationTracker(output_path=str(folder))
    results = lm_eval.simple_evaluate(
        lm, tasks=list(tasks.values()), task_manager=manager, limit=1, gen_kwargs="max_gen_toks=4", bootstrap_iters=0
    )
    tracker.general_config_tracker.log_experiment_args("kvpress", "pretrained=builtin", None, None, False)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in tasks:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    return dict(results)


def check_record(results: dict[str, Any], task: str) -> None:
    """The context of the task's one document was compressed without its question."""
    record = results["config"]["kvpress"]["tasks"][task]
    assert record["tokens_held_back"]["least"] > 4, record
    assert record["num_prompts_without_question"] == record["num_prompts_without_context"] == 0, record
    counts = [record[contexts]["num_contexts"] for contexts in ("contexts_pressed", "contexts_unpressed")]
    assert counts == [1, 0], record
    assert record["contexts_pressed"]["kept_share"] == pytest.approx(0.5, abs=0.01), record


def metrics_reported(folder: Path) -> set[str]:
    """The columns of metrics that a report shows, each with a value."""
    (table,) = build_report([folder]).tables
    row = table.rows[-1]
    shown = {column.key for column in table.shown_columns if column.metric}
    assert all(row.entries[key].number is not None for key in shown), row
    return shown


def test_a_made_up_context_holds_what_each_pattern_looks_for() -> None:
    """Otherwise the first match would do as well as the last."""
    for rule in known_rules():
        if rule.pattern and not rule.tasks[0].startswith(("niah", "ruler", "kvpress")):
            assert re.search(rule.pattern, DECOYS), rule
    assert all(text in DECOYS for text in QUESTIONS)


@pytest.mark.parametrize("in_chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_prompt_is_cut_between_its_context_and_its_question(
    manager: TaskManager, family: str, in_chat: bool
) -> None:
    names = [name for name in manager.all_subtasks if name.startswith(family)]
    asking = set()
    for name, task in tasks_of(manager, names).items():
        for request in [] if name in WITHOUT_QUESTION else first_requests(task, in_chat=in_chat):
            assert request.task_name == name
            before, question = split(request)
            _, context, between = before.rpartition(CONTEXT)
            assert context and CONTEXT not in question, f"{name} holds back {question[-400:]!r}"
            assert between == "" or between.endswith("\n"), f"{name} begins {question[:80]!r} inside a line"
            asked = [text for text in (*QUESTIONS, *CHOICES) if text in between + question]
            assert all(text in question and text not in between for text in asked), f"{name} compresses {between!r}"
            asking |= {name} if set(asked) & set(QUESTIONS) else set()
    assert (len(names), len(asking)) == FAMILIES[family], f"without the document's own: {sorted(set(names) - asking)}"


@pytest.mark.parametrize("in_chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("name", OWN_TEXTS)
def test_rulers_own_texts_are_cut_before_the_question(own_texts: dict[str, Any], name: str, in_chat: bool) -> None:
    (request,) = first_requests(own_texts[name], in_chat=in_chat)
    before, question = split(request)
    text, prefix = request.doc["input"], request.doc["gen_prefix"]
    context, asked = text[: text.rindex("\n")], text[text.rindex("\n") :].strip()
    assert context.strip() in before and asked in question, (before[-200:], question)
    assert question.endswith(prefix) and question.index(asked) == 0, question
    answers = request.doc["outputs"]
    assert answers and all(answer in before and answer not in question for answer in answers), answers


@pytest.mark.parametrize("name", WITHOUT_QUESTION)
def test_a_task_without_a_question_apart_is_refused_in_one_line(
    manager: TaskManager, agnostic: KVPress, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UsageError, match=f"{WITHOUT_QUESTION[name]} in task '{name}'") as raised:
        evaluate(agnostic, manager, tmp_path, tasks_of(manager, [name]))
    assert "\n" not in str(raised.value)


def test_rulers_own_texts_run_and_are_reported(manager: TaskManager, own_texts: dict[str, Any], tmp_path: Path) -> None:
    lm = PythiaKVPress(pretrained="builtin", device="cpu", press="keydiff", compression_ratio=0.5, query_aware=False)
    results = evaluate(lm, manager, tmp_path, own_texts)
    for name in OWN_TEXTS:
        check_record(results, name)
        assert 0 <= results["results"][name][f"{LENGTH},none"] <= 1
    assert metrics_reported(tmp_path) == {f"{name}.{LENGTH}" for name in [*OWN_TEXTS, "ruler"]}, "none of -1 for 4096"


@pytest.mark.parametrize(
    ("name", "metric"), [("longbench_qasper", "score"), ("longbench2_graph", "acc"), ("scrolls_quality", "acc_norm")]
)
def test_a_task_of_the_hub_runs(
    manager: TaskManager, agnostic: KVPress, tmp_path: Path, name: str, metric: str
) -> None:
    results = evaluate(agnostic, manager, tmp_path, tasks_of(manager, [name]))
    check_record(results, name)
    pressed = results["config"]["kvpress"]["tasks"][name]["contexts_pressed"]
    assert pressed["num_tokens"] >= len(agnostic.tok_encode(CONTEXT)), "all of the context is compressed"
    assert 0 <= results["results"][name][f"{metric},none"] <= 1
    assert metrics_reported(tmp_path) == {f"{name}.{metric}"}
