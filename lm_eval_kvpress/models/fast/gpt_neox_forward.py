"""GPTNeoX's attention and feed-forward with less work, in inference; the numbers are transformers'.

transformers rotates queries and keys by whole heads, in six new tensors each, though only `rotary_ndims` of a head's
dims turn (a quarter in Pythia); and its GELU makes a second tensor as wide as the feed-forward. On a CPU that is some
per cent of a prefill, much of it the zeroing of fresh pages (docs/experiments/fresh_pages.md). Here both happen in
place, in the output of the linear layer before, which nobody else holds.

Knows transformers' GPTNeoX module. Does not know presses, caches or text.

Letters in shape comments: B rows, T tokens, H heads, D head_dim, R rotated dims (R <= D), E hidden size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXForCausalLM, GPTNeoXMLP

from lm_eval_kvpress.models.fast.gpt_neox_modules import every_module_is_watched, has_plain_gelu
from lm_eval_kvpress.models.lend import lend

ATTENTION_ARGUMENTS = [
    *("self", "hidden_states", "attention_mask", "layer_past", "cache_position", "position_embeddings", "kwargs")
]
"""Arguments of the forward that `_attend` stands for; a transformers with other arguments keeps its own forward."""


@contextmanager
def in_place(model: GPTNeoXForCausalLM) -> Iterator[None]:
    """Lend the layers forwards that overwrite tensors which nobody else holds.

    A layer keeps its own forward if it was replaced before, if a hook sees what would be overwritten, in training, and
    under autocast, which mixes dtypes. All keep theirs if a hook watches every module. Other hooks stay in force.
    """
    with ExitStack() as loans:
        if not (torch.is_autocast_enabled(model.device.type) or every_module_is_watched()):
            for module, forward in _forwards(model):
                if "forward" not in module.__dict__:
                    loans.enter_context(lend(module, forward=forward))
        yield


def _forwards(model: GPTNeoXForCausalLM) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """The modules that may be given another forward, with that forward."""
    for layer in model.gpt_neox.layers:
        if _can_rotate(layer.attention):
            yield layer.attention, functools.partial(_attend, layer.attention)
        if _can_overwrite(layer.mlp):
            yield layer.mlp, functools.partial(_feed_forward, layer.mlp)


def _can_rotate(attention: Any) -> bool:
    if type(attention) is not GPTNeoXAttention or attention.training or not _has_known_arguments():
        return False
    return attention.rotary_ndims % 2 == 0 and not attention.query_key_value._forward_hooks


@functools.cache
def _has_known_arguments() -> bool:
    names = list(inspect.signature(GPTNeoXAttention.forward).parameters)
    return names == ATTENTION_ARGUMENTS and hasattr(modeling_gpt_neox.ALL_ATTENTION_FUNCTIONS, "get_interface")


def _can_overwrite(mlp: Any) -> bool:
    if type(mlp) is not GPTNeoXMLP or not has_plain_gelu(mlp):
        return False
    wide, act = mlp.dense_h_to_4h, mlp.act
    is_watched = wide._forward_hooks or act._forward_hooks or act._forward_pre_hooks
    return not is_watched and "forward" not in act.__dict__


def _feed_forward(mlp: GPTNeoXMLP, hidden: torch.Tensor) -> torch.Tensor:
    return mlp.dense_4h_to_h(torch.ops.aten.gelu_(mlp.dense_h_to_4h(hidden)))


def _attend(
    attention: GPTNeoXAttention,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layer_past: Any = None,
    cache_position: torch.Tensor | None = None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(B, T, E)`` to ``(B, T, E)`` and, if the implementation returns them, the attention weights."""
    assert position_embeddings is not None
    shape, (cos, sin) = hidden_states.shape[:-1], position_embeddings
    by_head = attention.query_key_value(hidden_states).view(*shape, -1, 3, attention.head_size)  # (B, T, H, 3, D)
    _rotate(by_head[..., :2, :], cos, sin, attention.rotary_ndims)
    query, key, value = by_head.transpose(1, 2).unbind(dim=3)  # (B, H, T, D) each
    if layer_past is not None:
        details = {
            "sin": sin,
            "cos": cos,
            "partial_rotation_size": attention.rotary_ndims,
            "cache_position": cache_position,
        }
        key, value = layer_past.update(key, value, attention.layer_idx, details)
    attend: Callable[..., Any] = modeling_gpt_neox.ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, modeling_gpt_neox.eager_attention_forward
    )
    mixed, weights = attend(
        attention, query, key, value, attention_mask, scaling=attention.scaling, dropout=0.0, **kwargs
    )
    return attention.dense(mixed.reshape(*shape, -1)), weights


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_rotated: int) -> None:
    """Apply the rotary position embedding in place.

    Rotation pairs dim ``i`` with ``i + width / 2`` of the first ``width`` dims of a head. In the full-width order of
    `WideHeads.make` the width is D and the pairs beyond the first R / 2 have the angle zero; before it is R.

    Args:
        heads: ``(B, T, H, parts, D)``.
        cos, sin: ``(B or 1, T, width)``.
        num_rotated: R.
    """
    pairs, half = num_rotated // 2, cos.shape[-1] // 2
    cos, sin = (angle[:, :, None, :pairs] for angle in (cos, sin))
    for index in range(heads.shape[3]):  # parts at once would leave PyTorch's inner loop two rows of R / 2 numbers
        part = heads[..., index, :]
        first, second = part[..., :pairs], part[..., half : half + pairs]  # (B, T, H, R / 2)
        first_across, second_across = first * sin, second * sin
        first.mul_(cos).sub_(second_across)
        second.mul_(cos).add_(first_across)
