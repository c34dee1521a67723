"""A file appears in full or not at all; a folder that cannot be written to is named before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.records.files import make_writable, write_whole


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "losses.csv"
    write_whole(file, "old")

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_whole(file, "new")
    assert file.read_text() == "old"


def test_files_that_differ_in_their_ending_do_not_share_what_is_written_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside: list[Path] = []
    replace = Path.replace

    def noted(self: Path, target: Path) -> Path:
        beside.append(self)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    for ending in ("csv", "json"):
        write_whole(tmp_path / f"losses.{ending}", ending)
    assert len(set(beside)) == 2 and sorted(file.name for file in tmp_path.iterdir()) == ["losses.csv", "losses.json"]


def test_a_folder_that_cannot_be_made_is_a_usage_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="stream_output=.* cannot be written"):
        make_writable("stream_output", tmp_path / "file" / "folder")
    make_writable("stream_output", tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
