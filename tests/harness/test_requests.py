"""Requests become token ids that fit, with a seed per prompt and a count per document."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval_requests import generation_requests, ours, rolling_requests, text

from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.harness.requests import generation_batches, likelihood_batches
from lm_eval_kvpress.records.rolling_score import RollingScore


def test_rolling_scores_count_their_tokens(checkpoint_dir: Path) -> None:
    lm = ours(checkpoint_dir, press="knorm", rolling_context=64, rolling_score=32)
    scores = lm.loglikelihood_rolling(rolling_requests(), disable_tqdm=True)
    for request, score in zip(rolling_requests(), scores, strict=True):
        assert isinstance(score, RollingScore)
        num_tokens = len(lm.tok_encode(request.args[0]))
        assert score.num_tokens == num_tokens
        assert score.num_tokens_pressed == max(0, num_tokens - 64)
    record = lm.describe()["tasks"]["rolling"]
    assert record["tokens_scored"] == sum(score.num_tokens for score in scores)  # type: ignore[attr-defined]
    total = math.fsum(scores)
    assert record["token_perplexity"] == pytest.approx(math.exp(-total / record["tokens_scored"]))


def test_what_is_cut_to_fit_is_said(checkpoint_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    lm, long = ours(checkpoint_dir, max_length=64), text(0, 400)
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        choices = [Instance("loglikelihood", {}, (long, f" {word}"), i, ("t", 0, 1)) for i, word in enumerate("ab")]
        lm.loglikelihood(choices, disable_tqdm=True)
        prompt = Instance("generate_until", {}, (long, {"until": [], "max_gen_toks": 4}), 0, ("t", 0, 0))
        lm.generate_until([prompt], disable_tqdm=True)
    assert [record.getMessage() for record in caplog.records] == [
        "1 contexts were cut from the left to fit max_length=64",
        "1 prompts were cut from the left to 60 tokens: max_length=64 less max_gen_toks=4",
    ]
    assert lm.describe()["tasks"]["t"]["num_cut_contexts"] == 2


def test_what_is_cut_loses_its_beginning_as_under_stock(checkpoint_dir: Path) -> None:
    lm, long = ours(checkpoint_dir, max_length=64), text(3, 400)
    prompt = Instance("generate_until", {}, (long, {"until": [], "max_gen_toks": 4}), 0, ("t", 0, 0))
    (batches,) = generation_batches(lm, lm.session, [prompt])
    stock, _ = lm.tok_batch_encode([long], left_truncate_len=60)  # of HFLM, as its generate_until calls it
    assert batches.contexts([0]) == [Context(tuple(stock[0].tolist()), 1)] and batches.longest == 60
    choice = Instance("loglikelihood", {}, (long, " grey geese"), 0, ("t", 0, 1))
    whole, continuation = lm.tok_encode(long), lm.tok_encode(" grey geese")
    expected = (whole + continuation)[-65:][: -len(continuation)]
    assert likelihood_batches(lm, lm.session, [choice]).contexts([0]) == [Context(tuple(expected), 1)]


def test_a_stop_string_in_the_prompt_ends_no_text(checkpoint_dir: Path) -> None:
    lm = ours(checkpoint_dir)

    def answer(prompt: str, *until: str) -> str:
        asked = {"until": list(until), "max_gen_toks": 9}
        return lm.generate_until([Instance("generate_until", {}, (prompt, asked), 0, (until or "free", 0, 0))], True)[0]

    prompt = text(0, 30)
    free = answer(prompt)
    stops = [prompt[-4:], prompt[-1] + free[:1]]  # one in the prompt's end, one across it
    for stop in stops:
        assert answer(prompt, stop) == free.split(stop)[0], stop
        assert lm.describe()["tasks"][(stop,)]["tokens_generated"] > 1 or free.startswith(stop)


def test_sampling_repeats_with_the_seed_and_does_not_depend_on_the_batch(checkpoint_dir: Path) -> None:
    requests = generation_requests(until=[], max_gen_toks=10, do_sample=True, temperature=1.3, top_p=0.95, top_k=40)
    texts = []
    for seed, batch_size in [(1, 1), (1, 5), (2, 5)]:
        torch.manual_seed(seed)
        lm = ours(checkpoint_dir, press="snapkv", window_size=8, batch_size=batch_size)
        texts.append(lm.generate_until(requests, disable_tqdm=True))
    assert texts[0] == texts[1]
    assert texts[1] != texts[2]


def test_an_empty_document_scores_nothing(checkpoint_dir: Path) -> None:
    requests = [Instance("loglikelihood_rolling", {}, ("",), 0, ("rolling", 0, 1))]
    (score,) = ours(checkpoint_dir).loglikelihood_rolling(requests, disable_tqdm=True)
    assert isinstance(score, RollingScore)
    assert (float(score), score.num_tokens) == (0.0, 0)


@pytest.mark.parametrize("arguments", [{}, {"press": "knorm"}, {"press": "knorm", "short_context": "shrink"}])
def test_an_empty_text_has_the_prefix_token_alone_before_its_answer(
    checkpoint_dir: Path, arguments: dict[str, str]
) -> None:
    """As by stock for scores; a text is that of transformers' generate from that token."""
    lm = ours(checkpoint_dir, **arguments)
    stock = HFLM(str(checkpoint_dir), device="cpu", batch_size=1)
    pairs = [Instance("loglikelihood", {}, ("", answer), 0, ("t", 0, 1)) for answer in (" the geese", text(0, 30))]
    scored = zip(lm.loglikelihood(pairs, disable_tqdm=True), stock.loglikelihood(pairs, disable_tqdm=True), strict=True)
    for (found, is_greedy), (expected, was_greedy) in scored:
        assert found == pytest.approx(expected, abs=1e-4) and is_greedy == was_greedy
    asked = {"until": [], "max_gen_toks": 6}
    (found_text,) = lm.generate_until([Instance("generate_until", {}, ("", asked), 0, ("g", 0, 0))], disable_tqdm=True)
    first = torch.tensor([[lm.prefix_token_id]])
    ids = stock.model.generate(first, attention_mask=torch.ones_like(first), max_new_tokens=6, do_sample=False)
    assert found_text == stock.tok_decode(ids[0, 1:].tolist()) != ""
    (score,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("",), 0, ("r", 0, 0))], True)
    assert float(score) == 0.0


def test_one_token_and_no_sinks_leave_nothing_to_shrink(checkpoint_dir: Path) -> None:
    lm = ours(checkpoint_dir, press="streaming_llm", n_sink=0, short_context="shrink")
    ids = lm.tok_encode(text(0, 60))
    lm._loglikelihood_tokens([(("", ""), ids[:2], ids[2:4])], disable_tqdm=True)
    assert lm.describe()["tasks"][""]["tokens_scored"] == 2
