"""The lm-eval model end to end: parity with stock HFLM, batch invariance, presses that act, facts in the record."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_presses import PRESSES
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lm_eval_kvpress.engine import runner
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.tokenization import encode_pairs
from lm_eval_kvpress.models.fast import onednn_linear
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.records.rolling_score import RollingScore

SENTENCE = "the cold river ran past an old mill where seven grey geese slept and nobody asked who owned them"
WORDS = SENTENCE.split() * 40


def text(start: int, num_words: int) -> str:
    return " ".join(WORDS[start : start + num_words])


def loglikelihood_requests() -> list[Instance]:
    contexts = [text(17 * index, 25 + 20 * index) for index in range(5)] + [""]
    return [
        Instance("loglikelihood", {}, (context, f" {text(300 + 5 * choice, 1 + choice)}"), choice, ("choice", index, 1))
        for index, context in enumerate(contexts)
        for choice in range(4)
    ]


def rolling_requests() -> list[Instance]:
    return [
        Instance("loglikelihood_rolling", {}, (text(index, num_words),), 0, ("rolling", index, 1))
        for index, num_words in enumerate([500, 1, 180, 333])
    ]


def generation_requests(**gen_kwargs: Any) -> list[Instance]:
    return [
        Instance("generate_until", {}, (text(31 * index, 10 + 25 * index), dict(gen_kwargs)), 0, ("gen", index, 1))
        for index in range(5)
    ]


@pytest.fixture(scope="module")
def stock(checkpoint_dir: Path) -> HFLM:
    return HFLM(pretrained=str(checkpoint_dir), device="cpu", batch_size=2)


def ours(checkpoint_dir: Path, **arguments: Any) -> KVPress:
    return KVPress(pretrained=str(checkpoint_dir), device="cpu", **arguments)


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


@pytest.mark.parametrize("press", PRESSES)
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


def test_the_record_states_what_was_kept_and_is_json(checkpoint_dir: Path) -> None:
    lm = ours(checkpoint_dir, press="snapkv", compression_ratio=0.75, window_size=8, batch_size=4)
    lm.loglikelihood(loglikelihood_requests(), disable_tqdm=True)
    record = json.loads(json.dumps(lm.describe()))
    pressed = record["tasks"]["choice"]["contexts_pressed"]
    assert pressed["num_contexts"] == 5
    assert record["tasks"]["choice"]["num_short_contexts"] == 1, "the empty context has nothing to compress"
    assert 0.2 < pressed["kept_share"] <= 0.25
    config = lm.model.config
    kept = sum(pressed["kept_tokens_per_layer"])
    assert pressed["kv_bytes_allocated"] == 2 * kept * config.hidden_size * 4
    assert pressed["kv_bytes_before"] == 2 * config.num_hidden_layers * pressed["num_tokens"] * config.hidden_size * 4
    assert record["press"]["arguments"]["window_size"] == 8
    assert set(record["versions"]) == {"torch", "transformers", "kvpress", "lm_eval"}


def test_the_record_names_how_steps_of_decoding_were_made(checkpoint_dir: Path) -> None:
    model = ours(checkpoint_dir, press="none")
    assert model.describe()["decoding_steps"] is None, "nothing was decoded"
    model.generate_until(generation_requests(until=[], max_gen_toks=3), disable_tqdm=True)
    num_batches = model.session.runner.meter.records.summary()["num_batches"]
    assert model.describe()["decoding_steps"] == {"modules": num_batches}


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


@pytest.mark.parametrize(
    ("dtype", "is_faster", "library"),
    [("float32", True, "oneDNN"), ("float32", False, "torch"), ("bfloat16", True, "torch")],
)
def test_the_record_names_the_library_of_linear_layers(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, is_faster: bool, library: str
) -> None:
    bounds = onednn_linear.AMD_BOUNDS["AVX512"] if is_faster else onednn_linear.NEVER
    monkeypatch.setattr(onednn_linear, "bounds_here", lambda: bounds)
    assert ours(checkpoint_dir, press="none", dtype=dtype).describe()["linear_layers"] == library


@pytest.mark.parametrize("fast", [True, False])
def test_the_record_says_whether_fast_paths_were_allowed(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(onednn_linear, "bounds_here", lambda: onednn_linear.AMD_BOUNDS["AVX512"])
    facts = ours(checkpoint_dir, press="none", fast=fast).describe()
    assert (facts["fast"], facts["linear_layers"]) == (fast, "oneDNN" if fast else "torch")


@pytest.mark.parametrize(
    ("arguments", "computes_in"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "float32", "mixed_precision_dtype": "bfloat16"}, torch.bfloat16),
    ],
    ids=str,
)
def test_a_slow_dtype_is_asked_for_on_a_cpu(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, str], computes_in: torch.dtype
) -> None:
    asked: list[torch.dtype] = []
    monkeypatch.setattr("lm_eval_kvpress.harness.model.warn_of_slow_dtype", asked.append)
    ours(checkpoint_dir, press="none", **arguments)
    assert asked == [computes_in]


def test_masking_presses_report_allocated_and_effective_bytes(checkpoint_dir: Path) -> None:
    lm = ours(checkpoint_dir, press="adakv:snapkv", compression_ratio=0.5, window_size=8)
    lm.loglikelihood(loglikelihood_requests(), disable_tqdm=True)
    pressed = lm.describe()["tasks"]["choice"]["contexts_pressed"]
    assert pressed["kv_bytes_allocated"] == pressed["kv_bytes_before"]
    assert pressed["kv_bytes_effective"] < 0.55 * pressed["kv_bytes_before"]


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


def test_a_context_that_two_tasks_share_is_one_of_each(checkpoint_dir: Path) -> None:
    lm, context = ours(checkpoint_dir, press="knorm"), text(0, 200)
    lm.loglikelihood(
        [Instance("loglikelihood", {}, (context, " geese"), 0, (t, 0, 1)) for t in "ab"], disable_tqdm=True
    )
    tasks = lm.describe()["tasks"]
    assert tasks["a"]["contexts_pressed"] == tasks["b"]["contexts_pressed"]
    assert tasks["b"]["contexts_pressed"]["num_contexts"] == 1


def test_no_perplexity_is_given_of_fewer_tokens_than_the_baselines(checkpoint_dir: Path) -> None:
    long, short, empty = (text(0, 300), text(0, 20), "")
    requests = [
        Instance("loglikelihood", {}, (c, " geese"), i, ("t", i, 1)) for i, c in enumerate((long, short, empty))
    ]

    def figures(requests: list[Instance]) -> tuple[bool, bool]:
        found = []
        for press in ({"press": "none"}, {"press": "snapkv", "window_size": 64}):
            lm = ours(checkpoint_dir, **press)
            lm.loglikelihood(requests, disable_tqdm=True)
            found.append(lm.describe()["tasks"]["t"]["token_perplexity_under_press"] is not None)
        return found[0], found[1]

    assert figures(requests) == (True, False)
    assert figures([requests[0], requests[2]]) == (True, True), "an empty context counts for neither"


def test_one_token_and_no_sinks_leave_nothing_to_shrink(checkpoint_dir: Path) -> None:
    lm = ours(checkpoint_dir, press="streaming_llm", n_sink=0, short_context="shrink")
    ids = lm.tok_encode(text(0, 60))
    lm._loglikelihood_tokens([(("", ""), ids[:2], ids[2:4])], disable_tqdm=True)
    assert lm.describe()["tasks"][""]["tokens_scored"] == 2


def test_sampling_repeats_with_the_seed_and_does_not_depend_on_the_batch(checkpoint_dir: Path) -> None:
    requests = generation_requests(until=[], max_gen_toks=10, do_sample=True, temperature=1.3, top_p=0.95, top_k=40)
    texts = []
    for seed, batch_size in [(1, 1), (1, 5), (2, 5)]:
        torch.manual_seed(seed)
        lm = ours(checkpoint_dir, press="snapkv", window_size=8, batch_size=batch_size)
        texts.append(lm.generate_until(requests, disable_tqdm=True))
    assert texts[0] == texts[1]
    assert texts[1] != texts[2]


@pytest.mark.parametrize(
    "gen_kwargs",
    [
        {"num_beams": 4},
        {"penalty_alpha": 0.6},
        {"do_sample": True, "top_p": 2},
        *({"max_gen_toks": count} for count in (100_000, 0, -5)),
    ],
)
def test_unsupported_generation_arguments_are_errors(checkpoint_dir: Path, gen_kwargs: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="not supported|leave room|top_p"):
        ours(checkpoint_dir).generate_until(generation_requests(until=[], **gen_kwargs), disable_tqdm=True)


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


def test_too_short_contexts_are_one_line(checkpoint_dir: Path) -> None:
    lm = ours(checkpoint_dir, press="snapkv", window_size=32, short_context="error")
    with pytest.raises(UsageError, match="shorter than"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("a few", " words"), 0, ("t", 0, 1))], disable_tqdm=True)


def test_a_folder_for_streams_that_cannot_be_written_is_found_out_at_once(checkpoint_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=f"stream_output={place} cannot be written"):
            ours(checkpoint_dir, press="knorm", rolling="stream", stream_budget=64, stream_output=str(place))


def test_a_loglikelihood_that_is_not_finite_ends_the_run_and_names_the_request(checkpoint_dir: Path) -> None:
    lm = ours(checkpoint_dir)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[:] = torch.nan
    with pytest.raises(ValueError, match="request .* of task 'choice'.*not finite"):
        lm.loglikelihood(loglikelihood_requests(), disable_tqdm=True)
    with pytest.raises(ValueError, match="document .* of task 'rolling'.*not finite"):
        lm.loglikelihood_rolling(rolling_requests(), disable_tqdm=True)


def test_a_model_on_a_second_gpu_makes_it_the_current_one(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events and graphs would be made on the first one, and be complete at once."""
    lm, calls = ours(checkpoint_dir), list[Any]()
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    lm._settle_on_device()
    assert calls == []
    monkeypatch.setattr(PressableModel, "device", torch.device("cuda:1"))
    lm._settle_on_device()
    assert calls == [torch.device("cuda:1")]


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


def test_an_empty_document_scores_nothing(checkpoint_dir: Path) -> None:
    requests = [Instance("loglikelihood_rolling", {}, ("",), 0, ("rolling", 0, 1))]
    (score,) = ours(checkpoint_dir).loglikelihood_rolling(requests, disable_tqdm=True)
    assert isinstance(score, RollingScore)
    assert (float(score), score.num_tokens) == (0.0, 0)
