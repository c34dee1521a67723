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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from lm_eval_kvpress.models.fast.grouped_kernel import GroupedKernel
from lm_eval_kvpress.models.lend import lend

NAME = "kvpress_grouped"
REPLACES = "sdpa"
KERNEL = GroupedKernel()


@contextmanager
def lent(attentions: Sequence[Any]) -> Iterator[None]:
    """Has attention modules look up `attend` instead of transformers' function; they read its name in their config.

    Modules that share no heads, or use other attention than PyTorch's, are left as they are.
    """
    copies: dict[int, Any] = {}  # by the id of the config, which in general all modules share
    with ExitStack() as loans:
        for attention in filter(_shares_heads, attentions):
            own = id(attention.config)
            if own not in copies:
                copies[own] = copy.copy(attention.config)
                copies[own]._attn_implementation = NAME
            loans.enter_context(lend(attention, config=copies[own]))
        yield


def _shares_heads(attention: Any) -> bool:
    return attention.num_key_value_groups > 1 and attention.config._attn_implementation == REPLACES


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
    is_prefill = query.shape[2] == key.shape[2]  # transformers', for kvpress has it take marks off the module
    if query.shape[2] == 1 and not is_prefill:
        return _of_one_token(query, key, value, attention_mask, by_pytorch), None
    if attention_mask is not None and query.device.type == "cpu" and not is_prefill:
        mixed = by_pytorch(query, key, value, attn_mask=attention_mask, enable_gqa=True)  # which only a CPU has fast
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
    by_pytorch: functools.partial[torch.Tensor],
) -> torch.Tensor:
    """``(B, 1, H, D)``."""
    batch, heads, _, dim = query.shape
    groups = (key.shape[1], heads // key.shape[1])  # H / G, G

    def as_rows_of_one_query() -> torch.Tensor:
        masks = mask
        if masks is not None and masks.shape[1] == heads:
            masks = masks.reshape(masks.shape[0], *groups, -1)
        return by_pytorch(query.reshape(batch, *groups, dim), key, value, attn_mask=masks).reshape(batch, heads, dim)

    if by_pytorch.keywords["dropout_p"] or torch.is_grad_enabled():
        return as_rows_of_one_query()[:, None]
    scale = by_pytorch.keywords["scale"] or dim**-0.5
    return KERNEL(query[:, :, 0], key, value, mask, scale, as_rows_of_one_query)[:, None]


def step_kind() -> str:
    """The name of what the newest step by modules was computed with, for the record."""
    return "modules, grouped kernel" if KERNEL.ran_last else "modules"


AttentionInterface.register(NAME, attend)
