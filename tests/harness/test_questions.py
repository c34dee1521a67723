"""Each known task's own prompt is cut between its context and its question; what has no question is said."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from jinja2 import Template
from lm_eval.tasks._yaml_loader import load_yaml

from lm_eval_kvpress import recall
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.questions import Rule, known_rules, rule_for
from lm_eval_kvpress.harness.settings import Settings
from lm_eval_kvpress.presses.parse import parse_press

TASKS = Path(lm_eval.tasks.__file__).parent
SETTINGS = Settings(parse_press("none"), query_aware=False)
END = "here the context ends."
DOCUMENT: dict[str, Any] = {
    **dict.fromkeys(("context", "input", "text"), f"Question: a few of these stand in texts. Answer: yes. {END}"),
    "question": "what is asked for?",
    "choices": ["one", "two", "three", "four"],
    "options": ["one", "two", "three", "four"],
}
INFINITE_INPUTS = {
    "kv_retrieval": 'Key: "ab"',
    "code_run": "func_7(3)",
    "math_find": "The largest number of the list is:",
}
SCROLLS = {"ContractNLI": "contractnli", "Qasper": "qasper", "GovReport": "govreport", "QuALITY": "quality"}
LONGPROC = {  # the last parts of its prompts, github.com/princeton-pli/LongProc
    "longproc_html_to_tsv_2k": "[TARGET INFORMATION]\nBased on the HTML webpage above",
    "longproc_path_traversal_2k": "Now find the route from A to B",
    "longproc_tom_tracking_2k": "[QUESTION]\nWhere is it?\n\n[YOUR ANSWER]",
    "longproc_pseudo_to_code_2k": "[CODE]:\n",
    "longproc_countdown_2k": "[Problem]\nNow, solve the following problem.",
    "longproc_travel_planning_2k": "YOUR TASK:\nNow, make a trip plan",
}


def strings_of(module: str) -> Iterator[str]:
    """String constants that a module of RULER begins prompts from; importing it would ask for word lists."""
    for node in ast.walk(ast.parse((TASKS / "ruler" / f"{module}.py").read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "{context}" in node.value:
            yield node.value


def prompts(family: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Task, document and prompt."""
    if family == "ruler":
        (niah,) = strings_of("niah_utils")
        niah = niah.format(type_needle_v="numbers", context=END, query="x")
        one = niah.replace("Some", "A").replace("are all", "is").replace("are", "is").replace("numbers", "number")
        yield from ((task, {}, text) for task, text in (("niah_multivalue", niah), ("niah_single_1", one)))
        for name in ("vt", "cwe", "fwe", "qa"):
            (template,) = strings_of(f"{name}_utils")
            text = template.format(context=f"Answer the question. {END}", query=DOCUMENT["question"])
            yield ("ruler_qa_squad" if name == "qa" else f"ruler_{name}"), {}, text
    elif family == "scrolls":
        from lm_eval.tasks.scrolls import task as scrolls

        for name, task in SCROLLS.items():
            yield f"scrolls_{task}", DOCUMENT, getattr(scrolls, name).doc_to_text(None, DOCUMENT)
    elif family == "longproc":
        yield from ((task, {}, f"[TASK] {END}\n{end}") for task, end in LONGPROC.items())
    else:
        for file in sorted((TASKS / family).glob("*.yaml")):
            config = load_yaml(file, resolve_func=family == "infinitebench")
            if "doc_to_text" in config and config["task"] != "infinitebench_longbook_sum_en":
                kind, make = config["task"].removeprefix("infinitebench_"), config["doc_to_text"]
                document = {**DOCUMENT, "input": INFINITE_INPUTS.get(kind, DOCUMENT["question"])}
                document = DOCUMENT if family == "babilong" else document
                yield config["task"], document, make(document) if callable(make) else Template(make).render(document)


FAMILIES = {
    "ruler": 6,
    "longbench": 34,
    "longbench2": 20,
    "babilong": 20,
    "infinitebench": 10,
    "scrolls": 4,
    "longproc": 6,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_task_of_a_family_is_cut_after_its_context(family: str) -> None:
    found = list(prompts(family))
    assert len(found) == FAMILIES[family]
    for task, document, text in found:
        few_shot = f"{text} an answer\n\n{text}"
        for prompt in (text, few_shot):
            start = rule_for(task, SETTINGS).start(prompt, document)
            assert start is not None, task
            assert start > prompt.rindex(END), task
            assert prompt.count(END, 0, start) == prompt.count(END), task
            assert not prompt[start - 1 : start + 1].isalnum(), (task, prompt[start - 9 : start + 9])
            for asked in {DOCUMENT["question"], document.get("input", "")} - {DOCUMENT["input"]}:
                assert prompt.rfind(asked) < 0 or prompt.rfind(asked) >= start or "math_find" in task, (task, asked)


def test_recall_questions_are_found() -> None:
    document = recall.recall_document(0, distance=48, kind="word")
    prompt = document.context + document.question
    start = rule_for("kvpress_recall_gen", SETTINGS).start(prompt, {})
    assert prompt[start:] == document.question.lstrip()


@pytest.mark.parametrize("task", ["gsm8k", "gsm8k_cot", "hendrycks_math500", "aime24", "infinitebench_longbook_sum_en"])
def test_a_task_without_a_context_of_its_own_is_refused(task: str) -> None:
    with pytest.raises(UsageError, match=rf"in task '{task}', so there is nothing to compress without it") as raised:
        rule_for(task, SETTINGS)
    assert "\n" not in str(raised.value)


def test_an_unknown_task_needs_a_rule_of_the_user() -> None:
    with pytest.raises(
        UsageError, match="where the question of task 'mine' begins is not known: pass question_pattern"
    ):
        rule_for("mine", SETTINGS)
    given = Settings(parse_press("none"), query_aware=False, question_pattern="Q")
    assert rule_for("gsm8k", given) == Rule(pattern="Q"), "the user's rule comes before the table's"
    assert str(rule_for("gsm8k", given)) == "pattern 'Q'"


def test_every_row_has_one_rule_and_names_tasks_of_lm_eval() -> None:
    names = {
        name
        for file in TASKS.rglob("*")
        if file.suffix == ".yaml" or file.name.endswith("_yaml")
        for name in _task_names(file)
    } | {"kvpress_recall", "kvpress_recall_gen"}
    for rule in known_rules():
        assert sum(part is not None for part in (rule.pattern, rule.field, rule.none)) == 1, rule
        re.compile(rule.pattern or "")
        for pattern in rule.tasks:
            assert any(fnmatchcase(name, pattern) for name in names), f"{pattern} names no task"


def _task_names(file: Path) -> list[str]:
    return re.findall(r"^task: *[\"']?([\w-]+(?:\.\w+)?)", file.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(
    ("pattern", "prompt", "start"),
    [
        ("Q:", "Q: a\nA: b\n\ntext Q: c", 16),  # an example's question, then the document's own
        ("Q:", "Q: a", 0),
        ("(?=Q:)", "text Q: c", 5),
        (r"(?<=\n)", "text\n", None),  # an empty match at the very end is no question
        ("Q:", "text q: c", None),
        ("问题：", "上下文 问题：谁？ 问题：哪里？", 10),
    ],
)
def test_the_last_match_begins_the_question(pattern: str, prompt: str, start: int | None) -> None:
    assert Rule(pattern=pattern).start(prompt, {}) == start
