"""The machine that a run is computed on: processor, threads, memory and GPU. Speeds mean nothing without it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def machine(device: torch.device | str | None = None) -> dict[str, Any]:
    """Facts that two speeds must share to be compared. Threads are those that torch has now.

    Args:
        device: whose GPU is named; by default torch's current one, if there is any.
    """
    on_gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    return {
        "cpu": _processor(),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
    }


def machine_name(facts: Mapping[str, Any], device: torch.device | str) -> str:
    """One line of what speeds depend on: GPU or kind of device, threads and processor.

    Args:
        facts: as `machine` returns them.
    """
    computes = facts["gpu"] or torch.device(device).type
    return f"{computes}; {facts['num_threads']} threads of {facts['cpu']}"


def _memory_bytes() -> int | None:
    """None where the system does not say, as on Windows."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
