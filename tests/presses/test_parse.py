"""Press names and arguments as typed: bad input is one line, and a spec comes back from what is recorded of it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from press_cases import PRESSES, spec_for

from lm_eval_kvpress.presses.parse import parse_press, press_argument_names

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("snapvk", {}, "did you mean 'snapkv'"),
    ("", {}, "unknown press"),
    ("snapkv:knorm", {}, "wraps no other press"),
    ("snapkv+think", {}, "unknown press"),
    ("adakv", {}, "wraps another press"),
    ("adakv:", {}, "wraps another press"),
    ("adakv:snapvk", {}, "did you mean 'snapkv'"),
    ("adakv:none", {}, "none removes nothing"),
    ("adakv:think", {}, "score"),
    ("adakv:adakv:snapkv", {}, "adakv"),
    ("adakv:observed_attention", {}, "attention"),
    ("adakv:criticalkv:snapkv", {}, "critical_adakv"),
    ("adakv:fastkvzip", {}, "not supported"),
    ("key_rerotation:pyramidkv", {}, "wrap snapkv"),
    ("key_rerotation:adakv:snapkv", {}, "score"),
    ("criticalkv:knorm", {}, "negative"),
    ("block:snapkv", {}, "knorm"),
    ("chunk:expected_attention", {}, "knorm"),
    ("chunk:lagkv", {}, "chunk"),
    ("chunkkv:observed_attention", {}, "attention"),
    ("per_layer:criticalkv:snapkv", {"compression_ratios": 0.5}, "ratio"),
    ("dms:streaming_llm", {"threshold": 0}, "compression_ratio"),
    ("lukv:streaming_llm", {}, "would lose the newest tokens"),
    ("lukv:compactor", {}, "compression_ratio"),
    ("chunkkv:streaming_llm", {}, "the sinks would go"),
    ("entropy_gated_chunkkv:streaming_llm", {}, "the sinks would go"),
    ("chunkkv:criticalkv:streaming_llm", {}, "nearly all chunks are infinite"),
    ("entropy_gated_chunkkv:criticalkv:snapkv", {}, "nearly all chunks are infinite"),
    ("chunk:criticalkv:streaming_llm", {}, "sinks in every chunk"),
    ("chunk:criticalkv:lagkv", {}, "chunk cannot wrap criticalkv:lagkv: it would fall back"),
    ("composed:kvcompose+think", {}, "kvcompose cannot be composed"),
    ("composed:", {}, "composed:snapkv+think"),
    ("composed:snapkv", {}, "composed:snapkv+think"),
    ("composed:snapkv+knorm", {}, "think"),
    ("composed:think+think", {}, "think"),
    ("composed:adakv:snapkv+think", {}, "adakv"),
    ("composed:key_rerotation:snapkv+think", {}, "key_rerotation"),
    ("qfilter", {}, "calibrate qfilter writes it"),
    ("fastkvzip", {}, "trained"),
    ("decoding:knorm", {}, "decoding"),
    ("snapkv", {"window_sizes": 8}, "did you mean 'window_size'"),
    ("streaming_llm", {"window_size": 8}, "n_sink"),
    ("compactor", {"_leverage_press": 8}, "unknown argument"),
    ("dms:knorm", {"threshold": 0, "decoding": True}, "unknown argument"),
    ("composed:snapkv+think", {"window_size": 8}, "snapkv.window_size or think.window_size"),
    ("snapkv", {"window_size": 8, "snapkv.window_size": 8}, "twice"),
    ("snapkv", {"compression_ratio": -0.1}, "at least 0 and below 1"),
    ("snapkv", {"compression_ratio": 1}, "at least 0 and below 1"),
    ("snapkv", {"compression_ratio": 50}, "fraction removed"),
    ("snapkv", {"compression_ratio": "half"}, "must be a number"),
    ("snapkv", {"compression_ratio": None}, "must be a number"),
    ("snapkv", {"compression_ratio": True}, "must be a number"),
    ("snapkv", {"compression_ratio": math.nan}, "must be a number"),
    ("snapkv", {"compression_ratio": math.inf}, "must be a number"),
    ("snapkv", {"compression_ratio": 0.5, "kv_budget": 64}, "give one of them"),
    ("snapkv", {"kv_budget": 0}, "at least 1"),
    ("snapkv", {"kv_budget": -3}, "at least 1"),
    ("snapkv", {"kv_budget": 1.5}, "whole number"),
    ("snapkv", {"kv_budget": "all"}, "whole number"),
    ("snapkv", {"window_size": 0}, "at least 1"),
    ("snapkv", {"window_size": "wide"}, "whole number"),
    ("snapkv", {"window_size": 8.5}, "whole number"),
    ("snapkv", {"kernel_size": 4}, "odd"),
    ("streaming_llm", {"n_sink": -1}, "at least 0"),
    ("pyramidkv", {"beta": 0}, "at least 1"),
    ("lagkv", {"cross_scoring": "yes"}, "true or false"),
    ("cur", {"leverage_type": "keys"}, "kv_product"),
    ("random", {"seed": "lucky"}, "whole number"),
    ("adakv:knorm", {"alpha_safeguard": 1.5}, "at most 1"),
    ("merging:knorm", {"merge_fraction": 0}, "above 0"),
    ("entropy_gated_chunkkv:knorm", {"chunk_length": 4}, "low_entropy_chunk_length"),
    ("chunk:knorm", {"chunk_length": 0}, "at least 1"),
    ("chunk:knorm", {"kv_budget": 64}, "use compression_ratio"),
    ("chunkkv:knorm", {"kv_budget": 64}, "use compression_ratio"),
    ("think", {"compression_ratio": 0.5}, "key_channel_compression_ratio"),
    ("think", {"kv_budget": 64}, "key_channel_compression_ratio"),
    ("think", {"key_channel_compression_ratio": 1}, "below 1"),
    ("simlayerkv", {}, "needs lazy_threshold"),
    ("simlayerkv", {"lazy_threshold": 1}, "below 1"),
    ("simlayerkv", {"lazy_threshold": 0.9, "compression_ratio": 0.5}, "lazy_threshold"),
    ("simlayerkv", {"lazy_threshold": 0.9, "n_last": 8, "n_recent": 8}, "n_last"),
    ("per_layer:knorm", {}, "needs compression_ratios"),
    ("per_layer:knorm", {"compression_ratios": "0.1+0.5+1"}, "below 1"),
    ("per_layer:knorm", {"compression_ratios": "0.1;0.5"}, "must be a number"),
    ("per_layer:knorm", {"compression_ratios": ""}, "must be a number"),
    ("per_layer:knorm", {"compression_ratios": []}, "number"),
    ("per_layer:knorm", {"compression_ratios": "0.1", "compression_ratio": 0.5}, "compression_ratios"),
    ("dms:knorm", {}, "needs threshold"),
    ("dms:knorm", {"threshold": 0, "compression_ratio": 0.5}, "threshold"),
    ("none", {"compression_ratio": "half"}, "compression_ratio=half must be a number"),
    ("none", {"kv_budget": -1}, "kv_budget=-1 must be at least 0"),
    ("none", {"window_size": 64}, "press=none takes none"),
]


@pytest.mark.parametrize(("name", "arguments", "says"), BAD, ids=[f"{name} {given}" for name, given, _ in BAD])
def test_bad_input_is_one_line(name: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_press(name, arguments)
    message = str(caught.value)
    assert says in message and "\n" not in message, message


@pytest.mark.parametrize("name", PRESSES)
def test_a_spec_comes_back_from_its_name_and_arguments(name: str) -> None:
    spec = spec_for(name).for_question(0)
    assert parse_press(spec.name, spec.arguments) == spec
    through_json = json.loads(json.dumps(spec.describe()))
    assert parse_press(through_json["name"], through_json["arguments"]) == spec
    assert through_json["classes"] and set(spec.arguments) <= press_argument_names(name)


def test_arguments_are_those_of_the_class_with_its_defaults() -> None:
    spec = parse_press("snapkv", {"window_size": "32"})
    assert spec.arguments == {"compression_ratio": 0.5, "window_size": 32, "kernel_size": 5}
    assert parse_press("none", {"compression_ratio": 0}).arguments == {}
    assert parse_press("random", {"seed": None}).arguments["seed"] is None
    composed = parse_press("composed:snapkv+think", {"think.window_size": 16})
    assert composed.arguments["snapkv.window_size"] == 64
    assert composed.arguments["think.window_size"] == 16
    assert composed.build(100).presses[1].window_size == 16  # type: ignore[union-attr]


def test_argument_names_are_all_that_the_parser_has_something_to_say_about() -> None:
    size = {"compression_ratio", "kv_budget"}
    assert press_argument_names("none") == size
    assert {"window_size", "kernel_size", *size} <= press_argument_names("snapkv")
    assert {"window_size", "think.window_size"} <= press_argument_names("composed:snapkv+think")
    with pytest.raises(ValueError, match="did you mean 'snapkv'"):
        press_argument_names("snapvk")
