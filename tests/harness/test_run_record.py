"""The record states what was asked, kept, scored and timed."""

from __future__ import annotations

import functools
import json
import operator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from lm_eval.api.instance import Instance
from lm_eval_requests import generation_requests, loglikelihood_requests, ours, rolling_requests, text
from repository import ROOT

from lm_eval_kvpress.models.fast import onednn_linear


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
    assert set(record["versions"]) == {"lm-eval-kvpress", "torch", "transformers", "kvpress", "lm_eval"}


@pytest.mark.parametrize("rolling", [{}, {"rolling": "stream", "stream_budget": 80}])
def test_the_record_fits_the_schema(
    checkpoint_dir: Path, rolling: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    schema = json.loads((ROOT / "docs" / "results.schema.json").read_text(encoding="utf-8"))
    with caplog.at_level("INFO"):
        lm = ours(checkpoint_dir, press="streaming_llm", max_length=128, parity=not rolling, **rolling)
    assert ("parity: ratio 0 gives stock HFLM's answers to" in caplog.text) == (not rolling)
    lm.loglikelihood_rolling(rolling_requests()[1:3], disable_tqdm=True)
    lm.generate_until(generation_requests(until=[], max_gen_toks=3)[:2] * (not rolling), disable_tqdm=True)
    record = json.loads(json.dumps(lm.describe()))
    jsonschema.validate(record, schema)
    for path in ([], ["tasks", "rolling"], ["tasks", "rolling", "contexts_pressed"], ["throughput"]):
        changed = json.loads(json.dumps(record))
        functools.reduce(operator.getitem, path, changed)["unknown"] = 0
        with pytest.raises(jsonschema.ValidationError, match="'unknown' was unexpected"):
            jsonschema.validate(changed, schema)


def test_the_record_names_how_steps_of_decoding_were_made(checkpoint_dir: Path) -> None:
    model = ours(checkpoint_dir, press="none")
    assert model.describe()["decoding_steps"] is None, "nothing was decoded"
    model.generate_until(generation_requests(until=[], max_gen_toks=3), disable_tqdm=True)
    num_batches = model.session.runner.meter.records.summary()["num_batches"]
    assert model.describe()["decoding_steps"] == {"modules": num_batches}


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


def test_masking_presses_report_allocated_and_effective_bytes(checkpoint_dir: Path) -> None:
    lm = ours(checkpoint_dir, press="adakv:snapkv", compression_ratio=0.5, window_size=8)
    lm.loglikelihood(loglikelihood_requests(), disable_tqdm=True)
    pressed = lm.describe()["tasks"]["choice"]["contexts_pressed"]
    assert pressed["kv_bytes_allocated"] == pressed["kv_bytes_before"]
    assert pressed["kv_bytes_effective"] < 0.55 * pressed["kv_bytes_before"]


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
