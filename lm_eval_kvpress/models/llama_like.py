"""Presents Llama, Mistral, Phi-3, Qwen2 and Qwen3, which kvpress supports by itself, and OLMo-2 and Qwen3-MoE.

Their modules have the names that presses look for, so weights stay as they are; only the rotary embedding is lent to
every attention, and the width of a head to the config. kvpress calls the projections of OLMo-2 and Qwen3-MoE without
their norms, so these get projections with the norms behind them (`normed_projection`). A rotary embedding that would
choose its frequencies anew keeps those of a short forward (`fixed_frequencies`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models.kvpress_warning import without_untested_warning
from lm_eval_kvpress.models.lend import lend
from lm_eval_kvpress.models.normed_projection import norms_lent
from lm_eval_kvpress.models.positions import (
    Positions,
    check_rope,
    check_windows,
    frequencies_change_after,
    hidden_after,
    rope_parameters,
)
from lm_eval_kvpress.models.pressable import PressableModel

NORMS = ("q_norm", "k_norm")


def check_config(config: PretrainedConfig, positions: Positions) -> None:
    """Refuse what one full-attention mask per layer, or a press that rotates whole heads, cannot express.

    Raises:
        UsageError: if a sliding window could hide a position, RoPE covers a part of each head (Phi-4-mini), or its
            frequencies could change during the run.
    """
    check_windows(config, positions)
    rotated = rope_parameters(config).get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1))
    if rotated != 1:
        raise UsageError(
            f"{config.model_type} with partial RoPE ({rotated:g} of each head) is not supported: "
            "kvpress rotates whole heads; use a checkpoint with RoPE over the full head"
        )
    check_rope(config, positions)


def present(model: PreTrainedModel, *, for_good: bool = True) -> PressableModel:
    """Present a model, its frequencies fixed for good or while it is in use."""
    parts = (model, attention_modules(model), functools.partial(presented, model))
    if not for_good:
        return PressableModel(*parts, basis=functools.partial(fixed_frequencies, model))
    with ExitStack() as undo:
        _fix_frequencies(model, undo)
        undo.pop_all()
    return PressableModel(*parts)


@contextmanager
def fixed_frequencies(model: PreTrainedModel) -> Iterator[None]:
    """Rotate by the frequencies of a short forward, whatever the positions, for the length of a ``with`` block.

    `check_rope` lets no token of a run cross the length where "longrope" and "dynamic" change theirs. But a press that
    expects queries asks for positions to come, and a stream for the places of its buffer: transformers would change
    frequencies in the middle of a run, and those of "dynamic" stay changed in all forwards after it.
    """
    with ExitStack() as undo:
        _fix_frequencies(model, undo)
        yield


def _fix_frequencies(model: PreTrainedModel, undo: ExitStack) -> None:
    if math.isinf(frequencies_change_after(model.config)):
        return
    rotary = model.model.rotary_emb
    own = rotary.original_inv_freq.to(rotary.inv_freq.device)
    for name, value in {"rope_type": "default", "inv_freq": own}.items():
        undo.callback(setattr, rotary, name, getattr(rotary, name))
        setattr(rotary, name, value)


def attention_modules(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The attention modules, in layer order."""
    return tuple(layer.self_attn for layer in model.model.layers)


@contextmanager
def presented(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Lend the rotary embedding to every attention, and to the config the width of a head, which Qwen2 and Phi-3 lack.

    CriticalKV reads the latter. A press that replays a context reads how many positions a forward may have.
    """
    attentions, config = attention_modules(model), model.config
    with ExitStack() as loans:
        loans.enter_context(without_untested_warning())
        limits = (config.max_position_embeddings, frequencies_change_after(config), hidden_after(config))
        loans.enter_context(lend(model, num_positions=int(min(limits))))
        loans.enter_context(lend(config, head_dim=attentions[0].head_dim))
        for attention in attentions:
            loans.enter_context(lend(attention, rotary_emb=model.model.rotary_emb))
            if not isinstance(attention, Qwen3Attention):  # whose norms kvpress applies
                loans.enter_context(norms_lent(attention, NORMS, _normed_dims(attention)))
        yield model


def _normed_dims(attention: Any) -> int | None:
    """The width of a head, where norms are those of single heads; None where they span all of a projection."""
    norm = getattr(attention, NORMS[0], None)
    return int(attention.head_dim) if norm is not None and norm.weight.numel() == attention.head_dim else None
