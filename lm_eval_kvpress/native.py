"""The architectures that kvpress supports by itself (Llama, Mistral, Phi-3, Qwen2, Qwen3): sibling of `neox`.

Nothing has to be rewritten here; `presented` only takes down what kvpress leaves hanging on the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

MODEL_TYPES = ("llama", "mistral", "phi3", "qwen2", "qwen3")


def check_config(config: PreTrainedConfig) -> None:
    """Refuses what one full-attention mask per layer cannot express.

    Raises:
        ValueError: if a layer uses sliding-window attention.
    """
    layer_types = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    if any("sliding" in kind for kind in layer_types) or (window and not layer_types):
        raise ValueError(
            f"{config.model_type} with sliding-window attention (window {window}) is not supported: kvpress compresses "
            "full-attention layers only; use a checkpoint without sliding windows"
        )


def attention_modules(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The attention modules, in layer order."""
    return tuple(layer.self_attn for layer in model.model.layers)


@contextmanager
def presented(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model as it is; on exit the rotary embedding that kvpress hangs on every attention is taken down."""
    attentions = attention_modules(model)
    had_rotary = ["rotary_emb" in attention._modules for attention in attentions]
    try:
        yield model
    finally:
        for attention, had in zip(attentions, had_rotary, strict=True):
            if not had:
                attention._modules.pop("rotary_emb", None)
