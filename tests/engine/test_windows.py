"""Windows cover documents once, and are those of stock lm-eval where they mean the same."""

from __future__ import annotations

import pytest
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lm_eval_kvpress.engine import windows

LENGTHS = [1, 2, 7, 8, 9, 15, 16, 17, 40, 41]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("max_length", [1, 4, 8, 64])
def test_one_pass_windows_are_those_of_stock_lm_eval(length: int, max_length: int) -> None:
    tokens = list(range(100, 100 + length))
    stock = map(make_disjoint_window, get_rolling_token_windows(tokens, 0, max_length, 1))
    ours = [(list(w.context), list(w.targets)) for w in windows.one_pass_windows(tokens, 0, max_length)]
    assert ours == [(list(context), list(targets)) for context, targets in stock]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("context", "score"), [(1, 1), (4, 4), (4, 9), (8, 3), (64, 64)])
def test_prefix_windows_score_every_token_once_after_its_own_past(length: int, context: int, score: int) -> None:
    tokens = list(range(100, 100 + length))
    cut = list(windows.prefix_windows(tokens, 0, context, score))
    assert [token for window in cut for token in window.targets] == tokens
    place = 0
    for window in cut:
        assert window.pressed == (place >= context)
        assert len(window.context) + len(window.targets) <= max(context + score, context + 1)
        before = [0, *tokens][: place + 1]
        assert list(window.context) == before[len(before) - len(window.context) :]
        assert not window.pressed or len(window.context) == context
        place += len(window.targets)


def test_an_empty_document_has_no_windows() -> None:
    assert list(windows.one_pass_windows([], 0, 8)) == []
    assert list(windows.prefix_windows([], 0, 4, 4)) == []
