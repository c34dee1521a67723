"""The lm-eval model of a sweep: one set of weights, every cell's answers, each context prefilled once.

lm-eval evaluates the cells one after the other. When the first of them asks for answers, all cells of the same protocol
are answered together: batch by batch, one prefill, and then every cell compresses its own clone and scores. What has
been answered stands on disk, so each later cell finds its answers there, and so does a sweep that was killed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from lm_eval_kvpress.engine.batching import batches, in_halves
from lm_eval_kvpress.engine.request_batches import RequestBatches
from lm_eval_kvpress.engine.runner import Runner
from lm_eval_kvpress.engine.shared_prefill import SharedPrefills
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.arguments import Settings, parse_arguments
from lm_eval_kvpress.harness.loading import check_settings
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.records.log_file import ThroughputLog
from lm_eval_kvpress.records.totals import new_totals
from lm_eval_kvpress.sweep.cells import Cell
from lm_eval_kvpress.sweep.store import CellStore, Outcome

logger = logging.getLogger("lm_eval_kvpress")


@dataclass
class CellRun:
    """A cell while the sweep lasts.

    Attributes:
        done: the items that have an answer.
        num_batches_before: of the runner's batches, those of earlier calls.
    """

    cell: Cell
    settings: Settings
    store: CellStore
    log: ThroughputLog
    runner: Runner
    done: set[str] = field(default_factory=set)
    num_batches_before: int = 0

    @property
    def shares(self) -> bool:
        """Whether its prefills are shared with other cells."""
        return self.runner.compressor.shares

    @property
    def num_tokens_prefilled(self) -> int:
        """Tokens of this call's prefills of its own."""
        batches = self.runner.meter.records.batches[self.num_batches_before :]
        return 0 if self.shares else sum(batch.num_prefill_tokens for batch in batches)


class SweepModel(KVPress):
    """`KVPress` under one cell after the other.

    Args:
        pretrained, arguments: what all cells share.
    """

    def __init__(self, pretrained: str | None = None, **arguments: Any) -> None:
        # Cells that stream have a budget each; the model itself is loaded under the default protocol.
        own = {name: value for name, value in arguments.items() if name != "rolling" and not name.startswith("stream_")}
        super().__init__(pretrained, **own)
        self._shared_arguments = arguments
        self._shared_prefills = SharedPrefills(self._press_model)
        self._peers: list[CellRun] = []
        self._attention_at_load = self.model.config._attn_implementation

    @property
    def num_tokens_shared(self) -> int:
        """Tokens that were prefilled for all cells that share, each once."""
        return self._shared_prefills.num_tokens

    def open(self, cell: Cell, store: CellStore) -> CellRun:
        """A cell ready to be run, with what an earlier call answered."""
        settings, _ = parse_arguments({**self._shared_arguments, **cell.arguments})
        try:
            check_settings(settings, self.model.config, self._asked_max_length)
        except UsageError as error:
            raise UsageError(f"cell {cell.name}: {error}") from error
        if settings.rolling == "stream":
            settings = replace(settings, stream_output=str(store.folder / "stream"))
        store.folder.mkdir(parents=True, exist_ok=True)
        shares = settings.press.shares_prefill and settings.rolling != "stream"
        log = ThroughputLog(store.folder / "throughput.jsonl")
        runner = self._new_runner(settings, [log], self._shared_prefills if shares else None)
        runner.meter.restore(log.records())
        num_batches_before = len(runner.meter.records.batches)
        return CellRun(cell, settings, store, log, runner, store.keys(), num_batches_before)

    def turn_to(self, run: CellRun, peers: Sequence[CellRun]) -> None:
        """Makes ``run`` the cell that answers; ``peers`` are it and the unfinished cells that share its prefills."""
        self._current, self._peers = run, list(peers)
        self._settings, self._runner, self._totals = run.settings, run.runner, new_totals()
        self._rolling_window = run.settings.rolling_window(self.max_length)
        needed = run.settings.press.attn_implementation or self._attention_at_load
        if self.model.config._attn_implementation != needed:
            self.model.set_attn_implementation(needed)

    def _batch_limits(self, press: PressSpec, work: RequestBatches[Any]) -> tuple[int, int | None]:
        """A shared prefill is held whole, with half as much again, and a clone beside it."""
        max_items, max_tokens = super()._batch_limits(press, work)
        return max_items, None if max_tokens is None else max(1, max_tokens // 3)

    def _check_lengths(self, work: RequestBatches[Any]) -> None:
        for run in self._peers:
            self._check_lengths_for(run.runner, work)

    def _run(self, work: RequestBatches[Any], bar: tqdm[Any]) -> Iterator[tuple[int, Any]]:
        keys = _keys(work)
        wanting = [run for run in self._peers if not run.done.issuperset(keys)]
        bar.total += len(keys) * (len(wanting) - 1) if wanting else 0
        for items in batches(work, *self._batch_limits(parse_press("none"), work)):
            missing = [item for item in items if any(keys[item] not in run.done for run in wanting)]
            bar.update((len(items) - len(missing)) * len(wanting))
            if missing:
                in_halves(lambda part: self._answer_all(work, part, keys, wanting, bar), missing)
        for run in wanting:
            run.runner.meter.finish(work.request_type)
        stored = self._current.store.outcomes()
        outcomes = {item: stored[key] for item, key in enumerate(keys)}
        work.record_totals(outcomes, self._totals)
        yield from work.answers(outcomes).items()

    def _answer_all(
        self,
        work: RequestBatches[Any],
        items: Sequence[int],
        keys: Sequence[str],
        runs: Sequence[CellRun],
        bar: tqdm[Any],
    ) -> list[None]:
        """One batch for every cell that has not answered it; what is answered is on disk before the next cell."""
        shared = [run for run in runs if run.shares]
        if shared:
            shared[0].runner.compressor.hold(work.contexts(items))
        for run in runs:
            todo = [item for item in items if keys[item] not in run.done]
            if todo:
                outcomes: dict[str, Outcome] = {
                    keys[item]: outcome for item, outcome in zip(todo, work.run(run.runner, todo), strict=True)
                }
                if not work.splits_requests:
                    run.runner.meter.finish(work.request_type)
                run.store.add(outcomes)
                run.done.update(outcomes)
            bar.update(len(items))
            bar.set_postfix({"cell": run.cell.name, **run.runner.meter.live()}, refresh=False)
        return [None] * len(items)


def _keys(work: RequestBatches[Any]) -> list[str]:
    """A name for each item that says all that its outcome depends on, within the sweep's settings."""
    num_items = sum(len(segment) for segment in work.segments())
    texts = (repr((work.request_type, work.identity(item))) for item in range(num_items))
    return [hashlib.sha256(text.encode()).hexdigest()[:24] for text in texts]
