"""The cache of a stream does not grow with the document."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kvpress import StreamingLLMPress, TOVAPress

from lm_eval_kvpress.engine.stream_plan import StreamPlan
from lm_eval_kvpress.engine.streaming import stream
from lm_eval_kvpress.models.pressable import PressableModel

BUDGET, CHUNK = 24, 8


@pytest.mark.parametrize("num_sinks", [None, 4], ids=["press", "in place"])
def test_cache_bytes_are_flat_and_every_token_is_scored(
    make_pressable: Callable[..., PressableModel], num_sinks: int | None
) -> None:
    tokens = torch.randint(1, 211, (1500,), generator=torch.Generator().manual_seed(3)).tolist()

    def press_for(num_entries: int) -> StreamingLLMPress | TOVAPress:
        ratio = 1 - (BUDGET + 0.5) / num_entries
        return TOVAPress(ratio) if num_sinks is None else StreamingLLMPress(ratio, n_sink=num_sinks)

    plan = StreamPlan(BUDGET, CHUNK, num_sinks=num_sinks)
    steps = list(stream(make_pressable("sdpa"), [tokens], 0, plan, press_for))
    later = [step for step in steps if step.start >= 500 and step.start + CHUNK < len(tokens)]
    assert len(later) > 120
    assert len({step.cache_bytes for step in later}) == 1
    assert {step.num_entries for step in later} == {BUDGET}
    assert sum(len(row) for step in steps for row in step.losses) == len(tokens)
    entry = 3 * 2 * 4 * 16 * 4  # layers x keys and values x heads x head_dim x bytes of fp32
    assert later[0].cache_bytes <= entry * (BUDGET + CHUNK + max(BUDGET // 4, 4 * CHUNK))
