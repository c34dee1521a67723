"""Losses by token position on disk, one CSV per document; a finished document is never computed again.

Knows files only. A document's file appears when the document is complete (written beside it and renamed), so after a
kill at any moment each file is whole or absent. The folder belongs to one setting; another one is refused.
"""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.records.files import write_whole

SETTINGS = "settings.json"


class StreamStore:
    """The folder of one run.

    Args:
        folder: made if absent.
        settings: everything that the losses depend on; stored beside them.

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

    def load(self, task: str, document: Sequence[int], name: str) -> list[float] | None:
        """The losses of a finished document in nats, or None."""
        file = self._file(task, document, name)
        if not file.is_file():
            return None
        with file.open(newline="") as lines:
            losses = [float(row["loss_nats"]) for row in csv.DictReader(lines)]
        if len(losses) != len(document):
            raise UsageError(f"{file} holds {len(losses)} losses for a document of {len(document)} tokens: delete it")
        return losses

    def save(self, task: str, document: Sequence[int], name: str, losses: Sequence[float]) -> None:
        """Stores the losses of a finished document; columns ``position`` (in tokens) and ``loss_nats``."""
        rows = [f"{position},{loss!r}" for position, loss in enumerate(losses)]
        file = self._file(task, document, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, "\n".join(["position,loss_nats", *rows]) + "\n")

    def _file(self, task: str, document: Sequence[int], name: str) -> Path:
        """Named after the document and its tokens: another text of the same name is another file."""
        return self._folder / (task or "documents") / f"{name}-{zlib.crc32(repr(list(document)).encode()):08x}.csv"
