"""Attention masks entry by entry."""

from __future__ import annotations

import itertools

import pytest
import torch
from small_caches import HEADS, layer

from lm_eval_kvpress.cache.masks import attention_bias, decoding_bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden_heads", [None, 1, HEADS])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("num_new", [1, 4])
def test_attention_bias_entry_by_entry(dtype: torch.dtype, hidden_heads: int | None, groups: int, num_new: int) -> None:
    found = layer(2, 5, 7, hidden_heads)
    visible = (torch.rand(2, num_new, num_new, generator=torch.Generator().manual_seed(0)) < 0.5) | torch.eye(
        num_new, dtype=torch.bool
    )
    bias = attention_bias(found, visible, dtype, HEADS * groups)
    if hidden_heads is None and num_new == 1:
        assert bias is None, "nothing is hidden"
        return
    assert bias is not None and bias.dtype is dtype
    heads = HEADS * groups if hidden_heads == HEADS else 1
    assert bias.shape == (2, heads, num_new, 5 + num_new)
    assert bias.isfinite().all(), "an infinite entry makes NaN of a row that attends nothing else"
    for row, head, query, key in itertools.product(*map(range, bias.shape)):
        if key >= 5:
            seen = bool(visible[row, query, key - 5])
        else:  # query heads of one group stand next to each other
            seen = found.hidden is None or not found.hidden[row, head // groups, key]
        assert bias[row, head, query, key] == (0 if seen else torch.finfo(dtype).min)


def test_attention_bias_without_a_cache() -> None:
    visible = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    bias = attention_bias(None, visible, torch.float32, HEADS)
    assert bias is not None
    assert torch.equal(bias[0, 0] == 0, visible[0])


@pytest.mark.parametrize("hidden_heads", [None, 1, HEADS])
@pytest.mark.parametrize("groups", [1, 3])
def test_decoding_bias_hides_evicted_entries_and_padding_and_nothing_that_is_to_come(
    hidden_heads: int | None, groups: int
) -> None:
    found, padding = layer(2, 5, 7, hidden_heads), torch.tensor([[True, True, False], [False] * 3])
    bias = decoding_bias(found, padding, 16, HEADS * groups)
    heads = HEADS * groups if hidden_heads == HEADS else 1
    assert bias is not None and bias.shape == (2, heads, 1, 16)
    for row, head, entry in itertools.product(range(2), range(heads), range(16)):
        evicted = entry < 5 and found.hidden is not None and bool(found.hidden[row, head // groups, entry])
        is_padding = 5 <= entry < 8 and bool(padding[row, entry - 5])
        assert (bias[row, head, 0, entry] < 0) == (evicted or is_padding)


def test_decoding_bias_of_nothing_hidden_is_none() -> None:
    assert decoding_bias(layer(2, 5, 7), torch.zeros(2, 3, dtype=torch.bool), 16, HEADS) is None
