"""The list of presses covers kvpress."""

from __future__ import annotations

import kvpress
from press_cases import PRESSES
from repository import ROOT

from lm_eval_kvpress.presses.catalog import ROWS
from lm_eval_kvpress.presses.decodable import MEASURED, WHY_NOT
from lm_eval_kvpress.presses.listing import list_presses
from lm_eval_kvpress.presses.names import ACT_WHILE_DECODING
from lm_eval_kvpress.presses.unsupported import UNSUPPORTED


def test_the_table_covers_every_press_that_is_listed() -> None:
    heads = {name.partition(":")[0] for name in PRESSES} | {"none", *ACT_WHILE_DECODING}
    assert {press.name.partition(":")[0] for press in list_presses() if press.supported} == heads


def test_every_press_of_kvpress_is_listed() -> None:
    names = [press.name for press in list_presses()]
    assert len(names) == len(set(names))
    listed = {base for row in ROWS.values() for base in row.factory.__mro__}
    listed |= {unsupported.factory for unsupported in UNSUPPORTED.values()}
    offered = {getattr(kvpress, name) for name in kvpress.__all__ if name.endswith("Press")}
    assert offered - listed == set()


def test_what_does_not_run_names_the_page_on_which_that_was_measured() -> None:
    unsupported = [press for press in list_presses() if not press.supported]
    assert {press.name for press in unsupported} == {"fastkvzip", "restorekv"}
    for name, needs in [*((one.name, one.needs) for one in unsupported), *((name, MEASURED) for name in WHY_NOT)]:
        page = (ROOT / needs.rpartition(" ")[2]).read_text(encoding="utf-8")
        assert f"`{name}`" in page, name
