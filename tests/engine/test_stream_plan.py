"""Which tokens count as scored under the press: those over a cache that lacks an entry, seen in the stream itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvpress import KnormPress, StreamingLLMPress

from lm_eval_kvpress.engine.stream_plan import StreamPlan
from lm_eval_kvpress.engine.streaming import DocumentStream, stream
from lm_eval_kvpress.models.pressable import PressableModel


@pytest.mark.parametrize("num_sinks", [None, 2], ids=["press", "in place"])
@pytest.mark.parametrize(("budget", "chunk"), [(20, 7), (21, 7), (27, 7), (6, 7), (9, 1), (20, 64)])
def test_tokens_count_from_the_first_chunk_whose_cache_lacks_an_entry(
    make_pressable: Callable[..., PressableModel], budget: int, chunk: int, num_sinks: int | None
) -> None:
    document = torch.randint(1, 211, (75,), generator=torch.Generator().manual_seed(2)).tolist()
    plan = StreamPlan(budget, chunk, num_sinks=num_sinks)

    def press_for(num_entries: int) -> Any:
        ratio = 1 - (budget + 0.5) / num_entries
        return KnormPress(ratio) if num_sinks is None else StreamingLLMPress(ratio, n_sink=num_sinks)

    found, num_pressed = DocumentStream(document, plan), 0
    for step in stream(make_pressable(), [document], 0, plan, press_for):
        found.add(step, step.losses[0])
        num_pressed += len(step.losses[0]) * (step.num_entries < step.start)
    assert found.is_finished and 0 < num_pressed < len(document)
    assert found.outcome().num_pressed == num_pressed
