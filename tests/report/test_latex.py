"""LaTeX: the tables of a known report, and names escaped."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_files import portable

from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.latex import escape_latex, latex

EXPECTED = Path(__file__).parent / "expected" / "report.tex"


def test_the_latex_of_a_known_report(leaderboard: Path) -> None:
    report = build_report([leaderboard])
    assert portable(latex(report), report, leaderboard) == EXPECTED.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text, escaped",
    [
        ("a_$b", r"a\_\$b"),
        ("\\x{y}", r"\textbackslash{}x\{y\}"),
        ("−0.5 ~ ∞", r"$-$0.5 \textasciitilde{} $\infty$"),
        (
            "Right → wrong <b|c>",
            r"Right $\rightarrow$ wrong \textless{}b\textbar{}c\textgreater{}",
        ),  # else ¡b—c¿ in LaTeX's own fonts
    ],
)
def test_text_has_no_commands(text: str, escaped: str) -> None:
    assert escape_latex(text) == escaped


def test_the_packages_it_needs_are_named_where_it_begins(leaderboard: Path) -> None:
    text = latex(build_report([leaderboard]))
    assert text.startswith("% Needs \\usepackage{booktabs,graphicx}")
    assert "\\toprule" in text and "\\resizebox" in text


def test_500_rows_are_lines(many_results: Path) -> None:
    assert latex(build_report([many_results])).count("\npress") == 499
