"""Colours and markers by press, the same on the page and in figures: eight of each, paired anew in every round."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from lm_eval_kvpress.report.contents import Report

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#8a63d2", "#7f7f7f")
MARKERS = (
    ("circle", "o", "●"),
    ("square", "s", "■"),
    ("diamond", "D", "◆"),
    ("triangle-up", "^", "▲"),
    ("cross", "P", "✚"),
    ("x", "X", "✖"),
    ("pentagon", "p", "⬟"),
    ("triangle-down", "v", "▼"),
)
"""Plotly's symbol, matplotlib's marker, and the character that stands for them in the page's filter."""

AS_TEXT = "\ufe0e"  # not as a picture


@dataclass(frozen=True)
class Style:
    """How a press is drawn; an empty colour is that of the text."""

    color: str
    symbol: str
    marker: str
    glyph: str


BASELINE = Style("", "star", "*", f"★{AS_TEXT}")


def styles(report: Report) -> dict[str, Style]:
    """The style of each press of a report, in the order of its rows."""
    presses = dict.fromkeys(row.press for table in report.tables for row in table.rows)
    return {"none": BASELINE, **_styles(press for press in presses if press != "none")}


def _styles(presses: Iterable[str]) -> dict[str, Style]:
    found = {}
    for place, press in enumerate(presses):
        symbol, marker, glyph = MARKERS[(place + place // len(COLORS)) % len(MARKERS)]
        found[press] = Style(COLORS[place % len(COLORS)], symbol, marker, glyph + AS_TEXT)
    return found


def as_data(found: dict[str, Style]) -> dict[str, dict[str, str]]:
    """For the page's script."""
    return {press: asdict(style) for press, style in found.items()}
