"""One model under one press: batches of contexts in, outcomes out, each batch timed.

Knows token ids. Does not know text, lm-eval or where requests come from; `request_batches` says which contexts make a
batch and what the outcomes answer.
"""

from __future__ import annotations

import functools
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from lm_eval_kvpress.cache.compressed import CompressedCache
from lm_eval_kvpress.engine import batching, memory
from lm_eval_kvpress.engine.compression import CompressedBatch, Compressor
from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.cuda_graph import GraphRecorder
from lm_eval_kvpress.engine.decode_budget import BudgetKeeper
from lm_eval_kvpress.engine.decode_scoring import predict_while_compressing
from lm_eval_kvpress.engine.decoding import LogitsNotFiniteError, decode
from lm_eval_kvpress.engine.fidelity import FullDocuments, FullSide
from lm_eval_kvpress.engine.not_finite import check_finite, not_finite
from lm_eval_kvpress.engine.outcomes import Document, Generated, GenerationSettings, Prompt, Scored, Streamed
from lm_eval_kvpress.engine.sampling import sampler_for
from lm_eval_kvpress.engine.scoring import BranchScore, Held, Pack, Predictions, predict
from lm_eval_kvpress.engine.stream_plan import StreamPlan
from lm_eval_kvpress.engine.streaming import ChunkLosses, DocumentStream, stream
from lm_eval_kvpress.engine.turns import Turn, single_turns_of, turns_of
from lm_eval_kvpress.engine.windows import Window
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.decoding import DecodingSpec
from lm_eval_kvpress.records.clock import Clock
from lm_eval_kvpress.records.fidelity import Fidelity, text_fidelity
from lm_eval_kvpress.records.meter import Meter, RequestId, RequestShare
from lm_eval_kvpress.records.totals import ContextRecord


