"""Tables of text: on the terminal by rich, in Markdown pages. Knows strings alone; pages of results are `report`'s."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

UNLIMITED = 100_000  # columns of a file or pipe, in which rich would wrap at 80


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table, a line per row, without a last line break.

    Raises:
        AssertionError: for a row that has not one cell per column of the header.
    """
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in rows:
        assert len(row) == len(header), (row, header)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to the standard output: fitted to a terminal, one line per row to a file or pipe."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=UNLIMITED)
    table = Table(*header, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))  # not markup: a cell may hold square brackets
    console.print(table)
