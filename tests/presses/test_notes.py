"""Notes say what kvpress does silently at a given length of context."""

from __future__ import annotations

from typing import Any

import pytest

from lm_eval_kvpress.presses.parse import parse_press


@pytest.mark.parametrize(
    ("name", "arguments", "length", "says"),
    [
        ("pyramidkv", {"compression_ratio": 0.51}, 2048, "pyramidkv fell back to snapkv"),
        ("pyramidkv", {"compression_ratio": 0.3, "window_size": 8}, 2048, None),
        ("lagkv", {}, 259, "lagkv fell back"),
        ("lagkv", {}, 516, None),
        ("lagkv", {"compression_ratio": 0.9}, 1024, "arbitrary"),
        ("snapkv", {"compression_ratio": 0.9}, 600, "arbitrary"),
        ("snapkv", {"compression_ratio": 0.9}, 650, "none was chosen by its score"),
        ("snapkv", {"compression_ratio": 0.9}, 660, None),
        ("snapkv", {"compression_ratio": 0.5}, 128, "none was chosen by its score"),
        ("per_layer:snapkv", {"compression_ratios": "0.1+0.9"}, 600, "arbitrary"),
        ("per_layer:snapkv", {"compression_ratios": "0.1+0.9"}, 660, None),
        ("snapkv", {"compression_ratio": 0}, 650, None),
        ("key_rerotation:streaming_llm", {"kv_budget": 3}, 650, "arbitrary"),
        ("knorm", {"kv_budget": 64}, 64, "covers the whole context"),
        ("knorm", {"kv_budget": 64}, 65, None),
        ("think", {}, 65, "keeps every token"),
        ("random", {"seed": 1}, 65, "same places"),
        ("random", {}, 65, None),
    ],
)
def test_notes_say_what_kvpress_does_silently(
    name: str, arguments: dict[str, Any], length: int, says: str | None
) -> None:
    notes = parse_press(name, arguments).notes(length, 12)
    assert (notes == []) if says is None else any(says in note for note in notes), notes
