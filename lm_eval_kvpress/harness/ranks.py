"""Several processes, each with a share of the requests, and one record of them all.

Under ``accelerate launch`` with several GPUs lm-eval deals a task's documents out to its processes (ranks), gathers
what the tasks made of the answers, and asks rank 0 alone for the facts of the run; here the facts of all ranks are
merged. lm-eval also pads a smaller share with copies of its last request; here they are found, because what happened
to them is no part of the record.

Knows records and sums. Does not know lm-eval, models or presses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from lm_eval_kvpress.records.timings import RunRecords
from lm_eval_kvpress.records.totals import TaskTotals


@dataclass(frozen=True)
class RankFacts:
    """What one rank did, or several ranks together.

    Attributes:
        totals: by task.
        records: of batches and requests. Seconds are of one device each, so rates are per device.
        num_ranks: number of ranks.
        num_from_cache: requests that lm-eval answered from its cache, of which nothing else is known.
        num_untimed_windows: windows of documents that no record of a request covers.
    """

    totals: Mapping[str, TaskTotals]
    records: RunRecords
    num_ranks: int = 1
    num_from_cache: int = 0
    num_untimed_windows: int = 0


def merge(ranks: Sequence[RankFacts]) -> RankFacts:
    """Merge the facts of several ranks into those of one run."""
    if len(ranks) == 1:
        return ranks[0]
    totals, records = dict[str, TaskTotals](), RunRecords()
    for rank in ranks:
        for task, own in rank.totals.items():
            totals.setdefault(task, TaskTotals()).merge(own)
        records.merge(rank.records)
    return RankFacts(
        totals,
        records,
        num_ranks=sum(rank.num_ranks for rank in ranks),
        num_from_cache=sum(rank.num_from_cache for rank in ranks),
        num_untimed_windows=sum(rank.num_untimed_windows for rank in ranks),
    )


class Repeated(Protocol):
    """An `Instance` of lm-eval, to be answered ``repeats`` times; None is once."""

    repeats: int | None


Request = TypeVar("Request", bound=Repeated)


def without_padding(requests: Sequence[Request]) -> tuple[list[Request], list[int]]:
    """Leave out the padding: lm-eval passes a request on ``repeats`` times, as one object; more copies are padding.

    Returns:
        the requests without padding, and for each given request the place of its answer among their answers.
    """
    own = list[Request]()
    places = dict[int, list[int]]()
    seen, answered_by = Counter[int](), list[int]()
    for request in requests:
        of_request, turn, repeats = places.setdefault(id(request), []), seen[id(request)], request.repeats or 1
        seen[id(request)] += 1
        if turn < repeats:
            of_request.append(len(own))
            own.append(request)
        answered_by.append(of_request[turn % repeats])
    return own, answered_by
