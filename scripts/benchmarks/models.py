"""Models to measure: the built-in checkpoint, or random weights in the shape of a known one.

Random weights are as fast and as large as trained ones. Every model is given the built-in tokenizer, whose 4,096 ids
every vocabulary here has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from scripts.machine import ROOT

BUILTIN = ROOT / "lm_eval_kvpress" / "builtin"

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class NeoXShape:
    """Pythia's configurations. The feed-forward is always four times as wide as the hidden states."""

    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int

    def config(self) -> PretrainedConfig:
        return GPTNeoXConfig(
            num_hidden_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_heads,
            intermediate_size=4 * self.hidden_size,
            vocab_size=self.vocab_size,
            rotary_pct=0.25,
            max_position_embeddings=2048,
        )


@dataclass(frozen=True)
class LlamaShape:
    """Llama's architecture, several query heads to a key-value head."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool

    def config(self) -> PretrainedConfig:
        return LlamaConfig(
            num_hidden_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            tie_word_embeddings=self.tie_word_embeddings,
            max_position_embeddings=8192,
        )


PYTHIA_SHAPES = {
    "pythia-14m": NeoXShape(6, 128, 4, 50_304),
    "pythia-70m": NeoXShape(6, 512, 8, 50_304),
    "pythia-160m": NeoXShape(12, 768, 12, 50_304),
    "pythia-410m": NeoXShape(24, 1024, 16, 50_304),
    "pythia-1b": NeoXShape(16, 2048, 8, 50_304),
    "pythia-1.4b": NeoXShape(24, 2048, 16, 50_304),
    "pythia-2.8b": NeoXShape(32, 2560, 32, 50_304),
    "pythia-6.9b": NeoXShape(32, 4096, 32, 50_432),
    "pythia-12b": NeoXShape(36, 5120, 40, 50_688),
}

SHAPES: dict[str, NeoXShape | LlamaShape] = {
    **PYTHIA_SHAPES,
    "smollm2-135m": LlamaShape(30, 576, 9, 3, 1_536, 49_152, True),
    "llama-3.2-1b": LlamaShape(16, 2048, 32, 8, 8_192, 128_256, True),
    "llama-3.1-8b": LlamaShape(32, 4096, 32, 8, 14_336, 128_256, False),
}


def random_model(shape: str, dtype: str) -> PreTrainedModel:
    """Random weights in the shape of a model, always the same, on the GPU if there is one."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = SHAPES[shape].config()
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()


def model_named(name: str, dtype: str) -> PreTrainedModel:
    """A copy of ``builtin``, or random weights of a shape."""
    if name != "builtin":
        return random_model(name, dtype)
    model = AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=getattr(torch, dtype))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def builtin_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BUILTIN)
