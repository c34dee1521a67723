"""Atomic writes of small files, and folders that can be written to."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lm_eval_kvpress.errors import UsageError


def write_whole(file: Path, text: str) -> None:
    """Write a text file that appears in full or not at all, also if the process is killed."""
    beside = file.with_name(f"{file.name}.{os.getpid()}.part")
    with beside.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(file)


def make_writable(argument: str, folder: Path) -> None:
    """Make a folder that a run will write to, or say before any work why that cannot be done.

    Args:
        argument: that names the folder, for the message.

    Raises:
        UsageError: in one line.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{argument}={folder} cannot be written: {error.strerror}") from error
