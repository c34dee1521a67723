"""Packed layers: rows of any length end together, belong to themselves, and read as full precision does."""

from __future__ import annotations

import pytest
import torch
from quantized_reference import stored
from small_caches import DIM, HEADS, layer, one_row
from torch import Tensor

from lm_eval_kvpress.cache.compressed import CompressedCache, stack
from lm_eval_kvpress.cache.layers import growing_cache, reading_cache
from lm_eval_kvpress.cache.packed import PackedKV, pack
from lm_eval_kvpress.cache.quantized import Quantization

RULE = Quantization("int4", group=8, residual=3)


def visible(found: PackedKV, row: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a row that can be attended, all heads hiding the same."""
    places = torch.ones(found.num_entries, dtype=torch.bool) if found.hidden is None else ~found.hidden[row, 0]
    return found.keys[row][:, places], found.values[row][:, places]


@pytest.mark.parametrize("layout", ["kivi", "token"])
@pytest.mark.parametrize("num_entries", [1, 3, 4, 11, 21])
def test_a_row_reads_as_the_reference(num_entries: int, layout: str) -> None:
    cache = one_row((num_entries,), 1)
    rule = Quantization("int4", group=8, residual=3, layout=layout)
    (found,) = pack(cache, rule).layers
    (given,) = cache.layers
    assert found.num_entries == num_entries and found.kept_per_row() == [num_entries]
    rest = {"group": 8, "residual": min(3, num_entries)}
    expected_keys = stored(given.keys, "int4", by_channel=layout == "kivi", **rest)
    expected_values = stored(given.values, "int4", by_channel=False, **rest)
    torch.testing.assert_close(found.keys.double(), expected_keys, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.values.double(), expected_values, rtol=0, atol=1e-5)
    assert torch.equal(found.keys[:, :, -3:], given.keys[:, :, -3:])


def test_rows_of_a_ragged_batch_read_as_each_alone() -> None:
    lengths = [(5, 21), (20, 2), (0, 11), (8, 8)]
    rows, places = [pack(one_row(entries, seed), RULE) for seed, entries in enumerate(lengths)], [2, 0, 3, 1]
    batch = stack(rows, places)
    for row, place in zip(rows, places, strict=True):
        picked = batch.select([place, 0])
        assert batch.kept()[place] == picked.kept()[0] == row.kept()[0]
        for alone, whole, again in zip(row.layers, batch.layers, picked.layers, strict=True):
            assert isinstance(alone, PackedKV) and isinstance(whole, PackedKV) and isinstance(again, PackedKV)
            for expected, *found in zip(visible(alone, 0), visible(whole, place), visible(again, 0), strict=True):
                assert torch.equal(found[0], expected) and torch.equal(found[1], expected)


def test_a_ragged_batch_has_the_shape_of_the_unpacked_one() -> None:
    rows = [one_row(entries, seed, hidden_heads=HEADS) for seed, entries in enumerate([(9, 2), (12, 30)])]
    plain, packed = stack(rows), stack([pack(row, RULE) for row in rows])
    for one, other in zip(plain.layers, packed.layers, strict=True):
        assert one.keys.shape == other.keys.shape == other.values.shape
        assert one.hidden is not None and other.hidden is not None and torch.equal(one.hidden, other.hidden)
        assert (one.entry_bytes, one.dtype, one.device) == (other.entry_bytes, other.dtype, other.device)


def test_bytes_are_those_of_all_tensors() -> None:
    found = pack(CompressedCache((layer(2, 67, 0),), (67, 67), (67, 67)), Quantization("int4", group=64, residual=3))
    codes = 2 * 2 * HEADS * 64 * DIM // 2  # keys and values, rows, heads, entries, dims; two codes to a byte
    scales = 2 * 2 * HEADS * DIM * 3  # a byte for the scale, two for the zero
    newest = 2 * 2 * HEADS * 3 * DIM * 4
    assert found.layers[0].num_bytes == codes + scales + newest


def test_reading_and_growing_return_unpacked_entries_and_change_none() -> None:
    cache = pack(one_row((11, 4), 4), RULE)
    before = [(found.keys, found.values) for found in cache.layers]
    reader, grown = reading_cache(cache), growing_cache(cache, 5)
    assert (reader.get_seq_length(), grown.get_seq_length()) == (11, 11)
    appended: list[list[Tensor]] = [list(pair) for pair in before]
    for turn, num_new in enumerate([3, 1, 1]):
        new = torch.randn(2, 1, HEADS, num_new, DIM, generator=torch.Generator().manual_seed(turn))
        for index in range(2):
            read = reader.update(new[0], new[1], index)
            found = grown.update(new[0], new[1], index)
            for side in range(2):
                assert torch.equal(read[side], torch.cat([before[index][side], new[side]], dim=2))
                appended[index][side] = torch.cat([appended[index][side], new[side]], dim=2)
                assert torch.equal(found[side], appended[index][side])
    assert grown.get_seq_length() == 16 <= grown.layers[0].capacity
    for found, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(found.keys, keys) and torch.equal(found.values, values)
