"""A sweep's folder has one writer, one set of settings and one set of weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lm_eval_kvpress.engine.outcomes import Generated
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.records.totals import ContextRecord
from lm_eval_kvpress.sweep.store import SweepStore


def test_other_settings_and_two_sweeps_in_one_folder_are_refused(tmp_path: Path) -> None:
    first = SweepStore(tmp_path, {"tasks": ["a"], "limit": 3})
    with pytest.raises(ValueError, match="being written by another sweep"):
        SweepStore(tmp_path, {"tasks": ["a"], "limit": 3})
    first.begin("1")
    first.cell("a").answers.add({"key": Generated((1,), ContextRecord(7, (7.0,), 100, 100, False))})
    first.close()
    with pytest.raises(ValueError, match="never mixed: it had limit=3"):
        SweepStore(tmp_path, {"tasks": ["a"], "limit": 4})
    with pytest.raises(ValueError, match="other weights"):
        SweepStore(tmp_path, {"tasks": ["a"], "limit": 3}).begin("2")
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"sweep\.json is damaged"):
        SweepStore(tmp_path, {"tasks": ["a"], "limit": 3})


def test_a_folder_in_which_nothing_was_answered_is_free(tmp_path: Path) -> None:
    """The first command had a mistake that came out when lm-eval loaded the task."""
    for settings, fingerprint in (({"limit": -3}, "1"), ({"limit": 3}, "2")):
        store = SweepStore(tmp_path, settings)
        store.begin(fingerprint)
        store.cell("a").new_results()
        store.close()
    assert json.loads((tmp_path / "sweep.json").read_text()) == {"limit": 3}
    assert (tmp_path / "weights").read_text() == "2"


def test_cells_that_an_older_version_left_unfinished_are_named(tmp_path: Path) -> None:
    store = SweepStore(tmp_path, {})
    store.begin("1")
    store.close()
    for cell in ("knorm", "none"):
        (tmp_path / "cells" / cell).mkdir(parents=True)
        (tmp_path / "cells" / cell / "answers.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(UsageError, match=r"an older version left unfinished \(knorm, none\): delete their") as caught:
        SweepStore(tmp_path, {})
    assert "\n" not in str(caught.value)
