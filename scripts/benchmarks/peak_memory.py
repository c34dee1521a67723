"""The most memory that a call takes above what the process holds before it.

On a GPU the allocator's count; elsewhere the resident set's high-water mark, which Linux resets on request. Python and
torch never give all of an earlier peak back, so each measurement belongs into a fresh process.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Peak bytes during ``call`` above those in use before it."""
    gc.collect()  # or what is freed during the call would hide what the call takes
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    (PROCESS / "clear_refs").write_text("5")  # the high-water mark starts anew: proc(5)
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", (PROCESS / "status").read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"no {field} in /proc/self/status"
    return int(found[1]) * 1024
