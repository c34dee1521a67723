"""What `press_table` measured, written into the pages: one sorted table, and a short one for each group of presses.

Knows figures and Markdown. Reads no results.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lm_eval_kvpress.tables import markdown_table
from scripts.machine import ROOT

TABLE_PAGE, GROUPS_PAGE = ROOT / "docs" / "experiments" / "press_table.md", ROOT / "docs" / "presses.md"
GROUP = re.compile(r"<!-- figures of ([^>]*): begin -->")
"""In `GROUPS_PAGE`: the presses of one short table, separated by commas."""


@dataclass(frozen=True)
class Point:
    """One press at one of its three strengths; None is what was not run.

    Attributes:
        recall: accuracy among four choices.
        perplexity: of a story, per token scored over a compressed cache.
        kept: share of the entries of the recall documents that could still be attended.
    """

    press: str
    recall: float
    perplexity: float | None
    kept: float


def write(points: Sequence[Point], calibrations: str) -> None:
    """Replace what stands between the marks of both pages."""
    page = replaced(TABLE_PAGE.read_text(encoding="utf-8"), "recall", table(points))
    TABLE_PAGE.write_text(replaced(page, "calibration", calibrations), encoding="utf-8")
    page, by_press = GROUPS_PAGE.read_text(encoding="utf-8"), _by_press(points)
    for names in GROUP.findall(page):
        page = replaced(page, f"figures of {names}", group(by_press, names.split(", ")))
    GROUPS_PAGE.write_text(page, encoding="utf-8")


def replaced(page: str, mark: str, text: str) -> str:
    """The page with another text between ``<!-- mark: begin -->`` and the next ``end -->``.

    Raises:
        ValueError: if it has no such marks.
    """
    begin = f"<!-- {mark}: begin -->"
    before, found, rest = page.partition(begin)
    _, end, after = rest.partition(f"<!-- {mark.split()[0]}: end -->")
    if not found or not end:
        raise ValueError(f"the page has no marks '{begin}' and '<!-- {mark.split()[0]}: end -->'")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def group(points: Mapping[str, Sequence[Point]], presses: Sequence[str]) -> str:
    """The figures of some presses, in this order."""
    header = ("press", "kept", "recall", "story perplexity")
    return markdown_table(header, [(f"`{press}`", *_figures(points[press])) for press in presses])


def table(points: Sequence[Point]) -> str:
    """One row per press, the best recall first; where it is the same, the lower perplexity."""
    rows = _by_press(points)
    by_chance = _mean_recall(rows["random"])
    ranked = sorted(rows.items(), key=lambda row: (-_mean_recall(row[1]), _mean_perplexity(row[1]), row[0]))
    header = ("press", "kept", "recall", "story perplexity", "mean recall")
    return markdown_table(header, [_row(press, own, by_chance) for press, own in ranked])


def _row(press: str, points: Sequence[Point], by_chance: float) -> tuple[str, ...]:
    """Figures from the weakest to the strongest setting; a star where random does as well."""
    mean = _mean_recall(points)
    star = "*" if mean <= by_chance and press not in ("none", "random") else ""
    return f"`{press}`{star}", *_figures(points), f"{mean:.3f}"


def _figures(points: Sequence[Point]) -> tuple[str, str, str]:
    """Kept shares, recall and perplexities, from the weakest to the strongest setting."""
    own = sorted(points, key=lambda point: -point.kept)
    return (
        " / ".join(f"{100 * point.kept:.0f}" for point in own) + " %",
        " / ".join(f"{point.recall:.2f}" for point in own),
        " / ".join("-" if point.perplexity is None else f"{point.perplexity:.1f}" for point in own),
    )


def _by_press(points: Sequence[Point]) -> dict[str, list[Point]]:
    rows = defaultdict(list)
    for point in points:
        rows[point.press].append(point)
    return dict(rows)


def _mean_recall(points: Sequence[Point]) -> float:
    return sum(point.recall for point in points) / len(points)


def _mean_perplexity(points: Sequence[Point]) -> float:
    return sum(point.perplexity or 0.0 for point in points) / len(points)
