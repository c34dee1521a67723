"""A sweep's folder: one writer, one set of settings and weights, and a folder per cell.

    DIR/sweep.json, DIR/weights         the settings that all cells share, and a checksum of their weights
    DIR/summary.json                    of the call that finished: cells, tokens prefilled, seconds
    DIR/cells/CELL/results/...          a finished cell: results and samples as lm-eval writes them
    DIR/cells/CELL/answers.sqlite       an unfinished cell: its outcomes, an item per row
    DIR/cells/CELL/throughput.jsonl     a record per batch and request

Every file is whole: `answers` are transactions, and a cell's results appear by a rename. Does not know lm-eval or
models.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import write_whole
from lm_eval_kvpress.sweep.answers import Answers

ANSWERS, THROUGHPUT = "answers.sqlite", "throughput.jsonl"
OLD_ANSWERS = "answers.jsonl"  # of versions before the SQLite file


class SweepStore:
    """Open the folder of a sweep for this process alone.

    Raises:
        UsageError: in one line, if another sweep writes there, or what is there is no sweep or of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self._cells = folder, folder / "cells"
        self._settings = json.loads(json.dumps(settings))
        self._lock = FileLock(folder / ".lock")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise UsageError(f"output_path={folder} is being written by another sweep: choose another one") from error
        except OSError as error:
            raise UsageError(f"output_path={folder} cannot be written: {error.strerror}") from error
        try:
            self._check()
        except UsageError:
            self.close()
            raise

    def _check(self) -> None:
        file, now = self.folder / "sweep.json", self._settings
        if not file.exists():
            if self._cells.exists():
                raise UsageError(f"output_path={self.folder} has cells and no sweep.json: choose another folder")
            return
        self._refuse_old_answers()
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

    def _refuse_old_answers(self) -> None:
        old = sorted(file.parent.name for file in self._cells.glob(f"*/{OLD_ANSWERS}"))
        if old:
            raise UsageError(
                f"output_path={self.folder} has cells that an older version left unfinished ({', '.join(old)}): delete "
                "their folders, and they are run again, or choose another folder"
            )

    def _holds_nothing(self) -> bool:
        """Whether no cell has answered anything, as after a mistake in the command."""
        return not any(any(self._cells.glob(f"*/{what}")) for what in (ANSWERS, "results", "stream/*/*.csv"))

    def begin(self, fingerprint: str) -> None:
        """Make the folder that of these settings and weights; before that nothing in it says so.

        Args:
            fingerprint: of the weights; others of the same name are refused.

        Raises:
            UsageError: in one line.
        """
        file = self.folder / "weights"
        if self._holds_nothing():
            shutil.rmtree(self._cells, ignore_errors=True)
            file.unlink(missing_ok=True)
        write_whole(self.folder / "sweep.json", json.dumps(self._settings, indent=2, sort_keys=True))
        if not file.exists():
            write_whole(file, fingerprint)
        elif file.read_text() != fingerprint:
            raise UsageError(f"output_path={self.folder} holds a sweep of other weights: choose another folder")

    def cell(self, name: str) -> CellStore:
        """Return the folder of a cell, which need not exist."""
        return CellStore(self._cells / name)

    def close(self) -> None:
        """Let another sweep write there."""
        self._lock.release()


class CellStore:
    """The folder of one cell.

    Attributes:
        answers: what the cell has answered, until it is finished.
        throughput: the file of its throughput records.
        results: where the finished cell's results are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers = Answers(folder / ANSWERS)
        self.throughput, self.results, self._part = folder / THROUGHPUT, folder / "results", folder / "results.part"

    @property
    def is_finished(self) -> bool:
        """Whether the results are there."""
        return self.results.is_dir()

    def drop_damaged_answers(self) -> str:
        """Delete answers that cannot be read, and the records of how long they took, so that both are made again.

        Returns:
            What was wrong, in one line; empty if nothing was.
        """
        damage = self.answers.damage()
        if not damage:
            return ""
        self.answers.delete()
        self.throughput.unlink(missing_ok=True)
        return f"{self.answers.file} is damaged ({damage}): its answers are made again"

    def new_results(self) -> Path:
        """Return an empty folder to write the results into."""
        shutil.rmtree(self._part, ignore_errors=True)
        self._part.mkdir(parents=True)
        return self._part

    def finish(self) -> None:
        """Make what was written into `new_results` the results; the answers are no longer needed."""
        self._part.replace(self.results)
        self.answers.delete()