class Runner:
    """Runs batches, each timed by the clock and recorded on the meter.

    Args:
        model: the model, presentable to kvpress.
        compressor: prefills contexts under the press.
        clock, meter: of this press's run.
        autocast: makes the context in which forwards run.
        decoding: the press that acts while tokens are produced, if there is one.
        decode_scoring: whether it acts on continuations that are scored as well, one by one.
        graphs: captures decoding steps of the model; shared by all of its runners.
        full_side: predicts over the full cache as well, so that scores get their `Fidelity`.
    """

    def __init__(
        self,
        model: PressableModel,
        compressor: Compressor,
        clock: Clock,
        meter: Meter,
        autocast: Callable[[], AbstractContextManager[Any]],
        decoding: DecodingSpec | None = None,
        graphs: GraphRecorder | None = None,
        full_side: FullSide | None = None,
        decode_scoring: bool = False,
    ) -> None:
        self.model, self.compressor, self.clock, self.meter = model, compressor, clock, meter
        self._autocast, self._decoding, self._graphs = autocast, decoding, graphs or GraphRecorder(model)
        self._full_side, self._scores_while_compressing = full_side, decode_scoring and decoding is not None

    def compress(self, contexts: Sequence[Context]) -> CompressedBatch:
        """Prefill contexts under the press, as `Compressor.compress` does."""
        with self._autocast():
            return self.compressor.compress(contexts)

    def score_groups(self, groups: Sequence[batching.ContextGroup], ids: Mapping[int, RequestId]) -> list[Scored]:
        """Score all continuations of each context, which is prefilled once.

        Args:
            ids: by request; a group's ``members`` are such requests.

        Raises:
            UsageError: for a log-likelihood that is not finite.
        """
        contexts = [group.context for group in groups]
        turns = single_turns_of(groups) if self._scores_while_compressing else turns_of(groups)
        full = self._over_full_cache(contexts, turns)
        self.meter.start()
        batch = self.compress(contexts)
        predictions, scores = self._score(batch.cache, turns)
        shares = []
        for group, branches, record in zip(groups, scores, batch.records, strict=True):
            for member, branch in zip(group.members, branches, strict=True):
                self._check_finite(branch.logprobs, f"request {member} of task '{ids[member].task}'")
                num_tokens = len(branch.logprobs)
                shares.append(RequestShare(ids[member], len(group.context), num_tokens, context=record))
        self.meter.batch("loglikelihood", len(groups), shares)
        return _scored(self._compared(scores, turns, full, predictions), batch.pressed, batch.records)

    def score_windows(self, windows: Sequence[Window], ids: Sequence[RequestId]) -> list[Scored]:
        """Score the targets of windows that are all pressed, or all plain.

        Args:
            ids: the request of each window.

        Raises:
            UsageError: for a log-likelihood that is not finite.
        """
        is_pressed, contexts = windows[0].pressed, [window.parts for window in windows]
        queries = [context.held_back if is_pressed else context.tokens for context in contexts]
        packs = tuple(Pack(query, (window.targets,)) for query, window in zip(queries, windows, strict=True))
        turns = [Turn(tuple(range(len(windows))), packs)]
        full = self._over_full_cache(contexts, turns) if is_pressed else None
        self.meter.start()
        records: Sequence[ContextRecord | None] = [None] * len(windows)
        pressed = [False] * len(windows)
        if is_pressed:
            batch = self.compress(contexts)
            cache, records, pressed = batch.cache, batch.records, batch.pressed
        else:  # the whole context is fed with the targets: one plain forward, in which no press can act
            cache = self.model.empty_cache(len(windows))
        predictions, scores = self._score(cache, turns, is_plain=not is_pressed)
        for id, branches in zip(ids, scores, strict=True):
            self._check_finite(branches[0].logprobs, f"document {id.doc_id} of task '{id.task}'")
        shares = [
            RequestShare(id, len(window.context), len(window.targets), context=record)
            for id, window, record in zip(ids, windows, records, strict=True)
        ]
        self.meter.batch("loglikelihood_rolling", len(windows), shares)
        return _scored(self._compared(scores, turns, full, predictions), pressed, records)

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Generated]:
        """Continue prompts from their compressed caches.

        Raises:
            UsageError: for logits that are not finite.
        """
        full = self._texts_over_full_cache(prompts, settings)
        self.meter.start()
        keeper, start = self._keeper([prompt.seed for prompt in prompts]), time.perf_counter()
        with self._autocast():
            batch = self.compressor.compress([prompt.context for prompt in prompts])
            with self.clock.phase("decode") as produced:
                rows, times_sec = self._decode(batch, prompts, settings, keeper, start - batch.borrowed_sec)
                produced["tokens"] += sum(len(row) for row in rows)
        shares = [
            RequestShare(
                prompt.id, len(prompt.context), len(row), context=record, token_times_sec=times_sec[: len(row)]
            )
            for prompt, row, record in zip(prompts, rows, batch.records, strict=True)
        ]
        self.meter.batch("generate_until", len(prompts), shares, decoding_steps=self._graphs.newest)
        held = [(0, 0) if keeper is None else keeper.counts(index, len(row)) for index, row in enumerate(rows)]
        fidelities = [None if full is None else text_fidelity(row, full[index]) for index, row in enumerate(rows)]
        return [
            Generated(tuple(row), record, *counts, fidelity)
            for row, record, counts, fidelity in zip(rows, batch.records, held, fidelities, strict=True)
        ]

    def _decode(
        self,
        batch: CompressedBatch,
        prompts: Sequence[Prompt],
        settings: GenerationSettings,
        keeper: BudgetKeeper | None,
        start_sec: float,
    ) -> tuple[list[list[int]], tuple[float, ...]]:
        """The new tokens of each prompt, and for each step the seconds since ``start_sec``."""
        times_sec = list[float]()
        contexts, seeds = [prompt.context.tokens for prompt in prompts], [prompt.seed for prompt in prompts]
        sampler = sampler_for(settings.options, contexts, seeds, settings.max_new_tokens, self.model.device)
        must_run_singly = keeper is not None or not sampler.is_repeatable or self.compressor.quantization is not None
        try:
            rows = decode(
                self.model,
                batch.cache,
                contexts,
                num_held_back=[len(query) for query in batch.queries],
                max_new_tokens=settings.max_new_tokens,
                sampler=sampler,
                stop_ids=settings.stop_ids,
                stopped=settings.stopped,
                on_token=lambda: times_sec.append(time.perf_counter() - start_sec),
                record=self._graphs.for_steps(settings.max_new_tokens - 1, must_run_singly=must_run_singly),
                keeper=keeper,
            )
        except LogitsNotFiniteError as error:
            id = prompts[error.row].id
            what = f"document {id.doc_id} of task '{id.task}' has a logit after {error.num_tokens} new tokens"
            raise not_finite(what, self.model, self.compressor.press.name) from None
        return rows, tuple(times_sec)

    def stream(
        self,
        documents: Sequence[Document],
        plan: StreamPlan,
        *,
        prefix_token: int,
        on_tokens: Callable[[int, int], None] = lambda index, num_tokens: None,
        on_finished: Callable[[int, Streamed], None] = lambda index, outcome: None,
        keeps_finished: bool = False,
        window: int = 0,
    ) -> list[Streamed]:
        """Stream documents of at least one token each, side by side.

        Args:
            prefix_token: predicts each document's first token.
            on_tokens: called after each step with a document's index and how many of its tokens were scored.
            on_finished: called with a document's index and outcome as soon as it ends, while others go on.
            keeps_finished: whether a document is not streamed again once ``on_finished`` has it: if memory runs out,
                the time of those that ended is recorded, and the others' time is no document's.
            window: the most tokens of a forward, for the full cache's side of fidelity.

        Raises:
            UsageError: for a loss that is not finite.
        """
        full = self._documents_over_full_cache(documents, prefix_token, window)
        self.meter.start()
        press_for = functools.lru_cache(maxsize=8)(lambda num_entries: self.compressor.press.build(num_entries))
        streams = [DocumentStream(document.tokens, plan) for document in documents]
        ended, failure = list[int](), None
        tokens = [document.tokens for document in documents]
        with self._autocast(), self.clock.phase("stream") as scored:
            try:
                for step in stream(self.model, tokens, prefix_token, plan, press_for):
                    for row, (index, losses) in enumerate(zip(step.documents, step.losses, strict=True)):
                        id = documents[index].id
                        self._check_finite(losses, f"document {id.doc_id} of task '{id.task}'", num_before=step.start)
                        streams[index].add(step, losses, self._compared_chunk(full, step, row, plan))
                        scored["tokens"] += len(losses)
                        on_tokens(index, len(losses))
                        if streams[index].is_finished:
                            on_finished(index, streams[index].outcome())
                            ended.append(index)
            except (RuntimeError, MemoryError) as error:
                if not (keeps_finished and memory.ran_out(error)):
                    raise
                failure = error
        if ended:
            finished = [documents[index] for index in sorted(ended)]
            shares = [RequestShare(doc.id, 1, len(doc.tokens), weight=len(doc.tokens)) for doc in finished]
            lost_weight = scored["tokens"] - sum(len(doc.tokens) for doc in finished)
            self.meter.batch("loglikelihood_rolling", len(documents), shares, lost_weight=lost_weight)
        if failure is not None:
            raise failure
        return [one.outcome() for one in streams]

    def _keeper(self, seeds: Sequence[int]) -> BudgetKeeper | None:
        """What compresses a batch while it is decoded, whose rows draw random numbers from these seeds."""
        return None if self._decoding is None else BudgetKeeper(self.model, self._decoding, seeds)

    def _over_full_cache(self, contexts: Sequence[Context], turns: Sequence[Turn]) -> list[Predictions] | None:
        """What the full cache predicts, where fidelity is measured: before the batch's clock runs."""
        return None if self._full_side is None else self._full_side.predictions(contexts, turns)

    def _texts_over_full_cache(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[list[int]] | None:
        """What the full cache generates under the same settings and draws, where fidelity is measured."""
        if self._full_side is None:
            return None
        return self._full_side.texts(
            prompts, settings, lambda batch: self._decode(batch, prompts, settings, None, time.perf_counter())[0]
        )

    def _documents_over_full_cache(
        self, documents: Sequence[Document], prefix_token: int, window: int
    ) -> FullDocuments | None:
        if self._full_side is None:
            return None
        with self._autocast():
            return FullDocuments(self.model, [document.tokens for document in documents], prefix_token, window)

    def _compared_chunk(
        self, full: FullDocuments | None, step: ChunkLosses, row: int, plan: StreamPlan
    ) -> Fidelity | None:
        """How far a row of a chunk is from the full cache's predictions, once entries were evicted."""
        if full is None or step.start < plan.first_pressed:
            return None
        with self.clock.apart():
            return full.compared(step.documents[row], step.hidden[row], step.start)

    def _score(
        self, cache: CompressedCache, turns: Sequence[Turn], *, is_plain: bool = False
    ) -> tuple[list[Predictions], list[list[BranchScore]]]:
        """The predictions of each turn, and the scores of each row; plain ones without any press."""
        predictions, scores = list[Predictions](), [list[BranchScore]() for _ in cache.num_seen]
        for turn in turns:
            with self._autocast(), self.clock.phase("score", num_tokens=turn.num_tokens):
                found, keeper = self._predicted(turn.select(cache), turn, is_plain)
                for place, (row, branches) in enumerate(zip(turn.rows, found.scores(self.model), strict=True)):
                    scores[row] += branches if keeper is None else [_held(branches[0], keeper, place)]
            if self._full_side is not None:
                predictions.append(found)
        return predictions, scores

    def _predicted(self, cache: CompressedCache, turn: Turn, is_plain: bool) -> tuple[Predictions, BudgetKeeper | None]:
        """The predictions of a turn over its rows, and what compressed these meanwhile, if anything did."""
        if is_plain or not self._scores_while_compressing:
            return predict(self.model, cache, turn.packs), None
        keeper = self._keeper([zlib.crc32(repr(pack).encode()) for pack in turn.packs])
        assert keeper is not None
        return predict_while_compressing(self.model, cache, turn.packs, keeper), keeper

    def _compared(
        self,
        scores: Sequence[Sequence[BranchScore]],
        turns: Sequence[Turn],
        full: Sequence[Predictions] | None,
        compressed: Sequence[Predictions],
    ) -> Sequence[Sequence[BranchScore]]:
        """Add to the scores how far each token is from the full cache's prediction, where that is known."""
        if full is None or self._full_side is None:
            return scores
        return self._full_side.compared(scores, turns, full, compressed)

    def _check_finite(self, logprobs: Sequence[float], what: str, *, num_before: int = 0) -> None:
        check_finite(logprobs, what, self.model, self.compressor.press.name, num_before=num_before)


def _held(branch: BranchScore, keeper: BudgetKeeper, row: int) -> BranchScore:
    """The score with what the decoding press did to its row."""
    num_tokens = len(branch.logprobs)
    return replace(branch, held=Held(*keeper.counts(row, num_tokens), keeper.num_before(row, num_tokens)))


def _scored(
    scores: Sequence[Sequence[BranchScore]], pressed: Sequence[bool], records: Sequence[ContextRecord | None]
) -> list[Scored]:
    return [
        Scored(tuple(branches), flag, record) for branches, flag, record in zip(scores, pressed, records, strict=True)
    ]
