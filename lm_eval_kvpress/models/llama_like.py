"""The architectures that kvpress supports by itself (Llama, Mistral, Phi-3, Qwen2, Qwen3): sibling of `neox`.

Nothing has to be rewritten here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models.lend import lend

MODEL_TYPES = ("llama", "mistral", "phi3", "qwen2", "qwen3")


def check_config(config: PretrainedConfig) -> None:
    """Refuses what one full-attention mask per layer, or a press that rotates whole heads, cannot express.

    Raises:
        UsageError: if a layer uses sliding-window attention, or RoPE covers a part of each head (Phi-4-mini).
    """
    layer_types = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    if any("sliding" in kind for kind in layer_types) or (window and not layer_types):
        raise UsageError(
            f"{config.model_type} with sliding-window attention (window {window}) is not supported: kvpress compresses "
            "full-attention layers only; use a checkpoint without sliding windows"
        )
    rope = getattr(config, "rope_parameters", None) or {}  # before transformers 5: a field of its own
    rotated = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1))
    if rotated != 1:
        raise UsageError(
            f"{config.model_type} with partial RoPE ({rotated:g} of each head) is not supported: "
            "kvpress rotates whole heads; use a checkpoint with RoPE over the full head"
        )


def attention_modules(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The attention modules, in layer order."""
    return tuple(layer.self_attn for layer in model.model.layers)


@contextmanager
def presented(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model as it is, with the rotary embedding lent to every attention, as kvpress's presses expect it there."""
    with ExitStack() as loans:
        for attention in attention_modules(model):
            loans.enter_context(lend(attention, rotary_emb=model.model.rotary_emb))
        yield model
