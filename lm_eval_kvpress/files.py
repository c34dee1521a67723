"""Files that appear whole or not at all, on disk before they count; and errors of writing in one line.

Knows files alone. A rename is atomic, but it is on disk only once the folder is synced as well:
https://man7.org/linux/man-pages/man2/fsync.2.html
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from lm_eval_kvpress.errors import UsageError

MAX_NAME = 200
"""Characters of a name: file systems take 255, and endings are added to it."""

GOES_ON = "make room, and the same command goes on from what is complete"
"""What to do after a failed write of a run that can be resumed."""


@contextmanager
def write_errors(what: object, advice: str = GOES_ON) -> Iterator[None]:
    """Turn an `OSError` of the block, such as that of a full disk or a closed pipe, into one line.

    Args:
        what: the file, after the argument that named it if there is one: ``-o report.md``.
        advice: what is complete, and what to do next.

    Raises:
        UsageError: naming all three.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(f"{what} cannot be written ({error.strerror or error}): {advice}") from error


def write_whole(file: Path, content: str | bytes, advice: str = GOES_ON, *, what: object = None) -> None:
    """Write a file that appears in full or not at all, also if the process is killed or the power fails.

    Text is written as UTF-8.

    Once this returns, the file is on disk. The folder must be there.

    Args:
        advice, what: as `write_errors` takes them.

    Raises:
        UsageError: in one line with ``advice``, if it cannot be written; the file before is left as it was.
    """
    beside = file.with_name(f"{file.name}.{os.getpid()}.part")
    with write_errors(what or file, advice):
        try:
            with beside.open("wb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(file)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        sync_folder(file.parent)


def make_folder(folder: Path) -> None:
    """Make a folder that stays after a power cut.

    Raises:
        UsageError: in one line.
    """
    if folder.is_dir():
        return
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk: new files, renames, deletions. Windows cannot and need not be asked."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(*texts: str) -> str:
    """Sum up what files must hold, to see later whether they still do; texts in another order are another sum."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def file_name(text: str) -> str:
    """Make any text the name of one file or folder: no path, and never too long.

    Ordinary names stay as they are. What has a meaning in paths is quoted as in an address, and the end of a long name
    is replaced by a checksum, so that two texts keep two names.
    """
    name = quote(text, safe=" ,=+@()[]'")
    if not name.strip("."):  # the folder itself and the one above it
        name = name.replace(".", "%2E")
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 17]}-{checksum(text)[:16]}"


def remove_parts(folder: Path) -> None:
    """Remove what `write_whole` left anywhere below a folder when it was killed. Only for who alone writes there."""
    for part in folder.rglob("*.part"):
        if part.is_file():
            part.unlink(missing_ok=True)


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


def refuse_special(file: Path, what: object = None) -> None:
    """Refuse a path that is there and is no regular file: opening a pipe waits for its other end, maybe for ever.

    Args:
        what: the file with the argument that named it, for the message.

    Raises:
        UsageError: in one line.
    """
    try:
        mode = os.stat(file).st_mode
    except OSError:  # who opens it will be told
        return
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UsageError(f"{what or file} is {kind}: name a file")
