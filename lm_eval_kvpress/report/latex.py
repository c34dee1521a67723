"""Tables for papers: LaTeX with booktabs, one `table` per setting, everything from a file escaped."""

from __future__ import annotations

from collections.abc import Iterator

from lm_eval_kvpress.report.columns import MISSING, Kind, columns, shown, signed
from lm_eval_kvpress.report.markdown import Report, all_marks, cell_text, heading, protocol_words
from lm_eval_kvpress.report.rows import Table

SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "·": r"$\cdot$",
    "∞": r"$\infty$",
    **{one: f"\\{one}" for one in "&%$#_{}"},
}
ESCAPES = str.maketrans(SPECIAL)


def latex(report: Report) -> str:
    """Needs ``\\usepackage{booktabs,graphicx}``; a difference stands behind its figure, marks below the table."""
    return "\n".join(line for table in report.tables for line in _lines(table, report.all_metrics)) + "\n"


def escaped(text: str) -> str:
    return text.translate(ESCAPES)


def _lines(table: Table, all_metrics: bool) -> Iterator[str]:
    of_table = columns(table, all_metrics=all_metrics)
    marks = all_marks(table)
    align = "".join("l" if column.kind is Kind.TEXT else "r" for column in of_table)
    yield r"\begin{table}"
    yield rf"\caption{{{escaped(heading(table.setting))}. {escaped(protocol_words(table))}.}}"
    yield rf"\resizebox{{\textwidth}}{{!}}{{\begin{{tabular}}{{{align}l}}"
    yield r"\toprule"
    titles = [f"{one.group} {one.title}" if one.metric else one.title for one in of_table]
    yield " & ".join(map(escaped, [*titles, "Marks"])) + r" \\"
    yield r"\midrule"
    for row in table.rows:
        cells = []
        for column in of_table:
            difference = row.difference(column.metric) if column.metric else None
            if column.key == "press":
                cells.append(cell_text(column, row, escaped))
                continue
            text = shown(column.value(row), column.kind)
            cells.append(escaped(text if difference is None else f"{text} ({signed(difference.value)})"))
        numbers = ", ".join(str(marks.index(mark) + 1) for mark in row.marks) or MISSING
        yield " & ".join([*cells, numbers]) + r" \\"
    yield r"\bottomrule"
    yield r"\end{tabular}}"
    yield from (rf"\\ {number}. {escaped(mark.text)}" for number, mark in enumerate(marks, start=1))
    yield r"\end{table}"
