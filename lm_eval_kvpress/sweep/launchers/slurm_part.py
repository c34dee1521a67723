"""A job of Slurm on its node: a command of ours, which goes on where it stopped if Slurm ends and requeues the job.

submitit unpickles it in a process of its own, which waits for the command: nothing here takes seconds to import. Does
not know settings or models.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from submitit.helpers import Checkpointable


class Part(Checkpointable):
    """A shard or the merge.

    Args:
        settings: of the sweep, as ``--config`` takes them.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings

    def __call__(self, arguments: Sequence[str]) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            json.dump(self._settings, file)  # JSON is YAML
            file.flush()
            sweep = [sys.executable, "-m", "lm_eval_kvpress", "sweep", "--config", file.name]
            status = subprocess.run([*sweep, *arguments]).returncode
        if status:
            raise RuntimeError(f"the sweep ended with exit status {status}: its message is above")
