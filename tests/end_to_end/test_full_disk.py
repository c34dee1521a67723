"""On a full disk a run ends in one line, what it finished is whole, and the same command goes on once there is room."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from report_files import write_results
from sweep_runs import assert_same, command_line, manager, write_tasks

from lm_eval_kvpress import cli
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import write_whole
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.sweep import command, run
from lm_eval_kvpress.sweep.cell_store import CellStore

pytestmark = pytest.mark.end_to_end

DOCUMENTS = [Instance("loglikelihood_rolling", {}, ("the mill " * (100 + i),), 0, ("s", i, 1)) for i in range(6)]


def mount(folder: Path, *options: str) -> None:
    subprocess.run(["mount", "-o", ",".join(options), "-t", "tmpfs", "tmpfs", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount(folder, "size=32k")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def scores(checkpoint: Path, **arguments: Any) -> list[float]:
    lm = KVPress(
        pretrained=str(checkpoint), device="cpu", rolling="stream", press="knorm", stream_budget=80, **arguments
    )
    return lm.loglikelihood_rolling(DOCUMENTS, disable_tqdm=True)


def fill(disk: Path, num_free_bytes: int) -> None:
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "other").write_bytes(bytes(max(0, free - num_free_bytes)))


def test_a_stream_keeps_what_it_finished_and_goes_on(checkpoint_dir: Path, disk: Path, tmp_path: Path) -> None:
    expected = scores(checkpoint_dir, stream_output=str(tmp_path / "undisturbed"))
    with pytest.raises(UsageError, match=rf"^{disk}.* \(No space left on device\): make room, .* goes on .*$"):
        scores(checkpoint_dir, stream_output=str(disk / "losses"))
    finished = {file: file.read_bytes() for file in disk.glob("losses/s/*.csv")}
    assert 0 < len(finished) < len(DOCUMENTS) and not list(disk.rglob("*.part"))
    mount(disk, "remount", "size=4m")
    assert scores(checkpoint_dir, stream_output=str(disk / "losses")) == expected
    assert all(file.read_bytes() == content for file, content in finished.items())


def test_a_logged_run_ends_in_one_line_after_complete_lines(checkpoint_dir: Path, disk: Path) -> None:
    log = disk / "log.jsonl"
    fill(disk, 4096)
    with pytest.raises(UsageError, match=rf"^throughput_log={log} cannot be written after \d+ lines .*: make room"):
        scores(checkpoint_dir, throughput_log=str(log))
    gc.collect()  # the run that failed holds the log
    num_lines = len([json.loads(line) for line in log.open()])
    assert num_lines > 0
    mount(disk, "remount", "size=4m")
    scores(checkpoint_dir, throughput_log=str(log))
    assert len([json.loads(line) for line in log.open()]) == num_lines + 2 * len(DOCUMENTS)


def test_a_sweep_over_workers_keeps_what_they_answered_and_goes_on(
    checkpoint_dir: Path, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is that of the process that asks; its workers end with the sweep."""
    monkeypatch.setattr(run, "task_manager", lambda settings, cell: manager(settings.include_path))
    (tmp_path / "tasks").mkdir()
    places, few = (checkpoint_dir, write_tasks(tmp_path / "tasks")), {"presses": "none,knorm", "ratios": "0.5"}
    assert command.main(command_line(*places, tmp_path / "whole", **few)) == 0
    mount(disk, "remount", "size=64k")
    with pytest.raises(UsageError, match=rf"{disk}.*(disk is full|No space left).* are finished"):
        command.main(command_line(*places, disk / "sweep", **few, workers=2))
    assert not multiprocessing.active_children()
    answered = sum(len(CellStore(cell).answers.keys()) for cell in disk.glob("sweep/cells/*"))
    assert answered > 0
    mount(disk, "remount", "size=4m")
    assert command.main(command_line(*places, disk / "sweep", **few, workers=2)) == 0
    assert_same(disk / "sweep", tmp_path / "whole")


@pytest.mark.parametrize("name", ["report.md", "report.html", "report.csv", "report.json", "report.tex"])
def test_a_report_leaves_the_one_before_it_whole(
    disk: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(tmp_path / "results", "none", 0.5)
    write_whole(disk / name, "the report before")
    fill(disk, 0)
    assert cli.main(["report", str(tmp_path / "results"), "-o", str(disk / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line and str(disk / name) in line
    assert (disk / name).read_text() == "the report before"


def test_a_folder_that_is_read_only_is_refused_before_any_work(checkpoint_dir: Path, disk: Path) -> None:
    mount(disk, "remount", "ro")
    for argument in ({"stream_output": str(disk / "losses")}, {"throughput_log": str(disk / "log.csv")}):
        with pytest.raises(UsageError, match=r"^[a-z_]+=.* cannot be written: Read-only file system$"):
            scores(checkpoint_dir, **argument)
    with pytest.raises(SystemExit):
        cli.main(["verify", "--json", str(disk / "verify.json")])
