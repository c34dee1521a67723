"""The benchmark ends in one JSON document whose figures are those of the engine, not of what was asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.benchmarks import presses
from scripts.benchmarks.models import SHAPES

TINY = ["--shape", "pythia-14m", "--prompt-tokens", "96", "--new-tokens", "4", "--repeats", "2"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(*arguments: str) -> dict[str, Any]:
        assert presses.main([*arguments, "--output", str(tmp_path)]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_random_weights_of_a_shape_have_speed_and_memory_and_no_perplexity(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    report = run(*TINY, "--batch-sizes", "1,2")
    assert json.loads((tmp_path / "presses.json").read_text()) == report
    assert report["random_weights"] and report["tasks"] == []
    rows = {(row["press"], row["batch_size"]): row for row in report["rows"]}
    assert len(rows) == 4 * 2
    shape = SHAPES["pythia-14m"]
    for (press, batch_size), row in rows.items():
        seen = 95  # one token of 96 is held back
        assert row["kv_bytes_before"]["median"] == 2 * shape.num_layers * batch_size * seen * shape.hidden_size * 4
        kept = 1 if press == "none" else 0.5
        assert row["kv_bytes_allocated"]["median"] == pytest.approx(kept * row["kv_bytes_before"]["median"], rel=0.02)
        assert row["kept_share"]["median"] == pytest.approx(kept, abs=0.01)
        assert (row["press_sec"]["median"] > 0) == (press != "none")
        end_to_end = row["ttft_sec"]["median"] + 3 * row["tpot_sec"]["median"]
        assert end_to_end > batch_size * seen / row["prefill_tokens_per_sec"]["high"]
    lines = (tmp_path / "presses.md").read_text().splitlines()
    assert sum(line.startswith("|") for line in lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


@pytest.mark.slow
def test_a_checkpoint_gets_perplexities_of_the_tasks(run: Callable[..., dict[str, Any]]) -> None:
    settings = ["--prompt-tokens", "160", "--new-tokens", "2", "--repeats", "1", "--batch-sizes", "1"]
    report = run("--presses", "none,random", *settings)
    none, random = (row["token_perplexity"]["kvpress_story"] for row in report["rows"])
    assert 1 < none < random


def test_a_single_new_token_has_no_tpot(run: Callable[..., dict[str, Any]]) -> None:
    (row,) = run(*TINY, "--presses", "none", "--batch-sizes", "1", "--new-tokens", "1")["rows"]
    assert row["tpot_sec"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tokens", "2040"], "2048 positions"),
        (["--presses", "snapkv", "--prompt-tokens", "20"], "shorter than the"),
        (["--presses", "snapvk"], "snapkv"),
        (["--presses", "observed_attention"], "eager"),
        (["--ratio", "1.5"], "compression_ratio"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    settings = ["--shape", "pythia-14m", "--new-tokens", "30"]
    assert presses.main([*settings, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
