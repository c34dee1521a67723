"""What a call of lm-eval asks for, as batches of contexts, and the way from their outcomes back to answers.

Each kind of work orders its items (longest first), runs any of them on a `Runner`, and turns outcomes into one answer
per request. Knows token ids and `plan`. Does not know lm-eval, models or presses: the same work can be run under one
press after the other.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch

from lm_eval_kvpress.engine import windows
from lm_eval_kvpress.engine.runner import Generated, Generation, Job, Runner, Scored
from lm_eval_kvpress.records.clock import RollingScore
from lm_eval_kvpress.records.meter import RequestId
from lm_eval_kvpress.records.totals import Ledger

logger = logging.getLogger("lm_eval_kvpress")

Outcome = TypeVar("Outcome")
Tokens = tuple[int, ...]


class Work(Protocol[Outcome]):
    """One kind of work. Items are counted from 0, in the order in which they are best run.

    Attributes:
        request_type: lm-eval's name for it.
        splits_requests: whether a request may have several items, and so no answer before the end.
    """

    request_type: str
    splits_requests: bool

    def segments(self) -> Iterator[list[int]]:
        """Runs of items that may share a batch."""

    def length(self, item: int) -> int:
        """Tokens that the item takes in a batch."""

    def identity(self, item: int) -> Any:
        """All that the item's outcome depends on, besides model, press and protocol."""

    def contexts(self, items: Sequence[int]) -> list[Tokens]:
        """The contexts of these items that a press will act on."""

    def run(self, runner: Runner, items: Sequence[int]) -> list[Outcome]:
        """The outcome of each item, run as one batch."""

    def answers(self, outcomes: Mapping[int, Outcome]) -> dict[int, Any]:
        """Request to answer, for the requests all of whose items are there."""

    def book(self, outcomes: Mapping[int, Outcome], ledger: Ledger) -> None:
        """Enters what happened into the totals, in an order that does not depend on how batches were made."""


class LikelihoodWork:
    """Continuations to score, grouped by the context that they share."""

    request_type, splits_requests = "loglikelihood", False

    def __init__(self, pairs: Sequence[tuple[Tokens, Tokens]], ids: Sequence[RequestId]) -> None:
        self._groups, self._ids = windows.group_by_context(pairs), ids

    def segments(self) -> Iterator[list[int]]:
        yield list(range(len(self._groups)))

    def length(self, item: int) -> int:
        return len(self._groups[item].context)

    def identity(self, item: int) -> Any:
        group = self._groups[item]
        return group.context, group.continuations, [self._ids[member] for member in group.members]

    def contexts(self, items: Sequence[int]) -> list[Tokens]:
        return [self._groups[item].context for item in items]

    def run(self, runner: Runner, items: Sequence[int]) -> list[Scored]:
        return runner.score_groups([self._groups[item] for item in items], self._ids)

    def answers(self, outcomes: Mapping[int, Scored]) -> dict[int, tuple[float, bool]]:
        return {
            member: (math.fsum(branch.logprobs), branch.is_greedy)
            for item, outcome in outcomes.items()
            for member, branch in zip(self._groups[item].members, outcome.branches, strict=True)
        }

    def book(self, outcomes: Mapping[int, Scored], ledger: Ledger) -> None:
        for item, group in enumerate(self._groups):
            outcome = outcomes[item]
            assert outcome.context is not None
            for task in dict.fromkeys(self._ids[member].task for member in group.members):
                ledger.context(task, outcome.context)
            for member, branch in zip(group.members, outcome.branches, strict=True):
                ledger.totals[self._ids[member].task].scored(branch.logprobs, pressed=outcome.pressed)


