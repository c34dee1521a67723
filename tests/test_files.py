"""A file appears in full or not at all, and every failed write is one line that says what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lm_eval_kvpress import files
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import make_writable, refuse_special, remove_parts, write_errors, write_whole


def test_a_write_that_fails_leaves_the_old_file_whole_and_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "losses.csv"
    write_whole(file, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=rf"^{file} cannot be written \(No space left on device\): make room, .*$"):
        write_whole(file, "new")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file], "nothing is left beside it"


def test_a_file_and_its_name_are_synced_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a rename may be on disk and the bytes not, or the other way round."""
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "replace", renamed)
    write_whole(tmp_path / "a", "text")
    assert events == [f"a.{os.getpid()}.part", "rename", tmp_path.name]


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


def test_parts_of_a_killed_run_go_and_nothing_else_does(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    for name in ("settings.json.12.part", "task/0.csv.34.part", "task/0.csv"):
        (tmp_path / name).write_text("")
    remove_parts(tmp_path)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [tmp_path / "task" / "0.csv"]


def test_a_folder_that_cannot_be_made_is_a_usage_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="stream_output=.* cannot be written"):
        make_writable("stream_output", tmp_path / "file" / "folder")
    make_writable("stream_output", tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_an_error_of_another_kind_is_no_error_of_writing() -> None:
    with pytest.raises(ValueError, match="a defect") as raised, write_errors("file"):
        raise ValueError("a defect")
    assert type(raised.value) is ValueError


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, what in ((tmp_path / "pipe", "a pipe or a device"), (tmp_path, "a folder")):
        with pytest.raises(UsageError, match=f"--config {path} is {what}: name a file"):
            refuse_special(path, f"--config {path}")
    write_whole(tmp_path / "file", "")
    refuse_special(tmp_path / "file")
    refuse_special(tmp_path / "absent")


def test_windows_has_no_folders_to_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "name", "nt")
    monkeypatch.setattr(files.os, "open", None)
    files.sync_folder(tmp_path)
