"""What a figure was measured on: processor, threads, memory, GPU, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval_kvpress.harness import machine as record
from lm_eval_kvpress.harness.run_record import versions

ROOT = Path(__file__).resolve().parents[1]


def machine() -> dict[str, Any]:
    """Facts that two figures must share to stand in one table. Threads are those that torch has now."""
    return {**record.machine(), "versions": {"python": platform.python_version(), **versions()}}


def described(facts: Mapping[str, Any]) -> str:
    """`machine`'s facts in one line."""
    processor = f"{facts['num_threads']} threads of {facts['cpu']}, {facts['memory_bytes'] / 2**30:.0f} GiB"
    known = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return "; ".join([*([facts["gpu"]] if facts["gpu"] else []), processor, known])


def commit(checkout: Path = ROOT) -> str | None:
    """The commit that a checkout is at, `-dirty` after it where tracked files differ; None without git."""
    git = ["git", "-C", str(checkout)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"]).returncode != 0
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("-dirty" if changed else "")
