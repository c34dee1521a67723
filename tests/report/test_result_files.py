"""Results files are found below folders; what is not one is refused in one line that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_files import write_results

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.report.result_files import read_results, unfinished_cells
from lm_eval_kvpress.sweep.manifest import seal


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    file = write_results(tmp_path, "none", 0.0)
    write_results(tmp_path, "snapkv", 0.5)
    assert [cell.press.name for cell in read_results([file, tmp_path])] == ["none", "snapkv"]


def test_a_file_that_two_paths_lead_to_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would count as an older result of a setting that was run again."""
    file = write_results(tmp_path / "runs", "none", 0.0)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    (cell,) = read_results([Path("runs"), tmp_path / "link", tmp_path / "runs", file])
    assert cell.file.resolve() == file.resolve()


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"results": {"a"', "is not whole JSON"),
        ("[1, 2]", "is not what lm-eval writes"),
        ("{}", "is not what lm-eval writes"),
        (json.dumps({"config": {}, "results": [1]}), "is not what lm-eval writes"),
    ],
)
def test_what_is_no_results_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "results_x.json").write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        read_results([tmp_path])
    assert "results_x.json" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no results_"):
        read_results([tmp_path])
    with pytest.raises(UsageError, match="does not exist"):
        read_results([tmp_path / "nowhere"])


def test_results_that_a_sweep_sealed_are_refused_once_they_are_damaged(tmp_path: Path) -> None:
    file = write_results(tmp_path / "results", "none", 0.5)
    seal(tmp_path / "results")
    assert len(read_results([tmp_path])) == 1
    file.write_text(file.read_text().replace("0.5", "0.6"))
    with pytest.raises(UsageError, match=rf"{file.name} is not what its sweep wrote"):
        read_results([tmp_path])


def test_unfinished_cells_of_a_sweep_are_named(tmp_path: Path) -> None:
    sweep = tmp_path / "runs" / "sweep"
    for cell in ("none", "snapkv", "knorm"):
        (sweep / "cells" / cell).mkdir(parents=True)
    (sweep / "sweep.json").write_text("{}")
    with pytest.raises(UsageError, match="no cell of the sweep in .* is finished: its command goes on"):
        read_results([sweep])
    write_results(sweep / "cells" / "none" / "results", "none", 0.0)
    write_results(sweep / "cells" / "knorm" / "results.part", "knorm", 0.5)
    (sweep / "cells" / "snapkv" / "results").mkdir()
    assert len(read_results([sweep])) == 1, "results that are not known to be whole are no row"
    assert unfinished_cells([tmp_path]) == {sweep: ["knorm", "snapkv"]}


def test_cells_that_only_shards_have_answered_are_unfinished_cells_of_the_sweep(tmp_path: Path) -> None:
    for shard in ("1-of-2", "2-of-2"):
        (tmp_path / "shards" / shard / "cells" / "knorm").mkdir(parents=True)
        (tmp_path / "shards" / shard / "sweep.json").write_text("{}")
    assert unfinished_cells([tmp_path]) == {tmp_path: ["knorm"]}
    with pytest.raises(UsageError, match="is finished: its command with --merge joins its shards"):
        read_results([tmp_path])
    write_results(tmp_path / "cells" / "knorm" / "results", "knorm", 0.5)
    assert unfinished_cells([tmp_path]) == {} and len(read_results([tmp_path])) == 1
