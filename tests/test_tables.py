"""Tables of text."""

from __future__ import annotations

import pytest

from lm_eval_kvpress.tables import markdown_table, print_table


def test_a_markdown_table_has_a_line_per_row() -> None:
    assert markdown_table(("a", "b"), [("1", "2"), ("", "3")]).splitlines() == [
        "| a | b |",
        "|---|---|",
        "| 1 | 2 |",
        "|  | 3 |",
    ]


def test_a_row_of_another_length_is_a_defect() -> None:
    with pytest.raises(AssertionError):
        markdown_table(("a", "b"), [("1",)])


def test_a_table_in_a_pipe_has_one_line_per_row_however_long(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("a", "b"), [("x" * 300, "[bold]1[/bold]")])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["a" + " " * 301 + "b", "x" * 300 + "  [bold]1[/bold]"]
