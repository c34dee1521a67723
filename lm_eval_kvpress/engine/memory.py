"""Whether an error says that memory ran out, on a GPU or on a CPU: a smaller batch is the answer to such an error."""

from __future__ import annotations

import torch

ALLOCATORS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "ALLOC_FAILED")
"""What PyTorch's allocator for CPUs, and CUDA's libraries, say in a plain ``RuntimeError``."""


def ran_out(error: BaseException) -> bool:
    """Whether the error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATORS)
