"""Presses that compress a stream's cache again and again keep its budget, with the chunk as their window."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lm_eval_kvpress.engine.stream_eviction import highest
from lm_eval_kvpress.engine.stream_plan import StreamPlan
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.streaming import STREAM_PRESSES, for_stream, num_sinks


@pytest.mark.parametrize("name", STREAM_PRESSES)
def test_the_budget_replaces_the_ratio_and_the_chunk_the_window(name: str) -> None:
    lags = {"lag_size": 38} if name == "lagkv" else {}
    press = for_stream(parse_press(name, {"compression_ratio": 0.9, **lags}), budget=80, chunk=16)
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
        ("snapkv", {}, 16, "stream_budget=16 is all that press=snapkv always keeps"),
        ("lagkv", {}, 259, "stream_budget=259 is below the 260 entries from which on lagkv compares partitions"),
        ("lagkv", {"lag_size": 39}, 80, "below the 82 entries .*, or lower lag_size"),
    ],
)
def test_presses_and_budgets_that_do_not_fit_are_one_line(
    name: str, arguments: dict[str, Any], budget: int, says: str
) -> None:
    with pytest.raises(UsageError) as caught:
        for_stream(parse_press(name, arguments), budget, chunk=16)
    assert re.search(says, str(caught.value)) and "\n" not in str(caught.value)


LEAST = {"snapkv": 17, "lagkv": 20, "expected_attention": 20}
"""Of chunks of 16 tokens and, for lagkv, partitions of 8; that of others is a chunk."""


@pytest.mark.parametrize("name", [name for name in STREAM_PRESSES if name not in ("streaming_llm", "random")])
def test_what_stays_depends_on_the_entries_at_the_least_budget(
    make_pressable: Callable[..., PressableModel], name: str
) -> None:
    """At the lengths from which entries are evicted, the first time and later, no press falls back to places."""
    chunk, budget, lags = 16, LEAST.get(name, 16), {"lag_size": 8} if name == "lagkv" else {}
    press = for_stream(parse_press(name, lags), budget, chunk)
    with pytest.raises(UsageError, match=f"stream_budget={budget - 1} is"):
        for_stream(parse_press(name, lags), budget - 1, chunk)
    model, generator = make_pressable("sdpa"), torch.Generator().manual_seed(4)
    attention = model.attentions[0]
    with model.presented():
        for num_entries in (StreamPlan(budget, chunk).first_pressed, budget + chunk):
            hidden, scorer = torch.randn(1, num_entries, 64, generator=generator), press.build(num_entries)
            scorer.post_init_from_model(model.model)
            angles = model.model.base_model.rotary_emb(hidden, torch.arange(num_entries)[None])
            kept = []
            for _ in range(2):
                keys, values = torch.randn(2, 1, 4, num_entries, 16, generator=generator)
                scores = scorer.score(attention, hidden, keys, values, None, {"position_embeddings": angles})
                kept.append(highest(scores, budget).tolist())
            assert kept[0] != kept[1], f"{num_entries} entries"
