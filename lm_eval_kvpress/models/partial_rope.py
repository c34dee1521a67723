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

from lm_eval_kvpress.models.full_width import (
    check_plain_weight,
    check_rope_type,
    check_rotary,
    full_width_order,
    head_order,
    is_full_width,
    pad_frequencies,
    rotated_dims,
)
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
    parts = (model, attention_modules(model), functools.partial(presented, model))
    if for_good:
        prepare(model)
        return PressableModel(*parts)
    check_weights(model)
    return PressableModel(*parts, basis=functools.partial(full_width, model))


def attention_modules(model: PreTrainedModel) -> tuple[Any, ...]:
    """The attention modules, in layer order."""
    return tuple(layer.self_attn for layer in model.model.layers)


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Change the basis of Q and K in memory for good. Idempotent; returns the model, which is not to be saved.

    Raises:
        UsageError: as `present` does.
    """
    with ExitStack() as undo:
        _change_basis(model, undo)
        undo.pop_all()
    return model


@contextmanager
def full_width(model: PreTrainedModel) -> Iterator[None]:
    """Change the basis for the length of a ``with`` block, to the bit; a prepared model stays as it is.

    Raises:
        UsageError: as `present` does.
    """
    with ExitStack() as undo:
        _change_basis(model, undo)
        yield


def check_weights(model: PreTrainedModel) -> None:
    """Refuse weights, or a rotary embedding, for which the change of basis would not be exact.

    Raises:
        UsageError: in one line.
    """
    for attention in attention_modules(model):
        for name in REORDERED:
            check_plain_weight(getattr(getattr(attention, name), "weight", None), f"{name} of {attention.layer_idx}")
    if not is_full_width(model.model.rotary_emb, _head_dim(model)):
        check_rotary(model.model.rotary_emb, _head_dim(model))


def _change_basis(model: PreTrainedModel, undo: ExitStack) -> None:
    check_weights(model)
    head_dim, rotary = _head_dim(model), model.model.rotary_emb
    if is_full_width(rotary, head_dim):
        return
    order = full_width_order(head_dim, rotated_dims(rotary))
    for attention in attention_modules(model):
        _reorder(attention, order)
        undo.callback(_reorder, attention, order.argsort())
        undo.callback(setattr, attention, "rotary_ndims", attention.rotary_ndims)
        attention.rotary_ndims = head_dim
    pad_frequencies(rotary, head_dim, undo)


def _head_dim(model: PreTrainedModel) -> int:
    return int(attention_modules(model)[0].head_dim)


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
    """Lend a prepared model the names that kvpress presses use; take them back on exit."""
    head_dim, rotary = _head_dim(model), model.model.rotary_emb
    assert is_full_width(rotary, head_dim), "change the basis first"
    with ExitStack() as loans:
        loans.enter_context(without_untested_warning())
        loans.enter_context(lend(model, head_order=head_order(rotary)))
        loans.enter_context(lend(model.config, head_dim=head_dim))
        for attention in attention_modules(model):
            output: nn.Module = attention.dense if hasattr(attention, "dense") else attention.o_proj
            loans.enter_context(lend(attention, rotary_emb=rotary, o_proj=output))
            loans.enter_context(norms_lent(attention, NORMS, head_dim))
        yield model
