"""Windows of documents for rolling log-likelihoods, and the truncation of contexts.

Knows token ids as integers. Does not know tensors, models, presses or text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lm_eval_kvpress.engine.contexts import Context

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """A stretch of a document: score ``targets`` given ``context``.

    Attributes:
        context: tokens before the targets, at least one.
        targets: tokens to score; over all windows of a document each of its tokens stands here exactly once.
        pressed: whether the context is prefilled under the press (else the window is one plain forward).
        num_held_back: of a pressed window's context, the last tokens that are fed after compression.
    """

    context: Tokens
    targets: Tokens
    pressed: bool = False
    num_held_back: int = 0

    @property
    def parts(self) -> Context:
        """The context in its two parts."""
        return Context(self.context, min(self.num_held_back, len(self.context)))


def one_pass_windows(tokens: Sequence[int], prefix_token: int, max_length: int) -> Iterator[Window]:
    """Stock lm-eval's rolling windows: full windows with one token of context, the last one filled up from the left.

    Follows ``lm_eval.utils.get_rolling_token_windows`` with ``context_len=1`` and ``make_disjoint_window``.
    """
    if not tokens:
        return
    first = min(max_length, len(tokens))
    yield Window((prefix_token,), tuple(tokens[:first]))
    for start in range(first, len(tokens), max_length):
        end = min(start + max_length, len(tokens))
        yield Window(tuple(tokens[end - max_length - 1 : start]), tuple(tokens[start:end]))


def prefix_windows(
    tokens: Sequence[int], prefix_token: int, context: int, score: int, *, num_held_back: int = 1
) -> Iterator[Window]:
    """The first ``context`` tokens in plain windows; then blocks of ``score`` tokens, each after a pressed context.

    Args:
        context: tokens before each block that are prefilled under the press (C).
        score: tokens per block, scored over the compressed cache (S).
        num_held_back: of each pressed context, the last tokens that are fed after compression.
    """
    yield from one_pass_windows(tokens[:context], prefix_token, context)
    for start in range(context, len(tokens), score):
        block = tuple(tokens[start : start + score])
        yield Window(tuple(tokens[start - context : start]), block, pressed=True, num_held_back=num_held_back)
