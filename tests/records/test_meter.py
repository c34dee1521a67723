"""Records: their sums, their join with lm-eval's samples, their counts against independent ones."""

from __future__ import annotations

import collections
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from sweep_runs import manager

from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.records.clock import Clock
from lm_eval_kvpress.records.meter import Meter, RequestId, RequestShare
from lm_eval_kvpress.records.timings import BatchRecord, RequestRecord, RunLabels
from lm_eval_kvpress.records.totals import ContextRecord

PARTS = ("prefill_sec", "press_sec", "score_sec", "decode_sec")
LABELS = RunLabels("r", "m", "snapkv", "window_size=8", "query_tokens=1", "cpu", "float32", "A")
WORDS = (
    "the cold river ran past an old mill where seven grey geese slept and nobody asked who owned them " * 30
).split()
NUM_POSITIONS = 512

pytestmark = pytest.mark.xdist_group("logged run")  # one evaluation for all


def words(start: int, count: int) -> str:
    return " ".join(WORDS[start : start + count])


class Kept:
    """A recorder that keeps the records."""

    def __init__(self) -> None:
        self.records: list[BatchRecord | RequestRecord] = []

    def add(self, record: BatchRecord | RequestRecord) -> None:
        self.records.append(record)


def run_meter(times: tuple[float, ...], num_batches: int = 1) -> tuple[Meter, list[Any]]:
    clock, kept = Clock(torch.device("cpu")), Kept()
    meter = Meter(clock, LABELS, [kept])
    for index in range(num_batches):
        meter.start()
        with clock.phase("prefill", num_tokens=10):
            pass
        with clock.phase("decode", num_tokens=len(times)):
            pass
        meter.batch(
            "generate_until", 1, [RequestShare(RequestId("t", index, 0), 10, len(times), token_times_sec=times)]
        )
        meter.finish("generate_until")
    return meter, kept.records


def lines(path: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in map(json.loads, path.read_text().splitlines()) if record["record"] == kind]


def evaluate(checkpoint_dir: Path, log: Path, **arguments: Any) -> tuple[KVPress, dict[str, Any]]:
    """A real run of three small tasks, one per request type, with samples."""

    def task(name: str, output_type: str, **config: Any) -> ConfigurableTask:
        documents = [
            {"text": words(17 * i, 60 + 40 * i), "choices": [f" {words(200 + i + c, 1 + c)}" for c in range(3)]}
            for i in range(5)
        ]
        return ConfigurableTask(
            config={
                "task": name,
                "output_type": output_type,
                "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(documents)},
                "test_split": "test",
                "doc_to_text": "text",
                **config,
            }
        )

    tasks = [
        task("choice", "multiple_choice", doc_to_choice="choices", doc_to_target=0),
        task(
            "gen",
            "generate_until",
            doc_to_target="text",
            generation_kwargs={"until": [" the"], "max_gen_toks": 12, "do_sample": False},
            metric_list=[{"metric": "exact_match"}],
        ),
        task("rolling", "loglikelihood_rolling", doc_to_text="", doc_to_target="text"),
    ]
    settings = {"press": "snapkv", "window_size": 8, "batch_size": 2, **arguments}
    lm = KVPress(pretrained=str(checkpoint_dir), device="cpu", throughput_log=str(log), **settings)
    none_listed = manager(log.parent)
    results = lm_eval.simple_evaluate(
        model=lm, tasks=tasks, task_manager=none_listed, log_samples=True, bootstrap_iters=0
    )
    return lm, results


