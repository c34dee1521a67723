"""A small model of random weights for every architecture, and variants of their attention."""

from __future__ import annotations

from typing import Any

import torch
from conftest import VOCAB_SIZE, WordTokenizer, randomized
from press_cases import NUM_LAYERS
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from lm_eval_kvpress.harness.tokenization import lend_tokenizer
from lm_eval_kvpress.models.architectures import present
from lm_eval_kvpress.models.pressable import PressableModel

HEAD_DIM = 8
OWN: dict[str, dict[str, Any]] = {
    "gpt_neox": {"num_key_value_heads": 4},  # it has no other
    "qwen3": {"head_dim": HEAD_DIM},  # 128 by default, and the others derive it
    "qwen3_moe": {"head_dim": HEAD_DIM, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "phi": {"qk_layernorm": True},
    "stablelm": {"qk_layernorm": True},
}
"""Architecture -> what its config needs beside the shape that all share."""


def tiny(architecture: str, attention: str = "sdpa", **more: Any) -> PreTrainedModel:
    """A model whose norms and biases are no identities; the same arguments give the same one, no two share a config."""
    config = AutoConfig.for_model(
        architecture,
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 4 * HEAD_DIM,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "sliding_window": None,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            **OWN.get(architecture, {}),
            **more,
        },
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return randomized(model, seed=1)


def pressable(model: PreTrainedModel) -> PressableModel:
    return lend_tokenizer(present(model, fast=False), WordTokenizer())


TWINS: dict[str, dict[str, Any]] = {
    "phi": {"partial_rotary_factor": 1.0, "qk_layernorm": False},
    "stablelm": {"partial_rotary_factor": 1.0, "qk_layernorm": False},
    "qwen3_moe": {"mlp_only_layers": list(range(NUM_LAYERS))},
}
"""Architecture -> the variant of it that kvpress can run by itself, once `twin` has given names to its parts."""


def twin(architecture: str, attention: str) -> PreTrainedModel | None:
    """The model of `TWINS` such that kvpress alone computes its queries; None for GPTNeoX, which it cannot run."""
    if architecture == "gpt_neox":
        return None
    model = tiny(architecture, attention, **TWINS.get(architecture, {}))
    if architecture == "qwen3_moe":  # with dense layers only it is a Qwen3
        config = {name: value for name, value in model.config.to_dict().items() if name in Qwen3Config().to_dict()}
        dense = Qwen3ForCausalLM(Qwen3Config(**{**config, "model_type": "qwen3"}))
        dense.set_attn_implementation(attention)
        dense.load_state_dict(model.state_dict())
        model = dense.eval()
    for layer in model.model.layers:
        own = layer.self_attn
        if architecture == "phi":
            own.o_proj = own.dense
        if architecture == "olmo2":
            for name in "qk":
                setattr(own, f"{name}_proj", nn.Sequential(getattr(own, f"{name}_proj"), getattr(own, f"{name}_norm")))
                setattr(own, f"{name}_norm", nn.Identity())
    return model
