"""Whether Triton's kernels can run on a device, and what Triton raises where they cannot be compiled after all.

Knows torch. Does not know models or kernels, and loads Triton only to ask for its errors.
"""

from __future__ import annotations

from importlib.util import find_spec
from subprocess import SubprocessError

import torch

LEAST_CAPABILITY = (8, 0)
"""Compute capability of an NVIDIA GPU, at least: older ones have no tensor cores for bfloat16, and on some of them
Triton 3.1 aborts the process."""


def why_not_on(device: torch.device) -> str:
    """The reason why kernels cannot run on a device, or an empty text. Triton launches on the current device."""
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
    """The errors of a Triton that cannot be loaded or cannot compile a kernel.

    Causes that were seen: another glibc, no C compiler or headers, no libcuda to link with, a full disk, too little
    shared memory, a GPU or an argument that Triton does not know.
    """
    errors = (RuntimeError, OSError, ImportError, SubprocessError, AssertionError, LookupError, ValueError, TypeError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return errors
    return (TritonError, *errors)


def cause(error: Exception) -> str:
    """The line of an error's text that names its cause."""
    lines = str(error).strip().splitlines() or [repr(error)]
    is_tritons = type(error).__module__.startswith("triton")  # its first line says where, its last one what
    return lines[-1 if is_tritons else 0].strip()