@pytest.fixture(scope="module")
def run(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[KVPress, dict[str, Any], Path]:
    log = tmp_path_factory.mktemp("log") / "throughput.jsonl"
    return *evaluate(checkpoint_dir, log), log


def test_requests_join_one_to_one_with_lm_evals_samples(run: tuple[KVPress, dict[str, Any], Path]) -> None:
    _, results, log = run
    logged = collections.Counter((r["task"], r["doc_id"], r["idx"]) for r in lines(log, "request"))
    samples = collections.Counter(
        (task, sample["doc_id"], idx)
        for task, of_task in results["samples"].items()
        for sample in of_task
        for idx in range(len(sample["arguments"]))
    )
    assert logged == samples
    assert set(logged.values()) == {1}


def test_token_counts_equal_a_count_from_the_samples(run: tuple[KVPress, dict[str, Any], Path]) -> None:
    lm, results, log = run
    logged = {(r["task"], r["doc_id"], r["idx"]): r["num_output_tokens"] for r in lines(log, "request")}
    encode = lm.tokenizer.encode
    for sample in results["samples"]["choice"]:
        for idx, arguments in enumerate(sample["arguments"]):
            context, choice = arguments
            expected = len(encode(context + choice)) - len(encode(context))
            assert logged["choice", sample["doc_id"], idx] == expected
    for sample in results["samples"]["rolling"]:
        assert logged["rolling", sample["doc_id"], 0] == len(encode(sample["arguments"][0][0]))
    assert sum(b["num_output_tokens"] for b in lines(log, "batch")) == sum(logged.values())


def test_produced_tokens_are_counted_not_requested_ones(checkpoint_dir: Path, tmp_path: Path) -> None:
    lm = KVPress(pretrained=str(checkpoint_dir), device="cpu", batch_size=3, throughput_log=str(tmp_path / "t.jsonl"))
    asked = 20
    free = [
        Instance("generate_until", {}, (words(i, 40), {"until": [], "max_gen_toks": asked}), 0, ("gen", i, 1))
        for i in range(3)
    ]
    texts = lm.generate_until(free, disable_tqdm=True)
    stop = lm.tok_decode(lm.tok_encode(texts[0])[3:5])
    stopped = [
        Instance("generate_until", {}, (words(i, 40), {"until": [stop], "max_gen_toks": asked}), 0, ("stop", i, 1))
        for i in range(3)
    ]
    lm.generate_until(stopped, disable_tqdm=True)
    records = {(r["task"], r["doc_id"]): r for r in lines(tmp_path / "t.jsonl", "request")}
    tasks = ("gen", "stop")
    assert records["stop", 0]["num_output_tokens"] < asked, "the first answer holds the stop string early"
    assert sum(r["num_output_tokens"] for r in records.values()) == sum(
        task["tokens_generated"] for task in lm.describe()["tasks"].values()
    )
    produced = [batch["num_output_tokens"] for batch in lines(tmp_path / "t.jsonl", "batch")]
    assert produced == [sum(r["num_output_tokens"] for (task, _), r in records.items() if task == t) for t in tasks]
    for record in records.values():
        n = record["num_output_tokens"]
        assert record["tpot_sec"] == pytest.approx((record["latency_sec"] - record["ttft_sec"]) / (n - 1))


def test_answers_to_a_repeated_request_are_records_of_their_own(checkpoint_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "t.jsonl"
    lm = KVPress(pretrained=str(checkpoint_dir), device="cpu", batch_size=3, throughput_log=str(log))
    request = Instance("generate_until", {}, (words(0, 40), {"until": [], "max_gen_toks": 4}), 0, ("gen", 0, 3))
    lm.generate_until([request] * 3, disable_tqdm=True)
    records = lines(log, "request")
    assert [(r["doc_id"], r["idx"], r["repeat"]) for r in records] == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]
    assert all(r["itl_p50_sec"] > 0 for r in records)


def test_phases_sum_to_the_batch_and_requests_to_the_run() -> None:
    """On the built-in checkpoint: the tiny one takes a millisecond, of which Python between phases is a part."""
    lm = KVPress(
        pretrained="builtin", device="cpu", batch_size=2, press="snapkv", rolling_context=256, rolling_score=256
    )
    kept = Kept()
    lm.session.runner.meter._recorders = (kept,)
    context = words(0, 500)
    choice = [Instance("loglikelihood", {}, (context[i:], f" {words(i, 30)}"), 0, ("choice", i, 1)) for i in range(6)]
    generate = [
        Instance("generate_until", {}, (context[i:], {"until": [], "max_gen_toks": 12}), 0, ("gen", i, 1))
        for i in range(4)
    ]
    started = time.perf_counter()
    lm.loglikelihood(choice, disable_tqdm=True)
    lm.generate_until(generate, disable_tqdm=True)
    lm.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (context,), 0, ("rolling", 0, 1))], disable_tqdm=True
    )
    elapsed = time.perf_counter() - started
    batches = [record for record in kept.records if isinstance(record, BatchRecord)]
    requests = [record for record in kept.records if isinstance(record, RequestRecord)]
    shares = [sum(getattr(record, part) for part in PARTS) / record.seconds for record in [*batches, *requests]]
    assert max(shares) <= 1
    assert np.median(shares) >= 0.98, "a single one may be interrupted by another process between its phases"
    assert sum(r.seconds for r in requests) == pytest.approx(sum(b.seconds for b in batches))
    assert sum(r.seconds for r in requests) == pytest.approx(elapsed, rel=0.05)
    assert all(r.press_sec > 0 for r in requests), "the press is timed apart"


