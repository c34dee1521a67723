"""Every mistake in the model arguments is one line that says what is wrong and what to do."""

from __future__ import annotations

from typing import Any

import kvpress
import pytest
import torch

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.arguments import BOOLEANS, LOADING_ARGUMENTS, ignored_arguments, parse_arguments

BAD: list[tuple[dict[str, Any], str]] = [
    ({"press": "snapvk"}, "snapkv"),
    ({"press": ""}, "press=none"),
    ({"press": "decodng:knorm"}, "did you mean 'decoding'"),
    ({"press": "decoding:knorm", "target_size": 64, "compression_ratio": 0.5}, "leave compression_ratio out"),
    ({"max_length": "abc"}, "max_length=abc must be a whole number"),
    ({"max_length": -5}, "max_length=-5 must be at least 1"),
    ({"max_length": 0}, "max_length=0 must be at least 1"),
    ({"batch_size": 0}, "batch_size=0 must be auto or"),
    ({"batch_size": "abc"}, "batch_size=abc must be auto or"),
    ({"max_batch_size": 0}, "max_batch_size=0"),
    ({"device": "gpu"}, "device=gpu is not known: cpu, cuda"),
    ({"dtype": "float23"}, "dtype=float23 is not known: choose one of auto, float32"),
    ({"throughput_log": "log.txt"}, ".jsonl or .csv"),
    ({"throughput_log": ".jsonl"}, ".jsonl or .csv"),
    ({"throughput_log": ""}, "throughput_log= is empty"),
    ({"rolling": "stream", "press": "knorm", "stream_budget": 128, "stream_output": ""}, "stream_output= is empty"),
    ({"press": "snapkv", "window_sizes": 32}, "window_size"),
    ({"press": "snapkv", "bath_size": 32}, "batch_size"),
    ({"press": "streaming_llm", "window_size": 32}, "window_size"),
    ({"press": "snapkv", "compression_ratio": -0.1}, "compression_ratio"),
    ({"press": "snapkv", "compression_ratio": 1.0}, "compression_ratio"),
    ({"press": "snapkv", "compression_ratio": "half"}, "compression_ratio"),
    ({"press": "snapkv", "compression_ratio": 0.5, "kv_budget": 64}, "kv_budget"),
    ({"press": "snapkv", "kv_budget": 0}, "kv_budget"),
    ({"press": "none", "compression_ratio": 1.5}, "compression_ratio=1.5 must be at least 0 and below 1"),
    ({"press": "SnapKVPress"}, "did you mean 'snapkv'"),
    ({"press": "SnapKV"}, "did you mean 'snapkv'"),
    ({"press": "h2o"}, "did you mean 'observed_attention'"),
    ({"press": "knorm", "ratio": 0.5}, "did you mean 'compression_ratio'"),
    ({"press": "key_rerotation:" * 1000 + "knorm"}, "too many parts"),
    ({"press": "random", "seed": 2**70}, "seed=1180591620717411303424 must be at least 0 and at most"),
    ({"query_tokens": 10**400}, "must be a whole number"),
    ({"trust_remote_code": "no"}, "trust_remote_code=no must be true or false"),
    ({"parallelize": "off"}, "parallelize=off must be true or false"),
    ({"local_files_only": 1}, "local_files_only=1 must be true or false"),
    ({"add_bos_token": "yes"}, "add_bos_token=yes must be true or false"),
    ({"enable_thinking": True}, "needs think_end_token"),
    ({"prefix_token_id": -1}, "prefix_token_id=-1 must be at least 0"),
    ({"prefix_token_id": "bos"}, "prefix_token_id=bos must be a whole number"),
    ({"query_tokens": -1}, "query_tokens"),
    ({"query_tokens": "many"}, "query_tokens"),
    ({"query_tokens": 1.5}, "query_tokens"),
    ({"rolling": "both"}, "one_pass"),
    ({"rolling_context": 0}, "rolling_context"),
    ({"press": "knorm", "rolling": "stream"}, "stream_budget=N"),
    ({"press": "none", "rolling": "stream", "stream_budget": 64}, "use one of streaming_llm"),
    ({"press": "snapkv", "rolling": "stream", "stream_budget": 256, "window_size": 32}, "set stream_chunk"),
    ({"short_context": "pad"}, "shrink"),
    ({"allow_extrapolation": "perhaps"}, "true or false"),
    ({"fast": "very"}, "true or false"),
    ({"attn_implementation": "flash_attention_2"}, "sdpa or eager"),
    ({"press": "observed_attention", "attn_implementation": "sdpa"}, "eager"),
    ({"press": "adakv:snapkv", "attn_implementation": "eager"}, "sdpa"),
    ({"press": "duo_attention"}, "duo_attention"),
    ({"softmax_dtype": "bfloat16"}, "float32"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[str(arguments) for arguments, _ in BAD])
def test_bad_arguments_are_refused_in_one_line(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_arguments(arguments)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message


def test_the_window_of_a_stream_is_its_chunk() -> None:
    given = {"press": "snapkv", "rolling": "stream", "stream_budget": 256, "stream_chunk": 32}
    for own in ({}, {"window_size": 32}):
        assert parse_arguments({**given, **own})[0].press.arguments["window_size"] == 32


@pytest.mark.parametrize(
    "given",
    [
        *({"dtype": dtype} for dtype in ("auto", "half", "float32", torch.bfloat16)),
        *({"batch_size": size} for size in (4, "8", "auto", "auto:4")),
        *({"device": device} for device in ("cpu", "cuda:1", "mps", "xpu:0", torch.device("cpu"))),
        {"max_length": 256.0},
    ],
    ids=str,
)
def test_what_hflm_takes_is_passed_on(given: dict[str, Any]) -> None:
    assert parse_arguments(given)[1].items() >= given.items()


def test_press_arguments_and_hflm_arguments_are_told_apart() -> None:
    settings, rest = parse_arguments({"press": "snapkv", "window_size": 16, "batch_size": 4, "query_tokens": 3})
    assert settings.press.arguments["window_size"] == 16
    assert settings.query_tokens == 3
    assert rest == {"batch_size": 4, "attn_implementation": "sdpa"}
    assert parse_arguments({"press": "observed_attention"})[1]["attn_implementation"] == "eager"


def test_every_argument_of_hflm_that_is_true_or_false_is_known() -> None:
    """`autogptq` may name a file."""
    of_hflm = {"truncation", "logits_cache", "trust_remote_code", "use_fast_tokenizer", "add_bos_token", "parallelize"}
    assert of_hflm | {"gptqmodel", "enable_thinking"} == BOOLEANS - LOADING_ARGUMENTS


@pytest.mark.parametrize("press", ["none", None, "no_press"])
def test_a_ratio_beside_no_press_is_ignored_and_named(press: str | None) -> None:
    """As in a loop over presses with one ratio."""
    given = {"press": press, "compression_ratio": 0.5}
    assert parse_arguments(given)[0].press.arguments == {}
    assert ignored_arguments(given) == {"compression_ratio": 0.5}
    assert ignored_arguments({"press": press, "compression_ratio": 0}) == {}
    assert ignored_arguments({"press": "knorm", "compression_ratio": 0.5}) == {}


def test_a_press_object_is_described_by_its_name_and_fields() -> None:
    with pytest.raises(UsageError, match="SnapKVPress.compression_ratio=0.5.* is an object.* did you mean 'snapkv'"):
        parse_arguments({"press": kvpress.SnapKVPress(0.5)})
