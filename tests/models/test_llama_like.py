"""The architectures that need no change of basis: what is refused, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kvpress
import pytest
import torch
from press_cases import tokens
from small_models import HEAD_DIM, pressable, tiny
from transformers import LlamaConfig, MistralConfig, Phi3Config, PretrainedConfig, Qwen2Config, Qwen3Config

from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models import llama_like
from lm_eval_kvpress.models.architectures import ARCHITECTURES, check_config, present
from lm_eval_kvpress.models.positions import Positions
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press

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


SWITCHING: dict[str, dict[str, Any]] = {
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        "max_position_embeddings": 128,
    },
    "longrope": {
        "rope_parameters": {
            **{"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
            **{"short_factor": [1.0] * (HEAD_DIM // 2), "long_factor": [4.0] * (HEAD_DIM // 2)},
            "attention_factor": 1.0,
        },
        "max_position_embeddings": 512,
    },
}
"""Frequencies that change beyond 128 positions, and are those of plain RoPE below."""


@pytest.mark.parametrize("name", ["expected_attention", "cap", "key_rerotation:expected_attention"])
@pytest.mark.parametrize("kind", SWITCHING)
def test_queries_that_a_press_expects_change_no_frequency(kind: str, name: str) -> None:
    """They are expected up to position 612: below the switch, every kept entry is that of plain RoPE."""
    model, plain, context = pressable(tiny("llama", **SWITCHING[kind])), pressable(tiny("llama")), tokens(1, 100)
    spec = parse_press(name)
    before = model.model(context).logits
    found, expected = (prefill(one, context, spec.build(100), rerotates=spec.rerotates) for one in (model, plain))
    for layer, wanted in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, wanted.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.values, wanted.values, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.model(context).logits, before, atol=0, rtol=0)


@pytest.mark.parametrize("kind", SWITCHING)
def test_a_model_of_somebody_else_switches_again_after_its_use(kind: str) -> None:
    """Also one that was used beyond its switch before: "dynamic" then keeps the frequencies of that forward."""
    owners, plain, context = tiny("llama", **SWITCHING[kind]), tiny("llama"), tokens(1, 100)
    owners(tokens(1, 200))
    rotary = owners.model.rotary_emb
    kind_before, frequencies = rotary.rope_type, rotary.inv_freq.clone()
    with present(owners, for_good=False, fast=False).in_use():
        torch.testing.assert_close(owners(context).logits, plain(context).logits, atol=1e-5, rtol=0)
    assert rotary.rope_type == kind_before == kind and torch.equal(rotary.inv_freq, frequencies)


@pytest.mark.parametrize(
    ("architecture", "shape"), [("llama", SWITCHING["longrope"]), ("mistral", {"sliding_window": 128})]
)
def test_a_replay_beyond_what_a_forward_may_have_is_refused(architecture: str, shape: dict[str, Any]) -> None:
    """Beyond RoPE's switch frequencies would be others; beyond a window the replay would not see the first entries."""
    model, spec = pressable(tiny(architecture, **shape)), parse_press("kvcompose")
    prefill(model, tokens(1, 60), spec.build(60))
    with pytest.raises(UsageError, match="takes 160 positions, and the model has 128 for it: lower max_length"):
        prefill(model, tokens(1, 80), spec.build(80))
