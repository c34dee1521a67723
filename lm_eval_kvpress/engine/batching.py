"""Groups, batches and packs of token sequences, and the halving of a batch that does not fit into memory.

Knows token ids as integers, and of torch that memory may run out. Does not know models, presses or text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from lm_eval_kvpress.engine import memory
from lm_eval_kvpress.engine.contexts import Context, in_order
from lm_eval_kvpress.errors import UsageError

logger = logging.getLogger("lm_eval_kvpress")

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class ContextGroup:
    """A context and the continuations that share it.

    Attributes:
        context: in its two parts.
        continuations: token ids of each.
        members: for each continuation, the index of its request.
    """

    context: Context
    continuations: tuple[Tokens, ...]
    members: tuple[int, ...]


def group_by_context(pairs: Sequence[tuple[Context, Tokens]]) -> list[ContextGroup]:
    """Groups ``(context, continuation)`` pairs by context, longest context first.

    Longest first, so that a run that will not fit into memory fails at once, and its estimated time can only shrink.
    """
    members: dict[Context, list[int]] = {}
    for index, (context, _) in enumerate(pairs):
        members.setdefault(context, []).append(index)
    groups = [
        ContextGroup(context, tuple(pairs[index][1] for index in indices), tuple(indices))
        for context, indices in members.items()
    ]
    return [groups[index] for index in in_order([group.context for group in groups])]


def in_batches(
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
    """Indices of consecutive continuations whose lengths sum to at most ``max_tokens``; a longer one goes alone."""
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


class Segmented(Protocol):
    """Items counted from 0, in segments that may not share a batch (`request_batches.RequestBatches`)."""

    def segments(self) -> Iterator[list[int]]: ...

    def length(self, item: int) -> int: ...


def batches(requests: Segmented, max_items: int, max_tokens: int | None) -> Iterator[list[int]]:
    """Items that run together: at most ``max_items``, and given ``max_tokens`` at most so many padded tokens."""
    for segment in requests.segments():
        yield from in_batches(segment, max_items, requests.length, max_tokens)


class Halving:
    """Runs batches of one kind; where memory runs out, a batch in halves, and later ones no larger than these.

    Attributes:
        max_tokens: padded tokens of a batch, at most; None until memory has run out.
    """

    def __init__(self) -> None:
        self.max_tokens: int | None = None

    def run(
        self, run: Callable[[Sequence[int]], Iterable[Outcome]], items: Sequence[int], length: Callable[[int], int]
    ) -> Iterator[Outcome]:
        """Run a batch, in parts if it has more tokens than fitted before. What came before memory ran out stands.

        Args:
            length: tokens of an item.

        Raises:
            UsageError: if a single item does not fit.
        """
        for part in in_batches(items, len(items), length, self.max_tokens):
            yield from self._run(run, part, length)

    def _run(
        self, run: Callable[[Sequence[int]], Iterable[Outcome]], items: Sequence[int], length: Callable[[int], int]
    ) -> Iterator[Outcome]:
        try:
            yield from run(items)
            return
        except (RuntimeError, MemoryError) as error:
            if not memory.ran_out(error):
                raise
            if len(items) == 1:
                raise UsageError(
                    "out of memory with a single context: lower max_length, choose a smaller dtype or model, or a "
                    "device with more memory "
                    f"({str(error).strip().splitlines()[0] if str(error) else type(error).__name__})"
                ) from error
        with suppress(RuntimeError):  # after a broken capture, torch before 2.13 believes that it goes on
            torch.cuda.empty_cache()
        middle = (len(items) + 1) // 2
        fits = max(1, middle * max(map(length, items)))
        self.max_tokens = fits if self.max_tokens is None else min(self.max_tokens, fits)
        logger.warning("out of memory with %d contexts at once; trying %d, also from now on", len(items), middle)
        for half in (items[:middle], items[middle:]):
            yield from self.run(run, half, length)
