"""Markdown tables, for the documents that scripts write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, without a newline at its end.

    Raises:
        AssertionError: for a row that has not one cell per heading.
    """
    lines = [_line(headings), "|" + "---|" * len(headings)]
    for row in rows:
        assert len(row) == len(headings), (row, headings)
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
