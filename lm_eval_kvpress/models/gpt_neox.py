"""Presents a GPTNeoX model (Pythia) to kvpress, without touching either library.

Knows transformers' GPTNeoX module and the names that kvpress presses look for. Does not know any press, any text
or lm-eval.

Two things stand between GPTNeoX and kvpress, which was written for Llama-like models:

1. **Partial RoPE.** Pythia rotates 25 % of each head; presses multiply full-width cos/sin. The basis of Q and K is
   changed in memory, for good or for a while (`models.full_width`).
2. **Names.** `presented` lends the model, for the duration of a ``with`` block, the attributes and hook arguments
   that kvpress expects (``model.model.layers[i].self_attn``, ``q_proj``, ``head_dim``, ``past_key_values`` ...).

The fused weight is head-major: ``(heads, 3, head_dim, hidden)``. Cutting it into contiguous thirds runs, and is wrong.

Sources: transformers ``models/gpt_neox/modeling_gpt_neox.py``; kvpress ``presses/base_press.py``, ``utils.py``.
Letters in shape comments: H heads, D head_dim, E hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXForCausalLM

from lm_eval_kvpress.models.full_width import WideHeads, check_rope_type, head_order, present_wide
from lm_eval_kvpress.models.kvpress_warning import without_untested_warning
from lm_eval_kvpress.models.lend import lend
from lm_eval_kvpress.models.positions import Positions, rope_type
from lm_eval_kvpress.models.pressable import PressableModel


class ProjectionView:
    """One of Q, K, V of a fused ``query_key_value``, callable like the ``nn.Linear`` that kvpress expects.

    Reads the fused parameters at call time: it holds no weights, adds no parameters, and cannot go stale.

    Args:
        attention: the layer whose fused projection is viewed.
        part: 0 for queries, 1 for keys, 2 for values.
    """

    def __init__(self, attention: GPTNeoXAttention, part: int) -> None:
        self._attention = attention
        self._part = part

    def _rows(self, fused: torch.Tensor) -> torch.Tensor:
        head_dim = self._attention.head_size
        by_head = fused.view(-1, 3, head_dim, *fused.shape[1:])  # (H, 3, D, ...)
        return by_head[:, self._part].reshape(-1, *fused.shape[1:])  # (H * D, ...)

    @property
    def weight(self) -> torch.Tensor:
        """The projection's weight, shape ``(H * D, E)``."""
        return self._rows(self._attention.query_key_value.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """The projection's bias, shape ``(H * D,)``, or None."""
        bias = self._attention.query_key_value.bias
        return None if bias is None else self._rows(bias)

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``(..., E)`` to ``(..., H * D)``, before RoPE."""
        return nn.functional.linear(hidden_states, self.weight, self.bias)


def check_config(config: PretrainedConfig, positions: Positions) -> None:
    """Refuse a rotary embedding that partial RoPE over whole heads cannot follow.

    Raises:
        UsageError: in one line.
    """
    check_rope_type(rope_type(config))


def present(model: GPTNeoXForCausalLM, *, for_good: bool = True) -> PressableModel:
    """Present a model, its basis changed for good or while it is in use.

    Raises:
        UsageError: for weights or a rotary embedding for which the change of basis would not be exact.
    """
    return present_wide(model, wide_heads(model), functools.partial(presented, model), for_good=for_good)


def wide_heads(model: GPTNeoXForCausalLM) -> WideHeads:
    """How the heads of a model come to rotate over their full width."""
    attentions = tuple(layer.attention for layer in model.gpt_neox.layers)
    head_dim = int(model.config.hidden_size // model.config.num_attention_heads)
    return WideHeads(attentions, model.gpt_neox.rotary_emb, head_dim, ("query_key_value",), _reorder)


@torch.no_grad()
def _reorder(attention: GPTNeoXAttention, order: torch.Tensor) -> None:
    projection: nn.Linear = attention.query_key_value
    for fused in (projection.weight, projection.bias):
        if fused is None:
            continue
        by_head = fused.data.view(-1, 3, len(order), *fused.shape[1:])  # (H, 3, D, ...)
        by_head[:, :2] = by_head[:, :2, order.to(fused.device)]  # Q and K; V stays as it is


class _Base(SimpleNamespace):
    """What ``model.model`` is of a Llama, which presses that replay a context call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


@contextmanager
def presented(model: GPTNeoXForCausalLM) -> Iterator[GPTNeoXForCausalLM]:
    """Lend a model with wide heads the names and hook arguments that kvpress presses use; take them back on exit."""
    heads = wide_heads(model)
    assert heads.are_made, "make the heads wide first"
    config, head_dim = model.config, heads.head_dim
    layers = [
        SimpleNamespace(self_attn=layer.attention, register_forward_hook=layer.register_forward_hook)
        for layer in model.gpt_neox.layers
    ]
    base = _Base(
        forward=model.gpt_neox,
        layers=layers,
        rotary_emb=heads.rotary,
        embed_tokens=model.gpt_neox.embed_in,
    )
    with ExitStack() as stack:
        stack.enter_context(without_untested_warning())
        stack.enter_context(lend(model, model=base, head_order=head_order(heads.rotary)))
        stack.enter_context(lend(config, num_key_value_heads=config.num_attention_heads, head_dim=head_dim))
        for attention in heads.attentions:
            stack.enter_context(_lent_to_attention(attention, head_dim, heads.rotary))
        yield model


@contextmanager
def _lent_to_attention(attention: GPTNeoXAttention, head_dim: int, rotary_emb: nn.Module) -> Iterator[None]:
    hook = attention.register_forward_pre_hook(_llama_style_arguments, with_kwargs=True)
    names = {
        "head_dim": head_dim,
        "num_key_value_groups": 1,
        "q_proj": ProjectionView(attention, 0),
        "k_proj": ProjectionView(attention, 1),
        "v_proj": ProjectionView(attention, 2),
        "o_proj": attention.dense,
        "rotary_emb": rotary_emb,
    }
    try:
        with lend(attention, **names):
            yield
    finally:
        hook.remove()


def _llama_style_arguments(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass hidden states and cache by Llama's names; GPTNeoX passes them by position and as ``layer_past``."""
    (hidden_states,) = args
    return (), {**kwargs, "hidden_states": hidden_states, "past_key_values": kwargs.get("layer_past")}
