"""The base class of all errors in what a user gave: arguments, files, requests; and which errors are one line.

Every package raises it or derives from it, so that a command can end on such an error in one line and show a traceback
for everything else. Imports nothing of ours: a task may raise it without loading torch or kvpress.
"""

from __future__ import annotations

import errno

NO_ROOM = "make room there, and run the same command again"
NO_RIGHT = "choose a place that you may read and write"
OF_THE_DISK = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), NO_ROOM),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), NO_RIGHT),
    errno.EPIPE: "who read the output has ended",
    errno.EIO: "look after the disk, then run the same command again",
}
"""Errors of the operating system that only the user can mend, and how."""


class UsageError(ValueError):
    """Bad input. The text is one line that says what is wrong and what to do next."""


def one_line(error: BaseException) -> str | None:
    """The line that a command ends on; None for a defect, which keeps its traceback.

    An `OSError` of the disk may come from any library: lm-eval's files, a hub's cache, temporary files.
    """
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.errno in OF_THE_DISK:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}: {OF_THE_DISK[error.errno]}"
    return None
