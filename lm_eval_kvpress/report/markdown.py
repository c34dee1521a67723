"""A report as Markdown: YAML front matter for static site generators, then a section per table."""

from __future__ import annotations

from lm_eval_kvpress.report.contents import Report
from lm_eval_kvpress.report.templates import render_text

# No Markdown, HTML or Liquid (the template language of static hosts) in text from a file.
ESCAPES = str.maketrans({character: f"&#{ord(character)};" for character in "&<>{}|`*[]\\~$!"})


def markdown(report: Report) -> str:
    return render_text("report.md.jinja", escape_markdown, {}, report=report)


def escape_markdown(text: str) -> str:
    return " ".join(text.translate(ESCAPES).split())
