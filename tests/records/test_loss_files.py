"""Losses on disk are exact, whole or absent, and of one setting."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.records.loss_files import LossFiles

DOCUMENT, LOSSES, COUNTS = (1, 2, 3), (0.1, math.pi, 1e-17), {"max_entries": 7}


def test_a_stored_document_is_exact_and_an_unfinished_one_is_absent(tmp_path: Path) -> None:
    files = LossFiles(tmp_path, {"press": "a"})
    assert files.load("task", DOCUMENT, "0") is None
    files.save("task", DOCUMENT, "0", LOSSES, COUNTS)
    assert files.load("task", DOCUMENT, "0") == (LOSSES, COUNTS)
    assert files.load("task", [1, 2, 4], "0") is None, "another text of the same name"


def test_a_document_without_its_counts_is_not_finished(tmp_path: Path) -> None:
    """A kill between the two files leaves the counts alone; an older version wrote the losses alone."""
    files = LossFiles(tmp_path, {})
    files.save("task", DOCUMENT, "0", LOSSES, COUNTS)
    (counts,) = tmp_path.glob("task/*.json")
    counts.unlink()
    assert files.load("task", DOCUMENT, "0") is None


def test_losses_of_another_length_are_refused(tmp_path: Path) -> None:
    files = LossFiles(tmp_path, {})
    files.save("task", DOCUMENT, "0", LOSSES[:2], COUNTS)
    with pytest.raises(UsageError, match="2 losses for a document of 3 tokens"):
        files.load("task", DOCUMENT, "0")


def test_losses_of_another_setting_are_refused(tmp_path: Path) -> None:
    LossFiles(tmp_path, {"press": "a", "seed": 1})
    LossFiles(tmp_path, {"press": "a", "seed": 1})
    with pytest.raises(UsageError, match=r"another setting \(seed differ\)"):
        LossFiles(tmp_path, {"press": "a", "seed": 2})
