"""``decode_scoring=true``: log-likelihoods of long continuations under a decoding press, from argument to record."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from decode_references import DenseDecoder, each_head, snapkv
from lm_eval.api.instance import Instance
from lm_eval_requests import text

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.model import KVPress

TARGET, INTERVAL = 20, 8
PRESS: dict[str, Any] = {
    "press": "decoding:snapkv",
    "decoding.window_size": 4,
    "target_size": TARGET,
    "compression_interval": INTERVAL,
}


def model(checkpoint_dir: Path, **arguments: Any) -> KVPress:
    return KVPress(pretrained=str(checkpoint_dir), device="cpu", **arguments)


def answers() -> list[Instance]:
    """Two long continuations of one context, a short one of another."""
    pairs = ((text(0, 30), " " + text(1, 20)), (text(0, 30), " " + text(2, 24)), (text(3, 12), " geese"))
    return [Instance("loglikelihood", {}, pair, 0, ("t", index, 1)) for index, pair in enumerate(pairs)]


def by_mask(lm: KVPress, context: list[int], continuation: list[int]) -> list[float]:
    with lm.press_model.in_use():
        dense = DenseDecoder(lm.press_model, each_head(snapkv(4, 5), TARGET), INTERVAL)
        return dense.logprobs(context, 1, continuation)


def test_a_score_is_that_of_a_text_while_it_is_generated(checkpoint_dir: Path) -> None:
    eager, found, records = model(checkpoint_dir, attn_implementation="eager"), [], []
    for batch_size in (1, 3):
        lm = model(checkpoint_dir, **PRESS, decode_scoring=True, batch_size=batch_size)
        found.append(lm.loglikelihood(answers(), disable_tqdm=True))
        records.append(lm.describe())
    num_tokens, num_after = 0, 0
    for place, request in enumerate(answers()):
        context, continuation = eager._encode_pair(*request.args)
        expected = by_mask(eager, context, continuation)
        num_tokens += len(expected)
        num_after += max(0, len(expected) - INTERVAL)
        for answer, _ in (found[0][place], found[1][place]):
            assert abs(answer - math.fsum(expected)) < 2e-5 * len(expected)
    full = model(checkpoint_dir).loglikelihood(answers(), disable_tqdm=True)
    assert all(abs(found[0][place][0] - full[place][0]) > 0.01 for place in (0, 1)), "what was evicted must show"
    totals, singly = (
        {name: value for name, value in record["tasks"]["t"].items() if "perplexity" not in name} for record in records
    )
    assert totals == singly
    assert (totals["tokens_scored"], totals["tokens_scored_after_eviction"]) == (num_tokens, num_after)
    assert totals["continuations_compressed_while_scored"] == 2 < totals["num_decode_compressions"]
    assert totals["max_decode_entries"] > TARGET
    assert records[0]["press"]["arguments"]["decode_scoring"] is True


def test_windows_of_documents_are_scored_so(checkpoint_dir: Path) -> None:
    rolling = [Instance("loglikelihood_rolling", {}, (text(0, 80),), 0, ("t", 0, 1))]
    sizes = {"rolling_context": 40, "rolling_score": 30}
    lm, eager = (
        model(checkpoint_dir, **PRESS, **sizes, decode_scoring=True),
        model(checkpoint_dir, attn_implementation="eager"),
    )
    (found,) = lm.loglikelihood_rolling(rolling, disable_tqdm=True)
    tokens = eager.tok_encode(rolling[0].args[0])
    expected = sum(
        math.fsum(by_mask(eager, tokens[start : start + 40], tokens[start + 40 : start + 70]))
        for start in range(0, len(tokens) - 40, 30)
    )
    with_first = model(checkpoint_dir, **sizes)
    (full,) = with_first.loglikelihood_rolling(rolling, disable_tqdm=True)
    totals, of_full = lm.describe()["tasks"]["t"], with_first.describe()["tasks"]["t"]
    under_press = -math.log(totals["token_perplexity_under_press"]) * totals["tokens_scored_under_press"]
    assert totals["tokens_scored_under_press"] == of_full["tokens_scored_under_press"] > 30
    assert abs(under_press - expected) < 1e-3
    assert abs(found - full) > 0.01
    full_under_press = -math.log(of_full["token_perplexity_under_press"]) * of_full["tokens_scored_under_press"]
    assert found - under_press == pytest.approx(full - full_under_press, abs=1e-4), "the first window is plain"
    assert lm.describe()["protocol"]["press_acts_on_rolling"]


def test_what_cannot_act_is_refused_before_any_work(checkpoint_dir: Path) -> None:
    lm = model(checkpoint_dir, press="decoding:knorm", target_size=TARGET, decode_scoring=True)
    rolling = Instance("loglikelihood_rolling", {}, (text(0, 60),), 0, ("r", 0, 1))
    for call, request in ((lm.loglikelihood, answers()[0]), (lm.loglikelihood_rolling, rolling)):
        with pytest.raises(UsageError, match="acts after 128 tokens and the longest of .*: no score") as caught:
            call([request], disable_tqdm=True)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("held", [0, 1])
def test_a_continuation_that_ends_before_the_press_acts_is_refused(
    checkpoint_dir: Path, held: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Without held-back tokens the prefill predicts the first token, and the press acts one token later."""
    request = answers()[0]
    num_tokens = len(model(checkpoint_dir)._encode_pair(*request.args)[1])
    too_long = num_tokens - (held == 0)  # an interval after which no token is left
    scored = {**PRESS, "decode_scoring": True, "query_tokens": held}
    after = {}
    for interval in (too_long, too_long - 1):
        before = {**scored, "press": "prefill_decoding:random+snapkv", "compression_interval": interval}
        lm = model(checkpoint_dir, **before)
        caplog.clear()
        lm.loglikelihood([request], disable_tqdm=True)
        after[interval] = lm.describe()["tasks"]["t"]["tokens_scored_after_eviction"]
        assert ("it will not act while scoring" in caplog.text) == (interval == too_long)
    assert after == {too_long: 0, too_long - 1: 1}
    with pytest.raises(UsageError, match=f"acts after {num_tokens} tokens and the longest .* has {num_tokens}: no"):
        refused = model(checkpoint_dir, **{**scored, "compression_interval": too_long})
        refused.loglikelihood([request], disable_tqdm=True)
    lm = model(checkpoint_dir, **{**scored, "compression_interval": too_long - 1})
    lm.loglikelihood([request], disable_tqdm=True)
    assert lm.describe()["tasks"]["t"]["tokens_scored_after_eviction"] == 1


