"""Presents Phi and StableLM, which rotate a part of each head and have projections of their own for Q, K and V.

Their basis is changed as GPTNeoX's (`full_width`), and each attention is told that it rotates whole heads. Norms of
single heads have their weights in the same order. Knows transformers' two modules and the names that kvpress looks for.
Does not know any press, any text or lm-eval.

Sources: transformers ``models/phi/modeling_phi.py``, ``models/stablelm/modeling_stablelm.py``.
Letters in shape comments: H heads, D head_dim, E hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lm_eval_kvpress.models.full_width import WideHeads, check_rope_type, head_order, present_wide
from lm_eval_kvpress.models.kvpress_warning import without_untested_warning
from lm_eval_kvpress.models.lend import lend
from lm_eval_kvpress.models.normed_projection import norms_lent
from lm_eval_kvpress.models.positions import Positions, rope_type
from lm_eval_kvpress.models.pressable import PressableModel

REORDERED = ("q_proj", "k_proj")
NORMS = ("q_layernorm", "k_layernorm")


def check_config(config: PretrainedConfig, positions: Positions) -> None:
    """Refuse a rotary embedding that partial RoPE over whole heads cannot follow.

    Raises:
        UsageError: in one line.
    """
    check_rope_type(rope_type(config))


def present(model: PreTrainedModel, *, for_good: bool = True) -> PressableModel:
    """Present a model, its basis changed for good or while it is in use.

    Raises:
        UsageError: for weights or a rotary embedding for which the change of basis would not be exact.
    """
    return present_wide(model, wide_heads(model), functools.partial(presented, model), for_good=for_good)


def wide_heads(model: PreTrainedModel) -> WideHeads:
    """How the heads of a model come to rotate over their full width."""
    attentions = tuple(layer.self_attn for layer in model.model.layers)
    return WideHeads(attentions, model.model.rotary_emb, int(attentions[0].head_dim), REORDERED, _reorder)


@torch.no_grad()
def _reorder(attention: Any, order: torch.Tensor) -> None:
    """Reorder the dims of each head in everything that makes queries and keys."""
    projections = [getattr(attention, name) for name in REORDERED]
    norms = [norm for name in NORMS if hasattr(attention, name) for norm in getattr(attention, name).modules()]
    for module in (*projections, *norms):
        for name in ("weight", "bias"):
            parameter = getattr(module, name, None)
            if parameter is not None:
                by_head = parameter.data.view(-1, len(order), *parameter.shape[1:])  # (H, D, ...); of a norm H is 1
                by_head[:] = by_head[:, order.to(parameter.device)]


@contextmanager
def presented(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Lend a model with wide heads the names that kvpress presses use; take them back on exit."""
    heads = wide_heads(model)
    assert heads.are_made, "make the heads wide first"
    with ExitStack() as loans:
        loans.enter_context(without_untested_warning())
        loans.enter_context(lend(model, head_order=head_order(heads.rotary)))
        loans.enter_context(lend(model.config, head_dim=heads.head_dim))
        for attention in heads.attentions:
            output: nn.Module = attention.dense if hasattr(attention, "dense") else attention.o_proj
            loans.enter_context(lend(attention, rotary_emb=heads.rotary, o_proj=output))
            loans.enter_context(norms_lent(attention, NORMS, heads.head_dim))
        yield model
