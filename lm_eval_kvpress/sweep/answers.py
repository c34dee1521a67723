"""The answers of one unfinished cell, in an SQLite file: an outcome per item, a transaction per batch.

SQLite's rollback journal makes a batch complete or absent, also after a kill. Knows outcomes and files. Does not know
lm-eval, models or sweeps.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lm_eval_kvpress.engine.outcomes import Generated, Scored
from lm_eval_kvpress.engine.scoring import BranchScore
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.records.totals import ContextRecord

Outcome = Scored | Generated

SCHEMA = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, outcome TEXT NOT NULL) WITHOUT ROWID"


class Answers:
    """Outcomes by item in one file, which is there from the first batch on."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def damage(self) -> str:
        """Say what is wrong with the file; empty if it is sound or absent."""
        if not self.file.exists():
            return ""
        try:
            with self._open() as database:
                (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if found == "ok":
                self.outcomes()
        except (sqlite3.DatabaseError, ValueError, KeyError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        return "" if found == "ok" else " ".join(str(found).split())

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
        """Write a batch; once this returns, it is on disk.

        Raises:
            UsageError: one line, if the file cannot be written, such as on a full disk.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        rows = [(key, _encode(outcome)) for key, outcome in outcomes.items()]
        try:
            with self._open() as database, database:
                database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
        except sqlite3.OperationalError as error:
            raise UsageError(f"{self.file} cannot be written ({error}); the answers before are kept") from error

    def delete(self) -> None:
        """Remove the file and what SQLite left beside it."""
        self.file.unlink(missing_ok=True)
        self.file.with_name(f"{self.file.name}-journal").unlink(missing_ok=True)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.file)) as database:
            database.execute("PRAGMA synchronous = FULL")
            database.execute(SCHEMA)
            yield database


def _encode(outcome: Outcome) -> str:
    context = None if outcome.context is None else asdict(outcome.context)
    values: dict[str, Any] = {"context": context}
    if isinstance(outcome, Generated):
        values |= {"ids": outcome.ids, "held": [outcome.num_compressions, outcome.max_entries]}
    else:
        branches = [[branch.logprobs, branch.is_greedy] for branch in outcome.branches]
        values |= {"branches": branches, "pressed": outcome.pressed}
    return json.dumps(values)


def _decode(text: str) -> Outcome:
    values = json.loads(text)
    context = values["context"]
    if context is not None:
        lists = {name: tuple(context[name]) for name in ("kept_per_layer", "notes")}
        context = ContextRecord(**{**context, **lists})
    if "ids" in values:
        return Generated(tuple(values["ids"]), context, *values["held"])
    branches = tuple(BranchScore(tuple(logprobs), is_greedy) for logprobs, is_greedy in values["branches"])
    return Scored(branches, values["pressed"], context)
