"""Keys and values as floats of 8 bits, E4M3 (https://arxiv.org/abs/2209.05433): three bits after the point, up to 448.

Numbers are cast as they are, without a scale, as vLLM's ``kv_cache_dtype=fp8`` does for a checkpoint without calibrated
scales (its ``k_scale`` and ``v_scale`` are 1). What is larger becomes 448, as there: PyTorch's own cast makes it NaN.
What is not finite becomes NaN. Bytes are held as ``uint8``, in which rows can be taken and joined on any device.

Knows tensors only.
"""

from __future__ import annotations

import torch

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max


def bytes_of(numbers: torch.Tensor) -> torch.Tensor:
    """The nearest floats of 8 bits, as ``uint8``."""
    finite = numbers.masked_fill(~numbers.isfinite(), torch.nan)
    return finite.clamp(-LARGEST, LARGEST).to(DTYPE).view(torch.uint8)


def numbers_of(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `bytes_of` stored, in a dtype."""
    return stored.view(DTYPE).to(dtype)