def test_a_requests_share_of_a_batch_goes_by_its_weight() -> None:
    clock = Clock(torch.device("cpu"))
    meter = Meter(clock, LABELS)
    meter.start()
    with clock.phase("score", num_tokens=40):
        time.sleep(1e-3)
    shares = [RequestShare(RequestId("t", index, 0), 1, tokens, weight=tokens) for index, tokens in enumerate((30, 10))]
    meter.batch("loglikelihood_rolling", 2, shares)
    meter.finish("loglikelihood_rolling")
    (batch,), (long, short) = meter.records.batches, meter.records.requests
    for name in ("seconds", "score_sec"):
        whole = getattr(batch, name)
        assert (getattr(long, name), getattr(short, name)) == (pytest.approx(whole * 0.75), pytest.approx(whole / 4))


def test_batches_of_another_process_are_of_this_run_and_of_its_device_and_machine() -> None:
    """Requests whose batches two processes ran are one request, and on two machines its times are of neither."""
    of_this = Meter(Clock(torch.device("cpu")), LABELS)
    for device in ("cuda:0", "cuda:1"):
        other = Meter(Clock(torch.device("cpu")), replace(LABELS, run=device, device=device, machine=f"{device}'s"))
        other.start()
        other.batch("loglikelihood_rolling", 1, [RequestShare(RequestId("t", 0, 0), 3, 4)])
        of_this.adopt(other.take())
        assert other.take() == [], "nothing is handed over twice"
    of_this.finish("loglikelihood_rolling")
    batches, (request,) = of_this.records.batches, of_this.records.requests
    assert [(batch.run, batch.batch, batch.device) for batch in batches] == [
        (LABELS.run, 0, "cuda:0"),
        (LABELS.run, 1, "cuda:1"),
    ]
    assert (request.num_batches, request.num_output_tokens, request.run) == (2, 8, LABELS.run)
    assert request.seconds == sum(batch.seconds for batch in batches)
    assert of_this.records.summary()["num_batches"] == 2
    one = of_this.records.on("cuda:0's")
    assert (len(one.batches), one.requests, request.machine) == (1, [], "cuda:0's and cuda:1's")


def test_warm_up_is_the_first_batch_of_a_type_size_and_number_of_tokens() -> None:
    clock = Clock(torch.device("cpu"))
    meter = Meter(clock, LABELS)
    choice, rolling = "loglikelihood", "loglikelihood_rolling"
    sizes = [(choice, 2, 100), (choice, 2, 101), (choice, 2, 900), (choice, 1, 100), (rolling, 2, 100)]
    for request_type, size, num_tokens in [*sizes, (choice, 2, 901)]:
        meter.start()
        with clock.phase("score", num_tokens=num_tokens):
            pass
        meter.batch(request_type, size, [RequestShare(RequestId("t", 0, 0), 1, 1)])
    assert [batch.is_warmup for batch in meter.records.batches] == [True, False, True, True, True, False]


