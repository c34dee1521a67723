"""Keeps freed blocks for the next tensors on a CPU, as PyTorch's own allocator does on a GPU.

glibc hands the free top of its heap back to the kernel from some limit on (64 MiB at most), and the next tensors begin
on pages that the kernel finds and zeroes anew, 4 microseconds each: up to a tenth of a prefill
(docs/experiments/fresh_pages.md). Here the
limit is lifted for the process, unless its user has set one. Blocks of more than 32 MiB are mapped anew all the same.

Knows the C library alone.
"""

from __future__ import annotations

import ctypes
import os
import platform

VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")
"""By which users set the limits themselves, beside ``GLIBC_TUNABLES``."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of malloc.h: from how many free bytes on the top is returned, and how large a block has pages of its own."""
LARGEST_IN_HEAP = 32 * 2**20
"""What glibc allows at most (64-bit) and comes to by itself, once such a block has been freed."""


def keep_freed_memory() -> bool:
    """Makes the process keep what it frees; whether that could be done."""
    is_set = any(map(os.environ.get, VARIABLES)) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if is_set or platform.libc_ver()[0] != "glibc":
        return False
    set_option = ctypes.CDLL(None).mallopt
    return bool(set_option(MMAP_THRESHOLD, LARGEST_IN_HEAP) and set_option(TRIM_THRESHOLD, 2**31 - 1))
