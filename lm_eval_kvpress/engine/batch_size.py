"""``batch_size=auto``: how many tokens go into one batch, by the reckoning of `footprint`.

Knows a `PressSpec`. Does not know text or lm-eval.
"""

from __future__ import annotations

import torch

from lm_eval_kvpress.engine.footprint import Footprint
from lm_eval_kvpress.presses.spec import PressSpec

CPU_TOKENS = 16_384
"""Tokens per batch on a CPU; larger batches were no faster."""

SHARE_OF_FREE = 0.8
"""Of free bytes. A batch that is still too large is halved, for the rest of the run (`batching.Halving`)."""


def free_bytes(device: torch.device) -> int | None:
    """Free bytes of a CUDA device, with those that PyTorch has reserved and does not use; None elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def tokens_per_batch(footprint: Footprint, free: int | None, *, num_copies: int) -> int:
    """Padded tokens per batch, of contexts and to be generated. The latter are counted like the former, of which a
    press keeps a part; if that is too few bytes, the batch is halved.

    Args:
        footprint: of a token of context.
        free: bytes, or None for `CPU_TOKENS`.
        num_copies: how often the compressed cache is in memory at the same time, unless it is packed.
    """
    return CPU_TOKENS if free is None else max(1, footprint.most_tokens(SHARE_OF_FREE * free, num_copies))


def kept_share(press: PressSpec, config: object) -> float:
    """The share of the cache's bytes that a press keeps; 1 if it only masks, or if the text decides."""
    if press.masks or press.compression_ratio is None and press.kv_budget is None:
        return 1.0
    if press.kv_budget is not None:
        positions: int = config.max_position_embeddings  # type: ignore[attr-defined]
        return min(1.0, press.kv_budget / positions)
    assert press.compression_ratio is not None
    return 1.0 - press.compression_ratio
