"""Streams a task's documents: batches them, keeps the losses by position, takes up an interrupted run where it ended.

Knows the engine, settings and files. Does not know lm-eval or text.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from lm_eval_kvpress.engine.batching import in_batches
from lm_eval_kvpress.engine.streaming import StreamPlan, stream
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.settings import Settings
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.streaming import SEES_CACHE, STREAM_PRESSES, num_sinks
from lm_eval_kvpress.records.clock import Clock
from lm_eval_kvpress.records.loss_files import StreamStore
from lm_eval_kvpress.records.meter import Meter, RequestId, RequestShare
from lm_eval_kvpress.records.rolling_score import RollingScore
from lm_eval_kvpress.records.totals import TaskTotals


@dataclass
class StreamedDocument:
    """A document and the losses, in nats, of its tokens so far."""

    id: RequestId
    tokens: list[int]
    losses: list[float] = field(default_factory=list)

    @property
    def task(self) -> str:
        return self.id.task

    @property
    def name(self) -> str:
        return str(self.id.doc_id)

    @property
    def is_finished(self) -> bool:
        return len(self.losses) == len(self.tokens)


class StreamRun:
    """Streams documents through one model under one setting.

    Args:
        model: the model, presentable to kvpress.
        settings: with ``rolling=stream``; its press keeps ``stream_budget`` entries.
        prefix_token: predicts each document's first token.
        clock, meter, totals: filled in here.
        store: where finished documents are kept, or None.
    """

    def __init__(
        self,
        model: PressableModel,
        settings: Settings,
        *,
        prefix_token: int,
        clock: Clock,
        meter: Meter,
        totals: dict[str, TaskTotals],
        store: StreamStore | None,
    ) -> None:
        assert settings.stream_budget is not None
        sees_cache = STREAM_PRESSES[settings.press.name] == SEES_CACHE
        self._model, self._settings, self._prefix_token = model, settings, prefix_token
        self._clock, self._meter, self._totals, self._store = clock, meter, totals, store
        self._plan = StreamPlan(
            budget=settings.stream_budget,
            chunk=settings.stream_chunk,
            rotate=settings.stream_positions == "cache",
            num_hidden=settings.stream_budget + settings.stream_chunk if sees_cache else 0,
            num_sinks=num_sinks(settings.press),
            row_by_row=not settings.press.batches,
        )

    def run(self, documents: Sequence[StreamedDocument], batch_size: int, bar: tqdm[None]) -> None:
        """Fills in the losses of all documents; what an earlier run finished is read, not computed."""
        for document in documents:
            stored = self._store and self._store.load(document.task, document.tokens, document.name)
            document.losses = stored or []
        todo = [document for document in documents if not document.is_finished]
        todo.sort(key=lambda document: -len(document.tokens))
        bar.total = sum(len(document.tokens) for document in todo)
        for batch in in_batches(todo, batch_size, lambda document: len(document.tokens)):
            self._run_batch(batch, bar)

    def _run_batch(self, batch: Sequence[StreamedDocument], bar: tqdm[None]) -> None:
        build = self._settings.press.build
        press_for = functools.lru_cache(maxsize=8)(lambda num_entries: build(num_entries))
        tokens = [document.tokens for document in batch]
        self._meter.start()
        with self._clock.phase("stream") as scored:
            for step in stream(self._model, tokens, self._prefix_token, self._plan, press_for):
                for index, losses in zip(step.documents, step.losses, strict=True):
                    self._take(batch[index], losses)
                    totals = self._totals[batch[index].task]
                    totals.max_stream_entries = max(totals.max_stream_entries, step.num_entries)
                    totals.max_stream_bytes = max(totals.max_stream_bytes, step.cache_bytes)
                    scored["tokens"] += len(losses)
                    bar.update(len(losses))
        shares = [RequestShare(document.id, 1, len(document.tokens), weight=len(document.tokens)) for document in batch]
        self._meter.batch("loglikelihood_rolling", len(batch), shares)
        self._meter.finish("loglikelihood_rolling")

    def _take(self, document: StreamedDocument, losses: Sequence[float]) -> None:
        if not all(math.isfinite(loss) for loss in losses):
            raise UsageError(
                f"document {document.name} of task '{document.task}' has a loss that is not finite after "
                f"{len(document.losses)} tokens (dtype {self._model.model.dtype}): overflow in float16 is the usual "
                "cause; try dtype=float32"
            )
        document.losses += losses
        if document.is_finished and self._store is not None:
            self._store.save(document.task, document.tokens, document.name, document.losses)

    def score(self, document: StreamedDocument) -> RollingScore:
        """The document's log-likelihood; under the press counts what was scored after the first eviction."""
        budget, chunk = self._plan.budget, self._plan.chunk
        first = -(-(budget + 1) // chunk) * chunk  # the first chunk that starts beyond the budget
        logprobs = [-loss for loss in document.losses]
        before, after = logprobs[:first], logprobs[first:]
        self._totals[document.task].add_scores(before, pressed=False)
        self._totals[document.task].add_scores(after, pressed=True)
        return RollingScore(math.fsum(logprobs), len(logprobs), len(after), math.fsum(after))
