"""Groups, batches and packs lose nothing and keep their limits; a batch that does not fit is halved."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from lm_eval_kvpress.engine import batching
from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.errors import UsageError


def test_groups_share_contexts_and_lose_no_request() -> None:
    pairs = [((1, 2), (5,)), ((3,), (6,)), ((1, 2), (7, 8)), ((1, 2), (5,))]
    groups = batching.group_by_context([(Context(context, 1), continuation) for context, continuation in pairs])
    assert [group.context.tokens for group in groups] == [(1, 2), (3,)]
    assert groups[0].members == (0, 2, 3)
    assert groups[0].continuations == ((5,), (7, 8), (5,))


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("max_tokens", [None, 1, 12, 10_000])
def test_batches_keep_order_and_limits(size: int, max_tokens: int | None) -> None:
    items = [9, 7, 7, 5, 3, 3, 3, 1]
    batches = list(batching.in_batches(items, size, lambda item: item, max_tokens))
    assert [item for batch in batches for item in batch] == items
    for batch in batches:
        assert len(batch) <= size
        assert max_tokens is None or len(batch) == 1 or max(batch) * len(batch) <= max_tokens


def test_packs_keep_order_and_limit() -> None:
    lengths = [5, 5, 5, 20, 1]
    packs = list(batching.packs(lengths, 10))
    assert packs == [[0, 1], [2], [3], [4]]


def no_room_on_a_cpu() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def no_room_on_a_gpu() -> None:
    raise torch.OutOfMemoryError("no")


def no_room_for_python() -> None:
    raise MemoryError


NO_ROOM = pytest.mark.parametrize("fail", [no_room_on_a_cpu, no_room_on_a_gpu, no_room_for_python])


@NO_ROOM
def test_a_batch_that_does_not_fit_is_run_in_halves_in_order(fail: Callable[[], None]) -> None:
    sizes = []

    def run(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        if len(items) > 2:
            fail()
        return [10 * item for item in items]

    assert list(batching.Halving().run(run, range(5), lambda item: 7)) == [0, 10, 20, 30, 40]
    assert sizes == [5, 3, 2, 1, 2]


@NO_ROOM
def test_what_did_not_fit_is_not_tried_again(fail: Callable[[], None]) -> None:
    """Ten tokens fit. Batches of eight items, the longest first: shorter ones may be as many as ten tokens allow."""
    sizes, lengths = list[int](), [5] * 8 + [2] * 8 + [1] * 8
    halving = batching.Halving()

    def run(items: Sequence[int]) -> Sequence[int]:
        sizes.append(len(items))
        if sum(lengths[item] for item in items) > 10:
            fail()
        return items

    batches = [range(start, start + 8) for start in (0, 8, 16)]
    found = [item for batch in batches for item in halving.run(run, batch, lengths.__getitem__)]
    assert found == list(range(24)) and halving.max_tokens == 10
    assert sizes == [8, 4, 2, 2, 2, 2, 5, 3, 8], "three attempts until two fit, and none that fails after them"


@NO_ROOM
def test_a_single_item_that_does_not_fit_is_one_line(fail: Callable[[], None]) -> None:
    def run(items: Sequence[int]) -> list[int]:
        fail()
        return []

    with pytest.raises(UsageError, match="^out of memory with a single context.*$"):
        list(batching.Halving().run(run, range(3), lambda item: 7))


def test_another_error_is_no_reason_to_try_again() -> None:
    sizes = []

    def run(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        list(batching.Halving().run(run, range(4), lambda item: 7))
    assert sizes == [4]
