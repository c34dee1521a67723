"""Batches are answered once, in halves where memory is short; what cannot be answered is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval_requests import generation_requests, loglikelihood_requests, ours, rolling_requests, text

from lm_eval_kvpress.engine import runner
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.model import KVPress


@pytest.mark.parametrize("policy", ["keep", "shrink", "error"])
def test_contexts_too_short_for_the_press_follow_the_policy(checkpoint_dir: Path, policy: str) -> None:
    lm = ours(checkpoint_dir, press="snapkv", window_size=64, short_context=policy)
    short = [Instance("loglikelihood", {}, (text(0, 20), " geese"), 0, ("short", 0, 1))]
    if policy == "error":
        with pytest.raises(ValueError, match="short_context=keep"):
            lm.loglikelihood(short, disable_tqdm=True)
        return
    lm.loglikelihood(short, disable_tqdm=True)
    record = lm.describe()["tasks"]["short"]
    assert record["num_short_contexts"] == (1 if policy == "keep" else 0)
    assert record["num_shrunk_contexts"] == (1 if policy == "shrink" else 0)


def test_too_short_contexts_are_one_line(checkpoint_dir: Path) -> None:
    lm = ours(checkpoint_dir, press="snapkv", window_size=32, short_context="error")
    with pytest.raises(UsageError, match="shorter than"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("a few", " words"), 0, ("t", 0, 1))], disable_tqdm=True)


def test_a_batch_that_ran_out_of_memory_was_not_decoded(checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_above_one(model: Any, cache: Any, contexts: Any, **options: Any) -> Any:
        if len(contexts) > 1:
            raise torch.OutOfMemoryError("no room")
        return decode(model, cache, contexts, **options)

    decode = runner.decode
    monkeypatch.setattr(runner, "decode", fails_above_one)
    model, requests = ours(checkpoint_dir, batch_size=4), generation_requests(until=[], max_gen_toks=3)
    model.generate_until(requests, disable_tqdm=True)
    assert model.describe()["decoding_steps"] == {"modules": len(requests)}


def test_running_out_of_memory_halves_the_batch_and_loses_nothing(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = ours(checkpoint_dir, press="knorm", batch_size=4)
    expected = lm.loglikelihood(loglikelihood_requests(), disable_tqdm=True)
    compress = lm.session.runner.compressor.compress

    def fails_above_one(contexts: Any, **kwargs: Any) -> Any:
        if len(contexts) > 1:
            raise torch.OutOfMemoryError("no room")
        return compress(contexts, **kwargs)

    monkeypatch.setattr(lm.session.runner.compressor, "compress", fails_above_one)
    scores = lm.loglikelihood(loglikelihood_requests(), disable_tqdm=True)
    torch.testing.assert_close([s for s, _ in scores], [s for s, _ in expected], atol=1e-4, rtol=0)
    totals = lm.describe()["tasks"]["choice"]
    contexts = totals["contexts_pressed"]["num_contexts"] + totals["contexts_unpressed"]["num_contexts"]
    assert contexts == 2 * 6, "a batch that failed is booked once, not again for its halves"


def test_an_automatic_batch_that_did_not_fit_is_remembered_for_the_rest_of_the_run(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = [Instance("loglikelihood", {}, (text(index, 40), " geese"), 0, ("c", index, 1)) for index in range(24)]
    expected = ours(checkpoint_dir, press="knorm").loglikelihood(choices, disable_tqdm=True)
    lm = ours(checkpoint_dir, press="knorm", batch_size="auto", max_batch_size=8)
    compress, sizes = lm.session.runner.compressor.compress, list[int]()

    def fails_above_two(contexts: Any, **kwargs: Any) -> Any:
        sizes.append(len(contexts))
        if len(contexts) > 2:
            raise torch.OutOfMemoryError("no room")
        return compress(contexts, **kwargs)

    monkeypatch.setattr(lm.session.runner.compressor, "compress", fails_above_two)
    scores = lm.loglikelihood(choices[:16], disable_tqdm=True) + lm.loglikelihood(choices[16:], disable_tqdm=True)
    torch.testing.assert_close([s for s, _ in scores], [s for s, _ in expected], atol=1e-4, rtol=0)
    assert sizes == [8, 4, *[2] * 12], "two attempts failed, in the first batch of the first call"


def with_a_broken_head(checkpoint_dir: Path, value: float, **arguments: Any) -> KVPress:
    """Our model with one broken column of its output layer: some logits are NaN or infinite, and others are not."""
    lm = ours(checkpoint_dir, **arguments)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[7] = value
    return lm


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loglikelihood_that_is_not_finite_ends_the_run_and_names_the_request(
    checkpoint_dir: Path, value: float
) -> None:
    lm = with_a_broken_head(checkpoint_dir, value)
    with pytest.raises(UsageError, match="request .* of task 'choice'.*not finite.*embed_out.weight holds NaN or inf"):
        lm.loglikelihood(loglikelihood_requests(), disable_tqdm=True)
    with pytest.raises(UsageError, match="document .* of task 'rolling'.*not finite"):
        lm.loglikelihood_rolling(rolling_requests(), disable_tqdm=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({}, id="none"),
        pytest.param({"press": "decoding:knorm", "target_size": 32, "compression_interval": 2}, id="decoding press"),
        pytest.param({"query_tokens": 0}, id="first token from the prefill"),
    ],
)
@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}], ids=["greedy", "drawn"]
)
def test_a_text_of_logits_that_are_not_finite_ends_the_run_and_names_the_document(
    checkpoint_dir: Path, value: float, arguments: dict[str, Any], sampling: dict[str, Any]
) -> None:
    lm = with_a_broken_head(checkpoint_dir, value, **arguments)
    with pytest.raises(UsageError, match="document .* of task 'gen' has a logit after 0 new tokens.*not finite"):
        lm.generate_until(generation_requests(until=[], max_gen_toks=3, **sampling), disable_tqdm=True)


def test_a_stream_or_certificate_of_logits_that_are_not_finite_ends_the_run(checkpoint_dir: Path) -> None:
    stream = {"press": "knorm", "rolling": "stream", "stream_budget": 64}
    with pytest.raises(UsageError, match="document .* of task 'rolling'.*after 0 tokens.*not finite"):
        with_a_broken_head(checkpoint_dir, torch.nan, **stream).loglikelihood_rolling(rolling_requests(), True)
    with pytest.raises(UsageError, match="of task 'parity'|of task ''"):
        broken = with_a_broken_head(checkpoint_dir, torch.nan)
        KVPress(pretrained=broken.model, tokenizer=broken.tokenizer, parity=True)
