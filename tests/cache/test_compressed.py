"""The compressed cache as a value: ragged batches, masks entry by entry, what is read is not changed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lm_eval_kvpress.cache.compressed import (
    CompressedCache,
    LayerKV,
    attention_bias,
    empty_cache,
    growing_cache,
    reading_cache,
    stack,
)

HEADS, DIM = 4, 8


def layer(batch: int, entries: int, seed: int, hidden_heads: int | None = None) -> LayerKV:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, HEADS, entries, DIM, generator=generator)
    if hidden_heads is None:
        return LayerKV(keys, values)
    return LayerKV(keys, values, torch.rand(batch, hidden_heads, entries, generator=generator) < 0.4)


def one_row(entries: tuple[int, ...], seed: int, hidden_heads: int | None = None, seen: int = 50) -> CompressedCache:
    layers = tuple(layer(1, count, 10 * seed + index, hidden_heads) for index, count in enumerate(entries))
    return CompressedCache(layers, (seen,), (seen,), torch.full((1, 3), float(seed)))


def visible_entries(found: LayerKV, row: int, head: int) -> Tensor:
    """Keys and values that may be attended, in order, ``(kept, 2 * D)``."""
    both = torch.cat([found.keys[row, head], found.values[row, head]], dim=-1)
    if found.hidden is None:
        return both
    return both[~found.hidden[row, head if found.hidden.shape[1] > 1 else 0]]


RAGGED = {
    "ragged": [one_row((5, 3), 1), one_row((2, 7), 2), one_row((5, 1), 3)],
    "equal": [one_row((5, 3), 1), one_row((5, 3), 2)],
    "by head": [one_row((5, 5), 1, HEADS), one_row((8, 8), 2, HEADS)],
    "by head, equal": [one_row((5, 5), 1, HEADS), one_row((5, 5), 2, HEADS)],
    "by head and whole": [one_row((5, 5), 1, HEADS), one_row((8, 2), 2), one_row((3, 3), 3, 1)],
    "with empty": [one_row((0, 0), 1), one_row((8, 2), 2)],
}


@pytest.mark.parametrize("case", RAGGED)
def test_stacked_rows_attend_to_what_each_cache_attends_to(case: str) -> None:
    caches = RAGGED[case]
    stacked = stack(caches)
    for row, alone in enumerate(caches):
        for found, expected in zip(stacked.layers, alone.layers, strict=True):
            for head in range(HEADS):
                assert torch.equal(visible_entries(found, row, head), visible_entries(expected, 0, head))
    assert stacked.kept() == [cache.kept()[0] for cache in caches]
    assert stacked.last_hidden is not None
    assert stacked.last_hidden[:, 0].tolist() == [cache.last_hidden[0, 0].item() for cache in caches]  # type: ignore[index]


def test_stacking_pads_on_the_left_and_no_more_than_each_layer_needs() -> None:
    stacked = stack(RAGGED["ragged"])
    assert [found.num_entries for found in stacked.layers] == [5, 7]
    assert stacked.layers[0].hidden is not None
    assert stacked.layers[0].hidden[:, 0].tolist() == [[False] * 5, [True] * 3 + [False] * 2, [False] * 5]
    assert all(found.hidden is None for found in stack(RAGGED["equal"]).layers), "equal lengths need no mask"
    assert stack(RAGGED["ragged"][:1]) is RAGGED["ragged"][0]


def test_padding_is_zero_in_memory_that_held_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden entries have the weight zero, and zero times NaN would be NaN."""
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *shape: self.new_full(shape, float("nan")))
    for case in ("ragged", "by head and whole", "with empty"):
        stacked = stack(RAGGED[case], [*range(1, len(RAGGED[case])), 0])
        assert all(torch.isfinite(part).all() for found in stacked.layers for part in (found.keys, found.values))


def test_stacked_batches_of_several_rows_keep_their_order() -> None:
    wide = CompressedCache((layer(3, 4, 1),), (40, 40, 40), (40, 40, 40))
    narrow = CompressedCache((layer(2, 6, 2),), (60, 60), (6, 6))
    both = stack([wide, narrow])
    assert (both.num_seen, both.next_position) == ((40, 40, 40, 60, 60), (40, 40, 40, 6, 6))
    assert both.last_hidden is None
    for row, (source, of_row) in enumerate([(wide, 0), (wide, 1), (wide, 2), (narrow, 0), (narrow, 1)]):
        found, expected = visible_entries(both.layers[0], row, 2), visible_entries(source.layers[0], of_row, 2)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (3, 4, 0, 1, 2), (4, 2, 0, 3, 1)], ids=str)
