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
from lm_eval_kvpress.engine.scoring import BranchScore, Held
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.records.fidelity import Fidelity
from lm_eval_kvpress.records.totals import ContextRecord
from lm_eval_kvpress.sweep.answers import Answers, Outcome

ONE: dict[str, Outcome] = {"a": Scored((BranchScore((-0.1,), False),), False, None)}


def test_outcomes_come_back_from_disk_to_the_last_digit(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "cell" / "answers.sqlite", tmp_path / "log")
    assert (answers.keys(), answers.outcomes(), answers.damage()) == (set(), {}, "")
    record = ContextRecord(7, (3.0, 3.5), 100, 50, True)
    outcomes: dict[str, Outcome] = {
        "a": Scored((BranchScore((-1 / 3, -1e-17), True), BranchScore((-2.0,), False)), True, record),
        "b": Scored((BranchScore((-0.1,), False),), False, None),
        "f": Scored((BranchScore((-0.1,), False, Fidelity((1 / 7,), (False,), (-2e-17,))),), True, record),
        "g": Scored((BranchScore((-0.1, -3.0), False, held=Held(1, 40, 1)),), True, record),
        "c": Generated((5, 6), record, 2, 99),
    }
    answers.add(outcomes)
    answers.add({"d": outcomes["a"]})
    assert answers.outcomes() == {**outcomes, "d": outcomes["a"]}
    assert answers.keys() == {"a", "b", "c", "d", "f", "g"} and answers.damage() == ""
    answers.delete()
    assert not list((tmp_path / "cell").iterdir())


def test_a_batch_that_a_kill_cut_short_is_absent(tmp_path: Path) -> None:
    """The process dies with part of its transaction in the file, which the journal takes back."""
    answers = Answers(tmp_path / "answers.sqlite", tmp_path / "log")
    answers.add(ONE)
    code = (
        "import os, signal, sqlite3, sys\n"
        "database = sqlite3.connect(sys.argv[1])\n"
        "database.execute('PRAGMA cache_size = 1')\n"
        "rows = [(str(key), 'x' * 999) for key in range(999)]\n"
        "database.executemany('INSERT INTO answers VALUES (?, ?, 0)', rows)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    size = answers.file.stat().st_size
    killed = subprocess.run([sys.executable, "-c", code, str(answers.file)], timeout=60)
    assert killed.returncode == -signal.SIGKILL and answers.file.stat().st_size > size
    assert answers.damage() == "" and answers.outcomes() == ONE


DAMAGE: dict[str, str] = {
    "text": "",
    "cut": "",
    "emptied": "",
    "zeroed": "",
    "row": "UPDATE answers SET outcome = '{}'",
    "digit": "UPDATE answers SET outcome = replace(outcome, '0.1', '0.2')",
    "missing": "DELETE FROM answers WHERE key = '7'",
    "table": "ALTER TABLE answers RENAME key TO k",
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_noticed(case: str, tmp_path: Path) -> None:
    answers = Answers(tmp_path / "answers.sqlite", tmp_path / "log")
    answers.add({str(key): ONE["a"] for key in range(999)})
    assert answers.damage() == ""
    size = answers.file.stat().st_size
    if case == "text":
        answers.file.write_text("no database" * 99)
    elif case in ("cut", "emptied"):
        os.truncate(answers.file, size // 2 if case == "cut" else 0)
    elif case == "zeroed":
        with answers.file.open("rb+") as stream:
            stream.seek(size // 2)
            stream.write(bytes(100))
    else:
        with sqlite3.connect(answers.file) as database:
            database.execute(DAMAGE[case])
    assert answers.damage() and "\n" not in answers.damage()


def test_records_of_a_batch_whose_answers_are_not_there_are_taken_back(tmp_path: Path) -> None:
    """A kill between the two would have the batch's records twice."""
    log = tmp_path / "log"
    answers = Answers(tmp_path / "answers.sqlite", log)
    log.write_text("record 1\n")
    answers.add(ONE)
    log.write_text("record 1\nrecord 2\n")
    again = Answers(answers.file, log)
    assert again.damage() == ""
    again.take_back_log()
    assert log.read_text() == "record 1\n"
    with log.open("a") as stream:
        stream.write("record 2 again\n")
    again.add({"b": ONE["a"]})
    once_more = Answers(answers.file, log)
    assert once_more.damage() == "" and once_more.keys() == {"a", "b"}
    once_more.take_back_log()
    assert log.read_text() == "record 1\nrecord 2 again\n"


@pytest.mark.parametrize("content", ["record 1\nrecord 3\n", "record 1\n", "", None])
def test_a_log_that_is_not_the_one_of_the_answers_is_noticed(content: str | None, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("record 1\nrecord 2\n")
    answers = Answers(tmp_path / "answers.sqlite", log)
    answers.add(ONE)
    log.unlink() if content is None else log.write_text(content)
    assert answers.damage() == f"{log} is not the log that belongs to it"


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "answers.sqlite", tmp_path / "log")
    answers.file.mkdir()
    with pytest.raises(UsageError, match=r"answers\.sqlite cannot be written \(unable to open database file\)"):
        answers.add(ONE)


@pytest.mark.end_to_end  # a process of its own, whose files may not grow
def test_a_first_batch_that_does_not_fit_leaves_no_file(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "answers.sqlite", tmp_path / "log")
    code = (
        "import resource, sys; from pathlib import Path; from lm_eval_kvpress.sweep.answers import Answers\n"
        "from lm_eval_kvpress.engine.outcomes import Generated\n"
        "from lm_eval_kvpress.records.totals import ContextRecord\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); folder = Path(sys.argv[1])\n"
        "text = Generated(tuple(range(9999)), ContextRecord(7, (7.0,), 100, 100, False))\n"
        "Answers(folder / 'answers.sqlite', folder / 'log').add({'a': text})"
    )
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert "answers.sqlite cannot be written" in found.stderr
    assert not answers.file.exists() and answers.damage() == "" and list(tmp_path.iterdir()) == []
