"""What a shard notes in its folder: which processes answered, and which cells it has answered as far as they are its.

Knows files. Does not know models.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import write_whole
from lm_eval_kvpress.sweep.workers.jobs import WorkerFacts

FILE = "shard.json"


class Process(BaseModel):
    """A process that answered.

    Attributes:
        host, record: as in `WorkerFacts`.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    host: str
    record: dict[str, Any]


class ShardRecord(BaseModel):
    """The content of ``shard.json``.

    Attributes:
        workers: that answered, in the order in which they began.
        cells: folders of the cells of which the shard has answered all its requests.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal["lm-eval-kvpress shard 1"] = "lm-eval-kvpress shard 1"
    workers: list[Process] = []
    cells: list[str] = []

    @property
    def facts(self) -> list[WorkerFacts]:
        """What is known of the processes that answered."""
        return [WorkerFacts(process.host, {}, {}, None, process.record) for process in self.workers]


def read_record(folder: Path) -> ShardRecord:
    """Return what a shard has noted; nothing if it has answered nothing.

    Raises:
        UsageError: if there are answers, and nobody knows of whom.
    """
    if not (folder / FILE).exists() and not any(folder.glob("cells/*/answers.sqlite")):
        return ShardRecord()
    try:
        return ShardRecord.model_validate_json((folder / FILE).read_bytes())
    except (OSError, ValidationError) as error:
        shard = folder.name.replace("-of-", "/")
        raise UsageError(f"{folder / FILE} is gone or damaged: remove {folder} and run shard {shard} again") from error


def note_workers(folder: Path, facts: Iterable[WorkerFacts]) -> None:
    """Note which processes answer, besides those of earlier calls."""
    known = read_record(folder)
    found = [Process(host=one.host, record=dict(one.record)) for one in facts]
    workers = [*known.workers, *(process for process in found if process not in known.workers)]
    _write(folder, known.model_copy(update={"workers": workers}))


def note_cells(folder: Path, cells: Iterable[str], *, are_answered: bool) -> None:
    """Note of cells, by their folders, that all requests of the shard are answered, or that some may not be."""
    known, cells = read_record(folder), list(cells)
    others = [cell for cell in known.cells if cell not in cells]
    _write(folder, known.model_copy(update={"cells": [*others, *(cells if are_answered else [])]}))


def _write(folder: Path, record: ShardRecord) -> None:
    write_whole(folder / FILE, record.model_dump_json(indent=2))
