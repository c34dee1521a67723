"""A model as the engine sees it: one mask per layer, an empty cache of the right shape, a forward like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.models import pressable
from lm_eval_kvpress.models.pressable import PressableModel

MakePressable = Callable[..., PressableModel]


@pytest.fixture(scope="module")
def sdpa_model(make_pressable: MakePressable) -> PressableModel:
    return make_pressable("sdpa")


def test_masked_gives_each_layer_its_own_mask_and_takes_it_back(sdpa_model: PressableModel) -> None:
    biases: list[Tensor | None] = [torch.zeros(1, 1, 4, 4) for _ in sdpa_model.attentions]
    seen: list[Any] = []
    hooks = [
        attention.register_forward_pre_hook(lambda *call: seen.append(call[2]["attention_mask"]), with_kwargs=True)
        for attention in sdpa_model.attentions
    ]
    before = [dict(attention._forward_pre_hooks) for attention in sdpa_model.attentions]
    with pressable.masked(sdpa_model.attentions, biases):
        for hook, attention in zip(hooks, sdpa_model.attentions, strict=True):
            attention._forward_pre_hooks.move_to_end(hook.id)  # after the one under test
        with torch.no_grad():
            sdpa_model.hidden_states(torch.tensor([[1, 2, 3, 4]]))
            biases[1] = torch.zeros(1, 1, 4, 4)
            sdpa_model.hidden_states(torch.tensor([[1, 2, 3, 4]]))
    assert [id(mask) for mask in seen[3:]] == [id(bias) for bias in biases]
    with pytest.raises(KeyError), pressable.masked(sdpa_model.attentions, biases):
        raise KeyError("inside")
    assert [dict(attention._forward_pre_hooks) for attention in sdpa_model.attentions] == before
    for hook in hooks:
        hook.remove()


def test_an_empty_cache_has_the_shape_of_a_prefilled_one(
    sdpa_model: PressableModel, make_pressable_llama: MakePressable
) -> None:
    for model in (sdpa_model, make_pressable_llama(dtype=torch.bfloat16)):
        empty, full = model.empty_cache(2), prefill(model, torch.arange(40).view(2, 20), None)
        for nothing, found in zip(empty.layers, full.layers, strict=True):
            assert nothing.keys.shape == (*found.keys.shape[:2], 0, found.keys.shape[3])
            assert nothing.keys.dtype is found.keys.dtype
