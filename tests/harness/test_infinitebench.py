"""InfiniteBench's tasks read a data set of the hub's form, which lm-eval's own YAML does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from lm_eval_kvpress.harness import infinitebench

TASKS = Path(lm_eval.tasks.__file__).parent / "infinitebench"
READ = datasets.load_dataset
ROW = {"id": 3, "context": "A book.", "input": "Who is it?", "answer": [7, 8], "options": []}


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The splits' names are the hub's; numbers among the answers and empty options are what its features are for."""
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("passkey", "longbook_qa_eng")}
    for file in files.values():
        Path(file).write_text(json.dumps(ROW) + "\n")

    def load_dataset(path: str, name: str | None, **given: Any) -> Any:
        assert path == infinitebench.DATASET
        return READ("json", data_files=files, cache_dir=str(tmp_path / "cache"), **given)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(ConfigurableTask, "download", ConfigurableTask.download)  # put back afterwards


def task(name: str) -> ConfigurableTask:
    return ConfigurableTask(config=load_yaml(TASKS / f"infinitebench_{name}.yaml"))


def test_features_are_read_and_splits_found(local: None) -> None:
    infinitebench.read_data_set()
    mended = ConfigurableTask.download
    infinitebench.read_data_set()
    assert ConfigurableTask.download is mended, "wrapped once"
    for name, text in {"passkey": "A book.\n\nWho is it?", "longbook_qa_en": "A book.\n\nQuestion: Who is it?"}.items():
        (document,) = task(name).test_docs()
        assert document == {**ROW, "answer": ["7", "8"]}
        assert task(name).doc_to_text(document).startswith(text)


def test_lm_evals_own_download_still_needs_it(local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it does not, the module can go."""
    monkeypatch.setattr(
        ConfigurableTask, "download", getattr(ConfigurableTask.download, "__wrapped__", ConfigurableTask.download)
    )
    with pytest.raises(AttributeError, match="'str' object has no attribute 'items'"):
        task("passkey")


def test_other_data_sets_are_downloaded_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        ConfigurableTask, "download", lambda self, dataset_kwargs=None, **_: seen.append(dataset_kwargs)
    )
    infinitebench.read_data_set()
    other = object.__new__(ConfigurableTask)
    other.DATASET_PATH, given = "other", {"features": {"id": {"dtype": "int64"}}}
    ConfigurableTask.download(other, given)
    assert seen == [given] and seen[0] is given
