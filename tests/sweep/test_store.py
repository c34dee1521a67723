"""A sweep's folder has one writer, one set of settings, tasks and weights; what is not a sweep's is left alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lm_eval_kvpress.engine.outcomes import Generated
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.records.totals import ContextRecord
from lm_eval_kvpress.sweep.store import SweepStore

TASKS, CHECKPOINT = {"t": {"documents": "1", "generation_kwargs": "2"}}, {"weights": "1", "tokenizer": "2"}
SETTINGS = {"tasks": ["a"], "limit": 3}
ANSWERS = {"key": Generated((1,), ContextRecord(7, (7.0,), 100, 100, False))}


def begun(folder: Path) -> SweepStore:
    store = SweepStore(folder, SETTINGS)
    store.begin(TASKS, CHECKPOINT)
    store.cell("a").answers.add(ANSWERS)
    return store


def test_other_settings_and_two_sweeps_in_one_folder_are_refused(tmp_path: Path) -> None:
    first = begun(tmp_path)
    with pytest.raises(UsageError, match="being written by another sweep"):
        SweepStore(tmp_path, SETTINGS)
    first.close()
    with pytest.raises(UsageError, match="never mixed: it had limit=3"):
        SweepStore(tmp_path, {**SETTINGS, "limit": 4})


def test_two_sweeps_that_start_at_once_in_a_new_folder_are_refused(tmp_path: Path) -> None:
    first = SweepStore(tmp_path / "new", SETTINGS)
    with pytest.raises(UsageError, match="being written by another sweep"):
        SweepStore(tmp_path / "new", SETTINGS)
    first.close()


def test_other_tasks_and_another_checkpoint_are_refused_by_name(tmp_path: Path) -> None:
    begun(tmp_path).close()
    store = SweepStore(tmp_path, SETTINGS)
    store.check_tasks(TASKS)
    with pytest.raises(UsageError, match=r"changed: t \(generation_kwargs\): choose another folder") as caught:
        store.check_tasks({"t": {"documents": "1", "generation_kwargs": "3"}})
    assert "\n" not in str(caught.value)
    store.begin(TASKS, CHECKPOINT)
    with pytest.raises(UsageError, match=r"another checkpoint \(tokenizer differ\)"):
        store.begin(TASKS, {**CHECKPOINT, "tokenizer": "3"})


def test_presses_that_read_statistics_come_and_go_and_their_files_stay_the_same(tmp_path: Path) -> None:
    begun(tmp_path).close()
    with_qfilter, changed = ({**CHECKPOINT, "statistics q.safetensors": value} for value in "34")
    for checkpoint in (with_qfilter, CHECKPOINT, with_qfilter):
        store = SweepStore(tmp_path, SETTINGS)
        store.begin(TASKS, checkpoint)
        store.close()
    store = SweepStore(tmp_path, SETTINGS)
    with pytest.raises(UsageError, match=r"another checkpoint \(statistics q.safetensors differ\)"):
        store.begin(TASKS, changed)
    with pytest.raises(UsageError, match=r"another checkpoint \(weights differ\)"):
        store.begin(TASKS, {"tokenizer": "2"})


def test_a_folder_in_which_nothing_was_answered_is_free(tmp_path: Path) -> None:
    """The first command had a mistake that came out when lm-eval loaded the task."""
    for settings, weights in (({"limit": -3}, "1"), ({"limit": 3}, "2")):
        store = SweepStore(tmp_path, settings)
        store.check_tasks({"t": {"documents": weights}})
        store.begin({"t": {"documents": weights}}, {"weights": weights})
        store.cell("a").new_results()
        store.close()
    mark = json.loads((tmp_path / "sweep.json").read_text())
    assert (mark["settings"], mark["checkpoint"]) == ({"limit": 3}, {"weights": "2"})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a user's weights": lambda folder: (folder / "weights").write_text("mine"),
    "a user's summary": lambda folder: (folder / "summary.json").write_text("{}"),
    "a wandb sweep": lambda folder: (folder / "sweep.json").write_text('{"method": "grid", "cells": 3}'),
    "an older sweep": lambda folder: (folder / "sweep.json").write_text('{"limit": 3, "tasks": ["a"]}'),
    "a mark that is a list": lambda folder: (folder / "sweep.json").write_text("[]"),
    "a mark that was cut": lambda folder: (folder / "sweep.json").write_text('{"format": "lm-eval-kv'),
    "a binary mark": lambda folder: (folder / "sweep.json").write_bytes(bytes(range(256))),
    "a mark that is a folder": lambda folder: (folder / "sweep.json").mkdir(),
    "a mark that is a pipe": lambda folder: os.mkfifo(folder / "sweep.json"),
    "foreign cells": lambda folder: (folder / "cells" / "x").mkdir(parents=True),
    "a lock with content": lambda folder: (folder / ".lock").write_text("mine"),
    "a lock that is a pipe": lambda folder: os.mkfifo(folder / ".lock"),
    "a lock that leads elsewhere": lambda folder: (folder / ".lock").symlink_to(folder.parent / "elsewhere"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_folder_that_is_not_a_sweeps_is_refused_and_left_as_it_is(what: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    FOREIGN[what](folder)
    before, names = contents(tmp_path), sorted(folder.rglob("*"))
    with pytest.raises(UsageError, match=r"choose (a new or an empty folder|another output_path)$") as caught:
        SweepStore(folder, SETTINGS)
    assert "\n" not in str(caught.value)
    assert (contents(tmp_path), sorted(folder.rglob("*"))) == (before, names)


def test_what_a_killed_start_leaves_is_no_foreign_content(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "sweep.json.123.part").write_text('{"form')
    begun(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "cells", "sweep.json"]


def test_cells_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    begun(tmp_path / "sweep").close()
    (tmp_path / "sweep" / "cells").rename(tmp_path / "elsewhere")
    (tmp_path / "sweep" / "cells").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="cells is not a folder of a sweep"):
        SweepStore(tmp_path / "sweep", SETTINGS)
