"""Attention to shared key-value heads: transformers' numbers, no copy of keys or values, and nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from lm_eval_kvpress.cache.compressed import CompressedCache, LayerKV
from lm_eval_kvpress.engine.decode_state import DecodeState
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.models import llama_like
from lm_eval_kvpress.models.fast import grouped_attention
from lm_eval_kvpress.models.pressable import PressableModel, masked

ROWS, HEADS, SHARED, ENTRIES, DIM = 2, 6, 2, 21, 16
MASKS = {"none": None, "of all": (1, 1), "of rows": (ROWS, 1), "of heads": (ROWS, HEADS), "of heads alone": (1, HEADS)}


def tensors(num_new: int, mask: str) -> tuple[torch.Tensor, ...]:
    """Queries as a model lays them out, keys and values as slices of larger buffers, some entries hidden."""
    torch.manual_seed(0)
    query = torch.randn(ROWS, num_new, HEADS, DIM).transpose(1, 2)
    key, value = (torch.randn(ROWS, SHARED, ENTRIES + 5, DIM)[:, :, :ENTRIES] for _ in range(2))
    if MASKS[mask] is None:
        return query, key, value, None
    hidden = torch.rand(*MASKS[mask], num_new, ENTRIES) < 0.4
    return query, key, value, torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("num_new", [1, 4])
def test_numbers_are_those_of_transformers(num_new: int, mask: str) -> None:
    module: Any = SimpleNamespace(num_key_value_groups=HEADS // SHARED, is_causal=True)
    arguments = tensors(num_new, mask)
    expected, _ = sdpa_attention_forward(module, *arguments, dropout=0.0, scaling=0.3)
    found, weights = grouped_attention.attend(module, *arguments, dropout=0.0, scaling=0.3)
    assert weights is None and found.shape == (ROWS, num_new, HEADS, DIM) == expected.shape
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("num_new", [1, 4])
def test_without_a_scale_and_with_dropout_as_transformers(num_new: int) -> None:
    module: Any = SimpleNamespace(num_key_value_groups=HEADS // SHARED, is_causal=True)
    arguments = tensors(num_new, "of rows")
    expected, _ = sdpa_attention_forward(module, *arguments)
    torch.testing.assert_close(grouped_attention.attend(module, *arguments)[0], expected)
    assert not grouped_attention.attend(module, *arguments, dropout=1.0)[0].any()


@pytest.mark.parametrize("num_new", [1, 4])
def test_a_prefill_is_transformers_whose_function_kvpress_wraps(num_new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There marks of a press before are taken off the module, also for one token and under a mask."""
    query, key, value, mask = tensors(num_new, "of rows")
    asked: list[int] = []
    monkeypatch.setitem(
        grouped_attention.ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *args, **_: asked.append(args[1].shape[2])
    )
    grouped_attention.attend(nn.Module(), query, key[:, :, :num_new], value[:, :, :num_new], mask[..., :num_new])
    assert asked == [num_new]


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Query heads, key heads and new tokens of each attention that PyTorch was asked for."""
    log: list[tuple[int, int, int]] = []
    attend = nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        log.append((query.shape[1], key.shape[1], query.shape[2]))
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    return log


@pytest.mark.parametrize("hidden", [False, True])
def test_a_step_repeats_no_keys(
    make_pressable_llama: Callable[..., PressableModel], attended: list[tuple[int, int, int]], hidden: bool
) -> None:
    model = make_pressable_llama()
    cache = prefill(model, torch.arange(20)[None], None)
    if hidden:
        padded = [LayerKV(kv.keys, kv.values, torch.arange(20)[None, None] < 3) for kv in cache.layers]
        cache = CompressedCache(tuple(padded), cache.num_seen, cache.next_position)
    steps = DecodeState(model, cache, [0], 1)
    attended.clear()
    with torch.inference_mode(), masked(model.attentions, steps.biases):
        steps.feed(torch.tensor([7]))
    assert attended == [(2, 2, 2)] * 3, "two query heads of a group are two rows; keys have two heads, not four"


TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99}
CONFIGS = [
    LlamaConfig(**TINY),
    MistralConfig(**TINY, sliding_window=None),
    Phi3Config(**TINY, pad_token_id=0),
    Qwen2Config(**TINY),
    Qwen3Config(**TINY, head_dim=16),
]


@torch.inference_mode()
def after_a_context(model: Any, token: torch.Tensor) -> torch.Tensor:
    """The logits of one token behind eight."""
    cache = DynamicCache()
    model(torch.arange(8)[None], past_key_values=cache)
    logits: torch.Tensor = model(token, past_key_values=cache).logits
    return logits


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_each_architecture_looks_it_up_and_gets_its_own_back(
    config: PretrainedConfig, attended: list[tuple[int, int, int]]
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    attentions, token = llama_like.attention_modules(model), torch.tensor([[5]])
    attentions[1].config = copy.copy(attentions[1].config)  # as where a layer was copied from elsewhere
    before = [attention.config for attention in attentions]
    expected = after_a_context(model, token)
    attended.clear()
    with grouped_attention.lent(attentions):
        found = after_a_context(model, token)
        assert model.config._attn_implementation == "sdpa", "from which transformers makes masks"
    assert attended[2:] == [(2, 2, 2)] * 2
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="stumbled"), grouped_attention.lent(attentions):
        raise RuntimeError("stumbled")
    assert all(attention.config is config for attention, config in zip(attentions, before, strict=True))


@pytest.mark.parametrize(("attn", "heads"), [("eager", 2), ("sdpa", 4)], ids=["eager", "a key-value head per head"])
def test_other_attention_is_left_as_it_is(attn: str, heads: int) -> None:
    config = LlamaConfig(**{**TINY, "num_key_value_heads": heads})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn)
    with grouped_attention.lent(llama_like.attention_modules(model)):
        assert {attention.config._attn_implementation for attention in llama_like.attention_modules(model)} == {attn}


def test_layers_of_other_attention_keep_it(attended: list[tuple[int, int, int]]) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY), attn_implementation="sdpa").eval()
    first, second = llama_like.attention_modules(model)
    second.config = copy.copy(second.config)
    second.config._attn_implementation = "eager"
    for _ in range(2):
        with grouped_attention.lent((first, second)):
            assert [layer.config._attn_implementation for layer in (first, second)] == ["kvpress_grouped", "eager"]
        assert [layer.config._attn_implementation for layer in (first, second)] == ["sdpa", "eager"]