def test_rows_of_stacked_caches_go_where_they_are_sent(order: tuple[int, ...]) -> None:
    wide = CompressedCache((layer(3, 4, 1),), (40, 41, 42), (40, 41, 42), torch.arange(9.0).view(3, 3))
    narrow = CompressedCache((layer(2, 6, 2, 1),), (60, 61), (6, 7), torch.arange(9.0, 15).view(2, 3))
    sent, plain = stack([wide, narrow], order), stack([wide, narrow]).select([order.index(row) for row in range(5)])
    assert (sent.num_seen, sent.next_position, sent.kept()) == (plain.num_seen, plain.next_position, plain.kept())
    assert sent.last_hidden is not None and plain.last_hidden is not None
    assert torch.equal(sent.last_hidden, plain.last_hidden)
    for row in range(5):
        for head in range(HEADS):
            found, expected = (visible_entries(cache.layers[0], row, head) for cache in (sent, plain))
            assert torch.equal(found, expected)
    assert stack([wide], [2, 0, 1]).num_seen == (41, 42, 40)


@pytest.mark.parametrize("case", RAGGED)
def test_select_reorders_and_repeats_rows(case: str) -> None:
    stacked = stack(RAGGED[case])
    rows = [1, 0, 1]
    selected = stacked.select(rows)
    assert selected.num_seen == tuple(stacked.num_seen[row] for row in rows)
    assert selected.kept() == [stacked.kept()[row] for row in rows]
    for found, source in zip(selected.layers, stacked.layers, strict=True):
        for place, row in enumerate(rows):
            assert torch.equal(visible_entries(found, place, 3), visible_entries(source, row, 3))


def test_select_works_where_layers_live_on_different_devices() -> None:
    on_meta = LayerKV(torch.empty(2, HEADS, 3, DIM, device="meta"), torch.empty(2, HEADS, 3, DIM, device="meta"))
    cache = CompressedCache((on_meta, layer(2, 3, 1)), (9, 9), (9, 9), torch.randn(2, 4))
    selected = cache.select([1])
    assert torch.equal(selected.layers[1].keys, cache.layers[1].keys[1:])
    assert selected.layers[0].keys.device.type == "meta"


def test_kept_counts_what_can_be_attended() -> None:
    hidden = torch.tensor([[[True, False, True], [False] * 3, [True] * 3, [False, False, True]]])
    found = LayerKV(torch.zeros(1, 4, 3, DIM), torch.zeros(1, 4, 3, DIM), hidden)
    assert found.kept_per_row() == [(1 + 3 + 0 + 2) / 4]
    assert layer(2, 5, 0).kept_per_row() == [5.0, 5.0]
    cache = CompressedCache((found, found), (3,), (3,))
    assert cache.kept() == [[1.5, 1.5]]


def test_an_empty_cache_is_empty() -> None:
    cache = empty_cache(3, 2, HEADS, DIM, torch.zeros(1, dtype=torch.bfloat16))
    assert cache.is_empty
    assert cache.kept() == [[0.0, 0.0]] * 3
    assert cache.layers[1].keys.dtype is torch.bfloat16
    assert not stack(RAGGED["with empty"]).is_empty


# ---------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden_heads", [None, 1, HEADS])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("num_new", [1, 4])
def test_attention_bias_entry_by_entry(dtype: torch.dtype, hidden_heads: int | None, groups: int, num_new: int) -> None:
    found = layer(2, 5, 7, hidden_heads)
    pack = (torch.rand(2, num_new, num_new, generator=torch.Generator().manual_seed(0)) < 0.5) | torch.eye(
        num_new, dtype=torch.bool
    )
    bias = attention_bias(found, pack, dtype, HEADS * groups)
    if hidden_heads is None and num_new == 1:
        assert bias is None, "nothing is hidden"
        return
    assert bias is not None and bias.dtype is dtype
    heads = HEADS * groups if hidden_heads == HEADS else 1
    assert bias.shape == (2, heads, num_new, 5 + num_new)
    assert bias.isfinite().all(), "an infinite entry makes NaN of a row that attends nothing else"
    for row, head, query, key in itertools.product(*map(range, bias.shape)):
        if key >= 5:
            seen = bool(pack[row, query, key - 5])
        else:  # query heads of one group stand next to each other
            seen = found.hidden is None or not found.hidden[row, head // groups, key]
        assert bias[row, head, query, key] == (0 if seen else torch.finfo(dtype).min)


def test_attention_bias_without_a_cache() -> None:
    pack = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    bias = attention_bias(None, pack, torch.float32, HEADS)
    assert bias is not None
    assert torch.equal(bias[0, 0] == 0, pack[0])


# ---------------------------------------------------------------------------------------------- transformers caches


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