def test_ttft_tpot_and_itl_are_vllms() -> None:
    _, records = run_meter((0.5, 0.6, 0.8, 1.1))
    (request,) = (record for record in records if isinstance(record, RequestRecord))
    assert request.ttft_sec == 0.5
    assert request.latency_sec == 1.1
    assert request.tpot_sec == pytest.approx((1.1 - 0.5) / 3)
    itls = [0.1, 0.2, 0.3]
    assert [request.itl_p50_sec, request.itl_p90_sec, request.itl_p99_sec] == pytest.approx(
        np.percentile(itls, (50, 90, 99))
    )


def test_a_single_token_has_a_ttft_and_no_tpot() -> None:
    _, records = run_meter((0.5,))
    assert (records[1].ttft_sec, records[1].tpot_sec, records[1].itl_p50_sec) == (0.5, None, None)


def test_the_first_use_of_a_shape_is_warmup_and_left_out_of_the_summary() -> None:
    meter, records = run_meter((0.1, 0.2), num_batches=3)
    assert [r.is_warmup for r in records if isinstance(r, BatchRecord)] == [True, False, False]
    assert [r.is_warmup for r in records if isinstance(r, RequestRecord)] == [True, False, False]
    summary = meter.records.summary()
    assert (summary["num_batches"], summary["num_batches_warmup"], summary["includes_warmup"]) == (3, 1, [])
    assert summary["decode"]["num_tokens"] == 4
    only, _ = run_meter((0.1, 0.2))
    named = ["prefill", "decode", "ttft_sec", "tpot_sec"]
    assert only.records.summary()["includes_warmup"] == named, "a single batch is all there is, and the summary says so"


def test_one_batch_of_a_kind_is_stated_beside_many_of_another() -> None:
    """Each figure falls back on warm-up by itself: other kinds of batches do not make it disappear."""
    meter, _ = run_meter((0.1, 0.2))
    for index in range(3):
        meter.start()
        with meter._clock.phase("score", num_tokens=7):
            time.sleep(1e-4)
        meter.batch("loglikelihood", 1, [RequestShare(RequestId("s", index, 0), 5, 7)])
    meter.finish("loglikelihood")
    summary = meter.records.summary()
    assert summary["includes_warmup"] == ["prefill", "decode", "ttft_sec", "tpot_sec"]
    assert summary["decode"]["num_tokens"] == 2 and summary["itl_sec"]["p50"] == pytest.approx(0.1)
    assert summary["score"]["num_batches"] == 2


@pytest.mark.parametrize("press", ["snapkv", "pyramidkv", "streaming_llm", "knorm", "tova"])
def test_kv_bytes_of_shrinking_presses_follow_the_formula(checkpoint_dir: Path, tmp_path: Path, press: str) -> None:
    log, window = tmp_path / "t.jsonl", {"window_size": 8} if press in ("snapkv", "pyramidkv") else {}
    lm = KVPress(
        pretrained=str(checkpoint_dir),
        press=press,
        compression_ratio=0.3,
        throughput_log=str(log),
        device="cpu",
        **window,
    )
    requests = [Instance("loglikelihood", {}, (words(i, 100 + 9 * i), " geese"), 0, ("t", i, 1)) for i in range(3)]
    lm.loglikelihood(requests, disable_tqdm=True)
    config = lm.model.config
    for record in lines(log, "request"):
        layers, hidden = config.num_hidden_layers, config.hidden_size
        assert record["kv_bytes_before"] == 2 * layers * record["num_context_tokens"] * hidden * 4
        assert record["kv_bytes_allocated"] == pytest.approx(2 * layers * record["kept_tokens_mean"] * hidden * 4)
        assert record["kv_bytes_effective"] == pytest.approx(record["kv_bytes_allocated"], abs=1)
        assert record["kept_tokens_mean"] == pytest.approx(0.7 * record["num_context_tokens"], abs=1.5)
        assert (record["kept_tokens_min"] < record["kept_tokens_max"]) == (press == "pyramidkv")


