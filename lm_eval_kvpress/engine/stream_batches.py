"""``loglikelihood_rolling`` in streams: every document is an item, and a finished one is kept on disk."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lm_eval_kvpress.engine import memory
from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.outcomes import Document, Streamed
from lm_eval_kvpress.engine.runner import Runner
from lm_eval_kvpress.engine.stream_plan import StreamPlan
from lm_eval_kvpress.records.fidelity import Fidelity
from lm_eval_kvpress.records.loss_files import LossFiles, StoredLosses
from lm_eval_kvpress.records.meter import RequestId
from lm_eval_kvpress.records.rolling_score import RollingScore
from lm_eval_kvpress.records.totals import TotalsByTask

Tokens = tuple[int, ...]


class StreamBatches:
    """Documents that need no computation first, the others after them, longest first.

    A document is saved as soon as it ends, also while others of its batch go on. So a batch that ran out of memory, or
    a run that was killed, computes only what was not finished. The largest cache of a document is that of the batch in
    which it ended.

    Args:
        documents: one per request.
        plan: how they are streamed.
        prefix_token: predicts each document's first token.
        loss_files: where finished documents are kept; they belong to one press and protocol.
        window: the most tokens of a forward.
    """

    request_type, splits_requests = "loglikelihood_rolling", False
    is_cached_whole, num_cache_copies = True, 2  # keys before and after rotation; a joined cache beside its parts

    def __init__(
        self,
        documents: Sequence[Document],
        plan: StreamPlan,
        *,
        prefix_token: int,
        loss_files: LossFiles | None = None,
        window: int = 0,
    ) -> None:
        self._documents, self._plan, self._prefix_token, self._files = documents, plan, prefix_token, loss_files
        self._window = window
        self.requests: Sequence[int] = range(len(documents))
        found = {index: outcome for index in range(len(documents)) if (outcome := self._load(documents[index]))}
        self._members = sorted(range(len(documents)), key=lambda index: (index not in found, -self._num_tokens(index)))
        self._stored = [found[index] for index in self._members[: len(found)]]
        self.longest = max(map(self._num_tokens, range(len(documents))), default=0)
        self.progress_total = sum(self._num_tokens(index) for index in self._members[len(found) :])

    @property
    def stored(self) -> dict[int, Streamed]:
        """Outcomes of the items that needed no computation when this was made."""
        return dict(enumerate(self._stored))

    @property
    def ids_stored(self) -> list[RequestId]:
        """Of the finished documents among them; one without tokens is not."""
        return [self._document(item).id for item, outcome in enumerate(self._stored) if outcome.losses]

    def longest_first(self) -> list[int]:
        """Items with a token at least, in an order that does not depend on which are finished."""
        items = [item for item in range(len(self._members)) if self.num_tokens(item)]
        return sorted(items, key=lambda item: (-self.num_tokens(item), self._members[item]))

    def num_tokens(self, item: int) -> int:
        return len(self._document(item).tokens)

    def _num_tokens(self, index: int) -> int:
        return len(self._documents[index].tokens)

    def _document(self, item: int) -> Document:
        return self._documents[self._members[item]]

    def segments(self) -> Iterator[list[int]]:
        for items in (range(len(self._stored)), range(len(self._stored), len(self._members))):
            if items:
                yield list(items)

    def length(self, item: int) -> int:
        """Entries that the document takes in the cache, however long it is."""
        return self._plan.num_entries(len(self._document(item).tokens))

    def identity(self, item: int) -> Any:
        return self._document(item), self._plan, self._prefix_token

    def contexts(self, items: Sequence[int]) -> list[Context]:
        return []  # a stream has no prefill, and no document is too short for it

    def part(self, items: Sequence[int]) -> StreamBatches:
        """Its outcomes are saved by who asked for them, with `save`."""
        documents = [self._document(item) for item in items]
        part = StreamBatches(documents, self._plan, prefix_token=self._prefix_token, window=self._window)
        part._members, part._stored = list(range(len(items))), []
        return part

    def run(self, runner: Runner, items: Sequence[int], advance: Callable[[int], object]) -> list[Streamed]:
        outcomes = {item: outcome for item in items if (outcome := self._finished(item))}
        missing = [item for item in items if item not in outcomes]
        if missing:
            outcomes |= self._stream(runner, missing, advance)
        return [outcomes[item] for item in items]

    def _stream(self, runner: Runner, items: Sequence[int], advance: Callable[[int], object]) -> dict[int, Streamed]:
        unsaved = Counter[int]()  # tokens of documents that start again if the batch fails

        def count(index: int, num_tokens: int) -> None:
            unsaved[index] += num_tokens
            advance(num_tokens)

        def save(index: int, outcome: Streamed) -> None:
            if self._files is not None:
                self.save(items[index], outcome)
                del unsaved[index]

        documents, prefix_token = [self._document(item) for item in items], self._prefix_token
        try:
            found = runner.stream(
                documents,
                self._plan,
                prefix_token=prefix_token,
                on_tokens=count,
                on_finished=save,
                keeps_finished=self._files is not None,
                window=self._window,
            )
        except (RuntimeError, MemoryError) as error:
            if memory.ran_out(error):
                advance(-unsaved.total())
            raise
        return dict(zip(items, found, strict=True))

    def answers(self, outcomes: Mapping[int, Streamed]) -> dict[int, RollingScore]:
        return {self._members[item]: _rolling_score(outcome) for item, outcome in outcomes.items()}

    def record_totals(self, outcomes: Mapping[int, Streamed], totals: TotalsByTask) -> None:
        for item in sorted(outcomes, key=self._members.__getitem__):
            outcome, id = outcomes[item], self._document(item).id
            of_task = totals[id.task]
            before, after = _logprobs(outcome)
            of_task.add_scores(before, pressed=False)
            of_task.add_scores(
                after,
                pressed=True,
                fidelity=outcome.fidelity,
                doc_id=id.doc_id,
                first_place=outcome.first_pressed,
            )
            of_task.num_documents_resumed += item < len(self._stored) and bool(outcome.losses)
            of_task.num_documents_left += item >= len(self._stored)
            of_task.max_stream_entries = max(of_task.max_stream_entries, outcome.max_entries)
            of_task.max_stream_bytes = max(of_task.max_stream_bytes, outcome.max_bytes)

    def _finished(self, item: int) -> Streamed | None:
        return self._stored[item] if item < len(self._stored) else self._load(self._document(item))

    def _load(self, document: Document) -> Streamed | None:
        """The outcome of a document that was finished, or has nothing to score."""
        if not document.tokens:
            return Streamed(())
        if self._files is None:
            return None
        stored = self._files.load(document.id.task, document.tokens, str(document.id.doc_id))
        return None if stored is None else _streamed(stored)

    def save(self, item: int, outcome: Streamed) -> None:
        """Bring a finished document to disk.

        Raises:
            UsageError: in one line, if it cannot be written.
        """
        assert self._files is not None, "there is no folder for the losses"
        document, counts = self._document(item), asdict(outcome)
        losses = counts.pop("losses")
        self._files.save(document.id.task, document.tokens, str(document.id.doc_id), losses, counts)


def _streamed(stored: StoredLosses) -> Streamed:
    fidelity = stored.counts.get("fidelity")
    of_tokens = None if fidelity is None else Fidelity(**{name: tuple(values) for name, values in fidelity.items()})
    return Streamed(stored.losses, **{**stored.counts, "fidelity": of_tokens})


def _logprobs(outcome: Streamed) -> tuple[list[float], list[float]]:
    """Log-probabilities of the tokens before the first eviction, and of those after it."""
    logprobs, first_pressed = [-loss for loss in outcome.losses], len(outcome.losses) - outcome.num_pressed
    return logprobs[:first_pressed], logprobs[first_pressed:]


def _rolling_score(outcome: Streamed) -> RollingScore:
    before, after = _logprobs(outcome)
    return RollingScore(math.fsum([*before, *after]), len(outcome.losses), len(after), math.fsum(after))
