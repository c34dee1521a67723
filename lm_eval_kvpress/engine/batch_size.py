"""``batch_size=auto``: how many tokens go into one batch.

A press prunes each layer's cache as soon as that layer has run, so a batch needs memory for the *compressed* cache and
for the activations of one layer. Knows model shapes and a `PressSpec`. Does not know text or lm-eval.
"""

from __future__ import annotations

import torch

from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.spec import PressSpec

CPU_TOKENS = 16_384
"""Tokens per batch on a CPU; larger batches were no faster."""

SHARE_OF_FREE = 0.8
ACTIVATIONS_PER_TOKEN = 40
"""Numbers per token and hidden dimension alive in one layer's forward: residual, fused QKV, attention, the
feed-forward's inner width before and after its activation, and copies. A batch that is still too large is halved
(`batching.in_halves`)."""


def free_bytes(device: torch.device) -> int | None:
    """Free bytes of a CUDA device, with those that PyTorch has reserved and does not use; None elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def tokens_per_batch(model: PressableModel, free: int | None, *, share: float, num_copies: int) -> int:
    """Padded tokens per batch, of contexts and to be generated. The latter are counted like the former, of which a
    press keeps a part; if that is too few bytes, the batch is halved.

    Args:
        free: bytes, or None for `CPU_TOKENS`.
        share: of a token's cache that stays (`kept_share`).
        num_copies: how often the compressed cache is in memory at the same time.
    """
    if free is None:
        return CPU_TOKENS
    config, weight = model.model.config, model.model.get_input_embeddings().weight
    full_cache = 2 * config.num_hidden_layers * model.num_key_value_heads * model.head_dim * weight.element_size()
    activations = ACTIVATIONS_PER_TOKEN * config.hidden_size * weight.element_size()
    return max(1, int(SHARE_OF_FREE * free / (full_cache * share * num_copies + activations)))


def kept_share(press: PressSpec, config: object) -> float:
    """The share of the cache's bytes that a press keeps; 1 if it only masks, or if the text decides."""
    if press.masks or press.compression_ratio is None and press.kv_budget is None:
        return 1.0
    if press.kv_budget is not None:
        positions: int = config.max_position_embeddings  # type: ignore[attr-defined]
        return min(1.0, press.kv_budget / positions)
    assert press.compression_ratio is not None
    return 1.0 - press.compression_ratio
