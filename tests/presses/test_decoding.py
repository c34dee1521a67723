"""Names and arguments of presses that act while text is generated."""

from __future__ import annotations

from typing import Any

import pytest

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses.decoding import DECODING_PRESSES, parse_decoding, split_arguments, split_name
from lm_eval_kvpress.presses.parse import parse_press


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("snapkv", ("snapkv", None)),
        ("adakv:snapkv", ("adakv:snapkv", None)),
        ("decoding:knorm", ("none", "knorm")),
        ("prefill_decoding:snapkv+knorm", ("snapkv", "knorm")),
        ("prefill_decoding:composed:snapkv+think+knorm", ("composed:snapkv+think", "knorm")),
    ],
)
def test_a_name_splits_into_the_press_of_the_prefill_and_the_decoding_one(
    name: str, parts: tuple[str, str | None]
) -> None:
    assert split_name(name) == parts


@pytest.mark.parametrize("name", ["decoding", "decoding:", "prefill_decoding:knorm", "prefill_decoding:+knorm"])
def test_half_a_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="as in "):
        split_name(name)


def test_arguments_of_the_decoding_press_have_its_prefix() -> None:
    assert split_arguments({"n_sink": 2, "decoding.n_sink": 8}) == ({"n_sink": 2}, {"n_sink": 8})


@pytest.mark.parametrize("name", DECODING_PRESSES)
def test_a_decoding_press_keeps_its_target_size(name: str) -> None:
    spec = parse_decoding(parse_press("none"), name, {}, target_size=99, interval=None)
    assert (spec.press.kv_budget, spec.target_size, spec.interval) == (99, 99, 128)
    described = spec.describe()
    assert (described["target_size"], described["compression_interval"]) == (99, 128)
    assert not {"kv_budget", "compression_ratio"} & described.keys()


@pytest.mark.parametrize(
    ("prefill", "name", "given", "says"),
    [
        ("none", "knorm", {"target_size": None}, "needs target_size=N"),
        ("none", "knorm", {"arguments": {"compression_ratio": 0.5}}, "leave decoding.compression_ratio out"),
        ("adakv:snapkv", "knorm", {}, "hides entries head by head"),
        ("none", "random", {}, "cannot compress one cache again and again: use one of knorm"),
        ("none", "snapkv", {"target_size": 64}, "is all that decoding:snapkv always keeps"),
        ("none", "snapkv", {"interval": 64}, "must exceed the window_size=64"),
        ("none", "knorm", {"target_size": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_one_line(prefill: str, name: str, given: dict[str, Any], says: str) -> None:
    arguments = {"arguments": {}, "target_size": 99, "interval": 128, **given}
    with pytest.raises(UsageError) as caught:
        parse_decoding(parse_press(prefill), name, **arguments)
    assert says in str(caught.value) and "\n" not in str(caught.value)
