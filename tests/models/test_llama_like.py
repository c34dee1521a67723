"""The architectures that need no change of basis: what is refused, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kvpress
import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Phi3Config, PretrainedConfig, Qwen2Config, Qwen3Config

from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.models import llama_like
from lm_eval_kvpress.models.architectures import ARCHITECTURES, check_config
from lm_eval_kvpress.models.positions import Positions
from lm_eval_kvpress.models.pressable import PressableModel

NUM_POSITIONS = 8192
LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
    **{"short_factor": [1.0] * 64, "long_factor": [4.0] * 64},
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
REFUSED = {
    "mistral 0.1": (MistralConfig(sliding_window=4096), "pass max_length=4096"),
    "qwen2 with windows": (
        Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=1, num_hidden_layers=3),
        "sliding-window attention .window 64",
    ),
    "longrope": (LlamaConfig(rope_parameters=LONGROPE), "Pass max_length=128"),
    "phi 4 mini": (Phi3Config(partial_rotary_factor=0.75, pad_token_id=0), "0.75 of each head"),
}
ACCEPTED = {
    "llama": LlamaConfig(),
    "llama 3.1": LlamaConfig(rope_parameters=LLAMA3),
    "mistral whose window is as wide as the run": MistralConfig(sliding_window=NUM_POSITIONS),
    "phi 3.5": Phi3Config(sliding_window=262_144, max_position_embeddings=131_072, pad_token_id=0),
    "mistral 0.3": MistralConfig(sliding_window=None),
    "phi 3": Phi3Config(pad_token_id=0),
    "qwen2": Qwen2Config(),
    "qwen3": Qwen3Config(),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_presses_cannot_express_is_refused_in_one_line(case: str) -> None:
    config, says = REFUSED[case]
    with pytest.raises(ValueError, match=says) as caught:
        check_config(config, Positions(NUM_POSITIONS))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", ACCEPTED.values(), ids=ACCEPTED)
def test_full_attention_over_whole_heads_is_accepted(config: PretrainedConfig) -> None:
    assert ARCHITECTURES[config.model_type].check_config is llama_like.check_config
    check_config(config, Positions(NUM_POSITIONS))


@pytest.mark.parametrize("fails", [False, True])
def test_a_prefill_leaves_nothing_on_the_attention_modules(
    make_pressable_llama: Callable[..., PressableModel], fails: bool
) -> None:
    class Stumbles(kvpress.KnormPress):
        def score(self, module: torch.nn.Module, *args: Any) -> torch.Tensor:
            if fails and module.layer_idx == 1:
                raise RuntimeError("stumbled")
            return super().score(module, *args)

    model = make_pressable_llama()

    def left() -> list[Any]:
        return [
            (set(attention.__dict__) - {"masked_key_indices"}, list(attention._modules), len(attention._forward_hooks))
            for attention in model.attentions
        ]

    before = left()
    try:
        prefill(model, torch.arange(30)[None], Stumbles(0.5))
    except RuntimeError:
        assert fails
    assert left() == before
