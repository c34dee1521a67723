"""A shard's folder says who answered, each once, and which cells are done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.sweep.shards.record import FILE, ShardRecord, note_cells, note_workers, read_record
from lm_eval_kvpress.sweep.workers.jobs import WorkerFacts


def facts(device: str) -> WorkerFacts:
    return WorkerFacts("node1", {}, {}, None, {"device": device})


def test_processes_of_several_calls_are_all_noted_each_once(tmp_path: Path) -> None:
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        note_workers(tmp_path, [facts(device)])
    assert read_record(tmp_path).facts == [facts("cuda:0"), facts("cuda:1")]


def test_a_cell_is_done_until_it_is_begun_again(tmp_path: Path) -> None:
    note_cells(tmp_path, ["a", "b"], are_answered=True)
    note_cells(tmp_path, ["b", "c"], are_answered=False)
    assert read_record(tmp_path).cells == ["a"]
    note_cells(tmp_path, ["b", "c"], are_answered=True)
    assert read_record(tmp_path).cells == ["a", "b", "c"]


def nothing(file: Path) -> None: ...


def damaged(file: Path) -> None:
    file.write_text("{")


@pytest.mark.parametrize("harm", [nothing, damaged])
def test_answers_of_unknown_processes_are_refused(harm: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "1-of-2"
    assert read_record(folder) == ShardRecord()
    (folder / "cells" / "a").mkdir(parents=True)
    (folder / "cells" / "a" / "answers.sqlite").touch()
    harm(folder / FILE)
    with pytest.raises(UsageError, match="shard.json is gone or damaged: remove .*1-of-2 and run shard 1/2 again"):
        read_record(folder)
