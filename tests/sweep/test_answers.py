"""Answers on disk: to the last digit, a batch at a time, and damage is noticed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from lm_eval_kvpress.engine.outcomes import Generated, Scored
from lm_eval_kvpress.engine.scoring import BranchScore
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.records.totals import ContextRecord
from lm_eval_kvpress.sweep.answers import Answers, Outcome

ONE: dict[str, Outcome] = {"a": Scored((BranchScore((-0.1,), False),), False, None)}


def test_outcomes_come_back_from_disk_to_the_last_digit(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "cell" / "answers.sqlite")
    assert (answers.keys(), answers.outcomes(), answers.damage()) == (set(), {}, "")
    record = ContextRecord(7, (3.0, 3.5), 100, 50, True)
    outcomes: dict[str, Outcome] = {
        "a": Scored((BranchScore((-1 / 3, -1e-17), True), BranchScore((-2.0,), False)), True, record),
        "b": Scored((BranchScore((-0.1,), False),), False, None),
        "c": Generated((5, 6), record, 2, 99),
    }
    answers.add(outcomes)
    answers.add({"d": outcomes["a"]})
    assert answers.outcomes() == {**outcomes, "d": outcomes["a"]}
    assert answers.keys() == {"a", "b", "c", "d"} and answers.damage() == ""
    answers.delete()
    assert not list((tmp_path / "cell").iterdir())


def test_a_batch_that_a_kill_cut_short_is_absent(tmp_path: Path) -> None:
    """The process dies with part of its transaction in the file, which the journal takes back."""
    answers = Answers(tmp_path / "answers.sqlite")
    answers.add(ONE)
    code = (
        "import os, signal, sqlite3, sys\n"
        "database = sqlite3.connect(sys.argv[1])\n"
        "database.execute('PRAGMA cache_size = 1')\n"
        "rows = [(str(key), 'x' * 999) for key in range(999)]\n"
        "database.executemany('INSERT INTO answers VALUES (?, ?)', rows)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    size = answers.file.stat().st_size
    killed = subprocess.run([sys.executable, "-c", code, str(answers.file)], timeout=60)
    assert killed.returncode == -signal.SIGKILL and answers.file.stat().st_size > size
    assert answers.damage() == "" and answers.outcomes() == ONE


@pytest.mark.parametrize("case", ["text", "cut", "row", "table"])
def test_damage_is_noticed(case: str, tmp_path: Path) -> None:
    answers = Answers(tmp_path / "answers.sqlite")
    answers.add({str(key): ONE["a"] for key in range(999)})
    if case == "text":
        answers.file.write_text("no database" * 99)
    elif case == "cut":
        os.truncate(answers.file, answers.file.stat().st_size // 2)
    else:
        with sqlite3.connect(answers.file) as database:
            database.execute(
                {"row": "UPDATE answers SET outcome = '{}'", "table": "ALTER TABLE answers RENAME key TO k"}[case]
            )
    assert answers.damage() and "\n" not in answers.damage()


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "answers.sqlite")
    answers.file.mkdir()
    with pytest.raises(UsageError, match=r"answers\.sqlite cannot be written \(unable to open database file\)"):
        answers.add(ONE)
