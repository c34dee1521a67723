"""What a cell's own prefills cost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lm_eval_kvpress.sweep.cell_run import CellRun


@pytest.mark.parametrize(("shares", "tokens"), [(False, 7), (True, 0)])
def test_prefills_of_earlier_calls_and_shared_ones_are_not_this_calls_own(shares: bool, tokens: int) -> None:
    batches = [SimpleNamespace(num_prefill_tokens=count) for count in (100, 3, 4)]
    meter = SimpleNamespace(records=SimpleNamespace(batches=batches))
    runner: Any = SimpleNamespace(meter=meter, compressor=SimpleNamespace(shares=shares))
    nothing: Any = None
    session: Any = SimpleNamespace(runner=runner)
    run = CellRun(nothing, session, nothing, nothing, num_batches_before=1)
    assert run.num_tokens_prefilled == tokens
