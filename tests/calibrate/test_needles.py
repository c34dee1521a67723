"""Which heads retrieve is read off an untouched model's attention weights, and a head that copies is found."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import tiny_llama, tiny_neox
from statistics_files import windows
from transformers import PreTrainedModel

from lm_eval_kvpress.calibrate.needles import SEED, duo_attention, with_needle
from lm_eval_kvpress.models.architectures import present
from lm_eval_kvpress.presses.statistics import TENSORS


def by_numpy(model: PreTrainedModel, num_kv_heads: int) -> np.ndarray:
    """``(L, K)``, from the attention weights that transformers returns."""
    generator = torch.Generator().manual_seed(SEED)
    words = sorted({token for window in windows() for token in window})
    found = []
    for window in windows():
        tokens, place, size = with_needle(window, words, generator)
        with torch.inference_mode():
            layers = model(torch.tensor([tokens]), output_attentions=True).attentions
        weights = np.stack([layer[0].double().numpy() for layer in layers])  # (L, H, T, T)
        shares = weights[:, :, -size:, place : place + size].sum(axis=-1).mean(axis=-1)  # (L, H)
        found.append(shares.reshape(len(layers), num_kv_heads, -1).max(axis=-1))
    return np.mean(found, axis=0)


@pytest.mark.parametrize("make", [tiny_neox, tiny_llama])
def test_patterns_are_the_attention_that_a_repeated_needle_pays_the_old_one(
    make: Callable[..., PreTrainedModel],
) -> None:
    model = present(make())
    found = duo_attention(model, windows())
    assert found.keys() == TENSORS["duo_attention"].keys()
    expected = by_numpy(make("eager"), model.num_key_value_heads)
    assert np.abs(found["full_attention_heads"].numpy() - expected).max() < 1e-4


def test_a_needle_stands_once_in_the_first_half_and_again_at_the_end() -> None:
    generator = torch.Generator().manual_seed(3)
    for length in (8, 60, 200):
        window = list(range(1000, 1000 + length))
        tokens, place, size = with_needle(window, range(50), generator)
        needle = tokens[place : place + size]
        assert len(tokens) == length and size == min(16, length // 4) and max(needle) < 50
        assert tokens[-size:] == needle and place > 0 and place + size <= length // 2 + size
        assert [token for token in tokens if token >= 1000] == window[: length - 2 * size]
