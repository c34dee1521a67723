"""Markdown: the text of a known report, and no markup from a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_files import EVIL, portable, write_results

from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.markdown import escape_markdown, markdown

EXPECTED = Path(__file__).parent / "expected" / "report.md"


def test_the_markdown_of_a_known_report(leaderboard: Path) -> None:
    report = build_report([leaderboard])
    assert portable(markdown(report), report, leaderboard) == EXPECTED.read_text(encoding="utf-8")


def test_markdown_holds_no_markup_from_a_file(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0, checkpoint=EVIL)
    text = markdown(build_report([tmp_path]))
    body = text.split("---\n", 2)[2]
    assert "<script" not in body and "{{" not in body and "alert(1)" in body


def test_front_matter_is_yaml_whatever_the_title(tmp_path: Path) -> None:
    write_results(tmp_path, "none", 0.0)
    title = 'a: "b" <c> {{ d }}'
    front = dict(line.split(": ", 1) for line in markdown(build_report([tmp_path], title=title)).split("\n")[1:5])
    assert json.loads(front["title"]) == title and json.loads(front["models"]) == ["tiny"]


@pytest.mark.parametrize("text, escaped", [("a|b", "a&#124;b"), ("{% x %}", "&#123;% x %&#125;"), ("a\n b", "a b")])
def test_text_is_one_line_without_markup(text: str, escaped: str) -> None:
    assert escape_markdown(text) == escaped


def test_500_rows_are_lines(many_results: Path) -> None:
    assert markdown(build_report([many_results])).count("\n| press") == 499