def test_a_press_of_the_prefill_may_come_first(checkpoint_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    press = {**PRESS, "press": "prefill_decoding:keydiff+snapkv"}
    lm = model(checkpoint_dir, **press, decode_scoring=True)
    found = lm.loglikelihood(answers(), disable_tqdm=True)
    plain = model(checkpoint_dir, **press).loglikelihood(answers(), disable_tqdm=True)
    assert abs(found[0][0] - plain[0][0]) > 0.01 and abs(found[2][0] - plain[2][0]) < 1e-5
    with caplog.at_level("INFO", logger="lm_eval_kvpress"):
        lm.get_model_info()
    assert "compressed 2 continuations while they were scored, to 20 entries a layer" in caplog.text
    short = model(checkpoint_dir, **{**press, "compression_interval": 100}, decode_scoring=True)
    with caplog.at_level("WARNING", logger="lm_eval_kvpress"):
        short.loglikelihood(answers(), disable_tqdm=True)
    assert "it will not act while scoring" in caplog.text


def test_fidelity_is_that_of_the_scores(checkpoint_dir: Path) -> None:
    lm = model(checkpoint_dir, **PRESS, decode_scoring=True, fidelity=True)
    found = lm.loglikelihood(answers(), disable_tqdm=True)
    assert found == model(checkpoint_dir, **PRESS, decode_scoring=True).loglikelihood(answers(), disable_tqdm=True)
    fidelity = lm.describe()["tasks"]["t"]["fidelity"]
    assert fidelity["kl_mean"] > 0 and fidelity["num_tokens"] == lm.describe()["tasks"]["t"]["tokens_scored"]
