"""The command: what it writes and where, and what it refuses in one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from report_files import write_results

from lm_eval_kvpress import cli


def test_latex_and_figures_are_written_with_names_escaped(tmp_path: Path) -> None:
    for press, acc in (("none", 0.9), ("a_$b", 0.2)):
        write_results(tmp_path, press, 0.5, acc=acc)
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "t.tex"), "--figures", str(tmp_path / "f")]) == 0
    text = (tmp_path / "t.tex").read_text()
    assert r"a\_\$b &" in text and r"a\_\$b (window\_size=64)" in text, "in the row, and where shared arguments stand"
    assert {file.suffix for file in (tmp_path / "f").iterdir()} == {".png", ".svg"}


def test_unfinished_cells_of_a_sweep_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "runs" / "sweep"
    for cell in ("none", "snapkv", "knorm"):
        (sweep / "cells" / cell).mkdir(parents=True)
    (sweep / "sweep.json").write_text("{}")
    write_results(sweep / "cells" / "none" / "results", "none", 0.0)
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "report.md")]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"{sweep}: 2 cells are unfinished and left out: knorm, snapkv\n"
    assert captured.out.endswith("1 rows in 1 table\n")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("-o", "folder.md"), "is a folder: name a file in it, such as"),
        (("-o", "folder"), "is a folder: name a file in it, such as"),
        (("-o", "file.md/page.html"), "file.md is a file and cannot hold it: name another place"),
        (("-o", "file.md/deep/page.html"), "file.md is a file and cannot hold it: name another place"),
        (("--figures", "file.md"), "is a file: name a folder"),
        (("--figures", "file.md/f"), "file.md is a file and cannot hold it: name another place"),
        (("-o", "locked/page.html"), "locked may not be written to: name another place"),
        (("-o", "locked/deep/page.html"), "locked may not be written to: name another place"),
        (("-o", "locked.md"), "locked.md may not be written to: name another place"),
        (("--figures", "locked"), "locked may not be written to: name another place"),
        (("-o", ""), "-o '': the name is empty"),
        (("--figures", ""), "--figures '': the name is empty"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line_before_anything_is_read(
    tmp_path: Path,
    arguments: tuple[str, str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may = os.access  # root may write everywhere, so who may not is made up
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in Path(path).name and may(path, mode))
    monkeypatch.setattr(
        "lm_eval_kvpress.report.command.build_report", lambda *_, **__: pytest.fail("results were read")
    )
    monkeypatch.chdir(tmp_path)
    for folder in ("folder.md", "folder", "locked"):
        Path(folder).mkdir()
    for file in ("file.md", "locked.md"):
        Path(file).touch()
    assert cli.main(["report", ".", *arguments]) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err and len(captured.err.strip().splitlines()) == 1


@pytest.mark.parametrize("option, name", [("-o", "t.md"), ("--figures", "f")])
def test_what_goes_wrong_in_writing_is_one_line(
    tmp_path: Path, option: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_results(tmp_path, "none", 0.0)
    write_results(tmp_path, "snapkv", 0.5)
    monkeypatch.setattr("os.fsync", full)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert cli.main(["report", str(tmp_path), option, str(tmp_path / name)]) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert f"{tmp_path / name} cannot be written (No space left on device): make room or name another place" in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.glob("t.md*")), "whole or absent"


def test_a_report_never_takes_the_place_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_results(tmp_path, "none", 0.0)
    before = file.read_text()
    assert cli.main(["report", str(tmp_path), "-o", str(file)]) == cli.BAD_INPUT
    assert "are results, which reports read and never write" in capsys.readouterr().err
    assert file.read_text() == before


def test_an_empty_name_is_not_the_folder_one_stands_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results(tmp_path, "none", 0.0)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", ""]) == cli.BAD_INPUT
    assert "report '': the name is empty" in capsys.readouterr().err


def test_the_help_says_what_ranks_worst_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for press, acc in (("none", 0.9), ("a", 0.2), ("b", 0.7)):
        write_results(tmp_path, press, 0.5, acc=acc)
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    assert "--sort=-COLUMN" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path), "--sort=-recall.acc"]) == 0
    text = capsys.readouterr().out
    assert text.index("| none (") < text.index("| a |") < text.index("| b |")


@pytest.mark.parametrize("text", [None, '{"results": {'])
def test_bad_input_is_one_line_and_not_a_page(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "results_x.json").write_text(text)
    assert cli.main(["report", str(tmp_path)]) != 0
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1
