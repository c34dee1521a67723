"""The answers of one unfinished cell, in an SQLite file: an outcome per item, a transaction per batch.

SQLite's rollback journal makes a batch complete or absent, also after a kill. Every row has a checksum, and the last
transaction says how many rows there are and how far the log of throughput records was then: records of a batch whose
answers are not there would be made twice. Knows outcomes and files. Does not know lm-eval, models or sweeps.
"""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from lm_eval_kvpress.engine.outcomes import Generated, Scored
from lm_eval_kvpress.engine.scoring import BranchScore, Held
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.records.fidelity import Fidelity, TextFidelity
from lm_eval_kvpress.records.totals import ContextRecord

Outcome = Scored | Generated

SCHEMA = (
    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, outcome TEXT NOT NULL, checksum INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS state (id INTEGER PRIMARY KEY, num_answers INT, log_bytes INT, log_crc INT)",
)


class Answers:
    """Outcomes by item in one file, which is there from the first batch on.

    Args:
        file: of the answers.
        log: of the throughput records, one line each, to which batches are added before their answers are.
    """

    def __init__(self, file: Path, log: Path) -> None:
        self.file, self._log = file, log
        self._log_state = (0, 0)  # bytes that were read, and their CRC-32

    @property
    def files(self) -> list[Path]:
        """The file, and what SQLite leaves beside it."""
        return [self.file, self.file.with_name(f"{self.file.name}-journal")]

    def damage(self) -> str:
        """Say what is wrong with the file or the log; empty if both are sound or absent."""
        if not self.file.exists():
            return ""
        if self.file.stat().st_size == 0:
            return "it is empty"
        try:
            with self._open() as database:
                (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
                if found != "ok":
                    return " ".join(str(found).split())
                rows = database.execute("SELECT key, outcome, checksum FROM answers").fetchall()
                state = database.execute("SELECT num_answers, log_bytes, log_crc FROM state").fetchone()
            if state is None or state[0] != len(rows):
                return f"it holds {len(rows)} answers and not {state[0] if state else 'one'}"
            if any(_checksum(key, text) != checksum for key, text, checksum in rows):
                return "an answer does not match its checksum"
            if self._crc_of_log(state[1]) != state[2]:
                return f"{self._log} is not the log that belongs to it"
            self.outcomes()
        except (sqlite3.DatabaseError, ValueError, KeyError, TypeError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def take_back_log(self) -> None:
        """Cut the log to what the last transaction saw, and go on from there."""
        with self._open() as database:
            _, num_bytes, crc = database.execute("SELECT * FROM state").fetchone()[1:]
        if self._log.exists():
            os.truncate(self._log, num_bytes)
        self._log_state = (num_bytes, crc)

    def keys(self) -> set[str]:
        """Return the items that have an outcome."""
        if not self.file.exists():
            return set()
        with self._open() as database:
            return {key for (key,) in database.execute("SELECT key FROM answers")}

    def outcomes(self) -> dict[str, Outcome]:
        """Return every outcome by item."""
        if not self.file.exists():
            return {}
        with self._open() as database:
            return {key: _decode(text) for key, text in database.execute("SELECT key, outcome FROM answers")}

    def add(self, outcomes: Mapping[str, Outcome]) -> None:
        """Write a batch, whose records are in the log; once this returns, it is on disk.

        Raises:
            UsageError: one line, if the file cannot be written, such as on a full disk.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        rows = [(key, text := _encode(outcome), _checksum(key, text)) for key, outcome in outcomes.items()]
        try:
            self._read_log()
            with self._open() as database, database:
                database.execute("BEGIN")  # the tables too: a first batch that fails leaves no file without answers
                for table in SCHEMA:
                    database.execute(table)
                database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", rows)
                database.execute(
                    "INSERT OR REPLACE INTO state VALUES (0, (SELECT COUNT(*) FROM answers), ?, ?)", self._log_state
                )
        except (sqlite3.OperationalError, OSError) as error:
            if self.file.is_file() and self.file.stat().st_size == 0:
                self.delete()
            raise UsageError(f"{self.file} cannot be written ({error}); the answers before are kept") from error

    def delete(self) -> None:
        """Remove the file and what SQLite left beside it."""
        for file in self.files:
            file.unlink(missing_ok=True)
        self._log_state = (0, 0)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.file)) as database:
            database.execute("PRAGMA synchronous = FULL")
            yield database

    def _read_log(self) -> None:
        """Sync what was added to the log since the last time, and take it into the checksum."""
        if not self._log.exists():
            return
        num_bytes, crc = self._log_state
        with self._log.open("rb+") as stream:
            os.fsync(stream.fileno())
            stream.seek(num_bytes)
            added = stream.read()
        self._log_state = (num_bytes + len(added), zlib.crc32(added, crc))

    def _crc_of_log(self, num_bytes: int) -> int:
        """Of the first bytes of the log; -1 if there are fewer."""
        start = self._log.read_bytes()[:num_bytes] if self._log.exists() else b""
        return zlib.crc32(start) if len(start) == num_bytes else -1


def _checksum(key: str, text: str) -> int:
    return zlib.crc32(f"{key} {text}".encode())


def _encode(outcome: Outcome) -> str:
    context = None if outcome.context is None else vars(outcome.context)
    values: dict[str, Any] = {"context": context}
    if isinstance(outcome, Generated):
        values |= {"ids": outcome.ids, "held": [outcome.num_compressions, outcome.max_entries]}
        if outcome.fidelity is not None:
            values |= {"fidelity": vars(outcome.fidelity)}
    else:
        values |= {"branches": [_plain(branch) for branch in outcome.branches], "pressed": outcome.pressed}
    return json.dumps(values)


def _decode(text: str) -> Outcome:
    values = json.loads(text)
    context = values["context"]
    if context is not None:
        lists = {name: tuple(context[name]) for name in ("kept_per_layer", "notes")}
        context = ContextRecord(**{**context, **lists})
    if "ids" in values:
        fidelity = TextFidelity(**values["fidelity"]) if "fidelity" in values else None
        num_compressions, max_entries = values["held"]
        return Generated(tuple(values["ids"]), context, num_compressions, max_entries, fidelity)
    return Scored(tuple(_branch(*plain) for plain in values["branches"]), values["pressed"], context)


def _plain(branch: BranchScore) -> list[Any]:
    plain = [branch.logprobs, branch.is_greedy]
    parts = [None if part is None else vars(part) for part in (branch.fidelity, branch.held)]
    return plain + parts[: 2 if parts[1] else 1 if parts[0] else 0]


def _branch(
    logprobs: list[float],
    is_greedy: bool,
    fidelity: dict[str, Any] | None = None,
    held: dict[str, int] | None = None,
) -> BranchScore:
    of_tokens = None if fidelity is None else Fidelity(**{name: tuple(fidelity[name]) for name in fidelity})
    return BranchScore(tuple(logprobs), is_greedy, of_tokens, None if held is None else Held(**held))
