"""Pure functions from requests and documents to windows, shared contexts and batches, and back to request order.

Knows token ids as integers. Does not know tensors, models, presses or text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """A stretch of a document: score ``targets`` given ``context``.

    Attributes:
        context: tokens before the targets, at least one.
        targets: tokens to score; over all windows of a document each of its tokens stands here exactly once.
        pressed: whether the context is prefilled under the press (else the window is one plain forward).
    """

    context: Tokens
    targets: Tokens
    pressed: bool = False


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


def prefix_windows(tokens: Sequence[int], prefix_token: int, context: int, score: int) -> Iterator[Window]:
    """The first ``context`` tokens in plain windows; then blocks of ``score`` tokens, each after a pressed context.

    Args:
        context: tokens before each block that are prefilled under the press (C).
        score: tokens per block, scored over the compressed cache (S).
    """
    yield from one_pass_windows(tokens[:context], prefix_token, context)
    for start in range(context, len(tokens), score):
        block = tuple(tokens[start : start + score])
        yield Window(tuple(tokens[start - context : start]), block, pressed=True)


def truncate_left(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Tokens:
    """What is left of a context so that context and continuation fit, as stock ``HFLM`` truncates it."""
    room = max_length + 1 - len(continuation)
    return tuple(context[max(0, len(context) - room) :])


@dataclass(frozen=True)
class ContextGroup:
    """A context and the continuations that share it.

    Attributes:
        context: token ids.
        continuations: token ids of each.
        members: for each continuation, the index of its request.
    """

    context: Tokens
    continuations: tuple[Tokens, ...]
    members: tuple[int, ...]


def group_by_context(pairs: Sequence[tuple[Tokens, Tokens]]) -> list[ContextGroup]:
    """Groups ``(context, continuation)`` pairs by context, longest context first.

    Longest first, so that running out of memory happens at once and time estimates err on the safe side.
    """
    members: dict[Tokens, list[int]] = {}
    for index, (context, _) in enumerate(pairs):
        members.setdefault(context, []).append(index)
    groups = [
        ContextGroup(context, tuple(pairs[index][1] for index in indices), tuple(indices))
        for context, indices in members.items()
    ]
    return sorted(groups, key=lambda group: -len(group.context))


def batches(
    items: Sequence[Item], size: int, length: Callable[[Item], int], max_tokens: int | None = None
) -> Iterator[list[Item]]:
    """Consecutive batches of at most ``size`` items and, given ``max_tokens``, of at most so many padded tokens."""
    batch: list[Item] = []
    longest = 0
    for item in items:
        longest_with = max(longest, length(item))
        too_long = max_tokens is not None and longest_with * (len(batch) + 1) > max_tokens
        if batch and (len(batch) == size or too_long):
            yield batch
            batch, longest_with = [], length(item)
        batch.append(item)
        longest = longest_with
    if batch:
        yield batch


def packs(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of consecutive continuations whose lengths sum up to at most ``max_tokens`` (or of a single one)."""
    pack: list[int] = []
    total = 0
    for index, length in enumerate(lengths):
        if pack and total + length > max_tokens:
            yield pack
            pack, total = [], 0
        pack.append(index)
        total += length
    if pack:
        yield pack
