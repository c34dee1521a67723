"""A results file of another shape is refused in one line, whoever wrote it, and texts of one are printable."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_files import amend, write_results

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.data_files import as_csv, as_json
from lm_eval_kvpress.report.html import html
from lm_eval_kvpress.report.markdown import markdown
from lm_eval_kvpress.report.result_files import read_cell, read_results
from lm_eval_kvpress.report.results_schema import read_content


def kvpress(content: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = content["config"]["kvpress"]
    return facts


BAD: dict[str, Callable[[dict[str, Any]], object]] = {
    "results": lambda content: content.update(results=[1]),
    "results.recall": lambda content: content.update(results={"recall": "0.5"}),
    "config": lambda content: content.update(config="kvpress"),
    "date": lambda content: content.update(date="yesterday"),
    "n-samples.recall.effective": lambda content: content["n-samples"]["recall"].update(effective="3"),
    "n-samples.recall.original": lambda content: content["n-samples"]["recall"].update(original=math.nan),
    "versions": lambda content: content.update(versions=[1]),
    "task_hashes.recall": lambda content: content.update(task_hashes={"recall": 1}),
    "group_subtasks.mmlu": lambda content: content.update(group_subtasks={"mmlu": "law"}),
    "config.kvpress.press.name": lambda content: kvpress(content)["press"].update(name=None),
    "config.kvpress.press.arguments": lambda content: kvpress(content)["press"].update(arguments=[]),
    "config.kvpress.parity.passed": lambda content: kvpress(content).update(parity={"passed": "yes"}),
    "config.kvpress.tasks.recall.contexts_pressed": lambda content: kvpress(content)["tasks"]["recall"].pop(
        "contexts_pressed"
    ),
    "config.kvpress.tasks.recall.contexts_pressed.num_tokens": lambda content: kvpress(content)["tasks"]["recall"][
        "contexts_pressed"
    ].update(num_tokens=int("9" * 400)),
    "config.kvpress.tasks.recall.contexts_pressed.kept_share": lambda content: kvpress(content)["tasks"]["recall"][
        "contexts_pressed"
    ].update(kept_share="half"),
    "config.kvpress.tasks.recall.contexts_unpressed.kv_bytes_effective": lambda content: kvpress(content)["tasks"][
        "recall"
    ]["contexts_unpressed"].pop("kv_bytes_effective"),
    "config.kvpress.tasks.recall.tokens_held_back.most": lambda content: kvpress(content)["tasks"]["recall"].update(
        tokens_held_back={"least": 1, "median": 1}
    ),
    "config.kvpress.tasks.recall.texts_at_limit": lambda content: kvpress(content)["tasks"]["recall"].update(
        texts_at_limit="3"
    ),
    "config.kvpress.tasks.recall.tokens_generated": lambda content: kvpress(content)["tasks"]["recall"].update(
        tokens_generated=[3]
    ),
    "higher_is_better.recall": lambda content: content.update(higher_is_better={"recall": True}),
}


@pytest.mark.parametrize("place", BAD)
def test_what_is_of_another_type_is_named(tmp_path: Path, place: str) -> None:
    file = amend(write_results(tmp_path, "snapkv", 0.5), BAD[place])
    with pytest.raises(UsageError, match=rf"is not what lm-eval writes \({re.escape(place)}: ") as error:
        read_cell(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("text", ["[1, 2]", "7", "null", "[" * 100_000, '{"config": {}', "\x00", '"\\ud800'])
def test_what_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results_x.json").write_text(text)
    with pytest.raises(UsageError, match="results_x.json") as error:
        read_results([tmp_path])
    assert "\n" not in str(error.value)


def test_numbers_of_any_size_are_read(tmp_path: Path) -> None:
    file = write_results(tmp_path, "none", 0.0)
    file.write_text(file.read_text().replace('"acc,none": 0.5', f'"acc,none": {"9" * 5000}'))
    assert read_cell(file).tasks[0].metrics[0].value == math.inf
    file.write_text(file.read_text().replace("9" * 5000, '["a"]'))
    assert read_cell(file).tasks[0].metrics[0].value is None


def test_files_of_lm_eval_0_3_are_refused(tmp_path: Path) -> None:
    old = {"results": {"hellaswag": {"acc": 0.4, "acc_stderr": 0.01}}, "versions": {"hellaswag": 0}, "config": {}}
    (tmp_path / "results_x.json").write_text(json.dumps(old))
    with pytest.raises(UsageError, match=r"is of lm-eval 0\.3"):
        read_results([tmp_path])


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "results_pipe.json")
    with pytest.raises(UsageError):
        read_results([tmp_path / "results_pipe.json"])
    with pytest.raises(UsageError, match="no results_"):
        read_results([tmp_path])


def test_unprintable_characters_of_a_name_are_replaced_in_every_format(tmp_path: Path) -> None:
    press = "a\rb\x00c\u2028d\ud800e"
    file = write_results(tmp_path, "snapkv", 0.5)
    amend(file, lambda content: kvpress(content)["press"].update(name=press))
    assert read_content(file)["config"]["kvpress"]["press"]["name"] == "a\ufffdb\ufffdc\ufffdd\ufffde"
    report = build_report([tmp_path])
    for writer in (html, markdown, as_csv, as_json):
        written = writer(report)
        assert "a\ufffdb\ufffdc\ufffdd\ufffde" in written or "a\\ufffdb" in written
        assert written.encode("utf-8")
