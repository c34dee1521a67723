"""Which dtypes this CPU multiplies quickly, and a warning where it does not.

In 16 bits PyTorch takes oneDNN where the processor has instructions for them, and else loops that are ten times slower
than float32. A checkpoint in 16 bits is often loaded unawares.

Knows torch. Does not know models; it makes nothing quicker, so it is no part of `fast`.
"""

from __future__ import annotations

import functools
import logging

import torch

logger = logging.getLogger("lm_eval_kvpress")


@functools.cache
def warn_of_slow_dtype(dtype: torch.dtype) -> None:
    """Warn once per process if this processor has no instructions for products in a 16-bit dtype."""
    if not multiplies_quickly(dtype):
        name = str(dtype).removeprefix("torch.")
        logger.warning(
            "this CPU has no instructions for %s: prefill and scoring take several times as long as in float32; pass "
            "dtype=float32, and no mixed_precision_dtype, if memory allows (4 bytes per weight)",
            name,
        )


def multiplies_quickly(dtype: torch.dtype) -> bool:
    """Whether products in a dtype are about as fast as in float32; true where PyTorch cannot tell.

    For 16 bits this is the question that PyTorch itself asks before it gives a product to oneDNN.
    """
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in names:
        return True
    try:
        return bool(getattr(torch.ops.mkldnn, names[dtype])())
    except (AttributeError, RuntimeError):  # a build without oneDNN, or another release
        return True
