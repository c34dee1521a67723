"""What each head keeps while decoding, against the whole cache under a mask (`decode_references.DenseDecoder`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from decode_references import (
    Choose,
    DenseDecoder,
    all_heads,
    critical,
    each_head,
    expected_attention,
    knorm,
    observed,
    rkv,
    snapkv,
)
from decode_runs import INTERVAL, TARGET, decoded, spec_of
from references import distinct_tokens
from rotation import in_turn

from lm_eval_kvpress.models.pressable import PressableModel

NUM_NEW = 27
CONTEXTS = [distinct_tokens(length, 211, length) for length in (37, 24, 15)]
FUTURE = {"n_future_positions": 9, "n_sink": 2}
CASES: dict[str, tuple[dict[str, Any], Choose]] = {
    "observed_attention": ({}, each_head(observed, TARGET)),
    "snapkv": ({"window_size": 4}, each_head(snapkv(4, 5), TARGET)),
    "expected_attention": (FUTURE, each_head(expected_attention(9, 2), TARGET)),
    "rkv": ({"window_size": 4, "kernel_size": 3}, each_head(rkv(4, 3, 0.1, 0.5), TARGET)),
    "criticalkv:observed_attention": ({}, each_head(critical(observed, TARGET), TARGET)),
    "adakv:knorm": ({}, all_heads(knorm, TARGET, 0.2)),
    "adakv:snapkv": ({"window_size": 4, "alpha_safeguard": 0.5}, all_heads(snapkv(4, 5), TARGET, 0.5)),
    "adakv:expected_attention": (FUTURE, all_heads(expected_attention(9, 2), TARGET, 0.2)),
}


@pytest.mark.parametrize(("name", "architecture"), in_turn(CASES, ["make_pressable", "make_pressable_llama"]))
def test_tokens_are_those_of_the_whole_cache_under_a_mask(
    architecture: str, name: str, request: pytest.FixtureRequest
) -> None:
    make: Callable[..., PressableModel] = request.getfixturevalue(architecture)
    model, (arguments, choose) = make("eager"), CASES[name]
    expected = [DenseDecoder(model, choose, INTERVAL).decode(context, 1, NUM_NEW) for context in CONTEXTS]
    found, keeper = decoded(model, CONTEXTS, spec_of(name, arguments), 1, num_new=NUM_NEW)
    assert found == expected
    assert len(keeper.compressions) == (NUM_NEW - 1) // INTERVAL
