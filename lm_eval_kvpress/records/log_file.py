"""The file that throughput records are appended to as they come.

Knows files. A line is complete or absent: it is one write, and a write that ends early is taken back. When the file is
opened again, lines that are no records are dropped and named: the torn last line of a run that was killed, or blocks of
zeros that a power cut left. A lock beside it keeps other processes away.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import os
import time
import weakref
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import make_folder, refuse_special, sync_folder, write_whole
from lm_eval_kvpress.records.timings import BatchRecord, RequestRecord

KINDS: dict[str, type[BatchRecord] | type[RequestRecord]] = {"batch": BatchRecord, "request": RequestRecord}
CSV_FIELDS = [field.name for field in fields(RequestRecord)]
RECORD = CSV_FIELDS.index("record")
CSV_HEADER = ",".join(CSV_FIELDS)
JSONL_START = f'{{"{CSV_FIELDS[0]}": "'
SYNC_EVERY_SEC = 1.0

logger = logging.getLogger("lm_eval_kvpress")


class LogError(UsageError):
    """The throughput log cannot be written."""


class ThroughputLog:
    """Appends records to ``FILE.jsonl`` or, requests only, to ``FILE.csv``, which belongs to it until it is closed.

    ``FILE.jsonl.lock`` stays beside the file: deleting a lock file would let two processes hold it. What is written is
    on disk, beyond the reach of a power cut, after a second at most of further writing, and at the end.

    Raises:
        LogError: in one line, if the file is in use by another process, holds something else, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix not in (".jsonl", ".csv"):
            raise LogError(f"throughput_log={path}: the name must end in .jsonl or .csv")
        self._path, self._as_csv, self._num_lines, self._synced_sec = path, path.suffix == ".csv", 0, 0.0
        refuse_special(path, f"throughput_log={path}")
        self._lock = FileLock(path.with_name(f"{path.name}.lock"), thread_local=False)
        try:
            make_folder(path.parent)
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise LogError(f"throughput_log={path} is being written by another run: choose another file") from error
        except OSError as error:
            raise LogError(f"throughput_log={path} cannot be written: {error.strerror}") from error
        try:
            self._repair()
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
            sync_folder(path.parent)
        except UsageError:
            self._lock.release()
            raise
        except OSError as error:
            self._lock.release()
            raise LogError(f"throughput_log={path} cannot be written: {error.strerror}") from error
        self._close = weakref.finalize(self, _close, self._file, self._lock)  # also when the process ends
        if self._as_csv and self._size() == 0:
            self._write(CSV_HEADER)

    def add(self, record: BatchRecord | RequestRecord) -> None:
        """Append a record.

        Raises:
            LogError: if the disk is full or the file is gone; the lines so far are complete.
        """
        if not self._as_csv:
            self._write(json.dumps(vars(record)))
        elif isinstance(record, RequestRecord):
            line = io.StringIO()
            csv.writer(line, lineterminator="").writerow(vars(record).values())
            self._write(" ".join(line.getvalue().splitlines()))

    def records(self) -> Iterator[BatchRecord | RequestRecord]:
        """The records that a JSONL file holds so far."""
        assert not self._as_csv, "a CSV has no batches"
        yield from map(parse_line, self._path.read_text(encoding="utf-8").split("\n")[:-1])

    def close(self) -> None:
        """Bring the file to disk and let other processes write it."""
        self._close()

    # ------------------------------------------------------------------------------------------- what was there before

    def _repair(self) -> None:
        """Drop and name what is no record; a file that holds none is refused and left as it is."""
        if not self._path.exists():
            return
        data = self._path.read_bytes()
        if not data:
            logger.warning("%s is there and empty: it is begun anew", self._path)
        *lines, torn = data.split(b"\n")
        sound = [line for line in lines if self._is_sound(line)]
        start = (CSV_HEADER + "\n" if self._as_csv else JSONL_START).encode()
        if not sound and (lines or torn[: len(start)] != start[: len(torn)]):
            raise LogError(
                f"throughput_log={self._path} exists and is no log of this version, or none of it can be read: choose "
                "another file"
            )
        whole = b"".join(line + b"\n" for line in sound)
        if self._as_csv and sound and sound[0] != CSV_HEADER.encode():
            whole = start + whole
        if whole == data:
            return
        num_damaged, num_kept = len(lines) - len(sound), len(sound) - (self._as_csv and start in whole)
        dropped = [f"{num_damaged} damaged lines"] * bool(num_damaged) + ["a torn last line"] * bool(torn)
        logger.warning("%s: dropped %s; %d records are kept", self._path, " and ".join(dropped), num_kept)
        write_whole(self._path, whole.decode())

    def _is_sound(self, line: bytes) -> bool:
        """Whether a line is a record, or the header of a CSV."""
        try:
            text = line.decode()
            if self._as_csv:
                (row,) = csv.reader([text])
                is_record = "\0" not in text and len(row) == len(CSV_FIELDS) and row[RECORD] in KINDS
                return is_record or text == CSV_HEADER
            parse_line(text)
            return True
        except (ValueError, KeyError, TypeError, csv.Error):
            return False

    # -------------------------------------------------------------------------------------------------------- writing

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _write(self, line: str) -> None:
        data, size = line.encode() + b"\n", self._size()
        try:
            if self._file.write(data) < len(data):
                self._file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if time.monotonic() - self._synced_sec > SYNC_EVERY_SEC:
                os.fsync(self._file.fileno())
                self._synced_sec = time.monotonic()
        except OSError as error:
            raise LogError(
                f"throughput_log={self._path} cannot be written after {self._num_lines} lines ({error.strerror}); the "
                "lines so far are complete: make room, and the same command adds to them"
            ) from error
        self._num_lines += 1


def parse_line(text: str) -> BatchRecord | RequestRecord:
    """Read a line of JSONL. One that was written before records named the machine has an empty name.

    Raises:
        ValueError, KeyError, TypeError: if it is no record.
    """
    values = json.loads(text)
    return KINDS[values["record"]](**{"machine": "", **values})


def _close(file: io.FileIO, lock: BaseFileLock) -> None:
    try:
        os.fsync(file.fileno())
    finally:
        file.close()
        lock.release()
