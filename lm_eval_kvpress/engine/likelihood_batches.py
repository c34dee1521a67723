"""``loglikelihood``: continuations to score, grouped by the context that they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lm_eval_kvpress.engine.batching import ContextGroup, group_by_context
from lm_eval_kvpress.engine.contexts import Context, is_first
from lm_eval_kvpress.engine.outcomes import Scored
from lm_eval_kvpress.engine.runner import Runner
from lm_eval_kvpress.records.meter import RequestId
from lm_eval_kvpress.records.totals import TaskTotals, TotalsByTask

Tokens = tuple[int, ...]


class LikelihoodBatches:
    """One item per context (see `request_batches.RequestBatches`).

    Args:
        pairs: the context of each request, in its two parts, and its continuation.
        ids: of each request.
        found: what was counted while the requests were made, by task; part of the totals once they are answered.
    """

    request_type, splits_requests = "loglikelihood", False
    is_cached_whole, num_cache_copies = False, 1

    def __init__(
        self,
        pairs: Sequence[tuple[Context, Tokens]],
        ids: Sequence[RequestId],
        found: Mapping[str, TaskTotals] | None = None,
    ) -> None:
        self._found = found or {}
        self._set(group_by_context(pairs), dict(enumerate(ids)))

    def _set(self, groups: list[ContextGroup], ids: Mapping[int, RequestId]) -> None:
        self._groups, self._ids = groups, ids
        self.progress_total = len(groups)
        self.requests: Sequence[int] = list(ids)
        self.longest = max((len(group.context) for group in groups), default=0)

    @property
    def longest_scored(self) -> int:
        """Tokens of the longest continuation."""
        return max((len(one) for group in self._groups for one in group.continuations), default=0)

    def segments(self) -> Iterator[list[int]]:
        yield list(range(len(self._groups)))

    def length(self, item: int) -> int:
        return len(self._groups[item].context)

    def identity(self, item: int) -> Any:
        group = self._groups[item]
        return group.context, group.continuations, [self._ids[member] for member in group.members]

    def contexts(self, items: Sequence[int]) -> list[Context]:
        return [self._groups[item].context for item in items]

    def part(self, items: Sequence[int]) -> LikelihoodBatches:
        groups = [self._groups[item] for item in items]
        part = LikelihoodBatches((), ())
        part._set(groups, {member: self._ids[member] for group in groups for member in group.members})
        return part

    def run(self, runner: Runner, items: Sequence[int], advance: Callable[[int], object]) -> list[Scored]:
        outcomes = runner.score_groups([self._groups[item] for item in items], self._ids)
        advance(len(items))
        return outcomes

    def answers(self, outcomes: Mapping[int, Scored]) -> dict[int, tuple[float, bool]]:
        return {
            member: (math.fsum(branch.logprobs), branch.is_greedy)
            for item, outcome in outcomes.items()
            for member, branch in zip(self._groups[item].members, outcome.branches, strict=True)
        }

    def record_totals(self, outcomes: Mapping[int, Scored], totals: TotalsByTask) -> None:
        for task, counts in self._found.items():
            totals[task].merge(counts)
        seen = set[tuple[str, Tokens]]()
        for item, group in enumerate(self._groups):
            outcome = outcomes[item]
            assert outcome.context is not None
            for task in dict.fromkeys(self._ids[member].task for member in group.members):
                totals[task].add_split(group.context.num_held_back, group.context.num_question)
                if is_first(group.context, task, seen):
                    totals[task].add_context(outcome.context)
            for member, branch in zip(group.members, outcome.branches, strict=True):
                id, pressed = self._ids[member], outcome.pressed
                totals[id.task].add_scores(branch.logprobs, pressed=pressed, fidelity=branch.fidelity, doc_id=id.doc_id)
                if (held := branch.held) is not None:
                    after = len(branch.logprobs) - held.num_before
                    totals[id.task].add_held(held.num_compressions, held.max_entries, after)
