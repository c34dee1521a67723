"""Losses on disk are exact, whole or absent, of one setting and of one run at a time."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.records.loss_files import SETTINGS, LossFiles, join_losses, lock_folder

DOCUMENT, LOSSES, COUNTS = (1, 2, 3), (0.1, math.pi, 1e-17), {"max_entries": 7}


def saved(folder: Path) -> LossFiles:
    files = LossFiles(folder, {"press": "a"})
    files.save("task", DOCUMENT, "0", LOSSES, COUNTS)
    return files


def damage(file: Path, draw: random.Random) -> str:
    """Cut, empty or zero a part of a file, as a power cut may leave it; return how."""
    data, how = file.read_bytes(), draw.choice(["cut", "emptied", "zeroed"])
    start = draw.randrange(len(data))
    end = draw.randrange(start + 1, len(data) + 1)
    file.write_bytes(
        {"cut": data[:start], "emptied": b"", "zeroed": data[:start] + bytes(end - start) + data[end:]}[how]
    )
    return f"{file.suffix} {how} from {start} to {end}"


def test_a_stored_document_is_exact_and_an_unfinished_one_is_absent(tmp_path: Path) -> None:
    files = LossFiles(tmp_path, {"press": "a"})
    assert files.load("task", DOCUMENT, "0") is None
    files.save("task", DOCUMENT, "0", LOSSES, COUNTS)
    assert files.load("task", DOCUMENT, "0") == (LOSSES, COUNTS)
    assert files.load("task", [1, 2, 4], "0") is None, "another text of the same name"


def test_a_document_without_its_counts_is_not_finished(tmp_path: Path) -> None:
    """A kill between the two files leaves the counts alone; an older version wrote the losses alone."""
    files = saved(tmp_path)
    (counts,) = tmp_path.glob("task/*.json")
    counts.unlink()
    assert files.load("task", DOCUMENT, "0") is None


def test_losses_of_another_length_are_not_taken(tmp_path: Path) -> None:
    files = LossFiles(tmp_path, {})
    files.save("task", DOCUMENT, "0", LOSSES[:2], COUNTS)
    assert files.load("task", DOCUMENT, "0") is None


@pytest.mark.parametrize("ending", [".csv", ".json"])
def test_a_damaged_document_is_named_and_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ending: str
) -> None:
    draw = random.Random(ending)
    for turn in range(40):
        files = saved(tmp_path)
        (file,) = tmp_path.glob(f"task/*{ending}")
        how = damage(file, draw)
        caplog.clear()
        assert files.load("task", DOCUMENT, "0") is None, how
        assert str(file.with_suffix(".csv")) in caplog.text and "computed again" in caplog.text, how
        caplog.clear()
        assert files.load("task", DOCUMENT, "0") is None and not caplog.text, f"{how}, {turn}: named once"


def test_damaged_settings_are_named_and_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw, file = random.Random(0), tmp_path / SETTINGS
    saved(tmp_path)
    before = file.read_bytes()
    for _ in range(40):
        how = damage(file, draw)
        caplog.clear()
        assert LossFiles(tmp_path, {"press": "a"}).load("task", DOCUMENT, "0") == (LOSSES, COUNTS), how
        assert file.read_bytes() == before and f"{file} is damaged" in caplog.text, how


@pytest.mark.parametrize("state", ["missing", "damaged"])
def test_without_its_settings_a_folder_is_still_of_one_setting(tmp_path: Path, state: str) -> None:
    saved(tmp_path)
    (tmp_path / SETTINGS).unlink() if state == "missing" else (tmp_path / SETTINGS).write_bytes(b"")
    with pytest.raises(UsageError, match=rf"losses of another setting \({SETTINGS} is {state}\)"):
        LossFiles(tmp_path, {"press": "b"})
    assert LossFiles(tmp_path, {"press": "a"}).load("task", DOCUMENT, "0") == (LOSSES, COUNTS)


def test_settings_of_something_else_are_left_untouched(tmp_path: Path) -> None:
    (tmp_path / SETTINGS).write_text("// my editor's\n{}")
    with pytest.raises(UsageError, match="none of a stream"):
        LossFiles(tmp_path, {"press": "a"})
    assert (tmp_path / SETTINGS).read_text() == "// my editor's\n{}"


def test_losses_of_another_setting_are_refused(tmp_path: Path) -> None:
    LossFiles(tmp_path, {"press": "a", "seed": 1})
    LossFiles(tmp_path, {"press": "a", "seed": 1})
    with pytest.raises(UsageError, match=r"another setting \(seed differ\)"):
        LossFiles(tmp_path, {"press": "a", "seed": 2})


@pytest.mark.parametrize("task", ["../../x", "..", "a/b", "/x", "long" * 100, "x\0y", "ordinary_task-1.0"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, task: str) -> None:
    inside = tmp_path / "deep" / "inside"
    files = LossFiles(inside, {})
    files.save(task, DOCUMENT, "../0", LOSSES, COUNTS)
    assert files.load(task, DOCUMENT, "../0") == (LOSSES, COUNTS)
    assert len(list(inside.glob("*/*.csv"))) == 1 and len(list(tmp_path.rglob("*.csv"))) == 1
    if task.startswith("ordinary"):
        assert (inside / task).is_dir()


def test_parts_of_a_killed_run_go_at_the_next_start(tmp_path: Path) -> None:
    saved(tmp_path)
    part = tmp_path / "task" / "0.csv.123.part"
    part.write_text("torn")
    LossFiles(tmp_path, {"press": "a"}, rank=1, num_ranks=2)
    assert part.exists(), "another process of the run may be writing it"
    LossFiles(tmp_path, {"press": "a"})
    assert not part.exists()


def test_another_run_is_kept_away_until_this_one_ends(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lm_eval_kvpress.records.loss_files import lock_folder\n"
        "lock = lock_folder(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match=f"stream_output={tmp_path} is being written by another run"):
            LossFiles(tmp_path, {})
        LossFiles(tmp_path, {}, rank=1, num_ranks=2)  # each process of a run holds a lock of its own
        other.kill()
    files = LossFiles(tmp_path, {})
    again = lock_folder(tmp_path)  # of the same run
    del files, again
    gc.collect()


def test_a_pipe_for_settings_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / SETTINGS)
    with pytest.raises(UsageError, match="a pipe or a device"):
        LossFiles(tmp_path, {})


def test_the_file_beside_the_losses_says_what_they_depend_on(tmp_path: Path) -> None:
    """So that a document is known by its own files, whatever happens to the settings."""
    saved(tmp_path / "a")
    LossFiles(tmp_path / "b", {"press": "b"}).save("task", DOCUMENT, "0", LOSSES, COUNTS)
    one, other = (json.loads(next((tmp_path / name).glob("task/*.json")).read_text()) for name in "ab")
    assert one["counts"] == other["counts"] == COUNTS and one["sha256"] == other["sha256"]
    assert one["settings"] != other["settings"]


def test_documents_of_several_runs_are_joined_and_those_of_other_settings_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        files = LossFiles(tmp_path / str(number), {"press": "a"})
        files.save("task", (number, 2, 3), "0", LOSSES, COUNTS)
    (tmp_path / "2" / "task" / "torn.json").write_text("{}")  # of a document that was not finished
    for _ in range(2):
        for number in (1, 2):
            join_losses(tmp_path / "all", tmp_path / str(number))
    assert len(list((tmp_path / "all" / "task").iterdir())) == 4
    joined = LossFiles(tmp_path / "all", {"press": "a"})
    assert all(joined.load("task", (number, 2, 3), "0") == (LOSSES, COUNTS) for number in (1, 2))
    LossFiles(tmp_path / "b", {"press": "b"})
    with pytest.raises(UsageError, match=f"{tmp_path / 'b'} holds losses of other settings than .*all"):
        join_losses(tmp_path / "all", tmp_path / "b")
