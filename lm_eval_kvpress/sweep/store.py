"""A sweep's folder: one writer, one set of settings, tasks and weights, and a folder per cell.

    DIR/sweep.json      the mark that the folder is a sweep's, and what all its cells share
    DIR/summary.json    of the call that finished: cells, tokens prefilled, seconds
    DIR/cells/CELL      `cell_store`
    DIR/shards/I-of-N   the same again, of a share of the answers (`shards.joining`)

A folder with other content is refused and left as it is. Does not know lm-eval or models.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import remove_parts, write_whole
from lm_eval_kvpress.sweep.cell_store import CellStore, refuse_other_kinds

LOCK, MARK, SHARDS = ".lock", "sweep.json", "shards"
STATISTICS = "statistics "
"""How the names of those parts of a checkpoint begin that are files of statistics."""


class SweepRecord(BaseModel):
    """The content of ``sweep.json``.

    Attributes:
        settings: that all cells share.
        tasks: by task and part, a hash of what its answers and figures depend on.
        checkpoint: by part, a hash of the model and its tokenizer.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    format: Literal["lm-eval-kvpress sweep 2"] = "lm-eval-kvpress sweep 2"
    settings: dict[str, Any]
    tasks: dict[str, dict[str, str]]
    checkpoint: dict[str, str]


class SweepStore:
    """Open the folder of a sweep for this process alone.

    Args:
        settings: that all cells share.
        is_written: if not, the folder is opened beside its writer, to compare settings, tasks and checkpoint with.

    Raises:
        UsageError: in one line, if another sweep writes there, or what is there is no sweep or of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, is_written: bool = True) -> None:
        self.folder, self._cells = folder, folder / "cells"
        self._settings = json.loads(json.dumps(settings, default=str))
        self._lock = FileLock(folder / LOCK)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._before = self._read()
            if is_written:
                self._lock.acquire(blocking=False)
        except Timeout as error:
            raise UsageError(f"output_path={folder} is being written by another sweep: choose another one") from error
        except OSError as error:
            raise UsageError(f"output_path={folder} cannot be written: {error.strerror}") from error
        try:
            self._check_settings()
            if is_written:
                self._remove_parts()
        except BaseException:
            self.close()
            raise

    def _read(self) -> SweepRecord | None:
        """What ``sweep.json`` says; None if the folder is empty but for shards and what a killed start leaves."""
        lock = self.folder / LOCK
        if _is_there(lock) and not (_is_plain(lock) and lock.lstat().st_size == 0):
            raise UsageError(f"{lock} is not a sweep's: choose another output_path")
        others = sorted(path.name for path in self.folder.iterdir() if path.name != LOCK)
        if all(name == SHARDS or _is_part_of_mark(self.folder / name) for name in others):
            return None
        try:
            if not _is_plain(self.folder / MARK):
                raise FileNotFoundError
            record = SweepRecord.model_validate_json((self.folder / MARK).read_bytes())
        except (FileNotFoundError, ValidationError) as error:
            content = ", ".join([*others[:3], *(["..."] if others[3:] else [])])
            raise UsageError(
                f"output_path={self.folder} has content ({content}) and no whole {MARK} of this version's sweeps: "
                "choose a new or an empty folder"
            ) from error
        refuse_other_kinds(folders=[self._cells])
        return record

    def _remove_parts(self) -> None:
        """Those of shards are theirs to remove: they may be running."""
        for part in self.folder.glob("*.part"):
            part.unlink(missing_ok=True)
        remove_parts(self._cells)

    def _check_settings(self) -> None:
        if self._before is None or self._holds_nothing():
            return
        before, now = self._before.settings, self._settings
        if changed := _changed(before, now):
            was = ", ".join(f"{key}={json.dumps(before.get(key))}" for key in changed)
            raise UsageError(
                f"output_path={self.folder} holds a sweep of other settings, which are never mixed: it had {was}; "
                "choose another folder, or give the same settings"
            )

    def _holds_nothing(self) -> bool:
        """Whether no cell has answered anything, as after a mistake in the command."""
        return not any(CellStore(folder).holds_something for folder in self._cells.glob("*"))

    def check_tasks(self, tasks: Mapping[str, Mapping[str, str]]) -> None:
        """Refuse tasks that are no longer what they were when cells were answered.

        Args:
            tasks: as in `SweepRecord`.

        Raises:
            UsageError: naming task and part.
        """
        if self._before is None or self._holds_nothing():
            return
        before = self._before.tasks
        changed = [
            f"{name} ({', '.join(_changed(before.get(name, {}), tasks.get(name, {})))})"
            for name in _changed(before, tasks)
        ]
        if changed:
            raise UsageError(
                f"output_path={self.folder} holds a sweep of other tasks, and answers are never mixed; since then "
                f"changed: {'; '.join(changed)}: choose another folder, or put the tasks back as they were"
            )

    def begin(self, tasks: Mapping[str, Mapping[str, str]], checkpoint: Mapping[str, str]) -> None:
        """Make the folder that of these settings, tasks and weights; before that nothing in it says so.

        Args:
            tasks, checkpoint: as in `SweepRecord`.

        Raises:
            UsageError: in one line, if cells were answered by another checkpoint.
        """
        self.check_checkpoint(checkpoint)
        if self._before is None or self._holds_nothing():
            for folder in self._cells.glob("*"):
                CellStore(folder).delete()
            record = SweepRecord(
                settings=self._settings,
                tasks={name: dict(parts) for name, parts in tasks.items()},
                checkpoint=dict(checkpoint),
            )
        else:  # with the statistics of presses that were added
            record = self._before.model_copy(update={"checkpoint": {**self._before.checkpoint, **checkpoint}})
        if record != self._before:
            write_whole(self.folder / MARK, record.model_dump_json(indent=2))

    def check_checkpoint(self, checkpoint: Mapping[str, str]) -> None:
        """Refuse another checkpoint than that by which cells were answered.

        Presses that read statistics may come and go; those of a press that is there before and now may not change.

        Raises:
            UsageError: naming the parts that differ.
        """
        if self._before is None or self._holds_nothing():
            return
        before = self._before.checkpoint
        new_or_gone = {key for key in before.keys() ^ checkpoint.keys() if key.startswith(STATISTICS)}
        if changed := [key for key in _changed(before, checkpoint) if key not in new_or_gone]:
            raise UsageError(
                f"output_path={self.folder} holds a sweep of another checkpoint ({', '.join(changed)} differ): choose "
                "another folder"
            )

    def cell(self, name: str) -> CellStore:
        """Return the folder of a cell, which need not exist."""
        return CellStore(self._cells / name)

    def close(self) -> None:
        """Let another sweep write there."""
        self._lock.release()


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _is_plain(path: Path) -> bool:
    """Whether it is a file, and no link to one: what is written to a link goes elsewhere."""
    return _is_there(path) and stat.S_ISREG(path.lstat().st_mode)


def _is_part_of_mark(path: Path) -> bool:
    return path.name.startswith(f"{MARK}.") and path.suffix == ".part" and _is_plain(path)
