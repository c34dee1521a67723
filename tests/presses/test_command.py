"""`lm-eval-kvpress presses` lists every press, and docs/presses.md is that list."""

from __future__ import annotations

import json
import re
import sys
import types

import pytest
from repository import ROOT

from lm_eval_kvpress import cli, press_list
from lm_eval_kvpress.presses import command, listing
from scripts.press_list import as_json


def test_presses_prints_one_aligned_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ratio = {"compression_ratio": 0.5, "window_size": 64}
    rows = [
        types.SimpleNamespace(name="none", arguments={}, needs="", paper="", supported=True),
        types.SimpleNamespace(name="snapkv", arguments=ratio, needs="x", paper="arXiv", supported=True),
        types.SimpleNamespace(name="qfilter", arguments={}, needs="a file", paper="arXiv", supported=False),
    ]
    monkeypatch.setattr(command, "press_list", lambda: rows)
    assert cli.main(["presses"]) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "press   needs  paper  arguments and defaults",
        "none    -      -      -",
        "snapkv  x      arXiv  compression_ratio=0.5 window_size=64",
        "",
        "does not run here  paper  because it",
        "qfilter            arXiv  a file",
    ]


def test_presses_lists_every_press_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["presses"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    printed = [line.split()[0] for line in lines]
    for press in listing.list_presses():
        assert press.name in printed
    assert {"none", "snapkv", "streaming_llm", "pyramidkv", "random"} <= set(printed)


def test_docs_list_the_presses(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "presses.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("<!-- table: the output of lm-eval-kvpress presses --markdown -->\n")
    assert cli.main(["presses", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert rest.partition("<!-- end of table -->\n")[0] == printed, (
        "paste what lm-eval-kvpress presses --markdown prints"
    )


def test_the_list_that_ships_is_that_of_the_catalog() -> None:
    assert press_list.FILE.read_text(encoding="utf-8") == as_json(), "python -m scripts.press_list writes it"


def test_json_is_the_list_or_one_press(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["presses", "--json"]) == 0
    presses = json.loads(capsys.readouterr().out)["presses"]
    assert cli.main(["presses", "snapkv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [one for one in presses if one["name"] == "snapkv"]


def test_one_press_is_shown_with_its_arguments_and_one_made_of_two_with_both(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["presses", "snap_think"]) == 0
    shown = capsys.readouterr().out
    assert "window_size=64" in shown and "key_channel_compression_ratio=0.5" in shown and "arxiv.org" in shown
    other = next(info.name for info in press_list.press_list() if not info.supported)
    assert cli.main(["presses", other]) == 0
    assert capsys.readouterr().out.startswith(f"{other}: does not run here")


def test_a_misspelt_press_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["presses", "adakv:snpkv"]) == 2
    assert capsys.readouterr().err.startswith("lm-eval-kvpress presses: unknown press 'snpkv': did you mean 'snapkv'?")


@pytest.mark.parametrize("columns", [80, 100])
def test_the_list_fits_a_narrow_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich takes the captured output for a terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["presses"]) == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()  # without bold type
    assert max(map(len, lines)) <= columns and lines[0].split() == ["press", "needs", "paper"]
    assert "presses NAME" in lines[-1]
