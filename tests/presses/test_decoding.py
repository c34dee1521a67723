"""Names and arguments of presses that act while text is generated."""

from __future__ import annotations

from typing import Any

import pytest
from statistics_files import NEOX, statistics_file

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses.catalog import ROWS
from lm_eval_kvpress.presses.decodable import ALL_HEADS, DECODING_PRESSES, WHY_NOT
from lm_eval_kvpress.presses.decoding import DecodingSizes, parse_decoding, split_arguments, split_name
from lm_eval_kvpress.presses.parse import parse_press

ARGUMENTS: dict[str, dict[str, Any]] = {
    name: {"statistics": statistics_file(name, NEOX)} for name in ("qfilter", "expected_attention_stats")
}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("snapkv", ("snapkv", None)),
        ("adakv:snapkv", ("adakv:snapkv", None)),
        ("decoding:knorm", ("none", "knorm")),
        ("decoding:adakv:snapkv", ("none", "adakv:snapkv")),
        ("cam:knorm", ("none", "cam:knorm")),
        ("compression_ratio_decoding:knorm", ("none", "compression_ratio_decoding:knorm")),
        ("prefill_decoding:snapkv+cam:knorm", ("snapkv", "cam:knorm")),
        ("prefill_decoding:snapkv+knorm", ("snapkv", "knorm")),
        ("prefill_decoding:composed:snapkv+think+knorm", ("composed:snapkv+think", "knorm")),
    ],
)
def test_a_name_splits_into_the_press_of_the_prefill_and_the_decoding_one(
    name: str, parts: tuple[str, str | None]
) -> None:
    assert split_name(name) == parts


@pytest.mark.parametrize(
    "name", ["decoding", "decoding:", "cam", "cam:", "prefill_decoding:knorm", "prefill_decoding:+knorm"]
)
def test_half_a_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="as in "):
        split_name(name)


def test_arguments_of_the_decoding_press_have_its_prefix() -> None:
    assert split_arguments({"n_sink": 2, "decoding.n_sink": 8}) == ({"n_sink": 2}, {"n_sink": 8})


@pytest.mark.parametrize("name", DECODING_PRESSES)
def test_a_decoding_press_keeps_its_target_size(name: str) -> None:
    spec = parse_decoding(parse_press("none"), name, ARGUMENTS.get(name, {}), DecodingSizes(target_size=300))
    assert (spec.num_kept(1000), spec.target_size, spec.interval) == (300, 300, 128)
    assert spec.full_name == f"decoding:{name}"
    described = spec.describe()
    assert (described["target_size"], described["compression_interval"]) == (300, 128)
    assert not {"kv_budget", "compression_ratio"} & described.keys()


@pytest.mark.parametrize("prefill", ["tova", "key_rerotation:streaming_llm"])
@pytest.mark.parametrize("name", ["tova", "cam:knorm", "criticalkv:cap"])
def test_presses_that_average_over_heads_follow_one_that_keeps_the_same_of_all(prefill: str, name: str) -> None:
    assert parse_decoding(parse_press(prefill), name, {}, DecodingSizes(target_size=300)).press.name in name


@pytest.mark.parametrize("name", [name for name in DECODING_PRESSES if name not in ALL_HEADS])
def test_heads_may_share_what_is_kept(name: str) -> None:
    spec = parse_decoding(parse_press("adakv:knorm"), f"adakv:{name}", ARGUMENTS.get(name, {}), DecodingSizes(300))
    assert spec.alpha_safeguard == 0.2 and spec.attn_implementation is None


def test_every_press_that_scores_decodes_or_says_why_not() -> None:
    scoring = {row.name for row in ROWS.values() if row.scores and row.wraps is None}
    assert scoring | {"finch", "pyramidkv"} == {*DECODING_PRESSES, *WHY_NOT}


