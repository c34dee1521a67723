"""`lm-eval-kvpress presses` lists every press, and docs/presses.md is that list."""

from __future__ import annotations

import types

import pytest
from repository import ROOT

from lm_eval_kvpress import cli
from lm_eval_kvpress.presses import listing


def test_presses_prints_one_aligned_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ratio = {"compression_ratio": 0.5, "window_size": 64}
    rows = [
        types.SimpleNamespace(name="none", arguments={}, needs="", paper="", supported=True),
        types.SimpleNamespace(name="snapkv", arguments=ratio, needs="x", paper="arXiv", supported=True),
        types.SimpleNamespace(name="qfilter", arguments={}, needs="a file", paper="arXiv", supported=False),
    ]
    monkeypatch.setattr(listing, "list_presses", lambda: rows)
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
