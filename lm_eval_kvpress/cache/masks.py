"""The additive attention mask of each layer, from that layer's own length and hidden entries.

A press may leave another length in every layer, and transformers would build a single mask from the first one. Knows
tensors only: no presses, no models, no text.

Letters in shape comments: B rows, H key-value heads, T cached entries of one layer, Q new tokens, C capacity of a
layer's buffers.
"""

from __future__ import annotations

import torch

from lm_eval_kvpress.cache.compressed import CachedLayer


def attention_bias(
    layer: CachedLayer | None, visible: torch.Tensor, dtype: torch.dtype, num_query_heads: int
) -> torch.Tensor | None:
    """The mask of one layer for a forward of several new tokens.

    Masked places hold the lowest finite number: an infinite one would turn a padding row, which attends nothing but
    itself, into NaN in some kernels.

    Args:
        layer: what the layer kept, or None for an empty cache.
        visible: ``(B, Q, Q)``, True where a new token may attend another new token.
        dtype: of the attention scores.
        num_query_heads: to repeat head-wise masks for grouped-query attention.

    Returns:
        ``(B, 1 or query heads, Q, T + Q)``, 0 where attention is allowed; or None when nothing is hidden.
    """
    batch, num_new, _ = visible.shape
    hidden = None if layer is None else layer.hidden
    if num_new == 1 and hidden is None:
        return None
    num_cached = 0 if layer is None else layer.num_entries
    heads = _num_mask_heads(hidden, num_query_heads)
    bias = torch.zeros(batch, heads, num_new, num_cached + num_new, dtype=dtype, device=visible.device)
    if hidden is not None:
        _hide_cached(bias, hidden)
    bias[..., num_cached:].masked_fill_(~visible[:, None], torch.finfo(dtype).min)
    return bias


def decoding_bias(
    layer: CachedLayer, padding: torch.Tensor, capacity: int, num_query_heads: int
) -> torch.Tensor | None:
    """The mask of one layer for all single-token forwards to come, open behind the first ``T + Q`` entries.

    Args:
        layer: what the layer kept.
        padding: ``(B, Q)``, True for the padding among the tokens that are fed first.
        capacity: C, entries of the layer's buffers.
        num_query_heads: to repeat head-wise masks for grouped-query attention.

    Returns:
        ``(B, 1 or query heads, 1, C)``, or None when nothing is hidden.
    """
    if layer.hidden is None and not padding.any():
        return None
    num_cached, shape = layer.num_entries, (layer.num_rows, _num_mask_heads(layer.hidden, num_query_heads), 1, capacity)
    bias = torch.zeros(shape, dtype=layer.dtype, device=layer.device)
    if layer.hidden is not None:
        _hide_cached(bias, layer.hidden)
    places = padding.to(bias.device)[:, None, None]
    bias[..., num_cached : num_cached + padding.shape[1]].masked_fill_(places, torch.finfo(bias.dtype).min)
    return bias


def _num_mask_heads(hidden: torch.Tensor | None, num_query_heads: int) -> int:
    return 1 if hidden is None or hidden.shape[1] == 1 else num_query_heads


def _hide_cached(bias: torch.Tensor, hidden: torch.Tensor) -> None:
    """Mask the hidden entries, ``(B, 1 or H, T)``, in the first T columns of a bias."""
    by_head = hidden.repeat_interleave(bias.shape[1] // hidden.shape[1], dim=1)
    bias[..., : hidden.shape[2]].masked_fill_(by_head[:, :, None], torch.finfo(bias.dtype).min)
