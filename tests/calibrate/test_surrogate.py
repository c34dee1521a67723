"""KVzap's surrogate is numpy's least squares on hidden states and replays of an untouched model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import WordTokenizer, tiny_llama, tiny_neox
from statistics_files import windows
from transformers import PreTrainedModel

from lm_eval_kvpress.calibrate.methods import NUM_SKIPPED
from lm_eval_kvpress.calibrate.surrogate import FLOOR, ROUNDING, kvzap
from lm_eval_kvpress.harness.tokenization import lend_tokenizer
from lm_eval_kvpress.models.architectures import present

TOLERANCE = 1e-4
PROMPT = "\n\nRepeat the previous context exactly.\n"


def replayed(model: PreTrainedModel, window: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs ``(L, T, E)`` of the attentions, and KVzip+'s scores ``(L, K, T)``, by one forward with the replay."""
    attentions = [module for name, module in model.named_modules() if name.endswith(("attention", "self_attn"))]
    inputs, values = list[torch.Tensor](), list[torch.Tensor]()
    hooks = [
        attention.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append(kwargs.get("hidden_states", *args[:1])), with_kwargs=True
        )
        for attention in attentions
    ]
    tokens = [*window, *WordTokenizer().encode(PROMPT)[0].tolist(), *window]
    with torch.inference_mode():
        out = model(torch.tensor([tokens]), output_attentions=True, use_cache=True)
    for hook in hooks:
        hook.remove()
    values = [layer.values[0] for layer in out.past_key_values.layers]
    length, scores = len(window), []
    for attention, hidden, weights, value in zip(attentions, inputs, out.attentions, values, strict=True):
        output = getattr(attention, "o_proj", None) or attention.dense
        heads, groups = weights.shape[1], weights.shape[1] // len(value)
        by_head = output.weight.detach().view(-1, heads, value.shape[-1])  # (E, H, D)
        written = torch.einsum("ehd,htd->hte", by_head, value.repeat_interleave(groups, 0)).norm(dim=-1)  # (H, T)
        size = hidden[0, length:].norm(dim=-1)
        seen = weights[0, :, length:, :] / size[None, :, None] * written[:, None]
        scores.append(seen[..., :length].amax(dim=1).view(len(value), groups, -1).amax(dim=1).double().numpy())
    return np.stack([hidden[0, :length].double().numpy() for hidden in inputs]), np.stack(scores)


@pytest.mark.parametrize("make", [tiny_neox, tiny_llama])
def test_the_surrogate_is_least_squares_on_what_replays_find(make: Callable[..., PreTrainedModel]) -> None:
    model = lend_tokenizer(present(make()), WordTokenizer())
    found = kvzap(model, windows(), num_skipped=NUM_SKIPPED)
    untouched = [replayed(make("eager"), window) for window in windows()]
    for layer in range(3):
        inputs = np.concatenate([hidden[layer, NUM_SKIPPED:] for hidden, _ in untouched])
        targets = np.concatenate(
            [np.log(np.maximum(scores[layer, :, NUM_SKIPPED:], FLOOR)).T for _, scores in untouched]
        )
        extended = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
        expected = np.linalg.lstsq(extended, targets, rcond=ROUNDING)[0]
        weights = np.concatenate([found["weight"][layer].numpy(), found["bias"][layer].numpy()[:, None]], axis=1).T
        difference = np.abs(weights - expected).max()
        assert difference < TOLERANCE, (layer, difference)
        predicted = extended @ weights
        assert np.corrcoef(predicted.ravel(), targets.ravel())[0, 1] > 0.5
