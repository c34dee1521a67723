"""Frequencies that change within a run and windows that hide are found out from the config.

The reference is transformers' own rotary embedding at lengths around the one where it switches.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig, MistralConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models.architectures import check_config, check_numbers
from lm_eval_kvpress.models.positions import (
    Positions,
    attention_scaling,
    check_rope,
    check_windows,
    frequencies_change_after,
)

FACTORS = {"short_factor": [1.0] * 8, "long_factor": [1.0 + 3 * index for index in range(8)]}
OWN: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "llama3": {
        **{"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 128,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "dynamic": {"factor": 4.0},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 128, **FACTORS},
}


def config_with(kind: str, **more: Any) -> LlamaConfig:
    rope = {"rope_type": kind, "rope_theta": 1e4, **OWN[kind], **more}
    return LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=512, rope_parameters=rope)


def rotations(config: LlamaConfig, num_positions: int) -> torch.Tensor:
    """Cosines of the first position but 0 in a forward of so many positions."""
    cosines, _ = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(num_positions)[None])
    return cosines[0, 1]


@pytest.mark.parametrize("kind", OWN)
def test_frequencies_change_where_transformers_changes_them(kind: str) -> None:
    config = config_with(kind)
    last = frequencies_change_after(config)
    assert math.isfinite(last) == (kind in ("dynamic", "longrope"))
    inside, beyond = (512, 2048) if math.isinf(last) else (int(last), int(last) + 1)
    torch.testing.assert_close(rotations(config, inside), rotations(config, 9), rtol=0, atol=0)
    assert torch.equal(rotations(config, beyond), rotations(config, 9)) == math.isinf(last)
    check_rope(config, Positions(inside))
    if math.isfinite(last):
        with pytest.raises(UsageError, match=f"other frequencies beyond {inside} positions.*max_length={beyond} may"):
            check_rope(config, Positions(beyond))
        with pytest.raises(UsageError, match="a document of any length may cross"):
            check_rope(config, Positions(math.inf))


@pytest.mark.parametrize("kind", OWN)
def test_a_stream_that_turns_keys_back_needs_plain_cosines(kind: str) -> None:
    config = config_with(kind)
    assert attention_scaling(config) == pytest.approx(LlamaRotaryEmbedding(config).attention_scaling)
    if attention_scaling(config) == 1:
        check_rope(config, Positions(128, rotates_back=True))
    else:
        with pytest.raises(UsageError, match=f"'{kind}' rescales the keys.*rolling=stream"):
            check_rope(config, Positions(128, rotates_back=True))


@pytest.mark.parametrize(("num", "hides"), [(63, False), (64, False), (65, True), (math.inf, True)])
def test_a_window_hides_once_a_run_is_longer(num: float, hides: bool) -> None:
    config = MistralConfig(sliding_window=64)
    if hides:
        with pytest.raises(UsageError, match="pass max_length=64"):
            check_windows(config, Positions(num))
    else:
        check_windows(config, Positions(num))


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "llama3"])
def test_rope_that_gpt_neox_cannot_be_given_whole_heads_with_is_refused_by_its_config(kind: str) -> None:
    config = GPTNeoXConfig(rope_parameters={"rope_type": kind, "rope_theta": 1e4, **OWN[kind]})
    with pytest.raises(UsageError, match=f"rope_type '{kind}' rescales or recomputes"):
        check_config(config, Positions(64))


@pytest.mark.parametrize(
    ("name", "value"), [("num_hidden_layers", 0), ("max_position_embeddings", None), ("max_position_embeddings", "2k")]
)
@pytest.mark.parametrize("kind", [LlamaConfig, GPTNeoXConfig])
def test_a_config_without_layers_or_positions_is_one_line(
    kind: type[PretrainedConfig], name: str, value: int | str | None
) -> None:
    config = kind()
    setattr(config, name, value)
    with pytest.raises(UsageError, match=f"config.json says {name}={value!r}"):
        check_numbers(config)