@pytest.mark.parametrize(
    ("name", "sizes", "described"),
    [
        ("cam:knorm", {"target_size": 30}, {"target_size": 30, "merge_budget": 32}),
        ("cam:tova", {"target_size": 30, "merge_budget": 4}, {"target_size": 30, "merge_budget": 4}),
        ("compression_ratio_decoding:knorm", {}, {"target_compression_ratio": 0.5}),
        ("compression_ratio_decoding:keydiff", {"target_compression_ratio": 0.75}, {"target_compression_ratio": 0.75}),
    ],
)
def test_other_sizes_are_recorded(name: str, sizes: dict[str, Any], described: dict[str, Any]) -> None:
    spec = parse_decoding(parse_press("none"), name, {}, DecodingSizes(**sizes))
    assert spec.describe() == {"compression_interval": 128, **described}
    assert spec.full_name == spec.name == name


@pytest.mark.parametrize(
    ("prefill", "name", "given", "says"),
    [
        ("none", "knorm", {"target_size": None}, "needs target_size=N"),
        ("none", "knorm", {"target_compression_ratio": 0.5}, "belongs to press=compression_ratio_decoding:PRESS"),
        ("none", "knorm", {"merge_budget": 5}, "belongs to press=cam:PRESS"),
        ("none", "compression_ratio_decoding:knorm", {}, "leave target_size out"),
        ("none", "compression_ratio_decoding:", {}, "wraps another press"),
        ("none", "compression_ratio_decoding:lagkv", {"target_size": None}, "needs target_size=N"),
        ("none", "cam:adakv:knorm", {}, "merges into what all heads keep"),
        ("none", "cam:observed_attention", {}, "gives the press no attention"),
        ("none", "cam:criticalkv:snapkv", {}, "cam:criticalkv:snapkv: cam averages scores over heads"),
        ("none", "adakv:tova", {}, "scores a token alike in all heads"),
        ("none", "adakv:lagkv", {}, "falls back to the newest entries"),
        ("none", "none", {}, "evicts nothing"),
        ("none", "leverage", {}, "needs the hidden states of every cached token"),
        ("none", "pyramidkv", {}, "its layers take shares of one length"),
        ("none", "merging:knorm", {}, "kvpress decodes with presses that score tokens"),
        ("none", "criticalkv:tova", {}, "under criticalkv they keep different tokens"),
        ("snapkv", "tova", {}, "averages over heads place by place"),
        ("key_rerotation:knorm", "cam:knorm", {}, "averages over heads place by place"),
        ("none", "lagkv", {}, "below the 260 entries"),
        ("none", "expected_attention", {"compression_interval": 4}, "must exceed the n_sink=4"),
        ("none", "random", {"arguments": {"seed": 3}}, "would evict the same places"),
        ("adakv:snapkv", "tova", {}, "scores all heads alike"),
        ("adakv:snapkv", "cam:knorm", {}, "scores all heads alike"),
        ("adakv:snapkv", "observed_attention", {}, "scores all heads alike"),
        ("none", "adakv:knorm", {"arguments": {"alpha_safeguard": 2}}, "at most 1"),
        ("chunk:knorm", "observed_attention", {}, "needs sdpa attention"),
        ("none", "knorm", {"arguments": {"compression_ratio": 0.5}}, "leave decoding.compression_ratio out"),
        ("none", "snapkv", {"target_size": 64}, "is all that decoding:snapkv always keeps"),
        ("none", "snapkv", {"compression_interval": 64}, "must exceed the window_size=64"),
        ("none", "knorm", {"target_size": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_one_line(prefill: str, name: str, given: dict[str, Any], says: str) -> None:
    sizes = {"target_size": 99, "compression_interval": 128, **given}
    arguments = sizes.pop("arguments", {})
    with pytest.raises(UsageError) as caught:
        parse_decoding(parse_press(prefill), name, arguments, DecodingSizes(**sizes))
    assert says in str(caught.value) and "\n" not in str(caught.value)
