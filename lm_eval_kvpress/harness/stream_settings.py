"""The settings of ``rolling=stream`` as the engine takes them."""

from __future__ import annotations

from lm_eval_kvpress.engine.stream_plan import StreamPlan
from lm_eval_kvpress.harness.settings import Settings
from lm_eval_kvpress.presses.streaming import SEES_CACHE, STREAM_PRESSES, num_sinks


def stream_plan(settings: Settings) -> StreamPlan:
    """The budget and chunk of a stream, and what its press sees."""
    budget, chunk, press = settings.stream_budget, settings.stream_chunk, settings.press
    assert budget is not None, "checked with the arguments"
    return StreamPlan(
        budget,
        chunk,
        rotate=settings.stream_positions == "cache",
        num_hidden=budget + chunk if STREAM_PRESSES[press.name] == SEES_CACHE else 0,
        num_sinks=num_sinks(press) if settings.quantization is None else None,
        row_by_row=not press.batches,
        quantization=settings.quantization,
    )
