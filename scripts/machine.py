"""What a figure was measured on: processor, threads, memory, GPU, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lm_eval_kvpress.harness.run_record import versions

ROOT = Path(__file__).resolve().parents[1]


def machine() -> dict[str, Any]:
    """Facts that two figures must share to stand in one table. Threads are those that torch has now."""
    return {
        "cpu": _processor(),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version(), **versions()},
    }


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


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