def test_masking_presses_leave_their_bytes_allocated(checkpoint_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "t.jsonl"
    lm = KVPress(
        pretrained=str(checkpoint_dir), press="adakv:snapkv", window_size=8, throughput_log=str(log), device="cpu"
    )
    lm.loglikelihood([Instance("loglikelihood", {}, (words(0, 100), " geese"), 0, ("t", 0, 1))], disable_tqdm=True)
    (record,) = lines(log, "request")
    assert record["kv_bytes_allocated"] == record["kv_bytes_before"]
    config = lm.model.config
    expected = 2 * config.num_hidden_layers * record["kept_tokens_mean"] * config.hidden_size * 4
    assert record["kv_bytes_effective"] == pytest.approx(expected, abs=1)
    assert record["kv_bytes_effective"] < 0.55 * record["kv_bytes_before"]


def test_a_batch_that_failed_for_memory_is_not_booked(
    checkpoint_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "t.jsonl"
    lm = KVPress(pretrained=str(checkpoint_dir), press="knorm", batch_size=4, throughput_log=str(log), device="cpu")
    score = lm.session.runner._score

    def fails_above_one(cache: Any, turns: Any) -> Any:
        if len(turns[0].rows) > 1:
            time.sleep(0.5)
            raise torch.OutOfMemoryError("no room")
        return score(cache, turns)

    monkeypatch.setattr(lm.session.runner, "_score", fails_above_one)
    requests = [Instance("loglikelihood", {}, (words(i, 60), " geese"), 0, ("t", i, 1)) for i in range(4)]
    lm.loglikelihood(requests, disable_tqdm=True)
    batches = lines(log, "batch")
    assert [batch["batch_size"] for batch in batches] == [1] * 4
    per_context = [len(lm.tok_encode(request.args[0])) - 1 for request in requests]
    assert sum(batch["num_prefill_tokens"] for batch in batches) == sum(per_context)
    assert all(batch["seconds"] < 0.5 for batch in batches)
    assert len(lines(log, "request")) == 4


def test_rolling_stream_is_measured_too(checkpoint_dir: Path, tmp_path: Path) -> None:
    log, document = tmp_path / "t.jsonl", words(0, 300)
    lm = KVPress(
        pretrained=str(checkpoint_dir), press="streaming_llm", rolling="stream", stream_budget=64, stream_chunk=16,
        throughput_log=str(log), device="cpu",
    )  # fmt: skip
    lm.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (document,), 0, ("rolling", 0, 1))], disable_tqdm=True
    )
    (record,) = lines(log, "request")
    assert record["num_output_tokens"] == len(lm.tok_encode(document))
    assert sum(record[part] for part in PARTS) == pytest.approx(record["seconds"], rel=0.02)


def test_the_summary_is_in_lm_evals_results_and_live_figures_behind_the_bar(
    run: tuple[KVPress, dict[str, Any], Path],
) -> None:
    lm, results, log = run
    summary = results["config"]["kvpress"]["throughput"]
    json.dumps(summary)
    assert summary["num_requests"] == len(lines(log, "request"))
    assert summary["num_batches"] == len(lines(log, "batch"))
    assert {"prefill", "press", "score", "decode"} <= summary.keys()
    assert summary["seconds_total"] == pytest.approx(sum(batch["seconds"] for batch in lines(log, "batch")))


def test_live_figures_are_those_of_the_newest_batch() -> None:
    clock = Clock(torch.device("cpu"))
    meter = Meter(clock, LABELS)
    assert meter.live() == {}
    meter.start()
    with clock.phase("prefill", num_tokens=1000):
        time.sleep(0.01)
    context = ContextRecord(100, (20.0, 30.0), 2**22, 2**20, True)
    meter.batch("loglikelihood", 1, [RequestShare(RequestId("t", 0, 0), 100, 1, context=context)])
    live = meter.live()
    assert (live["kept"], live["KV MiB"]) == ("25%", "1.0")
    assert 0 < float(live["tok/s"].replace(",", "")) < 1000 / 0.01
