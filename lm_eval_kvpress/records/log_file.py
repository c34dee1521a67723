"""The file that throughput records are appended to as they come.

Knows files. A line is complete or absent: it is one write, a write that ends early is taken back, and the torn last
line of a run that was killed is dropped when the file is opened again. A lock beside it keeps other processes away.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from filelock import FileLock, Timeout

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.records.timings import BatchRecord, RequestRecord

CSV_HEADER = ",".join(field.name for field in fields(RequestRecord))
JSONL_START = '{"run": "'


class LogError(UsageError):
    """The throughput log cannot be written."""


class ThroughputLog:
    """Appends records to ``FILE.jsonl`` or, requests only, to ``FILE.csv``, which belongs to it until it is closed.

    ``FILE.jsonl.lock`` stays beside the file: deleting a lock file would let two processes hold it.

    Raises:
        LogError: in one line, if the file is in use by another process, holds something else, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix not in (".jsonl", ".csv"):
            raise LogError(f"throughput_log={path}: the name must end in .jsonl or .csv")
        self._path, self._as_csv, self._num_lines = path, path.suffix == ".csv", 0
        self._lock = FileLock(path.with_name(f"{path.name}.lock"), thread_local=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        except Timeout as error:
            raise LogError(f"throughput_log={path} is being written by another run: choose another file") from error
        except OSError as error:
            self._lock.release()
            raise LogError(f"throughput_log={path} cannot be written: {error.strerror}") from error
        self._is_regular = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
        if self._is_regular:  # a pipe or a device holds nothing to go on from
            self._resume()
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
            self._write(line.getvalue())

    def records(self) -> Iterator[BatchRecord | RequestRecord]:
        """The records that a JSONL file holds so far."""
        assert not self._as_csv, "a CSV has no batches"
        kinds = {"batch": BatchRecord, "request": RequestRecord}
        for line in self._path.read_text().splitlines():
            values = json.loads(line)
            yield kinds[values["record"]](**values)

    def close(self) -> None:
        self._file.close()
        self._lock.release()

    def _resume(self) -> None:
        """Drop a torn last line; a file that is no log of ours is refused and left as it is."""
        start = (CSV_HEADER + "\n" if self._as_csv else JSONL_START).encode()
        with open(self._path, "rb") as file:
            found = file.read(len(start))
            if found != start[: len(found)]:
                self.close()
                raise LogError(f"throughput_log={self._path} exists and is no such log: choose another file")
            end = file.seek(0, os.SEEK_END)
            reach = min(end, 2**20)
            file.seek(end - reach)
            complete = end - reach + file.read(reach).rfind(b"\n") + 1
        if complete < end:
            self._file.truncate(complete)

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _write(self, line: str) -> None:
        data, size = line.encode() + b"\n", self._size()
        try:
            if self._file.write(data) < len(data):
                if self._is_regular:
                    self._file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise LogError(
                f"throughput_log={self._path} cannot be written after {self._num_lines} lines ({error.strerror}); the "
                "lines so far are complete"
            ) from error
        self._num_lines += 1
