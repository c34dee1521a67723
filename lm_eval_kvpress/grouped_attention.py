"""Attention where several query heads share a key-value head, without a copy of keys and values for each of them.

transformers repeats keys and values for all query heads as soon as there is a mask, as in every ragged batch and every
recorded step: with four query heads per key-value head a step then moves the cache's bytes nine times, most of them of
a cache that no press has shortened, and a press looks faster than it is. Here the query heads that share a key-value
head are rows of one query.

Knows transformers' registry of attention functions. Does not know presses, caches or text.

Letters in shape comments: B rows, Q new tokens, H query heads, G query heads per key-value head, T entries, D head_dim.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from lm_eval_kvpress.grouped_kernel import GroupedKernel

NAME = "kvpress_grouped"
REPLACES = "sdpa"
KERNEL = GroupedKernel()


@contextmanager
def lent(attentions: Sequence[nn.Module]) -> Iterator[None]:
    """Has attention modules look up `attend` instead of transformers' function; they read its name in their config,
    which is one for all of them.

    Modules that share no heads, or use other attention than PyTorch's, are left as they are.
    """
    first: Any = attentions[0]
    config, lends = first.config, first.num_key_value_groups > 1 and first.config._attn_implementation == REPLACES
    try:
        if lends:
            ours = copy.copy(config)
            ours._attn_implementation = NAME
            for attention in attentions:
                attention.__dict__["config"] = ours
        yield
    finally:
        for attention in attentions if lends else ():
            attention.__dict__["config"] = config


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """``(B, Q, H, D)``, and no weights; the numbers are those of transformers' function, up to rounding.

    Args:
        module: the attention module, for transformers' function, which attends without a mask to several tokens.
        query: ``(B, H, Q, D)``.
        key, value: ``(B, H / G, T, D)``.
        attention_mask: ``(1 or B, 1 or H, Q, T)``, is added to the scores.
    """
    by_pytorch = functools.partial(nn.functional.scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    if query.shape[2] == 1:
        return _of_one_token(query, key, value, attention_mask, by_pytorch, scaling), None
    if attention_mask is not None and query.device.type == "cpu":  # whose kernel takes a mask and shared heads
        mixed = by_pytorch(query, key, value, attn_mask=attention_mask, enable_gqa=True)
        return mixed.transpose(1, 2).contiguous(), None
    attended: tuple[torch.Tensor, None] = ALL_ATTENTION_FUNCTIONS[REPLACES](
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return attended


def _of_one_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    by_pytorch: Callable[..., torch.Tensor],
    scaling: float | None,
) -> torch.Tensor:
    """``(B, 1, H, D)``."""
    batch, heads, _, dim = query.shape
    groups = (key.shape[1], heads // key.shape[1])  # H / G, G

    def as_rows_of_one_query() -> torch.Tensor:
        masks = mask
        if masks is not None and masks.shape[1] == heads:
            masks = masks.reshape(masks.shape[0], *groups, -1)
        return by_pytorch(query.reshape(batch, *groups, dim), key, value, attn_mask=masks).reshape(batch, heads, dim)

    scale = dim**-0.5 if scaling is None else scaling
    return KERNEL(query[:, :, 0], key, value, mask, scale, as_rows_of_one_query)[:, None]


AttentionInterface.register(NAME, attend)
