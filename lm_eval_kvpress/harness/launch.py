"""How many processes share a run, and that all of them are there.

A launcher (``accelerate launch``, ``torchrun``) tells each process its rank in the environment. Shells and schedulers
leave the same variables behind where no other process was started, and accelerate would wait a year for it. Knows the
environment and ``torch.distributed``. Does not know lm-eval, models or requests.

Sources: https://docs.pytorch.org/docs/stable/elastic/run.html (environment variables), ``PartialState`` of accelerate.
"""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from lm_eval_kvpress.errors import UsageError

WAIT = timedelta(seconds=120)
"""How long the processes of one run may come after each other."""

WHOLE_RUN = timedelta(weeks=52)
"""How long one may wait for another that still answers its share, as lm-eval sets it."""

OF_ONE_PROCESS = ("RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID")
"""What a launcher sets for each process that it starts. ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` may be
exported by the script of a whole job."""

ADVICE = "start the run with accelerate launch or torchrun, or unset WORLD_SIZE for one process"

logger = logging.getLogger("lm_eval_kvpress")


def num_processes() -> int:
    """How many processes the environment announces; 1 without a launcher.

    Raises:
        UsageError: if ``WORLD_SIZE`` is no number.
    """
    announced = os.environ.get("WORLD_SIZE") or "1"
    if not announced.isdecimal() or int(announced) < 1:
        raise UsageError(f"the variable WORLD_SIZE={announced} is no number of processes: {ADVICE}")
    return int(announced)


def forget_processes_of_a_shell() -> None:
    """Leave a ``WORLD_SIZE`` out of account beside which nothing tells a rank: no launcher set it, and accelerate would
    wait for processes that nobody has started.

    Raises:
        UsageError: as `num_processes`.
    """
    if num_processes() == 1 or any(os.environ.get(name) for name in OF_ONE_PROCESS):
        return
    size = os.environ.pop("WORLD_SIZE")
    logger.warning("WORLD_SIZE=%s is set without a RANK, and is left out of account: this is one process", size)


def rank_in_run() -> int:
    """The index of this process among those that the environment announces, before they have met."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if num_processes() > 1 and rank.isdecimal() else 0


def meet_the_others(device: str) -> None:
    """Wait for the other processes that the environment announces, for as long as `WAIT`.

    Args:
        device: as asked for. accelerate sees processes on a CPU only if it is told that they are.

    Raises:
        UsageError: if one does not come, or a variable by which they would meet is missing.
    """
    forget_processes_of_a_shell()
    announced = num_processes()
    if announced == 1:
        _warn_of_copies()
        return
    on_cpu = device == "cpu" or (device.startswith("cuda") and not torch.cuda.is_available())
    if on_cpu:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    if dist.is_initialized() or "TORCHELASTIC_RUN_ID" in os.environ:  # a launcher that starts, and ends, all of them
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UsageError(f"WORLD_SIZE={announced} is set and {', '.join(missing)} is not: {ADVICE}")
    logger.info("waiting for the %d processes that WORLD_SIZE announces", announced)
    try:
        store, rank, size = next(rendezvous("env://", timeout=WAIT))
    except (RuntimeError, ValueError, OSError) as error:
        raise UsageError(
            f"WORLD_SIZE={announced} processes are announced, and they did not meet at MASTER_ADDR="
            f"{os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']} within {WAIT.seconds} s: {ADVICE}"
        ) from error
    store.set_timeout(WHOLE_RUN)
    dist.init_process_group(
        "gloo" if on_cpu else "cuda:nccl,cpu:gloo", store=store, rank=rank, world_size=size, timeout=WHOLE_RUN
    )


def _warn_of_copies() -> None:
    """A Slurm step of several tasks without ``WORLD_SIZE`` is as many whole runs."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks.isdecimal() and int(tasks) > 1:
        logger.warning(
            "this is task %s of the %s tasks of a Slurm step, and each of them does all the work: ask for one task, or "
            "start the run with accelerate launch or torchrun to share it",
            *(os.environ.get("SLURM_PROCID", "?"), tasks),
        )
