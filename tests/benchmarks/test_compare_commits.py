"""Two checkouts answer the same requests in turns; ratios are of pairs, and figures of processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from repository import ROOT

from scripts.benchmarks.compare_commits import main, summary


def test_a_checkout_beside_itself_gives_the_same_answers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = ["--models", "pythia-14m", "--rows", "tiny-choice/*,tiny-generate/*", "--threads", "1"]
    settings += ["--processes", "1", "--repeats", "2", "--output", str(tmp_path)]
    assert main(["--before", str(ROOT), "--after", str(ROOT), *settings]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "commits.json").read_text()) == report
    choice, generate = report["rows"]
    assert choice["largest_difference"] == 0 and generate["share_of_equal_texts"] == 1
    assert choice["num_pairs"] == 2 and choice["times_as_fast"]["median"] > 0
    assert report["before"] == report["after"]
    lines = [line for line in (tmp_path / "commits.md").read_text().splitlines() if line.startswith("|")]
    assert len(lines) == 4 and "100% of texts equal" in lines[-1]


def test_a_figure_is_the_median_over_processes_of_the_medians_over_pairs() -> None:
    slow = {"before": [10.0, 12.0, 2.0], "after": [5.0, 6.0, 2.0]}  # ratios 2, 2, 1
    fast = {"before": [4.0, 4.0, 4.0], "after": [1.0, 2.0, 1.0]}  # ratios 4, 2, 4
    found = summary([{**one, "largest_difference": 0.5} for one in (slow, fast, fast)])
    assert found["times_as_fast"]["median"] == 4.0 and found["times_as_fast"]["low"] == 2.0
    assert (found["before"]["median"], found["after"]["median"]) == (4.0, 1.0)
    assert (found["num_processes"], found["num_pairs"], found["largest_difference"]) == (3, 9, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--before", "/nowhere", "--after", str(ROOT)], "--before /nowhere is no checkout"),
        (
            ["--before", str(ROOT), "--after", str(ROOT), "--rows", "chioce"],
            "no row matches chioce; there are choice-800",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
