"""Workers as processes of this machine: one per GPU that is visible, or on CPUs with a share of the threads.

A process that ends is replaced. Processes end with this one: their pipe is closed then, also by a kill. Knows processes
and pipes. Does not know what jobs are made of.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.sweep.launchers.serving import Server
from lm_eval_kvpress.sweep.settings import SweepSettings
from lm_eval_kvpress.sweep.workers.crew import Event, Lost
from lm_eval_kvpress.sweep.workers.jobs import Job


class ProcessPool:
    """Processes of this machine (`crew.Pool`).

    Args:
        settings: of the sweep.

    Raises:
        UsageError: for more workers than GPUs.
    """

    def __init__(self, settings: SweepSettings) -> None:
        self.num_workers = settings.workers
        self._settings, self._devices = settings, devices(settings)
        self._processes, self._pipes = dict[int, BaseProcess](), dict[int, Connection]()
        self._broken = deque[int]()
        for worker in range(self.num_workers):
            self._start(worker)

    def _start(self, worker: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes[worker], theirs = context.Pipe()
        settings = replace(self._settings, device=self._devices[worker])
        num_threads = max(1, torch.get_num_threads() // self.num_workers)
        self._processes[worker] = context.Process(target=serve, args=(theirs, settings, num_threads), daemon=True)
        self._processes[worker].start()
        theirs.close()

    def send(self, worker: int, job: Job) -> None:
        try:
            self._pipes[worker].send(job)
        except OSError:  # its end shows when it is waited for
            self._broken.append(worker)

    def next_event(self) -> tuple[int, Event]:
        if self._broken:
            return self._replaced(self._broken.popleft())
        workers = {id(pipe): worker for worker, pipe in self._pipes.items()}
        ready = wait(list(self._pipes.values()))
        worker = workers[id(ready[0])]
        try:
            event: Event = self._pipes[worker].recv()
        except (EOFError, OSError):
            return self._replaced(worker)
        return worker, event

    def _replaced(self, worker: int) -> tuple[int, Event]:
        self._pipes[worker].close()
        process = self._processes[worker]
        process.join()
        self._start(worker)
        return worker, Lost(ended(process.exitcode))

    def close(self) -> None:
        for pipe in self._pipes.values():
            pipe.close()
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.join()


def devices(settings: SweepSettings) -> list[str]:
    """The device of each worker.

    Raises:
        UsageError: for more workers than GPUs.
    """
    asked = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if asked != "cuda":
        return [asked] * settings.workers
    num_devices = torch.cuda.device_count()
    if settings.workers > num_devices:
        raise UsageError(f"workers={settings.workers}: a worker has a GPU of its own, and {num_devices} are visible")
    return [f"cuda:{index}" for index in range(settings.workers)]


def ended(exitcode: int | None) -> str:
    """How a process ended, in words."""
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"killed by {name}{', as where memory runs out' if name == 'SIGKILL' else ''}"
    return f"exit status {exitcode}"


def serve(pipe: Connection, settings: SweepSettings, num_threads: int) -> None:
    """Load the model and do the jobs that come through the pipe, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the process that asks ends the others
    server = Server(settings, num_threads)
    events = server.start()
    try:
        while True:
            for event in events:
                pipe.send(event)
            events = server.do(pipe.recv())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
