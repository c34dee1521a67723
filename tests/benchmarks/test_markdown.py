"""Tables of Markdown have a cell per heading in every row."""

import pytest

from scripts.markdown import table


def test_a_table_has_headings_a_rule_and_rows() -> None:
    assert table(["press", "s"], [["none", "1"], ["snapkv", "2"]]).splitlines() == [
        "| press | s |",
        "|---|---|",
        "| none | 1 |",
        "| snapkv | 2 |",
    ]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(AssertionError):
        table(["press", "s"], [["none"]])
