"""Which errors a command shows in one line, and which keep their traceback."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

import pytest

from lm_eval_kvpress.errors import UsageError, one_line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO])
def test_an_error_of_the_disk_is_one_line_with_its_file(number: int) -> None:
    line = one_line(OSError(number, os.strerror(number), "/full/results.json"))
    assert line is not None and "\n" not in line
    assert line.startswith(f"/full/results.json: {os.strerror(number)}: ")
    assert one_line(OSError(number, os.strerror(number))) is not None, "a write to an open file names none"


def test_bad_input_is_its_own_line_and_a_defect_has_none() -> None:
    assert one_line(UsageError("unknown press: do this")) == "unknown press: do this"
    assert one_line(ValueError("a defect")) is None
    assert one_line(FileNotFoundError(errno.ENOENT, "No such file", "weights")) is None


def test_a_full_or_forbidden_database_is_one_line(tmp_path: Path) -> None:
    """Of lm-eval's ``--use_cache``, by SQLite's own words: Python 3.10 does not know its codes."""
    database = sqlite3.connect(tmp_path / "cache.db")
    database.execute("create table answers (value text)")
    database.execute("pragma max_page_count = 2")
    with pytest.raises(sqlite3.OperationalError) as full:
        database.execute("insert into answers values (?)", ("x" * 100_000,))
    with pytest.raises(sqlite3.OperationalError) as absent:
        sqlite3.connect(tmp_path / "no folder" / "cache.db")
    database.execute("pragma query_only = 1")
    with pytest.raises(sqlite3.OperationalError) as readonly:
        database.execute("insert into answers values ('x')")
    for error in (full, absent, readonly):
        line = one_line(error.value)
        assert line is not None and line.startswith("--use_cache: "), error.value
    assert one_line(sqlite3.OperationalError("no such table: answers")) is None
