"""CaM: the value of an entry that is evicted is added to those of entries that stay, by chance.

What is merged, where to and with which probability is kvpress's own ``CAMPress.compress``. It is told which entries
stay, so that scores which are equal up to rounding cannot put one entry among both the kept and the evicted. Does not
know models, or when a cache is compressed.

Source: openreview LCTmppB165; kvpress ``presses/cam_press.py``.

Letters in shape comments: H key-value heads, T cached entries, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import kvpress

DEFAULT_MERGE_BUDGET = 32
"""kvpress's own: kept entries among which an evicted value is shared out."""


@dataclass
class _InOrder(kvpress.ScorerPress):
    """A press whose scores were decided before."""

    order: Any = None  # (T,)

    def score(self, module: Any, hidden_states: Any, keys: Any, *_: Any) -> Any:
        return self.order.to(keys).expand(keys.shape[:3])


def merge_evicted(
    module: Any, keys: Any, values: Any, attention_sums: Any, *, stays: Any, merges: Any, merge_budget: int
) -> tuple[Any, Any]:
    """Evict entries of one row, of which some are merged first; draws random numbers.

    Args:
        module: the attention.
        keys, values: ``(1, H, T, D)``; left as they are.
        attention_sums: ``(1, H, T)``, attention that each entry has received while text was generated.
        stays, merges: ``(T,)``, whether an entry stays, and whether it is merged if it does not.
        merge_budget: kept entries among which an evicted value is shared out.

    Returns:
        keys and values of the entries that stay, in their order.
    """
    num_kept, num_merged = int(stays.sum()), int((merges & ~stays).sum())
    order = merges.float().masked_fill(stays, 2.0)  # kvpress takes the best entries, and merges the next best
    press = kvpress.CAMPress(_InOrder(order=order), target_size=num_kept, merge_budget=merge_budget)
    layer = int(module.layer_idx)
    press.layer_step_counts[layer], press._running_attn_sum[layer] = num_merged, attention_sums
    kept: tuple[Any, Any] = press.compress(module, keys, keys, values.clone(), attention_sums.to(values.dtype), {})
    return kept
