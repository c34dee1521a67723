"""What happened to each task's contexts and tokens under one press: the sums that stand in the record.

Knows a `PressSpec`. Does not know lm-eval, models or tensors. It is filled in from finished outcomes only, so work that
failed and was done again counts once.
"""

from __future__ import annotations

from collections import defaultdict

from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.records.clock import ContextRecord, TaskTotals


class Ledger:
    """Totals by task.

    Args:
        press: what the contexts were compressed with.
    """

    def __init__(self, press: PressSpec) -> None:
        self._press = press
        self.totals: dict[str, TaskTotals] = defaultdict(TaskTotals)

    def context(self, task: str, record: ContextRecord) -> None:
        """Books one prefilled context."""
        totals = self.totals[task]
        (totals.pressed if record.pressed else totals.unpressed).add(record)
        if record.pressed:
            totals.num_shrunk_contexts += record.num_tokens < self._press.min_context()
            totals.notes.update(self._press.notes(record.num_tokens, len(record.kept_per_layer)))
        elif not self._press.is_none:
            totals.num_short_contexts += 1
