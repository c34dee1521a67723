"""Keeps freed memory for the next tensor on a CPU, as PyTorch's own allocator does on a GPU.

glibc hands the free top of its heap back to the kernel from some limit on (64 MiB at most), and the next tensors begin
on pages that the kernel finds and zeroes anew, 4 microseconds each: up to a tenth of a prefill (docs/LOG.md). Here the
limit is lifted for the process, unless its user has set one.

Knows the C library alone.
"""

from __future__ import annotations

import ctypes
import os
import platform

VARIABLES = (
    "GLIBC_TUNABLES",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_MMAP_MAX_",
)
"""By which users set the limits themselves."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of malloc.h: from how many free bytes on the top is returned, and how large a block has pages of its own."""
LARGEST_IN_HEAP = 32 * 2**20
"""What glibc allows at most (64-bit) and comes to by itself, once such a block has been freed."""


def keep_freed_memory() -> bool:
    """Makes the process keep what it frees; whether that could be done."""
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in VARIABLES):
        return False
    set_option = ctypes.CDLL(None).mallopt
    return bool(set_option(MMAP_THRESHOLD, LARGEST_IN_HEAP) and set_option(TRIM_THRESHOLD, 2**31 - 1))
