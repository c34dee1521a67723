"""A shard: one of N shares of a sweep's requests, as typed, or as Slurm counts the tasks of an array.

Knows the environment. Does not know stores or models.

Source: https://slurm.schedmd.com/job_array.html (environment variables).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.sweep.store import SHARDS

AUTO, NO_SHARD = "auto", "none"

OF_ARRAY = (
    *("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"),
    *("SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX"),
)
"""What Slurm sets in every task of an array, all of them; a shell that sets one or two by itself is no array."""


@dataclass(frozen=True)
class Shard:
    """One of several shares.

    Attributes:
        number: from 1 on.
        count: of all shares.
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def folder(self, output_path: Path) -> Path:
        """Where it answers."""
        return output_path / SHARDS / f"{self.number}-of-{self.count}"

    def has(self, block: int) -> bool:
        """Whether a block of the requests is of this share."""
        return number_of(block, self.count) == self.number


def number_of(block: int, count: int) -> int:
    """Return the number of the shard that answers a block. Neighbours, of like length, go to different ones."""
    return block % count + 1


def parse_shard(text: str) -> Shard | None:
    """Read ``I/N``, ``auto`` for what Slurm says of this task of an array, or ``none``.

    Raises:
        UsageError: for anything else, and for ``auto`` outside of an array.
    """
    if text == NO_SHARD:
        return None
    if text == AUTO:
        return shard_of_array()
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UsageError(f"shard={text}: give I/N with I from 1 to N, auto in an array of Slurm, or none")
    return Shard(int(number), int(count))


def is_in_array() -> bool:
    """Whether this process is a task of an array of Slurm."""
    return all(os.environ.get(name, "").isdecimal() for name in OF_ARRAY)


def shard_of_array() -> Shard:
    """Return the place of this task within its array, whatever the array's first number and step are.

    Raises:
        UsageError: outside of an array, and in one with gaps, in which Slurm does not say which task this is.
    """
    if not is_in_array():
        raise UsageError(f"shard=auto needs the variables that Slurm sets in an array, {', '.join(OF_ARRAY)}: give I/N")
    task, count, first, last = (int(os.environ[name]) for name in OF_ARRAY[2:])
    step = (last - first) // (count - 1) if count > 1 else 1
    if not first <= task <= last or first + step * (count - 1) != last or (task - first) % max(step, 1):
        raise UsageError(
            f"shard=auto: task {task} of an array of {count} from {first} to {last} with gaps is no share of a whole; "
            "give I/N, such as --shard $SLURM_ARRAY_TASK_ID/N"
        )
    return Shard((task - first) // max(step, 1) + 1, count)
