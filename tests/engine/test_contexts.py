"""A context's two parts add up to it, and contexts that share the first are told apart from those that do not."""

from __future__ import annotations

import pytest

from lm_eval_kvpress.engine.contexts import Context, in_order, is_first, without_repeats


def shared(*tokens: int, held: int) -> Context:
    return Context(tokens, held, is_shared=True)


@pytest.mark.parametrize(("held", "first"), [(0, (5, 6, 7)), (1, (5, 6)), (3, ())])
def test_the_parts_add_up(held: int, first: tuple[int, ...]) -> None:
    context = Context((5, 6, 7), held)
    assert context.compressed == first
    assert context.compressed + context.held_back == context.tokens


def test_no_more_can_be_held_back_than_there_is() -> None:
    with pytest.raises(AssertionError):
        Context((5, 6), 3)


def test_a_question_is_no_longer_than_what_is_compressed() -> None:
    with pytest.raises(AssertionError):
        Context((5, 6, 7), 1, num_question=3)


def test_truncation_keeps_the_end_of_the_context_as_stock_does() -> None:
    context, continuation = list(range(20)), [90, 91, 92]
    stock = (context + continuation)[-(10 + 1) :]
    assert [*Context(tuple(context), 1).last(11 - len(continuation)).tokens, *continuation] == stock
    assert Context((1, 2), 1).last(8) == Context((1, 2), 1)
    assert Context((1, 2, 3), 2).last(1) == Context((3,), 1)
    asked = Context((1, 2, 3, 4, 5), 1, num_question=3)
    assert [asked.last(count).num_question for count in (5, 4, 3, 1)] == [3, 3, 2, 0]


def test_a_shared_part_is_compressed_once_and_others_each_time() -> None:
    contexts = [shared(1, 2, 8, held=1), Context((1, 2, 8), 1), shared(1, 2, 9, 9, held=2), Context((1, 2, 8), 1)]
    kept, places = without_repeats(contexts)
    assert kept == [contexts[0], contexts[1], contexts[3]]
    assert places == [0, 1, 0, 2]


def test_shared_parts_stand_together_and_the_longest_come_first() -> None:
    contexts = [shared(1, 2, 8, held=1), Context((7,) * 4, 1), shared(3, 4, held=1), shared(1, 2, 9, 9, 9, held=3)]
    assert in_order(contexts) == [3, 0, 1, 2]
    assert in_order([Context((0,) * length, 1) for length in (2, 5, 3, 5)]) == [1, 3, 2, 0]


def test_the_first_of_a_task_is_told_apart() -> None:
    seen = set[tuple[str, tuple[int, ...]]]()
    one, other = shared(1, 2, 8, held=1), shared(1, 2, 9, held=1)
    assert [is_first(one, "a", seen), is_first(other, "a", seen), is_first(other, "b", seen)] == [True, False, True]
    assert is_first(Context(one.tokens, 1), "a", seen)
