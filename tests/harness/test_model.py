"""The lm-eval model end to end: parity with stock HFLM, batch invariance, presses that act, facts in the record."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_presses import PRESSES
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval_requests import generation_requests, loglikelihood_requests, ours, rolling_requests, text

from lm_eval_kvpress.harness.tokenization import encode_pairs


@pytest.fixture(scope="module")
def stock(checkpoint_dir: Path) -> HFLM:
    return HFLM(pretrained=str(checkpoint_dir), device="cpu", batch_size=2)


@pytest.mark.parametrize(
    "arguments", [{"press": "none"}, {"press": "snapkv", "compression_ratio": 0, "window_size": 8}]
)
def test_ratio_zero_equals_stock_hflm_on_all_request_types(
    stock: HFLM, checkpoint_dir: Path, arguments: dict[str, Any]
) -> None:
    lm = ours(checkpoint_dir, rolling="one_pass", batch_size=3, **arguments)
    theirs = stock.loglikelihood(loglikelihood_requests(), disable_tqdm=True)
    mine = lm.loglikelihood(loglikelihood_requests(), disable_tqdm=True)
    torch.testing.assert_close([a for a, _ in mine], [a for a, _ in theirs], atol=1e-4, rtol=1e-5)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
    torch.testing.assert_close(
        [float(score) for score in lm.loglikelihood_rolling(rolling_requests(), disable_tqdm=True)],
        stock.loglikelihood_rolling(rolling_requests(), disable_tqdm=True),
        atol=1e-3,
        rtol=1e-6,
    )
    requests = generation_requests(until=["\n\n", "geese"], max_gen_toks=12)
    assert lm.generate_until(requests, disable_tqdm=True) == stock.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize("press", ["none", "pyramidkv", "key_rerotation:streaming_llm", "random", "adakv:snapkv"])
def test_batch_size_changes_no_result(checkpoint_dir: Path, press: str) -> None:
    results = []
    for batch_size in (1, 3, 8):
        lm = ours(checkpoint_dir, press=press, batch_size=batch_size, **PRESSES[press])
        results.append(
            (
                [score for score, _ in lm.loglikelihood(loglikelihood_requests(), disable_tqdm=True)],
                [float(score) for score in lm.loglikelihood_rolling(rolling_requests(), disable_tqdm=True)],
                lm.generate_until(generation_requests(until=[], max_gen_toks=8), disable_tqdm=True),
            )
        )
    for scores, rolling, texts in results[1:]:
        torch.testing.assert_close(scores, results[0][0], atol=1e-4, rtol=0)
        torch.testing.assert_close(rolling, results[0][1], atol=1e-3, rtol=1e-6)
        assert texts == results[0][2]


def test_presses_differ_under_prefix_and_agree_under_one_pass(checkpoint_dir: Path) -> None:
    totals: dict[str, dict[str, float]] = {"prefix": {}, "one_pass": {}}
    for rolling, by_press in totals.items():
        for press, arguments in PRESSES.items():
            lm = ours(checkpoint_dir, press=press, rolling=rolling, batch_size=4, **arguments)
            by_press[press] = math.fsum(lm.loglikelihood_rolling(rolling_requests(), disable_tqdm=True))
    figures = totals["prefix"]
    assert len({round(figure, 3) for figure in figures.values()}) == len(figures), figures
    controls = list(totals["one_pass"].values())
    assert max(controls) - min(controls) < 1e-6, totals["one_pass"]


def test_a_press_moves_one_token_answers_only_if_a_token_is_held_back(checkpoint_dir: Path) -> None:
    requests = [
        Instance("loglikelihood", {}, (text(3, 120), f" {word}"), index, ("one", 0, 1))
        for index, word in enumerate(["geese", "mill", "river"])
    ]
    scores = {}
    for held in (0, 1):
        for press in ("none", "random"):
            ratio = {} if press == "none" else {"compression_ratio": 0.9}
            lm = ours(checkpoint_dir, press=press, query_tokens=held, **ratio)
            encoded = encode_pairs(lm, [request.args for request in requests])
            assert {len(continuation) for _, continuation in encoded} >= {1}, "the test needs one-token answers"
            one_token = [index for index, (_, continuation) in enumerate(encoded) if len(continuation) == 1]
            answers = lm.loglikelihood(requests, disable_tqdm=True)
            scores[held, press] = [answers[index][0] for index in one_token]
    torch.testing.assert_close(scores[0, "random"], scores[0, "none"], atol=1e-5, rtol=0)
    assert max(abs(a - b) for a, b in zip(scores[1, "random"], scores[1, "none"], strict=True)) > 1e-2
