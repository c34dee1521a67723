"""Made-up documents in place of the hub's data sets, for the field's long-context tasks as lm-eval defines them.

The fields are those that the data sets have. Every context holds whatever could be taken for a question, the
document's own question among it, and ends with one sentence that the tests look for. LongProc's prompts come whole from
the hub; theirs have the headings and the order of github.com/princeton-pli/LongProc (data/*/prompts.yaml).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import datasets

from lm_eval_kvpress.harness.infinitebench import DATASET as INFINITEBENCH

QUESTION = "Who fed the seven grey geese?"
INPUTS = {  # InfiniteBench's tasks that read their question
    "code_run": "Please give me the exact number of the return value of func_7(3).",
    "math_find": "The largest number of the list is:",
}
INFINITEBENCH_SPLITS = (
    *("passkey", "kv_retrieval", "number_string", "code_run", "code_debug", "math_find", "math_calc"),
    *("longbook_qa_eng", "longbook_choice_eng", "longbook_sum_eng", "longbook_qa_chn", "longdialogue_qa_eng"),
)
QUESTIONS = [QUESTION, *INPUTS.values()]
DECOYS = f"""Question: Is this the question? Answer: No. Query: Is this? Hypothesis: It is.
问题：是这个吗？ 会议总结：不是。 Now, write a one-page summary of this line. Next line of code: pass
What is the correct answer to this question: none. Please enter the final count of unique paragraphs in this line.
Please give me the exact number of the return value of func_1(2). Which funtion has deliberate error? None.
Which character is most likely "$$MASK$$"? Nobody. [TARGET INFORMATION] None. Now find the route from A to B.
[QUESTION] None. [CODE]: none. [Problem] None. YOUR TASK: none. {" ".join(QUESTIONS)}"""
CONTEXT = f"{DECOYS} {'The cold river ran past an old mill. ' * 8}Here the context ends."
CHOICES = ["the miller", "the baker", "the sailor", "the clerk"]

LONGPROC = {
    "html_to_tsv": "[TASK]\nRead a page.\n\n[INPUT WEBPAGE]\n{context}\n\n[TARGET INFORMATION]\n{question}",
    "path_traversal": "[TASK]\nFind a route.\n\n[PROBLEM]\n{context}\n\nNow find the route from A to B. {question}",
    "tom_tracking": "[PROBLEM]\nRead it.\n\n[STORY]\n{context}\n\n[QUESTION]\n{question}\n\n[YOUR ANSWER]\n",
    "pseudo_to_code": "[TASK]:\nWrite code.\n\n[PSEUDOCODE]:\n{context}\n\n[CODE]:\n",
    "countdown": "[TASK]\nReach a number.\n\n[EXAMPLES]\n{context}\n\n[Problem]\nNow, solve it. {question}",
    "travel_planning": "TASK:\nPlan a trip.\n\nEXAMPLES:\n{context}\n\nYOUR TASK:\nNow, make a trip plan. {question}",
}


def load_dataset(path: str, name: str | None = None, split: str | None = None, **given: Any) -> Any:
    """A document for each of these tasks, in the shape in which they ask ``datasets.load_dataset`` for theirs."""
    if path == "json":  # SCROLLS: zip://TASK/SPLIT.jsonl::...
        return {part: _documents(_scrolls(file.split("/")[2])) for part, file in given["data_files"].items()}
    if path == INFINITEBENCH:
        assert isinstance(given["features"], datasets.Features), given
        return {part: _documents(_infinitebench(part)) for part in INFINITEBENCH_SPLITS}
    make = ROWS[path]
    return _documents(make(name or split or "")) if split else _Splits(make, name)


def _documents(row: Mapping[str, Any]) -> datasets.Dataset:
    """Several of the same, because few-shot examples are drawn from them."""
    return datasets.Dataset.from_list([dict(row)] * 6)


class _Splits(dict[str, datasets.Dataset]):
    """Every split that a task names."""

    def __init__(self, make: Callable[[str], Mapping[str, Any]], name: str | None) -> None:
        super().__init__()
        self._make, self._name = make, name

    def __missing__(self, split: str) -> datasets.Dataset:
        return _documents(self._make(self._name or split))


def _longbench(name: str) -> Mapping[str, Any]:
    return {"context": CONTEXT, "question": f"{QUESTION}\n", "answers": CHOICES[:1], "all_classes": CHOICES}


def _longbench2(name: str) -> Mapping[str, Any]:
    return {"context": CONTEXT, "question": f" {QUESTION}", "choices": CHOICES, "answer": 0}


def _babilong(name: str) -> Mapping[str, Any]:
    return {"input": f"{CONTEXT}\n", "question": f"{QUESTION} ", "target": CHOICES[0]}


def _infinitebench(name: str) -> Mapping[str, Any]:
    return {"context": CONTEXT, "input": INPUTS.get(name, QUESTION), "answer": CHOICES[:1], "options": CHOICES}


def _longproc(name: str) -> Mapping[str, Any]:
    prompt = LONGPROC[name.rpartition("_")[0]].format(context=CONTEXT, question=QUESTION)
    return {"input_prompt": prompt, "reference_output": CHOICES[0], "metadata": json.dumps({})}


def _scrolls(name: str) -> Mapping[str, Any]:
    """One text: the question, then QuALITY's choices, then the context; the summaries' texts are the context alone."""
    choices = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", CHOICES, strict=True))
    before = {"gov_report": [], "summ_screen_fd": [], "quality": [QUESTION, choices]}.get(name, [QUESTION])
    answer = {"contract_nli": "Entailment", "qasper": "Yes"}.get(name, CHOICES[0])
    return {"id": "0", "pid": "0_0", "input": "\n\n".join([*before, CONTEXT]), "output": answer}


ROWS: Mapping[str, Callable[[str], Mapping[str, Any]]] = {
    "Xnhyacinth/LongBench": _longbench,
    "recursal/longbench-v2": _longbench2,
    "RMT-team/babilong-1k-samples": _babilong,
    "PrincetonPli/LongProc": _longproc,
    "openai/gsm8k": lambda name: {"question": QUESTION, "answer": "#### 7"},
    "HuggingFaceH4/MATH-500": lambda name: {"problem": QUESTION, "solution": "\\boxed{7}", "answer": "7"},
    "Maxwell-Jia/AIME_2024": lambda name: {"Problem": QUESTION, "Answer": 7},
}
"""Data set of the hub -> the document of its configuration, or of its split where it has none."""
