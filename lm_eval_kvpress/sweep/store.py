"""A sweep's folder: one writer, one set of settings, and what every cell has answered so far.

    DIR/sweep.json, DIR/weights         the settings that all cells share, and a checksum of their weights
    DIR/summary.json                    of the call that finished: cells, tokens prefilled, seconds
    DIR/cells/CELL/results/...          a finished cell: results and samples as lm-eval writes them
    DIR/cells/CELL/answers.jsonl        an unfinished cell: its outcomes, an item per line
    DIR/cells/CELL/throughput.jsonl     a record per batch and request

Knows files and outcomes. Does not know lm-eval or models. What is there is whole: a line is appended and flushed in one
write, a torn last one is dropped, and a cell's results appear by a rename.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lm_eval_kvpress.engine.outcomes import Generated, Scored
from lm_eval_kvpress.engine.scoring import BranchScore
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.records.files import write_whole
from lm_eval_kvpress.records.totals import ContextRecord

Outcome = Scored | Generated


class SweepStore:
    """Opens the folder for this process alone.

    Raises:
        UsageError: in one line, if another sweep writes there, or what is there is no sweep or of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / ".lock", "w")  # noqa: SIM115 (held as long as the sweep)
        except OSError as error:
            raise UsageError(f"output_path={folder} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"output_path={folder} is being written by another sweep: choose another one") from error
        self._settings = json.loads(json.dumps(settings))
        self._check()

    def _check(self) -> None:
        file, now = self.folder / "sweep.json", self._settings
        if not file.exists():
            if (self.folder / "cells").exists():
                raise UsageError(f"output_path={self.folder} has cells and no sweep.json: choose another folder")
            return
        if self._holds_nothing():
            return
        try:
            before = json.loads(file.read_text())
        except ValueError as error:
            raise UsageError(f"{file} is damaged: choose another folder") from error
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if changed:
            was = ", ".join(f"{key}={json.dumps(before.get(key))}" for key in changed)
            raise UsageError(
                f"output_path={self.folder} holds a sweep of other settings, which are never mixed: it had {was}; "
                "choose another folder, or give the same settings"
            )

    def _holds_nothing(self) -> bool:
        """Whether no cell has answered anything, as after a mistake in the command."""
        cells = self.folder / "cells"
        return not any(any(cells.glob(f"*/{what}")) for what in ("answers.jsonl", "results", "stream/*/*.csv"))

    def claim(self, fingerprint: str) -> None:
        """Makes the folder that of these settings and weights; before that nothing in it says so.

        Args:
            fingerprint: of the weights; others of the same name are refused.

        Raises:
            UsageError: in one line.
        """
        file = self.folder / "weights"
        if self._holds_nothing():
            shutil.rmtree(self.folder / "cells", ignore_errors=True)
            file.unlink(missing_ok=True)
        write_whole(self.folder / "sweep.json", json.dumps(self._settings, indent=2, sort_keys=True))
        if not file.exists():
            write_whole(file, fingerprint)
        elif file.read_text() != fingerprint:
            raise UsageError(f"output_path={self.folder} holds a sweep of other weights: choose another folder")

    def cell(self, name: str) -> CellStore:
        return CellStore(self.folder / "cells" / name)

    def close(self) -> None:
        self._lock.close()


class CellStore:
    """What one cell has answered."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._answers = folder, folder / "answers.jsonl"

    @property
    def results(self) -> Path:
        """Where the finished cell's results are."""
        return self.folder / "results"

    @property
    def is_finished(self) -> bool:
        return self.results.is_dir()

    def keys(self) -> set[str]:
        """The items that have an outcome; drops what a kill left of a last line."""
        if not self._answers.exists():
            return set()
        with open(self._answers, "rb+") as file:
            end = 0
            keys = set()
            for line in file:
                if line.endswith(b"\n"):
                    end += len(line)
                    keys.add(json.loads(line)["key"])
            file.truncate(end)
        return keys

    def outcomes(self) -> dict[str, Outcome]:
        """Outcome by item."""
        return dict(self._read()) if self._answers.exists() else {}

    def _read(self) -> Iterator[tuple[str, Outcome]]:
        with open(self._answers) as lines:
            for line in lines:
                yield _decode(json.loads(line))

    def add(self, outcomes: Mapping[str, Outcome]) -> None:
        """Appends outcomes in one write."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(_encode(key, outcome)) + "\n" for key, outcome in outcomes.items())
        with open(self._answers, "a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def part(self) -> Path:
        """An empty folder to write the results into."""
        part = self.folder / "results.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        return part

    def finish(self) -> None:
        """Makes what was written into `part` the results; the outcomes are no longer needed."""
        (self.folder / "results.part").replace(self.results)
        self._answers.unlink(missing_ok=True)


def _encode(key: str, outcome: Outcome) -> dict[str, Any]:
    context = None if outcome.context is None else asdict(outcome.context)
    if isinstance(outcome, Generated):
        held = [outcome.num_compressions, outcome.max_entries]
        return {"key": key, "context": context, "ids": outcome.ids, "held": held}
    branches = [[branch.logprobs, branch.is_greedy] for branch in outcome.branches]
    return {"key": key, "context": context, "branches": branches, "pressed": outcome.pressed}


def _decode(line: Mapping[str, Any]) -> tuple[str, Outcome]:
    context = line["context"]
    if context is not None:
        lists = {name: tuple(context[name]) for name in ("kept_per_layer", "notes")}
        context = ContextRecord(**{**context, **lists})
    if "ids" in line:
        return line["key"], Generated(tuple(line["ids"]), context, *line["held"])
    branches = tuple(BranchScore(tuple(logprobs), is_greedy) for logprobs, is_greedy in line["branches"])
    return line["key"], Scored(branches, line["pressed"], context)
