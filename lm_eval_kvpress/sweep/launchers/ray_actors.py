"""Workers as actors of a Ray cluster, of this machine or of many (extra ``ray``).

Answers stream to this process as they are made. An actor that is lost, or whose node is, is replaced by a new one; all
end with this process. Knows Ray. Does not know what jobs are made of.

Sources: https://docs.ray.io/en/latest/ray-core/actors.html, https://docs.ray.io/en/latest/ray-core/ray-generator.html
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.sweep.launchers.serving import Server
from lm_eval_kvpress.sweep.settings import SweepSettings
from lm_eval_kvpress.sweep.workers.crew import Event, Lost
from lm_eval_kvpress.sweep.workers.jobs import Job


class RayPool:
    """Actors of a Ray cluster (`crew.Pool`).

    Args:
        settings: of the sweep. Without ``ray_address`` Ray is started on this machine, and ends with the pool.

    Raises:
        UsageError: if there is no cluster at the address.
    """

    def __init__(self, settings: SweepSettings) -> None:
        self.num_workers = settings.workers
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            _connect(settings.ray_address)
        found = ray.cluster_resources()
        num_gpus = settings.gpus_per_worker
        if num_gpus is None:
            num_gpus = 1.0 if found.get("GPU") else 0.0
        self._num_cpus = 1 if num_gpus else max(1, int(found.get("CPU", 1)) // self.num_workers)
        self._num_gpus = num_gpus
        self._settings = replace(settings, device=settings.device or ("cuda" if num_gpus else "cpu"))
        _tell_of_waiting(self.num_workers, {"CPU": self._num_cpus, "GPU": num_gpus}, found)
        self._actors, self._events = dict[int, Any](), dict[int, Any]()
        for worker in range(self.num_workers):
            self._start(worker)

    def _start(self, worker: int) -> None:
        actor_class = ray.remote(_Actor).options(num_cpus=self._num_cpus, num_gpus=self._num_gpus, max_restarts=0)
        self._actors[worker] = actor_class.remote(self._settings, self._num_cpus)
        self._events[worker] = self._actors[worker].start.options(num_returns="streaming").remote()

    def send(self, worker: int, job: Job) -> None:
        self._events[worker] = self._actors[worker].do.options(num_returns="streaming").remote(job)

    def next_event(self) -> tuple[int, Event]:
        while True:
            workers = {id(events): worker for worker, events in self._events.items()}
            (ready, *_), _ = ray.wait(list(self._events.values()), num_returns=1)
            worker = workers[id(ready)]
            try:
                event: Event = ray.get(next(ready))
            except StopIteration:  # the worker waits for its next job
                del self._events[worker]
                continue
            except RayError as error:
                return self._replaced(worker, error)
            return worker, event

    def _replaced(self, worker: int, error: RayError) -> tuple[int, Event]:
        ray.kill(self._actors[worker])  # which may live on, if its answer is what was lost
        self._start(worker)
        lines = str(error).strip().splitlines()
        return worker, Lost(lines[-1 if isinstance(error, RayTaskError) else 0].strip())

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        if self._is_ours:
            ray.shutdown()


class _Actor:
    """A `Server` as Ray has it: each call is a stream of events."""

    def __init__(self, settings: SweepSettings, num_threads: int) -> None:
        self._server = Server(settings, num_threads)

    def start(self) -> Iterator[Event]:
        yield from self._server.start()

    def do(self, job: Job) -> Iterator[Event]:
        yield from self._server.do(job)


def _connect(address: str | None) -> None:
    host, _, port = (address or "").rpartition(":")
    try:
        if port.isdecimal() and "://" not in host:  # Ray itself tries for minutes where nobody listens
            socket.create_connection((host, int(port)), timeout=30).close()
        ray.init(address=address or "local", include_dashboard=None if address else False, logging_level="warning")
    except Exception as error:
        if not isinstance(error, OSError | ValueError | RuntimeError) and type(error) is not Exception:
            raise  # Ray raises a plain one where a node is not up in time, as on a machine that others use
        line = " ".join(str(error).split())[:200]
        if address is None:
            raise UsageError(f"Ray does not start on this machine ({line}): run the same command again") from error
        raise UsageError(f"ray_address={address}: there is no Ray cluster ({line}): see ray status") from error


def _tell_of_waiting(num_workers: int, of_each: dict[str, float], found: dict[str, float]) -> None:
    """A cluster may grow, so what is missing is no error."""
    room = min(int(found.get(name, 0) // amount) for name, amount in of_each.items() if amount)
    if room < num_workers:
        print(
            f"workers={num_workers}: the Ray cluster has room for {room} of them at present, and the sweep starts once "
            "it has for all",
            file=sys.stderr,
        )
