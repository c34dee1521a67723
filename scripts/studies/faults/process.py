"""Commands in processes of their own, forked from a server (`server`) that has imported the libraries already.

A command is lm-eval's or ours, by its name and arguments. It behaves as started by a shell: its `sys.argv`, its error
hook, its exit status; only the seconds of importing are saved. Linux only: processor time is read off /proc. Does not
know what a command is for.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["scripts.studies.faults.server"])

TIMEOUT_SEC = 300
POLL_SEC = 0.02
HUNG = "hung: no end after"


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    Attributes:
        status: its exit status, negative for a signal.
        cpu_sec: processor time that it took, which other programs of the machine do not change.
        stdout, stderr: what it printed.
    """

    status: int
    cpu_sec: float
    stdout: str
    stderr: str

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.stderr

    @property
    def last_line(self) -> str:
        lines = [line for line in self.stderr.replace("\r", "\n").splitlines() if line.strip()]
        return lines[-1] if lines else ""


def run(
    command: Sequence[str], log: Path, *, kill_after_cpu_sec: float = math.inf, max_file_bytes: int | None = None
) -> Ended:
    """Run a command to its end.

    Args:
        log: the start of the names of two files, in which its output stays.
        kill_after_cpu_sec: when it gets SIGKILL; never if it has ended before.
        max_file_bytes: the size at which every file of it is full.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    out, err = (log.with_name(f"{log.name}.{ending}") for ending in ("out", "err"))
    process = SERVER.Process(target=_become, args=(list(command), str(out), str(err), max_file_bytes))
    process.start()
    cpu_sec = _watch(process, kill_after_cpu_sec, err)
    assert process.exitcode is not None
    printed = (file.read_text(errors="replace") if file.exists() else "" for file in (out, err))
    return Ended(process.exitcode, cpu_sec, *printed)


def _watch(process: BaseProcess, kill_after_cpu_sec: float, err: Path) -> float:
    """Wait for a process to end, or end it; return the processor time that it took."""
    cpu_sec, deadline = 0.0, time.monotonic() + TIMEOUT_SEC
    while process.exitcode is None:
        process.join(POLL_SEC)
        cpu_sec = max(cpu_sec, _cpu_sec(process))
        is_hung = time.monotonic() > deadline
        if process.exitcode is None and (cpu_sec >= kill_after_cpu_sec or is_hung):
            process.kill()
            process.join()
            if is_hung:
                with err.open("a") as stream:
                    stream.write(f"\n{HUNG} {TIMEOUT_SEC} s\n")
    return cpu_sec


def _cpu_sec(process: BaseProcess) -> float:
    """So far, in user and kernel mode; 0 once it has ended."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _become(command: list[str], out: str, err: str, max_file_bytes: int | None) -> None:
    """What the interpreter does around a script."""
    for name, descriptor, flags in (
        (os.devnull, 0, os.O_RDONLY),
        (out, 1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (err, 2, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(name, flags, 0o666), descriptor)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115 (until the end)
    if max_file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    sys.argv = command
    try:
        _main(command)
        status = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        status = 1
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored in {sys.stdout}: {error}", file=sys.stderr)
        status = 120
    os._exit(status)


def _main(command: list[str]) -> None:
    if command[0] == "lm_eval":
        from lm_eval.__main__ import cli_evaluate

        from lm_eval_kvpress.harness import plugin

        plugin.enter_models()  # again, now that the process is lm-eval's command
        plugin.include_tasks()
        cli_evaluate()
    else:
        from lm_eval_kvpress.cli import main

        sys.exit(main(command[1:]))
