"""The forwards in which the continuations of a batch of contexts are scored, one pack of each context at a time.

Knows token ids and rows of caches. Does not know models, presses or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lm_eval_kvpress.cache.compressed import CompressedCache
from lm_eval_kvpress.engine import batching
from lm_eval_kvpress.engine.scoring import Pack

PACK_TOKENS = 4_096
"""The most continuation tokens per context that one forward scores."""


@dataclass(frozen=True)
class Turn:
    """One forward over some rows of a batch.

    Attributes:
        rows: their places in the batch.
        packs: the new tokens of each.
    """

    rows: tuple[int, ...]
    packs: tuple[Pack, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that are scored."""
        return sum(len(branch) for pack in self.packs for branch in pack.branches)

    def select(self, cache: CompressedCache) -> CompressedCache:
        """Its rows of the batch's cache."""
        return cache if len(self.rows) == len(cache.num_seen) else cache.select(self.rows)


def single_turns_of(groups: Sequence[batching.ContextGroup]) -> list[Turn]:
    """One continuation per context and forward, until all have been scored."""
    turns = []
    for turn in range(max(len(group.continuations) for group in groups)):
        rows = [row for row, group in enumerate(groups) if turn < len(group.continuations)]
        packs = [Pack(groups[row].context.held_back, (groups[row].continuations[turn],)) for row in rows]
        turns.append(Turn(tuple(rows), tuple(packs)))
    return turns


def turns_of(groups: Sequence[batching.ContextGroup]) -> list[Turn]:
    """One pack per context and forward, until all continuations have been scored."""
    packs = [list(batching.packs([len(c) for c in group.continuations], PACK_TOKENS)) for group in groups]
    turns = []
    for turn in range(max(map(len, packs))):
        rows = [row for row in range(len(groups)) if turn < len(packs[row])]
        branches = [tuple(groups[row].continuations[index] for index in packs[row][turn]) for row in rows]
        queries = [groups[row].context.held_back for row in rows]
        turns.append(Turn(tuple(rows), tuple(Pack(*pack) for pack in zip(queries, branches, strict=True))))
    return turns
