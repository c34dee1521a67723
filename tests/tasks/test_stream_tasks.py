"""The stream tasks: one text of all pages, whole books, and no other rolling protocol where that can be known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager
from repository import ROOT

from lm_eval_kvpress.errors import UsageError

TASKS = ROOT / "tasks"
PAGES = [" = One = \n \n A mill , and geese . \n ", " = Two = \n \n The ferry ' s rope . \n "]
STREAMS = ("wikitext_kvpress_stream", "pg19_kvpress_stream")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    books = [{"short_book_title": name, "url": f"ebooks/{name}", "text": name * 9} for name in ("ferry ", "chain ")]
    for name, records in {"wikitext2": [{"page": page} for page in PAGES], "pg19": books}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def documents(task: str, **metadata: Any) -> list[dict[str, Any]]:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    return list(manager.load([task])["tasks"][task].test_docs())


def test_the_wikitext_stream_is_its_pages_in_order_with_their_counts_summed(folder: Path) -> None:
    pages = documents("wikitext_kvpress", data_dir=str(folder))
    (stream,) = documents("wikitext_kvpress_stream", data_dir=str(folder))
    assert stream["text"] == "".join(page["text"] for page in pages)
    for count in ("num_words", "num_bytes"):
        assert stream[count] == sum(page[count] for page in pages)


def test_the_books_of_the_stream_are_those_of_the_other_task(folder: Path) -> None:
    chosen: dict[str, Any] = {"data_dir": str(folder), "books": ["chain"]}
    assert documents("pg19_kvpress_stream", **chosen, rolling="stream") == documents("pg19_kvpress", **chosen)


@pytest.mark.parametrize("task", STREAMS)
@pytest.mark.parametrize("arguments", [{"rolling": "prefix"}, {"press": "snapkv"}, {"pretrained": "builtin"}], ids=str)
def test_another_protocol_is_refused_in_one_line(folder: Path, task: str, arguments: dict[str, str]) -> None:
    with pytest.raises(UsageError) as caught:
        documents(task, data_dir=str(folder), **arguments)
    assert "rolling=stream" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("task", STREAMS)
def test_the_protocol_of_a_model_object_is_not_guessed(folder: Path, task: str) -> None:
    assert documents(task, data_dir=str(folder))
    assert documents(task, data_dir=str(folder), pretrained="builtin", rolling="stream", stream_budget=64)
