"""A sweep as jobs of Slurm: an array of shards, and the merge after them, submitted by submitit (extra ``slurm``).

``cluster=local`` runs the same jobs as processes of this machine and waits for them. Knows submitit. Does not know what
a shard does: each job is a command of ours (`slurm_part`).

Source: https://github.com/facebookincubator/submitit/blob/main/docs/structure.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.sweep.launchers.slurm_part import Part
from lm_eval_kvpress.sweep.settings import SweepSettings
from lm_eval_kvpress.sweep.store import SHARDS

LOCAL, SLURM = "local", "slurm"

A_WEEK_MIN = 7 * 24 * 60
"""Minutes of a job of this machine, of which submitit ends each after a few."""

ALIKE_EVERYWHERE = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "name")
"""Parameters of submitit that mean the same on every cluster; Slurm's own have a prefix."""


def submit(settings: SweepSettings) -> list[str]:
    """Submit the shards, as many as there are workers, and the merge.

    Returns:
        a line for each job, or array of jobs.

    Raises:
        UsageError: for what submitit or Slurm does not take; locally also if a job fails.
    """
    options = dict(settings.slurm or {})
    cluster = str(options.pop("cluster", SLURM))
    logs = Path(settings.output_path) / SHARDS / "logs"
    part, shards = part_of(settings), [f"{number + 1}/{settings.workers}" for number in range(settings.workers)]
    array = _executor(cluster, logs, options).map_array(part, [["--shard", shard] for shard in shards])
    if cluster == LOCAL:
        _wait(array)
    ids = [job.job_id for job in array]
    after = {} if cluster == LOCAL else {"dependency": f"afterany:{ids[0].partition('_')[0]}"}
    of_merge = {name: value for name, value in options.items() if name != "gpus_per_node"} | after
    merge = _executor(cluster, logs, of_merge).submit(part, ["--merge"])
    if cluster == LOCAL:
        _wait([merge])
    return [
        f"{len(ids)} shards are jobs {ids[0]} to {ids[-1]}, with their messages in {logs}",
        f"the merge is job {merge.job_id}, which starts once they have ended; after a failure the same command goes on",
    ]


def part_of(settings: SweepSettings) -> Part:
    """What every job is: a sweep with a worker for each GPU that the job gets."""
    num_gpus = (settings.slurm or {}).get("gpus_per_node")
    num_workers = num_gpus if isinstance(num_gpus, int) else 1
    return Part(replace(settings, launcher="local", workers=max(1, num_workers), slurm=None).as_typed())


def _executor(cluster: str, logs: Path, options: Mapping[str, Any]) -> submitit.AutoExecutor:
    if cluster == SLURM and not {"time", "timeout_min"} & options.keys():
        raise UsageError("slurm needs time=HH:MM:SS or timeout_min=N, of each shard: submitit's default is 5 minutes")
    named = {name if name in ALIKE_EVERYWHERE else f"{SLURM}_{name}": value for name, value in options.items()}
    if cluster == LOCAL:
        named = {"timeout_min": A_WEEK_MIN, **named}
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
        executor.update_parameters(**{"name": "lm-eval-kvpress", **named})
    except (ValueError, RuntimeError, NameError, AssertionError) as error:
        raise UsageError(f"slurm: {' '.join(str(error).split())[:400]}") from error
    return executor


def _wait(jobs: Sequence[submitit.Job[None]]) -> None:
    for job in jobs:
        try:
            job.result()
        except FailedJobError as error:
            raise UsageError(f"job {job.job_id} failed: see {job.paths.stderr}") from error
