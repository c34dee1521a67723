"""A session: what the run of one press needs besides the loaded model.

The model holds one and answers under it; a sweep opens one per cell and exchanges them. Knows settings, the engine's
runner and sums. Does not know lm-eval, text or files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from lm_eval_kvpress.engine.compression import Compressor
from lm_eval_kvpress.engine.cuda_graph import GraphRecorder
from lm_eval_kvpress.engine.fidelity import FullSide
from lm_eval_kvpress.engine.request_batches import RequestBatches
from lm_eval_kvpress.engine.runner import Runner
from lm_eval_kvpress.engine.shared_prefill import SharedPrefills
from lm_eval_kvpress.harness import run_record
from lm_eval_kvpress.harness.forecast import idle_presses
from lm_eval_kvpress.harness.ranks import RankFacts
from lm_eval_kvpress.harness.settings import Settings
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.records.clock import Clock
from lm_eval_kvpress.records.meter import Meter, Recorder
from lm_eval_kvpress.records.totals import TotalsByTask, new_totals

logger = logging.getLogger("lm_eval_kvpress")


@dataclass
class Session:
    """One press's run.

    Attributes:
        settings: how to compress and how to score.
        runner: runs batches under the press, on the loaded model.
        max_length: tokens of a context with its continuation, at most.
        totals: what was kept and scored so far, by task.
        num_from_cache: requests that lm-eval answered from its cache so far.
        num_stored_windows: windows whose answers were taken from disk so far, whoever computed them.
        gathered: the facts of all ranks, once lm-eval has gathered them; None before, and again once requests follow.
        num_ranks: processes that answer for this one, if others do.
        is_over: whether its record was read, or a call of it failed: what is asked next belongs to another run.
    """

    settings: Settings
    runner: Runner
    max_length: int
    totals: TotalsByTask = field(default_factory=new_totals)
    num_from_cache: int = 0
    num_stored_windows: int = 0
    gathered: RankFacts | None = None
    num_ranks: int = 1
    is_over: bool = False

    @property
    def own_facts(self) -> RankFacts:
        """What this process did, or others for it."""
        records = self.runner.meter.records
        num_timed = sum(one.num_batches for one in records.requests if one.request_type == "loglikelihood_rolling")
        num_untimed = max(0, self.num_stored_windows - num_timed)
        return RankFacts(self.totals, records, self.num_ranks, self.num_from_cache, num_untimed)

    @property
    def facts(self) -> RankFacts:
        """What was done: by all ranks if that is known, else by this process."""
        return self.gathered or self.own_facts

    @property
    def rolling_window(self) -> tuple[int, int]:
        """``(context, score)`` tokens per window of ``rolling=prefix``."""
        return self.settings.rolling_window(self.max_length)

    def check_lengths(self, requests: RequestBatches[Any]) -> None:
        """Before any work, warn of a press that will act on nothing; refuse contexts that are too short for it, under
        ``short_context=error``.

        Raises:
            UsageError: naming the first one.
        """
        for segment in requests.segments():
            self.runner.compressor.check_lengths(requests.contexts(segment))
        for problem in idle_presses(self.settings, self.max_length, requests):
            logger.warning("%s", problem)


def new_session(
    model: PressableModel,
    settings: Settings,
    *,
    name: str,
    max_length: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    graphs: GraphRecorder,
    recorders: Sequence[Recorder] = (),
    shared_prefills: SharedPrefills | None = None,
    full_side: FullSide | None = None,
) -> Session:
    """A session in which nothing has been run yet.

    Args:
        model: the loaded model, presented to kvpress.
        settings: that fit the model.
        name: of the checkpoint, for the records.
        max_length: tokens of a context with its continuation, at most.
        autocast: makes the context in which forwards run.
        graphs: of the model, for all of its sessions.
        recorders: get a record of every batch and request.
        shared_prefills: take the place of prefills of the session's own.
        full_side: of the model, for several sessions; by default one of the session's own if fidelity is asked for.
    """
    if not settings.fidelity:
        full_side = None
    elif full_side is None:
        if shared_prefills is None and settings.press.shares_prefill:
            shared_prefills = SharedPrefills(model)
        full_side = new_full_side(model, autocast, shared_prefills)
    clock = Clock(model.device, measures_memory=shared_prefills is None and full_side is None)
    compressor = Compressor(
        model,
        settings.press,
        short_context=settings.short_context,
        clock=clock,
        shared=shared_prefills,
        quantization=settings.quantization,
    )
    meter = Meter(clock, run_record.labels(settings, max_length, name, model), recorders)
    runner = Runner(
        model, compressor, clock, meter, autocast, settings.decoding, graphs, full_side, settings.decode_scoring
    )
    return Session(settings, runner, max_length)


def new_full_side(
    model: PressableModel, autocast: Callable[[], AbstractContextManager[Any]], shared: SharedPrefills | None
) -> FullSide:
    """What the full cache predicts, from prefills that presses share or else from its own."""
    plain = Compressor(model, parse_press("none"), short_context="keep", clock=Clock(model.device), shared=shared)
    return FullSide(model, plain, autocast)
