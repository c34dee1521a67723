"""The base class of all errors in what a user gave: arguments, files, requests; and which errors are one line.

Every package raises it or derives from it, so that a command can end on such an error in one line and show a traceback
for everything else. Imports nothing of ours: a task may raise it without loading torch or kvpress.
"""

from __future__ import annotations

import errno
import sqlite3

NO_ROOM = "make room there, and run the same command again"
NO_RIGHT = "choose a place that you may read and write"
OF_THE_DISK = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), NO_ROOM),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), NO_RIGHT),
    errno.EPIPE: "who read the output has ended",
    errno.EIO: "look after the disk, then run the same command again",
}
"""Errors of the operating system that only the user can mend, and how."""
OF_A_DATABASE = {
    "database or disk is full": NO_ROOM,
    "attempt to write a readonly database": NO_RIGHT,
    "unable to open database file": NO_RIGHT,
    "disk I/O error": OF_THE_DISK[errno.EIO],
}
"""The same as SQLite says it. Its codes are known from Python 3.11 on; its words are those of all versions."""


class UsageError(ValueError):
    """Bad input. The text is one line that says what is wrong and what to do next."""


def one_line(error: BaseException) -> str | None:
    """The line that a command ends on; None for a defect, which keeps its traceback.

    An `OSError` of the disk may come from any library: lm-eval's files, a hub's cache, temporary files. An error of
    SQLite comes from lm-eval's ``--use_cache``; a sweep names its own database itself.
    """
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.errno in OF_THE_DISK:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}: {OF_THE_DISK[error.errno]}"
    if isinstance(error, sqlite3.OperationalError) and str(error) in OF_A_DATABASE:
        return f"--use_cache: {error}: {OF_A_DATABASE[str(error)]}"
    return None
