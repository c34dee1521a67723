"""Losses by token position on disk, one CSV per document; a finished document is never computed again.

    FOLDER/settings.json            all that the losses depend on; another setting is refused
    FOLDER/TASK/NAME-CHECKSUM.csv   the losses of a finished document: position (in tokens), loss_nats
    FOLDER/TASK/NAME-CHECKSUM.json  what else is known of it, written first

Knows files only. A document's files appear whole when the document is finished, so a kill at any moment leaves none
that is torn.
"""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import write_whole

SETTINGS = "settings.json"


class StoredLosses(NamedTuple):
    """A finished document: its losses in nats, by position, and the counts that were saved with them."""

    losses: tuple[float, ...]
    counts: dict[str, int]


class LossFiles:
    """The folder of one run.

    Args:
        folder: made if absent.
        settings: everything that the losses depend on; stored in it.

    Raises:
        UsageError: if the folder holds losses of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(settings, indent=2, sort_keys=True)
        file = folder / SETTINGS
        if not file.exists():
            write_whole(file, text)
        elif file.read_text() != text:
            before, now = json.loads(file.read_text()), json.loads(text)
            changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            raise UsageError(
                f"stream_output={folder} holds losses of another setting ({', '.join(changed)} differ): choose another "
                "folder, or empty this one"
            )

    def load(self, task: str, document: Sequence[int], name: str) -> StoredLosses | None:
        """A finished document, or None. One without its counts is not finished.

        Raises:
            UsageError: if the file holds fewer or more losses than the document has tokens.
        """
        file = self._file(task, document, name)
        if not (file.is_file() and file.with_suffix(".json").is_file()):
            return None
        with file.open(newline="") as lines:
            losses = tuple(float(row["loss_nats"]) for row in csv.DictReader(lines))
        if len(losses) != len(document):
            raise UsageError(f"{file} holds {len(losses)} losses for a document of {len(document)} tokens: delete it")
        return StoredLosses(losses, json.loads(file.with_suffix(".json").read_text()))

    def save(
        self, task: str, document: Sequence[int], name: str, losses: Sequence[float], counts: Mapping[str, int]
    ) -> None:
        """Save a finished document: its losses in nats, and counts by name."""
        rows = [f"{position},{loss!r}" for position, loss in enumerate(losses)]
        file = self._file(task, document, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file.with_suffix(".json"), json.dumps(counts))
        write_whole(file, "\n".join(["position,loss_nats", *rows]) + "\n")

    def _file(self, task: str, document: Sequence[int], name: str) -> Path:
        """Named after the document and its tokens, since another text may have the same name."""
        return self._folder / (task or "documents") / f"{name}-{zlib.crc32(repr(list(document)).encode()):08x}.csv"
