"""The manifest of a finished cell: the size and hash of each of its files, written once they are on disk.

A cell counts as finished if its manifest is there and every file matches it. So files that a power cut emptied, or that
lost their end, are noticed before a report pairs what is left of them. Knows files. Does not know cells or lm-eval.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lm_eval_kvpress.files import sync_folder, write_whole

MANIFEST = "manifest.json"


class Entry(BaseModel):
    """One file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    num_bytes: int
    sha256: str


class Manifest(BaseModel):
    """The content of ``manifest.json``: entries by path, relative to the folder of the results."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal["lm-eval-kvpress manifest 1"] = "lm-eval-kvpress manifest 1"
    files: Annotated[dict[str, Entry], Field(min_length=1)]


def seal(results: Path, others: Iterable[Path] = ()) -> None:
    """Sync every file of the results and write the manifest beside them, which is on disk last.

    Args:
        results: folder of the results, with any folders inside.
        others: files outside that the results belong together with; synced when they were written.

    Raises:
        OSError: if something cannot be synced or read.
        UsageError: if the manifest cannot be written.
    """
    own = sorted(path for path in results.rglob("*") if path.is_file())
    for path in own:
        _sync(path)
    for folder in [path for path in results.rglob("*") if path.is_dir()]:
        sync_folder(folder)
    files = {os.path.relpath(path, results): _entry(path) for path in [*own, *sorted(others)]}
    write_whole(results / MANIFEST, Manifest(files=files).model_dump_json(indent=2))


def mismatches(results: Path) -> list[Path]:
    """Return the files that are gone or no longer what they were, the manifest among them; empty if all is well."""
    manifest = results / MANIFEST
    try:
        entries = Manifest.model_validate_json(manifest.read_bytes()).files
    except (OSError, ValidationError):
        return [manifest]
    files = {Path(os.path.normpath(results / name)): entry for name, entry in entries.items()}
    return [file for file, entry in files.items() if not _matches(file, entry)]


def _matches(file: Path, entry: Entry) -> bool:
    return file.is_file() and file.stat().st_size == entry.num_bytes and _entry(file) == entry


def _entry(file: Path) -> Entry:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(2**20):
            digest.update(block)
        return Entry(num_bytes=stream.tell(), sha256=digest.hexdigest())


def _sync(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
