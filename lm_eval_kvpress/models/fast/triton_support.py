"""Whether Triton's kernels can run on a device, and what it raises where they cannot be made after all.

Knows torch. Does not know models or kernels, and loads Triton only to ask for its errors.
"""

from __future__ import annotations

from importlib.util import find_spec
from subprocess import SubprocessError

import torch

LEAST_CAPABILITY = (8, 0)
"""Of an NVIDIA GPU. Older ones have no tensor cores for bfloat16, and Triton 3.1 aborts the process on some."""


def why_not_on(device: torch.device) -> str:
    """Why kernels cannot run on a device, or nothing: Triton launches on the current one."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not is_new_enough(device):
        return f"the GPU is not an NVIDIA of compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or higher"
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return f"{device} is not the current device"
    return ""


def is_new_enough(device: torch.device) -> bool:
    """Whether Triton compiles our kernels for a device."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def refusals() -> tuple[type[Exception], ...]:
    """What Triton raises where it cannot be loaded or cannot make a kernel: another glibc, no C compiler or headers, no
    libcuda to link with, no room for files, too little shared memory, a GPU or an argument that it does not know."""
    errors = (RuntimeError, OSError, ImportError, SubprocessError, AssertionError, LookupError, ValueError, TypeError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return errors
    return (TritonError, *errors)


def cause(error: Exception) -> str:
    """One line of what was raised."""
    lines = str(error).strip().splitlines() or [repr(error)]
    is_tritons = type(error).__module__.startswith("triton")  # which says first where, and last what
    return lines[-1 if is_tritons else 0].strip()
