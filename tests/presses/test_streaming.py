"""Presses that compress a stream's cache again and again keep its budget, with the chunk as their window."""

from __future__ import annotations

from typing import Any

import pytest

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.streaming import STREAM_PRESSES, for_stream, num_sinks


@pytest.mark.parametrize("name", STREAM_PRESSES)
def test_the_budget_replaces_the_ratio_and_the_chunk_the_window(name: str) -> None:
    press = for_stream(parse_press(name, {"compression_ratio": 0.9}), budget=80, chunk=16)
    assert (press.kv_budget, press.compression_ratio) == (80, None)
    assert press.arguments.get("window_size", 16) == 16
    assert num_sinks(press) == (4 if name == "streaming_llm" else None)


@pytest.mark.parametrize(
    ("name", "arguments", "budget", "says"),
    [
        ("none", {}, 80, "cannot compress one cache again and again"),
        ("adakv:snapkv", {}, 80, "use one of streaming_llm, snapkv"),
        ("random", {"seed": 1}, 80, "leave seed out"),
        ("streaming_llm", {}, 19, "4 sinks and the newest chunk of 16 tokens"),
    ],
)
def test_presses_and_budgets_that_do_not_fit_are_one_line(
    name: str, arguments: dict[str, Any], budget: int, says: str
) -> None:
    with pytest.raises(UsageError) as caught:
        for_stream(parse_press(name, arguments), budget, chunk=16)
    assert says in str(caught.value) and "\n" not in str(caught.value)
