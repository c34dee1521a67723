"""From request batches to answers: batch by batch, halved where memory runs out, each outcome counted once.

Knows sessions and the engine's request batches. Does not know lm-eval or text.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from tqdm import tqdm

from lm_eval_kvpress.cache.quantized import Quantization
from lm_eval_kvpress.engine.batching import Halving, batches
from lm_eval_kvpress.engine.request_batches import RequestBatches
from lm_eval_kvpress.harness.session import Session
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.spec import PressSpec


class BatchLimits(Protocol):
    """Says the most items per batch, and the most padded tokens, or None for any number of them."""

    def __call__(
        self, press: PressSpec, requests: RequestBatches[Any], quantization: Quantization | None = None, /
    ) -> tuple[int, int | None]: ...


def shared_limits(limits: BatchLimits, requests: RequestBatches[Any]) -> tuple[int, int | None]:
    """A shared prefill is held whole, with half as much again, and a clone or its packed entries beside it: a third of
    the tokens."""
    max_items, max_tokens = limits(parse_press("none"), requests)
    return max_items, None if max_tokens is None else max(1, max_tokens // 3)


def session_limits(limits: BatchLimits, session: Session, requests: RequestBatches[Any]) -> tuple[int, int | None]:
    """Of one session's batches, which hold the full cache too if they are compared with it."""
    settings = session.settings
    if settings.fidelity:
        return shared_limits(limits, requests)
    return limits(settings.press, requests, settings.quantization)


class Answering(Protocol):
    """A way to answer what one call of lm-eval asks for. The model holds one; a sweep brings its own."""

    def answers(self, kinds: Sequence[RequestBatches[Any]], bar: tqdm[Any]) -> Iterator[tuple[int, Any]]:
        """Yield ``(request, answer)`` as answers come, for all requests of the call.

        Args:
            kinds: the requests, grouped by what may share a batch.
            bar: advances by what the batches report.

        Raises:
            UsageError: before any work, if a context is too short and the settings refuse that.
        """


class SessionAnswering:
    """Answer under one session.

    Args:
        session: whose press runs, and whose totals are added to.
        limits: sizes of batches.
    """

    def __init__(self, session: Session, limits: BatchLimits) -> None:
        self._session, self._limits = session, limits
        self._halving = defaultdict[str, Halving](Halving)  # by request type, for the rest of the run

    def answers(self, kinds: Sequence[RequestBatches[Any]], bar: tqdm[Any]) -> Iterator[tuple[int, Any]]:
        for requests in kinds:
            self._session.check_lengths(requests)
        for requests in kinds:
            yield from self._answers(requests, bar)

    def _answers(self, requests: RequestBatches[Any], bar: tqdm[Any]) -> Iterator[tuple[int, Any]]:
        session, meter = self._session, self._session.runner.meter
        run, outcomes = functools.partial(requests.run, session.runner, advance=bar.update), dict[int, Any]()
        halving = self._halving[requests.request_type]
        for items in batches(requests, *session_limits(self._limits, session, requests)):
            done = dict(zip(items, halving.run(run, items, requests.length), strict=True))
            outcomes |= done
            bar.set_postfix(meter.live(), refresh=False)
            if not requests.splits_requests:
                meter.finish(requests.request_type)
                yield from requests.answers(done).items()
        meter.finish(requests.request_type)
        requests.record_totals(outcomes, session.totals)
        if requests.splits_requests:
            yield from requests.answers(outcomes).items()
