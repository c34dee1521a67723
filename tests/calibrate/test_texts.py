"""Texts come from files or tasks, and windows cover them without overlap."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from lm_eval_kvpress.calibrate import texts
from lm_eval_kvpress.calibrate.texts import read_texts, sha256_of, windows_of
from lm_eval_kvpress.errors import UsageError


def test_files_of_text_and_of_json_lines(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("one\n\ntwo\n", encoding="utf-8")
    lines.write_text('{"text": "first"}\n\n{"text": " "}\n{"text": "second", "id": 3}\n', encoding="utf-8")
    assert read_texts(str(plain)) == ["one\n\ntwo\n"]
    assert read_texts(str(lines)) == ["first", "second"]
    assert sha256_of(["ab", "c"]) != sha256_of(["a", "bc"])


def test_a_task_gives_its_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "TaskManager", functools.partial(TaskManager, include_defaults=False))  # read in no time
    stories = read_texts("kvpress_story")
    assert len(stories) > 1 and all(len(story) > 1_000 for story in stories)
    assert read_texts("kvpress_recall")[0]


@pytest.mark.parametrize(
    ("content", "ending", "message"),
    [
        ("", ".txt", "holds no text"),
        ('{"text": 3}\n', ".jsonl", "line 1"),
        ('{"text": "a"}\nnot json\n', ".jsonl", "line 2"),
        (None, ".txt", "cannot be read"),
        (None, "", "neither a file nor a task"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, ending: str, message: str
) -> None:
    file = tmp_path / f"data{ending}"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    monkeypatch.setattr(texts, "TaskManager", functools.partial(TaskManager, include_defaults=False))
    with pytest.raises(UsageError, match=message) as caught:
        read_texts(str(file))
    assert "\n" not in str(caught.value)


def test_windows_are_cut_until_there_are_enough_tokens() -> None:
    documents = [list(range(10)), list(range(100, 103)), list(range(200, 220))]
    assert windows_of(documents, length=4, num_tokens=100, least=3) == [
        *([0, 1, 2, 3], [4, 5, 6, 7], [100, 101, 102]),
        *([200 + 4 * place + index for index in range(4)] for place in range(5)),
    ]
    assert windows_of(documents, length=8, num_tokens=9, least=1) == [[0, 1, 2, 3, 4, 5, 6, 7], [8]]