class RollingWork:
    """Documents to score in windows; plain windows and pressed ones never share a batch."""

    request_type, splits_requests = "loglikelihood_rolling", True

    def __init__(self, windows: Sequence[Sequence[windows.Window]], ids: Sequence[RequestId]) -> None:
        """One sequence of windows per document."""
        items = [(index, window) for index, of_one in enumerate(windows) for window in of_one]
        items.sort(key=lambda item: (item[1].pressed, -len(item[1].context) - len(item[1].targets)))
        self._items, self._ids, self._num_documents = items, ids, len(windows)

    def segments(self) -> Iterator[list[int]]:
        for _, run in itertools.groupby(enumerate(self._items), key=lambda item: item[1][1].pressed):
            yield [item for item, _ in run]

    def length(self, item: int) -> int:
        window = self._items[item][1]
        return len(window.context) + len(window.targets)

    def identity(self, item: int) -> Any:
        index, window = self._items[item]
        return window.context, window.targets, window.pressed, self._ids[index]

    def contexts(self, items: Sequence[int]) -> list[Tokens]:
        windows = [self._items[item][1] for item in items]
        return [window.context for window in windows if window.pressed]

    def run(self, runner: Runner, items: Sequence[int]) -> list[Scored]:
        windows = [self._items[item] for item in items]
        return runner.score_windows([window for _, window in windows], [self._ids[index] for index, _ in windows])

    def answers(self, outcomes: Mapping[int, Scored]) -> dict[int, RollingScore]:
        if len(outcomes) < len(self._items):
            return {}
        parts: list[list[Scored]] = [[] for _ in range(self._num_documents)]
        for item, (index, _) in enumerate(self._items):
            parts[index].append(outcomes[item])
        return {index: _rolling_score(scored) for index, scored in enumerate(parts)}

    def book(self, outcomes: Mapping[int, Scored], ledger: Ledger) -> None:
        for item, (index, _) in enumerate(self._items):
            task, outcome = self._ids[index].task, outcomes[item]
            if outcome.context is not None:
                ledger.context(task, outcome.context)
            ledger.totals[task].scored(outcome.branches[0].logprobs, pressed=outcome.pressed)


class GenerationWork:
    """Prompts to continue, all in one way."""

    request_type, splits_requests = "generate_until", False

    def __init__(
        self, jobs: Mapping[int, Job], generation: Generation, to_text: Callable[[Sequence[int]], str]
    ) -> None:
        """Request to prompt; ``to_text`` makes the answer of the new token ids."""
        self._members = sorted(jobs, key=lambda member: -len(jobs[member].context))
        self._jobs, self._generation, self._to_text = jobs, generation, to_text

    def _job(self, item: int) -> Job:
        return self._jobs[self._members[item]]

    def segments(self) -> Iterator[list[int]]:
        yield list(range(len(self._members)))

    def length(self, item: int) -> int:
        return len(self._job(item).context) + self._generation.max_new_tokens

    def identity(self, item: int) -> Any:
        generation = self._generation
        return self._job(item), sorted(generation.options.items()), generation.max_new_tokens, self._members[item]

    def contexts(self, items: Sequence[int]) -> list[Tokens]:
        return [self._job(item).context for item in items]

    def run(self, runner: Runner, items: Sequence[int]) -> list[Generated]:
        return runner.generate([self._job(item) for item in items], self._generation)

    def answers(self, outcomes: Mapping[int, Generated]) -> dict[int, str]:
        return {self._members[item]: self._to_text(outcome.ids) for item, outcome in outcomes.items()}

    def book(self, outcomes: Mapping[int, Generated], ledger: Ledger) -> None:
        for item in range(len(self._members)):
            outcome, task = outcomes[item], self._job(item).id.task
            ledger.context(task, outcome.context)
            totals = ledger.totals[task]
            totals.num_tokens_generated += len(outcome.ids)
            totals.num_texts += 1
            totals.num_texts_compressed += outcome.num_compressions > 0
            totals.num_decode_compressions += outcome.num_compressions
            totals.max_decode_entries = max(totals.max_decode_entries, outcome.max_entries)


def batches(work: Work[Any], max_items: int, max_tokens: int | None) -> Iterator[list[int]]:
    """Items that run together: at most so many, of at most so many padded tokens."""
    for segment in work.segments():
        yield from windows.batches(segment, max_items, work.length, max_tokens)


def in_halves(run: Callable[[Sequence[int]], list[Outcome]], items: Sequence[int]) -> list[Outcome]:
    """Runs a batch; where it does not fit into memory, its halves."""
    try:
        return run(items)
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise
    with suppress(RuntimeError):  # after a broken capture, torch before 2.13 believes that it goes on
        torch.cuda.empty_cache()
    middle = (len(items) + 1) // 2
    logger.warning("out of memory with %d contexts at once; trying %d", len(items), middle)
    return [*in_halves(run, items[:middle]), *in_halves(run, items[middle:])]


def _rolling_score(scored: Sequence[Scored]) -> RollingScore:
    everything = [logprob for outcome in scored for logprob in outcome.branches[0].logprobs]
    under_press = [logprob for outcome in scored if outcome.pressed for logprob in outcome.branches[0].logprobs]
    return RollingScore(math.fsum(everything), len(everything), len(under_press), math.fsum(under_press))
