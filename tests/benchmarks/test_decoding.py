"""The roofline's figures: bytes that a step must read, times that were taken, ratios within a round."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXForCausalLM

from lm_eval_kvpress.models.pressable import PressableModel
from scripts.benchmarks import decoding, measuring
from scripts.benchmarks.generation import Case, Measurement
from scripts.benchmarks.models import SHAPES

TINY = [
    "--shape",
    "pythia-14m",
    "--dtype",
    "float32",
    "--prompt-tokens",
    "96",
    "--new-tokens",
    "5",
    "--batch-size",
    "2",
    "--batch-prompt-tokens",
    "120",
    "--batch-new-tokens",
    "4",
    "--repeats",
    "2",
    "--copy-bytes",
    "1000000",
    "--threads",
    "1",
]


def run_of(tpot_sec: float, itl_sec: float, kv_bytes: int, kept: float) -> Measurement:
    allocated = int(kv_bytes * kept)
    return Measurement(1.0, 0.0, 1.0, 1.0, tpot_sec, itl_sec, kept, kv_bytes, allocated, allocated, None)


def test_a_step_reads_weights_without_embeddings_kept_entries_and_half_of_the_new(
    make_neox: Callable[..., GPTNeoXForCausalLM], make_pressable: Callable[..., PressableModel]
) -> None:
    model = make_pressable()
    embeddings = model.model.get_input_embeddings().weight
    assert decoding.weight_bytes(model) == 4 * (sum(p.numel() for p in model.model.parameters()) - embeddings.numel())
    case = Case("knorm", 3, 101, 10)  # 100 prefilled tokens of 7 bytes in each row
    run = run_of(1.0, 1.0, kv_bytes=3 * 100 * 7, kept=0.25)
    assert decoding.step_bytes(model, case, run) == decoding.weight_bytes(model) + 525 + 3 * 7 * 5
    model.model.embed_out.weight = embeddings  # tied: the head reads them after all
    assert decoding.weight_bytes(model) == 4 * sum(p.numel() for p in model.model.parameters())


def test_ratios_are_those_of_each_round(make_pressable: Callable[..., PressableModel]) -> None:
    model = make_pressable()
    cases = [Case("none", 1, 101, 10), Case("none", 4, 101, 10), Case("knorm", 4, 101, 10)]
    found = [
        {
            cases[0]: run_of(2.0 * slow, 1.0 * slow, 700, 1),
            cases[1]: run_of(9.0, 6.0 * slow, 2_800, 1),
            cases[2]: run_of(9.0, 3.0 * slow, 2_800, 0.5),
            "generate": 10.0 * slow,
        }
        for slow in (1.0, 3.0, 7.0)
    ]
    weights = decoding.weight_bytes(model)
    roofline, generate, press = decoding.report_rows(model, cases, found, bandwidth=2.0 * (weights + 700 + 35))
    assert roofline["value"]["median"] == pytest.approx(1 / 2 / 3) and roofline["value"]["high"] == pytest.approx(1 / 2)
    assert generate["value"] == {"median": 5.0, "low": 5.0, "high": 5.0}, "a slow round slows both sides"
    assert press["value"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert press["bytes_allow"] == pytest.approx((weights + 2_800 + 140) / (weights + 1_400 + 140))


def test_bandwidth_counts_what_is_read_and_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(100))
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: float(next(times)))  # each copy takes one second
    assert decoding.copy_bandwidth(torch.device("cpu"), 1_000) == 2_000


def test_ends_in_one_document_and_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert decoding.main([*TINY, "--output", str(tmp_path)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "performance.json").read_text()) == document
    report = document["decoding"]["pythia-14m"]
    roofline, generate, press = report["rows"]
    shape = SHAPES["pythia-14m"]
    per_token = 2 * shape.num_layers * shape.hidden_size * 4
    assert roofline["step_bytes"] == report["weight_bytes"] + per_token * (95 + 2.5)
    assert report["weight_bytes"] > 4 * shape.vocab_size * shape.hidden_size
    assert press["step_bytes"] == pytest.approx(report["weight_bytes"] + 2 * per_token * (119 / 4 + 2), rel=1e-3)
    assert press["bytes_allow"] > 1 and generate["value"]["low"] > 0
    assert (document["machine"]["gpu"] is None) is not torch.cuda.is_available()
    lines = (tmp_path / "decoding.md").read_text().splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert all("on a GPU" in line for line in lines[2:]), "a target for a GPU is not judged on a CPU"


def test_a_prompt_beyond_the_positions_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert decoding.main([*TINY, "--prompt-tokens", "2044", "--output", str(tmp_path)]) == 2
    assert "exceed the 2048 positions" in capsys.readouterr().err
