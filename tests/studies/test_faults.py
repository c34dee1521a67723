"""The campaign of faults judges rightly: what it calls held is as undisturbed, and nothing silent passes for a line."""

from __future__ import annotations

import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

from scripts.studies.faults import page
from scripts.studies.faults.__main__ import Store
from scripts.studies.faults.inputs import material, read_inputs
from scripts.studies.faults.process import HUNG, Ended
from scripts.studies.faults.trials import damage
from scripts.studies.faults.verdicts import Trial, judged, refused

TRACEBACK = "Traceback (most recent call last):\n  ...\nKeyError: 'a'\n"
FIGURES = {"figures": {"acc": 0.5}, "samples": [1, 2]}


def ended(status: int = 0, stderr: str = "") -> Ended:
    return Ended(status, 1.0, "", stderr)


@pytest.mark.parametrize(
    ("command", "verdict"),
    [
        (ended(1, "loading\nerror: unknown press\n"), "one line"),
        (ended(2, "lm-eval-kvpress report: no results\n"), "one line"),
        (ended(1, TRACEBACK), "traceback"),
        (ended(0, TRACEBACK), "traceback"),
        (ended(1, "something else\n"), "no line"),
        (ended(-9, f"{HUNG} 300 s\n"), "hung"),
        (ended(0), "silent"),
    ],
)
def test_a_command_that_must_refuse_is_judged_by_its_last_line(command: Ended, verdict: str) -> None:
    assert refused(command)[0] == verdict


def test_only_what_is_as_undisturbed_has_held() -> None:
    assert judged(ended(), lambda: FIGURES, FIGURES)[0] == "held"
    verdict, why = judged(ended(), lambda: {**FIGURES, "figures": {"acc": 0.4}}, FIGURES)
    assert verdict == "silent" and why == "other /figures/acc: 0.4 for 0.5"
    assert judged(ended(1, "error: no room\n"), lambda: FIGURES, FIGURES)[0] == "one line"

    def lost() -> object:
        raise FileNotFoundError("no results")

    assert judged(ended(), lost, FIGURES)[0] == "silent"


def test_a_command_in_a_process_of_its_own_ends_as_from_a_shell(tmp_path: Path) -> None:
    """Here without the server, which takes seconds to import the libraries."""
    arguments = [["lm-eval-kvpress", "presse"], str(tmp_path / "out"), str(tmp_path / "err"), None]
    code = f"from scripts.studies.faults.process import _become; _become(*{arguments!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == 2 and "did you mean 'presses'" in (tmp_path / "err").read_text()


def test_a_damaged_file_differs_and_is_the_same_each_time(tmp_path: Path) -> None:
    file, found = tmp_path / "a", set()
    for turn in range(30):
        for _ in range(2):
            file.write_bytes(bytes(range(1, 101)))
            found.add((turn, damage(file, random.Random(turn)), file.read_bytes()))
        assert file.read_bytes() != bytes(range(1, 101))
    assert len(found) == 30 and {how for _, how, _ in found} == {"cut", "emptied", "zeroed"}


def test_the_table_of_inputs_has_a_hundred_and_names_what_there_is(tmp_path: Path) -> None:
    inputs, places = read_inputs(), material(tmp_path / "material")
    assert len({one.command for one in inputs}) == len(inputs) >= 100
    for one in inputs:
        assert shlex.split(one.command.format(**places, out="out"))[0] in ("lm_eval", "lm-eval-kvpress") and one.says


def test_trials_that_are_done_are_not_done_again(tmp_path: Path) -> None:
    trial = Trial("killed", "sweep 1", "held", "after 1.0 s: well")
    Store(tmp_path / "trials.jsonl").add(trial)
    assert Store(tmp_path / "trials.jsonl").done == {"sweep 1": trial}


def test_the_page_counts_by_verdict_and_shows_what_was_wrong() -> None:
    trials = [
        Trial("killed", "sweep 1", "held", ""),
        Trial("killed", "sweep 2", "one line", "why | not"),
        Trial("full disk", "stream, 4 KiB", "one line", ""),
        Trial("bad input", "lm_eval --x", "one line", ""),
        Trial("bad input", "lm_eval --y", "silent", "nothing"),
    ]
    text = page.written(trials, {"commit": "abc", "machine": "one core"})
    assert "| killed: sweep | 2 | 1 | 1 | 0 | 0 | 0 | 0 |" in text
    assert "| killed | `sweep 2` | one line | why \\| not |" in text and page.num_bad(trials) == 2
    assert "`stream, 4 KiB`" not in text
