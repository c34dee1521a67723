"""A press that will act on nothing is told before the work, and only such a press: the record is the reference."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval_requests import ours, text

from lm_eval_kvpress.harness.model import KVPress


def choices(num_words: int) -> tuple[str, list[Instance]]:
    return "loglikelihood", [Instance("loglikelihood", {}, (text(0, num_words), " the geese"), 0, ("t", 0, 1))]


UNAWARE = {"query_aware": False, "question_pattern": "QUESTION"}


def asked_early(num_words: int, num_before: int = 6) -> tuple[str, list[Instance]]:
    """A prompt most of which is its question."""
    prompt = f"{text(0, num_before)} QUESTION {text(1, num_words)}"
    return "loglikelihood", [Instance("loglikelihood", {}, (prompt, " the geese"), 0, ("t", 0, 1))]


def documents(num_words: int) -> tuple[str, list[Instance]]:
    rows = [text(place, length) for place, length in enumerate((num_words, 3, num_words // 2))]
    return "loglikelihood_rolling", [
        Instance("loglikelihood_rolling", {}, (row,), 0, ("t", index, 1)) for index, row in enumerate(rows)
    ]


def texts(num_words: int, num_new: int) -> tuple[str, list[Instance]]:
    settings = {"until": [], "max_gen_toks": num_new}
    return "generate_until", [Instance("generate_until", {}, (text(0, num_words), settings), 0, ("t", 0, 1))]


def acted(lm: KVPress) -> bool:
    """Whether the record says that a press removed anything."""
    record = lm.describe()["tasks"]["t"]
    if lm.session.settings.rolling == "stream":
        return record["tokens_scored_under_press"] > 0
    share = record["contexts_pressed"]["kept_share"]
    return (share is not None and share < 1) or record["texts_compressed_while_decoding"] > 0


@pytest.mark.parametrize(
    ("arguments", "asked", "problem"),
    [
        ({"press": "knorm"}, documents(40), r"rolling_context=256 .* the longest has \d+: .*set rolling_context=\d+"),
        ({"press": "knorm", "rolling_context": 24}, documents(40), ""),
        (
            {"press": "snapkv", "rolling_context": 24},
            documents(40),
            "needs 65 tokens .* has 23 .* raise rolling",
        ),
        ({"press": "snapkv", "rolling_context": 24, "short_context": "shrink"}, documents(40), ""),
        ({"press": "knorm", "kv_budget": 100, "rolling_context": 24}, documents(40), "kv_budget=100"),
        ({"press": "snapkv"}, choices(20), "needs 65 tokens .* short_context=shrink"),
        ({"press": "snapkv"}, choices(80), ""),
        ({"press": "snapkv", "short_context": "shrink"}, choices(20), ""),
        (
            {"press": "dms:knorm", "threshold": 0, "short_context": "shrink"},
            choices(20),
            "needs 129 tokens .* no short_context",
        ),
        ({"press": "knorm", "kv_budget": 100}, choices(20), "lower kv_budget"),
        (
            {"press": "snapkv", **UNAWARE},
            asked_early(80),
            "needs 65 tokens .*the question is fed .* shrink",
        ),
        ({"press": "snapkv"}, asked_early(80), ""),
        ({"press": "snapkv", **UNAWARE}, asked_early(80, num_before=90), ""),
        ({"press": "knorm", "kv_budget": 40, **UNAWARE}, asked_early(80), "lower kv_budget"),
        ({"press": "knorm", "rolling": "stream", "stream_budget": 100}, documents(40), "lower stream_budget"),
        ({"press": "knorm", "rolling": "stream", "stream_budget": 8, "stream_chunk": 4}, documents(40), ""),
        ({"press": "decoding:knorm", "target_size": 8}, texts(9, 40), "lower compression_interval"),
        ({"press": "decoding:knorm", "target_size": 400, "compression_interval": 4}, texts(9, 40), "lower target_size"),
        ({"press": "decoding:knorm", "target_size": 8, "compression_interval": 4}, texts(9, 40), ""),
        *(
            (
                {"press": "decoding:knorm", "target_size": 8, "compression_interval": 4, "query_tokens": held},
                texts(9, num_new),
                f"acts after {5 - held} new tokens" if num_new <= 5 - held else "",
            )
            for held in (0, 1)
            for num_new in (4, 5, 6)
        ),
    ],
)
def test_what_is_told_before_the_work_is_what_happens(
    checkpoint_dir: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    asked: tuple[str, list[Instance]],
    problem: str,
) -> None:
    lm = ours(checkpoint_dir, **arguments)
    request_type, requests = asked
    found = list[str]()

    def told_first(run: Callable[..., Any]) -> Callable[..., Any]:
        def work(*given: Any, **options: Any) -> Any:
            found.append("\n".join(record.getMessage() for record in caplog.records if "will" in record.getMessage()))
            return run(*given, **options)

        return work

    own = lm.session.runner
    for name in ("score_groups", "score_windows", "generate", "stream"):
        monkeypatch.setattr(own, name, told_first(getattr(own, name)))
    getattr(lm, request_type)(requests, disable_tqdm=True)
    assert acted(lm) == (not found[0])
    assert bool(found[0]) == bool(problem) and re.search(problem, found[0]), found[0]


@pytest.mark.parametrize("held", [0, 1])
def test_a_budget_that_a_text_reaches_after_the_last_compression_is_told(
    checkpoint_dir: Path, caplog: pytest.LogCaptureFixture, held: int
) -> None:
    request_type, requests = texts(9, 12)
    num_fed = len(ours(checkpoint_dir).tok_encode(text(0, 9))) + 7 + (held == 0)  # after eight tokens, or nine
    for target_size, acts in ((num_fed, False), (num_fed - 1, True)):
        press = {"press": "decoding:knorm", "target_size": target_size, "compression_interval": 4}
        lm = ours(checkpoint_dir, **press, query_tokens=held)
        caplog.clear()
        getattr(lm, request_type)(requests, disable_tqdm=True)
        assert lm.describe()["tasks"]["t"]["num_decode_compressions"] == acts
        assert ("lower target_size" in caplog.text) != acts
