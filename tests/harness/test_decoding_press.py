"""Presses that act while text is generated, from the model argument to the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.arguments import parse_arguments
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.recall import recall_document

WORDS = (
    "the cold river ran past an old mill where seven grey geese slept and nobody asked who owned them " * 9
).split()


def requests(num_new: int, lengths: tuple[int, ...] = (90, 40, 70)) -> list[Instance]:
    options = {"until": [], "max_gen_toks": num_new}
    return [
        Instance("generate_until", {}, (" ".join(WORDS[index : index + length]), options), 0, ("gen", index, 1))
        for index, length in enumerate(lengths)
    ]


def model(checkpoint_dir: Path, **arguments: Any) -> KVPress:
    return KVPress(pretrained=str(checkpoint_dir), device="cpu", **arguments)


@pytest.mark.parametrize(
    ("press", "arguments"),
    [
        ("decoding:knorm", {}),
        ("decoding:snapkv", {"decoding.window_size": 4}),
        ("prefill_decoding:pyramidkv+keydiff", {"window_size": 4, "compression_ratio": 0.3}),
        ("decoding:random", {}),
        ("decoding:observed_attention", {}),
        ("decoding:adakv:expected_attention", {}),
        ("prefill_decoding:streaming_llm+cam:knorm", {}),
        ("prefill_decoding:adakv:snapkv+adakv:knorm", {"window_size": 8}),
    ],
)
def test_a_long_generation_holds_the_budget_and_does_not_depend_on_the_batch(
    checkpoint_dir: Path, press: str, arguments: dict[str, Any]
) -> None:
    texts, totals = [], []
    for batch_size in (1, 3):
        lm = model(
            checkpoint_dir, press=press, target_size=24, compression_interval=10, batch_size=batch_size, **arguments
        )
        texts.append(lm.generate_until(requests(45), disable_tqdm=True))
        totals.append(lm.describe()["tasks"]["gen"])
    assert texts[0] == texts[1]
    assert totals[0] == totals[1]
    prefilled = max(totals[0][f"contexts_{kind}"]["num_tokens"] for kind in ("pressed", "unpressed"))
    assert totals[0]["num_decode_compressions"] == 3 * 4, "after 10, 20, 30 and 40 tokens of each of three rows"
    assert 24 < totals[0]["max_decode_entries"] <= prefilled
    assert totals[0]["texts_generated"] == totals[0]["texts_compressed_while_decoding"] == 3
    name = lm.describe()["press"]["name"]
    assert name == press and lm.describe()["press"]["arguments"]["decoding.target_size"] == 24


def test_the_text_is_that_of_the_small_cache() -> None:
    """On the trained checkpoint, where what is forgotten shows: an answer far back is lost under sinks and window."""
    document = recall_document(3, distance=400, kind="word")
    request = Instance(
        "generate_until", {}, (document.context + document.question, {"until": [], "max_gen_toks": 60}), 0, ("g", 0, 1)
    )
    texts = {}
    for press in ("none", "decoding:streaming_llm", "decoding:keydiff"):
        size = {} if press == "none" else {"target_size": 64, "compression_interval": 8}
        lm = KVPress(pretrained="builtin", dtype="float32", device="cpu", press=press, **size)
        (texts[press],) = lm.generate_until([request], disable_tqdm=True)
    assert len(set(texts.values())) == 3, texts
    same = {press: _num_same(text, texts["none"]) for press, text in texts.items()}
    assert all(count > 0 for count in same.values()), "the first tokens come before the first eviction"


def _num_same(one: str, other: str) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


def test_a_budget_that_is_never_reached_changes_nothing_and_says_so(checkpoint_dir: Path) -> None:
    lm = model(checkpoint_dir, press="decoding:streaming_llm", target_size=400, compression_interval=5)
    texts = lm.generate_until(requests(20), disable_tqdm=True)
    assert texts == model(checkpoint_dir).generate_until(requests(20), disable_tqdm=True)
    record = lm.describe()["tasks"]["gen"]
    assert (record["num_decode_compressions"], record["texts_compressed_while_decoding"]) == (0, 0)
    assert record["texts_generated"] == 3


def test_texts_that_ended_before_the_press_acted_are_told_apart(
    checkpoint_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = [*requests(12), *requests(5)]
    for press in ("decoding:knorm", "prefill_decoding:random+knorm"):
        lm = model(checkpoint_dir, press=press, target_size=24, compression_interval=10)
        lm.generate_until(asked, disable_tqdm=True)
        with caplog.at_level("INFO", logger="lm_eval_kvpress"):
            lm.get_model_info()
        assert f"press={press} compressed 3 of 6 texts while decoding, 3 times, to 24 entries a layer" in caplog.text
        assert "compressed nothing" not in caplog.text
    lm = model(checkpoint_dir, press="prefill_decoding:random+knorm", target_size=24, compression_interval=100)
    lm.generate_until(asked, disable_tqdm=True)
    with caplog.at_level("INFO", logger="lm_eval_kvpress"):
        lm.get_model_info()
    assert "press=prefill_decoding:random+knorm compressed none of 6 texts while decoding" in caplog.text


def test_likelihoods_are_refused_where_only_decoding_is_pressed(checkpoint_dir: Path) -> None:
    lm = model(checkpoint_dir, press="decoding:knorm", target_size=24)
    scored = Instance("loglikelihood", {}, ("seven grey", " geese"), 0, ("c", 0, 1))
    rolling = Instance("loglikelihood_rolling", {}, ("seven grey geese",), 0, ("r", 0, 1))
    for call, request in ((lm.loglikelihood, scored), (lm.loglikelihood_rolling, rolling)):
        with pytest.raises(UsageError, match="cannot change a log-likelihood") as caught:
            call([request], disable_tqdm=True)
        assert "\n" not in str(caught.value)
    both = model(checkpoint_dir, press="prefill_decoding:knorm+knorm", target_size=24)
    assert both.loglikelihood([scored], disable_tqdm=True) == model(checkpoint_dir, press="knorm").loglikelihood(
        [scored], disable_tqdm=True
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"press": "decoding:knorm"}, "needs target_size=N"),
        ({"press": "decoding:"}, "wraps another press"),
        ({"press": "decoding:knrm", "target_size": 9}, "did you mean 'knorm'"),
        ({"press": "decoding:leverage", "target_size": 9}, "use one of knorm, keydiff"),
        ({"press": "decoding:adakv:tova", "target_size": 9}, "alike in all heads"),
        ({"press": "cam:knorm"}, "press=cam:knorm needs target_size=N"),
        ({"press": "decoding:knorm", "target_size": 9, "merge_budget": 4}, "belongs to press=cam:PRESS"),
        ({"press": "knorm", "target_compression_ratio": 0.5}, "target_compression_ratio belongs to"),
        ({"press": "compression_ratio_decoding:knorm", "target_size": 9}, "leave target_size out"),
        ({"press": "compression_ratio_decoding:knorm", "target_compression_ratio": 1}, "below 1"),
        (
            {"press": "decoding:observed_attention", "target_size": 9, "attn_implementation": "sdpa"},
            "needs attn_implementation=eager",
        ),
        ({"press": "knorm", "decode_scoring": True}, "decode_scoring=true lets a decoding press act"),
        (
            {"press": "decoding:knorm", "target_size": 9, "decode_scoring": True, "rolling": "one_pass"},
            "in which no press can act",
        ),
        ({"press": "decoding:snapkv", "target_size": 99, "compression_interval": 64}, "must exceed the window_size=64"),
        ({"press": "decoding:snapkv", "target_size": 64}, "always keeps"),
        ({"press": "decoding:knorm", "target_size": 0}, "at least 1"),
        ({"press": "decoding:knorm", "target_size": 9, "decoding.compression_ratio": 0.5}, "leave"),
        ({"press": "decoding:knorm", "target_size": 9, "decoding.n_sink": 2}, "unknown argument"),
        ({"press": "prefill_decoding:knorm", "target_size": 9}, "give two presses"),
        ({"press": "prefill_decoding:adakv:snapkv+tova", "target_size": 9}, "hides entries head by head"),
        ({"press": "knorm", "target_size": 9}, "target_size belongs to"),
        ({"press": "decoding:knorm", "target_size": 9, "rolling": "stream", "stream_budget": 99}, "stream"),
    ],
)
def test_bad_input_is_one_line(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse_arguments(arguments)
    assert "\n" not in str(caught.value)
