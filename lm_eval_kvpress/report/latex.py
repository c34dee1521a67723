"""A report as LaTeX tables for papers, one `table` per setting. Needs ``\\usepackage{booktabs,graphicx}``."""

from __future__ import annotations

from lm_eval_kvpress.report.contents import Report
from lm_eval_kvpress.report.templates import ANGLES, render_text

ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "−": "$-$",
        "·": r"$\cdot$",
        "→": r"$\rightarrow$",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "∞": r"$\infty$",
        **{character: f"\\{character}" for character in "&%$#_{}"},
    }
)


def latex(report: Report) -> str:
    return render_text("report.tex.jinja", escape_latex, ANGLES, report=report)


def escape_latex(text: str) -> str:
    return text.translate(ESCAPES)
