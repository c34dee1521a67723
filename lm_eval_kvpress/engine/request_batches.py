"""What every kind of request has in common: items to run in batches, and the way from outcomes back to answers.

Each kind (`likelihood_batches`, `rolling_batches`, `stream_batches`, `generation_batches`) orders its items, longest
first, runs any of them on a `Runner`, and turns outcomes into one answer per request. Answers and totals are functions
of the outcomes alone. Knows token ids. Does not know lm-eval or presses: the same batches can be run under one press
after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.runner import Runner
from lm_eval_kvpress.records.totals import TotalsByTask

Outcome = TypeVar("Outcome")


class RequestBatches(Protocol[Outcome]):
    """Requests of one kind. Items are counted from 0, in the order in which they are best run.

    Attributes:
        request_type: lm-eval's name of the request type.
        splits_requests: whether a request may have several items, and so no answer before the last of them.
        is_cached_whole: whether all tokens of `length` stay in the cache, and not the share that a press keeps.
        num_cache_copies: how often a batch holds its cache in memory at the same time.
        progress_total: the sum of what `run` reports over all items.
        longest: tokens of the longest context, or of the longest document in ``loglikelihood_rolling``; 0 without any.
        requests: the requests of the call to which the items belong, in any order.
    """

    request_type: str
    splits_requests: bool
    is_cached_whole: bool
    num_cache_copies: int
    progress_total: int
    longest: int
    requests: Sequence[int]

    def segments(self) -> Iterator[list[int]]:
        """Items in runs that may share a batch; items of different segments never do."""

    def length(self, item: int) -> int:
        """Tokens that the item takes in a batch."""

    def identity(self, item: int) -> Any:
        """All that the item's outcome depends on, besides model, press and protocol."""

    def contexts(self, items: Sequence[int]) -> list[Context]:
        """The contexts of these items that a press will act on."""

    def part(self, items: Sequence[int]) -> RequestBatches[Outcome]:
        """These items alone, counted from 0 in the order given, without what only answers need. It can be pickled."""

    def run(self, runner: Runner, items: Sequence[int], advance: Callable[[int], object]) -> list[Outcome]:
        """Run these items as one batch; one outcome per item, in order. Progress is reported to ``advance``."""

    def answers(self, outcomes: Mapping[int, Outcome]) -> dict[int, Any]:
        """Request to answer, for every request all of whose items have an outcome. Records nothing."""

    def record_totals(self, outcomes: Mapping[int, Outcome], totals: TotalsByTask) -> None:
        """Add all outcomes to the totals, in an order that does not depend on how batches were made."""
