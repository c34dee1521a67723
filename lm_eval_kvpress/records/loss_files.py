"""Losses by token position on disk, a pair of files per document; a finished document is never computed again.

    FOLDER/settings.json            all that the losses depend on; another setting is refused
    FOLDER/TASK/NAME-CHECKSUM.csv   the losses of a finished document: position (in tokens), loss_nats
    FOLDER/TASK/NAME-CHECKSUM.json  what else is known of it, written first, and checksums
    FOLDER/.lock                    held while a run writes there

Knows files only. A document's files appear whole when the document is finished, so a kill at any moment leaves none
that is torn. After a power cut a file may be cut, empty or zeros all the same, so a document counts only if it matches
its checksum; one that does not is named, and computed again.
"""

from __future__ import annotations

import csv
import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import checksum, file_name, make_folder, refuse_special, remove_parts, write_whole

SETTINGS = "settings.json"

logger = logging.getLogger("lm_eval_kvpress")


class StoredLosses(NamedTuple):
    """A finished document: its losses in nats, by position, and what else was saved with them."""

    losses: tuple[float, ...]
    counts: dict[str, Any]


class LossFiles:
    """The folder of one run, which belongs to this process as long as the object lives.

    Args:
        folder: made if absent.
        settings: everything that the losses depend on; stored in it.
        rank: of this process; the processes of one run share the folder, a document is of one of them.
        num_ranks: processes of the run.

    Raises:
        UsageError: if another run writes there, or the folder holds losses of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], rank: int = 0, num_ranks: int = 1) -> None:
        self._folder, self._lock = folder, lock_folder(folder, rank)
        if num_ranks == 1:  # else another process may be writing one
            remove_parts(folder)
        text = json.dumps(settings, indent=2, sort_keys=True)
        self._settings = checksum(text)
        self._check_settings(text)

    def load(self, task: str, document: Sequence[int], name: str) -> StoredLosses | None:
        """A finished document, or None. One without its counts is not finished; a damaged one is named and removed."""
        file = self._file(task, document, name)
        if not (file.exists() and file.with_suffix(".json").exists()):
            return None
        stored = self._read(file)
        if stored is None or len(stored.losses) != len(document):
            logger.warning("%s or the .json beside it is damaged: the document is computed again", file)
            for damaged in (file, file.with_suffix(".json")):
                damaged.unlink()
            return None
        return stored

    def save(
        self, task: str, document: Sequence[int], name: str, losses: Sequence[float], counts: Mapping[str, Any]
    ) -> None:
        """Save a finished document: its losses in nats, and what else is known of it, ready for JSON.

        Once this returns, it is on disk.

        Raises:
            UsageError: in one line, if it cannot be written; the documents before are kept.
        """
        file = self._file(task, document, name)
        make_folder(file.parent)
        rows = [f"{position},{loss!r}" for position, loss in enumerate(losses)]
        table = "\n".join(["position,loss_nats", *rows]) + "\n"
        about = {"counts": dict(counts), "settings": self._settings, "sha256": _checksum(table, counts)}
        write_whole(file.with_suffix(".json"), json.dumps(about))
        write_whole(file, table)

    def _file(self, task: str, document: Sequence[int], name: str) -> Path:
        """Named after the document and its tokens, since another text may have the same name."""
        tokens = zlib.crc32(repr(list(document)).encode())
        return self._folder / file_name(task or "documents") / f"{file_name(name)}-{tokens:08x}.csv"

    def _read(self, file: Path) -> StoredLosses | None:
        """What a pair of files holds; None if it does not match its checksum."""
        refuse_special(file)
        about = _about(file.with_suffix(".json"))
        try:
            table = file.read_bytes().decode()
        except UnicodeDecodeError:
            return None
        if about is None or about["sha256"] != _checksum(table, about["counts"]):
            return None
        return StoredLosses(
            tuple(float(row["loss_nats"]) for row in csv.DictReader(table.splitlines())), about["counts"]
        )

    # --------------------------------------------------------------------------------------------------- settings

    def _check_settings(self, text: str) -> None:
        """Refuse losses of other settings; write the file of the settings if it is absent or damaged."""
        file = self._folder / SETTINGS
        refuse_special(file)
        found = file.read_bytes() if file.exists() else None
        if found == text.encode():
            return
        before = None if found is None else _json_object(found)
        if before is not None:
            now = json.loads(text)
            changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            self._refuse(f"{', '.join(changed)} differ" if changed else f"{SETTINGS} differs")
        documents = {about["settings"] for about in map(_about, self._folder.glob("*/*.json")) if about is not None}
        if documents - {self._settings}:
            self._refuse(f"{SETTINGS} is {'missing' if found is None else 'damaged'}")
        if found is not None:
            if not (documents or text.encode().startswith(found.rstrip(b"\0"))):
                raise UsageError(f"stream_output={self._folder}: {SETTINGS} is none of a stream: choose another folder")
            logger.warning("%s is damaged: it is written again", file)
        write_whole(file, text)

    def _refuse(self, why: str) -> None:
        raise UsageError(
            f"stream_output={self._folder} holds losses of another setting ({why}): choose another folder, or empty "
            "this one"
        )


def join_losses(folder: Path, other: Path) -> None:
    """Bring the finished documents of another run of the same settings here. That run's folder stays as it is.

    Raises:
        UsageError: if the settings are others, or a file cannot be written.
    """
    settings, own = (other / SETTINGS).read_bytes(), folder / SETTINGS
    make_folder(folder)
    if own.exists() and own.read_bytes() != settings:
        raise UsageError(f"{other} holds losses of other settings than {folder}: they cannot be joined")
    write_whole(own, settings)
    for about in sorted(other.glob("*/*.json")):
        table = about.with_suffix(".csv")
        if not table.is_file():  # the document was not finished
            continue
        make_folder(folder / about.parent.name)
        for file in (about, table):
            write_whole(folder / file.relative_to(other), file.read_bytes())


def lock_folder(folder: Path, rank: int = 0) -> FileLock:
    """Make a folder this run's own, as long as the lock that is returned lives.

    Every process of a run holds a lock, so that one of them at least meets that of another run.

    Raises:
        UsageError: if another run holds it, or the folder cannot be written.
    """
    make_folder(folder)
    lock = FileLock(folder / (f".lock.rank{rank}" if rank else ".lock"), thread_local=False, is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UsageError(f"stream_output={folder} is being written by another run: choose another folder") from error
    except OSError as error:
        raise UsageError(f"stream_output={folder} cannot be locked: {error.strerror or error}") from error
    return lock


def _checksum(table: str, counts: Mapping[str, Any]) -> str:
    return checksum(table, json.dumps(dict(counts), sort_keys=True))


def _about(file: Path) -> dict[str, Any] | None:
    """What is known of a document beside its losses; None if the file is none of ours, or damaged."""
    found = _json_object(file.read_bytes()) if file.is_file() else None
    if found is None or not {"counts", "settings", "sha256"} <= found.keys() or not isinstance(found["counts"], dict):
        return None
    return found


def _json_object(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except ValueError:  # also bytes that are no text
        return None
    return found if isinstance(found, dict) else None
