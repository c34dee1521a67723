"""A cell is finished if its results are what they were; anything else is named, dropped and made again."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lm_eval_kvpress.engine.outcomes import Scored
from lm_eval_kvpress.engine.scoring import BranchScore
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.sweep.cell_store import CellStore

ANSWERS = {"a": Scored((BranchScore((-0.1,), False),), False, None)}


def finished(folder: Path, *, stream: bool = False) -> CellStore:
    cell = CellStore(folder)
    model = cell.new_results() / "model"
    model.mkdir()
    (model / "results_1.json").write_text('{"results": {"acc": 0.412}}')
    (model / "samples_t_1.jsonl").write_text("".join(f'{{"doc_id": {i}}}\n' for i in range(9)))
    if stream:
        (cell.stream / "t").mkdir(parents=True)
        (cell.stream / "t" / "0.csv").write_text("position,loss_nats\n0,1.5\n")
    else:
        cell.throughput.write_text("{}\n")
        cell.answers.add(ANSWERS)
    cell.finish()
    return cell


def test_a_finished_cell_has_results_and_no_answers(tmp_path: Path) -> None:
    cell = finished(tmp_path / "cell")
    assert cell.is_finished and not cell.answers.file.exists() and cell.drop_damage() == []
    assert cell.throughput.exists() and cell.is_finished


def cut(file: Path, draw: random.Random) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size))


def zero(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    start = draw.randrange(len(content))
    content[start : start + 20] = bytes(len(content[start : start + 20]))
    file.write_bytes(content)


def empty(file: Path, draw: random.Random) -> None:
    os.truncate(file, 0)


def remove(file: Path, draw: random.Random) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [cut, zero, empty, remove])
@pytest.mark.parametrize("name", ["model/results_1.json", "model/samples_t_1.jsonl", "manifest.json"])
def test_a_finished_cell_that_was_damaged_is_named_and_made_again(
    damage: Callable[[Path, random.Random], None], name: str, tmp_path: Path
) -> None:
    for seed in range(5):
        cell = finished(tmp_path / f"{seed}")
        damage(cell.results / name, random.Random(seed))
        assert cell.drop_damage() == [
            f"{cell.results / name}: gone or damaged since the cell was finished; the cell is made again"
        ]
        assert not cell.is_finished and not cell.results.exists() and not cell.throughput.exists()


def test_results_that_are_empty_are_not_finished(tmp_path: Path) -> None:
    cell = CellStore(tmp_path / "cell")
    cell.results.mkdir(parents=True)
    assert not cell.is_finished
    assert [line.partition(":")[0] for line in cell.drop_damage()] == [str(cell.results / "manifest.json")]


def test_losses_by_position_belong_to_a_finished_stream(tmp_path: Path) -> None:
    cell = finished(tmp_path / "cell", stream=True)
    file = cell.stream / "t" / "0.csv"
    assert cell.drop_damage() == []
    file.write_text("position,loss_nats\n0,2.5\n")
    assert len(cell.drop_damage()) == 1
    assert not file.exists() and not cell.is_finished


def test_answers_that_a_kill_left_beside_results_are_removed(tmp_path: Path) -> None:
    cell = finished(tmp_path / "cell")
    cell.answers.add(ANSWERS)
    assert cell.drop_damage() == [] and cell.is_finished and not cell.answers.file.exists()


def test_damaged_answers_go_with_the_records_of_how_long_they_took(tmp_path: Path) -> None:
    cell = CellStore(tmp_path / "cell")
    cell.answers.add(ANSWERS)
    cell.answers.file.write_bytes(b"")
    cell.throughput.write_text("{}\n")
    assert len(cell.drop_damage()) == 1
    assert not cell.answers.file.exists() and not cell.throughput.exists()


def test_a_full_disk_leaves_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    cell = CellStore(tmp_path / "cell")
    cell.answers.add(ANSWERS)
    (cell.new_results() / "results_1.json").write_text("{}")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"results\.part cannot be written \(No space left .*answers are kept"):
        cell.finish()
    assert cell.answers.keys() == {"a"} and not cell.is_finished


@pytest.mark.parametrize("name", ["answers.sqlite", "answers.sqlite-journal", "throughput.jsonl"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/etc/hostname")])
def test_a_folder_a_pipe_or_a_link_in_place_of_a_file_is_one_line(
    name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / name)
    with pytest.raises(UsageError, match=f"{name} is not a file of a sweep: move it away"):
        CellStore(tmp_path).drop_damage()


def test_results_that_are_a_file_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(UsageError, match="results is not a folder of a sweep"):
        CellStore(tmp_path).drop_damage()


def test_a_cell_that_answered_nothing_is_removed_and_what_is_not_its_own_stays(tmp_path: Path) -> None:
    for name in ("empty", "with a note"):
        cell = CellStore(tmp_path / name)
        cell.new_results()
        cell.throughput.touch()
    (tmp_path / "with a note" / "note.txt").write_text("mine")
    for name in ("empty", "with a note"):
        CellStore(tmp_path / name).delete()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "with a note",
        "with a note/note.txt",
    ]
