"""Transformers caches over a compressed one: what is read is not changed, what grows is a copy."""

from __future__ import annotations

import pytest
import torch
from small_caches import DIM, HEADS, one_row
from torch import Tensor

from lm_eval_kvpress.cache.layers import growing_cache, reading_cache


def new_entries(num_new: int, seed: int) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, 1, HEADS, num_new, DIM, generator=torch.Generator().manual_seed(seed))
    return keys, values


def test_reading_returns_kept_and_new_entries_and_forgets_the_new_ones() -> None:
    cache = one_row((5, 3), 4)
    before = [(found.keys.clone(), found.values.clone()) for found in cache.layers]
    reader = reading_cache(cache)
    for turn in range(2):
        for index, (old_keys, old_values) in enumerate(before):
            keys, values = new_entries(4, turn)
            found_keys, found_values = reader.update(keys, values, index)
            assert torch.equal(found_keys, torch.cat([old_keys, keys], dim=2))
            assert torch.equal(found_values, torch.cat([old_values, values], dim=2))
            assert torch.equal(cache.layers[index].keys, old_keys)
    assert reader.get_seq_length() == 5


def test_growing_appends_to_a_copy() -> None:
    cache = one_row((5, 0), 4)
    before = [(found.keys.clone(), found.values.clone()) for found in cache.layers]
    grown = growing_cache(cache, 5)
    expected = [list(pair) for pair in before]
    for turn, num_new in enumerate([3, 1, 1]):
        for index in range(2):
            new = new_entries(num_new, turn)
            found = grown.update(*new, index)
            expected[index] = [torch.cat([old, more], dim=2) for old, more in zip(expected[index], new, strict=True)]
            assert all(torch.equal(a, b) for a, b in zip(found, expected[index], strict=True))
    with pytest.raises(AssertionError, match="buffer"):
        grown.update(*new_entries(7, 9), 0)  # 5 + 5 entries, rounded up to 16
    for found, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(found.keys, keys) and torch.equal(found.values, values)
