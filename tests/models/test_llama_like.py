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
from lm_eval_kvpress.models.pressable import PressableModel

REFUSED = {
    "mistral 0.1": (MistralConfig(sliding_window=4096), "sliding"),
    "qwen2 with windows": (
        Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=1, num_hidden_layers=3),
        "sliding",
    ),
    "phi 4 mini": (Phi3Config(partial_rotary_factor=0.75, pad_token_id=0), "0.75 of each head"),
}
ACCEPTED = {
    "llama": LlamaConfig(),
    "mistral 0.3": MistralConfig(sliding_window=None),
    "phi 3": Phi3Config(pad_token_id=0),
    "qwen2": Qwen2Config(),
    "qwen3": Qwen3Config(),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_presses_cannot_express_is_refused_in_one_line(case: str) -> None:
    config, says = REFUSED[case]
    with pytest.raises(ValueError, match=says) as caught:
        check_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", ACCEPTED.values(), ids=ACCEPTED)
def test_full_attention_over_whole_heads_is_accepted(config: PretrainedConfig) -> None:
    assert ARCHITECTURES[config.model_type].check_config is llama_like.check_config
    check_config(config)


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
