"""The list of presses covers kvpress, and docs/presses.md is that list."""

from __future__ import annotations

import kvpress
from press_cases import PRESSES
from repository import ROOT

from lm_eval_kvpress.presses.catalog import ROWS
from lm_eval_kvpress.presses.listing import list_presses
from lm_eval_kvpress.presses.unsupported import UNSUPPORTED


def test_the_table_covers_every_press_that_is_listed() -> None:
    heads = {name.partition(":")[0] for name in PRESSES} | {"none", "decoding", "prefill_decoding"}
    assert {press.name.partition(":")[0] for press in list_presses() if press.supported} == heads


def test_every_press_of_kvpress_is_listed() -> None:
    names = [press.name for press in list_presses()]
    assert len(names) == len(set(names))
    listed = {base for row in ROWS.values() for base in row.factory.__mro__}
    listed |= {unsupported.factory for unsupported in UNSUPPORTED.values()}
    offered = {getattr(kvpress, name) for name in kvpress.__all__ if name.endswith("Press")}
    assert offered - listed == set()


DOCS = ROOT / "docs" / "presses.md"
BEGIN, END = "<!-- table: python tests/presses/test_spec.py rewrites it -->\n", "<!-- end of table -->\n"


def table() -> str:
    """The list of presses as the two tables of docs/presses.md."""
    rows = ["| `press=` | arguments and defaults | needs | paper |", "|---|---|---|---|"]
    rest = ["| not supported | because | paper |", "|---|---|---|"]
    for press in list_presses():
        paper = f"[{press.paper.split('/')[-1]}]({press.paper})" if press.paper else ""
        if not press.supported:
            rest.append(f"| `{press.name}` | {press.needs} | {paper} |")
            continue
        arguments = ", ".join(f"`{name}={default}`" for name, default in press.arguments.items())
        rows.append(f"| `{press.name}` | {arguments} | {press.needs} | {paper} |")
    return "\n".join([*rows, "", *rest]) + "\n"


def test_the_documentation_lists_the_presses() -> None:
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    written, _, after = rest.partition(END)
    assert written == table(), "run: python tests/presses/test_spec.py"
