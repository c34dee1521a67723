"""``loglikelihood_rolling`` in windows: every window of every document is an item."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.outcomes import Scored
from lm_eval_kvpress.engine.runner import Runner
from lm_eval_kvpress.engine.windows import Window
from lm_eval_kvpress.records.meter import RequestId
from lm_eval_kvpress.records.rolling_score import RollingScore
from lm_eval_kvpress.records.totals import TotalsByTask


class RollingBatches:
    """Windows, plain ones first; plain windows and pressed ones never share a batch.

    Args:
        documents: the windows of each document.
        ids: of each document's request.
    """

    request_type, splits_requests = "loglikelihood_rolling", True
    is_cached_whole, num_cache_copies = False, 1

    def __init__(self, documents: Sequence[Sequence[Window]], ids: Sequence[RequestId]) -> None:
        items = [(index, window) for index, windows in enumerate(documents) for window in windows]
        items.sort(key=lambda item: (item[1].pressed, -len(item[1].context) - len(item[1].targets)))
        self._items, self._ids, self._num_documents = items, dict(enumerate(ids)), len(documents)
        self.progress_total = len(items)
        self.requests: Sequence[int] = range(len(documents))
        self.longest = max((sum(len(window.targets) for window in windows) for windows in documents), default=0)

    @property
    def longest_scored(self) -> int:
        """Tokens that are scored of the longest window of which the context is compressed."""
        return max((len(window.targets) for _, window in self._items if window.pressed), default=0)

    def segments(self) -> Iterator[list[int]]:
        for _, segment in itertools.groupby(range(len(self._items)), key=lambda item: self._items[item][1].pressed):
            yield list(segment)

    def length(self, item: int) -> int:
        _, window = self._items[item]
        return len(window.context) + len(window.targets)

    def identity(self, item: int) -> Any:
        index, window = self._items[item]
        return window.context, window.targets, window.pressed, self._ids[index]

    def contexts(self, items: Sequence[int]) -> list[Context]:
        windows = [self._items[item][1] for item in items]
        return [window.parts for window in windows if window.pressed]

    def part(self, items: Sequence[int]) -> RollingBatches:
        part = RollingBatches((), ())
        part._items, part.progress_total = [self._items[item] for item in items], len(items)
        part._ids = {index: self._ids[index] for index, _ in part._items}
        return part

    def run(self, runner: Runner, items: Sequence[int], advance: Callable[[int], object]) -> list[Scored]:
        batch = [self._items[item] for item in items]
        outcomes = runner.score_windows([window for _, window in batch], [self._ids[index] for index, _ in batch])
        advance(len(items))
        return outcomes

    def answers(self, outcomes: Mapping[int, Scored]) -> dict[int, RollingScore]:
        if len(outcomes) < len(self._items):
            return {}
        windows: list[list[Scored]] = [[] for _ in range(self._num_documents)]
        for item, (index, _) in enumerate(self._items):
            windows[index].append(outcomes[item])
        return {index: _rolling_score(scored) for index, scored in enumerate(windows)}

    def record_totals(self, outcomes: Mapping[int, Scored], totals: TotalsByTask) -> None:
        for item, (index, _) in enumerate(self._items):
            id, outcome = self._ids[index], outcomes[item]
            of_task = totals[id.task]
            if outcome.context is not None:
                of_task.add_context(outcome.context)
            (branch,) = outcome.branches
            of_task.add_scores(branch.logprobs, pressed=outcome.pressed, fidelity=branch.fidelity, doc_id=id.doc_id)
            if (held := branch.held) is not None:
                after = len(branch.logprobs) - held.num_before
                of_task.add_held(held.num_compressions, held.max_entries, after)


def _rolling_score(scored: Sequence[Scored]) -> RollingScore:
    everything = [logprob for outcome in scored for logprob in outcome.branches[0].logprobs]
    under_press = [logprob for outcome in scored if outcome.pressed for logprob in outcome.branches[0].logprobs]
    return RollingScore(math.fsum(everything), len(everything), len(under_press), math.fsum(under_press))
