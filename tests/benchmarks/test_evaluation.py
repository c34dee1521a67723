"""The evaluation benchmark pairs equal work: same requests, same numbers, ratios of what was timed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lm_eval_kvpress.harness.checkpoint import resolve_pretrained
from scripts.benchmarks import comparisons, document, evaluation
from scripts.benchmarks.comparisons import Comparison
from scripts.benchmarks.products import products
from scripts.benchmarks.sides import Models, Side, ours, stock
from scripts.benchmarks.texts import Text
from scripts.benchmarks.workloads import WORKLOADS, Workload
from scripts.machine import machine

QUICK = ["--quick", "--models", "pythia-14m", "--batch-sizes", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve_pretrained("builtin"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(*arguments: str) -> dict[str, Any]:
        assert evaluation.main([*QUICK, *arguments, "--output", str(tmp_path)]) == 0
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert json.loads((tmp_path / "performance.json").read_text()) == document
        return document["evaluation"]

    return run


def test_sides_agree_and_ratios_are_those_of_the_pairs(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    report = run("--rows", "tiny-choice/*,tiny-generate/*/stock,tiny-generate/*/pipeline", "--repeats", "1")
    rows = {row["row"]: row for row in report["rows"]}
    assert len(rows) == 6
    for name, row in rows.items():
        if name.startswith("tiny-choice"):
            assert row["largest_difference"] < 1e-4
        else:
            assert row["share_of_equal_texts"] == 1
        ratio = row["their_seconds"]["median"] / row["seconds"]["median"]
        assert row["times_as_fast"]["median"] == pytest.approx(ratio)
    table = (tmp_path / "evaluation.md").read_text().splitlines()
    assert len(table) == 2 + len(rows) and len({line.count("|") for line in table}) == 1


PRODUCT = re.compile(
    r"aten::(mm|addmm_?|bmm|baddbmm_?|mv|addmv_?|dot|_addmm_activation)|mkldnn::\w+|aten::_scaled_dot\w+"
)
"""Operators that compute, by their names; `aten::linear` and the like are made of them."""


def products_by_the_profiler(run: Callable[[], object]) -> Counter[str]:
    """How often each operator with arithmetic in it was called with which shapes."""
    with torch.profiler.profile(record_shapes=True) as profile:
        run()
    calls = Counter[str]()
    for event in profile.key_averages(group_by_input_shape=True):
        if PRODUCT.fullmatch(event.key):
            calls[f"{event.key} {event.input_shapes}"] = event.count
    return calls


@pytest.mark.parametrize("name", ["tiny-choice", "tiny-rolling", "tiny-generate"])
def test_the_products_alone_are_all_of_a_sides_arithmetic(name: str) -> None:
    models = Models.load("pythia-14m", "float32")
    workload = WORKLOADS[name](Text(models.tokenizer))
    side = ours(models, "none", 2, "one_pass")
    alone = products(models, "none", 2, "one_pass")
    assert alone(workload) == side(workload)
    calls = products_by_the_profiler(lambda: alone(workload))
    assert calls == products_by_the_profiler(lambda: side(workload))
    assert {"addmm", "attention"} <= {kind for kind in ("addmm", "attention") for call in calls if kind in call}


def test_rows_that_are_not_measured_again_stay(run: Callable[..., dict[str, Any]]) -> None:
    kept = run("--rows", "tiny-choice/none/stock", "--repeats", "1")["rows"]
    both = run("--rows", "tiny-choice/none/pipeline", "--repeats", "1")["rows"]
    assert both[0] == kept[0] and both[1]["row"] == "tiny-choice/none/pipeline"


def test_rows_of_another_machine_are_not_put_beside_these(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    document.write({"machine": {**machine(), "cpu": "Another"}, "dtype": "float16"}, tmp_path)
    assert evaluation.main([*QUICK, "--rows", "tiny-choice/none/stock", "--output", str(tmp_path)]) == 2
    assert "another cpu, " in capsys.readouterr().err


def test_a_run_that_is_stopped_keeps_the_rows_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = evaluation.measured

    def stopped(row: Comparison, *arguments: Any) -> dict[str, Any]:
        if row.against == "products":
            raise KeyboardInterrupt
        return measured(row, *arguments)

    monkeypatch.setattr(evaluation, "measured", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main([*QUICK, "--rows", "tiny-choice/none/*", "--repeats", "1", "--output", str(tmp_path)])
    (row,) = document.read(tmp_path, "float32")["evaluation"]["rows"]
    assert row["row"] == "tiny-choice/none/stock" and (tmp_path / "evaluation.md").exists()


def test_a_side_with_other_numbers_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def wrong(models: Models, batch_size: int) -> Side:
        right = stock(models, batch_size)
        return lambda workload: [(score + 0.01, flag) for score, flag in right(workload)]

    monkeypatch.setattr(comparisons, "stock", wrong)
    settings = ["--rows", "tiny-choice/none/stock", "--repeats", "1", "--output", str(tmp_path)]
    assert evaluation.main([*QUICK, *settings]) == 2
    assert "differ by 0.01 nats" in capsys.readouterr().err.splitlines()[-1]


def test_rows_that_nobody_knows_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluation.main(["--rows", "chioce*"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: no row matches chioce*; there are choice-200/none/stock")


def test_a_model_that_nobody_knows_is_refused_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluation.main(["--models", "pythia-3b"])
    assert "no model pythia-3b; there are builtin, pythia-14m" in capsys.readouterr().err


def context_lengths(workload: Workload, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [len(tokenizer.encode(instance.args[0])) for instance in workload.instances]


def total_lengths(workload: Workload, tokenizer: PreTrainedTokenizerBase) -> Sequence[int]:
    return [len(tokenizer.encode("".join(instance.args))) for instance in workload.instances]


def test_workloads_have_the_lengths_they_are_named_for(tokenizer: PreTrainedTokenizerBase) -> None:
    text = Text(tokenizer)
    for length in (200, 800, 1600):
        workload = WORKLOADS[f"choice-{length}"](text)
        assert set(context_lengths(workload, tokenizer)) == {length}
        assert len(workload.instances) == 4 * len({instance.args[0] for instance in workload.instances})
    short = WORKLOADS["qa-short"](text)
    assert max(context_lengths(short, tokenizer)) < 64, "SnapKV's window: the press must be inert"
    assert min(total_lengths(short, tokenizer)) >= 27 and max(total_lengths(short, tokenizer)) <= 80
    for size in (4, 8, 16):
        lengths = context_lengths(WORKLOADS[f"generate-64x{size}"](text), tokenizer)
        assert len(set(lengths)) == size and (min(lengths), max(lengths)) == (100, 400)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is reset where Linux can")
def test_peak_memory_counts_what_is_freed_again() -> None:
    """In a fresh process, where a measurement belongs: here, what other tests left free would serve the call."""
    size = 64 * 2**20
    calls = f"lambda: torch.ones({size // 4}) + 1", f"lambda: torch.ones({size // 4})"
    for call, expected in zip(calls, (2 * size, size), strict=True):
        code = f"import torch; from scripts.benchmarks.peak_memory import peak_extra_bytes as peak; print(peak({call}))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            check=True,
            capture_output=True,
            text=True,
        )
        assert int(done.stdout) == pytest.approx(expected, rel=0.2)
