"""Suggestions for a name that nothing has."""

from __future__ import annotations

import pytest

from lm_eval_kvpress.presses.suggest import near


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("snapvk", "did you mean 'snapkv'? "),
        ("knrom", "did you mean 'knorm'? "),
        ("knorm", "did you mean 'knorm'? "),
        ("SnapKVPress", "did you mean 'snapkv'? "),
        ("Snap-KV", "did you mean 'snapkv'? "),
        ("streaming", "did you mean 'streaming_llm'? "),
        ("sinks", "did you mean 'streaming_llm'? "),
        ("h2o", ""),
        ("llama", ""),
        ("", ""),
    ],
)
def test_the_nearest_choice_is_suggested_and_nothing_that_is_far(name: str, hint: str) -> None:
    assert near(name, iter(("snapkv", "knorm", "streaming_llm"))) == hint


def test_nothing_is_suggested_where_there_is_no_choice() -> None:
    assert near("snapkv", {}) == ""
