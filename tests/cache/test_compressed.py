"""The compressed cache as a value: ragged batches, rows chosen, entries counted."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from small_caches import DIM, HEADS, layer, one_row
from torch import Tensor

from lm_eval_kvpress.cache import compressed
from lm_eval_kvpress.cache.compressed import CompressedCache, LayerKV, empty_cache, join, stack


def test_joining_frees_a_layer_once_it_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a batch of many parts is not in memory twice."""
    caches = [one_row((5, 3, 4), 1), one_row((2, 7, 4), 2)]
    expected, alive = stack(caches), list[int]()
    parts = [[weakref.ref(found.keys) for found in layers] for layers in zip(*(c.layers for c in caches), strict=True)]
    left_padded = compressed.left_padded

    def counted(*given: Any) -> Tensor:
        alive.append(sum(ref() is not None for layer in parts for ref in layer))
        return left_padded(*given)

    monkeypatch.setattr(compressed, "left_padded", counted)
    found = join(caches)
    assert alive == [6, 6, 4, 4, 2, 2], "keys and values of three layers, two parts each"
    assert caches == [] and not any(ref() for layer in parts for ref in layer)
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


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
